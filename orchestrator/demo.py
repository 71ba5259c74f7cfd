"""The demo: two real runs on a local cluster of several Ray nodes, one untouched, one under fire, and their comparison.

Under fire, a worker is killed, bits of another's memory are flipped, the controller is killed, and a whole node: its
raylet, its agent, its workers and its memory. Everything that the outcome claims is read from what the runs left
behind: the commit records, the journals, the ledger.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator import preflight
from orchestrator.chaos import command, scorecard
from orchestrator.chaos.orders import SCENARIOS, Order
from orchestrator.chaos.scorecard import Score
from orchestrator.localcluster import local_cluster
from orchestrator.observe import live, prometheus
from orchestrator.observe.report import write_report
from orchestrator.observe.report_curves import curves
from orchestrator.observe.status import Status
from orchestrator.runtime import driver, journal
from orchestrator.spec import JobSpec, parse
from storage.commits import read_commit, state_digest, verify

NODES = 4
SPARES = 2  # one for the node whose memory is corrupt, one for the node that dies
SLOTS_PER_NODE = 2

ORDERS = (
    Order(scenario="worker-kill", rank=7),
    Order(scenario="flip", rank=2, tensors="exp_avg_sq", seed=1),
    Order(scenario="controller-kill"),
    Order(scenario="node-kill", seed=1),
)
"""One after the other, at even distances over the run."""

RULES = Path(__file__).resolve().parent.parent / "deploy" / "prometheus" / "shepherd.rules.yml"
SCRAPE_INTERVAL_S = 1.0
"""A run of two minutes wants more points than the 15 s of a real one give."""
MARKER = "made-by-shepherd-demo"
"""A file in the folder of the runs: what lies there may be removed."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the demo found. It holds only if all of `checks` do."""

    checks: dict[str, bool]
    identical: bool
    state_digest: dict[str, str]
    """Run to the digest of its final parameters, moments and RNG."""
    incidents: list[dict[str, Any]]
    scores: tuple[Score, ...]
    """What became of each fault."""
    report: str
    """The page that tells the run under fire."""
    look: str
    """How to look at its metrics."""
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
        return {"holds": self.holds, **dataclasses.asdict(self), "scores": [score.document() for score in self.scores]}


def job(name: str, steps: int, out: Path) -> JobSpec:
    """The demo's job: 5 million parameters at pp 2 x dp 2 x tp 2 on four nodes and two spares."""
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
    make_anew(out)
    console = live.new_console()
    untouched, fire = job("untouched", steps, out), job("under-fire", steps, out)
    for spec in (untouched, fire):
        preflight.check_local(spec, resume=False)
    console.print(f"starting {NODES + SPARES} Ray nodes on this machine ...")
    missing = _unwatched()
    with (
        local_cluster(NODES + SPARES, SLOTS_PER_NODE),
        prometheus.recording(out / "prometheus", RULES, SCRAPE_INTERVAL_S)
        if not missing
        else nullcontext() as recorder,
    ):
        console.rule("first, the run that nobody touches")
        reference = _train(untouched, lambda status: None, recorder)
        if reference.exit_code != 0:
            raise driver.RunError(f"the untouched run did not reach its end: {reference.failure or reference.verdict}")
        console.rule("now the same run under fire")
        status = _train(fire, Chaos(fire, console), recorder)
    look = missing or prometheus.hint(out / "prometheus", fire.run.name)
    return _compare(untouched, reference, fire, status, out / "report.html", look)


def make_anew(out: Path) -> None:
    """Make the folder, without what an earlier demo has left. Raises RunError when that is not known to be a demo's."""
    mine = [out / name for name in ("untouched", "under-fire", "logs", "prometheus")]
    there, marker = [path for path in mine if path.exists()], out / MARKER
    if there and not marker.exists():
        raise driver.RunError(f"--out: {there[0]} is there, and no demo has made it: remove it, or name another folder")
    for path in there:
        shutil.rmtree(path, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    marker.touch()


class Chaos:
    """Gives the ORDERS, as `shepherd chaos` does."""

    def __init__(self, spec: JobSpec, console: Console) -> None:
        self._spec, self._console = spec, console
        self._given = 0

    def __call__(self, status: Status) -> None:
        if self._given == len(ORDERS) or status.job != "training":
            return
        if status.step < (self._given + 1) * self._spec.run.steps // (len(ORDERS) + 1):
            return
        order = ORDERS[self._given]
        name, log_dir = self._spec.run.name, self._spec.cluster.log_dir
        self._console.print(f"        chaos: {SCENARIOS[order.scenario]}", style="bold red")
        command.give(driver.find(name), driver.read_token(log_dir, name), order, by="the demo")
        self._given += 1


def _unwatched() -> str:
    """Why nobody keeps the metrics; empty when Prometheus can."""
    if shutil.which("prometheus") is None:
        return (
            "Prometheus is not installed here, so nobody kept the metrics; docs/monitoring.md says how to look at them."
        )
    if not RULES.exists():
        return f"There are no rules at {RULES}, so nobody kept the metrics: run the demo from Shepherd's source tree."
    return ""


def _train(spec: JobSpec, on_status: Callable[[Status], None], recorder: prometheus.Recorder | None) -> Status:
    preflight.check_cluster(spec)
    controller, token = driver.start(spec, detached=False)
    with live.view(spec) as show:

        def news(status: Status, lines: list[str]) -> None:
            show(status, lines)
            if recorder is not None:
                recorder.scrape(status.metrics_address)
            on_status(status)

        status = driver.follow(spec.run.name, controller, token, news)
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


def _compare(untouched: JobSpec, reference: Status, fire: JobSpec, status: Status, report: Path, look: str) -> Outcome:
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
    scores = tuple(scorecard.score(records, identical))
    write_report(fire.run.url, report)
    checks = {
        "both runs ended in good order": reference.exit_code == 0 and status.exit_code == 0,
        "the final state is bit-identical to the untouched run's": identical,
        "both were made by the same versions and numeric class": len(set(map(repr, versions.values()))) == 1,
        "every step's loss is the untouched run's": bool(loss) and loss == reference_loss,
        "both checkpoints read back with the right digests": not problems,
        "every fault was found, charged to the right place and mended": (
            len(scores) == len(ORDERS) and all(score.passed for score in scores)
        ),
        "the node with corrupt memory was quarantined": "quarantined" in status.nodes.values(),
        "the validation loss fell": len(validation) > 1 and validation[-1][1] < validation[0][1],
        "the ledger adds up to wall-clock x nodes": _adds_up(status),
        "replaying the journal reproduces every decision": replayed.exit_code == status.exit_code,
    }
    return Outcome(
        checks=checks,
        identical=identical,
        state_digest=digests,
        incidents=[dataclasses.asdict(i) for i in status.incidents],
        scores=scores,
        report=str(report),
        look=look,
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
    scorecard.show(console, outcome.scores)
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
    console.print(f"the run under fire, told as one page: {outcome.report}")
    print(outcome.look)
