"""The ballast of disk-full: it fills what there is, within its bound, and gives everything back however it ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.chaos import ballast

MIB = 2**20
WITHIN_S = 20.0


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only the superuser may mount a small file system")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def free(folder: Path) -> int:
    usage = os.statvfs(folder)
    return usage.f_bavail * usage.f_frsize


def wait_for_free(folder: Path, least: int) -> None:
    deadline = time.monotonic() + WITHIN_S
    while free(folder) < least:
        assert time.monotonic() < deadline, f"only {free(folder)} bytes are free"
        time.sleep(0.02)


def holders(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if ballast.__name__ in _command(p) and str(folder) in _command(p)]


def test_a_file_system_is_full_for_the_time_and_then_as_before(small: Path) -> None:
    before = free(small)
    began = time.monotonic()
    told = asyncio.run(ballast.fill(str(small), 5.0, 64 * MIB))
    assert free(small) == 0 and list(small.iterdir()) == []
    with pytest.raises(OSError, match="No space left"):
        (small / "more").write_bytes(bytes(4096))
    (small / "more").unlink()
    (size,) = re.findall(r"^(\d+) bytes of ballast", told)
    assert before - MIB < int(size) <= before
    wait_for_free(small, before)
    assert time.monotonic() - began > 4.9


def test_what_others_give_back_is_taken_too(small: Path) -> None:
    (small / "old").write_bytes(bytes(4 * MIB))
    asyncio.run(ballast.fill(str(small), 60, 64 * MIB))
    (small / "old").unlink()
    deadline = time.monotonic() + WITHIN_S
    while free(small):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (holder,) = holders(small)
    holder.kill()
    wait_for_free(small, 15 * MIB)


def test_it_outlives_who_asked_and_frees_all_when_it_is_killed(small: Path) -> None:
    before = free(small)
    code = f"import asyncio, os; from orchestrator.chaos import ballast; asyncio.run(ballast.fill({str(small)!r}, 60, "
    code += f"{64 * MIB})); print(os.getpid()); os.kill(os.getpid(), 9)"
    asker = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert asker.returncode == -signal.SIGKILL and free(small) == 0
    (holder,) = holders(small)
    holder.kill()
    wait_for_free(small, before)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_it_takes_no_more_than_its_bound(tmp_path: Path) -> None:
    with open(tmp_path / "ballast", "wb") as file:
        assert ballast._take(file.fileno(), 0, 3 * MIB) == 3 * MIB
        assert ballast._take(file.fileno(), 3 * MIB, 3 * MIB) == 3 * MIB
    assert (tmp_path / "ballast").stat().st_size == 3 * MIB


def test_what_is_too_large_or_not_local_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GiB are free under .*--ballast-gib"):
        ballast.check(str(tmp_path), 4096)
    with pytest.raises(ValueError, match=r"needs a local run\.url"):
        ballast.check("memory://run", 2**60)
