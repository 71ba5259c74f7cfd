"""What a simulation comes to: goodput with its ledger, the incidents by cause and rung, and a curve. For people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import plotext
from rich.console import Console
from rich.table import Table

from orchestrator.core.goodput import LABELS
from orchestrator.core.state import Incident, State
from orchestrator.simulate.body import Sample, Scenario, Simulation
from orchestrator.simulate.harm import DAY_US

LABEL = "SIMULATION"
"""Stands wherever a simulated number does."""
PLOT_WIDTH, PLOT_HEIGHT = 100, 16


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Incidents of one cause that one rung answered."""

    cause: str
    rung: str
    count: int
    seconds: float
    """Mean, from the notice to the first step after it; without those that were still open at the end."""
    steps_lost: float
    """Mean."""
    node_hours: float
    """All of them: detection, recovery, waiting, recomputation."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    simulation: bool
    """Always true: no cluster has done this."""
    profile: str
    failures: str
    gpus: int
    nodes: int
    spares: int
    days: float
    """Lived through; fewer than asked for when the run ended by itself."""
    seed: int
    goodput: float
    """Productive node-time over all, spares counted."""
    goodput_without_spares: float
    steps: int
    ledger_node_hours: dict[str, float]
    strikes: dict[str, int]
    """Cause to failures that hit something."""
    incidents: tuple[Kind, ...]
    exit_code: int | None
    verdict: str
    events: int
    curve: tuple[tuple[float, float], ...]
    """Day, and goodput since the point before."""

    def document(self) -> dict[str, Any]:
        return asdict(self)


def simulate(scenario: Scenario) -> Outcome:
    """Live through the scenario once."""
    simulation = Simulation(scenario)
    state = simulation.run()
    totals = {label: us / 3.6e9 for label, us in state.ledger.totals.items()}
    hours = sum(totals.values())
    layout = scenario.layout
    return Outcome(
        simulation=True,
        profile=scenario.profile.title,
        failures=scenario.failures.title,
        gpus=layout.slots,
        nodes=layout.nodes,
        spares=layout.spares,
        days=simulation.now / DAY_US,
        seed=scenario.seed,
        goodput=totals["productive"] / hours,
        goodput_without_spares=totals["productive"] / (hours - totals["idle_spare"]),
        steps=state.high_water,
        ledger_node_hours={label: totals[label] for label in LABELS},
        strikes=dict(simulation.strikes),
        incidents=_kinds(state),
        exit_code=None if simulation.ended_by_calendar else state.exit_code,
        verdict="" if simulation.ended_by_calendar else state.verdict,
        events=simulation.events,
        curve=_curve(simulation.samples),
    )


def _kinds(state: State) -> tuple[Kind, ...]:
    groups: dict[tuple[str, str], list[Incident]] = {}
    for incident in state.incidents:
        rung = incident.rungs[-1] if incident.rungs else "none"
        groups.setdefault((incident.cause or "unknown", rung), []).append(incident)
    return tuple(
        Kind(
            cause=cause,
            rung=rung,
            count=len(of),
            seconds=_mean([(i.closed_at - i.detected_at) / 1e6 for i in of if i.closed_at is not None]),
            steps_lost=sum(i.steps_lost for i in of) / len(of),
            node_hours=sum(i.cost_us for i in of) / 3.6e9,
        )
        for (cause, rung), of in sorted(groups.items(), key=lambda item: -len(item[1]))
    )


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def _curve(samples: Sequence[Sample]) -> tuple[tuple[float, float], ...]:
    points = []
    for before, after in pairwise(samples):
        owed = after.owed_us - before.owed_us
        if owed:
            points.append((after.at / DAY_US, (after.productive_us - before.productive_us) / owed))
    return tuple(points)


def show(outcome: Outcome, console: Console) -> None:
    """Print it."""
    o = outcome
    console.print(
        f"{LABEL}: {o.gpus:,} GPUs on {o.nodes:,} nodes and {o.spares} spares, {o.days:g} days, seed {o.seed}\n"
        f"profile: {o.profile}; failures: {o.failures}",
        markup=False,
    )
    if o.verdict:
        console.print(f"the run ended by itself (exit code {o.exit_code}): {o.verdict}", style="red", markup=False)
    console.print(
        f"goodput {o.goodput:.2%} of all node-time, {o.goodput_without_spares:.2%} without spares; {o.steps:,} steps"
    )
    ledger = Table(title=f"{LABEL}: where the time went", title_justify="left")
    ledger.add_column("label")
    ledger.add_column("node-hours", justify="right")
    ledger.add_column("share", justify="right")
    hours = sum(o.ledger_node_hours.values())
    for label, spent in sorted(o.ledger_node_hours.items(), key=lambda item: -item[1]):
        if spent:
            ledger.add_row(label, f"{spent:,.1f}", f"{spent / hours:.3%}")
    console.print(ledger)
    kinds = Table(title=f"{LABEL}: incidents", title_justify="left")
    for name in ("cause", "rung", "count", "mean s to a step", "mean steps lost", "node-hours"):
        kinds.add_column(name, justify="left" if name in ("cause", "rung") else "right")
    for kind in o.incidents:
        kinds.add_row(
            kind.cause,
            kind.rung,
            f"{kind.count:,}",
            f"{kind.seconds:,.1f}",
            f"{kind.steps_lost:,.1f}",
            f"{kind.node_hours:,.1f}",
        )
    console.print(kinds)
    console.print(_plot(o), markup=False, highlight=False, soft_wrap=True)


def _plot(outcome: Outcome) -> str:
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(PLOT_WIDTH, PLOT_HEIGHT)
    plotext.title(f"{LABEL}: goodput over the run")
    plotext.xlabel("day")
    plotext.plot([day for day, _ in outcome.curve], [100 * ratio for _, ratio in outcome.curve])
    text: str = plotext.uncolorize(plotext.build())
    return text
