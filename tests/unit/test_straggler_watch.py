"""Stragglers, pure: whoever computes more slowly for long is named, and by no other reason."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core import events as ev
from orchestrator.runtime.groups import GroupFold
from orchestrator.runtime.reports import MeshFold, NodeFold, NodeStep, OwnTimes, Report
from orchestrator.runtime.stragglers import LASTING_US, TOLERATED, WINDOW_STEPS, Slow, StragglerWatch
from trainer import contract

S = 1_000_000
GENERATION = 3


class Mesh:
    """Ranks in stages, on nodes of `per_node`; a step takes a second of everybody's own time, but for the slow."""

    def __init__(
        self,
        nodes: int,
        per_node: int,
        stages: int = 1,
        slow_before: dict[int, str] | None = None,
        loads: tuple[int, ...] = (1,),
    ) -> None:
        self.names = tuple(f"n{n}" for n in range(nodes))
        self.ranks = nodes * per_node
        known = {} if slow_before is None else slow_before
        self.watch = StragglerWatch(self.names, self.ranks, stages, known, loads)
        self.step = 0

    def windows(self, count: int, slow: dict[int, float], wall_us: int = WINDOW_STEPS * S) -> list[Slow]:
        found: list[Slow] = []
        for _ in range(count):
            self.step += WINDOW_STEPS
            own_us = {rank: round(S * slow.get(rank, 1.0)) for rank in range(self.ranks)}
            found += self.watch.feed(self.step, own_us, wall_us)
        return found


@pytest.mark.parametrize(("times", "steps"), [(1.2, 36), (1.3, 20), (4.0, 12)])
def test_who_is_slow_is_named_after_so_many_steps_and_once(times: float, steps: int) -> None:
    mesh = Mesh(nodes=2, per_node=1)
    assert mesh.windows(steps // WINDOW_STEPS - 1, {1: times}) == []
    (found,) = mesh.windows(1, {1: times})
    assert (found.node, found.slot, found.workload) == ("n1", 1, False)
    assert f"rank 1 computes {times:.2f} times as long as its 1 peers, over {steps} steps" in found.detail
    assert mesh.windows(100, {1: times}) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([1.0, 1.0 / TOLERATED, TOLERATED, 9.0, 0.1]), max_size=60), st.integers(1, 3))
def test_nobody_is_named_for_what_is_tolerated_or_passes(ratios: list[float], every: int) -> None:
    """However hard a burst is: one that lasts for a window is not enough, and is forgotten."""
    mesh = Mesh(nodes=3, per_node=1)
    for before, now in pairwise([1.0, *ratios]):
        burst = now if before == 1.0 or now == 1.0 else 1.0
        assert mesh.windows(1, {1: burst}) == []
        if burst > 1:
            assert mesh.windows(5 * every, {}) == []


def test_steps_that_are_short_do_not_shorten_patience() -> None:
    mesh = Mesh(nodes=2, per_node=1)
    wall_us = LASTING_US // 20
    assert mesh.windows(19, {1: 2.0}, wall_us) == []
    assert len(mesh.windows(1, {1: 2.0}, wall_us)) == 1


def test_peers_are_of_one_stage() -> None:
    """A stage with the head has more to do than the others: nobody is slow for that."""
    mesh = Mesh(nodes=4, per_node=1, stages=2)
    assert mesh.windows(50, {2: 3.0, 3: 3.0}) == []
    assert [f.slot for f in mesh.windows(50, {2: 3.0, 3: 4.0})] == [3]
    alone = Mesh(nodes=2, per_node=1, stages=2)
    assert alone.windows(50, {1: 3.0}) == [], "there is nobody to compare it with"


