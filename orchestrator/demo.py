"""The demo: two real runs on a local cluster of several Ray nodes, one untouched, one under fire, and their comparison.

The run under fire loses a worker to SIGKILL, and later a whole node: its raylet, its agent, its workers and its memory.
Everything that the outcome claims is read from what the runs left behind: the commit records, the journals, the ledger.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator import preflight
from orchestrator.chaos import faults
from orchestrator.core import events as ev
from orchestrator.localcluster import local_cluster
from orchestrator.observe import live
from orchestrator.observe.status import Status
from orchestrator.runtime import driver, journal
from orchestrator.runtime.controller import namespace_of
from orchestrator.spec import JobSpec, parse
from storage.commits import read_commit, state_digest, verify

NODES = 4
SPARES = 1
SLOTS_PER_NODE = 2


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the demo found. It holds only if all of `checks` do."""

    checks: dict[str, bool]
    identical: bool
    state_digest: dict[str, str]
    """Run to the digest of its final parameters, moments and RNG."""
    incidents: list[dict[str, Any]]
    injected: list[dict[str, Any]]
    ledger: dict[str, float]
    """Label to node-seconds of the run under fire."""
    wall_clock_s: float
    nodes: int
    loss: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    untouched_wall_clock_s: float
    versions: dict[str, str]
    status: Status

    @property
    def holds(self) -> bool:
        return all(self.checks.values())

    def document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"holds": self.holds, **dataclasses.asdict(self)}


