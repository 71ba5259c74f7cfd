"""What the simulator says of runs that have happened: their journals, with their own costs and failures, lived through.

    python tests/chaos/sweep.py --seeds 60 --journals out/journals
    python benchmarks/predicted.py out/journals/* [--json PATH]

Costs are each run's averages (a start, a restore, a halt) and each generation's own pace, failures struck when they
struck. Both goodputs are productive node-time over all node-time from the declaration to the last step. SIMULATION
beside measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.runtime import journal
from orchestrator.simulate.body import Simulation
from orchestrator.simulate.measured import NotMeasured, measure

BOUND = 0.03


def compare(folder: Path) -> dict[str, Any]:
    measured = measure(journal.read(str(folder)))
    simulation = Simulation(measured.scenario)
    state = simulation.run()
    simulated = state.ledger.totals["productive"] / state.ledger.owed
    return {
        "run": folder.name,
        "incidents": len(measured.incidents),
        "rungs": " ".join("+".join(i.rungs) for i in measured.incidents),
        "simulated_rungs": " ".join("+".join(i.rungs) for i in state.incidents),
        "goodput": measured.goodput,
        "simulated": simulated,
        "off": simulated - measured.goodput,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    found, without = [], []
    for folder in arguments.runs:
        try:
            found.append(compare(folder))
        except NotMeasured as e:
            without.append(f"{folder.name}: {e}")
    table = Table("run", "rungs", "rungs, SIMULATION", "goodput", "SIMULATION", "off, points")
    for row in found:
        table.add_row(
            row["run"],
            row["rungs"] or "-",
            row["simulated_rungs"] or "-",
            f"{row['goodput']:.2%}",
            f"{row['simulated']:.2%}",
            f"{100 * row['off']:+.2f}",
        )
    Console(width=150).print(table)
    for line in without:
        print(line)
    if not found:
        return
    off = [abs(row["off"]) for row in found]
    mean, worst = 100 * statistics.fmean(off), 100 * max(off)
    beyond = sum(o > BOUND for o in off)
    real, simulated = (statistics.fmean(row[which] for row in found) for which in ("goodput", "simulated"))
    print(f"mean goodput: {real:.2%}; SIMULATION {simulated:.2%}")
    print(f"{len(found)} runs: off by {mean:.2f} points on average, {worst:.2f} at most; {beyond} beyond {BOUND:.0%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