def test_peers_take_as_many_microbatches() -> None:
    """Two stages of three replicas, of which the first takes two microbatches and each other one, on nodes of two."""
    mesh = Mesh(nodes=6, per_node=2, stages=2, loads=(2, 1, 1))
    usual = dict.fromkeys((0, 1, 6, 7), 2.0)
    assert mesh.windows(50, usual) == [], "who does twice the work is not slow"
    assert [f.slot for f in mesh.windows(50, usual | {0: 3.0})] == [0]
    (one,) = mesh.windows(50, usual | {9: 1.5})
    assert one.slot == 9 and "as long as its 3 peers" in one.detail
    alone = Mesh(nodes=2, per_node=1, loads=(2, 1))
    assert alone.windows(50, {0: 3.0}) == [], "there is nobody to compare it with"


def test_the_verdict_tells_a_node_from_its_work() -> None:
    every = Mesh(nodes=4, per_node=2)
    found = every.windows(20, {2: 1.3, 3: 1.4})
    assert {f.node for f in found} == {"n1"}
    assert "all 2 ranks of the node are slow: it is the node" in found[-1].detail
    (one,) = Mesh(nodes=4, per_node=2).windows(20, {2: 1.3})
    assert "1 of the node's 2 ranks" in one.detail
    known: dict[int, str] = {}
    assert not Mesh(nodes=4, per_node=1, slow_before=known).windows(20, {2: 1.3})[0].workload
    moved = Mesh(nodes=4, per_node=1, slow_before=known)
    moved.names = moved.watch.nodes = ("n0", "n1", "spare", "n3")
    (again,) = moved.windows(20, {2: 1.3})
    assert again.workload and "it was slow on n2, too" in again.detail


def test_what_is_lost_between_costs_a_window_and_no_memory() -> None:
    watch = StragglerWatch(nodes=("a", "b"), ranks=2, stages=1)
    for window in range(1, 1000):
        assert watch.feed(window * WINDOW_STEPS, {0: S}, S) == []
    assert len(watch._told) <= 8
    for window in range(1000, 1010):
        watch.feed(window * WINDOW_STEPS, {0: S}, 5 * S)
        found = watch.feed(window * WINDOW_STEPS, {1: 2 * S}, 5 * S)
        if found:
            break
    assert [f.slot for f in found] == [1]


# --- on measured noise -----------------------------------------------------------------------------------------------

MEASURED = json.loads(Path(__file__).with_name("own_times.json").read_text())["own_us"]
"""Own times of two ranks in a clean run, in microseconds a step: straggler_trials.py --record."""
DIFFERENCES = [math.log(one / other) / math.sqrt(2) for one, other in zip(*MEASURED, strict=True)]
"""A rank's own part of the noise, as logarithms: what disturbs a machine as a whole strikes both and is in neither."""


