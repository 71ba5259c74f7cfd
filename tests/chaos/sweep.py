"""The sweep: whatever is done to it, whenever, a run ends in time with the untouched run's bits, tokens and losses.

    python tests/chaos/sweep.py --seeds 60 --first 0

Each seed draws up to three strikes: SIGKILL from outside for workers, nodes and the controller, and what `shepherd
chaos` can order on one machine without special rights; in a step, around a checkpoint, right after or together with the
strike before. One mesh of four has no spare, so it shrinks when a node dies, and grows back: of such a run the samples
of each step are compared, and losses within a tolerance. A seed draws the same plan each time; the machine's own timing
still differs. What was done when is printed, and a seed that fails keeps its run directory with the journal. In the end
what the runs have left behind is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import bootstrap  # noqa: F401  (before Ray)
import psutil
from rich.console import Console
from rich.table import Table
from rig import Census, Result, Rig, await_no_growth, await_nothing_left, differences, rig, run, take_census

from orchestrator.chaos import command, faults
from orchestrator.chaos.orders import NOT_DONE, OF_A_RANK, PROCESSES, Order
from orchestrator.chaos.scorecard import score
from orchestrator.observe.status import Status
from orchestrator.runtime import driver
from orchestrator.runtime.controller import namespace_of
from orchestrator.spec import JobSpec
from storage.manifest import COMMIT_DIR, DATA_DIR

STEPS = 24
SAVE_EVERY = 6
RANKS = 4
LOOK_S = 0.003
BACK_WITHIN_S = 60.0
"""For a victim that is just being replaced to be there."""
LATE_STEPS = 3
"""A save may be left out while another one is written: its strike comes at the latest so many steps after it."""


@dataclass(frozen=True)
class Mesh:
    """Of RANKS ranks."""

    parallel: dict[str, int]
    slots_per_node: int = 2
    spares: int = 1
    pause_s: float = 0.15
    """In each step, so that a run of 24 lasts some seconds."""


MESHES = {
    "pp 2 x dp 2": Mesh({"pp": 2, "dp_replicate": 2, "microbatches": 2}),
    "dp 4": Mesh({"pp": 1, "dp_replicate": 4, "microbatches": 1}),
    "fsdp 2 x tp 2": Mesh({"pp": 1, "dp_replicate": 1, "dp_shard": 2, "tp": 2, "microbatches": 1}),
    # Of the five nodes it has four; the fifth comes in, in seconds, when one has died and the mesh has shrunk.
    "pp 2 x dp 2, no spare": Mesh({"pp": 2, "dp_replicate": 2, "microbatches": 2}, 1, spares=0, pause_s=0.5),
}


# --- what is done when ---

KILLS = {"worker": 4, "node": 2, "spare": 1, "controller": 2}
"""SIGKILL from outside, past the run's own road for chaos, and how often each is drawn."""
ORDERS = {
    "worker-stop": 1,
    "worker-exception": 1,
    "worker-segfault": 1,
    "worker-lock": 1,
    "worker-loop": 1,
    "worker-slow": 1,
    "memory": 1,
    "flip": 1,
    "two-kills": 1,
    "recovery-kill": 1,
    "node-kill": 1,
    "clock-jump": 1,
    "store-outage": 1,
    "controller-kill": 1,
}
"""Scenarios of `shepherd chaos`. The others need rights (net-cut, net-delay, disk-full) or a Redis (head-kill)."""
LASTS_S = (2.0, 6.0)
"""Of what lasts: between a step and a save interval or two."""
LEAP_S = 86_400.0


@dataclass(frozen=True)
class Strike:
    what: str
    """One of KILLS or ORDERS."""
    index: int
    """Rank, or place in the mesh; of a smaller mesh counted on from its first again."""
    when: str
    """"step" or "saving" or "committed" of `at`; "after" the strike before."""
    at: int
    delay_s: float
    seed: int = 0
    """Draws what an order leaves open."""

    def __str__(self) -> str:
        whom = f" {self.index}" if self.what in ("worker", "node", "node-kill", *OF_A_RANK) else ""
        when = f"+{self.delay_s:.2f} s" if self.when == "after" else f"{self.when} {self.at}"
        return f"{self.what}{whom} @ {when}"

    def order(self, mesh: tuple[str, ...], slots_per_node: int) -> Order:
        """As `shepherd chaos` would have it of the run's mesh as it is."""
        chance = random.Random(self.seed)
        leaps = self.what == "clock-jump"
        return Order(
            scenario=self.what,
            rank=self.index % (len(mesh) * slots_per_node) if self.what in OF_A_RANK else None,
            node=mesh[self.index % len(mesh)] if self.what == "node-kill" else "",
            seed=self.seed,
            seconds=chance.choice((-LEAP_S, LEAP_S)) if leaps else round(chance.uniform(*LASTS_S), 1),
            process=chance.choice(PROCESSES),
        )


