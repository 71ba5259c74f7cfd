"""Whole racks, store outages, slow nodes, notices, messages that are late, lost and repeated: the rules hold."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import pytest
from core_watch import LIMITS, Watch
from core_world import layout
from test_simulate import PATIENCE, watched

from orchestrator.core.actions import Action, OpenGeneration
from orchestrator.core.state import VERIFICATIONS, State
from orchestrator.simulate.body import Scenario, Simulation
from orchestrator.simulate.harm import DAY_US
from orchestrator.simulate.profile import (
    Cause,
    Delivery,
    Failures,
    Profile,
    ReadBack,
    Seconds,
    load_failures,
    load_profile,
)
from trainer.contract import Degrees

STEP_US = 2_000_000
MESHES = (
    layout(2, 2, 2, 1, 2, 1, shrinks_to=(1,), fallbacks=(Degrees(dp_replicate=2),)),
    layout(1, 3, 2, 2, 2, 2, shrinks_to=(2, 1)),
    layout(1, 4, 1, 1, 1, 1, shrinks_to=(3, 2, 1)),
)
POST = Delivery(
    mean_delay=Seconds(value=0.4, source="test"), retry=Seconds(value=1, source="test"), lost=0.1, repeated=0.1
)


def cause(effect: str, sign: str = "exit", **more: float) -> Cause:
    fields = {"name": f"{effect} {more}", "effect": effect, "sign": sign, "count": 1, "repair_s": 900, "source": "test"}
    return Cause.model_validate(fields | more)


EVERYTHING = (
    cause("node"),
    cause("node", "network"),
    cause("node", machines=2),
    cause("node", burst=2, burst_s=120),
    cause("worker"),
    cause("collective"),
    cause("hang", "hang"),
    cause("slow", "slow", slowdown=0.3),
    cause("corrupt", "corruption"),
    cause("leave", "notice", notice_s=300),
    cause("store", "notice", repair_s=60),
)


def made_of(seed: int, *causes: Cause, an_hour: float, days: float, delivery: Delivery | None = None) -> Scenario:
    """A small mesh, struck so often by each of these alike."""
    mesh = MESHES[seed % len(MESHES)]
    places = mesh.nodes + mesh.spares
    share = len(causes) * places / (24 * an_hour) if an_hour else 1.0
    exposure = load_failures("llama3").exposure.model_copy(update={"node_days": share})
    ladder = load_profile("ladder").model_copy(update={"delivery": delivery, "buddies": seed % 2 == 1})
    limits = replace(LIMITS, **PATIENCE, recoveries_without_progress=10**9, strikes=4, quarantined_at_most=2)
    return Scenario(
        layout=mesh,
        limits=limits,
        step_us=STEP_US,
        checkpoint_interval_steps=30,
        snapshot_interval_steps=1,
        profile=quick(ladder),
        failures=Failures(title="hostile", exposure=exposure, machines_per_rack=2, causes=causes),
        days=days,
        seed=seed,
        microbatches=4,
        rack_machines=2,
    )


def quick(profile: Profile) -> Profile:
    """A small mesh does not take as long as 2,048 nodes."""
    costs = {name: Seconds(value=3, source="test") for name in ("resume", "restart", "restore_durable", "provision")}
    found = profile.detection.model_copy(update={"slow": Seconds(value=60, source="test")})
    return profile.model_copy(update={"costs": profile.costs.model_copy(update=costs), "detection": found})


@pytest.fixture(scope="module")
def lived() -> list[Simulation]:
    scenarios = (made_of(seed, *EVERYTHING, an_hour=60, days=0.25, delivery=POST) for seed in range(9))
    return [watched(made, Watch()) for made in scenarios]


def test_the_supervisors_rules_hold_whatever_fails_and_however_messages_travel(lived: list[Simulation]) -> None:
    for simulation in lived:
        verdict = simulation.state.verdict
        assert simulation.ended_by_calendar or "no checkpoint is left to trust" in verdict, verdict
        ledger = simulation.state.ledger
        assert sum(ledger.totals.values()) == ledger.owed
    struck = Counter[str]()
    for simulation in lived:
        struck.update(simulation.strikes)
    assert set(struck) == {cause.name for cause in EVERYTHING} and all(struck.values()), struck
    assert sum(simulation.ended_by_calendar for simulation in lived) >= 6


def test_every_rung_is_taken(lived: list[Simulation]) -> None:
    rungs = {rung for simulation in lived for incident in simulation.state.incidents for rung in incident.rungs}
    assert rungs == {"resume", "replace", "spare", "shrink", "grow", "durable"}
    causes = {incident.cause for simulation in lived for incident in simulation.state.incidents}
    assert causes >= {"node", "exception", "collective", "hang", "slow", "corrupt", "leave", "grow"}


def test_the_rules_hold_while_nodes_read_checkpoints_back_and_some_read_badly() -> None:
    back = ReadBack(read=Seconds(value=20, source="test"), rotten=0.03, misread=0.05)
    outcomes = Counter[str]()
    for seed in range(4):
        made = made_of(seed, *EVERYTHING, an_hour=60, days=0.2, delivery=POST)
        profile = made.profile.model_copy(update={"read_back": back})
        limits = replace(made.limits, scrub_us=120_000_000, strikes=1000)
        simulation = watched(replace(made, profile=profile, limits=limits), Watch())
        outcomes.update(simulation.state.verifications)
    assert set(outcomes) == set(VERIFICATIONS) and all(outcomes.values()), outcomes
    assert outcomes["whole"] > 5 * outcomes["damaged"], outcomes


def test_one_seed_is_one_history_however_messages_travel() -> None:
    def history(seed: int) -> str:
        digest = hashlib.sha256()
        made = made_of(seed, *EVERYTHING, an_hour=60, days=0.05, delivery=POST)
        Simulation(made, record=lambda event, actions: digest.update(repr((event, actions)).encode())).run()
        return digest.hexdigest()

    assert history(1) == history(1) != history(4)


def run(made: Scenario) -> State:
    simulation = Simulation(made)
    state = simulation.run()
    assert simulation.ended_by_calendar, state.verdict
    return state


def test_a_rack_takes_no_state_along_when_placement_knows_it() -> None:
    """Two racks of two nodes; in the order of its machines, each holds one stage with both of its replicas."""
    rack = cause("node", machines=2, repair_s=60)
    mesh = layout(2, 2, 2, 1, 2, 0, shrinks_to=(1,))
    for seed in range(6):
        struck = replace(made_of(0, rack, an_hour=2, days=0.2), layout=mesh, seed=seed)
        assert run(struck).incidents[0].rungs == ["shrink"]
        assert run(replace(struck, rack_machines=0)).incidents[0].rungs == ["durable"]


def test_without_replicas_the_copies_that_buddies_keep_serve() -> None:
    lost = cause("node", repair_s=600)
    made = replace(made_of(0, lost, an_hour=6, days=1), layout=layout(1, 1, 8, 1, 2, 1))
    alone = run(made).incidents
    kept = run(replace(made, profile=made.profile.model_copy(update={"buddies": True}))).incidents
    assert len(alone) > 50 and {rung for i in alone for rung in i.rungs} == {"durable"}
    assert sum(i.rungs == ["spare"] for i in kept) > 0.9 * len(kept) > 50
    assert all(i.steps_lost <= 1 for i in kept if i.rungs == ["spare"])


def test_a_slow_node_costs_what_it_computes_longer_and_no_more() -> None:
    """Nobody can take its place, so each step of the mesh takes 30% longer until the end."""
    slow = cause("slow", "slow", slowdown=0.3)
    made = made_of(0, slow, an_hour=30, days=0.5)
    lonely = replace(made, layout=replace(made.layout, spares=0))
    state = run(lonely)
    totals = state.ledger.totals
    assert state.incidents == [] and totals["straggling"] > 0
    assert totals["productive"] == state.high_water * STEP_US * lonely.layout.nodes
    assert totals["straggling"] / totals["productive"] == pytest.approx(0.3, rel=0.03)


def test_a_slow_node_is_swapped_where_a_spare_is_there() -> None:
    made = made_of(0, cause("slow", "slow", slowdown=0.3), an_hour=2, days=1)
    state = run(replace(made, profile=made.profile.model_copy(update={"probes": 0.0})))  # it is slow there, too
    assert {(i.cause, i.rungs[-1]) for i in state.incidents} == {("slow", "spare")}
    assert state.ledger.totals["straggling"] < state.ledger.totals["productive"] // 20


def test_who_leaves_with_notice_costs_a_planned_change_and_nothing_is_done_again() -> None:
    state = run(made_of(0, cause("leave", "notice", notice_s=600, repair_s=60), an_hour=1, days=2))
    assert {(i.cause, i.rungs[-1]) for i in state.incidents} == {("leave", "spare")}
    assert len(state.incidents) > 30
    assert state.ledger.totals["detection"] == state.ledger.totals["recomputed"] == 0


def test_a_smaller_mesh_takes_more_microbatches_each() -> None:
    """Of four replicas with four microbatches each, three take six each: half as long again."""
    made = replace(made_of(2, cause("node", repair_s=10**6), an_hour=1, days=0.5), layout=replace(MESHES[2], spares=0))
    seen: dict[int, set[int]] = {}

    def look(event: object, actions: object) -> None:
        running = simulation.running
        if running is not None and running.phase == "training":
            seen.setdefault(running.layout.dp_replicate, set()).add(running.step_us)

    simulation = Simulation(made, record=look)
    simulation.run()
    stall = made.profile.costs.snapshot_stall.us
    paces = {replicas: {us - stall for us in found} for replicas, found in seen.items()}
    assert paces[4] == {STEP_US} and paces[3] == {STEP_US * 6 // 4} and paces[2] == {STEP_US * 2}


def test_a_mesh_with_other_shards_is_as_slow_as_its_nodes_are_few() -> None:
    """Of two nodes one is left; the state comes from its memory, and from what it kept of its buddy's."""
    mesh = layout(2, 1, 2, 1, 2, 0, fallbacks=(Degrees(dp_shard=2),))
    made = replace(made_of(1, cause("node", repair_s=3600), an_hour=1, days=2), layout=mesh)
    assert (made.slowdown(mesh), made.slowdown(mesh.smallest)) == (1, 2)
    orders: list[OpenGeneration] = []
    state = Simulation(made, record=lambda event, actions: orders.extend(_opened(actions))).run()
    moved = {(order.source, order.fallback is not None, order.snapshot_fallback is not None) for order in orders}
    assert {("ram", True, False), ("ram", False, True)} <= moved
    rungs = Counter(rung for incident in state.incidents for rung in incident.rungs)
    assert rungs["shrink"] > 5 and rungs["grow"] > 5, rungs
    assert state.ledger.totals["degraded_capacity"] > 0


def _opened(actions: list[Action]) -> list[OpenGeneration]:
    return [action for action in actions if isinstance(action, OpenGeneration)]


def test_an_outage_of_the_store_costs_saves_and_no_steps() -> None:
    state = run(made_of(0, cause("store", "notice", repair_s=600), an_hour=2, days=1))
    assert state.saves_failed > 20 and state.incidents == []
    assert state.high_water == state.step > DAY_US // STEP_US * 0.9
