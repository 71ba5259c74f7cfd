"""What an agent tells the controller, and the two folds that turn many ranks' messages into few events.

Ranks report each step; the agent folds its ranks into one `NodeStep`, the controller folds the nodes into `StepsDone`.
The core sees only the latter. A report is sent again until the controller has acknowledged it, so the folds take
every report as often as it comes, and tell what it completes once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

from orchestrator.core import events as ev
from orchestrator.core.events import Snapshot
from orchestrator.core.recovery import UNCLEAN
from orchestrator.runtime import blame, hangs
from orchestrator.runtime.stragglers import WINDOW_STEPS, Slow, StragglerWatch
from trainer import contract

_Teller = TypeVar("_Teller")
_Report = TypeVar("_Report")


@dataclass(frozen=True, kw_only=True)
class NodeReady:
    """All ranks of the node stand before their first step; durations of the slowest."""

    generation: int
    step: int
    rendezvous_us: int
    build_us: int
    restore_us: int
    versions: dict[str, str]
    """The numeric class of the node's ranks, for the commit record."""
    processes: dict[str, int] = field(default_factory=dict)
    """How many of the node's slots are filled by which kind of process; see contract.PROCESSES."""


@dataclass(frozen=True, kw_only=True)
class NodeStep:
    """All ranks of the node have completed `step`; durations of the slowest since the step before."""

    generation: int
    step: int
    step_us: int
    data_us: int
    checkpoint_us: int
    validation_us: int
    tokens: int
    loss: float | None
    grad_norm: float | None
    lr: float | None
    save_us: int = 0
    """The durable save's part of `checkpoint_us`."""
    copied_step: int = 0
    """The newest step of which all snapshots have copies on other nodes; 0: none."""


@dataclass(frozen=True, kw_only=True)
class OwnTimes:
    """How long ranks computed, without their waits for others: in the window of steps that ends with `step`."""

    generation: int
    step: int
    own_us: dict[int, int]
    """Rank to the median over the window of its own time in a step."""
    wall_us: int
    """Of the whole window, by the clock."""


@dataclass(frozen=True, kw_only=True)
class NodeFinished:
    generation: int
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Halted:
    generation: int
    snapshots: dict[int, tuple[Snapshot, ...]]
    parked: bool = False
    """Whether all of its workers live, and wait for their next assignment."""


@dataclass(frozen=True, kw_only=True)
class HaltedAlike:
    """Halted, and each slot of the node's place holds the same: so nodes that hold the same can be told of together."""

    generation: int
    snapshots: tuple[Snapshot, ...]
    parked: bool = False


@dataclass(frozen=True, kw_only=True)
class StartFailed:
    generation: int
    error: str


@dataclass(frozen=True, kw_only=True)
class Exited:
    generation: int
    rank: int
    exit_code: int | None
    signal: int | None


Report = (
    NodeReady
    | NodeStep
    | OwnTimes
    | NodeFinished
    | Halted
    | HaltedAlike
    | StartFailed
    | Exited
    | contract.Failed
    | contract.ShardWritten
    | contract.SaveFailed
    | contract.Validated
    | contract.Damaged
    | contract.Injected
    | hangs.Silent
    | hangs.Stalled
)

FOLDED = (NodeReady, NodeStep, OwnTimes, NodeFinished, HaltedAlike)
"""What several nodes can tell as one report; all else is one node's."""

# Steps whose details an agent keeps for a controller that comes back: at a step a second, a quarter of an hour.
KEPT_STEPS = 1000
# Checkpoints whose parts wait for the order to commit them; that order comes within seconds, the next checkpoint later.
KEPT_CHECKPOINTS = 4

# Newest steps whose saves and validations a controller that comes back is told again.
KEPT_SAVES = 3