def job(name: str, steps: int, out: Path) -> JobSpec:
    """The demo's job: 5 million parameters at pp 2 x dp 2 x tp 2 on four nodes and a spare."""
    return parse(
        {
            "run": {
                "name": name,
                "url": str(out / name),
                "steps": steps,
                "seed": 1,
                "validation_interval_steps": steps,
            },
            "model": {"preset": "demo_5m"},
            "data": {"seq_len": 128, "global_batch": 8, "validation_batches": 4},
            "parallel": {"pp": 2, "dp_replicate": 2, "tp": 2, "microbatches": 2},
            "optimizer": {"lr": 3e-3, "warmup_steps": max(1, steps // 6)},
            "checkpoint": {"interval_steps": max(1, steps // 3)},
            # Two cores carry eight ranks here: a reservation is a place, not a processor.
            "cluster": {"slots_per_node": SLOTS_PER_NODE, "spares": SPARES, "log_dir": str(out / "logs")},
        }
    )


def run(steps: int, out: Path) -> Outcome:
    """Run both, and compare. Takes a few minutes."""
    for mine in ("untouched", "under-fire", "logs"):
        shutil.rmtree(out / mine, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    console = live.new_console()
    untouched, fire = job("untouched", steps, out), job("under-fire", steps, out)
    for spec in (untouched, fire):
        preflight.check_local(spec, resume=False)
    console.print(f"starting {NODES + SPARES} Ray nodes on this machine ...")
    with local_cluster(NODES + SPARES, SLOTS_PER_NODE):
        console.rule("first, the run that nobody touches")
        reference = _train(untouched, lambda status: None)
        if reference.exit_code != 0:
            raise driver.RunError(f"the untouched run did not reach its end: {reference.failure or reference.verdict}")
        console.rule("now the same run under fire")
        chaos = Chaos(fire, console)
        status = _train(fire, chaos)
    return _compare(untouched, reference, fire, status, chaos.injected)


class Chaos:
    """Kills a worker once a third of the steps is done, and a node once two thirds are."""

    def __init__(self, spec: JobSpec, console: Console) -> None:
        self.injected: list[faults.Injected] = []
        self._spec, self._console = spec, console
        self._namespace = namespace_of(spec.run.name)

    def __call__(self, status: Status) -> None:
        due = (len(self.injected) + 1) * self._spec.run.steps // 3
        if status.job != "training" or len(self.injected) == 2 or status.step < due:
            return
        active = [node for node, state in status.nodes.items() if state == "active"]
        if not self.injected:
            rank = self._spec.parallel.world_size - 1
            holder = status.mesh[rank // self._spec.cluster.slots_per_node]
            self._console.print(f"        SIGKILL for the worker of rank {rank} on {holder}", style="bold red")
            done = faults.kill_worker(self._namespace, holder, rank, status.step)
        else:
            node = status.mesh[1]
            assert node in active
            self._console.print(f"        SIGKILL for every process of node {node}", style="bold red")
            done = faults.kill_node(self._namespace, node, self._spec.run.name, status.step)
        self.injected.append(done)


def _train(spec: JobSpec, on_status: Callable[[Status], None]) -> Status:
    preflight.check_cluster(spec)
    controller, token = driver.start(spec, detached=False)
    with live.view(spec) as show:

        def news(status: Status, lines: list[str]) -> None:
            show(status, lines)
            on_status(status)

        status = driver.follow(controller, token, news)
    if status.failure or status.exit_code != 0:
        live.print_end(status, str(driver.run_log_dir(spec)))
    _await_release(spec)
    return status


def _await_release(spec: JobSpec) -> None:
    """The next run wants the same nodes: wait until this one's controller has gone."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            driver.find(spec.run.name)
        except driver.RunError:
            return
        time.sleep(0.2)
    raise driver.RunError(f"the controller of {spec.run.name} did not end within 30 s")


def _compare(
    untouched: JobSpec, reference: Status, fire: JobSpec, status: Status, injected: list[faults.Injected]
) -> Outcome:
    digests, versions, problems = {}, {}, []
    for spec in (untouched, fire):
        if (spec is untouched and reference.exit_code == 0) or (spec is fire and status.exit_code == 0):
            commit = read_commit(spec.run.url, spec.run.steps)
            problems += verify(spec.run.url, commit)
            digests[spec.run.name] = state_digest(spec.run.url, commit)
            versions[spec.run.name] = commit.versions
    identical = len(digests) == 2 and len(set(digests.values())) == 1
    records = journal.read(fire.run.url)
    loss, validation = curves(records)
    reference_loss, _ = curves(journal.read(untouched.run.url))
    replayed = journal.replay(records).state
    causes = [(i.cause, i.rung) for i in status.incidents]
    checks = {
        "both runs ended in good order": reference.exit_code == 0 and status.exit_code == 0,
        "the final state is bit-identical to the untouched run's": identical,
        "both were made by the same versions and numeric class": len(set(map(repr, versions.values()))) == 1,
        "every step's loss is the untouched run's": bool(loss) and loss == reference_loss,
        "both checkpoints read back with the right digests": not problems,
        "the worker's death was found and mended": ("signal", "replace") in causes,
        "the node's death was found and mended": any(cause == "node" and rung for cause, rung in causes),
        "the validation loss fell": len(validation) > 1 and validation[-1][1] < validation[0][1],
        "the ledger adds up to wall-clock x nodes": _adds_up(status),
        "replaying the journal reproduces every decision": replayed.exit_code == status.exit_code,
    }
    return Outcome(
        checks=checks,
        identical=identical,
        state_digest=digests,
        incidents=[dataclasses.asdict(i) for i in status.incidents],
        injected=[dataclasses.asdict(i) for i in injected],
        ledger=status.ledger_s,
        wall_clock_s=status.wall_clock_s,
        nodes=status.places,
        loss=loss,
        validation=validation,
        untouched_wall_clock_s=reference.wall_clock_s,
        versions=versions.get(fire.run.name, {}),
        status=status,
    )


def _adds_up(status: Status) -> bool:
    """In whole microseconds: nothing is in flight once a run has ended."""
    return sum(status.ledger_us.values()) == status.owed_us == round(status.wall_clock_s * 1e6) * status.places


def curves(records: list[journal.Record]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The loss of every step (the last execution's), and the validation losses, from a journal."""
    loss: dict[int, float] = {}
    validation: dict[int, float] = {}
    for record in records:
        match record.event:
            case ev.StepsDone() as done:
                for step, value in zip(range(done.first, done.last + 1), done.loss_millionths, strict=False):
                    loss[step] = value / 1e6
            case ev.Validated() as validated:
                validation[validated.step] = validated.loss_millionths / 1e6
    return sorted(loss.items()), sorted(validation.items())


def show(outcome: Outcome) -> None:
    """Print what was found."""
    import plotext

    console = live.new_console()
    console.rule("the outcome")
    if outcome.loss:
        steps, losses = zip(*outcome.loss, strict=True)
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plot_size(90, 16)
        plotext.plot(list(steps), list(losses))
        plotext.title("loss of the run under fire, nats per token")
        plotext.xlabel("step")
        print(plotext.build())
    for step, value in outcome.validation:
        console.print(f"validation loss at step {step}: {value:.4f}")
    live.print_incidents(console, outcome.status)
    live.print_ledger(console, outcome.status)
    goodput = outcome.status.goodput or 0.0
    console.print(
        f"goodput (productive / all node-time, spares and start-up counted): {goodput:.1%} of "
        f"{outcome.wall_clock_s:.0f} s x {outcome.nodes} nodes; the untouched run took "
        f"{outcome.untouched_wall_clock_s:.0f} s"
    )
    for check, holds in outcome.checks.items():
        console.print(("[green]yes[/]" if holds else "[red] NO[/]") + f"  {check}")
    for name, digest in outcome.state_digest.items():
        console.print(f"     state of {name}: {digest}")
