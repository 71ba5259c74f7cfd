"""Worker processes as their agent sees them: forked from a zygote, spoken to over sockets, watched by one thread.

One permanent thread (`Workers`) does all input: contract messages, output lines, exits, and the zygote's own end. It
also starts the zygote, because a process that dies with its parent (PR_SET_PDEATHSIG) dies with the *thread* that made
it. Callbacks run in that thread: they must be quick and must not wait for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from orchestrator.runtime import zygote as zygote_module
from orchestrator.runtime.worker_log import LineBuffer, LogFile
from orchestrator.runtime.worker_process import ExitStatus, Worker, ZygoteProcess, tag, zygote_env
from trainer import contract

logger = logging.getLogger(__name__)

# A worker reads its control socket from its start on, so a send that takes this long has met a stopped process.
SEND_TIMEOUT_S = 20.0
# Successive zygotes that may die before a node gives up, and the life after which one no longer counts: it forks for
# hours, so one that lives a minute was started rightly and was killed from outside (for memory, or by a chaos test).
ZYGOTE_STARTS_MAX = 5
ZYGOTE_SOUND_LIFE_S = 60.0
# Where one has worked before, what keeps the next from it (no memory, a file system that is away) may pass.
ZYGOTE_RETRY_S = 15.0
# How often a fork that waits for a zygote looks whether it is still wanted.
WANTED_POLL_S = 0.1
# What is read at once; a pipe holds 64 KiB, a socket about 208 KiB.
READ_BYTES = 256 * 1024
# What is still read from a dead worker: more than both buffers hold, so only a descendant's endless output is cut.
DRAIN_MAX_BYTES = 4 * 1024 * 1024


class ZygoteError(RuntimeError):
    """The zygote cannot be started or cannot fork; the message holds its own error."""


class Workers:
    """A zygote, the workers that it forked, and the thread that listens to them."""

    def __init__(
        self,
        *,
        preload: str,
        env: dict[str, str],
        log: LogFile,
        on_message: Callable[[Worker, Any], None],
        on_exit: Callable[[Worker, ExitStatus], None],
    ) -> None:
        self._preload = preload
        self._env = zygote_env(env)
        self._log = log
        self._on_message = on_message
        self._on_exit = on_exit
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="worker-io", daemon=True)
        # Everything below is guarded by the condition, which is notified at each change.
        self._changed = threading.Condition()
        self._closing = False
        self._live: dict[int, Worker] = {}
        self._forks: dict[int, _Fork] = {}
        self._fork_id = 0
        self._zygote: ZygoteProcess | None = None
        self._failure = ""
        """Why there is no zygote, and none under way."""
        self._starts = 0
        self._worked = False
        """Whether any zygote has ever been ready."""
        self._retry_at: float | None = None
        """Monotonic second at which another is tried after a failure."""

    def start(self, deadline_s: float) -> None:
        """Start the zygote and wait until it has imported the preload module.

        Raises:
            ZygoteError: the import failed, or was not done within `deadline_s`.
        """
        self._thread.start()
        self._await_zygote(time.monotonic() + deadline_s)

    def fork(
        self,
        *,
        generation: int,
        rank: int,
        env: dict[str, str],
        deadline_s: float,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Worker:
        """A new worker process; `env` comes on top of the zygote's environment.

        Args:
            wanted: asked while there is no zygote yet; when it says no, the wait for one is over.

        Raises:
            ZygoteError: no worker within `deadline_s`, the zygote died, or the worker is not wanted any more.
        """
        assert threading.current_thread() is not self._thread, "called from a callback"
        deadline = time.monotonic() + deadline_s
        self._await_zygote(deadline, wanted)
        control, control_of_worker = socket.socketpair()
        log, log_of_worker = os.pipe2(os.O_CLOEXEC)
        fork = _Fork(generation=generation, rank=rank, control=control, log=log)
        try:
            self._request(fork, env, [control_of_worker.fileno(), log_of_worker])
        except OSError as error:
            fork.fail(f"the zygote takes no requests: {error}")
        finally:
            control_of_worker.close()
            os.close(log_of_worker)
        try:
            return fork.worker.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            # A late answer finds the future cancelled, and that worker is killed.
            if not fork.worker.cancel():
                return fork.worker.result(0)
            raise ZygoteError(f"no fork of rank {rank} in generation {generation} within {deadline_s:g} s") from error

    def _request(self, fork: _Fork, env: dict[str, str], descriptors: list[int]) -> None:
        with self._changed:
            if self._zygote is None or self._closing:
                raise BrokenPipeError("it has just died" if self._zygote is None else "closing")
            self._fork_id += 1
            request = json.dumps({"fork": self._fork_id, "env": env}).encode()
            assert len(request) <= zygote_module.PACKET_MAX_BYTES, len(request)
            # Not waiting: under this lock the thread would wait too, and a zygote that reads has room.
            socket.send_fds(self._zygote.socket, [request], descriptors, socket.MSG_DONTWAIT)
            self._forks[self._fork_id] = fork

    def live(self) -> list[Worker]:
        """The workers whose end has not been seen."""
        with self._changed:
            return list(self._live.values())

    def park(self, workers: Iterable[Worker], *, deadline_s: float) -> None:
        """Order workers to park, and wait until each has, has ended, or the deadline is over.

        One that is stopped, or takes no order, is killed at once: waiting for it would bring nothing.
        """
        assert threading.current_thread() is not self._thread, "called from a callback"
        workers = [worker for worker in workers if not worker.parked]
        for worker in workers:
            with contextlib.suppress(ConnectionError):  # it ends by itself, which is news
                if worker.is_stopped() or not worker.send_now(contract.Park(generation=worker.generation)):
                    self._kill(worker)
        with self._changed:
            self._changed.wait_for(lambda: all(w.parked or w.status is not None for w in workers), deadline_s)

    @staticmethod
    def _kill(worker: Worker) -> None:
        # One that has just died by itself is news, even if the order to end it came before that was seen.
        worker.doomed = worker.doomed or not worker.has_died()
        worker.signal(signal.SIGKILL)

    def end(self, workers: Iterable[Worker], *, deadline_s: float, grace_s: float = 0.0) -> None:
        """SIGTERM (with a grace), then SIGKILL; returns when the processes are gone.

        Raises:
            TimeoutError: one is still there after `deadline_s` (in uninterruptible sleep in a driver, say).
        """
        assert threading.current_thread() is not self._thread, "called from a callback"
        workers = list(workers)
        deadline = time.monotonic() + deadline_s
        if grace_s > 0:
            for worker in workers:
                worker.doomed = True
                worker.signal(signal.SIGTERM)
            self._await_end(workers, min(grace_s, deadline_s))
        for worker in workers:
            self._kill(worker)
        if not self._await_end(workers, max(0.0, deadline - time.monotonic())):
            alive = [worker.pid for worker in workers if worker.status is None]
            raise TimeoutError(f"processes {alive} are still there {deadline_s:g} s after SIGKILL")

    def close(self, deadline_s: float) -> None:
        """Kill everything and end the thread. Raises TimeoutError when that takes longer than `deadline_s`."""
        deadline = time.monotonic() + deadline_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self.end(self.live(), deadline_s=deadline_s)
            os.eventfd_write(self._wake, 1)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            raise TimeoutError(f"the thread that listens to the workers did not end within {deadline_s:g} s")
        if self._wake >= 0:  # not in the thread: it may end by itself before it is woken
            os.close(self._wake)
            self._wake = -1

    def _await_end(self, workers: list[Worker], timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: all(w.status is not None for w in workers), timeout_s)

    def _await_zygote(self, deadline: float, wanted: Callable[[], bool] = lambda: True) -> None:
        def settled() -> bool:
            return self._closing or bool(self._failure) or (self._zygote is not None and self._zygote.ready)

        while wanted():
            left_s = deadline - time.monotonic()
            with self._changed:
                in_time = self._changed.wait_for(settled, max(0.0, min(left_s, WANTED_POLL_S)))
                if self._failure:
                    raise ZygoteError(self._failure)
                if self._closing:
                    raise ZygoteError("closed")
                if in_time:
                    return
            if left_s <= 0:
                raise ZygoteError(f"no zygote with {self._preload!r} within the deadline")
        raise ZygoteError("not wanted any more")

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._start_zygote()
        while not (self._closing and not self._live):
            for key, _ in self._selector.select(self._until_retry_s()):
                try:
                    if key.fd in self._selector.get_map():  # an earlier event of this round may have taken it away
                        key.data()
                except Exception:
                    logger.exception("a callback or handler of the worker thread failed")
            if self._until_retry_s() == 0.0:
                self._retry()
        with self._changed:
            zygote, self._zygote = self._zygote, None
            orphans, self._forks = list(self._forks.values()), {}
        if zygote is not None:
            self._bury(zygote)
        for fork in orphans:
            fork.fail("closed")
        self._selector.close()

    def _woken(self) -> None:
        os.eventfd_read(self._wake)

    def _start_zygote(self) -> None:
        try:
            zygote = ZygoteProcess.spawn(self._preload, self._env)
        except (OSError, MemoryError) as error:
            self._fail(f"the zygote process could not be started: {error or type(error).__name__}")
            return
        self._selector.register(zygote.socket, selectors.EVENT_READ, lambda: self._read_zygote(zygote))
        self._selector.register(zygote.log, selectors.EVENT_READ, lambda: self._read_log(zygote.log, zygote.lines))
        with self._changed:
            self._zygote = zygote
            self._starts += 1

    def _read_zygote(self, zygote: ZygoteProcess) -> None:
        try:
            packet, descriptors, flags, _ = socket.recv_fds(zygote.socket, zygote_module.PACKET_MAX_BYTES, 1)
        except ConnectionResetError:  # it died with requests unread; what it had still said comes next
            return
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), f"answer was cut short: flags {flags}"
        if not packet:
            self._zygote_died(zygote)
            return
        message = json.loads(packet)
        if "ready" in message:
            with self._changed:
                zygote.ready = self._worked = True
                self._changed.notify_all()
        elif "forked" in message:
            self._forked(self._take_fork(message["forked"]), message["pid"], descriptors[0])
        elif "exit" in message:
            worker = self._live.get(message["exit"])
            if worker is not None:  # else: a process that the preload started and left to the zygote
                self._ended(worker, ExitStatus(exit_code=message["code"], signal=message["signal"]))
        elif "fork" in message:
            self._take_fork(message["fork"]).fail(message["failed"])
        else:
            self._fail(f"the worker's module {self._preload!r} cannot be preloaded:\n{message['failed']}")
            zygote.process.kill()  # what it had begun to import may keep it from ending

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._failure = reason
            self._changed.notify_all()
        if self._worked:
            self._retry_at = time.monotonic() + ZYGOTE_RETRY_S

    def _until_retry_s(self) -> float | None:
        return None if self._retry_at is None or self._closing else max(0.0, self._retry_at - time.monotonic())

    def _retry(self) -> None:
        """Try another zygote, some time after one has failed."""
        if self._zygote is not None:  # the one that failed is about to end
            self._retry_at = time.monotonic() + ZYGOTE_RETRY_S
            return
        logger.warning("trying another zygote")
        self._retry_at = None
        with self._changed:
            self._failure, self._starts = "", 0
        self._start_zygote()

    def _take_fork(self, fork_id: int) -> _Fork:
        with self._changed:
            return self._forks.pop(fork_id)

    def _forked(self, fork: _Fork, pid: int, pidfd: int) -> None:
        fork.control.settimeout(SEND_TIMEOUT_S)
        os.set_blocking(fork.log, False)
        worker = Worker(
            generation=fork.generation,
            rank=fork.rank,
            pid=pid,
            control=fork.control,
            log=fork.log,
            pidfd=pidfd,
            lines=LineBuffer(tag(fork.generation, fork.rank)),
        )
        with self._changed:
            assert pid not in self._live
            self._live[pid] = worker
        self._selector.register(fork.control, selectors.EVENT_READ, lambda: self._read_control(worker))
        self._selector.register(fork.log, selectors.EVENT_READ, lambda: self._read_log(worker.log, worker.lines))
        if fork.worker.set_running_or_notify_cancel():
            fork.worker.set_result(worker)
        if fork.worker.cancelled() or self._closing:
            worker.signal(signal.SIGKILL)

    def _read_control(self, worker: Worker) -> int:
        """Take what there is; returns the number of bytes."""
        if worker.receiver is None:
            return 0
        try:
            data = os.read(worker.control.fileno(), READ_BYTES)
        except BlockingIOError:
            return 0
        except ConnectionResetError:
            data = b""
        if not data:
            with contextlib.suppress(KeyError):
                self._selector.unregister(worker.control)
            return 0
        try:
            messages = worker.receiver.feed(data)
        except (ValueError, TypeError) as error:
            notice = f"killed, because it sent no contract message: {error}\n".encode()
            self._log.write(worker.lines.end() + worker.lines.feed(notice))
            worker.receiver = None
            self._selector.unregister(worker.control)
            worker.signal(signal.SIGKILL)
            return 0
        for message in messages:
            if isinstance(message, contract.Parked) and message.generation == worker.generation:
                self._parked(worker)
            self._call(self._on_message, worker, message)
        return len(data)

    def _parked(self, worker: Worker) -> None:
        """What it has printed until now belongs to the generation that it has left."""
        self._take_output(worker)
        with self._changed:
            worker.parked = True
            self._changed.notify_all()

    def _take_output(self, worker: Worker) -> None:
        _drain(partial(self._read_log, worker.log, worker.lines))
        if tagged := worker.lines.end():
            self._log.write(tagged)

    def _read_log(self, fd: int, lines: LineBuffer) -> int:
        """Take what there is; returns the number of bytes."""
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return 0
        if not data:
            with contextlib.suppress(KeyError):
                self._selector.unregister(fd)
        if tagged := lines.feed(data):
            self._log.write(tagged)
        return len(data)

    def _ended(self, worker: Worker, status: ExitStatus) -> None:
        """Take the last words of a dead worker, then make its end known."""
        _drain(partial(self._read_control, worker))
        self._take_output(worker)
        for fd in (worker.control, worker.log, worker.pidfd):
            with contextlib.suppress(KeyError):
                self._selector.unregister(fd)
        worker.ended(status)
        with self._changed:
            del self._live[worker.pid]
            self._changed.notify_all()
        self._call(self._on_exit, worker, status)

    @staticmethod
    def _call(callback: Callable[[Worker, Any], None], worker: Worker, what: object) -> None:
        try:
            callback(worker, what)
        except Exception:
            logger.exception("callback failed for %r of worker %d", what, worker.pid)

    def _zygote_died(self, zygote: ZygoteProcess) -> None:
        """Its children die with it, by PR_SET_PDEATHSIG; their own pidfds tell when. Start another."""
        with self._changed:
            self._zygote = None
            forks, self._forks = list(self._forks.values()), {}
            orphans = list(self._live.values())
        self._bury(zygote)
        for fork in forks:
            fork.fail(f"the zygote died (exit status {zygote.process.returncode})")
        killed = ExitStatus(exit_code=None, signal=signal.SIGKILL)
        for worker in orphans:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)  # what it has started itself is no child of the zygote
            self._selector.register(worker.pidfd, selectors.EVENT_READ, partial(self._ended, worker, killed))
        if time.monotonic() - zygote.started > ZYGOTE_SOUND_LIFE_S:
            self._starts = 0
        if self._closing or self._failure:
            return
        if self._starts >= ZYGOTE_STARTS_MAX:
            self._fail(f"{self._starts} zygotes died one after the other; exit status {zygote.process.returncode}")
            return
        logger.warning("the zygote died (exit status %s); starting another", zygote.process.returncode)
        self._start_zygote()

    def _bury(self, zygote: ZygoteProcess) -> None:
        self._selector.unregister(zygote.socket)
        zygote.socket.close()
        zygote.process.kill()
        zygote.process.wait()
        while self._read_log(zygote.log, zygote.lines):
            pass
        with contextlib.suppress(KeyError):
            self._selector.unregister(zygote.log)
        os.close(zygote.log)


def _drain(read: Callable[[], int]) -> None:
    """Take what there is, of which a descendant's endless output is cut."""
    taken = 0
    while taken < DRAIN_MAX_BYTES and (count := read()):
        taken += count


@dataclass(kw_only=True)
class _Fork:
    """A fork that the zygote has not yet answered."""

    generation: int
    rank: int
    control: socket.socket
    log: int
    worker: Future[Worker] = field(default_factory=Future)

    def fail(self, reason: str) -> None:
        self.control.close()
        os.close(self.log)
        if self.worker.set_running_or_notify_cancel():
            self.worker.set_exception(ZygoteError(reason))
