"""What one event costs the supervisor, by the number of nodes; and its memory.

    python benchmarks/handle_cost.py [--json PATH]

Median and 99th percentile of `Supervisor.handle`, its own checks included, as in production.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core.events import Layout, Limits, Snapshot
from orchestrator.core.supervisor import Supervisor

SIZES = (125, 1250, 12_500)
SPARES = 64
ROUNDS = 40
FAN_IN = 128
MINUTE_US = 60_000_000
LIMITS = Limits(
    halt_deadline_us=MINUTE_US,
    start_deadline_us=10 * MINUTE_US,
    wait_deadline_us=10 * MINUTE_US,
    commit_deadline_us=MINUTE_US,
    same_error_tries=2,
    recoveries_without_progress=8,
    strikes=3,
    keep_checkpoints=3,
)


@dataclass
class Timed:
    supervisor: Supervisor
    spent: dict[str, list[float]]
    at: int = 0

    def tick(self) -> int:
        self.at += 1000
        return self.at

    def tell(self, event: ev.Event, name: str = "") -> list[ac.Action]:
        began = time.perf_counter()
        actions = self.supervisor.handle(event)
        spent = (time.perf_counter() - began) * 1e6
        self.spent.setdefault(name or type(event).__name__, []).append(spent)
        return actions


def measure(nodes: int) -> dict[str, Any]:
    """A run of so many nodes that loses one after the other to spares."""
    layout = Layout(pp=1, dp_replicate=nodes, dp_shard=1, tp=8, slots_per_node=8, nodes=nodes, spares=SPARES)
    tracemalloc.start()
    core = Supervisor()
    t = Timed(core, {})
    t.tell(
        ev.RunDeclared(
            at=t.tick(), run="r", layout=layout, limits=LIMITS, total_steps=10**9, capabilities=("ram", "peer")
        )
    )
    t.tell(ev.EpochBegan(at=t.tick(), epoch=1, version="benchmark"))
    for index in range(nodes + SPARES):
        t.tell(ev.NodeJoined(at=t.tick(), node=f"n{index}", domain="", snapshots={}))
    gc.collect()
    bytes_a_node = tracemalloc.get_traced_memory()[0] / nodes
    tracemalloc.stop()
    step = 0
    for _ in range(ROUNDS):
        g, mesh = core.state.generation, core.state.mesh
        t.tell(ev.GenerationReady(at=t.tick(), generation=g, step=step, rendezvous_us=1, build_us=1, restore_us=1))
        for _ in range(20):
            step += 1
            t.tell(steps(t.tick(), g, step))
        t.tell(ev.NodeLost(at=t.tick(), node=mesh[0], cause="gone"))
        held = (Snapshot(generation=g, step=step - 1), Snapshot(generation=g, step=step))
        left = mesh[1:]
        for first in range(0, len(left), FAN_IN):
            some = left[first : first + FAN_IN]
            name = "" if first + FAN_IN < len(left) else "the last NodesHalted (decides and opens)"
            t.tell(ev.NodesHalted(at=t.tick(), nodes=some, generation=g, snapshots=held), name)
        t.tell(ev.NodeJoined(at=t.tick(), node=f"s{step}", domain="", snapshots={}))
    return {
        "nodes": nodes,
        "bytes_a_node": bytes_a_node,
        "us": {
            name: {"median": statistics.median(spent), "p99": sorted(spent)[int(0.99 * len(spent))]}
            for name, spent in t.spent.items()
            if len(spent) > 1
        },
    }


def steps(at: int, generation: int, step: int) -> ev.StepsDone:
    return ev.StepsDone(
        at=at,
        generation=generation,
        first=step,
        last=step,
        data_wait_us=1,
        checkpoint_us=1,
        validation_us=0,
        tokens=1,
        loss_millionths=(1,),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    found = [measure(nodes) for nodes in SIZES]
    table = Table(title="microseconds of Supervisor.handle: median / 99th percentile")
    table.add_column("event")
    for row in found:
        table.add_column(f"{row['nodes']:,} nodes", justify="right")
    for name in found[-1]["us"]:
        cells = (row["us"].get(name) for row in found)
        table.add_row(name, *(f"{c['median']:,.0f} / {c['p99']:,.0f}" if c else "-" for c in cells))
    table.add_row("bytes of memory a node", *(f"{row['bytes_a_node']:,.0f}" for row in found))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
