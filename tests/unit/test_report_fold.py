"""What a report is made from: the fold of a journal, against the supervisor's own state, in random histories."""

from __future__ import annotations

import dataclasses

import pytest
from core_body import Body
from core_world import Tape
from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import SECOND, as_records, hostile, long_run, records_of, trace

from orchestrator.core import events as ev
from orchestrator.core.goodput import LABELS
from orchestrator.core.state import TRUSTS
from orchestrator.core.supervisor import Supervisor
from orchestrator.observe.report_curves import curves
from orchestrator.observe.report_fold import fold
from orchestrator.observe.status import status_of
from orchestrator.runtime import journal
from orchestrator.runtime.journal import Record


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=600))
def test_the_fold_of_any_history_tells_what_the_supervisor_knows(choices: bytes) -> None:
    body = Body(Tape(choices))
    body.run()
    records = as_records(body.watch.log)
    history = fold(records)
    final = journal.replay(records).state
    assert history.state == final
    incidents = [*final.incidents, *([final.incident] if final.incident is not None else [])]
    assert [story.incident for story in history.stories] == incidents
    for story in history.stories:
        i = story.incident
        assert min(story.phases_us.values()) >= 0 and story.detection_us >= 0
        assert bool(story.end) == (i.closed_at is None and final.incident is not i)
        assert i.closed_at is None or story.total_us == i.closed_at - i.detected_at
        assert [g.rung for g in story.tried] == i.rungs
        assert 0 <= story.detection_cost_us + story.recomputed_cost_us <= i.cost_us
        assert (story.open_cost_us > 0) <= (final.incident is i)
    spent = dict.fromkeys(LABELS, 0)
    for piece in history.spent:
        assert piece.start <= piece.end
        spent[piece.label] += piece.node_us
    assert spent == final.ledger.totals
    lost = ("detection", "recovery", "waiting_for_nodes", "recomputed")
    assert sum(story.cost_us for story in history.stories) <= sum(spent[label] for label in lost)
    assert [g.order.generation for g in history.generations] == list(range(1, final.generation + 1))
    told = {row.step: (row.generation, row.fate) for row in history.checkpoints.rows if row.fate in TRUSTS}
    assert told == {step: (c.generation, c.trust) for step, c in final.checkpoints.items()}
    assert len(history.checkpoints.failures) == final.saves_failed
    assert len(history.stragglers) == sum(isinstance(record.event, ev.NodeSlow) for record in records)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=600))
def test_the_bars_of_any_history_cover_what_nodes_and_mesh_did(choices: bytes) -> None:
    body = Body(Tape(choices))
    body.run()
    records = as_records(body.watch.log)
    nodes: dict[str, int] = {}
    mesh: dict[str, int] = {}
    supervisor, before = Supervisor(), 0
    for record in records:
        s = supervisor.state
        if s.job != "ended" and not (isinstance(record.event, ev.RunDeclared)):
            span = record.event.at - before
            mesh[s.job] = mesh.get(s.job, 0) + span
            for name, n in s.counts.items():
                nodes[name] = nodes.get(name, 0) + n * span
        supervisor.handle(record.event)
        before = record.event.at
    history = fold(records)
    drawn: dict[str, int] = {}
    for bar in history.mesh_spans:
        doing = "starting" if bar.doing == "recovering" else bar.doing
        drawn[doing] = drawn.get(doing, 0) + bar.end - bar.start
    assert drawn == {doing: us for doing, us in mesh.items() if us}
    drawn = {}
    for bar in history.node_spans:
        drawn[bar.doing] = drawn.get(bar.doing, 0) + bar.end - bar.start
    assert drawn == {doing: us for doing, us in nodes.items() if us}
    by_lane: dict[str, int] = {}
    for bar in sorted(history.node_spans, key=lambda bar: bar.start):
        assert bar.start >= by_lane.get(bar.lane, 0), "two bars at one time"
        by_lane[bar.lane] = bar.end
    assert history.active_us == sum(mesh.values())


def test_phases_are_those_that_status_shows() -> None:
    """Where one rung was enough and nobody had to be waited for, both tell the same."""
    compared = 0
    for seed in range(40):
        history = fold(hostile(seed))
        shown = status_of(
            history.state,
            at=history.state.ledger.mark,
            save_every_steps=20,
            hold="",
            failure="",
            ended=True,
            metrics_address="",
            newest=None,
            rates=[],
            tracebacks={},
        ).incidents
        for story, i in zip(history.stories, shown, strict=True):
            if len(i.rungs) == 1 and not story.waits and story.incident.closed_at is not None:
                expected = {
                    "teardown": i.teardown_s,
                    "waiting": 0,
                    "restart": i.restart_s,
                    "restore": i.restore_s,
                    "first_step": i.first_step_s,
                }
                assert {phase: us / 1e6 for phase, us in story.phases_us.items()} == pytest.approx(expected)
                assert story.total_us / 1e6 == pytest.approx(i.total_s)
                compared += 1
    assert compared > 20


def test_one_event_can_end_a_generation_and_open_the_next() -> None:
    """A mesh of one node, with a spare: the node dies twice while its generation is brought up."""
    declared, *_ = long_run(1)
    assert isinstance(declared, ev.RunDeclared)
    declared = dataclasses.replace(
        declared, layout=dataclasses.replace(declared.layout, dp_replicate=1, nodes=1, spares=2)
    )
    events: list[ev.Event] = [declared, ev.EpochBegan(at=0, epoch=1, version="test")]
    events += [ev.NodeJoined(at=SECOND, node=name, domain="", snapshots={}) for name in "abc"]
    events += [ev.NodeLost(at=t * SECOND, node=name, cause="gone") for t, name in ((3, "a"), (7, "b"))]
    history = fold(records_of(events))
    assert [(g.order.nodes, g.opened_at // SECOND) for g in history.generations] == [
        (("a",), 1),
        (("b",), 3),
        (("c",), 7),
    ]
    assert [story.phases_us["restart"] for story in history.stories] == [4 * SECOND]
    assert [len(story.tried) for story in history.stories] == [2]


def test_a_journal_of_other_decisions_is_refused() -> None:
    records = trace("worker_killed")
    opened = next(i for i, r in enumerate(records) if any(a["type"] == "OpenGeneration" for a in r.actions))
    other = [{**a, "reason": "because"} if "reason" in a else a for a in records[opened].actions]
    records[opened] = dataclasses.replace(records[opened], actions=tuple(other))
    with pytest.raises(journal.ReplayMismatch, match=rf"record {opened + 1} .* decides otherwise"):
        fold(records)


def test_an_older_generations_late_report_does_not_replace_a_newer_ones() -> None:
    def done(generation: int, first: int, *losses: int) -> ev.StepsDone:
        return ev.StepsDone(
            at=0,
            generation=generation,
            first=first,
            last=first + len(losses) - 1,
            data_wait_us=0,
            checkpoint_us=0,
            validation_us=0,
            tokens=1,
            loss_millionths=losses,
        )

    events: list[ev.Event] = [done(1, 1, 9, 8), done(2, 2, 7, 6), done(1, 2, 5)]
    events += [ev.Validated(at=0, generation=g, step=2, loss_millionths=n) for g, n in ((2, 4_000_000), (1, 3))]
    loss, validation = curves([Record(seq=1, epoch=1, event=event, actions=()) for event in events])
    assert loss == [(1, 9e-6), (2, 7e-6), (3, 6e-6)]
    assert validation == [(2, 4.0)]
