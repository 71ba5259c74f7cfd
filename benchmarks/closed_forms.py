"""The simulator against closed forms: Meta's ETTR where it is valid, and Daly's exact formula, on a grid.

    python benchmarks/closed_forms.py [--json PATH]

Each point is one simulated run of a mesh whose only failure is a worker's, with whole-job restart from durable storage,
over as many failures as make its standard error about a quarter of a point.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from orchestrator.simulate import formulas
from orchestrator.simulate.simplest import goodput_of_restarts

HOUR_S = 3600.0
FAILURE_RATES = (1 / (24 * HOUR_S), 1 / (8 * HOUR_S), 1 / (3 * HOUR_S), 1 / HOUR_S)
RESTARTS_S = (30.0, 300.0, 900.0)
INTERVALS_S = (120.0, 600.0, 1800.0)
SAVES_S = (1.0, 15.0)
STANDARD_ERROR, FAILURES_MIN = 0.0025, 100
FIRST_ORDER = 0.1
"""Meta's formula is of first order: its error is about half the square of what a failure interval loses to it."""


@dataclass(frozen=True, kw_only=True)
class Point:
    failure_rate_per_s: float
    restart_s: float
    interval_s: float
    save_s: float
    simulated: float
    daly: float
    meta: float | None
    """None where it is not valid."""

    @property
    def worst(self) -> float:
        """The largest distance from a formula that applies, in points (hundredths)."""
        return 100 * max(abs(self.simulated - f) for f in (self.daly, self.meta) if f is not None)


def failures_for(lost: float) -> int:
    """What is lost to each failure is spread about as wide as it is long."""
    return max(FAILURES_MIN, round((lost / STANDARD_ERROR) ** 2))


def measure() -> list[Point]:
    points = []
    grid = itertools.product(FAILURE_RATES, RESTARTS_S, INTERVALS_S, SAVES_S)
    for seed, (rate, restart, interval, save) in enumerate(grid):
        daly = formulas.daly_efficiency(rate, restart, interval, save)
        first_order = rate * (restart + interval / 2) <= FIRST_ORDER
        points.append(
            Point(
                failure_rate_per_s=rate,
                restart_s=restart,
                interval_s=interval,
                save_s=save,
                simulated=goodput_of_restarts(
                    rate,
                    restart_s=restart,
                    interval_s=interval,
                    save_s=save,
                    failures=failures_for(1 - daly * (1 + save / interval)),
                    seed=seed,
                ),
                daly=daly,
                meta=formulas.meta_ettr(rate, restart, interval, save) if first_order else None,
            )
        )
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the points there")
    arguments = parser.parse_args()
    points = measure()
    table = Table(title="SIMULATION against closed forms")
    for name in ("MTBF h", "restart s", "interval s", "save s", "simulated", "Daly", "Meta's ETTR", "off, points"):
        table.add_column(name, justify="right")
    for p in points:
        meta = "-" if p.meta is None else f"{p.meta:.4f}"
        table.add_row(
            f"{1 / p.failure_rate_per_s / HOUR_S:g}",
            *(f"{number:g}" for number in (p.restart_s, p.interval_s, p.save_s)),
            f"{p.simulated:.4f}",
            f"{p.daly:.4f}",
            meta,
            f"{p.worst:.2f}",
        )
    Console().print(table)
    both = sum(p.meta is not None for p in points)
    worst = max(p.worst for p in points)
    print(f"{len(points)} points of Daly's, {both} of Meta's; the worst is off by {worst:.2f} points")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(p) for p in points], indent=1) + "\n")


if __name__ == "__main__":
    main()