def named(random: Random, ranks: int, steps: int, slow: dict[int, float]) -> int | None:
    """A simulation: each rank has the recorded noise, begun anywhere in it, and in either direction. Who is named."""
    watch = StragglerWatch(nodes=tuple(map(str, range(ranks))), ranks=ranks, stages=1)
    usual, count = median(DIFFERENCES), len(DIFFERENCES)
    begins = [(random.randrange(count), random.choice((1, -1))) for _ in range(ranks)]
    for step in range(WINDOW_STEPS, steps + 1, WINDOW_STEPS):
        own_us = {}
        for rank, (begin, sign) in enumerate(begins):
            noise = [sign * (DIFFERENCES[(begin + at) % count] - usual) for at in range(step - WINDOW_STEPS, step)]
            own_us[rank] = round(S * math.exp(median(noise)) * slow.get(rank, 1.0))
        if found := watch.feed(step, own_us, WINDOW_STEPS * S):
            return found[0].slot
    return None


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize(("times", "within_steps"), [(1.2, 60), (1.3, 50)])
def test_simulated_on_measured_noise_a_slow_rank_is_named(ranks: int, times: float, within_steps: int) -> None:
    random = Random(7)
    trials = [(slow, named(random, ranks, within_steps, {slow: times})) for slow in [*range(ranks)] * (120 // ranks)]
    right = sum(found == slow for slow, found in trials)
    assert right >= 0.95 * len(trials), f"{right} of {len(trials)}"
    assert all(found in (slow, None) for slow, found in trials)


@pytest.mark.parametrize("ranks", [2, 8])
def test_simulated_on_measured_noise_a_clean_run_names_nobody(ranks: int) -> None:
    """As many steps as ten hours have at one a second."""
    random = Random(8)
    assert [named(random, ranks, 3600, {}) for _ in range(10)] == [None] * 10


# --- from ranks to events --------------------------------------------------------------------------------------------


def step_done(rank: int, step: int, own_us: int | None) -> contract.StepDone:
    zero = dict.fromkeys(("data_us", "snapshot_us", "save_us", "tokens", "snapshot_step"), 0)
    told = {"loss": None, "grad_norm": None, "lr": None}
    return contract.StepDone(
        generation=GENERATION,
        rank=rank,
        step=step,
        step_us=2 * S,
        own_us=own_us,
        **zero,
        **told,  # type: ignore[arg-type]
    )


def own_times(reports: list[Report]) -> list[OwnTimes]:
    return [report for report in reports if isinstance(report, OwnTimes)]


def test_a_node_tells_medians_of_whole_windows() -> None:
    fold = NodeFold(generation=GENERATION, ranks=(2, 3))
    told: list[Report] = []
    for step in range(6, 13):
        for rank in (2, 3):
            told += fold.feed(step_done(rank, step, own_us=step * rank))
    first, second = own_times(told)
    assert (first.step, first.wall_us) == (8, 3 * 2 * S)
    assert second == OwnTimes(generation=GENERATION, step=12, own_us={2: 21, 3: 32}, wall_us=WINDOW_STEPS * 2 * S)


def test_where_no_own_time_is_known_nothing_is_told() -> None:
    fold = NodeFold(generation=GENERATION, ranks=(0, 1))
    told: list[Report] = []
    for step in range(1, 9):
        told += fold.feed(step_done(0, step, own_us=5))
        told += fold.feed(step_done(1, step, own_us=None))
    assert own_times(told) == []


def test_a_fan_in_tells_those_of_many_nodes_as_one() -> None:
    group = GroupFold()
    for rank, node in enumerate("abc"):
        report = OwnTimes(generation=GENERATION, step=4, own_us={rank: rank}, wall_us=rank)
        group.add(node, 1, report)
    (told,) = group.take(10)
    assert told.tellers == {"a": 1, "b": 1, "c": 1}
    assert told.report == OwnTimes(generation=GENERATION, step=4, own_us={0: 0, 1: 1, 2: 2}, wall_us=2)


def test_a_finding_becomes_an_event_and_its_cost_a_label() -> None:
    mesh = MeshFold(generation=GENERATION, nodes=("a", "b"), ranks=2, done=0)
    events: list[ev.Event] = []
    for step in range(1, 41):
        for rank, node in enumerate("ab"):
            numbers = dict.fromkeys(("data_us", "checkpoint_us", "validation_us", "tokens"), 0)
            told = {"loss": None, "grad_norm": None, "lr": None}
            done = NodeStep(generation=GENERATION, step=step, step_us=2 * S, **numbers, **told)  # type: ignore[arg-type]
            events += mesh.feed(0, (node,), done)
            if step % WINDOW_STEPS == 0:
                own_us = {rank: S if rank == 0 else 3 * S // 2}
                events += mesh.feed(
                    0, (node,), OwnTimes(generation=GENERATION, step=step, own_us=own_us, wall_us=8 * S)
                )
    (slow,) = [event for event in events if isinstance(event, ev.NodeSlow)]
    assert (slow.node, slow.slot, slow.generation, slow.workload) == ("b", 1, GENERATION, False)
    waited_us = [event.straggling_us for event in events if isinstance(event, ev.StepsDone)]
    # Named with the third window of ten; then each costs four times half a second, told with the step after.
    assert sum(waited_us) == 6 * WINDOW_STEPS * S // 2
