"""Hangs: whoever stops is found in time and named, and whoever is only slow, starved or unread is not accused.

A small world in virtual time stands for ranks, their agents and the controller: ranks compute for as long as they like
within bounds and meet in a sum at the end of each step; agents read what has come, unless they stand still themselves.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core import events as ev
from orchestrator.runtime import hangs
from orchestrator.runtime.blame import Hung, MeshWatch
from orchestrator.runtime.hangs import FirstSteps, NodeWatch, Patience, Sighting, Silent, Stalled
from orchestrator.runtime.reports import Exited, MeshFold, NodeStep
from orchestrator.spec import parse
from trainer import contract

GENERATION = 3
S = 1_000_000
GRID_US = S // 4
PATIENCE = Patience(
    rank_silence_us=8 * S, stall_floor_us=20 * S, start_us=300 * S, save_us=720 * S, collective_us=120 * S
)
GOES_ON = Stalled(generation=GENERATION, ranks=(), stalled_us=0, patience_us=0, slowest_us=S, hopeless=False)


@dataclass
class Rank:
    rank: int
    step: int = 10
    busy_until: int = 0
    waits: bool = False
    pulse_at: int = 0
    said_until: int = 0
    """When its last message comes: none overtakes another."""
    frozen_until: int = 0
    """With its whole machine."""
    stuck: str = ""
    """"stop": its process is stopped. "grip": its loop never lets go of the interpreter. "loop": it does."""


@dataclass
class Agent:
    watch: NodeWatch
    inbox: deque[tuple[int, Any]] = field(default_factory=deque)
    """What has come and is not read yet, with the time at which it can be."""
    tick_at: int = 0
    still_until: int = 0


class World:
    """Ranks in steps of `slowest_us` at most; `late_us` bounds how late a starved rank's messages are."""

    def __init__(
        self, random: Random, *, nodes: int, per_node: int, slowest_us: int, late_us: int, patience: Patience = PATIENCE
    ) -> None:
        self.random, self.slowest_us, self.late_us = random, slowest_us, late_us
        self.now = 1_000 * S
        self.per_node = per_node
        self.ranks = [Rank(rank) for rank in range(nodes * per_node)]
        self.agents = {
            f"n{node}": Agent(NodeWatch(GENERATION, tuple(self.ranks_of(node)), patience, self.now))
            for node in range(nodes)
        }
        self.mesh = MeshWatch(tuple(self.agents))
        self.verdicts: list[tuple[int, Hung]] = []
        for rank in self.ranks:
            self.say(rank, contract.Phase, phase="compute")
            self.say_done(rank)
            self.compute(rank)

    def ranks_of(self, node: int) -> range:
        return range(node * self.per_node, (node + 1) * self.per_node)

    def say(self, rank: Rank, kind: Any, **fields: Any) -> None:
        message = kind(**{"generation": GENERATION, "rank": rank.rank, "step": rank.step, **fields})
        inbox = list(self.agents.values())[rank.rank // self.per_node].inbox
        rank.said_until = max(rank.said_until, self.now + self.random.randrange(self.late_us + 1))
        inbox.append((rank.said_until, message))

    def say_done(self, rank: Rank) -> None:
        zero = dict.fromkeys(("data_us", "snapshot_us", "save_us", "tokens", "snapshot_step"), 0)
        self.say(rank, contract.StepDone, step_us=S, loss=None, grad_norm=None, lr=None, **zero)

    def compute(self, rank: Rank) -> None:
        rank.waits = False
        rank.busy_until = self.now + self.random.randrange(self.slowest_us + 1)

    def run(self, until_us: int) -> None:
        """Up to a time, or to the first verdict."""
        while self.now < until_us and not self.verdicts:
            self.now += GRID_US
            for rank in self.ranks:
                self.live(rank)
            if all(rank.waits for rank in self.ranks):
                for rank in self.ranks:
                    rank.step += 1
                    self.say_done(rank)
                    self.compute(rank)
            for name, agent in self.agents.items():
                self.attend(name, agent)

    def live(self, rank: Rank) -> None:
        if self.now < rank.frozen_until:
            return
        if rank.stuck:
            rank.waits = False
        elif self.now >= rank.busy_until:
            rank.waits = True
        if self.now >= rank.pulse_at and rank.stuck not in ("stop", "grip"):
            rank.pulse_at = self.now + S
            self.say(rank, contract.Pulse, waiting=rank.waits, where="wait" if rank.waits else "work")

    def attend(self, name: str, agent: Agent) -> None:
        if self.now < agent.still_until:
            return
        if self.now >= agent.tick_at:  # first: an agent that wakes may look before it reads
            agent.tick_at = self.now + agent.watch.pause_us
            for report in agent.watch.tick(self.now, lambda rank: self.look(agent, rank)):
                self.verdicts += [(self.now, verdict) for verdict in self.mesh.feed(name, report)]
        late = [entry for entry in agent.inbox if entry[0] > self.now]
        for _, message in sorted((e for e in agent.inbox if e[0] <= self.now), key=lambda entry: entry[0]):
            agent.watch.hear(self.now, message)
            if isinstance(message, contract.StepDone):
                self.mesh.goes_on(name)
        agent.inbox = deque(late)

    def look(self, agent: Agent, rank: int) -> Sighting:
        unread = any(message.rank == rank and at <= self.now for at, message in agent.inbox)
        return Sighting(status="stopped" if self.ranks[rank].stuck == "stop" else "running", unread=unread)


SHAPES = {"nodes": st.integers(1, 3), "per_node": st.integers(1, 4)}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), **SHAPES)
def test_nobody_is_accused_who_keeps_within_bounds(seed: int, nodes: int, per_node: int) -> None:
    """Steps of 16 s after steps of 1 s, messages 3 s late, agents or whole nodes that stand still for a minute."""
    random = Random(seed)
    world = World(random, nodes=nodes, per_node=per_node, slowest_us=16 * S, late_us=3 * S)
    while world.now < 1_400 * S and not world.verdicts:
        world.run(world.now + random.randrange(1, 60) * S)
        for agent in world.agents.values():
            if random.random() < 0.3:
                agent.still_until = max(agent.still_until, world.now + random.randrange(1, 60) * S)
        if random.random() < 0.1:
            node, until = random.randrange(nodes), world.now + random.randrange(1, 60) * S
            frozen = world.agents[f"n{node}"]
            frozen.still_until = max(frozen.still_until, until)
            for rank in world.ranks_of(node):
                world.ranks[rank].frozen_until = until
    assert world.verdicts == []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), stuck=st.sampled_from(["stop", "grip", "loop"]), **SHAPES)
