"""Flipped bits: every one that changes the state is found in its step, with the right rank, and leaves no trace.

    python tests/chaos/flips.py --flips 300 --clean-steps 2000

Bits of parameters and of both moments are flipped through the run's own road for chaos: single bits, runs and zeroed
neighbours, on one to four ranks at once, several times in each run. The truth comes from the injector in the worker,
the verdict from the journal; nothing goes from the one to the other.

A flip on a rank whose generation already stops, because another one's was found, changes nothing that lives on: it is
called too late and not counted. Whether it truly was is checked in the workers' output: that rank itself has found
nothing.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bootstrap  # noqa: F401  (before Ray)
import ray
from rich.console import Console
from rich.table import Table
from rig import Result, Rig, differences, rig, run

from orchestrator.chaos import command
from orchestrator.chaos.orders import PATTERNS, Order
from orchestrator.chaos.scorecard import NO_EFFECT, Score, score
from orchestrator.core import events as ev
from orchestrator.observe.status import Status
from orchestrator.runtime import driver
from orchestrator.spec import JobSpec

KINDS = ("model", "exp_avg", "exp_avg_sq")
STEPS = 80
ROUNDS_A_RUN = 8
CLEAN_RUN_STEPS = 500
PAUSE_S = 0.25
"""In each step while flips are still due, so that those of one round meet the same step."""
LEFT_STEPS = 10
"""No flip is ordered so near the end: it might have no step left in which to be found."""
FIRST_STEP = 3
"""Before, the moments are still zero."""
MESH = {"pp": 2, "dp_replicate": 2, "microbatches": 2}
RANKS = 4
LOOK_S = 0.1
TOLD_WITHIN_S = 10.0
ASK_DEADLINE_S = 120.0


@dataclass(frozen=True)
class Flip:
    """One injection, what was done and what was found."""

    score: Score
    pattern: str
    done_after_step: int
    found_at_step: int | None
    """Steps completed, by the words of the worker that found its state changed."""
    too_late: bool
    """Its generation was over: another flip of the same round had been found, and this rank's own check came before."""

    @property
    def kind(self) -> str:
        match = re.search(r" in (\w+)/", self.score.truth)
        return match.group(1) if match else ""

    @property
    def effective(self) -> bool:
        return not self.score.truth.startswith(NO_EFFECT) and not self.too_late

    @property
    def held(self) -> bool:
        """Found in the step after which it was done, at the right rank, and recovered; or rightly not found."""
        if not self.effective:
            return self.found_at_step is None and self.score.identical is True
        return self.score.passed and self.found_at_step == self.done_after_step


@dataclass
class Outcome:
    flips: list[Flip] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """How runs differ from the clean one; and false alarms."""
    not_done: int = 0
    """Orders that met a worker that was gone already, or that was gone before it could tell."""


