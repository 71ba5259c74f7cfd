"""What a section of checkpoint_speed.py has found, held against its targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass
class Verdict:
    what: str
    ratio: float
    low: float
    high: float
    target: str
    met: bool | None
    """None: for comparison only."""


@dataclass
class Section:
    """What one section has found."""

    name: str
    note: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of each contestant, by round."""
    n_bytes: int = 0
    """Moved in these seconds by all ranks together; 0 when a rate says nothing."""
    verdicts: list[Verdict] = field(default_factory=list)
    beside_of: str = "of single rounds"
    beside: dict[str, str] = field(default_factory=dict)
    """What else stands in the row of a verdict."""
    more: dict[str, Any] = field(default_factory=dict)

    def best(self, names: list[str]) -> str:
        return min(names, key=lambda name: statistics.median(self.seconds[name]))

    def judge(
        self, what: str, over: str, under: str, *, at_least: float = 0.0, at_most: float = 0.0, less: bool = False
    ) -> None:
        """Hold the seconds of `over` against those of `under`."""
        upper, lower = self.seconds[over], self.seconds[under]
        single = [a / b for a, b in zip(upper, lower, strict=True)]
        ratio = statistics.median(upper) / statistics.median(lower)
        target = f">= {at_least:g}" if at_least else f"<= {at_most:g}" if at_most else "< 1" if less else ""
        met = ratio >= at_least if at_least else ratio <= at_most if at_most else ratio < 1 if less else None
        self.verdicts.append(Verdict(what, ratio, min(single), max(single), target, met))


def in_turns(section: Section, rounds: int, contestants: dict[str, Callable[[], float]]) -> None:
    """Let each run once a round, each round beginning with another one."""
    names = list(contestants)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            section.seconds.setdefault(name, []).append(contestants[name]())


def show(section: Section, console: Console) -> None:
    if section.seconds:
        table = Table(title=f"{section.name}: {section.note}")
        for column in ("", "median s", "least", "most", "GB/s", "processor s", "complete s"):
            table.add_column(column, justify="right" if column else "left")
        for name, seconds in section.seconds.items():
            median = statistics.median(seconds)
            rate = f"{section.n_bytes / median / 1e9:.2f}" if section.n_bytes else ""
            each = section.more.get("each", {}).get(name)
            medians = [
                f"{statistics.median(e[key] for e in each):.3f}" if each else "" for key in ("cpu_s", "complete_s")
            ]
            table.add_row(name, f"{median:.4f}", f"{min(seconds):.4f}", f"{max(seconds):.4f}", rate, *medians)
        console.print(table)
    for name, configuration in section.more.get("configurations", {}).items():
        absent = section.more["absent"].get(name)
        console.print(f"{name}: {configuration}" + (f"\n  takes no part: {absent}" if absent else ""), markup=False)
    table = Table(title=f"{section.name}: ratios" + ("" if section.seconds else f", {section.note}"))
    for column in ("", "ratio", section.beside_of, "target", "met"):
        table.add_column(column, justify="right" if column else "left")
    for verdict in section.verdicts:
        met = {True: "yes", False: "NO", None: ""}[verdict.met]
        beside = section.beside.get(verdict.what, f"{verdict.low:.3f} to {verdict.high:.3f}")
        table.add_row(verdict.what, f"{verdict.ratio:.3f}", beside, verdict.target, met)
    console.print(table)
