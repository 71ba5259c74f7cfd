"""A process that takes a worker's core: all threads of the worker are held on one core, which others compute on, too.

What a CPU quota or a noisy neighbour does, without a privilege that those need. It ends by its own deadline or with
the worker, and gives the cores back. Who computes little between long sleeps loses little: the kernel owes it a share.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import time

from orchestrator.chaos import apart

RIVALS = 2
"""Who compute on the core beside the worker: it gets a third of it, and takes three times as long. Each has a session
of its own, because Linux may divide a core among sessions first (sched_autogroup_enabled), and a worker has its own."""
PIN_INTERVAL_S = 0.2
"""Threads that the worker starts meanwhile are held, too, this soon."""


def slow(pid: int, seconds: float) -> str:
    """Slow the process down from now on, for `seconds`; what was done. Blocks until it has begun.

    Raises:
        RuntimeError: it did not begin; the process may be gone.
    """
    return apart.begin(__name__, "--pid", str(pid), "--seconds", str(seconds))


def hold(pid: int, seconds: float) -> None:
    """Hold the process on one of its cores among RIVALS, for so long.

    Raises:
        RuntimeError: another does so already: which cores the process had before is not to be seen now.
    """
    alone = socket.socket(socket.AF_UNIX)  # its end is this process's, however that ends
    try:
        alone.bind(f"\0shepherd-hog-{pid}")
    except OSError:
        raise RuntimeError(f"process {pid} is being slowed down already") from None
    deadline = time.monotonic() + seconds
    cores = os.sched_getaffinity(pid)
    core = max(cores)
    owner, rivals = os.getpid(), list[int]()
    try:
        _pin(pid, {core})
        rivals += [_rival(core, owner) for _ in range(RIVALS)]
        apart.tell(f"process {pid} shares core {core} with {RIVALS} that compute without end, for {seconds:g} s")
        while time.monotonic() < deadline and os.path.exists(f"/proc/{pid}"):
            time.sleep(PIN_INTERVAL_S)
            _pin(pid, {core})
    finally:
        for rival in rivals:
            os.kill(rival, signal.SIGKILL)
            os.waitpid(rival, 0)
        _pin(pid, cores)


def _pin(pid: int, cores: set[int]) -> None:
    """All threads of a process that there are now."""
    with contextlib.suppress(FileNotFoundError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cores)


def _rival(core: int, owner: int) -> int:
    child = os.fork()
    if child == 0:
        os.setsid()
        os.sched_setaffinity(0, {core})
        while os.getppid() == owner:  # it ends when its owner was killed
            for _ in range(100_000):
                pass
        os._exit(0)
    return child


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Slows a process down for a while.")
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    apart.leave()
    hold(given.pid, given.seconds)
