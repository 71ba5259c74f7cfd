"""The fold of a fan-in: the controller's fold makes the same of reports whichever way they come.

A tape drives nodes, fan-ins and the controller: a node reports to the controller or through one of the fan-ins, changes
the way at any time with what is not taken, fan-ins and controllers die with what they hold, and what a dead fan-in had
sent may arrive late.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from core_world import Tape
from hypothesis import given, settings
from hypothesis import strategies as st
from report_life import GENERATION, START
from test_reports_mesh import check_journal, node_life, node_step

from orchestrator.core import events as ev
from orchestrator.core.events import Snapshot
from orchestrator.runtime import groups
from orchestrator.runtime.groups import GroupFold, Told, halts_joined
from orchestrator.runtime.hangs import Stalled
from orchestrator.runtime.reports import (
    Exited,
    Halted,
    HaltedAlike,
    MeshFold,
    NodeReady,
    NodeStep,
    Report,
    halted,
)
from trainer import contract

WAYS = 2
"""Fan-ins; the controller's own is one more way."""


@dataclass
class Node:
    """A node with its outbox, and the way that it reports by."""

    life: list[Report]
    happened: int = 0
    outbox: deque[tuple[int, Report]] = field(default_factory=deque)
    newest: int = 0
    way: int = WAYS
    told: int = 0
    """The number up to which it has told on this way."""

    def push(self, report: Report) -> None:
        self.newest += 1
        self.outbox.append((self.newest, report))

    def go_on(self) -> None:
        if self.happened < len(self.life):
            self.push(self.life[self.happened])
            self.happened += 1

    def take_way(self, way: int) -> None:
        self.way, self.told = way, 0

    def taken(self, number: int) -> None:
        while self.outbox and self.outbox[0][0] <= number:
            self.outbox.popleft()

    def tell_again(self, done: int) -> None:
        """For a new controller: all facts, and the steps after `done`, in the order in which they happened."""
        self.outbox.clear()
        for report in self.life[: self.happened]:
            if not isinstance(report, NodeStep) or report.step > done:
                self.push(report)


@dataclass
class Way:
    """A fan-in: what it has folded, what it has sent, and what it knows to be taken."""

    fold: GroupFold = field(default_factory=GroupFold)
    seen: dict[str, int] = field(default_factory=dict)
    sent: list[Told] = field(default_factory=list)


class World:
    def __init__(self, nodes: int, ranks_per_node: int) -> None:
        self.ranks = nodes * ranks_per_node
        self.nodes = {f"n{node}": Node(node_life(node, ranks_per_node)) for node in range(nodes)}
        self.ways = [Way() for _ in range(WAYS)]
        self.late: list[Told] = []
        """What fan-ins had sent before they died: it may still arrive."""
        self.journal: list[ev.Event] = []
        self.arrived: dict[str, list[int]] = {}
        """What of each node this controller has taken, by number."""
        self.first: dict[str, int] = {}
        """The first number that each node has told this controller."""
        self.begin()

    def begin(self) -> None:
        """A new controller: the wires of the one before are gone, and what they carried."""
        done = max((e.last for e in self.journal if isinstance(e, ev.StepsDone)), default=START)
        self.fold = MeshFold(generation=GENERATION, nodes=tuple(self.nodes), ranks=self.ranks, done=done)
        self.late = []
        for way in range(WAYS):
            self.ways[way] = Way()
        for name, node in self.nodes.items():
            self.arrived[name], self.first[name] = [], node.newest + 1
            node.take_way(WAYS)
            node.tell_again(done)

    def take(self, told: Told) -> None:
        """As the body does."""
        fresh = [name for name, number in told.tellers.items() if number > max(self.arrived[name], default=0)]
        for name in fresh:
            self.arrived[name].append(told.tellers[name])
        if fresh:
            self.journal += self.fold.feed(7, fresh, told.report)

    def tell(self, name: str, count: int) -> None:
        """A node says some of what it has not said on its way."""
        node = self.nodes[name]
        batch = [entry for entry in node.outbox if entry[0] > node.told][:count]
        for number, report in batch:
            node.told = number
            if node.way == WAYS:
                self.take(Told({name: number}, report))
                node.taken(number)
            elif number > (way := self.ways[node.way]).seen.get(name, 0):
                way.fold.add(name, number, report)
                way.seen[name] = number

    def send(self, way: Way, limit: int) -> None:
        if not way.sent:
            way.sent = [groups.from_json(groups.to_json(told)) for told in way.fold.take(limit)]

    def answer(self, which: int) -> None:
        way = self.ways[which]
        for told in way.sent:
            self.take(told)
            for name, number in told.tellers.items():
                self.nodes[name].taken(number)
        way.sent = []

    def lose(self, which: int) -> None:
        self.late += self.ways[which].sent
        self.ways[which] = Way()
        for node in self.nodes.values():
            if node.way == which:
                node.take_way(WAYS)

    def end(self) -> None:
        """Everything happens, and everything that is under way arrives."""
        while self.late:
            self.take(self.late.pop(0))
        for name, node in self.nodes.items():
            while node.happened < len(node.life):
                node.go_on()
            self.tell(name, 1000)
        for which in range(WAYS):
            while self.ways[which].sent or len(self.ways[which].fold):
                self.send(self.ways[which], 1000)
                self.answer(which)
        assert not any(node.outbox for node in self.nodes.values()), "what is not taken is not forgotten"


