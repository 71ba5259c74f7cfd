"""The run as people see it: one picture of the supervisor's state that status, metrics and the demo share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.core.goodput import Ledger
from orchestrator.core.state import NODE_STATES, USABLE, VERIFIED, Checkpoint, Fault, Incident, State


class NewestStep(Protocol):
    @property
    def loss(self) -> float | None: ...
    @property
    def grad_norm(self) -> float | None: ...
    @property
    def lr(self) -> float | None: ...
    @property
    def copied_step(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class IncidentStatus:
    """One interruption as a story. Durations in seconds; None for what has not come yet."""

    number: int
    cause: str
    culprit: str
    detail: str
    rung: str
    """The one that worked, or the last tried."""
    rungs: tuple[str, ...]
    reason: str
    step: int
    steps_lost: int
    at_s: float
    """When it was noticed, on the run's clock."""
    teardown_s: float | None
    """Until every worker of the old generation had ended."""
    restart_s: float | None
    """Copies between nodes, workers, rendezvous and model: until the state was to be restored."""
    restore_s: float | None
    first_step_s: float | None
    """From ready to the first completed step."""
    total_s: float | None
    processes: dict[str, int]
    """How many slots of the mesh that went on were filled by which kind of process; see docs/states.md."""
    cost_node_s: float


@dataclass(frozen=True, kw_only=True)
class CheckpointStatus:
    """What is thought of one checkpoint; see docs/states.md."""

    step: int
    generation: int
    """That wrote it; 0 when it is not known."""
    trust: str
    doubt: str
    """Who has found it damaged, and what, while another is to say; else empty."""
    by: str
    """Who has read it, or proven something of it."""
    why: str
    """What was read, or is wrong with it."""
    pinned: bool


@dataclass(frozen=True, kw_only=True)
class Status:
    run: str
    job: str
    epoch: int
    generation: int
    step: int
    total_steps: int
    """0: a script decides when it is done."""
    high_water: int
    loss: float | None
    grad_norm: float | None
    lr: float | None
    tokens_per_s: float | None
    step_s: float | None
    """Mean time of the newest steps."""
    wall_clock_s: float
    places: int
    goodput: float | None
    """Productive time over all time that is settled."""
    ledger_s: dict[str, float]
    """Label to node-seconds, settled."""
    ledger_us: dict[str, int]
    owed_us: int
    """Wall-clock x places in microseconds: what the ledger and its pending time add up to."""
    pending_us: int
    processes: dict[str, int]
    """How many slots of all generations that came up were filled by which kind of process."""
    incidents: tuple[IncidentStatus, ...]
    recoveries_without_progress: int
    """Generations opened since a step was last completed for the first time."""
    faults: tuple[Fault, ...]
    """Chaos that was ordered, with its ground truth."""
    nodes: dict[str, str]
    standings: dict[str, str]
    """Of those that may hold a slot and are not in good standing; see docs/states.md."""
    strikes: dict[str, int]
    """Failures charged to each node that is not lost and has any."""
    misread: dict[str, str]
    """Node to the checkpoint that it has found damaged and another found whole, as evidence for a strike."""
    slow: tuple[str, ...]
    """Nodes that were found to compute more slowly than their peers in the current generation."""
    mesh: tuple[str, ...]
    """Nodes of the current generation in mesh order."""
    replicas: int
    """dp_replicate of the current mesh; 0 before the run is declared."""
    replicas_declared: int
    """Of the whole mesh."""
    fallback: str
    """Degrees of the current mesh, while it is one of recovery.fallback_meshes; else empty."""
    checkpoints: tuple[int, ...]
    """Those that can be restored from, ascending."""
    trust: tuple[CheckpointStatus, ...]
    """All that are known, ascending."""
    verifying: int | None
    """The checkpoint that a node reads back now."""
    verifications: dict[str, int]
    """Outcome to how often it came out so; see docs/states.md."""
    newest_verified: int | None
    newest_verified_age_s: float | None
    """Since it was committed; while none is verified, since the oldest that can be restored from was."""
    newest_checkpoint: int | None
    """The step that a restore from durable storage would take; one beyond the last step belongs to a longer run."""
    newest_checkpoint_age_s: float | None
    save_every_steps: int
    """Between durable checkpoints, as it is in force."""
    save_every_why: str
    """The reason for it, where the controller has chosen it."""
    saves_failed: int
    save_error: str
    """The newest failure of a save; empty once a later one has succeeded."""
    hold: str
    failure: str
    ended: bool
    exit_code: int | None
    verdict: str
    metrics_address: str
    controller_pid: int
    tracebacks: dict[str, str] = field(default_factory=dict)
    copied_step: int | None = None
    """The newest step that another node holds, too, for every node that may die: as copies; 0: none. None where
    nobody copies."""

    def document(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)


