"""A plan's scenario with a run's own figures: what its journal has measured in the place of what the profile says.

Each figure says where it comes from: "measured, 14 of them", or the profile and its source. What a journal cannot tell,
because it has not happened yet or happened to nobody, stays as the profile has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.core import events as ev
from orchestrator.core.codec import action_from_json
from orchestrator.core.state import Incident, State
from orchestrator.runtime import journal
from orchestrator.runtime.journal import Record
from orchestrator.simulate.body import Scenario
from orchestrator.simulate.figures import Figures, Mean, Pace
from orchestrator.simulate.formulas import poisson_interval
from orchestrator.simulate.harm import DAY_US
from orchestrator.simulate.measured import EFFECTS, NotMeasured
from orchestrator.simulate.plan import Plan, as_often, make_plan, rate
from orchestrator.simulate.profile import Cause, Detection, Effect, Exposure, Failures, Profile, Seconds, Sign

CONFIDENCE = 0.9
"""Of the interval in which the true failure rate is said to lie."""
DRAINED = "shepherd drain"
"""Who takes a node away by `shepherd drain`; orchestrator/cli.py says so."""
SIGNS: dict[Effect, Sign] = {
    "node": "exit",
    "worker": "exit",
    "collective": "exit",
    "hang": "hang",
    "slow": "slow",
    "corrupt": "corruption",
    "leave": "notice",
}
"""How a failure of this effect showed. A journal does not tell whether a lost node was dead or out of reach."""


@dataclass(frozen=True, kw_only=True)
class Row:
    figure: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Journaled:
    scenario: Scenario
    rows: tuple[Row, ...]
    """Every figure that the plan stands on, and where it comes from."""
    failures: int
    """That interrupted the run."""
    node_days: float
    """Over which they were counted."""
    gaps: tuple[str, ...]
    """What the journal cannot tell, in plain words."""

    @property
    def factors(self) -> tuple[float, float]:
        """The ends of the failure rate's interval, as shares of the measured rate."""
        low, high = poisson_interval(self.failures, CONFIDENCE)
        return low / self.failures, high / self.failures


def read(url: str, made: Scenario) -> Journaled:
    """`made` with the figures of the run under `url`.

    Raises:
        NotMeasured: there is no such run, its journal cannot be read, or it has not trained yet.
    """
    try:
        records = journal.read(url) if journal.exists(url) else []
        if records:
            return of_records(records, made)
    except NotMeasured:
        raise
    except Exception as e:  # every store has its own
        raise NotMeasured(f"--journal {url}: cannot be read: {e}") from e
    raise NotMeasured(f"--journal {url}: there is no run, or nothing of it is on the store yet")


def of_records(records: Sequence[Record], made: Scenario) -> Journaled:
    """`made` with what these records have measured.

    Raises:
        NotMeasured: no step is told after a generation's first, so that the run has no pace.
        JournalError: this version decides differently from the one that wrote them.
    """
    state, figures = journal.replay(records).state, Figures()
    for record in records:
        figures.note(record.event, [action_from_json(action) for action in record.actions])
    if not figures.pace.steps.n:
        raise NotMeasured("--journal: no step is told after the first, so that the run has no pace")
    incidents = [*state.incidents, *([state.incident] if state.incident is not None else [])]
    causes = Counter(i.cause for i in incidents if i.cause and not _is_wanted(i))
    same_mesh = state.layout is not None and _mesh(state.layout) == _mesh(made.layout)
    measured = replace(
        made,
        step_us=_step_us(figures.pace) if same_mesh else made.step_us,
        profile=_profile(figures, state, made),
        failures=_failures(causes, figures, state, made) if causes else made.failures,
    )
    return Journaled(
        scenario=measured,
        rows=tuple(_rows(measured, figures.pace if same_mesh else None, made, sum(causes.values()))),
        failures=sum(causes.values()),
        node_days=_node_days(figures, state),
        gaps=tuple(_gaps(figures, measured.profile, causes, same_mesh)),
    )


def _mesh(layout: ev.Layout) -> tuple[int, ...]:
    return layout.pp, layout.dp_replicate, layout.dp_shard, layout.tp