def plan(seed: int) -> tuple[str, list[Strike]]:
    """The mesh and the strikes of a seed."""
    chance = random.Random(seed)
    mesh = list(MESHES)[seed % len(MESHES)]
    weights = KILLS | ORDERS
    if not MESHES[mesh].spares:
        del weights["spare"]
    strikes: list[Strike] = []
    at = 0
    for number in range(chance.choice((1, 2, 2, 3, 3))):
        (what,) = chance.choices(list(weights), list(weights.values()))
        if what == "memory":
            del weights[what]  # twice the same MemoryError in one step is the job's own fault, as it should be
        index = chance.randrange(2) if what == "node" else chance.randrange(RANKS)
        when = chance.choice(("step", "saving", "committed", "after") if number else ("step", "saving", "committed"))
        if when == "after":
            delay_s = chance.choice((0.0, 0.0, chance.uniform(0, 0.5), chance.uniform(0.5, 4.0)))
        else:
            due, share = (range(2, STEPS), 0.12) if when == "step" else (range(SAVE_EVERY, STEPS, SAVE_EVERY), 0.6)
            at = min((step for step in due if step > at and chance.random() < share), default=max(due))
            delay_s = chance.uniform(0, 0.25) if when == "step" else chance.uniform(0, 0.03)
        strikes.append(Strike(what, index, when, at, delay_s, seed=chance.randrange(2**31)))
    return mesh, strikes


