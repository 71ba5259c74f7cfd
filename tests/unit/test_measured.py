"""A run's journal as a scenario: simulated again from what was measured of it, it comes to what it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_simulate import dense

from orchestrator.core import events as ev
from orchestrator.core.codec import action_to_json
from orchestrator.runtime.journal import Record
from orchestrator.simulate.body import Scenario, Simulation
from orchestrator.simulate.measured import Measured, NotMeasured, measure
from orchestrator.simulate.profile import Cause

STEPS = 2000


def lived(made: Scenario) -> tuple[list[Record], Simulation]:
    """A run of so many steps, with its journal; here a simulated one stands for the real."""
    records: list[Record] = []
    simulation = Simulation(
        replace(made, total_steps=STEPS),
        record=lambda event, actions: records.append(
            Record(seq=len(records), epoch=1, event=event, actions=tuple(action_to_json(action) for action in actions))
        ),
    )
    simulation.run()
    return records, simulation


def eventful(seed: int, *effects: str) -> Scenario:
    made = dense(seed, an_hour=20, days=3)
    causes = tuple(
        Cause(name=effect, effect=effect, sign="exit", count=1, repair_s=900, source="test") for effect in effects
    )
    return replace(made, failures=made.failures.model_copy(update={"causes": causes}))


def again(measured: Measured) -> Simulation:
    simulation = Simulation(measured.scenario)
    simulation.run()
    return simulation


@pytest.mark.parametrize("seed", range(6))
def test_what_was_measured_of_a_run_gives_its_goodput_again(seed: int) -> None:
    records, first = lived(eventful(seed, "node", "worker", "hang"))
    assert len(first.state.incidents) >= 3 and first.state.step == STEPS
    measured = measure(records, first.scenario.snapshot_interval_steps)
    ledger = first.state.ledger
    assert measured.goodput == pytest.approx(ledger.totals["productive"] / ledger.owed, abs=1e-9)
    second = again(measured)
    assert second.state.step == STEPS
    goodput = second.state.ledger.totals["productive"] / second.state.ledger.owed
    assert goodput == pytest.approx(measured.goodput, abs=0.02)
    # What else befell a recovery is known to the moment at which it was told only.
    rungs = [[i.rungs[0] for i in s.state.incidents] for s in (first, second)]
    assert rungs[0] == rungs[1]


def slow_in_every_third(made: Scenario) -> Scenario:
    """Its generations have paces of their own."""
    return replace(made, paces_us=dict.fromkeys(range(2, 100, 3), 3 * made.step_us))


@pytest.mark.parametrize("seed", range(3))
def test_a_generation_that_was_slow_is_slow_again(seed: int) -> None:
    made = slow_in_every_third(eventful(seed, "node", "worker", "hang"))
    records, _ = lived(made)
    measured = measure(records, made.snapshot_interval_steps)
    known = measured.scenario.paces_us
    given = {g: made.paces_us.get(g, made.step_us) for g in known}
    assert set(given.values()) == {made.step_us, 3 * made.step_us}
    assert known == pytest.approx(given, rel=0.02)
    one_pace = replace(measured, scenario=replace(measured.scenario, paces_us={}))
    ledgers = [again(which).state.ledger for which in (measured, one_pace)]
    second, averaged = (ledger.totals["productive"] / ledger.owed for ledger in ledgers)
    assert abs(second - measured.goodput) < min(0.01, abs(averaged - measured.goodput))


def test_a_generation_of_too_few_steps_has_the_pace_of_the_run() -> None:
    made = slow_in_every_third(eventful(1, "node", "worker", "hang"))
    records, _ = lived(made)

    def known_after(reports: int) -> set[int]:
        """The generations whose pace is known when the second has told so often what it did."""
        told = [i for i, r in enumerate(records) if isinstance(r.event, ev.StepsDone) and r.event.generation == 2]
        return set(measure(records[: told[reports - 1] + 1]).scenario.paces_us)

    assert known_after(1) == {1}
    assert known_after(2) == {1, 2}


def test_its_costs_are_what_they_were() -> None:
    records, first = lived(eventful(2, "node", "worker", "hang"))
    costs, given = measure(records, first.scenario.snapshot_interval_steps).scenario.profile.costs, first.scenario
    assert costs.restart.value == pytest.approx(given.profile.costs.restart.value)
    assert costs.halt.value == pytest.approx(given.profile.costs.halt.value, abs=0.5)
    assert costs.provision.value == pytest.approx(given.profile.costs.provision.value)
    assert {i.rungs[0] for i in first.state.incidents} >= {"replace", "spare"}
    assert costs.restore_ram.value == pytest.approx(given.profile.costs.restore_ram.value)
    assert costs.restore_peer.value == pytest.approx(given.profile.costs.restore_peer.value)
    assert costs.save_write.value == pytest.approx(given.profile.costs.save_write.value)
    measured = measure(records, given.snapshot_interval_steps).scenario
    assert measured.checkpoint_interval_steps == given.checkpoint_interval_steps
    assert measured.step_us == pytest.approx(given.step_us, rel=0.02)


def test_a_controller_that_came_back_and_was_told_all_again_changes_nothing() -> None:
    records, first = lived(eventful(2, "node", "worker", "hang"))
    ready = next(i for i, r in enumerate(records) if isinstance(r.event, ev.GenerationReady))
    later = next(i for i, r in enumerate(records) if i > ready and isinstance(r.event, ev.StepsDone)) + 1
    at = records[later - 1].event.at
    again_ = [
        replace(records[0], event=ev.EpochBegan(at=at, epoch=2, version="test"), actions=()),
        replace(records[ready], event=replace(records[ready].event, at=at), actions=()),
    ]
    told = measure([*records[:later], *again_, *records[later:]], first.scenario.snapshot_interval_steps)
    plain = measure(records, first.scenario.snapshot_interval_steps)
    assert told.scenario.profile.costs == plain.scenario.profile.costs
    assert told.scenario.strikes == plain.scenario.strikes


def test_a_save_that_came_late_and_a_failure_that_nobody_is_named_for_shift_little() -> None:
    records, first = lived(eventful(2, "node", "worker", "hang"))
    moved = next(r for r in records if isinstance(r.event, ev.CheckpointWritten))
    late = [
        replace(r, event=replace(r.event, step=r.event.step + 1)) if r is moved else r  # type: ignore[type-var]
        for r in records
        if not isinstance(r.event, ev.CheckpointCommitted) or r.event.step != moved.event.step
    ]
    interval = first.scenario.checkpoint_interval_steps
    assert measure(late, first.scenario.snapshot_interval_steps).scenario.checkpoint_interval_steps == interval

    hung = next(r for r in records if isinstance(r.event, ev.WorkerHung))
    nameless = [replace(r, event=replace(r.event, node="", slot=None)) if r is hung else r for r in records]  # type: ignore[type-var]
    again_ = again(measure(nameless, first.scenario.snapshot_interval_steps))
    assert len(again_.state.incidents) == len(first.state.incidents)


def test_what_has_no_pace_or_was_resumed_is_not_measured() -> None:
    records, _ = lived(eventful(0, "worker"))
    declared = next(record for record in records if isinstance(record.event, ev.RunDeclared))
    with pytest.raises(NotMeasured, match="resumed"):
        measure([*records, declared])
    without = [record for record in records if not isinstance(record.event, ev.StepsDone)]
    with pytest.raises(NotMeasured, match="no step"):
        measure(without[:20])
