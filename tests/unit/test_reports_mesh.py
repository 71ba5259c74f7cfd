"""The mesh's fold: whatever the order, the repetitions and the losses of reports, each step is told once, in order.

A tape drives the world as it is: an agent's reports arrive in order and again until they are acknowledged, and a
controller that comes back is told again what it may have missed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from core_world import Tape
from hypothesis import given, settings
from hypothesis import strategies as st
from report_life import (
    GENERATION,
    SAVED,
    START,
    STEPS,
    life,
    shard,
    validated,
)

from orchestrator.core import events as ev
from orchestrator.core.events import Snapshot
from orchestrator.runtime import reports
from orchestrator.runtime.reports import (
    Exited,
    Halted,
    MeshFold,
    NodeFinished,
    NodeFold,
    NodeReady,
    NodeStep,
    Report,
    StartFailed,
)
from trainer import contract


def node_life(node: int, ranks_per_node: int) -> list[Report]:
    """What a node has to tell in one good generation, in order."""
    ranks = tuple(range(node * ranks_per_node, (node + 1) * ranks_per_node))
    fold = NodeFold(generation=GENERATION, ranks=ranks)
    by_rank = [life(rank) for rank in ranks]
    told: list[Report] = []
    for at in range(max(map(len, by_rank))):
        for messages in by_rank:
            if at < len(messages):
                told += fold.feed(messages[at])
    return told


@dataclass
class Agent:
    """A node with its outbox."""

    life: list[Report]
    happened: int = 0
    outbox: list[Report] = field(default_factory=list)

    def go_on(self) -> None:
        if self.happened < len(self.life):
            self.outbox.append(self.life[self.happened])
            self.happened += 1

    def tell_again(self, done: int) -> None:
        """For a new controller: all facts, and the steps after `done`, in the order in which they happened."""
        past = self.life[: self.happened]
        self.outbox = [r for r in past if not isinstance(r, NodeStep) or r.step > done]


class Controllers:
    """One after the other: what each was told, and what their journal holds."""

    def __init__(self, nodes: int, ranks_per_node: int) -> None:
        self.ranks = nodes * ranks_per_node
        self.agents = {f"n{node}": Agent(node_life(node, ranks_per_node)) for node in range(nodes)}
        self.journal: list[ev.Event] = []
        self.begin()

    def begin(self) -> None:
        """A new controller: its fold starts where the journal ends; what the last one's inbox held is lost."""
        done = max((e.last for e in self.journal if isinstance(e, ev.StepsDone)), default=START)
        self.fold = MeshFold(generation=GENERATION, nodes=tuple(self.agents), ranks=self.ranks, done=done)
        self.inbox: list[ev.Event] = []
        self.told: list[ev.Event] = []
        self.parts: set[tuple[int, int]] = set()
        for agent in self.agents.values():
            agent.tell_again(done)

    def hear(self, node: str, count: int, acknowledged: bool) -> None:
        """A batch of a node's outbox; it comes again when the acknowledgement is lost."""
        outbox = self.agents[node].outbox
        for report in outbox[:count]:
            if isinstance(report, contract.ShardWritten):
                self.parts.add((report.step, report.rank))
            for event in self.fold.feed(7, (node,), report):
                self.check(event)
                self.told.append(event)
                self.inbox.append(event)
        if acknowledged:
            del outbox[:count]

    def check(self, event: ev.Event) -> None:
        assert event.at == 7
        if isinstance(event, ev.CheckpointWritten):
            assert {(event.step, rank) for rank in range(self.ranks)} <= self.parts, "not all parts are there"
        if not isinstance(event, ev.StepsDone):
            assert event not in self.told, "told twice"

    def keep(self) -> None:
        """The journal takes an event from the inbox."""
        if self.inbox:
            self.journal.append(self.inbox.pop(0))


@settings(max_examples=300, deadline=None)
@given(nodes=st.integers(1, 3), ranks_per_node=st.integers(1, 2), choices=st.binary(max_size=600))
def test_the_mesh_tells_each_step_once_and_in_order_whoever_dies(nodes, ranks_per_node, choices):
    """Nodes' reports in any interleaving, in batches, any of them again, and controllers that die with their inbox."""
    world, tape = Controllers(nodes, ranks_per_node), Tape(choices)
    names = list(world.agents)
    moves = ["go"] * 8 + ["hear"] * 8 + ["hear, unacknowledged"] * 3 + ["keep"] * 6 + ["die"]
    while not tape.ended:
        move, node, count = moves[tape.below(len(moves))], names[tape.below(nodes)], 1 + tape.below(6)
        match move:
            case "go":
                for _ in range(count):
                    world.agents[node].go_on()
            case "keep":
                world.keep()
            case "die":
                world.begin()
            case _:
                world.hear(node, count, acknowledged=move == "hear")
    for node, agent in world.agents.items():
        while agent.happened < len(agent.life):
            agent.go_on()
        world.hear(node, len(agent.outbox), acknowledged=True)
    while world.inbox:
        world.keep()
    check_journal(world.journal, world.ranks)


