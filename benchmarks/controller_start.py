"""What a controller's start costs by the length of its journal, with and without a snapshot; and what a snapshot costs.

    python benchmarks/controller_start.py [--json PATH]

The journal is a local folder, with a segment for every 30 records, as progress at one report a second leaves them. Of
a snapshot, the copy holds the controller's loop up; the rest is done in a thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handle_cost import LIMITS, steps
from rich.console import Console
from rich.table import Table

from orchestrator.core import events as ev
from orchestrator.core.codec import digest, state_to_json
from orchestrator.core.events import Layout
from orchestrator.core.supervisor import Supervisor
from orchestrator.runtime import core_snapshots
from orchestrator.runtime.journal import Journal, claim_epoch

RECORDS = (1_000, 10_000, 100_000)
RECORDS_A_SEGMENT = 30
AFTER_THE_SNAPSHOT = 5_000
"""Half of what lies between two snapshots."""
NODES = (125, 1_250, 12_500)
ROUNDS = 5


def training(nodes: int) -> tuple[Supervisor, list[ev.Event]]:
    """A run of so many nodes before its first step, and the events that led there."""
    layout = Layout(pp=1, dp_replicate=nodes, dp_shard=1, tp=8, slots_per_node=8, nodes=nodes, spares=0)
    events: list[ev.Event] = [
        ev.RunDeclared(at=0, run="r", layout=layout, limits=LIMITS, total_steps=10**9, capabilities=("ram", "peer")),
        ev.EpochBegan(at=0, epoch=1, version="benchmark"),
        *(ev.NodeJoined(at=0, node=f"n{index}", domain="", snapshots={}) for index in range(nodes)),
        ev.GenerationReady(at=0, generation=1, step=0, rendezvous_us=1, build_us=1, restore_us=1),
    ]
    return Supervisor(), events


def seconds(work: Callable[[], object]) -> float:
    """The median of some rounds."""
    spent = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def start(records: int, folder: Path) -> dict[str, Any]:
    """A controller's start on a journal of so many records: from record 1, and from a snapshot."""
    url, tail = str(folder / "run"), folder / "tail"
    supervisor, events = training(4)
    events += [steps(n, 1, n) for n in range(1, records - len(events) + 1)]
    written = Journal(url, tail, claim_epoch(url, "benchmark").epoch)
    found: dict[str, Any] = {"records": records}
    for n, event in enumerate(events, 1):
        written.append(event, supervisor.handle(event))
        if n % RECORDS_A_SEGMENT == 0 or n == records:
            written.publish()
        if n == max(records - AFTER_THE_SNAPSHOT, records // 2):
            snapshot = (n, written.head[1], state_to_json(supervisor.state))
    written.close()

    def begin() -> None:
        begun = Journal(url, tail, claim_epoch(url, "benchmark").epoch)
        assert digest(begun.replay().state) == digest(supervisor.state)

    found["from_record_1_s"] = seconds(begin)
    seq, record_digest, state = snapshot
    core_snapshots.write(url, written.epoch, seq, record_digest, "benchmark", state)
    found["from_snapshot_s"] = seconds(begin)
    return found | {"ratio": found["from_record_1_s"] / found["from_snapshot_s"], "folded": records - seq}


def cost(nodes: int, folder: Path) -> dict[str, Any]:
    """What one snapshot costs in a run of so many nodes."""
    supervisor, events = training(nodes)
    for event in events:
        supervisor.handle(event)
    url, state = str(folder), state_to_json(supervisor.state)
    names = iter(range(1, ROUNDS + 1))
    copy_s = seconds(lambda: state_to_json(supervisor.state))
    write_s = seconds(lambda: core_snapshots.write(url, 1, next(names), "0" * 32, "benchmark", state))
    name = core_snapshots.names(url)[0]
    read_s = seconds(lambda: core_snapshots.read(url, name))
    size = Path(url, name).stat().st_size
    return {"nodes": nodes, "bytes": size, "copy_s": copy_s, "write_s": write_s, "read_s": read_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        starts = [start(records, Path(folder, str(records))) for records in RECORDS]
        costs = [cost(nodes, Path(folder, f"of-{nodes}-nodes")) for nodes in NODES]
    table = Table(title="seconds until a controller has read and folded its journal")
    for column in ("records", "from record 1", "from a snapshot", "ratio", "records folded then"):
        table.add_column(column, justify="right")
    for row in starts:
        times = (f"{row['from_record_1_s']:.2f}", f"{row['from_snapshot_s']:.2f}", f"{row['ratio']:.1f}")
        table.add_row(f"{row['records']:,}", *times, f"{row['folded']:,}")
    Console().print(table)
    table = Table(title="milliseconds of one snapshot")
    for column in ("nodes", "bytes", "copy, in the loop", "write, in a thread", "read"):
        table.add_column(column, justify="right")
    for row in costs:
        times = (f"{row[part] * 1e3:,.1f}" for part in ("copy_s", "write_s", "read_s"))
        table.add_row(f"{row['nodes']:,}", f"{row['bytes']:,}", *times)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"starts": starts, "snapshots": costs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
