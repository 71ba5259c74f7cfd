"""Prometheus metrics of a run, read from the controller's picture of it at each scrape.

Counters come from the ledger and the journaled incidents, so they survive a controller's restart and do not fall. (A
resume after the loss of the head's disk lacks the last records before it, up to 30 s; and what nodes were doing between
the last record and a resume counts as paused: counters may come back lower by that.) Each
is there from the first scrape on, at 0 for the causes, rungs and faults that have not come up: `increase` does not see
a series that is born at 1. Names follow Prometheus' conventions: base units, `_total` for counters, `_seconds` for
time. Labels hold names of a bounded set only, never text from an error.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from orchestrator.chaos.orders import NOT_DONE, SCENARIOS
from orchestrator.core.state import IN_QUARANTINE, JOB_STATES, TRUSTS
from orchestrator.observe.status import Status, nodes_by_state
from orchestrator.spec import JobSpec

SCRAPE_DEADLINE_S = 5.0
"""For the controller's loop to give its picture; Prometheus' own default scrape timeout is 10 s."""
NODE_INCIDENT_SERIES = 1000
"""Pairs of node and cause that are told apart. Llama 3's 419 interruptions in 54 days on 16,384 GPUs are fewer."""

CAUSES = {
    "node": "the node was lost",
    "signal": "a worker was killed by a signal",
    "exit": "a worker's process ended without last words",
    "hang": "a worker showed no sign of life or made no progress",
    "slow": "a node computed more slowly than its peers, and a spare took its place",
    "exception": "an exception in a worker",
    "memory": "a worker was out of memory",
    "audit": "the loss or the gradient norm was not finite",
    "corrupt": "a rank's state changed at rest, or is the odd one among its replicas",
    "diverged": "replicas differ, and which of them is wrong cannot be told",
    "unclean": "a rank's state was corrupt or had diverged, and it left no word",
    "state": "a snapshot or checkpoint was refused as damaged",
    "store": "a checkpoint could not be read, because the store failed",
    "start": "a generation did not come up",
    "save": "the last checkpoint could not be saved",
    "collective": "an exchange between ranks broke, and nothing else explains it",
    "leave": "a node was about to be taken away, and another took its place",
    "update": "somebody has asked for another job",
    "grow": "nodes were back, and the mesh became larger again",
}
RUNGS = ("resume", "replace", "spare", "shrink", "grow", "durable")
PHASES = ("teardown", "restart", "restore", "first_step")

Family = CounterMetricFamily | GaugeMetricFamily


def serve_metrics(spec: JobSpec, status: Callable[[], Status], loop: asyncio.AbstractEventLoop) -> int:
    """Serve /metrics where the spec says; `status` is called on `loop`. Returns the port.

    Raises:
        OSError: the port is taken.
    """

    def scrape() -> Status:
        told: Future[Status] = Future()

        def tell() -> None:
            try:
                told.set_result(status())
            except Exception as error:
                told.set_exception(error)

        loop.call_soon_threadsafe(tell)
        return told.result(SCRAPE_DEADLINE_S)

    registry = CollectorRegistry()
    server, _ = start_http_server(spec.metrics.port, spec.metrics.bind, registry)
    registry.register(_Run(scrape, spec))
    return int(server.server_port)


class _Run(Collector):
    def __init__(self, scrape: Callable[[], Status], spec: JobSpec) -> None:
        self._scrape, self._spec = scrape, spec

    def describe(self) -> Iterable[object]:
        return []  # known only at a scrape

    def collect(self) -> Iterable[Family]:
        return families(self._scrape(), self._spec)


def families(s: Status, spec: JobSpec) -> Iterable[Family]:
    """The metrics of one picture. Each has the label `run`."""
    for part in (_progress, _time, _checkpoints, _nodes, _incidents, _recoveries):
        for family in part(s, spec):
            if family.samples:  # a family with nothing to tell yet would be a name without a value
                yield family