def check_journal(journal: list[ev.Event], ranks: int) -> None:
    done = [e for e in journal if isinstance(e, ev.StepsDone)]
    assert [step for e in done for step in range(e.first, e.last + 1)] == list(range(START + 1, START + STEPS + 1))
    for e in done:
        steps = range(e.first, e.last + 1)
        assert e.generation == GENERATION
        assert e.loss_millionths == tuple(step * 125_000 for step in steps)
        assert e.tokens == 64 * len(steps)
        assert e.data_wait_us == sum(10 * step + ranks - 1 for step in steps), "the slowest rank's"
        assert e.checkpoint_us == sum(step + 5 * (step - 1 in SAVED) for step in steps)
        assert e.validation_us == sum(700 * (step - 1 in SAVED) for step in steps)
    written = {e.step: e for e in journal if isinstance(e, ev.CheckpointWritten)}
    assert sorted(written) == SAVED
    for e in written.values():
        assert (e.bytes, e.write_us) == (sum(100 + rank for rank in range(ranks)), 50 + ranks - 1)
    assert {e.step for e in journal if isinstance(e, ev.Validated)} == set(SAVED)
    ready = [e for e in journal if isinstance(e, ev.GenerationReady)]
    assert ready
    slowest = ev.GenerationReady(
        at=7,
        generation=GENERATION,
        step=START,
        rendezvous_us=10 + ranks - 1,
        build_us=200,
        restore_us=3000 + ranks - 1,
        processes={"parked": ranks - 1, "warm": 1} if ranks > 1 else {"warm": 1},
    )
    assert all(e == slowest for e in ready)
    assert [e.step for e in journal if isinstance(e, ev.GenerationFinished)][:1] == [START + STEPS]


def mesh(nodes: tuple[str, ...] = ("a", "b"), ranks: int = 2) -> MeshFold:
    return MeshFold(generation=GENERATION, nodes=nodes, ranks=ranks, done=START)


def node_step(step: int, loss: float | None = None, **changed: Any) -> NodeStep:
    report = NodeStep(
        generation=GENERATION,
        step=step,
        step_us=1,
        data_us=2,
        checkpoint_us=3,
        validation_us=4,
        tokens=64,
        loss=loss,
        grad_norm=None,
        lr=None,
    )
    return replace(report, **changed)


@pytest.mark.parametrize(
    ("node", "report"),
    [
        *[
            ("a", replace(report, generation=generation))
            for generation in (GENERATION - 1, GENERATION + 1)
            for report in (
                node_step(START + 1),
                NodeReady(generation=0, step=1, rendezvous_us=0, build_us=0, restore_us=0, versions={}),
                NodeFinished(generation=0, step=1, reason="stopped"),
                Halted(generation=0, snapshots={}),
                StartFailed(generation=0, error=""),
                Exited(generation=0, rank=0, exit_code=1, signal=None),
                contract.Failed(generation=0, rank=0, step=1, kind="memory", error="", traceback=""),
                contract.SaveFailed(generation=0, rank=0, step=1, error="", write_us=0),
                shard(0, START + 3),
                validated(START + 3),
            )
        ],
        ("c", NodeFinished(generation=GENERATION, step=1, reason="stopped")),
        ("c", Exited(generation=GENERATION, rank=0, exit_code=1, signal=None)),
    ],
)
def test_nothing_comes_of_another_generation_or_of_a_node_outside_the_mesh(node, report):
    fold = MeshFold(generation=GENERATION, nodes=("a",), ranks=1, done=START)
    assert fold.feed(0, (node,), report) == []
    assert fold == MeshFold(generation=GENERATION, nodes=("a",), ranks=1, done=START)


def test_a_step_that_the_slowest_node_has_not_done_is_not_told():
    fold = mesh()
    assert [fold.feed(0, ("a",), node_step(START + n, loss=1.0)) for n in (1, 2, 3)] == [[], [], []]
    assert fold.last is not None and fold.last.step == START + 3
    (done,) = fold.feed(0, ("b",), node_step(START + 2, data_us=9))
    assert isinstance(done, ev.StepsDone) and (done.first, done.last) == (START + 1, START + 2)
    assert (done.data_wait_us, done.checkpoint_us, done.validation_us) == (2 + 9, 6, 8)
    assert fold.done == START + 2


def test_steps_whose_details_are_lost_are_told_without_losses_that_could_be_anothers():
    """An outbox that overflowed while there was no controller: the time is settled, no loss moves to another step."""
    fold = mesh()
    fold.feed(0, ("a",), node_step(START + 3, loss=1.0))
    (done,) = fold.feed(0, ("b",), node_step(START + 3))
    assert isinstance(done, ev.StepsDone)
    assert (done.first, done.last, done.loss_millionths, done.tokens) == (START + 1, START + 3, (), 64)
    fold.feed(0, ("b",), node_step(START + 4))
    (done,) = fold.feed(0, ("a",), node_step(START + 4, loss=2.0))
    assert isinstance(done, ev.StepsDone) and done.loss_millionths == (2_000_000,)