def test_who_stops_is_found_in_time_and_named(seed: int, nodes: int, per_node: int, stuck: str) -> None:
    random = Random(seed)
    world = World(random, nodes=nodes, per_node=per_node, slowest_us=2 * S, late_us=S)
    world.run(world.now + random.randrange(10 * S, 40 * S))
    assert world.verdicts == []
    culprit = random.choice(world.ranks)
    culprit.stuck, began = stuck, world.now
    world.run(world.now + 400 * S)
    ((at, hung),) = world.verdicts
    alone = len(world.ranks) == 1
    if stuck == "loop" and alone:  # nobody waits for it, so only the most generous deadline tells
        assert (hung.node, hung.slot) == ("", None)
        assert at - began <= PATIENCE.start_us + 10 * S
        return
    assert (hung.node, hung.slot, hung.step) == (f"n{culprit.rank // per_node}", culprit.rank, culprit.step)
    # Silence: a pulse's distance, its lateness, a tick. A stall: also the step in which it began.
    floor_us = PATIENCE.stall_floor_us
    bounds_us = {"stop": PATIENCE.rank_silence_us + 4 * S, "grip": floor_us + 4 * S, "loop": floor_us + 8 * S}
    assert at - began <= bounds_us[stuck]


def test_a_call_that_holds_the_interpreter_may_last_as_long_as_any_other() -> None:
    """A script that reads a big file between two steps is silent meanwhile; one that is stopped is not waited for."""
    for stuck, named in (("grip", []), ("stop", [1])):
        world = World(Random(0), nodes=2, per_node=2, slowest_us=2 * S, late_us=0)
        world.run(world.now + 20 * S)
        world.ranks[1].stuck = stuck
        world.run(world.now + PATIENCE.rank_silence_us + 5 * S)
        world.ranks[1].stuck = ""
        world.run(world.now + 60 * S)
        assert [hung.slot for _, hung in world.verdicts] == named


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    floor_us=st.sampled_from([3 * S, 4_500_000, 6 * S]),
    slowest_us=st.sampled_from([S // 4, S, S * 3 // 2]),
    late_us=st.sampled_from([0, S // 4]),
    nodes=st.integers(1, 4),
)
def test_who_loops_is_named_alone_however_short_the_patience(
    seed: int, floor_us: int, slowest_us: int, late_us: int, nodes: int
) -> None:
    """Pulses show each wait up to a second late, and ranks begin to wait up to a step after each other."""
    random = Random(seed)
    patience = replace(PATIENCE, stall_floor_us=floor_us)
    world = World(random, nodes=nodes, per_node=2, slowest_us=slowest_us, late_us=late_us, patience=patience)
    for rank in world.ranks:
        rank.pulse_at = world.now + random.randrange(S)
    world.run(world.now + random.randrange(10 * S, 20 * S))
    culprit = random.choice(world.ranks)
    culprit.stuck, began = "loop", world.now
    world.run(world.now + 60 * S)
    ((at, hung),) = world.verdicts
    assert hung.slot == culprit.rank
    assert at - began <= max(floor_us, 2 * slowest_us + 2_700_000) + 3 * S


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_detection_outlives_an_agent_that_stands_still_again_and_again(seed: int) -> None:
    random = Random(seed)
    world = World(random, nodes=2, per_node=2, slowest_us=S, late_us=S)
    world.ranks[2].stuck = "stop"
    while world.now < 1_300 * S and not world.verdicts:
        world.run(world.now + random.randrange(10, 14) * S)
        for agent in world.agents.values():
            agent.still_until = world.now + random.randrange(3, 9) * S
    assert [hung.slot for _, hung in world.verdicts] == [2]


# --- one node --------------------------------------------------------------------------------------------------------


class Node:
    """One watch, ticked each second; its processes run unless told otherwise."""

    def __init__(self, *ranks: int, patience: Patience = PATIENCE, first_us: int = 0) -> None:
        self.watch = NodeWatch(GENERATION, ranks, patience, 0, first_us)
        self.ranks = ranks
        self.now = 0
        self.sightings: dict[int, Sighting | None] = {}
        self.quiet: set[int] = set()
        self.waiting: set[int] = set()
        self.step = 10
        self.place = "here"

    def hear(self, kind: Any, rank: int, /, **fields: Any) -> None:
        self.watch.hear(self.now, kind(**{"generation": GENERATION, "rank": rank, "step": self.step, **fields}))

    def hear_recorded(self, rank: int, groups: dict[str, contract.GroupRecord]) -> None:
        self.watch.hear(self.now, contract.Recorded(generation=GENERATION, rank=rank, groups=groups, entries="[]"))

    def phase(self, phase: str, *ranks: int) -> None:
        for rank in ranks or self.ranks:
            self.hear(contract.Phase, rank, phase=phase)

    def steps(self, *durations_us: int, save_us: int = 0) -> None:
        zero = dict.fromkeys(("data_us", "snapshot_us", "tokens", "snapshot_step"), 0) | {"save_us": save_us}
        for duration_us in durations_us:
            self.step += 1
            for rank in self.ranks:
                self.hear(contract.StepDone, rank, step_us=duration_us, loss=None, grad_norm=None, lr=None, **zero)

    def seconds(self, seconds: int) -> list[Silent | Stalled]:
        """What is told meanwhile."""
        told = []
        for _ in range(seconds):
            self.now += S
            for rank in self.ranks:
                if rank not in self.quiet:
                    self.hear(contract.Pulse, rank, waiting=rank in self.waiting, where=self.place)
            told += self.watch.tick(self.now, lambda r: self.sightings.get(r, Sighting(status="running", unread=False)))
        return told


def test_silence_means_nothing_before_the_first_step_unless_the_process_is_stopped() -> None:
    node = Node(0, 1)
    node.phase("build")
    node.seconds(1)
    node.quiet = {0, 1}
    assert node.seconds(200) == []
    node.sightings[1] = Sighting(status="stopped", unread=False)
    (report,) = node.seconds(1)
    assert isinstance(report, Silent)
    assert (report.standing.rank, report.standing.status) == (1, "stopped")


def test_a_worker_that_has_not_spoken_yet_is_left_to_the_start_deadline() -> None:
    node = Node(0)
    node.quiet, node.sightings = {0}, {0: Sighting(status="stopped", unread=False)}
    assert node.seconds(400) == []


@pytest.mark.parametrize(
    "seen", [None, Sighting(status="running", unread=True), Sighting(status="zombie", unread=False)]
)
def test_who_has_ended_or_was_not_read_is_not_silent(seen: Sighting | None) -> None:
    node = Node(0)
    node.phase("compute")
    node.steps(S)
    node.seconds(1)
    node.quiet, node.sightings = {0}, {0: seen}
    assert not any(isinstance(report, Silent) for report in node.seconds(60))


def test_a_stall_is_not_told_while_ranks_speak_and_are_not_read() -> None:
    node = Node(0)
    node.phase("compute")
    node.steps(S)
    node.seconds(1)
    node.quiet, node.sightings = {0}, {0: Sighting(status="running", unread=True)}
    assert node.seconds(100) == []
    node.sightings = {0: Sighting(status="sleeping", unread=False)}
    assert any(isinstance(report, Stalled) for report in node.seconds(1))


def test_who_was_last_seen_to_wait_and_then_fell_silent_does_not_wait() -> None:
    """Before the first step silence alone means nothing, so the stall must tell."""
    node = Node(0, 1)
    node.phase("compute")
    node.waiting = {0, 1}
    node.seconds(1)
    node.quiet = {0}
    *_, report = node.seconds(95)
    assert isinstance(report, Stalled)
    (hung,) = MeshWatch(("a",)).feed("a", report)
    assert hung.slot == 0
    assert "; silent for 95.0 s, its process is running; last step 10" in hung.detail


def test_patience_follows_the_slowest_of_the_recent_steps_and_never_passes_the_collectives() -> None:
    node = Node(0)
    node.phase("compute")
    node.steps(S, 12 * S, S)
    assert node.seconds(36) == []
    assert isinstance(node.seconds(1)[0], Stalled)
    node.steps(*[S] * hangs.PACE_STEPS)
    assert node.seconds(20)[0] == GOES_ON
    assert isinstance(node.seconds(1)[0], Stalled)
    node.steps(60 * S)
    assert not any(r.ranks for r in node.seconds(90) if isinstance(r, Stalled))
    (report,) = node.seconds(1)
    assert isinstance(report, Stalled)
    assert report.patience_us == 90 * S


@pytest.mark.parametrize("floor_s", [3, 4, 20])
def test_who_is_waited_for_is_named_once_patience_is_over_however_late_a_pulse_shows_the_wait(floor_s: int) -> None:
    node = Node(0, 1, patience=replace(PATIENCE, stall_floor_us=floor_s * S))
    node.phase("compute")
    node.steps(S)
    node.seconds(1)  # rank 1 waits from here on, at the latest
    node.waiting = {1}
    mesh, found = MeshWatch(("a",)), []
    while not found:
        for report in node.seconds(1):
            found += mesh.feed("a", report)
        assert node.now <= (max(floor_s, 5) + 1) * S
    assert [hung.slot for hung in found] == [0]


def test_looks_are_frequent_until_a_finding_stands() -> None:
    node = Node(0, 1)
    node.phase("compute")
    node.steps(S)
    assert (node.seconds(20), node.watch.pause_us) == ([], hangs.LOOK_US)
    node.seconds(hangs.EAGER_LOOKS - 1)
    assert node.watch.pause_us == hangs.LOOK_US
    node.seconds(1)
    assert node.watch.pause_us == hangs.REPEAT_US
    node.steps(S)
    node.seconds(1)
    assert node.watch.pause_us == hangs.LOOK_US


def test_a_first_step_is_given_time_by_those_of_generations_before() -> None:
    before = Node(0, 1)
    before.phase("build")
    before.seconds(20)
    before.phase("validate")
    before.seconds(5)
    before.phase("compute")
    assert before.seconds(4) == [] and before.watch.first_us == 0
    before.steps(4 * S, S)
    assert before.watch.first_us == 9 * S, "from the end of the start: before a cold first step comes a validation"
    node = Node(0, 1, first_us=before.watch.first_us)
    node.phase("compute")
    assert node.seconds(27) == []
    assert isinstance(node.seconds(1)[0], Stalled)
    node.steps(S)
    assert node.seconds(20)[0] == GOES_ON
    assert isinstance(node.seconds(1)[0], Stalled)


def test_what_first_steps_take_is_known_while_each_generation_makes_one() -> None:
    first = FirstSteps()
    assert first.known_us("program") == 0
    first.learn(4 * S)
    assert first.known_us("program") == 4 * S
    first.learn(2 * S)
    assert first.known_us("program") == 4 * S, "cold ones are rare, and no hang"
    first.learn(0)
    assert first.known_us("program") == 0, "whoever was ended too soon has more time"
    first.learn(S)
    assert first.known_us("another") == 0


def test_steps_that_begin_a_save_are_rare_and_are_not_forgotten_for_it() -> None:
    node = Node(0)
    node.phase("compute")
    node.steps(25 * S, save_us=24 * S)
    node.steps(*[S] * 100)
    assert node.seconds(75) == []
    assert isinstance(node.seconds(1)[0], Stalled)


@pytest.mark.parametrize(("phase", "seconds"), [("validate", 90), ("checkpoint", 720)])
def test_a_phase_of_unknown_pace_is_given_time(phase: str, seconds: int) -> None:
    """The last save waits for the store, and has a deadline of its own that must come first."""
    node = Node(0, 1)
    node.phase("compute")
    node.steps(S)
    node.phase(phase, 0)
    assert node.seconds(seconds) == []
    (report,) = node.seconds(1)
    assert isinstance(report, Stalled)
    assert report.hopeless == (phase == "checkpoint")


def test_progress_of_one_rank_is_progress_of_the_node() -> None:
    node = Node(0, 1)
    node.phase("compute")
    node.steps(S)
    for _ in range(6):
        assert node.seconds(9) == []
        node.phase("validate", 1)
    for _ in range(6):
        assert node.seconds(9) == []
        node.step += 1  # told by its pulses before the step is complete with its snapshot
    assert node.seconds(9) == []


def test_a_wait_begins_anew_in_another_place_and_after_progress() -> None:
    def waited_s() -> int:
        *_, report = node.seconds(25)
        assert isinstance(report, Stalled)
        return report.ranks[0].waited_us // S

    node = Node(0)
    node.phase("compute")
    node.steps(S)
    node.waiting = {0}
    assert waited_s() == 24
    node.place = "elsewhere"
    assert waited_s() == 24
    node.steps(S)
    assert waited_s() == 24


def test_an_agent_that_was_away_reads_before_it_tells() -> None:
    node = Node(0)
    node.phase("compute")
    node.steps(S)
    node.seconds(19)
    node.now += 60 * S
    node.quiet, node.sightings = {0}, {0: Sighting(status="running", unread=True)}
    assert node.seconds(1) == []
    node.quiet, node.sightings = set(), {}
    node.steps(S)
    assert node.seconds(20) == []


def test_the_pace_of_validation_is_learnt() -> None:
    node = Node(0)
    node.phase("compute")
    node.steps(S)
    for _ in range(3):
        node.phase("validate")
        node.seconds(10)
    node.phase("compute")
    node.steps(S)
    node.phase("validate")
    assert node.seconds(30) == []
    assert node.seconds(1) != []


def test_after_a_failure_or_an_exit_nobody_hangs() -> None:
    for end in ("failed", "exited"):
        node = Node(0, 1)
        node.phase("compute")
        node.steps(S)
        if end == "failed":
            node.hear(contract.Failed, 0, kind="exception", error="e", traceback="t")
        else:
            node.watch.exited(0, in_good_order=False)
            node.ranks = (1,)
        node.quiet, node.sightings = {1}, {1: Sighting(status="stopped", unread=False)}
        assert node.seconds(100) == []


def test_a_rank_that_has_left_in_good_order_is_not_missed() -> None:
    node = Node(0, 1)
    node.phase("compute")
    node.steps(S)
    node.hear(contract.Finished, 0, reason="completed")
    node.watch.exited(0, in_good_order=True)
    node.ranks = (1,)
    (report, *_) = node.seconds(21)
    assert isinstance(report, Stalled)
    assert [standing.rank for standing in report.ranks] == [1]


# --- the mesh --------------------------------------------------------------------------------------------------------


def standing(rank: int, waited_s: float, step: int = 17, phase: str = "compute") -> hangs.Standing:
    where = "schedules.py:683 wait" if waited_s else "llama.py:88 forward"
    return hangs.Standing(
        rank=rank, step=step, phase=phase, where=where, waited_us=round(waited_s * S), silent_us=0, status=""
    )


def stalled(*standings: hangs.Standing, seconds: int = 21, hopeless: bool = False) -> Stalled:
    return Stalled(
        generation=GENERATION,
        ranks=standings,
        stalled_us=seconds * S,
        patience_us=20 * S,
        slowest_us=S,
        hopeless=hopeless,
    )


def test_the_rank_that_does_not_wait_is_named_once_all_nodes_have_told() -> None:
    mesh = MeshWatch(("a", "b"))
    assert mesh.feed("a", stalled(standing(0, 20.5), standing(1, 20.5))) == []
    assert mesh.feed("b", stalled(standing(2, 20.5), standing(3, 0))) == [], "what a told may be true no more"
    (hung,) = mesh.feed("a", stalled(standing(0, 21.5), standing(1, 21.5)))
    assert (hung.node, hung.slot, hung.step) == ("b", 3, 17)
    assert hung.detail == (
        "rank 3 does not wait for anybody while 3 others do, no step for 21.0 s; "
        "last step 17, phase compute, at llama.py:88 forward"
    )
    assert mesh.feed("b", stalled(standing(2, 21), standing(3, 0))) == [], "told once"


def test_ranks_that_are_behind_come_first() -> None:
    mesh = MeshWatch(("a",))
    ranks = (standing(0, 0), standing(1, 30), standing(2, 0, step=16), standing(3, 0, phase="validate"))
    assert [hung.slot for hung in mesh.feed("a", stalled(*ranks))] == [2, 3, 0]


def test_a_node_that_goes_on_is_waited_for() -> None:
    mesh = MeshWatch(("a", "b"))
    mesh.feed("a", stalled(standing(0, 30)))
    mesh.feed("a", stalled())
    assert mesh.feed("b", stalled(standing(1, 0))) == []
    mesh.goes_on("b")
    assert mesh.feed("a", stalled(standing(0, 30))) == []


def test_nodes_that_stalled_one_after_the_other_do_not_hang() -> None:
    mesh = MeshWatch(("a", "b"))
    mesh.feed("a", stalled(standing(0, 30)))
    mesh.feed("b", stalled(standing(1, 0)))
    mesh.goes_on("a")
    assert mesh.feed("a", stalled(standing(0, 30))) == []
    assert mesh.feed("a", stalled(standing(0, 30))) == []
    assert mesh.feed("b", stalled(standing(1, 0))) != []


def test_when_all_wait_nobody_is_named() -> None:
    mesh = MeshWatch(("a",))
    (hung,) = mesh.feed("a", stalled(standing(0, 30), standing(1, 30, step=16)))
    assert (hung.node, hung.slot, hung.step) == ("", None, 16)
    assert "all 2 ranks wait for each other; furthest behind is rank 1" in hung.detail


LOSS = "loop.py:129 train_step > loop.py:235 _sum_over_ranks > distributed_c10d.py:3200 all_reduce"
AUDIT = LOSS.replace(":129", ":148")
SHARDS = "loop.py:121 train_step > parallel.py:292 forward_backward > _fsdp_param.py:88 wait"


def begun(*counts: tuple[int, int, int]) -> list[dict[str, int]]:
    """Of each rank: in the world, among its stage's replicas, and in its pipeline."""
    return [dict(zip(("w", f"s{rank // 2}", f"p{rank % 2}"), count, strict=True)) for rank, count in enumerate(counts)]


EVEN = begun((9, 5, 8), (9, 5, 8), (9, 4, 8), (9, 4, 8))


@pytest.mark.parametrize(
    ("places", "exchanges", "steps", "out_of_step"),
    [
        pytest.param([LOSS, LOSS, AUDIT, LOSS], EVEN, [17] * 4, 2, id="past the sum that the others wait in"),
        pytest.param([LOSS, SHARDS, LOSS, LOSS], EVEN, [17, 18, 17, 17], 1, id="a step ahead"),
        pytest.param(
            [SHARDS, LOSS, LOSS, LOSS],
            begun((8, 5, 8), (9, 4, 8), (9, 4, 8), (9, 4, 8)),
            [17] * 4,
            1,
            id="left out what its peer waits in",
        ),
        pytest.param(
            [SHARDS, LOSS, LOSS, LOSS],
            begun((8, 5, 8), (9, 4, 8), (9, 4, 8), (9, 4, 8)),
            [18, 17, 17, 17],
            0,
            id="a step ahead, where it waits for its peer",
        ),
        pytest.param([LOSS, SHARDS, LOSS, LOSS], EVEN, [17] * 4, None, id="alone, and has left nothing out"),
        pytest.param([LOSS, LOSS, AUDIT, AUDIT], EVEN, [17] * 4, None, id="no majority"),
        pytest.param([SHARDS, SHARDS, LOSS, SHARDS], EVEN, [17] * 4, None, id="not where all meet"),
        pytest.param(
            [SHARDS, LOSS, SHARDS, LOSS],
            begun((8, 5, 8), (9, 4, 8), (8, 4, 8), (9, 3, 8)),
            [17] * 4,
            None,
            id="two that have left one out",
        ),
        pytest.param(
            [SHARDS] * 4, begun((9, 5, 8), (9, 6, 6), (9, 4, 8), (9, 4, 9)), [17] * 4, None, id="in one place"
        ),
    ],
)
def test_who_has_left_an_exchange_out_is_named(
    places: list[str], exchanges: list[dict[str, int]], steps: list[int], out_of_step: int | None
) -> None:
    mesh = MeshWatch(("a",), stage_ranks=2)
    each = zip(steps, places, exchanges, strict=True)
    ranks = [replace(standing(n, 30, step=s), where=where, exchanges=e) for n, (s, where, e) in enumerate(each)]
    (hung,) = mesh.feed("a", stalled(*ranks))
    assert (hung.slot, "out of step" in hung.detail) == (out_of_step, out_of_step is not None), hung.detail


# --- what flight recorders tell --------------------------------------------------------------------------------------

WORLD, SHARD = "gloo w", "all_reduce of 8 elements"
IN_WORLD = "all_reduce of 8 elements, number 9 of group world (gloo w)"


def recorded(rank: int, world: int, pair: int, waits: str, kind: str = SHARD, step: int = 17) -> hangs.Standing:
    """Begun so many in the world and in its pair (of ranks 0 and 1, 2 and 3, ...), and waits in the last there."""
    key = f"gloo p{rank // 2}"
    records = {
        WORLD: contract.GroupRecord(about="world", begun=world, waits=world * (waits == "w"), kind=kind),
        key: contract.GroupRecord(about="pair", begun=pair, waits=pair * (waits == "p"), kind=kind),
    }
    exchanges = {name.partition(" ")[2]: 1 for name in records}
    return replace(standing(rank, 30, step=step), exchanges=exchanges, groups=records)


def unread(s: hangs.Standing) -> hangs.Standing:
    return replace(s, groups={})


ALL_WAIT = "rank {} is out of step with 3 others, and all wait for each other, no step for 21.0 s; "
PLACE = "last step 17, phase compute, at schedules.py:683 wait"


@pytest.mark.parametrize(
    ("ranks", "named", "told"),
    [
        pytest.param(
            [recorded(0, 8, 5, "p"), recorded(1, 9, 4, "w"), recorded(2, 9, 4, "w"), recorded(3, 9, 4, "w")],
            0,
            f"; it has not begun {IN_WORLD}, in which 3 others wait",
            id="left out the sum: its peer has begun as many in their pair as others in theirs",
        ),
        pytest.param(
            [recorded(0, 8, 5, "p"), recorded(1, 9, 4, "w"), recorded(2, 9, 5, "w"), recorded(3, 9, 5, "w")],
            1,
            "; it has not begun all_reduce of 8 elements, number 5 of group pair (gloo p0), in which 1 other waits",
            id="left out what its peer waits in: others have begun one more in their pair",
        ),
        pytest.param(
            [recorded(0, 9, 5, "w"), recorded(1, 9, 5, "w", "barrier"), recorded(2, 9, 5, "w"), recorded(3, 9, 5, "w")],
            1,
            f"; it waits in barrier where 3 others wait in {IN_WORLD}",
            id="another collective",
        ),
        pytest.param(
            [recorded(0, 8, 5, "p"), recorded(1, 9, 5, "w"), recorded(2, 9, 5, "w"), recorded(3, 9, 5, "w")],
            None,
            f"; ranks 1, 2, 3: in {IN_WORLD}, not begun by rank 0",
            id="a message was lost: what it waits in has been begun by its peer",
        ),
        pytest.param(
            [recorded(0, 8, 5, "w"), recorded(1, 9, 5, "w"), recorded(2, 9, 5, "w"), recorded(3, 9, 5, "w")],
            None,
            f"; ranks 1, 2, 3: in {IN_WORLD}, not begun by rank 0",
            id="a message was lost: the others are one further",
        ),
        pytest.param(
            [recorded(0, 9, 5, "w"), recorded(1, 9, 5, "w"), recorded(2, 9, 5, "w"), recorded(3, 9, 5, "w")],
            None,
            f"; all of the group have begun {IN_WORLD}, and 4 still wait in it",
            id="nobody has left anything out",
        ),
        pytest.param(
            [recorded(0, 9, 5, "w"), recorded(1, 9, 5, "w", "barrier")],
            None,
            f"; rank 0: in {IN_WORLD}, where rank 1: in barrier",
            id="no majority",
        ),
        pytest.param(
            [recorded(0, 8, 5, "p"), recorded(1, 9, 4, "w"), recorded(2, 8, 5, "p"), recorded(3, 9, 4, "w")],
            None,
            f"; ranks 1, 3: in {IN_WORLD}, not begun by ranks 0, 2",
            id="two, and two",
        ),
        pytest.param(
            [recorded(0, 8, 5, "p"), recorded(1, 9, 4, "w"), unread(recorded(2, 9, 4, "w")), recorded(3, 9, 4, "w")],
            None,
            f"; ranks 1, 3: in {IN_WORLD}, not begun by rank 0",
            id="too little is known",
        ),
    ],
)
def test_flight_records_tell_who_has_left_a_collective_out(
    ranks: list[hangs.Standing], named: int | None, told: str
) -> None:
    (hung,) = MeshWatch(("a",)).feed("a", stalled(*ranks))
    assert hung.slot == named, hung.detail
    assert hung.detail.endswith(PLACE + told), hung.detail
    if named is not None:
        assert hung.detail.startswith(ALL_WAIT.format(named))
    assert {node for node, _ in hung.recorded} == {"a"}


def test_the_rank_a_step_ahead_has_left_the_sum_out() -> None:
    """Two ranks wait for each other, and nobody else is there to compare them with."""
    trio = [recorded(0, 8, 5, "p", step=18), recorded(1, 9, 4, "w"), unread(recorded(2, 9, 4, "w"))]
    third = {WORLD: contract.GroupRecord(about="world", begun=9, waits=9, kind=SHARD)}
    (hung,) = MeshWatch(("a",)).feed("a", stalled(*trio[:2], replace(trio[2], groups=third)))
    assert hung.slot == 0, hung.detail


def test_what_the_others_wait_in_is_told_of_the_rank_that_does_not_wait() -> None:
    others = [recorded(rank, 9, 5, "w") for rank in (0, 1, 2)]
    free = replace(recorded(3, 8, 5, ""), waited_us=0)
    (hung,) = MeshWatch(("a",)).feed("a", stalled(*others, free))
    assert (hung.slot, hung.recorded) == (3, (("a", 3), ("a", 0)))
    assert hung.detail.endswith(f"; it has not begun {IN_WORLD}, in which 3 others wait")
    (hung,) = MeshWatch(("a",)).feed("a", stalled(*others, unread(free)))
    assert (hung.slot, hung.recorded) == (3, (("a", 0),)), "it did not answer"
    assert hung.detail.endswith(f"; 3 others wait in {IN_WORLD}, and of its own part nothing is known")


def test_where_no_pulse_shows_a_wait_the_flight_records_do() -> None:
    """Scripts on an accelerator wait where they read a loss."""
    ranks = [replace(recorded(rank, 9 - (rank == 1), 5, "w"), waited_us=0, recorded_us=30 * S) for rank in range(4)]
    ranks[1] = replace(ranks[1], recorded_us=0)
    (hung,) = MeshWatch(("a",)).feed("a", stalled(*ranks))
    assert (hung.slot, hung.recorded) == (1, (("a", 1), ("a", 0)))
    assert hung.detail.startswith("rank 1 does not wait for anybody while 3 others do")
    assert hung.detail.endswith(f"; it has not begun {IN_WORLD}, in which 3 others wait")
    soon = [replace(rank, recorded_us=min(rank.recorded_us, 5 * S)) for rank in ranks]
    assert MeshWatch(("a",)).feed("a", stalled(*soon)) == [], "nobody has waited for long"
    unknown = [replace(ranks[0], groups={}), *ranks[1:]]
    assert MeshWatch(("a",)).feed("a", stalled(*unknown)) == [], "it has not answered"
    shown = [replace(ranks[0], waited_us=30 * S), *ranks[1:]]
    hung, *_ = MeshWatch(("a",)).feed("a", stalled(*shown))
    assert hung.slot == 1 and "nor do 2 more" in hung.detail, "where a pulse shows one, the others' count"


def test_a_recorded_wait_goes_on_while_its_rank_lives_and_is_no_longer_than_the_standstill() -> None:
    def told_then(node: Node) -> list[int]:
        node.phase("compute")
        node.steps(S)
        node.seconds(18)
        for rank, waited_us in ((0, 4 * S), (1, 90 * S)):
            record = contract.GroupRecord(about="world", begun=9, waits=9, waited_us=waited_us)
            node.hear_recorded(rank, {WORLD: record})
        *_, report = node.seconds(3)
        return [standing.recorded_us for standing in report.ranks]

    node = Node(0, 1, patience=replace(PATIENCE, waits_unseen=True))
    assert told_then(node) == [7 * S, 21 * S]
    node.quiet = {1}
    *_, report = node.seconds(2)
    assert [standing.recorded_us for standing in report.ranks] == [0, 0], "it has not been asked again for 5 s"
    assert node.watch.unread_recorders() == [0, 1]
    assert told_then(Node(0, 1)) == [0, 0], "pulses tell"


def test_without_flight_recorders_nothing_is_said_of_them() -> None:
    others = [unread(recorded(rank, 9, 5, "w")) for rank in (0, 1, 2)]
    (hung,) = MeshWatch(("a",)).feed("a", stalled(*others, standing(3, 0)))
    assert hung.detail.endswith("last step 17, phase compute, at llama.py:88 forward")
    assert hung.recorded == ()


def test_flight_recorders_are_read_before_a_stall_is_told_and_again_when_it_moves() -> None:
    node = Node(0, 1)
    node.phase("compute")
    node.steps(S)
    node.waiting = {0, 1}
    node.place = "wait"
    node.seconds(17)
    assert node.watch.unread_recorders() == [], "a step may take so long"
    node.seconds(2)
    assert node.watch.unread_recorders() == [0, 1]
    records = recorded(0, 9, 5, "w").groups
    node.hear_recorded(0, records)
    (report, *_) = node.seconds(2)
    assert isinstance(report, Stalled)
    assert [s.groups for s in report.ranks] == [records, {}]
    assert node.watch.unread_recorders() == [0, 1], "once more: it may be true no more"
    node.hear_recorded(1, records)
    assert node.watch.unread_recorders() == []
    node.hear(contract.Pulse, 0, waiting=True, where="wait", exchanges={"w": 10})
    (report, *_) = node.seconds(1)
    assert [bool(s.groups) for s in report.ranks] == [False, True], "what it told is true no more"
    node.hear_recorded(0, records)
    node.steps(S)
    node.seconds(1)
    assert node.watch.unread_recorders() == []


def test_no_flight_recorder_is_read_while_a_generation_starts_or_after_a_failure() -> None:
    node = Node(0, 1)
    node.phase("restore")
    node.seconds(200)
    assert node.watch.unread_recorders() == []
    node.phase("compute")
    node.steps(S)
    node.seconds(25)
    node.hear(contract.Failed, 0, kind="exception", error="e", traceback="")
    assert node.watch.unread_recorders() == []


def test_a_pulse_tells_how_many_exchanges_its_rank_has_begun() -> None:
    node = Node(0)
    node.phase("compute")
    node.hear(contract.Pulse, 0, waiting=True, where=LOSS, exchanges={"w": 7})
    node.steps(S)
    node.hear(contract.Pulse, 0, waiting=True, where=LOSS, exchanges={"w": 12})
    node.quiet = {0}
    *_, report = node.seconds(95)
    assert isinstance(report, Stalled)
    assert report.ranks[0].exchanges == {"w": 12}


def test_long_work_for_which_nobody_waits_is_given_time() -> None:
    mesh = MeshWatch(("a",))
    assert mesh.feed("a", stalled(standing(0, 0), standing(1, 5))) == []
    (hung,) = mesh.feed("a", stalled(standing(0, 0), standing(1, 5), hopeless=True, seconds=301))
    assert (hung.node, hung.slot) == ("", None)


# --- into events -----------------------------------------------------------------------------------------------------


def silent(rank: int) -> Silent:
    return Silent(generation=GENERATION, standing=replace(standing(rank, 0), silent_us=8_400_000, status="stopped"))


def test_a_silent_rank_becomes_one_event() -> None:
    fold = MeshFold(generation=GENERATION, nodes=("a", "b"), ranks=2, done=0)
    (event,) = fold.feed(7, ("b",), silent(1))
    assert event == ev.WorkerHung(
        at=7,
        node="b",
        generation=GENERATION,
        slot=1,
        step=17,
        detail="rank 1 hangs: silent for 8.4 s, its process is stopped (SIGSTOP); "
        "last step 17, phase compute, at llama.py:88 forward; stack in evidence/g3-r1-stack.txt",
    )
    assert fold.unseen == [("b", 1)]
    assert fold.feed(8, ("b",), silent(1)) == []


def test_an_event_names_the_flight_records_that_are_to_be_kept() -> None:
    fold = MeshFold(generation=GENERATION, nodes=("a", "b"), ranks=4, done=0)
    fold.feed(7, ("a",), stalled(recorded(0, 9, 5, "w"), recorded(1, 9, 5, "w", "barrier")))
    fold.feed(7, ("b",), stalled(recorded(2, 9, 5, "w"), recorded(3, 9, 5, "w")))
    (event,) = fold.feed(8, ("a",), stalled(recorded(0, 9, 5, "w"), recorded(1, 9, 5, "w", "barrier")))
    assert isinstance(event, ev.WorkerHung)
    files = "stack in evidence/g3-r1-stack.txt and flight records in evidence/g3-r1-flight.json, "
    assert event.detail.endswith(f"; {files}evidence/g3-r0-flight.json")
    assert (fold.unseen, fold.unrecorded) == ([("a", 1)], [("a", 1), ("a", 0)])


def test_an_exit_anywhere_explains_every_stall() -> None:
    fold = MeshFold(generation=GENERATION, nodes=("a", "b"), ranks=2, done=0)
    fold.feed(7, ("b",), Exited(generation=GENERATION, rank=1, exit_code=None, signal=9))
    assert fold.feed(7, ("a",), stalled(standing(0, 30))) == []
    assert fold.feed(7, ("b",), silent(1)) == []


def test_a_step_ends_a_nodes_stall() -> None:
    fold = MeshFold(generation=GENERATION, nodes=("a", "b"), ranks=2, done=17)
    fold.feed(7, ("a",), stalled(standing(0, 30)))
    numbers = dict.fromkeys(("step_us", "data_us", "checkpoint_us", "validation_us", "tokens"), 0)
    fold.feed(7, ("a",), NodeStep(generation=GENERATION, step=18, loss=None, grad_norm=None, lr=None, **numbers))
    assert fold.feed(7, ("b",), stalled(standing(1, 0))) == []


def test_what_is_no_longer_true_is_not_to_be_told() -> None:
    assert hangs.is_momentary(silent(1))
    assert hangs.is_momentary(stalled(standing(0, 30)))
    assert not hangs.is_momentary(stalled())


def test_the_spec_gives_the_patience() -> None:
    recovery = {"rank_silence_s": 5.5, "stall_floor_s": 30, "start_deadline_s": 60, "collective_timeout_s": 90}
    patience = parse({"run": {"name": "r"}, "recovery": recovery}).patience
    assert patience == Patience(
        rank_silence_us=5_500_000, stall_floor_us=30 * S, start_us=60 * S, save_us=720 * S, collective_us=90 * S
    )