@dataclass
class NodeFold:
    """One generation on one node: contract messages of its ranks in, reports out."""

    generation: int
    ranks: tuple[int, ...]
    restored: dict[int, contract.Restored] = field(default_factory=dict)
    finished: dict[int, contract.Finished] = field(default_factory=dict)
    phases: dict[int, contract.Phase] = field(default_factory=dict)
    """Where each rank is; the last one before a silence tells where it hangs."""
    failed: set[int] = field(default_factory=set)
    reached: dict[int, int] = field(default_factory=dict)
    """Rank to the newest step that it has told, from its start on."""
    _done: int = 0
    """Newest step that was reported."""
    _steps: dict[int, dict[int, contract.StepDone]] = field(default_factory=dict)
    _validation_us: dict[int, dict[int, int]] = field(default_factory=dict)
    """Step to rank to the time of the validation after that step: a part of the next one's."""
    _own_us: dict[int, list[int]] = field(default_factory=dict)
    """Rank to its own times of the steps of the window under way."""
    _wall_us: int = 0

    def feed(self, message: contract.FromWorker) -> list[Report]:
        """The reports that this message completes."""
        assert message.generation == self.generation, (message, self.generation)
        if isinstance(message, (contract.Restored, contract.StepDone)):
            self.reached[message.rank] = message.step
        match message:
            case contract.Phase():
                self.phases[message.rank] = message
            case contract.Restored():
                if _complete(self.restored, (message.rank,), message, len(self.ranks)):
                    return [self._ready()]
            case contract.StepDone() if message.step > self._done:
                if _complete(self._steps.setdefault(message.step, {}), (message.rank,), message, len(self.ranks)):
                    return self._step(message.step)
            case contract.Finished():
                if _complete(self.finished, (message.rank,), message, len(self.ranks)):
                    return [NodeFinished(generation=self.generation, step=message.step, reason=message.reason)]
            case contract.Injected():
                return [message]
            case contract.Failed():
                self.failed.add(message.rank)
                return [message]
            case contract.ShardWritten() | contract.SaveFailed() | contract.Damaged():
                return [message]
            case contract.Validated():
                self._validation_us.setdefault(message.step, {})[message.rank] = message.validate_us
                return [message]
        return []

    def _ready(self) -> NodeReady | StartFailed:
        ranks = self.restored.values()
        if len({r.step for r in ranks}) > 1:
            steps = {rank: self.restored[rank].step for rank in self.ranks}
            return StartFailed(generation=self.generation, error=f"ranks restored different steps: {steps}")
        return NodeReady(
            generation=self.generation,
            step=next(iter(ranks)).step,
            rendezvous_us=max(r.rendezvous_us for r in ranks),
            build_us=max(r.build_us for r in ranks),
            restore_us=max(r.restore_us for r in ranks),
            versions=_shared([r.versions for r in ranks]),
            processes=dict(sorted(Counter(r.process for r in ranks).items())),
        )

    def _step(self, step: int) -> list[Report]:
        ranks = self._steps.pop(step).values()
        self._done = step
        return [self._node_step(step, ranks), *self._own_times(step, ranks)]

    def _own_times(self, step: int, ranks: Collection[contract.StepDone]) -> list[Report]:
        for rank in ranks:
            if rank.own_us is not None:
                self._own_us.setdefault(rank.rank, []).append(rank.own_us)
        self._wall_us += max(rank.step_us for rank in ranks)
        if step % WINDOW_STEPS:
            return []
        medians = {rank: round(median(own_us)) for rank, own_us in sorted(self._own_us.items())}
        wall_us, self._own_us, self._wall_us = self._wall_us, {}, 0
        if len(medians) < len(self.ranks):
            return []
        return [OwnTimes(generation=self.generation, step=step, own_us=medians, wall_us=wall_us)]

    def _node_step(self, step: int, ranks: Collection[contract.StepDone]) -> NodeStep:
        validations = self._validation_us.pop(step - 1, {})
        teller = next((r for r in ranks if r.loss is not None), None)
        return NodeStep(
            generation=self.generation,
            step=step,
            step_us=max(r.step_us for r in ranks),
            data_us=max(r.data_us for r in ranks),
            checkpoint_us=max(r.snapshot_us + r.save_us for r in ranks),
            validation_us=max(validations.values(), default=0),
            tokens=max(r.tokens for r in ranks),
            loss=teller.loss if teller else None,
            grad_norm=teller.grad_norm if teller else None,
            lr=teller.lr if teller else None,
            save_us=max(r.save_us for r in ranks),
            copied_step=min(r.copied_step for r in ranks),
        )


def halted(
    generation: int, slots: Collection[int], held: dict[int, tuple[Snapshot, ...]], parked: bool
) -> Halted | HaltedAlike:
    """What a node answers that has halted `generation`, in which it filled `slots`, and whose memory holds `held`."""
    first = next(iter(held.values()), ())
    if (not held or sorted(held) == sorted(slots)) and all(snapshots == first for snapshots in held.values()):
        return HaltedAlike(generation=generation, snapshots=first, parked=parked)
    return Halted(generation=generation, snapshots=held, parked=parked)


