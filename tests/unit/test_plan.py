"""The planner: its arithmetic agrees with the simulator, its spares with a count, its advice with its arithmetic."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from core_world import layout
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from orchestrator import spec as specs
from orchestrator.cli import app
from orchestrator.simulate import formulas
from orchestrator.simulate import plan as plans
from orchestrator.simulate.body import Scenario
from orchestrator.simulate.outcome import simulate
from orchestrator.simulate.profile import ProfileError, Seconds, load_failures, load_profile
from orchestrator.simulate.scenario import of_spec, scaled

ROOT = Path(__file__).resolve().parents[2]
JOB = str(ROOT / "examples" / "llama3_405b.toml")


def scenario(profile: str, gpus: int = 4096, *overrides: str, **changes: Any) -> Scenario:
    spec = specs.load(JOB, [scaled(specs.load(JOB), gpus), *overrides])
    return replace(of_spec(spec, load_profile(profile), load_failures("llama3"), 40, 0), **changes)


@pytest.mark.parametrize("profile", ["shepherd", "restart"])
@pytest.mark.parametrize("mtbf_h", [12, 3])
def test_expected_goodput_is_the_simulated_one_within_a_point(profile: str, mtbf_h: float) -> None:
    made = plans.with_mtbf(scenario(profile, 4096, "cluster.spares=60"), mtbf_h)
    simulated = statistics.fmean(simulate(replace(made, seed=seed)).goodput for seed in range(2))
    assert plans.expect(made).goodput == pytest.approx(simulated, abs=0.01)


def test_the_shares_add_up() -> None:
    for profile in ("shepherd", "restart"):
        e = plans.expect(scenario(profile))
        assert e.goodput_without_spares + e.stalls + e.down + e.again == pytest.approx(1, abs=1e-9)


def test_failures_are_those_of_the_list_at_this_size_or_of_the_mtbf() -> None:
    made = scenario("shepherd", 16_384)
    assert plans.expect(made).failures_a_day == pytest.approx(466 / 54)
    assert plans.expect(plans.with_mtbf(made, 3.1)).failures_a_day == pytest.approx(24 / 3.1)


def test_spares_fill_the_mesh_ninety_nine_times_of_a_hundred() -> None:
    """Counted over random looks at a fleet whose machines are each away for their share of the time."""
    made = plans.with_mtbf(scenario("shepherd", 4096), 2)
    spares, nodes = plans.spares_wanted(made), made.layout.nodes
    away = sum(
        plans.rate(made, c) / nodes * (c.repair_s + 60) for c in made.failures.causes if c.effect in ("node", "corrupt")
    )
    rng, share = random.Random(1), away / (1 + away)
    looks = [sum(rng.random() < share for _ in range(nodes + spares)) for _ in range(3000)]
    assert 0.975 < sum(n <= spares for n in looks) / len(looks) < 0.9995
    fewer = sum(n <= spares - 2 for n in looks) / len(looks)
    assert fewer < 0.99


def test_intervals_are_the_best_that_there_are() -> None:
    made = plans.with_mtbf(scenario("restart"), 3)
    _, wanted = plans.intervals_wanted(made)
    assert wanted is not None
    best = plans.expect(replace(made, checkpoint_interval_steps=wanted)).goodput
    for factor in (0.5, 0.8, 1.25, 2):
        other = replace(made, checkpoint_interval_steps=round(wanted * factor))
        assert plans.expect(other).goodput <= best + 1e-4, factor
    memory = plans.with_mtbf(scenario("shepherd"), 1)
    snapshots, saves = plans.intervals_wanted(memory)
    best = plans.expect(replace(memory, snapshot_interval_steps=snapshots)).goodput
    assert saves is None, "with replicas every failure of the list is answered from memory"
    for steps in (max(1, snapshots // 3), snapshots * 3):
        assert plans.expect(replace(memory, snapshot_interval_steps=steps)).goodput <= best + 1e-4


def two_level() -> Scenario:
    """Failures that memory survives, and others that it does not; both often enough that the intervals matter."""
    made = plans.with_mtbf(scenario("shepherd", 2048, step_us=1_000_000), 0.5)
    given = {name: Seconds(value=s, source="test") for name, s in (("snapshot_stall", 0.1), ("save_write", 10))}
    costs = made.profile.costs.model_copy(update={**given, "save_stall": Seconds(value=5, source="test")})
    enough = replace(made.layout, spares=plans.spares_wanted(made))
    return replace(made, layout=enough, profile=made.profile.model_copy(update={"costs": costs}))


def best_by_search(made: Scenario, snapshots: list[int], saves: list[int]) -> float:
    return max(
        plans.expect(replace(made, snapshot_interval_steps=n, checkpoint_interval_steps=m)).goodput
        for n in snapshots
        for m in saves
    )


def as_wanted(made: Scenario) -> tuple[float, int, int]:
    snapshots, saves = plans.intervals_wanted(made)
    assert snapshots and saves is not None
    there = replace(made, snapshot_interval_steps=snapshots, checkpoint_interval_steps=saves)
    return plans.expect(there).goodput, snapshots, saves


def as_wanted_of(made: Scenario, saves: int | None = None) -> Scenario:
    snapshots, wanted = plans.intervals_wanted(made)
    return replace(made, snapshot_interval_steps=snapshots, checkpoint_interval_steps=saves or wanted or 1)


def test_both_tiers_together_are_where_a_search_finds_the_least_cost() -> None:
    made = two_level()
    goodput, snapshots, saves = as_wanted(made)
    everywhere = best_by_search(made, list(range(1, 4 * snapshots)), list(range(12, 4 * saves, 4)))
    assert everywhere - 5e-4 < goodput <= everywhere + 1e-6
    assert goodput > best_by_search(made, [snapshots], [saves // 3, saves * 3]) + 5e-3, "each interval matters here"
    assert goodput > best_by_search(made, [max(1, snapshots // 4), snapshots * 4], [saves]) + 2e-3


def test_failures_that_memory_survives_do_not_count_against_the_durable_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = two_level()
    _, snapshots, saves = as_wanted(made)
    worker = [c.model_copy(update={"count": c.count * 9}) for c in made.failures.causes if c.effect == "worker"]
    others = [c for c in made.failures.causes if c.effect != "worker"]
    frail = replace(made, failures=made.failures.model_copy(update={"causes": (*others, *worker)}))
    assert plans.intervals_wanted(frail)[1] == saves and plans.intervals_wanted(frail)[0] < snapshots
    # Broken: every failure counts against the durable interval.
    monkeypatch.setattr(plans, "from_store", lambda made, cause: True)
    wrong = plans.intervals_wanted(frail)[1]
    monkeypatch.undo()
    assert wrong is not None and wrong < saves / 1.5
    cost = plans.expect(as_wanted_of(frail)).goodput - plans.expect(as_wanted_of(frail, saves=wrong)).goodput
    assert cost > 1e-3, "and this test would see it"


@pytest.mark.parametrize(("count", "low", "high"), [(0, 0, 2.996), (1, 0.0513, 4.744), (5, 1.970, 10.513)])
def test_the_interval_of_a_rate_is_garwoods(count: int, low: float, high: float) -> None:
    assert formulas.poisson_interval(count, 0.9) == pytest.approx((low, high), abs=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.floats(0.5, 0.99))
def test_so_many_or_more_and_so_many_or_fewer_are_as_unlikely_at_its_ends(count: int, confidence: float) -> None:
    low, high = formulas.poisson_interval(count, confidence)
    assert low < count < high
    assert 1 - formulas.poisson_at_most(count - 1, low) == pytest.approx((1 - confidence) / 2, abs=1e-9)
    assert formulas.poisson_at_most(count, high) == pytest.approx((1 - confidence) / 2, abs=1e-9)


def test_without_replicas_a_lost_node_costs_a_restore_from_the_store() -> None:
    alone = scenario("shepherd", 2048)
    assert alone.layout.dp_replicate == 1
    node = next(c for c in alone.failures.causes if c.effect == "node")
    worker = next(c for c in alone.failures.causes if c.effect == "worker")
    assert plans.from_store(alone, node) and not plans.from_store(alone, worker)
    assert plans.intervals_wanted(alone)[1] is not None


def test_the_store_is_asked_where_the_supervisor_would_ask_it() -> None:
    made = scenario("shepherd", 4096)
    node, corrupt = (next(c for c in made.failures.causes if c.effect == e) for e in ("node", "corrupt"))
    assert not plans.from_store(made, node) and not plans.from_store(made, corrupt)
    late = made.profile.detection.model_copy(update={"corruption": Seconds(value=60, source="test")})
    unseen = replace(made, profile=made.profile.model_copy(update={"detection": late}))
    assert plans.from_store(unseen, corrupt), "what memory holds by then is corrupt, too"
    together = replace(made, layout=layout(2, 2, 1, 1, 2, 1))
    assert plans.from_store(together, node), "the replica was on the same node"
    assert not plans.from_store(replace(made, layout=layout(2, 2, 1, 1, 1, 1)), node)


def test_nothing_to_scale_is_refused() -> None:
    made = scenario("shepherd")
    none = tuple(c.model_copy(update={"count": 0}) for c in made.failures.causes)
    with pytest.raises(ProfileError, match="every count is 0"):
        plans.with_mtbf(replace(made, failures=made.failures.model_copy(update={"causes": none})), 3)


def test_improvements_are_ranked_and_none_hurts() -> None:
    plan = plans.make_plan(scenario("restart", 16_384), 0.95)
    gains = [i.gain for i in plan.improvements]
    assert gains == sorted(gains, reverse=True) and min(gains) > -1e-6
    assert plan.improvements[0].what == "half as many failures"
    assert plan.planned.goodput >= plan.expected.goodput - 0.01


def test_nothing_fails_is_a_plan_too() -> None:
    made = scenario("shepherd")
    quiet = replace(
        made,
        failures=made.failures.model_copy(
            update={"causes": tuple(c.model_copy(update={"count": 0}) for c in made.failures.causes)}
        ),
    )
    plan = plans.make_plan(quiet, 0.95)
    assert plan.mtbf_h == math.inf and plan.spares_wanted == 0
    assert plan.planned.down == plan.planned.again == 0


def test_the_command_says_whether_the_target_is_reached(tmp_path: Path) -> None:
    def shepherd(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["plan", JOB, *arguments])

    result = shepherd("--json", str(tmp_path / "plan.json"))
    assert result.exit_code == 0, result.output
    assert "16,384 GPUs on 2,048 nodes: 8.63 failures a day" in result.stdout
    assert "The plan reaches the target of 95.0%." in result.stdout
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["planned"]["goodput"] > 0.95
    missed = shepherd("--profile", "restart", "--target", "0.999").stdout
    assert "no single change above reaches it" in missed
    near = shepherd("--profile", "restart", "--mtbf", "3.1", "--target", "0.94").stdout
    assert "each of these reaches it: half as many failures" in near


@pytest.mark.parametrize("spares", [0, 4, 16])
def test_a_plan_with_too_few_spares_is_no_better_than_the_simulated_run(spares: int) -> None:
    """With the ladder the mesh shrinks by a replica of 128 nodes, and is back when a machine is."""
    job = specs.load(JOB, [f"cluster.spares={spares}"])
    made = of_spec(job, load_profile("ladder"), load_failures("llama3"), 20, 0)
    assert plans.expect(made).goodput == pytest.approx(simulate(made).goodput, abs=0.06)
    if spares < 16:
        assert plans.expect(made).filled < 0.95 < plans.expect(plans.as_planned(made)).filled
    alone = of_spec(job, load_profile("shepherd"), load_failures("llama3"), 20, 0)
    assert (plans.expect(alone).goodput > 0.5) == (spares == 16), "a mesh that cannot shrink waits"