@dataclass
class Striker:
    """A thread that carries a plan out, from what the workers write down and what stands on the store."""

    on: Rig
    spec: JobSpec
    strikes: list[Strike]
    done: list[str] = field(default_factory=list)
    """Each strike of the plan and what came of it, in order."""
    status: Status | None = None
    _pids: dict[int, int] = field(default_factory=dict)
    _step: int = 0
    _over: threading.Event = field(default_factory=threading.Event)
    _struck_at: float = 0.0
    _rest: str = ""
    """The beginning of a line whose end was not there yet."""

    def __enter__(self) -> Striker:
        self._thread = threading.Thread(target=self._run, name="striker", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with open(self.on.log(self.spec.run.name)) as log:
            for number, strike in enumerate(self.strikes):
                while not self._due(strike):
                    self._read(log)
                    if self._over.wait(LOOK_S):
                        self.done += [f"{late}: the run was over" for late in self.strikes[number:]]
                        return
                self._over.wait(strike.delay_s if strike.when != "after" else 0.0)
                self.done.append(f"{strike}: {self._do_in_time(number, strike, log)}")
                self._struck_at = time.monotonic()
        if self.spec.cluster.spares:  # else there must be time to grow
            self.on.pause(self.spec.run.name, 0.0)

    def _do_in_time(self, number: int, strike: Strike, log: Iterable[str]) -> str:
        """Whom the strike before has ended is struck again as soon as it is back."""
        deadline = time.monotonic() + BACK_WITHIN_S
        while True:
            self._read(log)
            try:
                self._do(number, strike)
                return "killed" if strike.what in KILLS else "ordered"
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

    def _due(self, strike: Strike) -> bool:
        if strike.when == "after":
            return time.monotonic() >= self._struck_at + strike.delay_s
        if strike.when == "step" or self._step >= strike.at + LATE_STEPS:
            return self._step >= strike.at
        folder = Path(self.spec.run.url, DATA_DIR if strike.when == "saving" else COMMIT_DIR)
        return any(folder.glob(f"step-{strike.at:08d}*"))

    def _do(self, number: int, strike: Strike) -> None:
        status, name = self.status, self.spec.run.name
        assert status is not None
        slots = self.spec.cluster.slots_per_node
        if strike.what in ORDERS:
            token = driver.read_token(self.spec.cluster.log_dir, name)
            command.give(driver.find(name), token, strike.order(status.mesh, slots), by=_by(number))
        elif strike.what == "worker":
            os.kill(self._pids[strike.index % (len(status.mesh) * slots)], signal.SIGKILL)
        elif strike.what == "controller":
            (pid,) = [p.pid for p in psutil.Process().children(recursive=True) if _is_controller(p)]
            os.kill(pid, signal.SIGKILL)
        else:
            spares = [node for node, state in status.nodes.items() if state == "spare"]
            node = status.mesh[strike.index % len(status.mesh)] if strike.what == "node" else spares[0]
            faults.kill_node(namespace_of(name), node, name, status.step)


def _by(number: int) -> str:
    """Who has ordered the strike of this number."""
    return f"strike {number}"


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
    strikes: list[str]
    """Each, and what came of it."""
    landed: list[str] = field(default_factory=list)
    """What was done, by its name in KILLS or ORDERS."""
    found: int = 0
    """Of the faults that were ordered and done, those that passed in `shepherd chaos`'s own scorecard."""
    ordered: int = 0
    """Faults that were ordered and done."""
    wrong: list[str] = field(default_factory=list)
    """What does not hold; empty when all does."""
    resized: bool = False
    """Whether the mesh had another size for a while."""
    generations: int = 0
    epochs: int = 0
    rungs: str = ""
    executions: int = 0
    other: float = 0.0
    wall_s: float = 0.0


def spec_of_seed(on: Rig, name: str, mesh: str) -> JobSpec:
    drawn = MESHES[mesh]
    return on.spec(
        name,
        drawn.pause_s,
        run={"steps": STEPS, "validation_interval_steps": STEPS},
        parallel=drawn.parallel,
        checkpoint={"interval_steps": SAVE_EVERY},
        recovery={"rank_silence_s": 5, "stall_floor_s": 5, "grow_settle_s": 1},
        cluster={"spares": drawn.spares, "slots_per_node": drawn.slots_per_node},
    )


def untouched(on: Rig, mesh: str) -> Result:
    """The run of a mesh when nothing happens to it."""
    name = f"untouched-{list(MESHES).index(mesh)}"
    result = run(on, spec_of_seed(on, name, mesh))
    assert result.status.incidents == () and differences(result, result) == []
    assert result.truth.executions == STEPS and all(len(seen) == 1 for seen in result.truth.losses.values())
    return result


def run_seed(on: Rig, seed: int, reference: Result, journals: Path | None = None) -> Outcome:
    """One run under the strikes of `seed`, compared with the untouched one; the cluster is whole again at the end.

    Of a run in which all holds nothing is kept, but its journal where there is a folder for it.
    """
    mesh, strikes = plan(seed)
    spec = spec_of_seed(on, f"seed-{seed}", mesh)
    outcome = Outcome(seed=seed, mesh=mesh, strikes=[str(strike) for strike in strikes])
    began = time.monotonic()
    striker = Striker(on=on, spec=spec, strikes=strikes)
    try:
        with striker:
            result = run(on, spec, lambda status: setattr(striker, "status", status))
        outcome.wrong = differences(result, reference)
        outcome.resized = result.resized
        outcome.generations, outcome.epochs = result.state.generation, result.state.epoch
        outcome.rungs = " ".join("+".join(i.rungs) for i in result.status.incidents)
        outcome.executions = result.truth.executions
        outcome.other = result.status.ledger_us["other"] / result.status.owed_us
        _tell_orders(outcome, result, reference, striker.done)
        await_nothing_left(on.folder / "ram")
    except Exception as e:
        outcome.wrong = ["".join(traceback.format_exception(e))]
    outcome.landed += [s.what for s, line in zip(strikes, striker.done, strict=False) if line.endswith("killed")]
    outcome.strikes, outcome.wall_s = striker.done, time.monotonic() - began
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


def _tell_orders(outcome: Outcome, result: Result, reference: Result, told: list[str]) -> None:
    """Of each strike that was ordered: what was done, by the injector's words, and how it scored."""
    scores = score(result.records, None if result.resized else result.digest == reference.digest)
    done = [s for s in scores if s.truth and not s.truth.startswith(NOT_DONE)]
    outcome.ordered, outcome.found = len(done), sum(s.passed for s in done)
    for number, strike in enumerate(plan(outcome.seed)[1]):
        own = [s for s in scores if s.by == _by(number)]
        if own and all(s in done for s in own):
            outcome.landed.append(strike.what)
        for s in own:
            verdict = "" if s.passed else f" [{s.found[:120] or 'not found'}]"
            told[number] += f"; {s.truth[:120] or 'not told'}{verdict}"


# --- the sweep ---


def sweep(
    folder: Path, seeds: range, console: Console, journals: Path | None, results: Path | None
) -> tuple[list[Outcome], list[str]]:
    """Every seed, each printed and kept as it ends; the outcomes, and what has grown over the sweep."""
    outcomes: list[Outcome] = []
    with rig(folder) as on:
        references = {mesh: untouched(on, mesh) for mesh in dict.fromkeys(plan(seed)[0] for seed in seeds)}
        before = take_census(on)
        for seed in seeds:
            outcome = run_seed(on, seed, references[plan(seed)[0]], journals)
            outcomes.append(outcome)
            console.print(_line(outcome), markup=False)
            if results is not None:
                keep(outcome, results)
        after, grown = await_no_growth(on, before)
        console.print(_census_table(before, after))
    return outcomes, grown


def _line(o: Outcome) -> str:
    verdict = "ok" if not o.wrong else f"WRONG: {'; '.join(o.wrong)[:2000]}"
    return f"seed {o.seed} [{o.mesh}] {o.wall_s:.0f} s: {verdict}\n   " + "\n   ".join(o.strikes)


def table(outcomes: list[Outcome]) -> Table:
    shown = Table("seed", "mesh", "strikes", "landed", "rungs", "generations", "epochs", "steps run", "other", "holds")
    for o in outcomes:
        shown.add_row(
            str(o.seed),
            o.mesh,
            ", ".join(strike.partition(":")[0] for strike in o.strikes),
            str(len(o.landed)),
            o.rungs or "-",
            str(o.generations),
            str(o.epochs),
            f"{o.executions} of {STEPS}",
            f"{o.other:.2%}",
            "NO" if o.wrong else "within tolerance" if o.resized else "yes",
        )
    return shown


def summary(outcomes: list[Outcome]) -> str:
    """In lines: how many, what was done to them, and what does not hold."""
    kinds = Counter(what for o in outcomes for what in o.landed)
    walls = sorted(o.wall_s for o in outcomes)
    return "\n".join(
        [
            f"{len(outcomes)} seeds, {kinds.total()} strikes landed: "
            + ", ".join(f"{what} {count}" for what, count in sorted(kinds.items())),
            f"{sum(o.found for o in outcomes)} of {sum(o.ordered for o in outcomes)} ordered faults score as passed",
            f"{sum(o.resized for o in outcomes)} with a mesh of another size for a while",
            f"seconds: median {statistics.median(walls):.0f}, longest {walls[-1]:.0f}",
            f"failed: {[o.seed for o in outcomes if o.wrong] or 'none'}",
        ]
    )


def _census_table(before: Census, after: Census) -> Table:
    shown = Table("what is left behind", "before", "after")
    for name in ("ours", "zombies", "shared_memory", "actors", "placement_groups"):
        shown.add_row(name, str(len(getattr(before, name))), str(len(getattr(after, name))))
    for name in ("descriptors", "event_queues", "socket_files", "sockets"):
        for who, count in getattr(after, name).items():
            if who in getattr(before, name):
                shown.add_row(f"{name} of {who}", str(getattr(before, name)[who]), str(count))
    return shown


def kept(path: Path) -> list[Outcome]:
    """The outcomes that stand in a file, by seed; none where there is no file."""
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return [Outcome(**row) for row in rows]


def keep(outcome: Outcome, path: Path) -> None:
    """Add an outcome to those of a file, in the place of an earlier one of its seed."""
    outcomes = sorted([outcome, *(o for o in kept(path) if o.seed != outcome.seed)], key=lambda o: o.seed)
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(o)) for o in outcomes) + "\n]\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=60, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"), help="folder of the runs; made anew")
    parser.add_argument("--journals", type=Path, help="keep the journals in this folder, for benchmarks/predicted.py")
    parser.add_argument("--json", type=Path, help="add each outcome to this file, and sum up all that stand there")
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    console = Console(width=170, highlight=False, soft_wrap=True)
    seeds = range(given.first, given.first + given.seeds)
    outcomes, grown = sweep(given.out.absolute(), seeds, console, given.journals, given.json)
    console.print(table(outcomes))
    for line in grown:
        console.print(f"grown: {line}", style="red", markup=False)
    console.print(summary(kept(given.json) if given.json else outcomes), markup=False)
    return 1 if grown or any(o.wrong for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
