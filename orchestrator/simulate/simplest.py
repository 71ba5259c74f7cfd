"""The machine of the closed forms, simulated: one kind of failure, restart from the last checkpoint, nothing else."""

from __future__ import annotations

from orchestrator.core.events import Layout, Limits
from orchestrator.simulate.body import Scenario, Simulation
from orchestrator.simulate.profile import Cause, Costs, Detection, Exposure, Failures, Figure, Profile, Seconds

STEPS_AN_INTERVAL = 200
"""So that the step that is lost with a failure, which the formulas do not have, is little."""
ENDLESS = 2**62
_LAYOUT = Layout(pp=1, dp_replicate=1, dp_shard=1, tp=1, slots_per_node=1, nodes=1, spares=0)
_LIMITS = Limits(
    halt_deadline_us=ENDLESS,
    start_deadline_us=ENDLESS,
    wait_deadline_us=ENDLESS,
    commit_deadline_us=ENDLESS,
    same_error_tries=ENDLESS,
    recoveries_without_progress=ENDLESS,
    strikes=ENDLESS,
    keep_checkpoints=1,
)


def goodput_of_restarts(
    failures_per_s: float, *, restart_s: float, interval_s: float, save_s: float, failures: int, seed: int
) -> float:
    """Simulated goodput over as long as it takes for about so many failures."""
    zero = Seconds(value=0, source="of the closed forms")

    def seconds(value: float) -> Seconds:
        return Seconds(value=value, source="given")

    costs = Costs(
        snapshot_stall=zero,
        save_stall=seconds(save_s),
        save_write=zero,
        commit=zero,
        halt=zero,
        restart=seconds(restart_s),
        warm_up=zero,
        restore_ram=zero,
        restore_peer=zero,
        restore_durable=zero,
        provision=zero,
    )
    at_once = Detection(exit=zero, network=zero, hang=zero, corruption=zero, notice=zero)
    cause = Cause(name="failure", effect="worker", sign="exit", count=failures_per_s * 86400, source="given")
    scenario = Scenario(
        layout=_LAYOUT,
        limits=_LIMITS,
        step_us=round(interval_s / STEPS_AN_INTERVAL * 1_000_000),
        checkpoint_interval_steps=STEPS_AN_INTERVAL,
        snapshot_interval_steps=1,
        profile=Profile(
            title="closed form",
            memory=False,
            tflops_per_gpu=Figure(value=1, source="not used"),
            costs=costs,
            detection=at_once,
        ),
        failures=Failures(title="given", exposure=Exposure(node_days=1, source="given"), causes=(cause,)),
        days=failures / failures_per_s / 86400,
        seed=seed,
    )
    ledger = Simulation(scenario).run().ledger
    return ledger.totals["productive"] / ledger.owed
