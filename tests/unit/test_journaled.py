"""A plan from a run's journal: each figure is what the run has shown, or the profile's, and says which."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from core_world import layout
from journal_runs import begin
from test_core_golden import _EVENTS, SECOND
from test_measured import eventful, lived
from test_plan import JOB
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.core.codec import action_from_json
from orchestrator.core.supervisor import Supervisor
from orchestrator.runtime.journal import Record
from orchestrator.simulate import figures, journaled, plan
from orchestrator.simulate.body import Scenario
from orchestrator.simulate.measured import NotMeasured
from orchestrator.simulate.profile import Seconds


def other_costs(made: Scenario) -> Scenario:
    """A profile that says otherwise than what the run has lived through, so that the two can be told apart."""
    costs = {name: Seconds(value=777, source="a guess") for name in type(made.profile.costs).model_fields}
    profile = made.profile.model_copy(update={"costs": made.profile.costs.model_copy(update=costs)})
    return replace(made, profile=profile, step_us=777_000_000)


def journal_of(seed: int, *effects: str) -> tuple[list[Record], Scenario]:
    records, simulation = lived(eventful(seed, *effects))
    return records, simulation.scenario


def test_what_was_measured_is_what_it_was_and_says_how_often() -> None:
    records, lived_through = journal_of(2, "node", "worker", "hang")
    found = journaled.of_records(records, other_costs(lived_through))
    given, costs = lived_through.profile.costs, found.scenario.profile.costs
    for name in ("snapshot_stall", "save_stall", "save_write", "commit", "restart", "restore_ram", "restore_peer"):
        assert getattr(costs, name).value == pytest.approx(getattr(given, name).value, rel=0.02), name
        assert getattr(costs, name).source.startswith("measured, "), name
    assert found.scenario.step_us == pytest.approx(lived_through.step_us, rel=0.01)
    sources = {row.figure: row.source for row in found.rows}
    assert sources["step"].startswith("measured, 1,9")
    assert sources["restore_durable"] == "profile: a guess"
    assert sources["detection, network"].startswith("profile: ")
    assert any("restore_durable" in gap for gap in found.gaps)
    exit_ = found.scenario.profile.detection.exit
    assert exit_.source.startswith("measured, ") and 0 < exit_.value < 2, (
        "one second, in the middle of a step on average"
    )


def test_its_failures_are_its_own_incidents_over_its_own_days() -> None:
    records, lived_through = journal_of(2, "node", "worker", "hang")
    found = journaled.of_records(records, lived_through)
    causes = {cause.name: (cause.effect, cause.count) for cause in found.scenario.failures.causes}
    assert causes == {"exception": ("worker", 3), "hang": ("hang", 3), "node": ("node", 4)}
    assert found.failures == 10
    days = found.node_days / lived_through.layout.nodes
    assert 0.5 < days / (records[-1].event.at / 86_400e6) < 1, "without the waits for nodes"
    assert plan.expect(found.scenario).failures_a_day == pytest.approx(10 / days, rel=0.01)
    low, high = journaled.at_ends(found, 0.95)
    now = plan.make_plan(found.scenario, 0.95)
    assert low.expected.failures_a_day < now.expected.failures_a_day < high.expected.failures_a_day
    assert low.planned.goodput > now.planned.goodput > high.planned.goodput
    assert low.spares_wanted <= now.spares_wanted <= high.spares_wanted


def test_without_a_failure_the_list_says_what_fails_and_the_plan_says_so() -> None:
    records, lived_through = journal_of(0)
    found = journaled.of_records(records, lived_through)
    assert found.failures == 0
    listed = replace(lived_through, failures=eventful(0, "node").failures)
    assert journaled.of_records(records, listed).scenario.failures == listed.failures
    assert "it has seen no failure yet: what fails how often is the list's" in found.gaps


def test_on_another_mesh_the_step_is_the_profiles() -> None:
    records, lived_through = journal_of(2, "worker")
    wider = replace(lived_through, layout=layout(1, 8, 1, 1, 1, 1), step_us=123_456)
    found = journaled.of_records(records, wider)
    assert found.scenario.step_us == 123_456
    assert found.rows[0].source.startswith("profile: ") and found.gaps[0].startswith("its mesh is another one")


def told(*lines: str) -> tuple[figures.Figures, Supervisor]:
    """What figures and the core have taken in of a conversation in the notation of test_core_golden.py."""
    fold, core, at = figures.Figures(), Supervisor(), 0
    for line in lines:
        pause, name, *words = line.split()
        at += int(pause) * SECOND
        event = _EVENTS[name](at, words)
        fold.note(event, core.handle(event))
    return fold, core


FIRST_DAY = (
    "0 run mesh=1x2x1x1 steps=1000",
    "0 epoch 1",
    "0 found",
    "10 join a",
    "0 join b",
    "5 ready g1 step 0",
    "10 steps g1 1-1",
    "99 steps g1 2-100",
    "7 written g1 100",
    "1 committed g1 100",
    "20 steps g1 101-128",
)
NEXT_DAY = (
    "86400 run mesh=1x2x1x1 steps=1000",
    "0 epoch 2",
    "0 found 100",
    "10 join c",
    "0 join d",
    "5 ready g2 step 100",
    "3 steps g2 101-102",
)


def test_a_resume_that_has_lost_steps_counts_and_its_pause_is_no_time_to_fail_in() -> None:
    fold, _ = told(*FIRST_DAY, "0 stop now", *NEXT_DAY)
    assert fold.steps_lost == 1, "28 steps, by a restore from the checkpoint of step 100"
    assert fold.exposed_us == (142 + 8) * SECOND
    assert (fold.pace.steps.n, fold.pace.steps.us) == (127, 1_000_000)
    assert (fold.pace.commits.us, fold.provision_us) == (1_000_000, 10_000_000)


def test_what_a_controller_that_came_back_is_told_again_counts_once() -> None:
    again = ("0 epoch 2", "0 found 100", "0 ready g1 step 0", "0 written g1 100", "0 committed g1 100")
    once, twice = told(*FIRST_DAY)[0], told(*FIRST_DAY, *again, "0 steps g1 101-128")[0]
    assert twice == once


def test_a_stop_with_a_checkpoint_has_lost_nothing() -> None:
    saved = ("0 written g1 128", "0 committed g1 128", "0 finished g1 128 stopped")
    fold, _ = told(*FIRST_DAY, "0 stop gracefully", *saved, *NEXT_DAY[:2], "0 found 100 128", *NEXT_DAY[3:5])
    assert fold.steps_lost == 0


def test_another_mesh_has_another_pace_and_the_same_past() -> None:
    wider = NEXT_DAY[0].replace("1x2x1x1", "1x1x1x1")
    fold, _ = told(*FIRST_DAY, "0 stop now", wider, *NEXT_DAY[1:])
    assert (fold.pace.steps.n, fold.pace.first_steps.n) == (0, 2)
    assert fold.steps_lost == 1


def test_recoveries_of_one_interruption_lose_steps_once() -> None:
    lost = (
        "1 exited g1 b:1 signal 9",
        "0 halted g1 a",
        "2 halted g1 b",
        "3 exited g2 a:0 signal 9",
        "0 halted g2 a",
        "4 halted g2 b",
        "5 ready g3 step 100",
        "1 steps g3 101-101",
    )
    fold, core = told(*FIRST_DAY, *lost)
    assert [len(incident.rungs) for incident in core.state.incidents] == [2]
    assert fold.steps_lost == 1
    assert fold.halts == figures.Mean(2, 6 * SECOND)
    assert fold.silences_us == {153 * SECOND: 1 * SECOND}


@pytest.mark.parametrize(
    ("missed", "seen_by"),
    [
        ("_declared", test_another_mesh_has_another_pace_and_the_same_past),
        ("_interrupted", test_recoveries_of_one_interruption_lose_steps_once),
        ("_ordered", test_a_resume_that_has_lost_steps_counts_and_its_pause_is_no_time_to_fail_in),
    ],
)
def test_figures_that_miss_something_are_seen(
    missed: str, seen_by: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures.Figures, missed, lambda self, *told: None)
    with pytest.raises(AssertionError):
        seen_by()


def written(records: list[Record], folder: Path) -> str:
    url = str(folder / "run")
    journal = begin(url, folder / "tail")
    for record in records:
        journal.append(record.event, [action_from_json(action) for action in record.actions])
    journal.publish()
    return url


def test_the_command_prints_where_each_figure_comes_from(tmp_path: Path) -> None:
    records, _ = journal_of(2, "node", "worker", "hang")
    url = written(records, tmp_path)

    def shepherd(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["plan", JOB, "--gpus", "2048", *arguments])

    result = shepherd("--journal", url, "--json", str(tmp_path / "plan.json"))
    assert result.exit_code == 0, result.output
    assert "measured, 66 of them" in result.stdout and "its mesh is another one" in result.stdout
    assert re.search(r"failures: 10 in 0\.\d+ node-days; with 90% confidence one in [\d.]+ to [\d.]+ h", result.stdout)
    document = json.loads((tmp_path / "plan.json").read_text())
    assert [end["spares_wanted"] for end in document["journal"]["at_the_ends"]]
    assert document["mtbf_h"] == pytest.approx(24 * document["journal"]["node_days"] / 10 / 256, rel=0.01)
    given = shepherd("--journal", url, "--mtbf", "3")
    assert given.exit_code == 0 and "at the ends" not in given.stdout, "the rate is said, not estimated"
    nowhere = shepherd("--journal", str(tmp_path / "elsewhere"))
    assert nowhere.exit_code == 2 and "there is no run" in nowhere.stderr


def test_a_run_without_a_pace_is_refused() -> None:
    records, lived_through = journal_of(0)
    first = next(i for i, r in enumerate(records) if type(r.event).__name__ == "StepsDone")
    with pytest.raises(NotMeasured, match="no pace"):
        journaled.of_records(records[: first + 1], lived_through)
