"""Stacks of processes that hang: read from outside by the real py-spy, and told with a reason when they cannot be."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from orchestrator.runtime import stacks
from orchestrator.runtime.stacks import Stacks, py_spy, read_stacks

# Holds the interpreter for ever, in a function of a telling name.
GRIP = "import ctypes\ndef grip():\n    print('up', flush=True)\n    ctypes.PyDLL(None).pause()\ngrip()"


@contextmanager
def process(program: str) -> Iterator[int]:
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        yield child.pid
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_that_cannot_answer_is_read(stopped: bool) -> None:
    with process(GRIP) as pid:
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        text = asyncio.run(read_stacks(pid, py_spy(), deadline_s=60))
    assert re.search(r"grip \(<string>:[34]\)", text), text


def test_each_failure_says_why(tmp_path: Path) -> None:
    def tool(script: str) -> str:
        path = tmp_path / "py-spy"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    def text(tool: str | None, deadline_s: float = 60) -> str:
        return asyncio.run(read_stacks(os.getpid(), tool, deadline_s))

    assert text(None).startswith("no stack: py-spy is not installed")
    assert text(str(tmp_path / "absent")).startswith("no stack: ")
    assert "has not answered within 0.2 s" in text(tool("exec sleep 600"), deadline_s=0.2)
    refused = text(tool("echo 'Permission Denied: Try running again' >&2; exit 1"))
    assert refused.startswith("no stack: Permission Denied") and "CAP_SYS_PTRACE" in refused
    assert "s3://***@bucket" in text(tool("echo 's3://key:secret@bucket'"))


def test_what_is_read_belongs_to_what_is_found_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anew when it is found again after it was not, and of no other generation."""
    monkeypatch.setattr(stacks, "read_stacks", partial(read_stacks, deadline_s=60))

    async def talk(first: int, second: int) -> list[str]:
        taken = Stacks()
        taken.see(1, {0: first})
        taken.see(1, {0: second})  # found still: what was read first stands
        told = [await taken.of(1, 0), await taken.of(1, 1), await taken.of(2, 0)]
        taken.see(1, {})
        taken.see(1, {0: second})
        await taken.settle(60)
        return [*told, await taken.of(1, 0)]

    with process(GRIP) as one, process(GRIP.replace("grip", "clutch")) as other:
        first, stranger, later, again = asyncio.run(talk(one, other))
    assert "grip (" in first and "clutch (" in again
    assert stranger == later == "no stack: none was taken on its node"