def drive(world: World, tape: Tape) -> None:
    names = list(world.nodes)
    moves = ["go"] * 8 + ["tell"] * 8 + ["send"] * 4 + ["answer"] * 4 + ["way"] * 3 + ["lose", "late", "begin"]
    while not tape.ended:
        move, name, which = moves[tape.below(len(moves))], names[tape.below(len(names))], tape.below(WAYS)
        count = 1 + tape.below(6)
        match move:
            case "go":
                for _ in range(count):
                    world.nodes[name].go_on()
            case "tell":
                world.tell(name, count)
            case "send":
                world.send(world.ways[which], count)
            case "answer":
                world.answer(which)
            case "way":
                world.nodes[name].take_way(tape.below(WAYS + 1))
            case "lose":
                world.lose(which)
            case "late" if world.late:
                world.take(world.late.pop(0))
            case "begin" if tape.below(4) == 0:
                world.begin()
    world.end()


def check(nodes: int, ranks_per_node: int, choices: bytes) -> None:
    world = World(nodes, ranks_per_node)
    drive(world, Tape(choices))
    check_journal(world.journal, world.ranks)
    for name, node in world.nodes.items():
        assert world.arrived[name] == list(range(world.first[name], node.newest + 1)), "each once, and in order"


@settings(max_examples=300, deadline=None)
@given(nodes=st.integers(1, 4), ranks_per_node=st.integers(1, 2), choices=st.binary(max_size=800))
def test_the_mesh_tells_the_same_whichever_way_reports_come(nodes, ranks_per_node, choices):
    check(nodes, ranks_per_node, choices)


def joins_always(self: GroupFold, node: str, number: int, report: Report) -> None:
    self._newest.pop(node, None)
    add(self, node, number, report)


def takes_the_first(one: NodeStep, other: NodeStep) -> NodeStep:
    return one


def takes_the_loss_of_the_last(one: NodeStep, other: NodeStep) -> NodeStep:
    return replace(slower(one, other), loss=other.loss)


def takes_everything(self: World, told: Told) -> None:
    for name, number in told.tellers.items():
        self.arrived[name].append(number)
    self.journal += self.fold.feed(7, told.tellers, told.report)


def forgets_when_sent(self: World, way: Way, limit: int) -> None:
    send(self, way, limit)
    for told in way.sent:
        for name, number in told.tellers.items():
            self.nodes[name].taken(number)


def goes_on_from_where_it_was(self: Node, way: int) -> None:
    self.way = way


add, send, slower = GroupFold.add, World.send, groups.slower


@pytest.mark.parametrize(
    ("where", "name", "broken"),
    [
        (GroupFold, "add", joins_always),
        (groups, "slower", takes_the_first),
        (groups, "slower", takes_the_loss_of_the_last),
        (World, "take", takes_everything),
        (World, "send", forgets_when_sent),
        (Node, "take_way", goes_on_from_where_it_was),
    ],
)
def test_a_rule_that_is_broken_is_caught(monkeypatch, where, name, broken):
    monkeypatch.setattr(where, name, broken)
    source = random.Random(7)

    def holds() -> bool:
        try:
            check(1 + source.randrange(4), 1 + source.randrange(2), source.randbytes(800))
        except AssertionError:
            return False
        return True

    assert not all(holds() for _ in range(100))


# --- what is told as one ---------------------------------------------------------------------------------------------


def group(*told: tuple[str, Report]) -> list[Told]:
    """One fold of what nodes tell, numbered for each from 1."""
    fold, numbers = GroupFold(), Counter[str]()
    for node, report in told:
        numbers[node] += 1
        fold.add(node, numbers[node], report)
    return fold.take(1000)


