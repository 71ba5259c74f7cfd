"""The choice of the interval: bounded, monotone, with hysteresis; journaled, replayed, and near what a search finds."""

from __future__ import annotations

import functools
import html
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from core_world import layout
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from journal_runs import recorded
from test_plan import two_level

from orchestrator.core import events as ev
from orchestrator.core.codec import action_to_json, digest, event_from_json, event_to_json, state_from_json
from orchestrator.core.codec import state_to_json as to_json
from orchestrator.core.supervisor import Supervisor
from orchestrator.observe.report import render
from orchestrator.runtime import retune
from orchestrator.runtime.journal import Record
from orchestrator.runtime.retune import Inputs, Retuner, choose, wanted_steps
from orchestrator.simulate import plan as plans
from orchestrator.simulate.body import Simulation
from trainer.contract import CheckpointConfig

SECOND = 1_000_000
AUTO = CheckpointConfig(interval="auto", interval_steps=100)
JUST_BEGUN = Inputs(step_us=SECOND, stall_us=SECOND // 2, write_us=5 * SECOND, restores=0, exposed_us=0)

INPUTS = st.builds(
    Inputs,
    step_us=st.integers(1, 100 * SECOND),
    stall_us=st.integers(1, 100 * SECOND),
    write_us=st.integers(0, 1000 * SECOND),
    restores=st.integers(0, 10_000),
    exposed_us=st.integers(0, 400 * 86_400 * SECOND),
)
JOBS = st.tuples(st.integers(1, 500), st.integers(0, 500), st.integers(0, 5000)).map(
    lambda n: CheckpointConfig(
        interval="auto",
        shortest_interval_steps=n[0],
        interval_steps=n[0] + n[1],
        longest_interval_steps=n[0] + n[1] + n[2],
    )
)


def chosen(job: CheckpointConfig, now: int, inputs: Inputs) -> int:
    """The interval that is in force afterwards."""
    choice = choose(job, now, inputs)
    return now if choice is None else choice.every_steps


# --- the rules, each a check that a broken chooser does not pass ---


def never_outside_the_bounds(job: CheckpointConfig, inputs: Inputs) -> None:
    choice = choose(job, job.interval_steps, inputs)
    if choice is not None:
        assert job.shortest_interval_steps <= choice.every_steps <= job.longest_interval_steps


def changes_are_worth_it_and_settle(job: CheckpointConfig, inputs: Inputs) -> None:
    choice = choose(job, job.interval_steps, inputs)
    if choice is not None:
        now, then = sorted((job.interval_steps, choice.every_steps))
        assert then >= 1.2 * now
        assert choose(job, choice.every_steps, inputs) is None, "the same again changes nothing"


def more_failures_never_lengthen_it(job: CheckpointConfig, inputs: Inputs) -> None:
    often = replace(inputs, restores=2 * inputs.restores + 3)
    assert wanted_steps(job, often) <= wanted_steps(job, inputs)


def dearer_saves_and_quiet_time_never_shorten_it(job: CheckpointConfig, inputs: Inputs) -> None:
    now = wanted_steps(job, inputs)
    assert wanted_steps(job, replace(inputs, stall_us=2 * inputs.stall_us)) >= now
    assert wanted_steps(job, replace(inputs, write_us=2 * inputs.write_us)) >= now
    assert wanted_steps(job, replace(inputs, exposed_us=2 * inputs.exposed_us + SECOND)) >= now


RULES = [
    never_outside_the_bounds,
    changes_are_worth_it_and_settle,
    more_failures_never_lengthen_it,
    dearer_saves_and_quiet_time_never_shorten_it,
]


def hold(rule: Callable[[CheckpointConfig, Inputs], None]) -> None:
    # Without making a counterexample small: the broken choosers below have many.
    @settings(max_examples=200, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(JOBS, INPUTS)
    def check(job: CheckpointConfig, inputs: Inputs) -> None:
        rule(job, inputs)

    check()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[CheckpointConfig, Inputs], None]) -> None:
    hold(rule)