def status_of(
    state: State,
    *,
    at: int,
    save_every_steps: int,
    hold: str,
    failure: str,
    ended: bool,
    metrics_address: str,
    newest: NewestStep | None,
    rates: Sequence[tuple[float, int, int]],
    tracebacks: dict[str, str],
) -> Status:
    """The picture at time `at`."""
    ledger = _ledger_at(state, at)
    settled = sum(ledger.totals.values())
    incidents = [*state.incidents, *([state.incident] if state.incident else [])]
    newest_step = state.newest_checkpoint()
    usable = [step for step, c in state.checkpoints.items() if c.trust in USABLE and step <= state.total_steps]
    verified = [step for step in usable if state.checkpoints[step].trust in VERIFIED]
    since = state.checkpoints[(verified[-1:] or usable[:1])[0]].committed_at if usable else at
    committed_at = state.checkpoints[newest_step].committed_at if newest_step is not None else 0
    return Status(
        run=state.run,
        job=state.job,
        epoch=state.epoch,
        generation=state.generation,
        step=state.step,
        total_steps=0 if state.is_open_ended else state.total_steps,
        high_water=state.high_water,
        loss=newest.loss if newest else None,
        grad_norm=newest.grad_norm if newest else None,
        lr=newest.lr if newest else None,
        copied_step=newest.copied_step if newest and state.order is not None and state.order.buddies else None,
        tokens_per_s=_tokens_per_s(rates),
        step_s=_step_s(rates),
        wall_clock_s=((ledger.mark if state.job == "ended" else at) - state.began_at) / 1e6,
        places=ledger.places,
        goodput=ledger.totals["productive"] / settled if settled else None,
        ledger_s={label: us / 1e6 for label, us in ledger.totals.items()},
        ledger_us={str(label): us for label, us in ledger.totals.items()},
        owed_us=ledger.owed,
        pending_us=ledger.pending_us,
        processes=dict(ledger.processes),
        incidents=tuple(_incident(i) for i in incidents),
        recoveries_without_progress=state.recoveries_without_progress,
        faults=tuple(dataclasses.replace(fault) for fault in state.faults),
        mesh=state.mesh,
        replicas=state.replicas,
        replicas_declared=state.layout.dp_replicate if state.layout is not None else 0,
        fallback=str(state.fallback or ""),
        nodes={name: node.state for name, node in state.nodes.items()},
        standings={
            name: standing
            for name, node in state.nodes.items()
            if node.state in ("active", "spare") and (standing := state.standing(name)) != "good"
        },
        strikes=_strikes(state, at),
        misread=dict(state.misread),
        slow=tuple(node for node, generation in state.slow.items() if generation == state.generation),
        checkpoints=tuple(step for step, c in state.checkpoints.items() if c.trust in USABLE),
        trust=tuple(_checkpoint(step, c, step in state.pinned) for step, c in state.checkpoints.items()),
        verifying=state.verification.step if state.verification is not None else None,
        verifications={str(outcome): n for outcome, n in state.verifications.items()},
        newest_verified=max(verified, default=None),
        newest_verified_age_s=(at - since) / 1e6 if usable else None,
        newest_checkpoint=newest_step,
        newest_checkpoint_age_s=(at - committed_at) / 1e6 if newest_step is not None else None,
        save_every_steps=save_every_steps,
        save_every_why=state.interval.why if state.interval is not None else "",
        saves_failed=state.saves_failed,
        save_error=state.save_error,
        hold=hold,
        failure=failure,
        ended=ended,
        exit_code=state.exit_code,
        verdict=state.verdict,
        metrics_address=metrics_address,
        controller_pid=os.getpid(),
        tracebacks=tracebacks,
    )