def _progress(s: Status, spec: JobSpec) -> Iterable[Family]:
    run = spec.run.name
    yield _gauge(run, "step", "Completed steps of the current history; falls when a recovery gives steps up.", s.step)
    if not spec.is_script:
        target = s.total_steps or spec.run.steps  # an update may have changed it since this controller began
        yield _gauge(run, "steps_target", "Steps that the run is to do.", target)
    yield _gauge(run, "steps_high_water", "Most steps ever completed; never falls.", s.high_water)
    yield _gauge(run, "loss", "Mean training loss of the newest step, nats per token.", s.loss)
    yield _gauge(run, "gradient_norm", "Global gradient norm of the newest step before clipping.", s.grad_norm)
    yield _gauge(run, "learning_rate", "Learning rate of the newest step.", s.lr)
    yield _gauge(
        run, "tokens_per_second", "Training throughput over the newest steps of the current generation.", s.tokens_per_s
    )
    yield _gauge(run, "step_seconds", "Mean time of the newest steps of the current generation, in seconds.", s.step_s)
    yield _gauge(run, "epoch", "Controllers that this run has had, resumes and restarts.", s.epoch)
    yield _gauge(run, "generation", "Assignments of slots to workers that this run has had.", s.generation)
    hold = "1 while the journal cannot be written and nothing is decided."
    yield _gauge(run, "hold", hold, float(bool(s.hold)))
    states = {(state,): float(state == s.job) for state in JOB_STATES}
    yield _labelled(
        run, GaugeMetricFamily, "job_state", "1 for the state that the run is in, 0 for the others.", ("state",), states
    )
    yield _gauge(run, "exit_code", "Exit code of a run that has ended; absent before.", s.exit_code)


def _time(s: Status, spec: JobSpec) -> Iterable[Family]:
    run = spec.run.name
    yield _gauge(
        run,
        "goodput_ratio",
        "Productive node-seconds over all settled node-seconds since the run was first declared.",
        s.goodput,
    )
    yield _gauge(run, "places", "Nodes that the run pays for: the mesh's and the spares.", s.places)
    text = "Replicas (dp_replicate) of the mesh; fewer than the job's while it is shrunk."
    yield _gauge(run, "replicas", text, s.replicas)
    yield _gauge(run, "replicas_target", "Replicas of the whole mesh.", s.replicas_declared)
    text = "1 while the mesh is one of recovery.fallback_meshes, else 0."
    yield _gauge(run, "fallback_mesh", text, int(bool(s.fallback)))
    text = "Node-seconds by ledger label; with the step in flight they add up to wall-clock x places."
    seconds = {(label,): value for label, value in s.ledger_s.items()}
    yield _labelled(run, CounterMetricFamily, "node_seconds", text, ("label",), seconds)
    text = "Slots of generations that came up, by the process that filled each."
    filled = {(process,): n for process, n in s.processes.items()}
    yield _labelled(run, CounterMetricFamily, "slots_filled", text, ("process",), filled)


def _checkpoints(s: Status, spec: JobSpec) -> Iterable[Family]:
    run = spec.run.name
    age, newest = s.newest_checkpoint_age_s, s.newest_checkpoint
    yield _gauge(run, "checkpoint_step", "Step of the newest committed checkpoint.", newest)
    yield _gauge(run, "checkpoint_age_seconds", "Seconds since the newest committed checkpoint was committed.", age)
    yield _gauge(run, "checkpoint_interval_steps", "Steps between checkpoints, as it is in force.", s.save_every_steps)
    text = "Step of the newest verified checkpoint."
    yield _gauge(run, "checkpoint_verified_step", text, s.newest_verified)
    text = "Seconds since the newest verified checkpoint was committed; while none is verified, the oldest one."
    yield _gauge(run, "checkpoint_verified_age_seconds", text, s.newest_verified_age_s)
    trusts = Counter(c.trust for c in s.trust)
    standing: dict[tuple[str, ...], float] = {(trust,): trusts[trust] for trust in TRUSTS}
    yield _labelled(run, GaugeMetricFamily, "checkpoints", "Checkpoints by trust.", ("trust",), standing)
    read: dict[tuple[str, ...], float] = {(outcome,): n for outcome, n in s.verifications.items()}
    text = "Checkpoints that nodes were asked to read back, by what came of it."
    yield _labelled(run, CounterMetricFamily, "checkpoint_verifications", text, ("outcome",), read)
    failing = "1 while the newest save or commit of a checkpoint has failed and none has succeeded since."
    yield _gauge(run, "checkpoint_failing", failing, float(bool(s.save_error)))
    text = "Newest step whose snapshots all have copies on other nodes; absent where none are made."
    yield _gauge(run, "copy_step", text, s.copied_step)
    text = "Saves and commits of checkpoints that failed."
    yield _labelled(run, CounterMetricFamily, "checkpoint_failures", text, (), {(): s.saves_failed})


