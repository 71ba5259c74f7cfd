"""The worker process: wait for an assignment, join its generation, restore, train, report, exit.

Made to run in a child forked from a single-threaded process that has imported this module: importing it imports
everything heavy and starts no thread, touches no device and opens no process group. Two helper threads are started
after the fork: one watches the agent's socket, because a worker must not outlive its agent; one is the pulse.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Literal, NoReturn

import psutil
import tokenizers  # noqa: F401  (imported before the fork, for the children)
import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, TCPStore

from storage.checkpointer import Checkpointer
from storage.durable import CheckpointFailed
from storage.manifest import ManifestError
from storage.redact import redacted
from storage.urls import StoreError
from trainer import harm, pulse
from trainer.audit import PeerStateError, StateAudit, StateCorruptError, StateDivergedError, replica_group
from trainer.contract import (
    EXIT_AGENT_GONE,
    EXIT_FAILED,
    EXIT_FINISHED,
    Assign,
    Failed,
    Inject,
    Phase,
    Receiver,
    Restored,
    SaveEvery,
    Stop,
    ToWorker,
    send,
)
from trainer.data import open_dataset
from trainer.loop import NonFiniteError, Session, train
from trainer.numeric import numeric_class, set_numerics
from trainer.optim import build_optimizer, set_completed_steps, set_random_state, train_state
from trainer.parallel import build_mesh, build_stage
from trainer.saves import Interval

RECV_BYTES = 64 * 1024

# Longest that a report may wait for the agent to read. The socket's buffer holds minutes of reports, so an agent that
# does not read for this long beyond it is as good as gone.
AGENT_SEND_TIMEOUT_S = 60.0

# What torch's transports say when a peer is lost, for errors that have no class of their own: gloo raises RuntimeError.
COLLECTIVE_MESSAGES = (
    "gloo",
    "nccl",
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "ProcessGroup",
)
# A rank that another's state has stopped leaves after that one has spoken, which takes milliseconds: its exit would end
# the generation before the other one has named its node. This rank is killed in its wait.
LEAVE_LAST_S = 1.0

# Of a worker's last words: the message begins with what is wrong, and a traceback ends with where; 100 lines of it. Ten
# thousand ranks may fail at once, and this is then 100 MB.
ERROR_CHARS = 2_000
TRACEBACK_CHARS = 8_000

MEMORY_MESSAGES = ("can't allocate memory", "out of memory")

FailureKind = Literal["exception", "collective", "memory", "state", "store", "audit", "corrupt", "diverged", "unclean"]


class Agent:
    """The worker's end of the socket to its agent: reports go out, orders come in."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._receiver = Receiver(ToWorker)
        self._sending = threading.Lock()
        self.stop = threading.Event()
        self.interval = Interval(0)
        """Between durable saves: as assigned, until the agent tells another."""
        self.on_inject: Callable[[Inject], None] | None = None
        """Called from the thread that watches the agent; None while there is no state to hurt."""

    def wait_for_assignment(self) -> Assign:
        """The first message. Waits as long as the agent lives: a parked worker has no deadline, only an owner."""
        while True:
            for message in self._receiver.feed(self._receive()):
                assert isinstance(message, Assign), f"expected Assign first, got {message}"
                self.interval.steps = message.config.checkpoint.interval_steps
                return message

    def watch(self) -> None:
        """From a daemon thread: hear what the agent asks for (`stop`, `interval`), leave with it when it goes."""
        self._sock.settimeout(AGENT_SEND_TIMEOUT_S)
        threading.Thread(target=self._watch, name="agent-watch", daemon=True).start()

    def emit(self, message: object) -> None:
        """Tell the agent; from any thread."""
        try:
            with self._sending:
                send(self._sock, message)
        except OSError:
            os._exit(EXIT_AGENT_GONE)

    def _watch(self) -> None:
        while True:
            try:
                messages = self._receiver.feed(self._receive())
            except TimeoutError:  # the timeout is for sending; silence from the agent is normal
                continue
            for message in messages:
                if isinstance(message, Stop):
                    self.stop.set()
                elif isinstance(message, SaveEvery):
                    self.interval.steps = message.steps
                elif isinstance(message, Inject) and self.on_inject is not None:
                    self.on_inject(message)

    def _receive(self) -> bytes:
        try:
            data = self._sock.recv(RECV_BYTES)
        except TimeoutError:
            raise
        except OSError:
            data = b""
        if not data:
            os._exit(EXIT_AGENT_GONE)
        return data


