"""The workers' log: lines are cut and tagged right, the file is bounded, and a full disk costs lines only."""

import io
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.runtime import worker_log
from orchestrator.runtime.worker_log import LINE_MAX_BYTES, LineBuffer, LogFile

DEADLINE_S = 30.0
REPOSITORY = Path(__file__).parents[2]


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=6))
def test_lines_are_the_same_however_the_output_arrives(data: bytes, cuts: list[int]) -> None:
    buffer = LineBuffer("g3 r5")
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    got = b"".join(buffer.feed(data[a:b]) for a, b in itertools.pairwise(edges)) + buffer.end()
    whole = data if data.endswith(b"\n") or not data else data + b"\n"
    assert got == b"".join(b"[g3 r5] " + line + b"\n" for line in whole.split(b"\n")[:-1])


def test_line_without_an_end_is_cut() -> None:
    buffer = LineBuffer("g1 r0")
    lines = buffer.feed(b"x" * (3 * LINE_MAX_BYTES + 1)).split(b"\n")
    assert [len(line) for line in lines] == [LINE_MAX_BYTES + len("[g1 r0] ")] * 3 + [0]
    assert buffer.end() == b"[g1 r0] x\n"


def test_file_is_rotated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_log, "FILE_MAX_BYTES", 100)
    log = LogFile(tmp_path / "n0.log")
    for number in range(100):
        log.write(b"line %02d\n" % number)
    log.close(DEADLINE_S)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n0.log", "n0.log.1"]
    kept = (tmp_path / "n0.log.1").read_text() + (tmp_path / "n0.log").read_text()
    assert kept.splitlines() == [f"line {n:02d}" for n in range(100)][-len(kept.splitlines()) :]
    assert 100 < len(kept) <= 200


def test_full_disk_costs_lines_which_are_counted(tmp_path: Path) -> None:
    # A limit on the size of files stands for the disk: a write up to it is cut short, the next one fails.
    script = """
import resource, sys, time
from pathlib import Path
from orchestrator.runtime.worker_log import LogFile
log = LogFile(Path(sys.argv[1]))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (25, hard))
for _ in range(5):
    log.write(b"123456789\\n")
deadline = time.monotonic() + 30
while log.lost_lines < 3:
    assert time.monotonic() < deadline
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.write(b"there is room\\n")
log.write(b"again\\n")
log.close(30)
"""
    path = tmp_path / "n0.log"
    subprocess.run([sys.executable, "-P", "-c", script, str(path)], env={"PYTHONPATH": str(REPOSITORY)}, check=True)
    assert path.read_text().splitlines() == [
        "123456789",
        "123456789",
        "12345",
        "[log] 3 lines lost: the log could not be written",
        "there is room",
        "again",
    ]


class HungFile(io.FileIO):
    answers = threading.Event()

    def write(self, data: Any) -> int:
        assert self.answers.wait(DEADLINE_S)
        return super().write(data)


class OnHungDisk(type(Path())):  # type: ignore[misc]
    def open(self, *_: Any, **__: Any) -> HungFile:
        return HungFile(self, "ab")


def test_a_disk_that_hangs_holds_nobody_and_costs_lines_which_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_log, "WAITING_MAX_BYTES", 100)
    log = LogFile(OnHungDisk(tmp_path / "n0.log"))
    written = 0
    while not log.lost_lines:
        log.write(b"123456789\n")
        written += 1
    began = time.monotonic()
    log.close(0.1)
    assert time.monotonic() - began < DEADLINE_S / 2
    HungFile.answers.set()
    log.close(DEADLINE_S)
    assert 10 <= written <= 21, "the thread may have taken what waited at any moment"
    kept = (tmp_path / "n0.log").read_text().splitlines()
    assert kept.count("123456789") == written - 1
    assert "[log] 1 lines lost: the log could not be written" in kept