def slower(one: NodeStep, other: NodeStep) -> NodeStep:
    """Both nodes have done this step; durations of the slower, loss and norm of the one that tells them."""
    assert (one.generation, one.step) == (other.generation, other.step), (one, other)
    teller = other if one.loss is None else one
    return NodeStep(
        generation=one.generation,
        step=one.step,
        step_us=max(one.step_us, other.step_us),
        data_us=max(one.data_us, other.data_us),
        checkpoint_us=max(one.checkpoint_us, other.checkpoint_us),
        save_us=max(one.save_us, other.save_us),
        validation_us=max(one.validation_us, other.validation_us),
        tokens=max(one.tokens, other.tokens),
        loss=teller.loss,
        grad_norm=teller.grad_norm,
        lr=teller.lr,
        copied_step=min(one.copied_step, other.copied_step),
    )


def still_true(facts: list[Report], report: Report) -> list[Report]:
    """What of `facts` a controller that comes back must still be told once `report` is, too.

    Of saves and validations the newest are enough; and that a save has failed is over once a later try is written.
    """
    if isinstance(report, contract.ShardWritten):
        facts = [f for f in facts if not (isinstance(f, contract.SaveFailed) and f.step <= report.step)]
    if isinstance(report, (contract.ShardWritten, contract.SaveFailed, contract.Validated)):
        steps = {f.step for f in facts if isinstance(f, type(report))} | {report.step}
        oldest = sorted(steps)[-KEPT_SAVES:][0]
        facts = [f for f in facts if not isinstance(f, type(report)) or f.step >= oldest]
    return facts


