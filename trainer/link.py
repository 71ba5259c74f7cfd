"""The worker's link to its agent: reports go out, orders come in, assignments follow one another.

One daemon thread listens for as long as the process lives, because a worker must not outlive its agent, and because an
order to park must reach a worker whose training thread is stuck in an exchange with peers that are gone.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch.distributed.device_mesh import DeviceMesh

from trainer import pulse, recorder
from trainer.contract import (
    EXIT_AGENT_GONE,
    EXIT_CANNOT_PARK,
    Assign,
    Copied,
    Inject,
    Park,
    Prepare,
    ReadRecorder,
    Receiver,
    Recorded,
    SaveEvery,
    Stop,
    ToWorker,
    frame,
)
from trainer.groups import GroupConnections, abort_device_groups
from trainer.saves import Interval

RECV_BYTES = 64 * 1024

# Longest that a report may wait for the agent to read. The socket's buffer holds minutes of reports, so an agent that
# does not read for this long beyond it is as good as gone.
AGENT_SEND_TIMEOUT_S = 60.0
# Between two cuts of a parking worker's connections: it may open another just after the first, as in a rendezvous.
CUT_INTERVAL_S = 0.05
# After the first cut, for which one way is enough, if whoever waits attends to its connections.
BOTH_WAYS_AFTER_S = 0.5
# Longest that an exchange may wait whose connections are all gone. To tell is a matter of milliseconds.
FORGOTTEN_S = 0.4


@dataclass
class Assignment:
    """One assignment while it is served, and what the agent has asked for meanwhile."""

    order: Assign
    stop: threading.Event = field(default_factory=threading.Event)
    parking: threading.Event = field(default_factory=threading.Event)
    unwound: threading.Event = field(default_factory=threading.Event)
    """Set once the training thread is out of its loop."""
    over: threading.Event = field(default_factory=threading.Event)
    """Set once the process groups are gone: nothing is left to cut."""
    connections: GroupConnections = field(init=False)
    mesh: DeviceMesh | None = None
    """Once there is one."""
    interval: Interval = field(init=False)
    """Between durable saves: as assigned, until the agent tells another."""
    on_copied: Callable[[int, str], None] | None = None
    """Called from the thread that listens to the agent."""
    on_inject: Callable[[Inject], None] | None = None
    """Called from the thread that listens to the agent; None while there is no state to hurt."""
    groups_before: dict[str, int] = field(default_factory=recorder.newest_groups)
    """Process groups of this process's generations before, in its flight recorders."""

    def __post_init__(self) -> None:
        self.connections = GroupConnections(self.order.store_port)
        self.interval = Interval(self.order.config.checkpoint.interval_steps)

    def park(self) -> None:
        """Have the training thread leave this generation, whatever exchange it waits in; returns at once."""
        if self.parking.is_set():
            return
        self.parking.set()
        ways = [self._cut]
        if self.order.config.device == "cuda":
            ways.append(self._abort)
        for way in ways:
            threading.Thread(target=way, name="park", daemon=True).start()

    def _abort(self) -> None:
        while not self.over.is_set():
            abort_device_groups(self.over)
            self.over.wait(CUT_INTERVAL_S)

    def _cut(self) -> None:
        """Cut until the groups are gone. On the CPU, a process whose training thread can't be reached so is ended.

        gloo can lose track of an exchange when a peer dies in the middle of it: it has ended all connections, and the
        exchange waits on. The agent would find out by the deadline, and so later.
        """
        began = time.monotonic()
        waits = _Standstill()
        while not self.over.is_set():
            both_ways = time.monotonic() - began > BOTH_WAYS_AFTER_S
            if self.connections.cut(both_ways) or self.unwound.is_set() or self.order.config.device != "cpu":
                waits = _Standstill()
            elif waits.lasts_s() > FORGOTTEN_S:
                sys.stderr.write("an exchange waits on without any connection: this worker cannot park\n")
                os._exit(EXIT_CANNOT_PARK)
            self.over.wait(CUT_INTERVAL_S)


class _Standstill:
    """How long the training thread has waited in one exchange, and computed nothing.

    A machine that stands still between two looks has not let it: no look counts for more than two intervals.
    """

    def __init__(self) -> None:
        self._looked, self._lasts_s, self._where, self._computed_s = time.monotonic(), 0.0, "", 0.0

    def lasts_s(self) -> float:
        now, training = time.monotonic(), threading.main_thread().ident
        assert training is not None
        waits, where = pulse.standing(training)
        computed_s = time.clock_gettime(time.pthread_getcpuclockid(training))
        self._lasts_s += min(now - self._looked, 2 * CUT_INTERVAL_S)
        self._looked = now
        if not waits or where != self._where or computed_s - self._computed_s > pulse.IDLE_SHARE * FORGOTTEN_S:
            self._lasts_s, self._where, self._computed_s = 0.0, where, computed_s
        return self._lasts_s


class Agent:
    """The worker's end of the socket to its agent. It listens from the start."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.settimeout(AGENT_SEND_TIMEOUT_S)
        self._sending = threading.RLock()
        self._work: queue.SimpleQueue[Assignment | Prepare] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="agent-link", daemon=True).start()

    def next_work(self) -> Assignment | Prepare:
        """Waits as long as the agent lives: a parked worker has no deadline, only an owner."""
        return self._work.get()

    def emit(self, message: object) -> None:
        """Tell the agent; from any thread, and from a signal handler: one that meets its own thread in here comes
        between two frames, if the socket takes a frame at once."""
        try:
            told = frame(message)
            with self._sending:
                self._sock.sendall(told)
        except OSError:
            os._exit(EXIT_AGENT_GONE)

    def _listen(self) -> None:
        receiver = Receiver(ToWorker)
        current: Assignment | None = None
        while True:
            for message in receiver.feed(self._receive()):
                if isinstance(message, Assign):
                    current = Assignment(message)
                    self._work.put(current)
                elif isinstance(message, Prepare):
                    self._work.put(message)
                elif current is not None:
                    self._obey(current, message)

    def _receive(self) -> bytes:
        while True:
            try:
                data = self._sock.recv(RECV_BYTES)
            except TimeoutError:  # the timeout is for sending; silence from the agent is normal
                continue
            except OSError:
                data = b""
            if not data:
                os._exit(EXIT_AGENT_GONE)
            return data

    def _obey(self, current: Assignment, message: object) -> None:
        order = current.order
        match message:
            case Stop():
                current.stop.set()
            case Park() if message.generation == order.generation:
                current.park()
            case SaveEvery():
                current.interval.steps = message.steps
            case Copied() if current.on_copied is not None:
                current.on_copied(message.step, message.error)
            case ReadRecorder() if message.generation == order.generation:
                groups, entries = recorder.read(current.groups_before)
                self.emit(Recorded(generation=order.generation, rank=order.rank, groups=groups, entries=entries))
            case Inject() if current.on_inject is not None:
                current.on_inject(message)