def main(sock: socket.socket) -> int:
    """Serve one assignment that comes over `sock`.

    Returns:
        EXIT_FINISHED. Failure ends the process by itself with EXIT_FAILED, the agent's death with EXIT_AGENT_GONE,
        both at once: a process group that a peer has broken can hang the interpreter's own shutdown.
    """
    agent = Agent(sock)
    assign = agent.wait_for_assignment()
    agent.watch()
    session: Session | None = None

    def step() -> int:
        return assign.restore.step if session is None else session.state.step

    pulse.start(assign.generation, assign.rank, step, agent.emit)
    try:
        session = start(assign, agent)
        agent.on_inject = partial(harm.obey, session=session)
        train(session, saved_step=assign.restore.step if assign.restore.source == "durable" else -1)
        # Together: a peer that leaves early resets connections on which the others may still be reading.
        distributed.barrier()
        distributed.destroy_process_group()
    except Exception as error:
        _die(agent, assign, step(), error)
    return EXIT_FINISHED


def start(assign: Assign, agent: Agent) -> Session:
    """Join the generation and bring this rank to the assigned state, timing each part.

    Raises:
        ValueError: the configuration does not fit the world or cannot be divided over it.
        FileNotFoundError: the data is not prepared on this node.
        storage.manifest.ManifestError: the assigned state is damaged.
    """
    config, clock = assign.config, Stopwatch()

    def phase(name: Literal["rendezvous", "build", "restore"]) -> None:
        step = assign.restore.step
        agent.emit(Phase(generation=assign.generation, rank=assign.rank, step=step, phase=name))

    # Said of each pipeline stage's output, which nothing here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    phase("rendezvous")
    set_numerics(config)
    join(assign)
    mesh = build_mesh(config.parallel, config.device, timedelta(seconds=config.collective_timeout_s))
    rendezvous_us = clock.lap_us()

    phase("build")
    dataset = open_dataset(config.data, config.model.vocab_size, config.seed)
    if config.data_digest and dataset.digest != config.data_digest:
        raise ValueError(
            f"the prepared data of data.corpus = {config.data.corpus!r} has changed under the run: its digest is "
            f"{dataset.digest}, the run's {config.data_digest}. Restore the corpus, or start a run of its own"
        )
    stage = build_stage(config, mesh, initial=assign.restore.source == "init")
    optimizer = build_optimizer(stage.module, config.optimizer)
    state = train_state(stage.module, optimizer, step=0)
    build_us = clock.lap_us()

    phase("restore")
    checkpointer = Checkpointer(
        url=config.url,
        run=config.run,
        rank=assign.rank,
        world_size=assign.world_size,
        epoch=assign.epoch,
        generation=assign.generation,
        ram_dir=assign.ram_dir,
        node=assign.node,
        local_dir=config.checkpoint.local_dir,
        keep=config.checkpoint.keep,
    )
    audit = StateAudit(state.tensors, config.audit, replica_group(mesh))
    mark = audit.blank_mark() if assign.restore.source == "ram" else {}
    copy = replace(state, per_rank=state.per_rank | mark)
    checkpointer.restore(copy, assign.restore)
    state.step = copy.step
    assert state.step == assign.restore.step, (state.step, assign.restore)
    set_completed_steps(optimizer, state.step)
    set_random_state(state.per_rank)
    audit.record_restored(mark)
    agent.emit(
        Restored(
            generation=assign.generation,
            rank=assign.rank,
            step=state.step,
            source=assign.restore.source,
            rendezvous_us=rendezvous_us,
            build_us=build_us,
            restore_us=clock.lap_us(),
            versions=numeric_class(config),
        )
    )
    return Session(
        config=config,
        generation=assign.generation,
        rank=assign.rank,
        stage=stage,
        optimizer=optimizer,
        state=state,
        dataset=dataset,
        checkpointer=checkpointer,
        audit=audit,
        emit=agent.emit,
        stop=agent.stop,
        interval=agent.interval,
    )


