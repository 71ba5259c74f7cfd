"""What benchmarks/recovery.py reads from marks: when a run has recovered, what that took, what was lost."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from recoveries.contestants import CONTESTANTS
from recoveries.job import Job
from recoveries.kills import ends_of
from recoveries.marks import Mark, Watch, note, parse, recovery, shrunk
from recoveries.running import ContestantFailed, process
from recoveries.storm import Storm
from recoveries.tables import judge, show_storms, stage_medians
from rich.console import Console

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "recovery.py"


def steps(at: float, step: int, pids: dict[int, int]) -> list[Mark]:
    """Every rank completes a step, a hundredth of a second apart."""
    return [Mark(at + rank / 100, rank, pid, "step", step) for rank, pid in pids.items()]


OLD, NEW = {0: 10, 1: 11}, {0: 20, 1: 21}


def test_steps_that_are_done_again_count_until_the_first_new_one() -> None:
    before = steps(1, 4, OLD) + steps(2, 5, OLD) + steps(3, 6, OLD)
    up = [Mark(5, 0, 20, "up", 0), Mark(6, 1, 21, "up", 0)]
    again = steps(8, 5, NEW) + steps(9, 6, NEW)
    assert recovery(before + up + again, 2, 3.5, (1,)) is None
    found = recovery(before + up + again + steps(10, 7, NEW), 2, 3.5, (1,))
    assert found is not None
    assert (found.highest, found.resumed, found.steps_lost) == (6, 4, 2)
    assert found.new_step_s == pytest.approx(6.51)
    assert found.stages == pytest.approx({"up": 2.5, "first step": 4.51})


def test_a_step_that_was_in_flight_is_no_recovery() -> None:
    """Rank 0 completes step 7 with what rank 1 had sent before it was killed; rank 1 has not completed it."""
    marks = [*steps(3, 6, OLD), Mark(3.6, 0, 10, "step", 7)]
    assert recovery(marks, 2, 3.5, (1,)) is None
    survivor_stays = {0: 10, 1: 21}
    found = recovery(marks + steps(5, 7, survivor_stays), 2, 3.5, (1,))
    assert found is not None and found.new_step_s == pytest.approx(1.51) and found.steps_lost == 0


def test_a_step_that_one_rank_had_completed_is_lost_when_all_do_it_again() -> None:
    marks = [*steps(3, 6, OLD), Mark(3.4, 0, 10, "step", 7)]
    found = recovery(marks + steps(5, 7, NEW) + steps(6, 8, NEW), 2, 3.5, (1,))
    assert found is not None and (found.steps_lost, found.stages["first step"]) == (1, pytest.approx(1.51))
    assert found.new_step_s == pytest.approx(2.51)


def test_a_last_mark_of_the_killed_process_is_none_of_the_new_one() -> None:
    """It was written before the kill, by a clock that was read after."""
    marks = [*steps(3, 6, OLD), Mark(3.6, 1, 11, "step", 7), Mark(3.6, 0, 10, "step", 7)]
    assert recovery(marks, 2, 3.5, (1,)) is None


def test_those_that_go_on_without_the_dead_have_recovered_when_all_have_made_a_step() -> None:
    pids = {0: 10, 1: 11, 2: 12}
    marks = [*steps(3, 6, pids), Mark(5, 0, 10, "shrunk", 7), Mark(5, 0, 10, "step", 7)]
    assert shrunk(marks, 3, 3.5, (1,)) is None
    found = shrunk([*marks, Mark(6, 2, 12, "shrunk", 7)], 3, 3.5, (1,))
    assert found is not None and (found.new_step_s, found.steps_lost) == (pytest.approx(2.5), 0)


def test_half_a_line_of_a_killed_writer_is_passed_over(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    watch = Watch(marks, 1)
    assert watch.read() == []
    note(marks, "step", 0, 1)
    with open(marks, "a") as file:
        file.write('{"at": 1.0, "rank": 0')
    note(marks, "step", 0, 2)
    assert [mark.step for mark in watch.read()] == [1, 2] and watch.complete == 2
    note(marks, "step", 0, 3)
    assert [mark.step for mark in watch.read()] == [3]
    watch.close()
    assert parse(['{"at": 1.0, "rank": 0', ""]) == []


def test_ratios_are_of_medians_and_held_against_the_targets_of_the_full_layout() -> None:
    times = {"shepherd": [1.0, 1.0, 4.0], "torchrun": [6.0, 7.0, 5.0], "Ray Train": [9.0], "NVRx": [1.0]}
    found = {v.what: v for v in judge(times, "full")}
    assert {what: (v.ratio, v.met) for what, v in found.items()} == {
        "torchrun / ours": (6.0, True),
        "Ray Train / ours": (9.0, False),
        "NVRx / ours": (1.0, False),
    }
    assert (found["torchrun / ours"].low, found["torchrun / ours"].high) == (1.25, 7.0)
    assert {v.what: v.met for v in judge(times, "small")}["Ray Train / ours"]
    assert judge({"torchrun": [6.0]}, "full") == []


def test_a_stage_is_shown_where_any_recovery_has_it() -> None:
    marks = steps(3, 6, OLD) + steps(5, 7, NEW)
    found = recovery(marks, 2, 3.5, (1,))
    assert found is not None
    assert stage_medians([found, found]) == pytest.approx({"first step": 1.51})


def test_the_help_names_what_there_is() -> None:
    said = subprocess.run([sys.executable, BENCHMARK, "--help"], capture_output=True, text=True, timeout=99, check=True)
    assert all(name in re.sub(r"\s+", " ", said.stdout) for name in CONTESTANTS)


def test_who_cannot_take_part_is_refused() -> None:
    command = [sys.executable, BENCHMARK, "--only", "torchft"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert said.returncode and "--only: no torchft" in said.stderr


def test_of_a_run_no_process_is_left_and_what_has_ended_can_be_started_anew(tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    job = Job("small", "small", 10, 5, tmp_path)
    with process(job, [sys.executable, "-c", script]) as run:
        first = psutil.Process(run.process.pid)
        child = wait_for_child(first)
        with ends_of({0: first.pid, 1: child.pid}) as ended:
            assert ended() == {}
            first.kill()
            run.process.wait(30)
            assert list(ended()) == [0]
        with pytest.raises(ContestantFailed, match="exit code -9"):
            run.check()
        child.kill()
        run.restart()
        child = wait_for_child(psutil.Process(run.process.pid))
    assert not child.is_running() and run.ended()


def wait_for_child(parent: psutil.Process) -> psutil.Process:
    deadline = time.monotonic() + 30
    while not (children := parent.children()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return children[0]


def test_a_storm_is_told_with_its_share_and_what_was_compared() -> None:
    told = Console(record=True, width=200, file=io.StringIO())
    ledger = {"productive": 600.0, "recovery": 100.0, "idle_spare": 300.0}
    storm = Storm(2, 10.0, 0.5, 100, 1120, 0.85, ["worker 1"], 0, ledger, {"identical": True})
    show_storms(told, {"shepherd": asdict(storm), "torchrun": {"failed": "it has ended"}})
    text = told.export_text()
    assert "1020" in text and "85.0%" in text
    assert all(share in text for share in ("50.0%", "60.0%", "85.7%"))
    assert "'identical': True" in text and "torchrun: it has ended" in text