def test_a_step_of_many_nodes_is_one_report_of_the_slowest_with_the_loss():
    slow = node_step(21, data_us=9, checkpoint_us=1)
    (told,) = group(("a", node_step(21)), ("b", node_step(21, loss=0.5)), ("c", slow))
    assert told.tellers == {"a": 1, "b": 1, "c": 1}
    assert told.report == node_step(21, loss=0.5, data_us=9)


@pytest.mark.parametrize("what", [f.name for f in dataclasses.fields(NodeStep) if f.name.endswith("_us")])
def test_each_duration_of_a_step_is_the_slowest_nodes(what):
    long, short = node_step(21, **{what: 9_000_000}), node_step(21, **{what: 1})
    for pair in ((("a", long), ("b", short)), (("a", short), ("b", long))):
        (told,) = group(*pair)
        assert getattr(told.report, what) == 9_000_000


def test_what_only_one_node_can_tell_stays_between_what_it_told_before_and_after():
    stalled = Stalled(generation=GENERATION, ranks=(), stalled_us=0, patience_us=0, slowest_us=0, hopeless=False)
    exited = Exited(generation=GENERATION, rank=0, exit_code=1, signal=None)
    told = group(("a", node_step(21)), ("b", stalled), ("b", node_step(21)), ("a", exited), ("b", exited))
    assert [(list(t.tellers), type(t.report)) for t in told] == [
        (["a"], NodeStep),
        (["b"], Stalled),
        (["b"], NodeStep),
        (["a"], Exited),
        (["b"], Exited),
    ]


def test_reports_that_differ_in_what_counts_stay_apart():
    ready = NodeReady(
        generation=GENERATION, step=20, rendezvous_us=1, build_us=5, restore_us=1, versions={"torch": "2"}
    )
    told = group(
        ("a", ready),
        ("b", replace(ready, rendezvous_us=3, build_us=1)),
        ("c", replace(ready, versions={"torch": "3"})),
        ("d", replace(ready, step=19)),
        ("e", replace(ready, generation=GENERATION + 1)),
        ("f", replace(ready, processes={"parked": 1})),
    )
    assert [list(t.tellers) for t in told] == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
    assert told[0].report == replace(ready, rendezvous_us=3)


def test_a_fold_that_is_taken_in_parts_keeps_its_order():
    fold = GroupFold()
    for number, step in enumerate((21, 22, 23), 1):
        fold.add("a", number, node_step(step))
    (first,) = fold.take(1)
    fold.add("b", 1, node_step(21))
    fold.add("b", 2, node_step(22))
    assert first.tellers == {"a": 1}
    rest = fold.take(9)
    assert [(t.tellers, t.report.step) for t in rest if isinstance(t.report, NodeStep)] == [
        ({"a": 2}, 22),
        ({"a": 3}, 23),
        ({"b": 1}, 21),
        ({"b": 2}, 22),
    ]
    assert not len(fold)


# --- answers to a halt -----------------------------------------------------------------------------------------------

TWO = (Snapshot(generation=3, step=19), Snapshot(generation=4, step=20))


@pytest.mark.parametrize(
    ("held", "alike"),
    [
        ({}, ()),
        ({2: TWO, 3: TWO}, TWO),
        ({3: TWO, 2: TWO}, TWO),
        ({2: TWO, 3: TWO[1:]}, None),
        ({2: TWO}, None),
        ({2: TWO, 3: TWO, 7: TWO}, None),
        ({0: TWO, 1: TWO}, None),
    ],
)
def test_a_node_answers_in_short_when_all_slots_of_its_place_hold_the_same(held, alike):
    for parked in (False, True):
        told = halted(GENERATION, (2, 3), held, parked)
        if alike is None:
            assert told == Halted(generation=GENERATION, snapshots=held, parked=parked)
        else:
            assert told == HaltedAlike(generation=GENERATION, snapshots=alike, parked=parked)


def test_nodes_that_hold_the_same_are_told_of_as_one():
    alike = HaltedAlike(generation=GENERATION, snapshots=TWO)
    parked = replace(alike, parked=True)
    other = HaltedAlike(generation=GENERATION, snapshots=())
    told = group(("a", alike), ("b", other), ("c", alike), ("d", parked), ("e", parked))
    assert [list(t.tellers) for t in told] == [["a", "c"], ["b"], ["d", "e"]]
    fold = MeshFold(generation=GENERATION, nodes=("a", "b", "c", "d", "e", "f"), ranks=12, done=START)
    told.append(Told({"f": 1}, Halted(generation=GENERATION, snapshots={}, parked=True)))
    events = [event for t in told for event in fold.feed(5, t.tellers, t.report)]
    assert events == [
        ev.NodesHalted(at=5, nodes=("a", "c"), generation=GENERATION, snapshots=TWO),
        ev.NodesHalted(at=5, nodes=("b",), generation=GENERATION, snapshots=()),
        ev.NodesHalted(at=5, nodes=("d", "e"), generation=GENERATION, snapshots=TWO, parked=True),
        ev.NodeHalted(at=5, node="f", generation=GENERATION, snapshots={}, parked=True),
    ]


