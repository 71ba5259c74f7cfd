"""The simulated body: the supervisor's rules hold in it, one seed is one history, and its goodput is the formulas'."""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from core_watch import LIMITS, Watch
from core_world import layout
from typer.testing import CliRunner

from orchestrator import spec as specs
from orchestrator.cli import EXIT_REFUSED, app
from orchestrator.core import events as ev
from orchestrator.simulate import formulas, outcome, scenario
from orchestrator.simulate.body import Scenario, Simulation
from orchestrator.simulate.chance import Chance
from orchestrator.simulate.harm import DAY_US
from orchestrator.simulate.profile import Cause, Failures, ProfileError, Seconds, load_failures, load_profile, names
from orchestrator.simulate.simplest import goodput_of_restarts

ROOT = Path(__file__).resolve().parents[2]
JOB = "examples/llama3_405b.toml"
PATIENCE = {"halt_deadline_us": 60_000_000, "start_deadline_us": 600_000_000, "wait_deadline_us": DAY_US}
"""What the slower profile needs."""
CAUSES = (("node", "exit"), ("node", "network"), ("worker", "exit"), ("hang", "hang"), ("corrupt", "corruption"))


def dense(seed: int, *, profile: str = "shepherd", an_hour: float = 40.0, days: float = 0.2) -> Scenario:
    """A small mesh on which something fails all the time, each effect as often."""
    causes = tuple(
        Cause(name=f"{effect} by {sign}", effect=effect, sign=sign, count=1, repair_s=600, source="test")
        for effect, sign in CAUSES
    )
    mesh = (layout(2, 2, 1, 1, 2, 1), layout(1, 2, 2, 2, 2, 2), layout(1, 3, 1, 1, 1, 1))[seed % 3]
    places = mesh.nodes + mesh.spares
    exposure = load_failures("llama3").exposure.model_copy(update={"node_days": len(causes) * places / (24 * an_hour)})
    return Scenario(
        layout=mesh,
        limits=replace(LIMITS, **PATIENCE, recoveries_without_progress=10**9, strikes=5),
        step_us=2_000_000,
        checkpoint_interval_steps=30,
        snapshot_interval_steps=1 + seed % 2,
        profile=load_profile(profile),
        failures=Failures(title="dense", exposure=exposure, causes=causes),
        days=days,
        seed=seed,
    )


def quiet(made: Scenario) -> Scenario:
    causes = tuple(cause.model_copy(update={"count": 0}) for cause in made.failures.causes)
    return replace(made, failures=made.failures.model_copy(update={"causes": causes}))


def watched(made: Scenario, watch: Watch) -> Simulation:
    simulation = Simulation(made, record=lambda event, actions: watch.see(simulation.supervisor, event, actions))
    simulation.run()
    return simulation


@pytest.mark.parametrize(("profile", "an_hour", "days"), [("shepherd", 40, 0.25), ("restart", 6, 1.0)])
@pytest.mark.parametrize("seed", range(6))
def test_the_supervisors_rules_hold_under_dense_failures(seed: int, profile: str, an_hour: float, days: float) -> None:
    made = dense(seed, profile=profile, an_hour=an_hour, days=days)
    soon = made.profile.detection.model_copy(update={"corruption": Seconds(value=20, source="test")})
    if profile == "restart":  # found within what is kept
        made = replace(made, profile=made.profile.model_copy(update={"detection": soon}))
    simulation = watched(made, Watch())
    assert simulation.ended_by_calendar, simulation.state.verdict
    assert all(simulation.strikes.values()), "a cause that never struck"
    ledger = simulation.state.ledger
    places = made.layout.nodes + made.layout.spares
    assert sum(ledger.totals.values()) == ledger.owed == places * round(made.days * DAY_US)
    assert {i.cause for i in simulation.state.incidents} >= {"node", "exception", "hang", "corrupt"}
    assert simulation.state.step > 100


@pytest.mark.parametrize("profile", ["shepherd", "restart"])
def test_whatever_fails_at_whatever_moment_the_world_goes_on(profile: str) -> None:
    """Detection is slower than a restart in one of the profiles: nodes of a generation are dead before it is known."""
    for seed in range(24):
        simulation = Simulation(dense(seed, profile=profile, an_hour=12, days=0.4))
        simulation.run()
        assert simulation.ended_by_calendar or "no checkpoint is left to trust" in simulation.state.verdict


def test_a_save_that_takes_longer_than_the_interval_stops_nobody() -> None:
    """The next one begins when it has ended."""
    made = quiet(dense(0))
    often = replace(made, checkpoint_interval_steps=5)
    told: list[ev.CheckpointWritten] = []
    Simulation(often, record=lambda e, a: told.append(e) if isinstance(e, ev.CheckpointWritten) else None).run()
    assert outcome.simulate(often).goodput == pytest.approx(outcome.simulate(made).goodput, abs=0.02)
    gaps = {after.step - before.step for before, after in pairwise(told)}
    assert gaps == {30}, "60 s at 2.04 s a step"