def test_a_step_that_comes_after_a_newer_one_still_counts():
    fold = mesh()
    fold.feed(0, ("a",), node_step(START + 2, loss=2.0))
    fold.feed(0, ("a",), node_step(START + 1, loss=1.0))
    assert fold.last is not None and fold.last.step == START + 2
    (done,) = fold.feed(0, ("b",), node_step(START + 2))
    assert isinstance(done, ev.StepsDone) and done.loss_millionths == (1_000_000, 2_000_000)
    assert fold.feed(0, ("b",), node_step(START + 1)) == []


def test_steps_that_were_told_before_a_restart_are_not_kept():
    fold = mesh()
    for step in range(1, START + 1):
        assert fold.feed(0, ("a",), node_step(step, loss=1.0)) == fold.feed(0, ("b",), node_step(step)) == []
    assert not fold._steps and fold.last is None
    fold.feed(0, ("a",), node_step(START + 1, loss=1.0))
    assert len(fold.feed(0, ("b",), node_step(START + 1))) == 1


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_does_not_stop_the_reports(loss):
    """With audit.finite off such steps are done, and a report that raised would be sent again for ever."""
    fold = mesh(("a",), 1)
    (done,) = fold.feed(0, ("a",), node_step(START + 1, loss=loss))
    assert isinstance(done, ev.StepsDone) and done.loss_millionths == ()
    assert fold.feed(0, ("a",), validated(START + 1, loss)) == []
    (told,) = fold.feed(0, ("a",), validated(START + 1))
    assert isinstance(told, ev.Validated) and told.loss_millionths == 2_500_000


def test_the_validation_of_new_weights_is_told():
    fold = MeshFold(generation=GENERATION, nodes=("a",), ranks=1, done=0)
    assert [type(e) for e in fold.feed(0, ("a",), validated(0))] == [ev.Validated]
    assert fold.feed(0, ("a",), validated(0)) == []


def test_nodes_that_restored_different_steps_fail_the_generation():
    fold = mesh()
    ready = NodeReady(generation=GENERATION, step=START, rendezvous_us=0, build_us=0, restore_us=0, versions={})
    assert fold.feed(0, ("b",), ready) == []
    (failed,) = fold.feed(5, ("a",), replace(ready, step=START - 1))
    error = "nodes restored different steps: {'a': 19, 'b': 20}"
    assert failed == ev.GenerationFailed(at=5, generation=GENERATION, node="", error=error)


def test_failures_and_inventories_are_told_as_they_are():
    fold = mesh()
    words = contract.Failed(generation=GENERATION, rank=1, step=22, kind="collective", error="e", traceback="t")
    held = {0: (Snapshot(generation=3, step=19),)}
    assert [
        fold.feed(5, ("b",), report)[0]
        for report in (
            words,
            Exited(generation=GENERATION, rank=1, exit_code=None, signal=9),
            Halted(generation=GENERATION, snapshots=held),
            StartFailed(generation=GENERATION, error="no fork"),
        )
    ] == [
        ev.WorkerFailed(at=5, node="b", generation=GENERATION, slot=1, step=22, kind="collective", error="e"),
        ev.WorkerExited(at=5, node="b", generation=GENERATION, slot=1, exit_code=None, signal=9),
        ev.NodeHalted(at=5, node="b", generation=GENERATION, snapshots=held),
        ev.GenerationFailed(at=5, generation=GENERATION, node="b", error="no fork"),
    ]


def test_a_save_that_fails_on_many_ranks_is_told_once_and_the_next_one_again():
    fold = mesh(ranks=4)

    def failed(rank: int, step: int) -> contract.SaveFailed:
        return contract.SaveFailed(generation=GENERATION, rank=rank, step=step, error="disk full", write_us=1)

    told = fold.feed(5, ("a",), failed(1, 21))
    assert told == [ev.CheckpointFailed(at=5, step=21, error="rank 1: disk full")]
    assert [fold.feed(5, ("b",), failed(rank, 21)) for rank in (1, 2, 3)] == [[], [], []]
    assert len(fold.feed(5, ("b",), failed(2, 24))) == 1
    for rank in range(4):
        told = fold.feed(5, ("a",), shard(rank, 22))
    assert [type(event) for event in told] == [ev.CheckpointWritten], "a late one, of an earlier step, is no failure"


def test_parts_of_old_checkpoints_are_let_go():
    fold = mesh()
    for step in range(START + 1, START + 50):
        fold.feed(0, ("a",), shard(0, step))
        assert len(fold.feed(0, ("b",), shard(1, step))) == 1
        assert fold.parts[step] == {rank: shard(rank, step).part for rank in (0, 1)}
        assert len(fold.parts) <= reports.KEPT_CHECKPOINTS
    alone = mesh(("a",), 1)
    for step in range(START + 1, START + 50):
        alone.feed(0, ("a",), shard(0, step))
    assert alone.feed(0, ("a",), shard(0, START + 1)) == [], "told again, long after it was let go"


def test_reports_survive_the_wire_of_a_worker():
    """What the folds take is what the contract's frames give back."""
    for message in life(0):
        read = contract.decode(json.loads(json.dumps(contract.encode(message))), contract.FromWorker)
        assert read == message