@dataclass
class MeshFold:
    """One generation over all its nodes: reports in, core events out."""

    generation: int
    nodes: tuple[str, ...]
    ranks: int
    done: int
    """Steps told to the core so far."""
    ready: dict[str, NodeReady] = field(default_factory=dict)
    finished: dict[str, NodeFinished] = field(default_factory=dict)
    parts: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    """Step to rank to that rank's part of the checkpoint, of the newest KEPT_CHECKPOINTS steps."""
    last: NodeStep | None = None
    """The newest step whose loss and norm are told."""
    versions: dict[str, str] = field(default_factory=dict)
    """The numeric class that all nodes share; what differs between them reads "mixed"."""
    watch: blame.MeshWatch = field(init=False)
    stages: int = 1
    """Pipeline stages: the ranks of each do the same work, as far as `loads` says so."""
    loads: tuple[int, ...] = (1,)
    """Microbatches that each replica takes in a step."""
    slow_before: dict[int, str] = field(default_factory=dict)
    """Slot to the node on which it was slow, over all generations."""
    unclean: bool = False
    """Whether a rank has said that state was found corrupt, its own or another's: all ranks learn it in one step."""
    unseen: list[tuple[str, int]] = field(default_factory=list)
    """Node and rank of those who hang, or may, and whose stacks are to be fetched and kept."""
    unrecorded: list[tuple[str, int]] = field(default_factory=list)
    """Node and rank of those whose flight records are to be."""
    _stragglers: StragglerWatch = field(init=False)
    _newest: dict[str, int] = field(init=False)
    """Each node's newest step."""
    _standing: Counter[int] = field(init=False)
    """How many nodes stand at which step; none where they are not. Ranks are at most a step apart, so it is short."""
    _steps: dict[int, NodeStep] = field(default_factory=dict)
    """Steps after `done`, of those nodes that have told them."""
    _write_us: dict[int, int] = field(default_factory=dict)
    _validated: int = -1
    """Newest step whose validation was told to the core; new weights are validated as step 0."""
    _save_failed: int = -1
    """Newest step of which a failed save was told to the core."""

    def __post_init__(self) -> None:
        self.watch = blame.MeshWatch(self.nodes, self.ranks // self.stages)
        self._stragglers = StragglerWatch(self.nodes, self.ranks, self.stages, self.slow_before, self.loads)
        self._newest = dict.fromkeys(self.nodes, 0)
        self._standing = Counter({0: len(self.nodes)})

    def feed(self, at: int, tellers: Iterable[str], report: Report) -> list[ev.Event]:
        """The events that this report of these nodes completes, at time `at`. Only what is FOLDED has many tellers."""
        nodes = [node for node in tellers if node in self._newest]
        if report.generation != self.generation or not nodes:
            return []
        match report:
            case NodeReady() | NodeStep() | NodeFinished():
                for node in nodes:
                    self.watch.goes_on(node)
            case contract.Failed() | Exited():
                self.watch.has_lost_one()
        match report:
            case NodeReady():
                return self._all_ready(at) if _complete(self.ready, nodes, report, len(self.nodes)) else []
            case NodeStep():
                return self._step(at, nodes, report)
            case OwnTimes():
                return [self._slow(at, s) for s in self._stragglers.feed(report.step, report.own_us, report.wall_us)]
            case NodeFinished():
                if _complete(self.finished, nodes, report, len(self.nodes)):
                    step, reason = report.step, report.reason
                    return [ev.GenerationFinished(at=at, generation=self.generation, step=step, reason=reason)]
            case HaltedAlike():
                return [
                    ev.NodesHalted(
                        at=at,
                        nodes=tuple(nodes),
                        generation=self.generation,
                        snapshots=report.snapshots,
                        parked=report.parked,
                    )
                ]
            case _:
                (node,) = nodes
                return self._feed_one(at, node, report)
        return []

    def _feed_one(self, at: int, node: str, report: Report) -> list[ev.Event]:
        """What only one node can tell."""
        match report:
            case hangs.Silent() | hangs.Stalled():
                return self._hung(at, self.watch.feed(node, report))
            case contract.ShardWritten():
                return self._part(at, report)
            case contract.SaveFailed() if report.step > self._save_failed:
                self._save_failed = report.step
                return [ev.CheckpointFailed(at=at, step=report.step, error=f"rank {report.rank}: {report.error}")]
            case contract.Validated() if report.step > self._validated and math.isfinite(report.loss):
                self._validated = report.step
                loss = round(report.loss * 1_000_000)
                return [ev.Validated(at=at, generation=self.generation, step=report.step, loss_millionths=loss)]
            case contract.Damaged():
                return [
                    ev.CopyDamaged(
                        at=at,
                        node=report.node or node,
                        generation=self.generation,
                        slot=report.rank,
                        step=report.step,
                        detail=report.detail,
                    )
                ]
            case contract.Injected():
                return [ev.FaultInjected(at=at, number=report.number, detail=report.detail)]
            case contract.Failed():
                self.unclean |= report.kind in UNCLEAN
                return [
                    ev.WorkerFailed(
                        at=at,
                        node=node,
                        generation=report.generation,
                        slot=report.rank,
                        step=report.step,
                        kind=report.kind,
                        error=report.error,
                    )
                ]
            case Exited():
                return [
                    ev.WorkerExited(
                        at=at,
                        node=node,
                        generation=report.generation,
                        slot=report.rank,
                        exit_code=report.exit_code,
                        signal=report.signal,
                    )
                ]
            case Halted():
                return [
                    ev.NodeHalted(
                        at=at,
                        node=node,
                        generation=self.generation,
                        snapshots=report.snapshots,
                        parked=report.parked,
                    )
                ]
            case StartFailed():
                return [ev.GenerationFailed(at=at, generation=self.generation, node=node, error=report.error)]
        return []

    def _slow(self, at: int, found: Slow) -> ev.Event:
        return ev.NodeSlow(
            at=at,
            node=found.node,
            generation=self.generation,
            detail=found.detail,
            slot=found.slot,
            workload=found.workload,
        )

    def _hung(self, at: int, verdicts: list[blame.Hung]) -> list[ev.Event]:
        self.unseen += [verdict.seen for verdict in verdicts]
        self.unrecorded += dict.fromkeys(teller for verdict in verdicts for teller in verdict.recorded)
        return [
            ev.WorkerHung(
                at=at,
                node=verdict.node,
                generation=self.generation,
                slot=verdict.slot,
                step=verdict.step,
                detail=f"{verdict.detail}; {self._evidence(verdict)}",
            )
            for verdict in verdicts
        ]

    def _evidence(self, verdict: blame.Hung) -> str:
        told = f"stack in {stack_name(self.generation, verdict.seen[1])}"
        records = [record_name(self.generation, rank) for _, rank in verdict.recorded]
        return f"{told} and flight records in {', '.join(records)}" if records else told

    def _all_ready(self, at: int) -> list[ev.Event]:
        nodes = self.ready.values()
        if len({n.step for n in nodes}) > 1:
            steps = {node: self.ready[node].step for node in self.nodes}
            error = f"nodes restored different steps: {steps}"
            return [ev.GenerationFailed(at=at, generation=self.generation, node="", error=error)]
        self.versions = _shared([n.versions for n in nodes])
        processes: Counter[str] = Counter()
        for node in nodes:
            processes.update(node.processes)
        return [
            ev.GenerationReady(
                at=at,
                generation=self.generation,
                step=next(iter(nodes)).step,
                rendezvous_us=max(n.rendezvous_us for n in nodes),
                build_us=max(n.build_us for n in nodes),
                restore_us=max(n.restore_us for n in nodes),
                processes=dict(sorted(processes.items())),
            )
        ]

    def _step(self, at: int, nodes: list[str], report: NodeStep) -> list[ev.Event]:
        for node in nodes:
            self._reach(node, report.step)
        if report.step <= self.done:
            return []
        before = self._steps.get(report.step)
        told = self._steps[report.step] = report if before is None else slower(before, report)
        if told.loss is not None and (self.last is None or told.step >= self.last.step):
            self.last = told
        last = min(self._standing)
        if last <= self.done:
            return []
        first, self.done = self.done + 1, last
        # Details of a step may be missing after a controller's restart; the time is settled all the same.
        steps = [self._steps.pop(step) for step in range(first, last + 1) if step in self._steps]
        losses = [step.loss for step in steps if step.loss is not None and math.isfinite(step.loss)]
        if len(losses) != last + 1 - first:
            losses = []  # which is whose could not be told any more
        straggling_us, self._stragglers.straggling_us = self._stragglers.straggling_us, 0
        return [
            ev.StepsDone(
                at=at,
                generation=self.generation,
                first=first,
                last=last,
                data_wait_us=sum(step.data_us for step in steps),
                checkpoint_us=sum(step.checkpoint_us for step in steps),
                validation_us=sum(step.validation_us for step in steps),
                tokens=sum(step.tokens for step in steps),
                loss_millionths=tuple(round(loss * 1_000_000) for loss in losses),
                save_us=sum(step.save_us for step in steps),
                straggling_us=straggling_us,
            )
        ]

    def _reach(self, node: str, step: int) -> None:
        before = self._newest[node]
        if step <= before:
            return
        self._newest[node] = step
        self._standing[step] += 1
        self._standing[before] -= 1
        if not self._standing[before]:
            del self._standing[before]

    def _part(self, at: int, report: contract.ShardWritten) -> list[ev.Event]:
        parts = self.parts.setdefault(report.step, {})
        self._write_us[report.step] = max(self._write_us.get(report.step, 0), report.write_us)
        complete = _complete(parts, (report.rank,), report.part, self.ranks)
        while len(self.parts) > KEPT_CHECKPOINTS:
            oldest = min(self.parts)
            del self.parts[oldest], self._write_us[oldest]
        if not complete or report.step not in self.parts:
            return []
        size = sum(int(part["data_bytes"]) for part in parts.values())
        return [
            ev.CheckpointWritten(
                at=at,
                generation=self.generation,
                step=report.step,
                bytes=size,
                write_us=self._write_us[report.step],
            )
        ]


def stack_name(generation: int, rank: int) -> str:
    """Where under run.url the stacks of a rank that hung are kept."""
    return f"evidence/g{generation}-r{rank}-stack.txt"


def record_name(generation: int, rank: int) -> str:
    """Where under run.url a rank's newest collectives are kept, by its flight recorder."""
    return f"evidence/g{generation}-r{rank}-flight.json"


def _complete(told: dict[_Teller, _Report], tellers: Iterable[_Teller], report: _Report, of: int) -> bool:
    """Note what is reported by those who have not done so before; whether now all have, for the first time."""
    new = [teller for teller in tellers if teller not in told]
    told.update(dict.fromkeys(new, report))
    return bool(new) and len(told) == of


def _shared(versions: Sequence[dict[str, str]]) -> dict[str, str]:
    """Each entry that all have alike; "mixed" where they differ."""
    first = versions[0]
    names = dict.fromkeys(name for each in versions for name in each)
    return {n: first[n] if all(each.get(n) == first.get(n) for each in versions) else "mixed" for n in names}