def test_the_step_under_way_when_something_fails_is_not_productive() -> None:
    made = replace(dense(0, an_hour=60, days=2), step_us=600_000_000)
    worker = tuple(c for c in made.failures.causes if c.effect == "worker")
    failing = replace(made, failures=made.failures.model_copy(update={"causes": worker}))
    simulation = Simulation(failing)
    state = simulation.run()
    nodes = failing.layout.nodes
    assert state.ledger.totals["productive"] == state.high_water * 600_000_000 * nodes
    assert state.ledger.totals["detection"] > 100_000_000 * nodes


def test_a_machine_that_was_mended_is_not_mended_again_for_the_old_fault() -> None:
    made = dense(1, an_hour=20, days=0.5)
    nodes = tuple(c for c in made.failures.causes if c.effect == "node")
    simulation = Simulation(replace(made, failures=made.failures.model_copy(update={"causes": nodes})))
    simulation.run()
    assert simulation.strikes["node by exit"] > 20
    assert all(m.repair_us == 0 for m in simulation.machines if m.node is not None and m.node.alive)


def history(seed: int) -> str:
    digest = hashlib.sha256()
    Simulation(dense(seed), record=lambda event, actions: digest.update(repr((event, actions)).encode())).run()
    return digest.hexdigest()


def test_one_seed_is_one_history_in_any_process() -> None:
    """Also where strings hash otherwise, which is what an order of a set would show."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_simulate as t; print(t.history(3), t.history(4))"
    said = [
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            cwd=ROOT,
            env={"PATH": "", "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout.split()
        for hash_seed in ("1", "2")
    ]
    assert said[0] == said[1] and said[0][0] != said[0][1]
    assert said[0][0] == history(3)


def test_draws_are_what_they_were_on_every_machine() -> None:
    chance = Chance(7)
    assert [chance.exponential(10**9) for _ in range(4)] == [947865163, 94130294, 909703759, 240662608]
    assert [chance.below(1000) for _ in range(4)] == [434, 60, 846, 579]


def test_waiting_times_are_exponential() -> None:
    chance = Chance(1)
    draws = [chance.exponential(10**6) for _ in range(40_000)]
    assert statistics.fmean(draws) == pytest.approx(1e6, rel=0.02)
    assert statistics.stdev(draws) == pytest.approx(1e6, rel=0.03)
    assert sum(d > 2 * 10**6 for d in draws) / len(draws) == pytest.approx(0.1353, abs=0.006)


@pytest.mark.parametrize(
    ("rate_per_h", "restart_s", "interval_s", "save_s", "failures", "first_order"),
    [(1, 900, 1800, 15, 20_000, False), (1 / 3, 300, 600, 15, 4000, True), (1 / 8, 30, 1800, 1, 1000, True)],
)
def test_closed_forms_are_met_where_they_apply(
    rate_per_h: float, restart_s: float, interval_s: float, save_s: float, failures: int, first_order: bool
) -> None:
    """Within a point; benchmarks/closed_forms.py has the grid."""
    rate = rate_per_h / 3600
    simulated = goodput_of_restarts(
        rate, restart_s=restart_s, interval_s=interval_s, save_s=save_s, failures=failures, seed=1
    )
    assert simulated == pytest.approx(formulas.daly_efficiency(rate, restart_s, interval_s, save_s), abs=0.01)
    if first_order:
        assert simulated == pytest.approx(formulas.meta_ettr(rate, restart_s, interval_s, save_s), abs=0.01)


def test_the_formulas_say_what_their_papers_say() -> None:
    # Kokolis et al., section 4: at Young's interval, the first-order loss of saves equals that of lost work.
    interval = formulas.young_daly_interval(1 / 10_000, 8)
    assert interval == pytest.approx(400)
    assert 8 / interval == pytest.approx(interval / 2 / 10_000)
    # Without failures to speak of, both are the share of time between saves; and the exact one is never above the other
    # by more than its second order.
    for formula in (formulas.meta_ettr, formulas.daly_efficiency):
        assert formula(1e-12, 100, 300, 3) == pytest.approx(300 / 303, rel=1e-6)


def test_a_run_in_which_nothing_fails_costs_its_saves_and_its_start() -> None:
    made = quiet(dense(0))
    done = outcome.simulate(made)
    costs = made.profile.costs
    assert done.incidents == () and set(done.strikes.values()) == {0}
    start_s = costs.provision.value + costs.restart.value
    step_s = 2 + costs.snapshot_stall.value
    blocks = (made.days * 86400 - start_s) / (30 * step_s + costs.save_stall.value)
    assert done.steps == pytest.approx(30 * blocks, abs=30)
    assert done.goodput_without_spares == pytest.approx(2 * done.steps / (made.days * 86400), abs=0.005)


def test_memory_loses_a_step_where_the_store_loses_half_an_interval_and_a_save_under_way() -> None:
    lost = {}
    for profile in ("shepherd", "restart"):
        made = dense(1, profile=profile, an_hour=3, days=2)
        simulation = Simulation(made)
        simulation.run()
        nodes = [i for i in simulation.state.incidents if i.cause == "node"]
        lost[profile] = statistics.median(i.steps_lost for i in nodes)
    assert lost["shepherd"] <= 1 and 30 < lost["restart"] < 60


def test_corruption_that_is_found_late_rewinds_to_before_it() -> None:
    """And what was saved meanwhile is not restored, though it is newer."""
    made = dense(1, profile="restart", an_hour=1, days=3)
    corrupt = tuple(c for c in made.failures.causes if c.effect == "corrupt")
    late = replace(
        made,
        failures=made.failures.model_copy(update={"causes": corrupt}),
        limits=replace(made.limits, keep_checkpoints=200),
    )
    told: list[ev.WorkerFailed] = []  # of a run that keeps what it has saved for long enough
    simulation = Simulation(late, record=lambda e, a: told.append(e) if isinstance(e, ev.WorkerFailed) else None)
    incidents = simulation.run().incidents
    assert len(incidents) > 3
    for incident, words in zip(incidents, told, strict=True):
        flipped = words.step
        assert incident.restored_step is not None and incident.restored_step < max(flipped, 1)
        assert incident.restored_step >= flipped - 30
        assert incident.step - flipped > 1000, "it was not late"


def test_corruption_that_outlives_what_is_kept_ends_the_run() -> None:
    """It does not begin again at step 0 by itself."""
    made = dense(1, profile="restart", an_hour=1, days=3)
    corrupt = tuple(c for c in made.failures.causes if c.effect == "corrupt")
    done = outcome.simulate(replace(made, failures=made.failures.model_copy(update={"causes": corrupt})))
    assert done.exit_code == 1 and "no checkpoint is left to trust" in done.verdict
    assert done.days < 3 and done.steps > 100


def test_every_figure_has_a_source_and_the_counts_are_the_papers() -> None:
    failures = load_failures("llama3")
    assert sum(c.count for c in failures.causes) == 466
    assert sum(c.count for c in failures.causes if c.name != "planned maintenance") == 419
    assert failures.exposure.node_days == 2048 * 54
    for name in names("profiles"):
        assert load_profile(name).costs.restart.source


def test_a_profile_that_is_none_is_refused_by_field(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="restart, shepherd"):
        load_profile("nosuch")
    broken = tmp_path / "broken.toml"
    broken.write_text('title = "x"\nmemory = true\nhurry = 1\n')
    with pytest.raises(ProfileError, match=r"costs: Field required[\s\S]*hurry: Extra inputs"):
        load_profile(str(broken))
    broken.write_text("[")
    with pytest.raises(ProfileError, match="is not TOML"):
        load_failures(str(broken))


# --- the command ------------------------------------------------------------------------------------------------------


def shepherd(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_the_command_labels_all_that_it_prints(tmp_path: Path) -> None:
    out = tmp_path / "new" / "outcome.json"
    result = shepherd(JOB, "--gpus", "4096", "--days", "3", "--seed", "5", "--json", str(out))
    assert result.exit_code == 0, result.output
    assert result.stdout.count("SIMULATION") == 4 and "\x1b" not in result.stdout
    assert "4,096 GPUs on 512 nodes and 16 spares, 3 days, seed 5" in result.stdout
    document = json.loads(out.read_text())
    assert document["simulation"] is True and document["gpus"] == 4096
    hours = document["ledger_node_hours"]
    assert sum(hours.values()) == pytest.approx(72 * 528)
    assert document["goodput"] == pytest.approx(hours["productive"] / sum(hours.values()))
    assert sum(kind["count"] for kind in document["incidents"]) > 0
    assert shepherd(JOB, "--gpus", "4096", "--days", "3", "--seed", "5").stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((JOB, "--gpus", "5000"), "choose a multiple, as 4096 or 6144"),
        ((JOB, "--gpus", "8"), "choose a multiple, as 2048 or 4096"),
        ((JOB, "--profile", "restart", "--set", "recovery.halt_deadline_s=10"), "this profile takes 30 s"),
        ((JOB, "--profile", "restart", "--set", "recovery.start_deadline_s=200"), "this profile takes 230 s"),
        ((JOB, "--profile", "nosuch"), "none of Shepherd's own profiles: ladder, restart, shepherd"),
        ((JOB, "--failures", "nosuch"), "none of Shepherd's own failures: hostile, llama3"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_line(arguments: tuple[str, ...], complaint: str) -> None:
    result = shepherd(*arguments)
    assert result.exit_code == EXIT_REFUSED and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and complaint in line


def test_a_step_takes_what_arithmetic_says() -> None:
    spec = specs.load(ROOT / JOB)
    # 6 x 405.85e9 x 16.78e6 tokens / (16,384 x 400e12)
    assert scenario.step_s(spec, load_profile("shepherd")) == pytest.approx(6.23, abs=0.02)
