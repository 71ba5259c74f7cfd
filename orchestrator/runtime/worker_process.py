"""One worker process, and the zygote process, as their agent holds them: sockets, pidfd, output."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from orchestrator.runtime import zygote as zygote_module
from orchestrator.runtime.worker_log import LineBuffer
from trainer import contract

SENDER_S = 1.0
"""For a message to be handed to the kernel while there is room; microseconds, unless the processor is taken."""


@dataclass(frozen=True, kw_only=True)
class ExitStatus:
    """How a process ended: exactly one of the two is set."""

    exit_code: int | None
    signal: int | None


@dataclass(eq=False, kw_only=True)
class Worker:
    """One worker process, from its fork to its end."""

    generation: int
    """With `rank` what it is assigned to, or was last; 0 when it never was, but is made ready for `rank`."""
    rank: int
    parked: bool = False
    """Whether it waits for its next assignment; the thread that listens to it has taken all that it said before."""
    doomed: bool = False
    """Whether we have ended it: its end is no news."""
    pid: int
    status: ExitStatus | None = None
    """Set when it has ended and all its messages and output have been taken."""
    control: socket.socket
    log: int
    pidfd: int
    lines: LineBuffer
    receiver: contract.Receiver | None = field(default_factory=lambda: contract.Receiver(contract.FromWorker))
    """None once it has sent what is no message: nothing more is read from it."""
    _send_lock: threading.Lock = field(default_factory=threading.Lock)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, message: object) -> None:
        """Raises OSError (TimeoutError, BrokenPipeError) when the worker does not take the message."""
        with self._send_lock:
            contract.send(self.control, message)

    def send_now(self, message: object) -> bool:
        """Send a short message, which is taken at once or not; if it is not, nothing else must be sent.

        Raises:
            ConnectionError: the process does not listen any more.
        """
        if not self._send_lock.acquire(timeout=SENDER_S):  # longer, and the one before has met a full buffer
            return False
        try:
            if self.status is not None:
                raise BrokenPipeError("it has ended")
            frame = contract.frame(message)
            return self.control.send(frame, socket.MSG_DONTWAIT) == len(frame)
        except BlockingIOError:
            return False
        finally:
            self._send_lock.release()

    def assign(self, generation: int, rank: int) -> None:
        """Before its next assignment is sent to a parked worker."""
        assert self.parked, self
        self.generation, self.rank, self.lines = generation, rank, LineBuffer(tag(generation, rank))
        self.parked = False

    def is_stopped(self) -> bool:
        """Whether its process has been stopped by a signal."""
        with contextlib.suppress(psutil.Error):
            return self.status is None and bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        return False

    def signal(self, signum: int) -> None:
        """Send a signal to this very process, never to a later one of the same number; nothing if it has ended."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self.status is None:
                signal.pidfd_send_signal(self.pidfd, signum)

    def has_died(self) -> bool:
        """Whether its process is over, also when its end has not been taken note of yet."""
        with self._lock:
            return self.status is not None or _is_readable(self.pidfd)

    def has_unread(self) -> bool:
        """Whether it has sent what nobody has read yet."""
        with self._lock:
            return self.status is None and _is_readable(self.control.fileno())

    def ended(self, status: ExitStatus) -> None:
        """Record the end and close what was open to the process. Only for the thread that listens to it."""
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)  # wakes a send that a descendant of the worker holds up
        with self._send_lock, self._lock:
            self.status = status
            self.control.close()
            os.close(self.log)
            os.close(self.pidfd)


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def tag(generation: int, rank: int) -> str:
    """Before each line of a worker's output."""
    return f"g{generation} r{rank}" if generation else f"warm r{rank}"


@dataclass(eq=False, kw_only=True)
class ZygoteProcess:
    process: subprocess.Popen[bytes]
    socket: socket.socket
    log: int
    lines: LineBuffer
    started: float
    ready: bool = False

    @staticmethod
    def spawn(preload: str, env: dict[str, str]) -> ZygoteProcess:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log, its_log = os.pipe2(os.O_CLOEXEC)
        arguments = ["--fd", str(its.fileno()), "--agent-pid", str(os.getpid()), "--preload", preload]
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", zygote_module.__name__, *arguments],
                env=env,
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=its_log,
                stderr=its_log,
            )
        except BaseException:
            ours.close()
            os.close(log)
            raise
        finally:
            its.close()
            os.close(its_log)
        os.set_blocking(log, False)
        return ZygoteProcess(
            process=process, socket=ours, log=log, lines=LineBuffer("zygote"), started=time.monotonic()
        )


def zygote_env(env: dict[str, str]) -> dict[str, str]:
    """The agent's environment with `env` on top, and with what keeps the preload single-threaded and importable."""
    merged = {**os.environ, **env}
    # numpy's OpenBLAS starts a thread a core when it is imported; training does not use numpy's algebra.
    merged["OPENBLAS_NUM_THREADS"] = "1"
    # The tokenizers library's pool does not survive a fork, and warns.
    merged["TOKENIZERS_PARALLELISM"] = "false"
    # torch.cuda.is_available() at import must ask the management library: cuInit does not survive a fork.
    merged["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # -P keeps the working directory off the path; ours may be reachable only by the agent's own sys.path. What `env`
    # itself names comes before: workers may have other code than their agent.
    root = str(Path(__file__).resolve().parents[2])
    paths = [env.get("PYTHONPATH"), root, os.environ.get("PYTHONPATH")]
    merged["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return merged
