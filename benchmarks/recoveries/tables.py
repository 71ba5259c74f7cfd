"""Medians, ratios and tables of recovery.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from recoveries.marks import Recovery

OURS = "shepherd"
TARGETS = {"torchrun": 6.0, "Ray Train": 10.0}
"""At least so many times as fast, in the full layout; faster than all others."""
STAGES = ("detected", "down", "up", "imported", "group", "built", "restored", "first step")


class Shown(Protocol):
    configuration: str
    recoveries: list[Recovery]
    step_s: list[float]
    failed: str


@dataclass(frozen=True)
class Verdict:
    what: str
    ratio: float
    """Of the medians."""
    low: float
    """The fastest of theirs over the slowest of ours."""
    high: float
    target: str
    met: bool


def judge(times: Mapping[str, Sequence[float]], layout: str) -> list[Verdict]:
    """Seconds of every other contestant over ours."""
    ours = times.get(OURS)
    verdicts = []
    for name, theirs in times.items():
        if name == OURS or not ours or not theirs:
            continue
        ratio = statistics.median(theirs) / statistics.median(ours)
        least = TARGETS.get(name, 1.0) if layout == "full" else 1.0
        met = ratio >= least if least > 1 else ratio > 1
        target = f">= {least:g}" if least > 1 else "> 1"
        verdicts.append(Verdict(f"{name} / ours", ratio, min(theirs) / max(ours), max(theirs) / min(ours), target, met))
    return verdicts


def stage_medians(recoveries: Sequence[Recovery]) -> dict[str, float]:
    """Of each stage that at least one recovery shows, seconds from the kill."""
    shown: dict[str, float] = {}
    for stage in STAGES:
        seconds = [r.stages[stage] for r in recoveries if stage in r.stages]
        if seconds:
            shown[stage] = statistics.median(seconds)
    return shown


def show(console: Console, outcomes: Mapping[str, Shown], verdicts: Sequence[Verdict], what: str) -> None:
    table = Table(title=f"seconds from SIGKILL of a {what}, medians; each stage when the last rank has reached it")
    for column in ("", "kills", *STAGES, "new step", "least", "most", "steps lost", "step s"):
        table.add_column(column, justify="right" if column else "left")
    for name, outcome in outcomes.items():
        new = [r.new_step_s for r in outcome.recoveries]
        if not new:
            continue
        stages = stage_medians(outcome.recoveries)
        lost = sorted(r.steps_lost for r in outcome.recoveries)
        table.add_row(
            name,
            str(len(new)),
            *(f"{stages[stage]:.2f}" if stage in stages else "" for stage in STAGES),
            f"{statistics.median(new):.2f}",
            f"{min(new):.2f}",
            f"{max(new):.2f}",
            f"{lost[0]}-{lost[-1]}",
            f"{statistics.median(outcome.step_s):.2f}" if outcome.step_s else "",
        )
    console.print(table)
    if verdicts:
        table = Table(title="how many times as long the others take")
        for column in ("", "ratio of medians", "of extremes", "target", "met"):
            table.add_column(column, justify="right" if column else "left")
        for v in verdicts:
            table.add_row(v.what, f"{v.ratio:.2f}", f"{v.low:.2f} to {v.high:.2f}", v.target, "yes" if v.met else "NO")
        console.print(table)
    for name, outcome in outcomes.items():
        console.print(f"{name}: {outcome.configuration}", markup=False)
        if outcome.failed:
            console.print(f"  takes no further part: {outcome.failed}", markup=False)


def goodput(storm: Mapping[str, Any]) -> dict[str, str]:
    """Productive node-seconds: over those of the nodes that the mesh needs, over all, and over all but idle spares'."""
    ledger = storm.get("ledger")
    if not ledger:
        return {}
    every = sum(ledger.values())
    shares = {
        "goodput of the mesh's nodes": ledger["productive"] / (60 * storm["minutes"] * storm["nodes"]),
        "goodput by the ledger": ledger["productive"] / every,
        "goodput without idle spares": ledger["productive"] / (every - ledger["idle_spare"]),
    }
    return {name: f"{share:.1%}" for name, share in shares.items()}


def show_storms(console: Console, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Of each contestant a Storm as a JSON object, or why there is none."""
    table = Table(title="one kill each 30 s: worker, node, controller in turn")
    for column in ("", "minutes", "kills", "new steps", "step s before", "new steps / untouched rate", "started anew"):
        table.add_column(column, justify="right" if column else "left")
    for name, storm in found.items():
        if "failed" in storm:
            table.add_row(name, "failed")
            continue
        new = storm["last"] - storm["first"]
        row = (f"{storm['minutes']:.1f}", len(storm["kills"]), new, f"{storm['calm_step_s']:.2f}")
        table.add_row(name, *map(str, row), f"{storm['share']:.1%}", str(storm["restarts"]))
    console.print(table)
    for name, storm in found.items():
        told = {**goodput(storm), **storm.get("holds", {})}
        if seconds := told.get("untouched_s"):
            told["untouched run's time for the same steps"] = f"{seconds / (60 * storm['minutes']):.1%}"
        console.print(f"{name}: {storm.get('failed', told)}", markup=False)