def join(assign: Assign) -> None:
    """Enter the generation's default process group, through its own store under its own prefix.

    A fresh prefix for each generation, because gloo would else read the addresses of the one before.
    """
    config = assign.config
    if assign.world_size != config.parallel.world_size:
        raise ValueError(
            f"assigned world_size {assign.world_size} is not parallel.pp * dp_replicate * dp_shard * tp = "
            f"{config.parallel.world_size}"
        )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(assign.store_host, assign.store_port))
    timeout = timedelta(seconds=config.collective_timeout_s)
    device = None
    if config.device == "cuda":
        device = torch.device("cuda", assign.local_rank)
        torch.cuda.set_device(device)
    store = TCPStore(assign.store_host, assign.store_port, is_master=False, wait_for_workers=False, timeout=timeout)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo",
        store=PrefixStore(f"workers/g{assign.generation}", store),
        rank=assign.rank,
        world_size=assign.world_size,
        timeout=timeout,
        device_id=device,
    )


def interface_towards(host: str, port: int) -> str:
    """Name of the network interface by which this node reaches `host`; the loopback device for 127.0.0.1.

    gloo would else bind what the node's own name resolves to, which need not be an address that peers can reach.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # a datagram socket sends nothing here: it only asks for the route
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return name
    raise ValueError(f"no network interface of this node has the address {own}, by which it reaches {host}")


class Stopwatch:
    """Laps in microseconds."""

    def __init__(self) -> None:
        self._last_ns = time.perf_counter_ns()

    def lap_us(self) -> int:
        last_ns, self._last_ns = self._last_ns, time.perf_counter_ns()
        return (self._last_ns - last_ns) // 1000


def failure_kind(error: BaseException) -> FailureKind:
    """What an exception says about its cause, from it and from those that it was raised from."""
    chain = list(_chain(error))
    text = "\n".join(str(link) for link in chain if isinstance(link, RuntimeError))
    if any(isinstance(link, StateCorruptError) for link in chain):
        return "corrupt"
    if any(isinstance(link, StateDivergedError) for link in chain):
        return "diverged"
    if any(isinstance(link, PeerStateError) for link in chain):
        return "unclean"
    if any(isinstance(link, NonFiniteError) for link in chain):
        return "audit"
    if any(isinstance(link, ManifestError) for link in chain):
        return "state"
    if any(isinstance(link, CheckpointFailed | StoreError) for link in chain):
        return "store"
    if any(isinstance(link, MemoryError) for link in chain) or any(m in text for m in MEMORY_MESSAGES):
        return "memory"
    if any(isinstance(link, distributed.DistError) for link in chain) or any(m in text for m in COLLECTIVE_MESSAGES):
        return "collective"
    return "exception"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _die(agent: Agent, assign: Assign, step: int, error: Exception) -> NoReturn:
    kind = failure_kind(error)
    # What the audit found is no line's fault, and the first rank to say so has all others ended: there is no time to
    # read source files for a traceback.
    in_haste = kind in ("corrupt", "diverged", "unclean")
    lines = traceback.format_exception_only(error) if in_haste else traceback.format_exception(error)
    detail = "".join(lines)
    sys.stderr.write(detail)
    sys.stdout.flush()
    sys.stderr.flush()
    agent.emit(
        Failed(
            generation=assign.generation,
            rank=assign.rank,
            step=step,
            kind=kind,
            # Redacted before they are cut: half a URL's credentials are not known as such.
            error=redacted(" ".join(f"{type(error).__name__}: {error}".split()))[:ERROR_CHARS],
            traceback=redacted(detail)[-TRACEBACK_CHARS:],
        )
    )
    if kind == "unclean":
        time.sleep(LEAVE_LAST_S)
    os._exit(EXIT_FAILED)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Shepherd worker; started by its agent.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the agent")
    sys.exit(main(socket.socket(fileno=parser.parse_args().fd)))