def test_answers_that_stand_next_to_each_other_are_joined_and_nothing_passes_another():
    def halt(node: str, snapshots: tuple[Snapshot, ...] = TWO) -> ev.Event:
        return ev.NodesHalted(at=0, nodes=(node,), generation=GENERATION, snapshots=snapshots)

    lost = ev.NodeLost(at=0, node="c", cause="")
    events = [halt("a"), halt("b"), lost, halt("d"), halt("e", ()), halt("f", ())]
    both = ev.NodesHalted(at=0, nodes=("a", "b"), generation=GENERATION, snapshots=TWO)
    none = ev.NodesHalted(at=0, nodes=("e", "f"), generation=GENERATION, snapshots=())
    assert halts_joined(events) == [both, lost, halt("d"), none]


def test_answers_of_one_node_are_never_joined_nor_what_differs_in_anything():
    """A controller that comes back while the run halts is told an answer that it may have heard already."""

    def halt(*names: str, **changes: Any) -> ev.Event:
        return replace(ev.NodesHalted(at=0, nodes=names, generation=GENERATION, snapshots=TWO), **changes)

    assert halts_joined([halt("b"), halt("a"), halt("a")]) == [halt("b", "a"), halt("a")]
    twice = [halt("a"), halt("b"), halt("a"), halt("b"), halt("c")]
    assert halts_joined(twice) == [halt("a", "b"), halt("a", "b", "c")]
    assert halts_joined([halt("a", "b"), halt("c", "a")]) == [halt("a", "b"), halt("c", "a")]
    lost = ev.NodeLost(at=0, node="c", cause="")
    assert halts_joined([halt("a"), lost, halt("a"), halt("b")]) == [halt("a"), lost, halt("a", "b")]
    for other in (halt("b", parked=True), halt("b", at=1), halt("b", generation=GENERATION + 1)):
        assert halts_joined([halt("a"), other]) == [halt("a"), other]


@given(documents=st.lists(st.text(max_size=40)), limit_bytes=st.integers(0, 200))
def test_a_frame_ends_before_the_report_that_would_make_it_too_long(documents, limit_bytes):
    fit = groups.fitting(documents, limit_bytes)
    assert fit == documents[: len(fit)]
    sizes = [len(json.dumps(document)) for document in documents]
    assert sum(sizes[: len(fit)]) <= limit_bytes or len(fit) == 1
    assert len(fit) == len(documents) or sum(sizes[: len(fit) + 1]) > limit_bytes
    assert fit or not documents


# --- the wire --------------------------------------------------------------------------------------------------------


def test_reports_survive_the_wire():
    reports = [
        *(report for node in range(2) for report in node_life(node, 2)),
        Halted(generation=GENERATION, snapshots={2: TWO, 3: ()}),
        HaltedAlike(generation=GENERATION, snapshots=TWO, parked=True),
        Exited(generation=GENERATION, rank=1, exit_code=None, signal=9),
        contract.Failed(generation=GENERATION, rank=1, step=22, kind="memory", error="e", traceback="t"),
    ]
    for report in reports:
        told = Told({"a": 7}, report)
        assert groups.from_json(json.loads(json.dumps(groups.to_json(told)))) == told


@pytest.mark.parametrize(
    "document",
    [
        [{"a": 1}, {"type": "NodeStep", "step": 3}],
        [{"a": 1}, {"type": "Unknown"}],
        [{"a": 1}, {"type": "Exited", "generation": 1, "rank": 0, "exit_code": 1, "signal": None, "more": 1}],
        [{"a": 1, "b": 1}, {"type": "Exited", "generation": 1, "rank": 0, "exit_code": 1, "signal": None}],
        [{}, {"type": "NodeFinished", "generation": 1, "step": 1, "reason": "stopped"}],
    ],
)
def test_what_is_no_report_is_refused(document):
    with pytest.raises(ValueError, match=r"fields|message type|missing|told by"):
        groups.from_json(document)
