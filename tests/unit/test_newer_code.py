"""A run goes on under newer code: a copy of this source with changes, in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from journal_runs import append, begin, folded, recorded, snapshot

from orchestrator.core import actions as ac
from orchestrator.core.codec import digest, state_to_json
from orchestrator.runtime import core_snapshots
from orchestrator.runtime.journal import read, replay

ROOT = Path(__file__).parents[2]

MORE = (
    (
        "orchestrator/core/state.py",
        'class State:\n    run: str = ""',
        'class State:\n    moon: int = 7\n    run: str = ""',
    ),
    ("orchestrator/core/state.py", '    "lost": "gone', '    "resting": "parked",\n    "lost": "gone'),
    ("orchestrator/core/goodput.py", '    "other": "', '    "moonlight": "worked at night",\n    "other": "'),
    ("orchestrator/core/events.py", "class StepsDone:", "class StepsDone:\n    moons: int = 0"),
    ("orchestrator/core/actions.py", "class OpenGeneration:", "class OpenGeneration:\n    gently: bool = False"),
)
"""What a newer version has more: fields, a node's state, a label."""
OTHERWISE = (
    "orchestrator/core/interruption.py",
    "HaltGeneration(generation=s.generation, nodes=tuple(s.awaiting), reason=reason, park=s.parked)",
    'HaltGeneration(generation=s.generation, nodes=tuple(s.awaiting), reason=f"newer: {reason}", park=s.parked)',
)
"""What it decides otherwise."""

TAKE_OVER = """
import json, sys
from pathlib import Path
from orchestrator.core.codec import state_to_json
from orchestrator.runtime import core_snapshots
from orchestrator.runtime.journal import Journal, JournalError, claim_epoch

url, tail = sys.argv[1:]
try:
    journal = Journal(url, Path(tail), claim_epoch(url, "9.9.9").epoch)
    state = journal.replay().state
    state.check()
except JournalError as e:
    told = {"error": str(e)}
else:
    told = {"start": journal.start and journal.start.header.seq, "records": len(journal.records)}
    told |= {"passed_over": journal.passed_over, "state": state_to_json(state)}
    core_snapshots.write(url, journal.epoch, *journal.head, "9.9.9", told["state"])
    journal.close()
print(json.dumps(told | {"code": core_snapshots.code_digest()[:12]}))
"""


@pytest.fixture(scope="module", name="newer")
def source_of_a_newer_version(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newer")
    for package in ("orchestrator", "storage", "trainer"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, before, after in (*MORE, OTHERWISE):
        source = (folder / name).read_text()
        assert source.count(before) == 1, (name, before)
        (folder / name).write_text(source.replace(before, after))
    return folder


def take_over(newer: Path, url: str, tail: Path) -> dict[str, Any]:
    """What the newer version makes of a run."""
    command = [sys.executable, "-c", TAKE_OVER, url, str(tail)]
    done = subprocess.run(
        command, cwd=newer, env={"PYTHONPATH": str(newer)}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


LOG = recorded(18)
HALTS = [n for n, (_, actions) in enumerate(LOG, 1) if any(isinstance(a, ac.HaltGeneration) for a in actions)]
FIRST, SECOND = next((one, two) for one, two in pairwise(HALTS) if two > one + 2)


def run_of(folder: Path, *, snapshot_at: int | None, records: int) -> tuple[str, Path]:
    url, tail = str(folder / "run"), folder / "tail"
    one = begin(url, tail)
    append(one, LOG[:snapshot_at])
    if snapshot_at is not None:
        snapshot(one, folded(LOG[:snapshot_at]).state)
        append(one, LOG[snapshot_at:records])
    one.close()
    return url, tail


def test_it_starts_from_the_snapshot_though_it_would_decide_older_events_otherwise(newer, tmp_path):
    at, records = FIRST, SECOND - 1
    url, tail = run_of(tmp_path, snapshot_at=at, records=records)
    told = take_over(newer, url, tail)
    assert "error" not in told, told
    assert (told["start"], told["records"], told["passed_over"]) == (at, records - at, [])
    ours, theirs = state_to_json(folded(LOG[:records]).state), told["state"]
    assert theirs.pop("moon") == 7 and theirs["counts"].pop("resting") == 0
    assert theirs["ledger"]["totals"].pop("moonlight") == 0 and theirs["order"].pop("gently") is False
    assert theirs == ours

    # Back to this version: its own snapshot serves, the newer one's does not.
    again = begin(url, tail)
    assert again.start is not None and again.start.header.seq == at
    assert "moon" in again.passed_over[0] and "Shepherd 9.9.9" in again.passed_over[0]
    assert digest(again.replay().state) == digest(replay(read(url)).state)


def test_it_is_refused_when_an_event_after_the_snapshot_is_decided_otherwise(newer, tmp_path):
    url, tail = run_of(tmp_path, snapshot_at=FIRST, records=SECOND)
    told = take_over(newer, url, tail)
    assert f"record {SECOND} (" in told["error"] and "newer: " in told["error"]
    ours = core_snapshots.code_digest()[:12]
    assert f"Shepherd test (code {ours}) wrote it, this is 9.9.9 (code {told['code']})" in told["error"]
    assert "Fix: resume the run once with test and stop it" in told["error"]
    assert told["code"] != ours


def test_it_is_refused_without_a_snapshot(newer, tmp_path):
    url, tail = run_of(tmp_path, snapshot_at=None, records=len(LOG))
    assert f"record {HALTS[0]} (" in take_over(newer, url, tail)["error"]


def test_the_way_out_that_the_error_names_is_one(newer, tmp_path):
    """This version takes the run over once more, and leaves a snapshot."""
    url, tail = run_of(tmp_path, snapshot_at=FIRST, records=SECOND)
    assert "error" in take_over(newer, url, tail)
    once_more = begin(url, tail)
    snapshot(once_more, once_more.replay().state)
    once_more.close()
    told = take_over(newer, url, tail)
    assert (told["start"], told["records"]) == (SECOND, 0)
