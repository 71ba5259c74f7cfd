"""How long simulations take: 16,384 GPUs for 54 days and 100,000 GPUs for 30 days, and the cost of an event by size.

    python benchmarks/simulate_scale.py [--json PATH]

On one core, with the core's own invariants checked after every event, as in production.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator import spec as specs
from orchestrator.simulate.body import Simulation
from orchestrator.simulate.profile import load_failures, load_profile
from orchestrator.simulate.scenario import of_spec, scaled

JOB = str(Path(__file__).resolve().parents[1] / "examples" / "llama3_405b.toml")
CASES = ((2048, 54), (4096, 54), (8192, 54), (16_384, 54), (100_352, 30))
"""GPUs and days; 100,352 is the least whole number of replicas (2,048) above 100,000."""


REPLICA_GPUS, BATCH_A_REPLICA = 2048, 256
DIVISIBLE_GPUS = 16_384


def measure(gpus: int, days: int) -> dict[str, Any]:
    sizes = ["cluster.spares=64"]
    if gpus > DIVISIBLE_GPUS:  # the batch of the paper cannot be divided over more: it grows with the replicas
        sizes.append(f"data.global_batch={gpus // REPLICA_GPUS * BATCH_A_REPLICA}")
    spec = specs.load(JOB, [*sizes, scaled(specs.load(JOB), gpus)])
    simulation = Simulation(of_spec(spec, load_profile("shepherd"), load_failures("llama3"), days, 0))
    began = time.process_time()
    state = simulation.run()
    seconds = time.process_time() - began
    return {
        "gpus": gpus,
        "days": days,
        "seconds": seconds,
        "events": simulation.events,
        "us_per_event": seconds / simulation.events * 1e6,
        "incidents": len(state.incidents),
        "ended_early": "" if simulation.ended_by_calendar else state.verdict,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    found = [measure(gpus, days) for gpus, days in CASES]
    table = Table(title="seconds of one core for a simulation; checkers: the core's own invariants")
    for name in found[0]:
        table.add_column(name, justify="right")
    for row in found:
        table.add_row(*(f"{value:,.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
