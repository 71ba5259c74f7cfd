"""Where a rank that hangs stands, line by line: its Python stacks, read from outside before anybody ends it.

py-spy reads another process's memory without stopping it or asking anything of it, so it answers for processes that
are stopped and for loops that never let go of the interpreter, too. What cannot be read is told with its reason: the
text goes into the run's evidence either way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from storage.redact import redacted
from storage.threads import begun

logger = logging.getLogger(__name__)

DEADLINE_S = 3.0
"""For one process; reading takes 10 to 60 ms on an idle machine. A halt waits for no longer."""
TO_START_S = 1.0
"""Beyond its deadline, for a tool that cannot even be started."""
TRIES = 3
"""A process that runs on while it is read can look inconsistent."""
AT_ONCE = 4
STACK_CHARS = 64_000
"""Kept of one process: some thousand frames."""
_reading: list[Future[tuple[bool, str]]] = []
"""Threads of this process that read, those among them that were left behind."""


def py_spy() -> str | None:
    """The tool, from this interpreter's own environment or else from the PATH."""
    own = str(Path(sys.executable).parent)
    return shutil.which("py-spy", path=os.pathsep.join([own, os.environ.get("PATH", "")]))


async def read_stacks(pid: int, tool: str | None, deadline_s: float = DEADLINE_S) -> str:
    """The stacks of all Python threads of a process, or why there are none. Never raises for want of them."""
    if tool is None:
        return "no stack: py-spy is not installed on this node (pip install py-spy)"
    _reading[:] = [each for each in _reading if not each.done()]
    if len(_reading) >= AT_ONCE:
        return "no stack: py-spy, which was started for others, still hangs"
    # In a thread: where the tool lies on a file system that hangs, starting it takes as long.
    reading = begun(partial(_read, tool, pid, time.monotonic() + deadline_s), "py-spy")
    _reading.append(reading)
    why = ""
    try:
        async with asyncio.timeout(deadline_s + TO_START_S):
            read, text = await asyncio.shield(asyncio.wrap_future(reading))
        if read:
            return redacted(text)[:STACK_CHARS]
        why = text
    except (TimeoutError, subprocess.TimeoutExpired):
        why = f"py-spy has not answered within {deadline_s:g} s"
    except OSError as error:
        why = f"{tool} cannot be started: {error}"
    if "permission" in why.lower():
        why += "; py-spy needs CAP_SYS_PTRACE here (in a container: add it to securityContext.capabilities)"
    return redacted(f"no stack: {why}")


def _read(tool: str, pid: int, deadline: float) -> tuple[bool, str]:
    """Whether it could be read, and the stacks or else why not."""
    command = [tool, "dump", "--nonblocking", "--pid", str(pid)]
    for _ in range(TRIES):
        left_s = max(0.0, deadline - time.monotonic())
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=left_s)
        if done.returncode == 0:
            return True, done.stdout.decode(errors="replace")
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return False, said[0] if said else f"exit code {done.returncode}"


class Stacks:
    """The stacks of one node's ranks that were found to hang, of one generation. For use on one event loop."""

    def __init__(self) -> None:
        self._generation = 0
        self._found: set[int] = set()
        self._taken: dict[int, asyncio.Task[str]] = {}
        self._room = asyncio.Semaphore(AT_ONCE)
        self._tool = py_spy()

    def see(self, generation: int, pids: dict[int, int]) -> None:
        """These ranks (with their process ids) are found to hang now: those that were not at the last call are read."""
        if generation != self._generation:
            self._generation, self._found, self._taken = generation, set(), {}
        for rank in pids.keys() - self._found:
            self._taken[rank] = asyncio.ensure_future(self._take(pids[rank]))
        self._found = set(pids)

    async def settle(self, deadline_s: float) -> None:
        """Wait until all that is being read has been, or `deadline_s` has passed."""
        if self._taken:
            await asyncio.wait(self._taken.values(), timeout=deadline_s)

    async def of(self, generation: int, rank: int) -> str:
        """What was read of a rank, or why nothing was."""
        if generation != self._generation or rank not in self._taken:
            return "no stack: none was taken on its node"
        return await self._taken[rank]

    async def _take(self, pid: int) -> str:
        try:
            async with self._room:
                return await read_stacks(pid, self._tool)
        except Exception as error:  # evidence must not end its node's agent
            logger.exception("the stacks of process %d cannot be read", pid)
            return f"no stack: {type(error).__name__}: {error}"
