"""A real run whose controller chooses the interval between durable saves: saves follow it, and no bit changes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from conftest import Cluster
from herd import await_nothing_left, final_digest, job, kill_worker, spec_of, train

from orchestrator.core import events as ev
from orchestrator.observe.status import Status
from orchestrator.runtime import journal
from storage.commits import list_commits

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
STEPS = 48
FIRST = 1
"""Shorter than a save takes, so that it is retuned as soon as one is measured."""
AUTO = {"interval": "auto", "interval_steps": FIRST, "shortest_interval_steps": 1, "longest_interval_steps": 12}


def test_the_interval_is_retuned_survives_a_recovery_and_changes_no_bit(cluster: Cluster, tmp_path: Path) -> None:
    length = {"steps": STEPS, "validation_interval_steps": STEPS}
    spec = spec_of(job("retuned", tmp_path, run=length, checkpoint=AUTO | {"keep": 50}))
    seen: list[Status] = []

    def chaos(status: Status) -> None:
        if status.job == "training" and status.save_every_steps != FIRST and not seen:
            seen.append(status)
            kill_worker(spec, status, rank=2)

    status, told = train(spec, chaos)
    assert status.exit_code == 0, told
    assert seen and "Young and Daly want" in seen[0].save_every_why
    assert [(i.cause, i.rung) for i in status.incidents] == [("signal", "replace")]

    records = journal.read(spec.run.url)
    choices = [record for record in records if isinstance(record.event, ev.IntervalChosen)]
    assert choices and all(2 <= record.event.every_steps <= 12 for record in choices)
    assert any("a checkpoint each" in line for line in told)
    assert journal.replay(records).state.interval == choices[-1].event
    orders = [action for record in records for action in record.actions if action["type"] == "SaveEvery"]
    assert {order["generation"] for order in orders} == {1, 2}, "the next generation was told, too"
    check_saves(records)
    assert list_commits(spec.run.url)[-1] == STEPS
    await_nothing_left(tmp_path / "ram")

    untouched = spec_of(job("not-retuned", tmp_path, run=length, checkpoint={"interval_steps": STEPS}))
    assert train(untouched)[0].exit_code == 0
    assert final_digest(spec) == final_digest(untouched)


def check_saves(records: list[journal.Record]) -> None:
    """Each save but the run's last is of a step that was due by the interval in force when it began."""
    every, saved = FIRST, []
    for record in records:
        if isinstance(record.event, ev.CheckpointWritten):
            saved.append((record.event.step, every))
        elif isinstance(record.event, ev.IntervalChosen):
            every = record.event.every_steps
    followed = [(step, after) for step, after in saved if step < STEPS and step % after == 0]
    others = [(step, after) for step, after in saved if step < STEPS and step % after]
    assert len({after for _, after in followed}) >= 2 and len(followed) >= 3, saved
    # One that was under way when a choice came was begun under the choice before.
    assert len(others) <= sum(isinstance(record.event, ev.IntervalChosen) for record in records), saved
    assert all(before < after for before, after in itertools.pairwise(step for step, _ in saved)), saved
