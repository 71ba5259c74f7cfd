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
import sys
from pathlib import Path

from storage.redact import redacted

logger = logging.getLogger(__name__)

DEADLINE_S = 3.0
"""For one process; reading takes 10 to 60 ms on an idle machine. A halt waits for no longer."""
TRIES = 3
"""A process that runs on while it is read can look inconsistent."""
AT_ONCE = 4
STACK_CHARS = 64_000
"""Kept of one process: some thousand frames."""


def py_spy() -> str | None:
    """The tool, from this interpreter's own environment or else from the PATH."""
    own = str(Path(sys.executable).parent)
    return shutil.which("py-spy", path=os.pathsep.join([own, os.environ.get("PATH", "")]))


async def read_stacks(pid: int, tool: str | None, deadline_s: float = DEADLINE_S) -> str:
    """The stacks of all Python threads of a process, or why there are none. Never raises for want of them."""
    if tool is None:
        return "no stack: py-spy is not installed on this node (pip install py-spy)"
    why = ""
    try:
        async with asyncio.timeout(deadline_s):
            for _ in range(TRIES):
                read, text = await _run(tool, pid)
                if read:
                    return redacted(text)[:STACK_CHARS]
                why = text
    except TimeoutError:
        why = f"py-spy has not answered within {deadline_s:g} s"
    except OSError as error:
        why = f"{tool} cannot be started: {error}"
    if "permission" in why.lower():
        why += "; py-spy needs CAP_SYS_PTRACE here (in a container: add it to securityContext.capabilities)"
    return redacted(f"no stack: {why}")


async def _run(tool: str, pid: int) -> tuple[bool, str]:
    process = await asyncio.create_subprocess_exec(
        tool,
        "dump",
        "--nonblocking",
        "--pid",
        str(pid),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return True, out.decode(errors="replace")
    return False, (err.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"])[0]


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
