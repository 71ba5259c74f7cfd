"""Prometheus metrics of a run, read from the controller's picture of it at each scrape.

Counters come from the ledger and the journalled incidents, so they survive a controller's restart and never fall.
Names follow Prometheus' conventions: base units, `_total` for counters, `_seconds` for time.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from orchestrator.core.state import JOB_STATES
from orchestrator.observe.status import Status, nodes_by_state
from orchestrator.spec import JobSpec

SCRAPE_DEADLINE_S = 5.0
"""For the controller's loop to give its picture; Prometheus' own default scrape timeout is 10 s."""


def serve_metrics(spec: JobSpec, status: Callable[[], Status], loop: asyncio.AbstractEventLoop) -> int:
    """Serve /metrics where the spec says; `status` is called on `loop`. Returns the port.

    Raises:
        OSError: the port is taken.
    """

    async def picture() -> Status:
        return status()

    def scrape() -> Status:
        return asyncio.run_coroutine_threadsafe(picture(), loop).result(SCRAPE_DEADLINE_S)

    registry = CollectorRegistry()
    server, _ = start_http_server(spec.metrics.port, spec.metrics.bind, registry)
    registry.register(_Run(scrape))
    return int(server.server_port)


class _Run(Collector):
    def __init__(self, scrape: Callable[[], Status]) -> None:
        self._scrape = scrape

    def describe(self) -> Iterable[object]:
        return []  # known only at a scrape

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        return families(self._scrape())


def families(s: Status) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
    """The metrics of one picture. Each has the label `run`."""

    def gauge(name: str, text: str, value: float | None) -> Iterable[GaugeMetricFamily]:
        if value is not None:
            family = GaugeMetricFamily(f"shepherd_{name}", text, labels=["run"])
            family.add_metric([s.run], value)
            yield family

    def many(family: CounterMetricFamily | GaugeMetricFamily, values: dict[tuple[str, ...], float]) -> None:
        for labels, value in values.items():
            family.add_metric([s.run, *labels], value)

    yield from gauge("step", "Completed steps of the current history.", s.step)
    yield from gauge("steps_target", "Steps that the run is to do.", s.total_steps)
    yield from gauge("steps_high_water", "Most steps ever completed.", s.high_water)
    yield from gauge("loss", "Mean training loss of the newest step, nats per token.", s.loss)
    yield from gauge("gradient_norm", "Global gradient norm of the newest step before clipping.", s.grad_norm)
    yield from gauge("learning_rate", "Learning rate of the newest step.", s.lr)
    yield from gauge("tokens_per_second", "Training throughput over the newest steps.", s.tokens_per_s)
    yield from gauge("goodput_ratio", "Productive node-seconds over all node-seconds of the run.", s.goodput)
    yield from gauge("places", "Nodes that the run pays for: the mesh's and the spares.", s.places)
    yield from gauge("epoch", "Controllers that this run has had.", s.epoch)
    yield from gauge("generation", "Assignments of slots to workers that this run has had.", s.generation)
    yield from gauge("hold", "1 while the journal cannot be written and nothing is decided.", float(bool(s.hold)))
    yield from gauge(
        "checkpoint_age_seconds", "Since the newest committed checkpoint was committed.", s.newest_checkpoint_age_s
    )
    yield from gauge(
        "checkpoint_step", "Step of the newest committed checkpoint.", s.checkpoints[-1] if s.checkpoints else None
    )

    seconds = CounterMetricFamily(
        "shepherd_node_seconds",
        "Node-seconds by ledger label; they add up to wall-clock x places.",
        labels=["run", "label"],
    )
    many(seconds, {(label,): value for label, value in s.ledger_s.items()})
    yield seconds

    nodes = GaugeMetricFamily("shepherd_nodes", "Nodes by state.", labels=["run", "state"])
    many(nodes, {(state,): count for state, count in nodes_by_state(s).items()})
    yield nodes

    job = GaugeMetricFamily("shepherd_job_state", "1 for the state that the run is in.", labels=["run", "state"])
    many(job, {(state,): float(state == s.job) for state in JOB_STATES})
    yield job

    closed = [i for i in s.incidents if i.total_s is not None]
    incidents = CounterMetricFamily("shepherd_incidents", "Interruptions by cause.", labels=["run", "cause"])
    judged = [i for i in s.incidents if i.teardown_s is not None]  # until then, the cause may still change
    many(incidents, {(cause,): n for cause, n in Counter(i.cause for i in judged).items()})
    yield incidents

    recoveries = CounterMetricFamily("shepherd_recoveries", "Interruptions recovered, by rung.", labels=["run", "rung"])
    many(recoveries, {(rung,): n for rung, n in Counter(i.rung for i in closed).items()})
    yield recoveries

    duration = CounterMetricFamily(
        "shepherd_recovery_seconds", "Seconds of recoveries by rung and phase.", labels=["run", "rung", "phase"]
    )
    spent: dict[tuple[str, ...], float] = defaultdict(float)
    for i in closed:
        for phase in ("teardown", "restart", "restore", "first_step"):
            spent[i.rung, phase] += getattr(i, f"{phase}_s") or 0.0
    many(duration, spent)
    yield duration

    lost = CounterMetricFamily("shepherd_steps_lost", "Completed steps that recoveries gave up.", labels=["run"])
    many(lost, {(): sum(i.steps_lost for i in closed)})
    yield lost
