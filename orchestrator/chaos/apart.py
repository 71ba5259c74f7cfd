"""Harm that lasts is done by a process apart from whoever was ordered to do it: it outlives that, and has its own end.

Ray ends the direct children of an actor that dies, so such a process forks once more: nobody's child, in a session of
its own.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys

BEGUN_DEADLINE_S = 20.0
"""For a Python to start on a machine without a free core, and to begin."""


def begin(module: str, *arguments: str) -> str:
    """Start `module` as a process apart; the line by which it says what it has begun to do. Blocks for that.

    Raises:
        RuntimeError: it has not begun; its own words are in the log.
    """
    command = [sys.executable, "-P", "-m", module, *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    with process.stdout as out:
        line = out.readline().strip() if select.select([out], [], [], BEGUN_DEADLINE_S)[0] else ""
    process.wait(BEGUN_DEADLINE_S)  # it has only forked
    if not line:
        raise RuntimeError(f"{module} did not begin within {BEGUN_DEADLINE_S:g} s; its words are in the log")
    return line


def leave() -> None:
    """Called by the module before anything else: from here on it is nobody's child."""
    if os.fork():
        os._exit(0)


def tell(line: str) -> None:
    """Say what has begun. Nobody reads any further line."""
    print(line, flush=True)
    os.close(1)
    os.open(os.devnull, os.O_WRONLY)
