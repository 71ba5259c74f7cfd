"""A node's fold: whatever the order of its ranks' messages, each step is reported once, in order, with its times."""

from __future__ import annotations

from dataclasses import replace

from core_world import Tape
from hypothesis import given, settings
from hypothesis import strategies as st
from report_life import (
    GENERATION,
    SAVED,
    START,
    STEPS,
    life,
    restored,
    shard,
    step_done,
    validated,
)

from orchestrator.runtime.reports import (
    KEPT_SAVES,
    MeshFold,
    NodeFinished,
    NodeFold,
    NodeReady,
    NodeStep,
    Report,
    StartFailed,
    still_true,
)
from trainer import contract


@settings(max_examples=200, deadline=None)
@given(ranks=st.integers(1, 4), choices=st.binary(max_size=300))
def test_a_node_tells_each_step_once_and_in_order(ranks, choices):
    """The ranks' messages in any interleaving, and what completes a report again."""
    tape = Tape(choices)
    fold = NodeFold(generation=GENERATION, ranks=tuple(range(8, 8 + ranks)))
    queues = [[replace(m, rank=8 + rank) for m in life(rank)] for rank in range(ranks)]
    done: list[contract.FromWorker] = []
    told: list[Report] = []
    while waiting := [queue for queue in queues if queue]:
        message = waiting[tape.below(len(waiting))].pop(0)
        told += fold.feed(message)
        if isinstance(message, contract.Restored | contract.StepDone | contract.Finished):
            done.append(message)
            if tape.below(4) == 3:
                assert fold.feed(done[tape.below(len(done))]) == []
    steps = [report for report in told if isinstance(report, NodeStep)]
    assert [s.step for s in steps] == list(range(START + 1, START + STEPS + 1))
    for report in steps:
        assert report.step_us == 1000 * report.step + ranks - 1
        assert report.data_us == 10 * report.step + ranks - 1
        assert report.tokens == 64
        assert (report.loss, report.grad_norm, report.lr) == (report.step / 8, 1.5, 0.1)
        after_save = report.step - 1 in SAVED
        assert report.checkpoint_us == report.step + 5 * after_save
        assert report.validation_us == 700 * after_save
    assert [type(report) for report in told].count(NodeReady) == 1
    assert told[-1] == NodeFinished(generation=GENERATION, step=START + STEPS, reason="completed")
    assert sum(isinstance(report, NodeFinished) for report in told) == 1
    assert sum(isinstance(report, contract.ShardWritten) for report in told) == ranks * len(SAVED)


def test_durations_of_a_node_are_those_of_its_slowest_rank():
    fold = NodeFold(generation=GENERATION, ranks=(0, 1))
    assert fold.feed(restored(0)) == []
    assert fold.feed(restored(1)) == [
        NodeReady(
            generation=GENERATION,
            step=START,
            rendezvous_us=11,
            build_us=200,
            restore_us=3001,
            versions={"torch": "2"},
            processes={"parked": 1, "warm": 1},
        )
    ]
    assert fold.feed(shard(1, 20)) == [shard(1, 20)]
    assert fold.feed(validated(20)) == [validated(20)]
    assert fold.feed(step_done(0, 21)) == []
    slow = replace(step_done(1, 21), step_us=99_000, data_us=7, snapshot_us=90, save_us=5)
    assert fold.feed(slow) == [
        NodeStep(
            generation=GENERATION,
            step=21,
            step_us=99_000,
            data_us=210,
            checkpoint_us=5 + 90,
            validation_us=700,
            tokens=64,
            loss=21 / 8,
            grad_norm=1.5,
            lr=0.1,
            save_us=5,
        )
    ]
    fold.feed(step_done(0, 22))
    (then,) = fold.feed(step_done(1, 22))
    assert isinstance(then, NodeStep) and (then.checkpoint_us, then.validation_us) == (22 + 5, 0), "told with step 21"


def test_a_write_in_the_background_blocks_nothing():
    fold = NodeFold(generation=GENERATION, ranks=(0,))
    failed = contract.SaveFailed(generation=GENERATION, rank=0, step=20, error="disk full", write_us=400)
    assert fold.feed(failed) == [failed]
    (report,) = fold.feed(replace(step_done(0, 22), snapshot_us=7, save_us=3))
    assert isinstance(report, NodeStep) and report.checkpoint_us == 7 + 3


def test_a_node_knows_where_its_ranks_are_and_who_failed():
    fold = NodeFold(generation=GENERATION, ranks=(0, 1))
    phase = contract.Phase(generation=GENERATION, rank=1, step=20, phase="restore")
    assert fold.feed(phase) == []
    assert fold.phases == {1: phase}
    words = contract.Failed(generation=GENERATION, rank=1, step=20, kind="memory", error="e", traceback="t")
    assert fold.feed(words) == [words]
    assert fold.failed == {1}


def test_ranks_of_a_node_that_restored_different_steps_do_not_start():
    fold = NodeFold(generation=GENERATION, ranks=(2, 3))
    fold.feed(restored(2))
    (failed,) = fold.feed(restored(3, step=START + 1))
    assert failed == StartFailed(generation=GENERATION, error="ranks restored different steps: {2: 20, 3: 21}")


def test_versions_that_differ_between_ranks_or_nodes_are_mixed():
    node = NodeFold(generation=GENERATION, ranks=(0, 1))
    node.feed(restored(0, isa="avx2", threads="1"))
    (ready,) = node.feed(restored(1, isa="avx512", threads="1"))
    assert isinstance(ready, NodeReady)
    assert ready.versions == {"torch": "2", "isa": "mixed", "threads": "1"}
    mesh = MeshFold(generation=GENERATION, nodes=("a", "b"), ranks=4, done=START)
    mesh.feed(0, ("a",), ready)
    mesh.feed(0, ("b",), replace(ready, versions={"torch": "2", "isa": "avx2", "threads": "2", "more": "1"}))
    assert mesh.versions == {"torch": "2", "isa": "mixed", "threads": "mixed", "more": "mixed"}


def test_a_failed_save_is_not_told_again_once_a_later_try_is_written() -> None:
    failed = contract.SaveFailed(generation=1, rank=0, step=20, error="E", write_us=1)
    later = contract.SaveFailed(generation=1, rank=0, step=30, error="E", write_us=1)
    written = contract.ShardWritten(generation=1, rank=0, step=20, part={}, write_us=1)
    assert still_true([failed, later], written) == [later]
    assert still_true([written], later) == [written]


def test_of_saves_only_the_newest_are_told_again() -> None:
    facts: list[Report] = []
    for step in range(1, 9):
        for rank in (0, 1):
            written = contract.ShardWritten(generation=1, rank=rank, step=step, part={}, write_us=1)
            facts = [*still_true(facts, written), written]
    assert [(f.step, f.rank) for f in facts] == [(s, r) for s in range(9 - KEPT_SAVES, 9) for r in (0, 1)]
