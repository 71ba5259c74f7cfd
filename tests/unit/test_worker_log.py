"""The workers' log: lines are cut and tagged right, the file is bounded, and a full disk costs lines only."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.runtime import worker_log
from orchestrator.runtime.worker_log import LINE_MAX_BYTES, LineBuffer, LogFile

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
    log.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n0.log", "n0.log.1"]
    kept = (tmp_path / "n0.log.1").read_text() + (tmp_path / "n0.log").read_text()
    assert kept.splitlines() == [f"line {n:02d}" for n in range(100)][-len(kept.splitlines()) :]
    assert 100 < len(kept) <= 200


def test_full_disk_costs_lines_which_are_counted(tmp_path: Path) -> None:
    # A limit on the size of files stands for the disk: a write up to it is cut short, the next one fails.
    script = """
import resource, sys
from pathlib import Path
from orchestrator.runtime.worker_log import LogFile
log = LogFile(Path(sys.argv[1]))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (25, hard))
for _ in range(5):
    log.write(b"123456789\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.write(b"there is room\\n")
log.write(b"again\\n")
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
