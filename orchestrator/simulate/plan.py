"""What gets a job to its goodput: expected goodput by arithmetic, intervals, spares, and what each improvement brings.

First-order arithmetic on the profile's costs and the failures' rates; `shepherd simulate` lives through the same
scenario, and tests hold the two together. All durations are seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.core import placement
from orchestrator.simulate.body import Scenario
from orchestrator.simulate.formulas import interval_steps
from orchestrator.simulate.profile import Cause, Profile, ProfileError

DAY_S = 86_400.0
SPARE_CONFIDENCE = 0.99
"""With so many spares the mesh can be filled at 99 of 100 times at which one looks (ByteRobust, arXiv 2509.16293)."""


NEGLIGIBLE = 1e-9
"""Probability of what is not looked at."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """Shares of the time of the mesh's nodes, and of all places in `goodput`."""

    goodput: float
    """Spares counted."""
    goodput_without_spares: float
    stalls: float
    """Snapshots and saves."""
    down: float
    """From failures until every rank stands before its first step again."""
    again: float
    """Steps, whole or begun, that failures have cost."""
    failures_a_day: float
    filled: float
    """Mean speed for want of machines, as a share of the whole mesh's; 0 where it waits for one."""


@dataclass(frozen=True, kw_only=True)
class Improvement:
    what: str
    goodput: float
    gain: float
    """Of goodput."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    gpus: int
    nodes: int
    target: float
    mtbf_h: float
    """Of the whole mesh."""
    expected: Expectation
    spares: int
    """That the scenario has."""
    spares_wanted: int
    snapshot_interval_steps: int
    """That it has; 0 without memory tiers."""
    snapshot_interval_wanted: int
    checkpoint_interval_steps: int
    checkpoint_interval_wanted: int | None
    """None when no failure of the list restores from the store."""
    planned: Expectation
    """With the wanted spares and intervals."""
    improvements: tuple[Improvement, ...]
    """On top of those, the best first."""

    def document(self) -> dict[str, Any]:
        return asdict(self)


LEAVES_A_HOLE = ("node", "slow", "corrupt", "leave")
"""Effects after which another node must take the place, with a copy of the state."""


def rate(made: Scenario, cause: Cause) -> float:
    """Interruptions of the mesh by this cause, per second. An outage of the store is none."""
    if cause.effect == "store":
        return 0.0
    return cause.burst * cause.count / made.failures.exposure.node_days / DAY_S * made.layout.nodes


def with_mtbf(made: Scenario, hours: float) -> Scenario:
    """The same mix of causes, so that one of them strikes the mesh every `hours` on average.

    Raises:
        ProfileError: nothing on the list ever fails.
    """
    failures_a_day = expect(made).failures_a_day
    if failures_a_day == 0:
        raise ProfileError(f"{made.failures.title}: every count is 0, so that there is no mix to scale by --mtbf")
    return as_often(24 / hours / failures_a_day)(made)


def from_store(made: Scenario, cause: Cause) -> bool:
    """Whether a failure of this cause is answered with a restore from the store."""
    if not made.profile.memory:
        return True
    if cause.effect == "corrupt":  # the convict's own memory serves, if what it holds is from before
        return made.profile.detection.corruption.us > made.step_us
    if cause.effect != "node" or made.profile.buddies:
        return False
    width = made.layout.slots_per_node
    slots = placement.slots_of(made.layout, 0)
    return not all(any(r // width for r in placement.replicas(made.layout, slot)) for slot in slots)


def expect(made: Scenario) -> Expectation:
    """Expected goodput to first order: two failures at once are left out."""
    costs, step = made.profile.costs, made.step_us / 1e6
    snapshots = made.snapshot_interval_steps if made.profile.memory else 0
    snapshot_stall = costs.snapshot_stall.value / snapshots if snapshots else 0.0
    between = max(made.checkpoint_interval_steps, math.ceil(costs.save_write.value / step))  # one save at a time
    block = between * (step + snapshot_stall) + costs.save_stall.value
    useful = between * step / block
    down = again = failures = 0.0
    for cause in made.failures.causes:
        often, detect = rate(made, cause), getattr(made.profile.detection, cause.sign).value
        failures += often
        start = costs.restart if costs.resume is None else costs.resume
        stands = costs.halt.value + start.value
        if from_store(made, cause):
            stands += costs.restore_durable.value
            lost = block / 2 + costs.save_write.value + costs.commit.value
        else:
            copied = cause.effect in LEAVES_A_HOLE
            stands += costs.restore_ram.value + (costs.restore_peer.value if copied else 0)
            lost = step / 2 + (snapshots - 1) / 2 * step
        if cause.effect == "corrupt":
            lost += detect + step  # it trains on meanwhile; state from before the flip is restored
        elif cause.effect == "slow":
            lost += detect * cause.slowdown  # it trains on meanwhile, more slowly
        else:
            stands += detect
        down += often * stands
        again += often * lost
    # Failures strike training time and downtime alike: the mesh trains for one part in 1 + down.
    training = 1 / (1 + down)
    served = filled(made)
    goodput = max(0.0, training * (1 - again)) * useful * served
    places = made.layout.nodes + made.layout.spares
    return Expectation(
        goodput=goodput * made.layout.nodes / places,
        goodput_without_spares=goodput,
        stalls=training * (1 - useful),
        down=1 - training,
        again=training * min(1.0, again) * useful,
        failures_a_day=failures * DAY_S,
        filled=served,
    )


def spares_wanted(made: Scenario) -> int:
    """The fewest spares with which the mesh can be filled with SPARE_CONFIDENCE: binomial over the machines away."""
    share, spares = _away(made), 0
    while _at_most(spares, made.layout.nodes + spares, share) < SPARE_CONFIDENCE:
        spares += 1
    return spares


def filled(made: Scenario) -> float:
    """How fast the mesh is on average, for all numbers of machines that may be away: 1 when a spare is there for each.

    One that does not shrink stands still else; one that does goes on with fewer replicas, or as a fallback mesh.
    """
    layout, share = made.layout, _away(made)
    n, speed, left = layout.nodes + layout.spares, 0.0, 1.0
    for away in range(n + 1):
        likely = _exactly(away, n, share)
        speed, left = speed + likely * _speed(made, max(0, away - layout.spares)), left - likely
        if left < NEGLIGIBLE:
            break
    return min(1.0, speed)


def _speed(made: Scenario, missing: int) -> float:
    layout = made.layout
    mesh = layout.largest_on(layout.nodes - missing)
    return 0.0 if mesh is None else float(1 / made.slowdown(mesh))


def _away(made: Scenario) -> float:
    """The share of machines that are away for repair."""
    away = sum(
        cause.machines
        * cause.burst
        * cause.count
        / made.failures.exposure.node_days
        / DAY_S
        * (cause.repair_s + made.profile.costs.provision.value)
        for cause in made.failures.causes
        if cause.effect in LEAVES_A_HOLE
    )
    return away / (1 + away)


def _at_most(k: int, n: int, p: float) -> float:
    """Binomial distribution function."""
    return sum(_exactly(i, n, p) for i in range(k + 1))


def _exactly(k: int, n: int, p: float) -> float:
    """Binomial probability; logarithms, because the powers are too small for thousands of nodes."""
    if p == 0:
        return float(k == 0)
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))


def intervals_wanted(made: Scenario) -> tuple[int, int | None]:
    """Steps between snapshots and between durable saves: Young and Daly, for the failures that each tier answers.

    A failure that memory survives costs the steps since the newest snapshot, whatever the durable interval is, and
    one that it does not survive those since the newest save, whatever the snapshots' is. So to first order the two
    levels part: each has the interval sqrt(2 x stall / rate) of its own failures (Benoit et al., "Towards Optimal
    Multi-Level Checkpointing", IEEE TC 66, 2017).
    """
    step = made.step_us / 1e6
    memory = sum(rate(made, cause) for cause in made.failures.causes if not from_store(made, cause))
    store = sum(rate(made, cause) for cause in made.failures.causes if from_store(made, cause))
    costs = made.profile.costs

    snapshots, saves = 0, None
    if made.profile.memory and memory:
        snapshots = interval_steps(memory, costs.snapshot_stall.value, step, write=0)
    if store:
        saves = interval_steps(store, costs.save_stall.value, step, costs.save_write.value + costs.commit.value)
    return snapshots, saves


def make_plan(made: Scenario, target: float) -> Plan:
    """The scenario as it is, as it should be set, and what would help beyond."""
    snapshots, saves = intervals_wanted(made)
    better, expected = as_planned(made), expect(made)
    planned = expect(better)
    improvements = [
        Improvement(what=what, goodput=after, gain=after - planned.goodput)
        for what, change in IMPROVEMENTS.items()
        for after in (expect(as_planned(change(better))).goodput,)
    ]
    return Plan(
        gpus=made.layout.slots,
        nodes=made.layout.nodes,
        target=target,
        mtbf_h=24 / expected.failures_a_day if expected.failures_a_day else math.inf,
        expected=expected,
        spares=made.layout.spares,
        spares_wanted=better.layout.spares,
        snapshot_interval_steps=made.snapshot_interval_steps if made.profile.memory else 0,
        snapshot_interval_wanted=snapshots,
        checkpoint_interval_steps=made.checkpoint_interval_steps,
        checkpoint_interval_wanted=saves,
        planned=planned,
        improvements=tuple(sorted(improvements, key=lambda i: (-i.gain, i.what))),
    )


def as_planned(made: Scenario) -> Scenario:
    """With the spares and intervals that its failures and costs want."""
    snapshots, saves = intervals_wanted(made)
    return replace(
        made,
        layout=replace(made.layout, spares=spares_wanted(made)),
        snapshot_interval_steps=snapshots or made.snapshot_interval_steps,
        checkpoint_interval_steps=saves or made.checkpoint_interval_steps,
    )


Change = Callable[[Scenario], Scenario]


def times(factor: float, *fields: str) -> Change:
    """Some of the profile's costs and detection times, times a factor."""

    def change(made: Scenario) -> Scenario:
        document = made.profile.model_dump()
        for section in ("costs", "detection"):
            for field in fields:
                if document[section].get(field) is not None:
                    document[section][field]["value"] *= factor
        return replace(made, profile=Profile.model_validate(document))

    return change


def each_cause(change: Callable[[Cause], dict[str, Any]]) -> Change:
    """The fields that `change` gives for a cause, in each of the list's."""

    def changed(made: Scenario) -> Scenario:
        causes = tuple(cause.model_copy(update=change(cause)) for cause in made.failures.causes)
        return replace(made, failures=made.failures.model_copy(update={"causes": causes}))

    return changed


def as_often(factor: float) -> Change:
    """Every failure, times a factor."""
    return each_cause(lambda cause: {"count": cause.count * factor})


IMPROVEMENTS: dict[str, Change] = {
    "detect failures in half the time": times(0.5, "exit", "network", "hang", "slow", "corruption"),
    "halt and restart in half the time": times(0.5, "halt", "restart", "resume"),
    "restore in half the time": times(0.5, "restore_ram", "restore_peer", "restore_durable"),
    "snapshots at half the stall": times(0.5, "snapshot_stall"),
    "saves at half the stall": times(0.5, "save_stall"),
    "saves written in half the time": times(0.5, "save_write", "commit"),
    "half as many failures": as_often(0.5),
    "machines mended in half the time": each_cause(lambda cause: {"repair_s": cause.repair_s / 2}),
}


def show(plan: Plan, console: Console) -> None:
    """Print it."""
    p = plan
    often = f"{p.expected.failures_a_day:.2f} failures a day, one in {_time(p.mtbf_h)}"
    console.print(f"{p.gpus:,} GPUs on {p.nodes:,} nodes: {often}")
    table = Table(title="expected, by arithmetic", title_justify="left")
    for name in ("", "as it is", "as planned"):
        table.add_column(name, justify="left" if not name else "right")
    wanted = p.checkpoint_interval_wanted
    rows = (
        ("spares", str(p.spares), str(p.spares_wanted)),
        ("steps between snapshots", str(p.snapshot_interval_steps or "-"), str(p.snapshot_interval_wanted or "-")),
        ("steps between saves", str(p.checkpoint_interval_steps), "-" if wanted is None else str(wanted)),
        ("goodput", f"{p.expected.goodput:.2%}", f"{p.planned.goodput:.2%}"),
        ("without spares", f"{p.expected.goodput_without_spares:.2%}", f"{p.planned.goodput_without_spares:.2%}"),
        ("stalls of snapshots and saves", f"{p.expected.stalls:.2%}", f"{p.planned.stalls:.2%}"),
        ("down", f"{p.expected.down:.2%}", f"{p.planned.down:.2%}"),
        ("done again", f"{p.expected.again:.2%}", f"{p.planned.again:.2%}"),
        ("speed, for want of machines", f"{p.expected.filled:.2%}", f"{p.planned.filled:.2%}"),
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if wanted is None:
        console.print("No failure of the list restores from the store: save as often as you would bear to lose it all.")
    better = Table(title="what would help, on top of the plan", title_justify="left")
    for name in ("change", "goodput", "gain, points"):
        better.add_column(name, justify="left" if name == "change" else "right")
    for improvement in p.improvements:
        better.add_row(improvement.what, f"{improvement.goodput:.2%}", f"{100 * improvement.gain:+.2f}")
    console.print(better)
    console.print(_answer(p), markup=False)


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _answer(plan: Plan) -> str:
    if plan.planned.goodput >= plan.target:
        return f"The plan reaches the target of {plan.target:.1%}."
    enough = [i.what for i in plan.improvements if i.goodput >= plan.target]
    if enough:
        return f"The plan misses the target of {plan.target:.1%}; each of these reaches it: {'; '.join(enough)}."
    return f"The plan misses the target of {plan.target:.1%}, and no single change above reaches it."