class Flipper(threading.Thread):
    """Orders flips in rounds, each once the run trains on after the one before."""

    def __init__(self, on: Rig, spec: JobSpec, rounds: int, seed: int) -> None:
        super().__init__(name="flipper", daemon=True)
        self._on, self._spec, self._rounds = on, spec, rounds
        self._chance = random.Random(seed)
        self.orders: list[Order] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._flip_all()
        except Exception as e:  # told by the run's own outcome
            self.error = e
        self._on.pause(self._spec.run.name, 0.0)

    def _flip_all(self) -> None:
        controller, token = _wait(lambda: _found(self._spec))
        at_least = FIRST_STEP
        for _ in range(self._rounds):
            status = _wait(lambda least=at_least: _trains(controller, least))
            if status.step > self._spec.run.steps - LEFT_STEPS:
                return
            before = len(self.orders)
            for rank in self._chance.sample(range(RANKS), self._chance.randint(1, RANKS)):
                number = len(self.orders)
                order = Order(
                    scenario="flip",
                    rank=rank,
                    tensors=KINDS[number % len(KINDS)],
                    pattern=PATTERNS[number // len(KINDS) % len(PATTERNS)],
                    seed=self._chance.randrange(2**31),
                )
                command.give(controller, token, order, by="flips")
                self.orders.append(order)
            # They are found before the next step is done, so the mesh gets further only once that is over.
            numbers = range(before + 1, len(self.orders) + 1)
            at_least = 2 + max(status.step, *(_done_after(controller, number) for number in numbers))


def _found(spec: JobSpec) -> tuple[Any, str] | None:
    """A run's controller and token, once both are there."""
    try:
        return driver.find(spec.run.name), driver.read_token(spec.cluster.log_dir, spec.run.name)
    except driver.RunError:
        return None


def _trains(controller: Any, least_step: int) -> Status | None:
    """The run once it trains and has completed `least_step`."""
    status, _ = _told(controller)
    return status if status is not None and status.job == "training" and status.step >= least_step else None


def _told(controller: Any) -> tuple[Status | None, list[tuple[int, str]]]:
    """One look; nothing while the controller does not answer, as one that begins does not."""
    try:
        return driver.poll(controller)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return None, []


def _done_after(controller: Any, number: int) -> int:
    """The step after which fault `number` was done; 0 when it was not, or its worker was gone before it could tell."""
    deadline = time.monotonic() + TOLD_WITHIN_S
    while time.monotonic() < deadline:
        _, notices = _told(controller)
        for _, line in notices:
            if told := re.search(rf"fault {number} is done: (.*)", line):
                after = re.search(r"after step (\d+)$", told.group(1))
                return int(after.group(1)) if after else 0
        time.sleep(LOOK_S)
    return 0


def _wait(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + ASK_DEADLINE_S
    while not (value := look()):
        assert time.monotonic() < deadline, "the run does not come back to training"
        time.sleep(LOOK_S)
    return value


# --- runs ---


def spec_of_run(on: Rig, name: str, pause_s: float, steps: int, spares: int) -> JobSpec:
    return on.spec(
        name,
        pause_s,
        run={"steps": steps, "validation_interval_steps": steps},
        parallel=MESH,
        checkpoint={"interval_steps": 20},
        cluster={"spares": spares},
    )


def clean(on: Rig, name: str, steps: int) -> Result:
    """A run in which nobody flips anything, and in which nothing may be found."""
    result = run(on, spec_of_run(on, name, 0.0, steps, spares=0))
    assert result.status.incidents == (), f"a false alarm: {result.told}"
    return result


def flip_in_a_run(on: Rig, name: str, rounds: int, seed: int, reference: Result, outcome: Outcome) -> None:
    """Flip in up to `rounds` rounds in one run, and add what came of it to `outcome`."""
    spec = spec_of_run(on, name, PAUSE_S, reference.state.total_steps, spares=2)
    flipper = Flipper(on, spec, rounds, seed)
    flipper.start()
    try:
        result = run(on, spec)
    except AssertionError as e:
        outcome.wrong.append(f"{name}: {e}")
        return
    flipper.join(ASK_DEADLINE_S)
    if flipper.error is not None:
        outcome.wrong.append(f"{name}: {flipper.error!r}")
    outcome.wrong += [f"{name}: {what}" for what in differences(result, reference)]
    flips = read_flips(result, reference, flipper.orders, raised_in(spec))
    outcome.flips += flips
    outcome.not_done += len(flipper.orders) - len(flips)
    incidents = len(result.status.incidents)
    if incidents != len({f.score.incident for f in flips if f.found_at_step is not None}):
        outcome.wrong.append(f"{name}: {incidents} incidents, not those of the flips that were found")
    if not outcome.wrong and all(f.held for f in flips):
        shutil.rmtree(spec.run.url)


def raised_in(spec: JobSpec) -> set[tuple[int, int]]:
    """(generation, rank) of the workers that have found their own state changed, from their output."""
    logs = [path.read_text() for path in driver.run_log_dir(spec).glob("*.log")]
    found = (re.findall(r"^\[g(\d+) r(\d+)\] .*StateCorruptError", log, re.M) for log in logs)
    return {(int(generation), int(rank)) for of_one in found for generation, rank in of_one}


def read_flips(result: Result, reference: Result, orders: list[Order], raised: set[tuple[int, int]]) -> list[Flip]:
    """The truth and the verdict on each flip that was done, from the journal of its run."""
    events = [record.event for record in result.records]
    generations = [a["generation"] for r in result.records for a in r.actions if a["type"] == "InjectFault"]
    reports = [e for e in events if isinstance(e, ev.WorkerFailed) and e.kind == "corrupt"]
    flips = []
    scores = score(result.records, result.digest == reference.digest)
    for order, scored, generation in zip(orders, scores, generations, strict=True):
        after = re.search(r"after step (\d+)$", scored.truth)
        if after is None:
            continue
        report = next((r for r in reports if (r.generation, r.slot) == (generation, scored.rank)), None)
        stopped = any(r.generation == generation and r.step <= int(after.group(1)) for r in reports)
        flips.append(
            Flip(
                score=scored,
                pattern=order.pattern,
                done_after_step=int(after.group(1)),
                found_at_step=None if report is None else report.step,
                too_late=report is None and stopped and (generation, scored.rank) not in raised,
            )
        )
    return flips


def table(flips: list[Flip]) -> Table:
    shown = Table(
        "tensors", "pattern", "flips", "too late", "no effect", "found in their step", "right rank and node", "rungs"
    )
    for kind in (*KINDS, ""):
        for pattern in PATTERNS:
            some = [f for f in flips if f.kind == kind and f.pattern == pattern]
            if not some:
                continue
            effective = [f for f in some if f.effective]
            rungs = Counter(f.score.rung for f in effective)
            shown.add_row(
                kind or "(none hit)",
                pattern,
                str(len(some)),
                str(sum(f.too_late for f in some)),
                str(sum(not f.too_late and not f.effective for f in some)),
                f"{sum(f.found_at_step == f.done_after_step for f in effective)} of {len(effective)}",
                f"{sum(bool(f.score.right_rank and f.score.right_node) for f in effective)} of {len(effective)}",
                ", ".join(f"{rung or 'none'} {count}" for rung, count in sorted(rungs.items())),
            )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=300, help="how many at least")
    parser.add_argument("--first", type=int, default=0, help="seed of the first run of flips")
    parser.add_argument("--clean-steps", type=int, default=2000, help="steps in which nothing may be found; 0: none")
    parser.add_argument("--out", type=Path, default=Path("out/flips"), help="folder of the runs; made anew")
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    console = Console(width=150, highlight=False, soft_wrap=True)
    outcome = Outcome()
    clean_steps = 0
    with rig(given.out.absolute()) as on:
        if given.flips:
            reference = clean(on, "clean", STEPS)
        seed = given.first
        while sum(f.effective for f in outcome.flips) < given.flips and seed < given.first + given.flips:
            flip_in_a_run(on, f"flips-{seed}", ROUNDS_A_RUN, seed, reference, outcome)
            console.print(f"run {seed}: {len(outcome.flips)} flips so far, wrong: {outcome.wrong or 'nothing'}")
            seed += 1
        while clean_steps < given.clean_steps:
            clean_steps += clean(on, f"clean-{clean_steps}", CLEAN_RUN_STEPS).state.high_water
    console.print(table(outcome.flips))
    missed = [f for f in outcome.flips if not f.held]
    for flip in missed:
        console.print(f"NOT HELD: {flip}", style="red", markup=False)
    effective = sum(f.effective for f in outcome.flips)
    console.print(
        f"{len(outcome.flips)} flips, {effective} of them effective, {len(missed)} not held, {outcome.not_done} more "
        f"ordered and not done; no finding in {clean_steps} clean steps; wrong: {outcome.wrong or 'nothing'}"
    )
    return 1 if missed or outcome.wrong or effective < given.flips else 0


if __name__ == "__main__":
    sys.exit(main())