def _step_us(pace: Pace) -> int:
    """A step without snapshots and saves; with waits for data and its share of validation, which the plan has not."""
    return max(1, pace.steps.us - (pace.snapshots_us + pace.save_stalls.total_us) // pace.all_steps)


def _node_days(figures: Figures, state: State) -> float:
    assert state.layout is not None
    return figures.exposed_us / DAY_US * state.layout.nodes


def _profile(figures: Figures, state: State, made: Scenario) -> Profile:
    """The profile with what was measured put in."""
    pace, restores = figures.pace, figures.restores
    with_copies = restores["peer"]
    own = restores["ram"] if restores["ram"].n else with_copies
    costs = {
        "snapshot_stall": Mean(pace.all_steps, pace.snapshots_us * made.snapshot_interval_steps),
        "save_stall": pace.save_stalls,
        "save_write": pace.writes,
        "commit": pace.commits,
        "halt": figures.halts,
        "restart": figures.restarts,
        "restore_ram": own,
        "restore_peer": _beyond(with_copies, own.us),
        "restore_durable": restores["durable"],
        "provision": Mean(1, figures.provision_us or 0),
    }
    profile, detections = made.profile, _detections(figures, state)
    return profile.model_copy(
        update={
            "title": f"measured, else {profile.title}",
            "memory": "ram" in state.capabilities,
            "costs": profile.costs.model_copy(
                update={name: _seconds(mean, getattr(profile.costs, name)) for name, mean in costs.items()}
            ),
            "detection": profile.detection.model_copy(
                update={sign: _seconds(mean, getattr(profile.detection, sign)) for sign, mean in detections.items()}
            ),
        }
    )


def _is_wanted(incident: Incident) -> bool:
    """Whether it is no failure: the mesh took replicas back, or somebody drained a node or changed the job."""
    drained = any(e.kind == "leave" and e.detail == DRAINED for e in (*incident.answered, *incident.evidence))
    return incident.cause in ("grow", "update") or (incident.cause == "leave" and drained)


def _beyond(mean: Mean, us: int) -> Mean:
    """What it is more than `us`."""
    return Mean(mean.n, max(0, mean.total_us - mean.n * us))


def _detections(figures: Figures, state: State) -> dict[str, Mean]:
    """From a failure until it was known. It struck somewhere in the step after the last one: half is lost work."""
    found = {sign: Mean() for sign in Detection.model_fields}
    for incident in state.incidents:
        silent_us = figures.silences_us.get(incident.detected_at)
        if silent_us is not None:
            found[SIGNS[EFFECTS.get(incident.cause, "worker")]].add(max(0, silent_us - figures.pace.steps.us // 2))
    return found


def _seconds(mean: Mean, otherwise: Seconds | None) -> Seconds | None:
    """What was measured, else the profile's, which may say nothing."""
    if mean.n:
        return Seconds(value=mean.s, source=f"measured, {mean.n:,} of them")
    if otherwise is None:
        return None
    return otherwise.model_copy(update={"source": f"profile: {otherwise.source}"})


def _failures(causes: Counter[str], figures: Figures, state: State, made: Scenario) -> Failures:
    """The run's own incidents, over the days of its mesh's nodes."""
    mended = _beyond(figures.repairs, figures.provision_us or 0)
    return Failures(
        title="the run's own",
        exposure=Exposure(node_days=_node_days(figures, state), source="measured"),
        causes=tuple(
            Cause(
                name=name,
                effect=effect,
                sign=SIGNS[effect],
                count=count,
                repair_s=mended.s if mended.n and effect in ("node", "corrupt") else _repair_s(made.failures, effect),
                source=f"measured, {count} of them",
            )
            for name, count in sorted(causes.items())
            for effect in (EFFECTS.get(name, "worker"),)
        ),
    )


def _repair_s(failures: Failures, effect: Effect) -> float:
    """What the list says of this effect on average."""
    alike = [cause for cause in failures.causes if cause.effect == effect]
    count = sum(cause.count for cause in alike)
    return sum(cause.count * cause.repair_s for cause in alike) / count if count else 0.0


def _rows(made: Scenario, pace: Pace | None, before: Scenario, failures: int) -> Iterator[Row]:
    """`pace` is None when the step was not measured on this mesh."""
    arithmetic = f"profile: {before.profile.tflops_per_gpu.value:g} TFLOP/s a GPU"
    of_step = arithmetic if pace is None else f"measured, {pace.steps.n:,} of them"
    yield Row(figure="step", value=f"{made.step_us / 1e6:.3f} s", source=of_step)
    for section in (made.profile.costs, made.profile.detection):
        prefix = "" if section is made.profile.costs else "detection, "
        for name in type(section).model_fields:
            figure: Seconds | None = getattr(section, name)
            if name != "warm_up" and figure is not None:  # warm_up is no part of a plan
                yield Row(figure=f"{prefix}{name}", value=f"{figure.value:.3f} s", source=figure.source)
    for cause in made.failures.causes:
        often = rate(made, cause) * 86_400
        source = cause.source if failures else f"profile: {made.failures.title}, {cause.source}"
        yield Row(figure=f"failures, {cause.name}", value=f"{often:.3f} a day", source=source)


def _gaps(figures: Figures, profile: Profile, causes: Counter[str], same_mesh: bool) -> Iterator[str]:
    if not same_mesh:
        yield "its mesh is another one: the step's time is the profile's"
    if not causes:
        yield "it has seen no failure yet: what fails how often is the list's"
    elif not figures.repairs.n:
        yield "no node came back after a loss: how long a repair takes is the list's"
    costs = {name: getattr(profile.costs, name) for name in type(profile.costs).model_fields if name != "warm_up"}
    missing = [name for name, figure in costs.items() if figure and not figure.source.startswith("measured")]
    if missing:
        yield f"it has not measured {', '.join(missing)}: the profile's"


def at_ends(journaled: Journaled, target: float) -> tuple[Plan, Plan]:
    """The plan at the lowest and the highest failure rate of the interval; only after a failure was seen."""
    assert journaled.failures > 0
    low, high = (make_plan(as_often(factor)(journaled.scenario), target) for factor in journaled.factors)
    return low, high


def document(journaled: Journaled, ends: Sequence[Plan]) -> dict[str, Any]:
    """As a JSON object."""
    return {
        "figures": [asdict(row) for row in journaled.rows],
        "failures": journaled.failures,
        "node_days": journaled.node_days,
        "confidence": CONFIDENCE,
        "at_the_ends": [plan.document() for plan in ends],
        "gaps": list(journaled.gaps),
    }


def show(journaled: Journaled, ends: Sequence[Plan], console: Console) -> None:
    """Print where the plan's figures come from, and what it were if the failure rate were at its interval's ends."""
    table = Table(title="what the plan stands on", title_justify="left")
    for name in ("figure", "value", "from"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for row in journaled.rows:
        table.add_row(row.figure, row.value, row.source)
    console.print(table)
    for gap in journaled.gaps:
        console.print(f"The journal does not tell everything: {gap}.", markup=False)
    if not ends:
        return
    console.print(
        f"failures: {journaled.failures} in {journaled.node_days:,.3g} node-days; with {CONFIDENCE:.0%} confidence one "
        f"in {ends[1].mtbf_h:.3g} to {ends[0].mtbf_h:.3g} h (Garwood 1936)"
    )
    table = Table(title="the plan at the ends of that interval", title_justify="left")
    for name in ("", "fewest failures", "most failures"):
        table.add_column(name, justify="right" if name else "left")
    rows = (
        ("failures a day", [f"{plan.expected.failures_a_day:.3g}" for plan in ends]),
        ("spares", [str(plan.spares_wanted) for plan in ends]),
        ("steps between snapshots", [str(plan.snapshot_interval_wanted or "-") for plan in ends]),
        ("steps between saves", [str(plan.checkpoint_interval_wanted or "-") for plan in ends]),
        ("goodput as planned", [f"{plan.planned.goodput:.2%}" for plan in ends]),
    )
    for what, values in rows:
        table.add_row(what, *values)
    console.print(table)
