"""The sweep: whatever is killed, whenever, the run ends in time with the untouched run's bits, tokens and losses.

    python tests/chaos/sweep.py --seeds 60 --first 0

Each seed draws up to three kills of workers, nodes and the controller: in a step, around a checkpoint, right after or
together with the kill before. A seed draws the same plan each time; the machine's own timing still differs. What was
killed when is printed, and a seed that fails keeps its run directory with the journal. In the end what the runs have
left behind is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import bootstrap  # noqa: F401  (before Ray)
import psutil
from rich.console import Console
from rich.table import Table
from rig import Census, Result, Rig, await_no_growth, await_nothing_left, differences, rig, run, take_census

from orchestrator.chaos import faults
from orchestrator.observe.status import Status
from orchestrator.runtime.controller import namespace_of
from orchestrator.spec import JobSpec
from storage.manifest import COMMIT_DIR, DATA_DIR

STEPS = 24
SAVE_EVERY = 6
PAUSE_S = 0.15
"""In each step, so that a run of 24 lasts some seconds."""
MESHES = {
    "pp 2 x dp 2": {"pp": 2, "dp_replicate": 2, "microbatches": 2},
    "dp 4": {"pp": 1, "dp_replicate": 4, "microbatches": 1},
    "fsdp 2 x tp 2": {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "tp": 2, "microbatches": 1},
}
LOOK_S = 0.003
BACK_WITHIN_S = 60.0
"""For a victim that is just being replaced to be there."""
LATE_STEPS = 3
"""A save may be left out while another one is written: its kill comes at the latest so many steps after it."""


# --- what is killed when ---


@dataclass(frozen=True)
class Kill:
    what: str
    """"worker", "node", "spare" or "controller"."""
    index: int
    """Rank, or place in the mesh."""
    when: str
    """"step" or "saving" or "committed" of `at`; "after" the kill before."""
    at: int
    delay_s: float

    def __str__(self) -> str:
        whom = f" {self.index}" if self.what in ("worker", "node") else ""
        when = f"+{self.delay_s:.2f} s" if self.when == "after" else f"{self.when} {self.at}"
        return f"{self.what}{whom} @ {when}"


def plan(seed: int) -> tuple[str, list[Kill]]:
    """The mesh and the kills of a seed."""
    chance = random.Random(seed)
    mesh = list(MESHES)[seed % len(MESHES)]
    kills: list[Kill] = []
    at = 0
    for number in range(chance.choice((1, 2, 2, 3, 3))):
        what = chance.choices(("worker", "node", "spare", "controller"), (5, 3, 1, 3))[0]
        index = chance.randrange(4) if what == "worker" else chance.randrange(2)
        when = chance.choice(("step", "saving", "committed", "after") if number else ("step", "saving", "committed"))
        if when == "after":
            delay_s = chance.choice((0.0, 0.0, chance.uniform(0, 0.5), chance.uniform(0.5, 4.0)))
        else:
            due, share = (range(2, STEPS), 0.12) if when == "step" else (range(SAVE_EVERY, STEPS, SAVE_EVERY), 0.6)
            at = min((step for step in due if step > at and chance.random() < share), default=max(due))
            delay_s = chance.uniform(0, PAUSE_S * 1.5) if when == "step" else chance.uniform(0, 0.03)
        kills.append(Kill(what=what, index=index, when=when, at=at, delay_s=delay_s))
    return mesh, kills


@dataclass
class Killer:
    """A thread that carries a plan out, from what the workers write down and what stands on the store."""

    on: Rig
    spec: JobSpec
    kills: list[Kill]
    done: list[str] = field(default_factory=list)
    """Each kill of the plan and what came of it, in order."""
    status: Status | None = None
    _pids: dict[int, int] = field(default_factory=dict)
    _step: int = 0
    _over: threading.Event = field(default_factory=threading.Event)
    _killed_at: float = 0.0
    _rest: str = ""
    """The beginning of a line whose end was not there yet."""

    def __enter__(self) -> Killer:
        self._thread = threading.Thread(target=self._run, name="killer", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    @property
    def landed(self) -> int:
        return sum(line.endswith("killed") for line in self.done)

    def _run(self) -> None:
        with open(self.on.log(self.spec.run.name)) as log:
            for kill in self.kills:
                while not self._due(kill):
                    self._read(log)
                    if self._over.wait(LOOK_S):
                        self.done.append(f"{kill}: the run was over")
                        return
                self._over.wait(kill.delay_s if kill.when != "after" else 0.0)
                self.done.append(f"{kill}: {self._do_in_time(kill, log)}")
                self._killed_at = time.monotonic()
        self.on.pause(self.spec.run.name, 0.0)

    def _do_in_time(self, kill: Kill, log: Iterable[str]) -> str:
        """Whom the kill before has ended is killed again as soon as it is back."""
        deadline = time.monotonic() + BACK_WITHIN_S
        while True:
            self._read(log)
            try:
                self._do(kill)
                return "killed"
            except Exception as e:  # it is gone, or not there yet
                if time.monotonic() > deadline or self._over.wait(LOOK_S):
                    return f"missed ({type(e).__name__})"

    def _read(self, log: Iterable[str]) -> None:
        for piece in log:
            self._rest += piece
            if not piece.endswith("\n"):
                return  # it is being written
            line, self._rest = self._rest.rstrip("\n"), ""
            if not line.endswith("}"):
                continue  # empty, or of a writer that was killed
            entry = json.loads(line)
            self._pids[entry["rank"]] = entry["pid"]
            self._step = max(self._step, entry.get("begins", 0))

    def _due(self, kill: Kill) -> bool:
        if kill.when == "after":
            return time.monotonic() >= self._killed_at + kill.delay_s
        if kill.when == "step" or self._step >= kill.at + LATE_STEPS:
            return self._step >= kill.at
        folder = Path(self.spec.run.url, DATA_DIR if kill.when == "saving" else COMMIT_DIR)
        return any(folder.glob(f"step-{kill.at:08d}*"))

    def _do(self, kill: Kill) -> None:
        status = self.status
        assert status is not None
        if kill.what == "worker":
            os.kill(self._pids[kill.index], signal.SIGKILL)
        elif kill.what == "controller":
            (pid,) = [p.pid for p in psutil.Process().children(recursive=True) if _is_controller(p)]
            os.kill(pid, signal.SIGKILL)
        else:
            spares = [node for node, state in status.nodes.items() if state == "spare"]
            node = status.mesh[kill.index] if kill.what == "node" else spares[0]
            faults.kill_node(namespace_of(self.spec.run.name), node, self.spec.run.name, status.step)


def _is_controller(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith("ray::Controller")
    except psutil.Error:
        return False


# --- a seed ---


@dataclass
class Outcome:
    seed: int
    mesh: str
    kills: list[str]
    landed: int = 0
    wrong: list[str] = field(default_factory=list)
    """What does not hold; empty when all does."""
    generations: int = 0
    epochs: int = 0
    rungs: str = ""
    executions: int = 0
    other: float = 0.0
    wall_s: float = 0.0


def spec_of_seed(on: Rig, name: str, mesh: str) -> JobSpec:
    return on.spec(
        name,
        PAUSE_S,
        run={"steps": STEPS, "validation_interval_steps": STEPS},
        parallel=MESHES[mesh],
        checkpoint={"interval_steps": SAVE_EVERY},
        cluster={"spares": 1},
    )


def untouched(on: Rig, mesh: str) -> Result:
    """The run of a mesh when nothing happens to it."""
    name = f"untouched-{list(MESHES).index(mesh)}"
    result = run(on, spec_of_seed(on, name, mesh))
    assert result.status.incidents == () and differences(result, result) == []
    assert result.truth.executions == STEPS and all(len(seen) == 1 for seen in result.truth.losses.values())
    return result


def run_seed(on: Rig, seed: int, reference: Result, journals: Path | None = None) -> Outcome:
    """One run under the kills of `seed`, compared with the untouched one; the cluster is whole again at the end.

    Of a run in which all holds nothing is kept, but its journal where there is a folder for it.
    """
    mesh, kills = plan(seed)
    spec = spec_of_seed(on, f"seed-{seed}", mesh)
    outcome = Outcome(seed=seed, mesh=mesh, kills=[str(kill) for kill in kills])
    began = time.monotonic()
    killer = Killer(on=on, spec=spec, kills=kills)
    try:
        with killer:
            result = run(on, spec, lambda status: setattr(killer, "status", status))
        outcome.wrong = differences(result, reference)
        outcome.generations, outcome.epochs = result.state.generation, result.state.epoch
        outcome.rungs = " ".join("+".join(i.rungs) for i in result.status.incidents)
        outcome.executions = result.truth.executions
        outcome.other = result.status.ledger_us["other"] / result.status.owed_us
        await_nothing_left(on.folder / "ram")
    except Exception as e:
        outcome.wrong = ["".join(traceback.format_exception(e))]
    outcome.kills, outcome.landed, outcome.wall_s = killer.done, killer.landed, time.monotonic() - began
    if outcome.wrong:
        Path(spec.run.url).mkdir(exist_ok=True)
        Path(spec.run.url, "outcome.json").write_text(json.dumps(asdict(outcome), indent=1))
        shutil.copy(on.log(spec.run.name), Path(spec.run.url, "truth.log"))
    else:
        if journals is not None:
            for part in ("epochs", "journal"):
                shutil.copytree(Path(spec.run.url, part), journals / spec.run.name / part)
        shutil.rmtree(spec.run.url)
    on.mend()
    return outcome


# --- the sweep ---


def sweep(folder: Path, seeds: range, console: Console, journals: Path | None) -> tuple[list[Outcome], list[str]]:
    """Every seed, each printed as it ends; the outcomes, and what has grown over the sweep."""
    outcomes: list[Outcome] = []
    with rig(folder) as on:
        references = {mesh: untouched(on, mesh) for mesh in dict.fromkeys(plan(seed)[0] for seed in seeds)}
        before = take_census(on)
        for seed in seeds:
            outcome = run_seed(on, seed, references[plan(seed)[0]], journals)
            outcomes.append(outcome)
            console.print(_line(outcome), markup=False)
        after, grown = await_no_growth(on, before)
        console.print(_census_table(before, after))
    return outcomes, grown


def _line(o: Outcome) -> str:
    verdict = "ok" if not o.wrong else f"WRONG: {'; '.join(o.wrong)[:2000]}"
    return f"seed {o.seed} [{o.mesh}] {o.wall_s:.0f} s: {verdict}\n   " + "\n   ".join(o.kills)


def table(outcomes: list[Outcome]) -> Table:
    shown = Table("seed", "mesh", "kills", "landed", "rungs", "generations", "epochs", "steps run", "other", "holds")
    for o in outcomes:
        shown.add_row(
            str(o.seed),
            o.mesh,
            ", ".join(kill.partition(":")[0] for kill in o.kills),
            str(o.landed),
            o.rungs or "-",
            str(o.generations),
            str(o.epochs),
            f"{o.executions} of {STEPS}",
            f"{o.other:.2%}",
            "yes" if not o.wrong else "NO",
        )
    return shown


def _census_table(before: Census, after: Census) -> Table:
    shown = Table("what is left behind", "before", "after")
    for name in ("ours", "zombies", "shared_memory", "actors", "placement_groups"):
        shown.add_row(name, str(len(getattr(before, name))), str(len(getattr(after, name))))
    for name in ("descriptors", "event_queues", "socket_files", "sockets"):
        for who, count in getattr(after, name).items():
            if who in getattr(before, name):
                shown.add_row(f"{name} of {who}", str(getattr(before, name)[who]), str(count))
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=60, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"), help="folder of the runs; made anew")
    parser.add_argument("--journals", type=Path, help="keep the journals in this folder, for benchmarks/predicted.py")
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    console = Console(width=170, highlight=False, soft_wrap=True)
    seeds = range(given.first, given.first + given.seeds)
    outcomes, grown = sweep(given.out.absolute(), seeds, console, given.journals)
    console.print(table(outcomes))
    for line in grown:
        console.print(f"grown: {line}", style="red", markup=False)
    failed = [o.seed for o in outcomes if o.wrong]
    landed = sum(o.landed for o in outcomes)
    console.print(f"{len(outcomes)} seeds, {landed} kills landed, failed: {failed or 'none'}")
    return 1 if failed or grown else 0


if __name__ == "__main__":
    sys.exit(main())