def the_jobs_bounds_are_ignored(patch: pytest.MonkeyPatch) -> None:
    whole = retune.choose

    def broken(job: CheckpointConfig, now: int, inputs: Inputs) -> ev.IntervalChosen | None:
        return whole(replace(job, shortest_interval_steps=1, longest_interval_steps=10**9), now, inputs)

    patch.setitem(globals(), "choose", broken)


def every_difference_is_a_change(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(retune, "WORTH_A_CHANGE", 1.0001)


def failures_make_it_longer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(retune, "restores_per_us", lambda first_us, i: 1 / (first_us + i.exposed_us + i.restores * SECOND))


def a_save_costs_what_it_writes_not_what_it_stalls(patch: pytest.MonkeyPatch) -> None:
    whole = retune.interval_steps
    patch.setattr(retune, "interval_steps", lambda rate, stall, step, write: whole(rate, 1 / stall, step, write))


@pytest.mark.parametrize(
    ("breakage", "rule"),
    [
        (the_jobs_bounds_are_ignored, never_outside_the_bounds),
        (every_difference_is_a_change, changes_are_worth_it_and_settle),
        (failures_make_it_longer, more_failures_never_lengthen_it),
        (a_save_costs_what_it_writes_not_what_it_stalls, dearer_saves_and_quiet_time_never_shorten_it),
    ],
)
def test_a_broken_chooser_is_caught(
    breakage: Callable[[pytest.MonkeyPatch], None],
    rule: Callable[[CheckpointConfig, Inputs], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breakage(monkeypatch)
    with pytest.raises(AssertionError):
        hold(rule)


# --- what it comes to ---


def test_a_run_begins_with_what_the_job_says() -> None:
    assert wanted_steps(AUTO, JUST_BEGUN) == 100
    assert choose(AUTO, 100, JUST_BEGUN) is None


def test_nothing_is_chosen_before_a_step_and_a_save_are_measured() -> None:
    long = replace(JUST_BEGUN, exposed_us=10**12)
    assert choose(AUTO, 100, long) is not None
    assert choose(AUTO, 100, replace(long, stall_us=0)) is None
    assert choose(AUTO, 100, replace(long, step_us=0)) is None


def test_quiet_days_lengthen_it_up_to_the_bound_and_losses_shorten_it() -> None:
    day = replace(JUST_BEGUN, exposed_us=86_400 * SECOND)
    choice = choose(AUTO, 100, day)
    assert choice is not None and 250 < choice.every_steps < 350
    assert choice.why == (
        "100 steps were in force; a save stalls training for 0.5 s, and in 24 h steps were lost 0 times to a restore "
        f"from the store: Young and Daly want {choice.every_steps}"
    )
    months = choose(AUTO, 100, replace(JUST_BEGUN, exposed_us=90 * 86_400 * SECOND))
    assert months is not None and months.every_steps == AUTO.longest_interval_steps
    assert months.why.endswith("Young and Daly want 2790, the job's bounds allow 1000")
    assert chosen(AUTO, choice.every_steps, replace(day, restores=99)) == pytest.approx(31, abs=1)
    hammered = replace(JUST_BEGUN, exposed_us=60 * SECOND, restores=1000, write_us=0)
    assert chosen(AUTO, 100, hammered) == AUTO.shortest_interval_steps


def test_with_many_failures_it_is_what_the_planner_wants() -> None:
    """The belief is outweighed: the same formula, the same rate, the same steps."""
    made = two_level()
    _, wanted = plans.intervals_wanted(made)
    store = sum(plans.rate(made, cause) for cause in made.failures.causes if plans.from_store(made, cause))
    costs = made.profile.costs
    n = 10_000
    seen = Inputs(
        step_us=made.step_us,
        stall_us=costs.save_stall.us,
        write_us=costs.save_write.us + costs.commit.us,
        restores=n,
        exposed_us=round(n / store * SECOND),
    )
    assert wanted_steps(AUTO, seen) == wanted


# --- in a run ---


@functools.cache
def lived_through(job: CheckpointConfig) -> tuple[list[Record], Supervisor, Retuner]:
    """A simulated run whose controller retunes; its saves go on as they were, only the choices are looked at."""
    made = replace(two_level(), layout=layout(1, 1, 2, 1, 1, 3), days=3.0, checkpoint_interval_steps=job.interval_steps)
    mended_soon = plans.each_cause(lambda cause: {"repair_s": 600})
    simulation = Simulation(plans.with_mtbf(mended_soon(made), 0.5))
    core, retuner, records = Supervisor(), Retuner(job), list[Record]()

    def take(event: ev.Event) -> None:
        actions = core.handle(event)
        told = tuple(json.loads(json.dumps(action_to_json(action))) for action in actions)
        records.append(Record(seq=len(records), epoch=1, event=event, actions=told))
        choice = retuner.note(event, actions, core.state)
        if choice is not None:
            take(replace(choice, at=event.at))

    simulation._record = lambda event, actions: take(event)
    simulation.run()
    return records, core, retuner


def test_choices_are_journaled_and_replay_comes_to_the_same_state() -> None:
    records, core, retuner = lived_through(AUTO)
    choices = [record for record in records if isinstance(record.event, ev.IntervalChosen)]
    assert choices and all(record.actions[0]["type"] == "SaveEvery" for record in choices)
    assert core.state.interval == choices[-1].event
    fold, known = Supervisor(), Retuner(AUTO)
    for record in records:
        event = event_from_json(json.loads(json.dumps(event_to_json(record.event))))
        assert tuple(json.loads(json.dumps(action_to_json(a))) for a in fold.handle(event)) == record.actions
    assert digest(fold.state) == digest(core.state)
    assert state_from_json(json.loads(json.dumps(to_json(core.state)))) == core.state
    # A controller that comes back knows from the state what the ones before had seen; the pace is measured anew.
    known.recall(core.state)
    again, before = known._inputs(), retuner._inputs()
    assert again.restores == before.restores > 0
    assert again.exposed_us == pytest.approx(before.exposed_us, rel=0.05)
    assert (again.step_us, again.stall_us) == (0, 0) and choose(AUTO, AUTO.interval_steps, again) is None


def test_after_days_of_failures_what_is_in_force_is_near_the_best() -> None:
    records, core, retuner = lived_through(AUTO)
    seen, interval = retuner._inputs(), core.state.interval
    losses = [r for r in records if any(a["type"] == "OpenGeneration" and a["source"] == "durable" for a in r.actions)]
    assert interval is not None and 20 < seen.restores <= len(losses)
    assert (seen.stall_us, seen.write_us) == (5 * SECOND, 11 * SECOND)
    often = seen.restores / (seen.exposed_us / SECOND)
    best = math.sqrt(2 * 5 / often) / (seen.step_us / SECOND)
    assert best / 1.3 < interval.every_steps < best * 1.3, "the hysteresis, and what the job's first interval weighs"
    assert not best / 1.3 < AUTO.interval_steps < best * 1.3


def test_the_report_tells_each_choice_and_why() -> None:
    records, _, _ = lived_through(AUTO)
    page = render(records)
    choices = [record.event for record in records if isinstance(record.event, ev.IntervalChosen)]
    assert "Steps between checkpoints, as the controller chose them" in page
    assert all(html.escape(choice.why) in page for choice in choices)


def test_there_is_a_look_at_each_checkpoint_each_incident_and_each_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(retune, "choose", lambda job, now, inputs: looks.append(inputs.exposed_us))
    records, _, _ = lived_through.__wrapped__(AUTO)
    commits = sum(isinstance(record.event, ev.CheckpointCommitted) for record in records)
    assert len(looks) >= commits > 10
    assert max(later - before for before, later in itertools.pairwise(looks)) <= retune.LOOK_US + 600 * SECOND


@pytest.mark.parametrize("seed", range(0, 100, 5))
def test_no_history_is_too_strange_to_be_measured(seed: int) -> None:
    retuner, core = Retuner(AUTO), Supervisor()
    for event, _ in recorded(seed):
        retuner.note(event, core.handle(event), core.state)


def test_an_unknown_interval_is_refused() -> None:
    core, wrong = Supervisor(), {"every_steps": 0, **vars(JUST_BEGUN), "why": ""}
    with pytest.raises(AssertionError):
        core.handle(ev.IntervalChosen(at=0, **wrong))
