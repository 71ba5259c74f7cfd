"""Recovery from a killed worker, ours and others', side by side: same model, mesh, machine and kills, in one run.

    python benchmarks/recovery.py [--only shepherd,torchrun,...] [--layout full|small|dp] [--size small|compute]
                                  [--kill worker|node] [--kills N] [--rounds N] [--save-every STEPS] [--seed N]
                                  [--peers-python PATH] [--folder PATH] [--json PATH]
    python benchmarks/recovery.py --storm MINUTES [--only shepherd,torchrun,'Ray Train'] [...]

Every contestant trains the same Llama on the same data with this repository's model, mesh and optimizer. A drawn worker
gets SIGKILL; the figure is the time until every rank has completed the next *new* step, one that no rank had completed
before the kill. Steps that have to be done again until then count. Each run takes `--kills` / `--rounds` kills; the
contestants take turns, alone on the machine, with the same victims and the same distances between kills. Each rank
notes when it has completed a step, all on the machine's clock.

With `--kill node` every process of the victim's node dies, and a spare node stands ready; another one comes after each
kill. `full` is pp 2 x dp 2 x tp 2 (8 ranks, 2 a node), `small` pp 2 x dp 2 (4 ranks, 2 a node), `dp` four replicas on
four nodes. `--size small` has 5 million parameters and a step is mostly latency; `compute` has 53 million.

`--storm` kills a worker, a node and the controller in turn, one each 30 s. The share is new steps over those that the
same contestant's rate of the minute before the kills makes in the same time. What has ended altogether is started
anew. (torchrun has no controller: a worker dies instead.) Shepherd's run is then made once more, untouched: for the
bits of its checkpoints, and for the time that the same steps take.

torchrun and the agent with a fork server run from the project's own environment. The others take part when they are
installed, in an environment of their own, whose Ray must be the project's:

    python3.11 -m venv /tmp/peers
    /tmp/peers/bin/pip install -c constraints.txt torch==2.13.0 numpy xxhash fsspec psutil filelock \\
        'ray[train]==2.60.0' nvidia-resiliency-ext==0.4.1 torchft-nightly==2026.10.26
    python benchmarks/recovery.py --peers-python /tmp/peers/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from recoveries.contestants import CONTESTANTS
from recoveries.job import LAYOUTS, SIZES, Job
from recoveries.kills import kill_in_turn
from recoveries.marks import Recovery
from recoveries.ours import compared, left_behind
from recoveries.running import ContestantFailed
from recoveries.storm import storm, untouched
from recoveries.tables import OURS, judge, show, show_storms
from rich.console import Console

from orchestrator import localcluster

STEPS = 100_000
"""More than any run here comes to."""


@dataclass
class Outcome:
    """What one contestant has shown, over all rounds."""

    configuration: str
    recoveries: list[Recovery] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    """Of undisturbed steps."""
    failed: str = ""
    """Why it took no further part."""


def one_round(name: str, number: int, given: argparse.Namespace, outcome: Outcome, base: Path) -> None:
    contestant = CONTESTANTS[name]
    folder = base / f"{name.lower().replace(' ', '-')}-{number}-{os.getpid()}"
    job = Job(given.size, given.layout, STEPS, given.save_every, folder, spares=int(given.kill == "node"))
    job.prepare()
    share = len(range(number, given.kills, given.rounds))
    try:
        with contestant.start(job, given.peers_python) as run:
            recoveries, steps = kill_in_turn(run, share, given.seed + number, given.kill, contestant.shrinks)
        outcome.recoveries += recoveries
        outcome.step_s += steps
    except ContestantFailed as error:
        outcome.failed = str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "load_average_before": psutil.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "ray", "numpy")},
    }


def chosen_of(given: argparse.Namespace) -> list[str]:
    known = [
        name
        for name, contestant in CONTESTANTS.items()
        if given.layout in contestant.layouts and (contestant.has_nodes or (given.kill == "worker" and not given.storm))
    ]
    if not given.only:
        return [name for name in known if given.peers_python or not CONTESTANTS[name].guest]
    chosen = [name.strip() for name in given.only.split(",")]
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"--only: no {', '.join(unknown)} with these options; there are {', '.join(known)}")
    if guests := [name for name in chosen if CONTESTANTS[name].guest and not given.peers_python]:
        raise SystemExit(f"--only: {', '.join(guests)} need --peers-python: the docstring says how to make it")
    return chosen


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"some of: {', '.join(CONTESTANTS)}")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: full; with --storm small")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--kill", choices=("worker", "node"), default="worker", help="what is killed")
    parser.add_argument("--storm", type=float, default=0.0, metavar="MINUTES", help="a kill each 30 s for so long")
    parser.add_argument("--kills", type=int, default=10, help="of each contestant, over all rounds")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contestant")
    parser.add_argument("--save-every", type=int, default=5, help="steps between durable checkpoints")
    parser.add_argument("--seed", type=int, default=1, help="draws the victims and when they are killed")
    parser.add_argument("--peers-python", default="", help="Python of the environment of Ray Train, NVRx and torchft")
    parser.add_argument("--folder", type=Path, help="where runs are kept while they last; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    given = parser.parse_args()
    if not 1 <= given.rounds <= given.kills:
        parser.error(f"--rounds {given.rounds}: must be from 1 to --kills {given.kills}")
    given.layout = given.layout or ("small" if given.storm else "full")
    return given


def main() -> None:
    localcluster.isolate()
    given = arguments()
    chosen = chosen_of(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # runs and folders go with it
    console = Console(width=150, highlight=False)
    found: dict[str, Any] = {
        "machine": machine(),
        **{name: getattr(given, name) for name in ("layout", "size", "kill", "kills", "rounds", "save_every", "seed")},
    }
    console.print(found)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        measure = storms if given.storm else recoveries
        found |= measure(given, chosen, Path(folder).resolve(), console)
    found["load_average_after"] = psutil.getloadavg()[0]
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def recoveries(given: argparse.Namespace, chosen: list[str], base: Path, console: Console) -> dict[str, Any]:
    outcomes = {name: Outcome(CONTESTANTS[name].configuration) for name in chosen}
    for number in range(given.rounds):
        shift = number % len(chosen)
        for name in chosen[shift:] + chosen[:shift]:
            if not outcomes[name].failed:
                one_round(name, number, given, outcomes[name], base)
                console.print(f"round {number + 1}: {name}: {said(outcomes[name])}", markup=False)
    times = {name: [r.new_step_s for r in o.recoveries] for name, o in outcomes.items()}
    verdicts = judge(times, given.layout)
    show(console, outcomes, verdicts, given.kill)
    medians = {name: statistics.median(seconds) for name, seconds in times.items() if seconds}
    return {
        "contestants": {name: {**asdict(o), "median_s": medians.get(name)} for name, o in outcomes.items()},
        "verdicts": [asdict(v) for v in verdicts],
    }


def storms(given: argparse.Namespace, chosen: list[str], base: Path, console: Console) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in chosen:
        job = Job(given.size, given.layout, STEPS, given.save_every, base / f"storm-{os.getpid()}-{len(found)}", 1, 10)
        job.prepare()
        start = CONTESTANTS[name].start
        try:
            with start(job, given.peers_python) as run:
                outcome = storm(run, given.storm, given.seed)
            if name == OURS:
                calm = replace(job, folder=job.folder.with_name(f"{job.folder.name}-untouched"))
                calm.prepare()
                outcome.holds["left behind"] = left_behind(job)
                with start(calm, given.peers_python) as run:
                    outcome.holds["untouched_s"] = untouched(run, outcome)
                outcome.holds["compared at step"], outcome.holds["identical"] = compared(job, calm)
            found[name] = asdict(outcome)
        except ContestantFailed as error:
            found[name] = {"failed": str(error)}
        console.print({name: found[name]})
    show_storms(console, found)
    return {"storm_minutes": given.storm, "contestants": found}


def said(outcome: Outcome) -> str:
    if outcome.failed:
        return f"FAILED: {outcome.failed}"
    return " ".join(f"{r.new_step_s:.2f}" for r in outcome.recoveries) + " s"


if __name__ == "__main__":
    main()