def _nodes(s: Status, spec: JobSpec) -> Iterable[Family]:
    run = spec.run.name
    states = {(state,): count for state, count in nodes_by_state(s).items()}
    yield _labelled(run, GaugeMetricFamily, "nodes", "Nodes by state.", ("state",), states)
    strikes = {(node,): count for node, count in s.strikes.items()}
    text = "Failures charged to a node that still count."
    yield _labelled(run, GaugeMetricFamily, "node_strikes", text, ("node",), strikes)
    quarantined = {(node,): 1.0 for node, state in s.nodes.items() if state in IN_QUARANTINE}
    yield _labelled(run, GaugeMetricFamily, "node_quarantined", "1 for a node in quarantine.", ("node",), quarantined)
    text = "1 for a node that computes more slowly than its peers in the current generation."
    yield _labelled(run, GaugeMetricFamily, "node_slow", text, ("node",), {(node,): 1.0 for node in s.slow})


def _incidents(s: Status, spec: JobSpec) -> Iterable[Family]:
    run = spec.run.name
    judged = [i for i in s.incidents if i.teardown_s is not None]  # until then, the cause may still change
    causes = _counts(CAUSES, (i.cause for i in judged))
    yield _labelled(
        run,
        CounterMetricFamily,
        "incidents",
        "Interruptions by cause, counted once the cause is judged.",
        ("cause",),
        causes,
    )

    cost = dict.fromkeys(causes, 0.0)
    for i in judged:
        if i.total_s is not None:
            cost[i.cause,] += i.cost_node_s
    text = "Node-seconds of detection, recovery, waiting and recomputation that recovered interruptions cost."
    yield _labelled(run, CounterMetricFamily, "incident_node_seconds", text, ("cause",), cost)

    struck: Counter[tuple[str, ...]] = Counter()
    for i in judged:
        if i.culprit and ((i.culprit, i.cause) in struck or len(struck) < NODE_INCIDENT_SERIES):
            struck[i.culprit, i.cause] += 1
    text = f"Interruptions by the node that they struck; of at most {NODE_INCIDENT_SERIES} pairs of node and cause."
    yield _labelled(run, CounterMetricFamily, "node_incidents", text, ("node", "cause"), struck)

    injected = [f for f in s.faults if f.injected_at is not None and not f.detail.startswith(NOT_DONE)]
    done = _counts(SCENARIOS, (f.fault for f in injected))
    text = "Faults that chaos has put into the run."
    yield _labelled(run, CounterMetricFamily, "faults_injected", text, ("fault",), done)


def _recoveries(s: Status, spec: JobSpec) -> Iterable[Family]:
    run = spec.run.name
    closed = [i for i in s.incidents if i.total_s is not None]
    rungs = _counts(RUNGS, (i.rung for i in closed))
    yield _labelled(run, CounterMetricFamily, "recoveries", "Interruptions recovered, by rung.", ("rung",), rungs)

    spent: dict[tuple[str, ...], float] = defaultdict(float)
    for (rung,) in rungs:
        spent |= {(rung, phase): 0.0 for phase in PHASES}
    for i in closed:
        for phase in PHASES:
            spent[i.rung, phase] += getattr(i, f"{phase}_s") or 0.0
    text = "Seconds of recoveries by rung and phase."
    yield _labelled(run, CounterMetricFamily, "recovery_seconds", text, ("rung", "phase"), spent)

    lost = {(): sum(i.steps_lost for i in closed)}
    yield _labelled(run, CounterMetricFamily, "steps_lost", "Completed steps that recoveries gave up.", (), lost)
    text = "Generations opened since a step was last completed for the first time."
    yield _gauge(run, "recoveries_without_progress", text, s.recoveries_without_progress)
    text = "Generations without one new step that end the run."
    yield _gauge(run, "recoveries_without_progress_limit", text, spec.recovery.recoveries_without_progress)


def _gauge(run: str, name: str, text: str, value: float | None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"shepherd_{name}", text, labels=["run"])
    if value is not None:
        family.add_metric([run], value)
    return family


def _labelled(
    run: str,
    kind: type[Family],
    name: str,
    text: str,
    labels: tuple[str, ...],
    values: Mapping[Any, float],
) -> Family:
    """A family with the values of `labels`, beside `run`, to its samples."""
    family = kind(f"shepherd_{name}", text, labels=["run", *labels])
    for key, value in values.items():
        family.add_metric([run, *key], value)
    return family


def _counts(known: Iterable[str], seen: Iterable[str]) -> dict[tuple[str, ...], float]:
    """How often each was seen, 0 for those of `known` that were not."""
    counts = Counter(seen)
    return {(name,): counts[name] for name in dict.fromkeys((*known, *counts))}