def _checkpoint(step: int, c: Checkpoint, pinned: bool) -> CheckpointStatus:
    return CheckpointStatus(
        step=step,
        generation=c.generation,
        trust=c.trust,
        doubt=f"{c.doubt.node}: {c.doubt.problem}" if c.doubt is not None else "",
        by=c.by,
        why=c.why,
        pinned=pinned,
    )


def _strikes(state: State, at: int) -> dict[str, int]:
    """Those that count at time `at`: the supervisor forgets the others when it next looks."""
    since = at - state.declared_limits.strike_expiry_us if state.limits is not None else 0
    counted = {name: sum(time > since for time in times) for name, times in state.strikes.items()}
    return {name: n for name, n in counted.items() if n}


def _ledger_at(state: State, at: int) -> Ledger:
    """The ledger as it is at `at`: a wait that no event interrupts is seen while it lasts, not when it is over."""
    ledger = dataclasses.replace(state.ledger, totals=dict(state.ledger.totals))
    if state.run and state.job != "ended":
        ledger.advance(max(at, ledger.mark))
    return ledger


def nodes_by_state(status: Status) -> dict[str, int]:
    """Every node state, also those that no node is in."""
    return {state: list(status.nodes.values()).count(state) for state in NODE_STATES}


def _incident(i: Incident) -> IncidentStatus:
    root = next((e for e in (i.answered or i.evidence) if e.kind == i.cause), (i.answered + i.evidence)[0])
    restore_s = i.restore_us / 1e6 if i.ready_at is not None else None
    ordered_to_ready = _between(i.halted_at, i.ready_at)
    return IncidentStatus(
        number=i.number,
        cause=i.cause or root.kind,
        culprit=i.culprit or root.node,
        detail=root.detail,
        rung=i.rungs[-1] if i.rungs else "",
        rungs=tuple(i.rungs),
        reason=i.reason,
        step=i.step,
        steps_lost=i.steps_lost,
        at_s=i.detected_at / 1e6,
        teardown_s=_between(i.detected_at, i.halted_at),
        restart_s=None if ordered_to_ready is None or restore_s is None else max(0.0, ordered_to_ready - restore_s),
        restore_s=restore_s,
        first_step_s=_between(i.ready_at, i.closed_at),
        total_s=_between(i.detected_at, i.closed_at),
        processes=dict(i.processes),
        cost_node_s=i.cost_us / 1e6,
    )


def _between(start: int | None, end: int | None) -> float | None:
    return None if start is None or end is None else (end - start) / 1e6


def _tokens_per_s(rates: Sequence[tuple[float, int, int]]) -> float | None:
    """Tokens of the newest steps over the time between the first and the last of them."""
    if len(rates) < 2 or rates[-1][0] <= rates[0][0]:
        return None
    return sum(tokens for _, _, tokens in rates[1:]) / (rates[-1][0] - rates[0][0])


def _step_s(rates: Sequence[tuple[float, int, int]]) -> float | None:
    """Time between the first and the last of the newest steps over their number."""
    if len(rates) < 2 or rates[-1][0] <= rates[0][0] or rates[-1][1] <= rates[0][1]:
        return None
    return (rates[-1][0] - rates[0][0]) / (rates[-1][1] - rates[0][1])
