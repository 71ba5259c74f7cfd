"""The training loop of one rank: one step, readable top to bottom, and what happens between steps.

Numbering: a state has `step` completed steps; step k is the k-th, the first is 1.

Once a step, one all-reduce over the world tells every rank what all must agree on before anybody's parameters change:
the mean loss, the gradient norm, whether to stop, and whether to begin a durable save or copies of snapshots. Before it
comes, a rank's snapshot of the step before is complete. A second one follows the audit,
which must come as late as it can: whether a rank's state was found corrupt. So either every rank takes the optimizer's
step or none does, all stop or save at the same boundary, and no rank is ever more than one step ahead of another.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, distributed
from torch.optim import AdamW

from trainer import optim
from trainer.audit import StateAudit, stop_on
from trainer.contract import CopyStep, Finished, Phase, StepDone, Validated, WorkerConfig
from trainer.copies import Copies
from trainer.own_time import OwnTime
from trainer.parallel import Stage, forward_backward, forward_only
from trainer.saves import Interval, Saves

if TYPE_CHECKING:
    from storage.checkpointer import Checkpointer
    from storage.state import TrainState
    from trainer.data import Dataset


log = logging.getLogger(__name__)


class NonFiniteError(ArithmeticError):
    """The loss or the gradient norm of a step is not finite; no rank has taken the optimizer's step."""


class Parking(Exception):
    """The agent has asked this rank to leave the generation and to keep its process."""


@dataclass
class Session:
    """Everything that one rank holds while it trains in one generation."""

    config: WorkerConfig
    generation: int
    rank: int
    stage: Stage
    optimizer: AdamW
    state: TrainState
    dataset: Dataset
    checkpointer: Checkpointer
    audit: StateAudit
    emit: Callable[[object], None]
    stop: threading.Event
    """Set when the agent has asked to stop; the loop ends at the next boundary on which all ranks agree."""
    interval: Interval
    """Between durable saves; the agent may change it."""
    parking: threading.Event = field(default_factory=threading.Event)
    """Set when the agent has asked to park; the loop ends at this rank's next boundary."""
    sends_copies: bool = False
    """Whether snapshots are copied to other nodes, as on all ranks or none."""
    copied_step: int = 0
    """The newest step whose copies have all arrived, in generations before; 0: none."""
    at_rest: threading.Lock = field(default_factory=threading.Lock)
    """Who holds it finds the state at rest and as the audit recorded it: the loop keeps it from the audit's check until
    the record that follows the optimizer. Chaos takes it to flip bits at rest only."""
    saves: Saves = field(init=False)
    copies: Copies = field(init=False)

    def __post_init__(self) -> None:
        self.saves = Saves(self.interval)
        self.copies = Copies(
            on=self.sends_copies,
            every_steps=self.config.checkpoint.copy_interval_steps,
            complete=self.copied_step,
            pin=self.checkpointer.pin_snapshots,
        )

    def phase(self, name: Literal["rendezvous", "build", "restore", "compute", "checkpoint", "validate"]) -> None:
        self.emit(Phase(generation=self.generation, rank=self.rank, step=self.state.step, phase=name))


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    lr: float
    data_us: int
    snapshot_us: int
    """Waiting for the snapshot of the step before to be complete."""
    stop: bool
    save: bool
    copying: int
    """Ranks whose copy to another node is under way."""
    not_copied: int
    """Ranks whose last such copy has failed."""


def train(session: Session, saved_step: int) -> None:
    """Train until `config.steps` or until all ranks agree to stop. The last state is always saved.

    Args:
        saved_step: the step of which a durable checkpoint exists already; -1 for none.

    Raises:
        NonFiniteError: on every rank alike, before the optimizer's step.
        StateCorruptError, StateDivergedError, PeerStateError: the same, by what the audit holds against this rank.
        Parking: the agent has asked for it.
    """
    config, state = session.config, session.state
    if state.step == 0:
        validate(session)
    session.phase("compute")
    boundary_us, save_us, stopped = _now_us(), 0, False
    own_time = OwnTime()
    while state.step < config.steps and not stopped:
        if session.parking.is_set():
            raise Parking(f"asked to park after step {state.step}")
        result = train_step(session)
        taken = state.step % config.checkpoint.snapshot_interval_steps == 0
        session.copies.agree(state.step, result.copying, result.not_copied, taken)
        snapshot_us = result.snapshot_us + (_snapshot(session) if taken else 0)
        # On an accelerator the host waits for its device with all its might.
        own_us = own_time.lap_us() if config.device == "cpu" else None
        step_us = _now_us() - boundary_us
        _report(session, result, step_us=step_us, snapshot_us=snapshot_us, save_us=save_us, own_us=own_us)
        boundary_us, save_us, stopped = _now_us(), 0, result.stop
        if state.step == config.steps or stopped:
            break
        if state.step % config.validation_interval_steps == 0:
            validate(session)
            session.phase("compute")
            # Its time is reported by itself, not once more as part of the next step.
            boundary_us = _now_us()
            own_time.lap_us()
        if result.save:
            save_us = session.saves.begin(session)
    session.checkpointer.await_snapshot()
    if saved_step != state.step:
        session.saves.save_last(session, check_last_state)
    if state.step == config.steps:
        validate(session)
    reason: Literal["completed", "stopped"] = "completed" if state.step == config.steps else "stopped"
    session.emit(Finished(generation=session.generation, rank=session.rank, step=state.step, reason=reason))


def train_step(session: Session) -> StepResult:
    """One step: batch, gradients, agreement, clipping, optimizer. `state.step` counts it when it returns."""
    config, state, optimizer = session.config, session.state, session.optimizer
    step = state.step + 1

    waited_from_us = _now_us()
    inputs_BT, targets_BT = _batch(session, session.dataset.batch, step)
    data_us = _now_us() - waited_from_us

    loss_share = forward_backward(session.stage, inputs_BT, targets_BT)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    waited_from_us = _now_us()
    session.checkpointer.await_snapshot()
    snapshot_us = _now_us() - waited_from_us
    wants_save, saves = session.saves.shares(session, step)
    copies, not_copied = session.copies.shares()
    squared_norm, loss, stops, saves_wanted, savers, copying, copies_failed = _sum_over_ranks(
        session,
        optim.squared_norm_share(parameters),
        loss_share,
        torch.tensor(session.stop.is_set()),
        torch.tensor(wants_save),
        torch.tensor(saves),
        torch.tensor(copies),
        torch.tensor(not_copied),
    )
    with session.at_rest:
        # After the wait for the slowest rank, which may be long: what changes in it is found, too.
        agree_on_state(session)
        grad_norm = math.sqrt(squared_norm)
        if config.audit.finite and not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteError(f"step {step}: loss {loss}, gradient norm {grad_norm}")

        optim.clip_gradients(parameters, grad_norm, config.optimizer.clip_norm)
        lr = optim.learning_rate(step, config.optimizer, config.steps)
        optim.set_learning_rate(optimizer, lr)
        session.checkpointer.await_reads()
        optimizer.step()
        state.step = step
        session.audit.record()
    optimizer.zero_grad()
    save = saves_wanted > 0 and savers == 0
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        data_us=data_us,
        snapshot_us=snapshot_us,
        stop=stops > 0,
        save=save,
        copying=int(copying),
        not_copied=int(copies_failed),
    )


def check_last_state(session: Session) -> None:
    """The audit that no further step will make, before the last state is saved.

    Raises:
        StateCorruptError, StateDivergedError, PeerStateError: as in `train_step`.
    """
    with session.at_rest:
        agree_on_state(session)


def agree_on_state(session: Session) -> None:
    """Audit the state at rest, and stop on every rank alike if any has a finding. Collective.

    Raises:
        StateCorruptError, StateDivergedError, PeerStateError: by what the audit holds against this rank.
    """
    config = session.config.audit
    if not (config.at_rest or config.replicas):
        return
    finding = session.audit.check()
    kind = None if finding is None else finding.kind
    found = (torch.tensor(kind == "corrupt"), torch.tensor(kind == "diverged"))
    corrupt, diverged = _sum_over_ranks(session, *found)
    stop_on(finding, int(corrupt), int(diverged))


def validate(session: Session) -> None:
    """Mean loss over `data.validation_batches` global batches of held-out text; rank 0 reports it."""
    started_us = _now_us()
    total = torch.zeros((), device=session.stage.device)
    count = session.config.data.validation_batches
    for index in range(count):
        session.phase("validate")  # with each batch, so that a long pass is seen to go on
        total += forward_only(session.stage, *_batch(session, session.dataset.validation_batch, index))
    (loss,) = _sum_over_ranks(session, total / count)
    if session.rank == 0:
        session.emit(
            Validated(
                generation=session.generation,
                rank=session.rank,
                step=session.state.step,
                loss=loss,
                validate_us=_now_us() - started_us,
            )
        )


def _batch(
    session: Session, read: Callable[[int, range], tuple[Tensor, Tensor]], number: int
) -> tuple[Tensor | None, Tensor | None]:
    """This rank's rows of global batch `number`, [B, T] each on its device; None what its stage does not need."""
    stage = session.stage
    if not (stage.is_first or stage.is_last):
        return None, None
    inputs_BT, targets_BT = read(number, stage.rows)
    return (
        inputs_BT.to(stage.device) if stage.is_first else None,
        targets_BT.to(stage.device) if stage.is_last else None,
    )


def _sum_over_ranks(session: Session, *shares: Tensor) -> list[float]:
    """Each scalar's sum over all ranks, in float64 and in one exchange; every rank gets the same bits.

    Raises:
        Parking: the agent has asked for it, so that on a GPU the sums may be anything.
    """
    device = session.stage.device
    sums = torch.stack([share.detach().to(device, torch.float64) for share in shares])
    distributed.all_reduce(sums)
    values = sums.tolist()
    # To abort NCCL's exchanges, this one and those of the gradients before it, is to end them without an error and with
    # whatever lies in their buffers. The order to park is known before that is done.
    if device.type == "cuda" and session.parking.is_set():
        raise Parking(f"asked to park in step {session.state.step + 1}")
    return values


def _snapshot(session: Session) -> int:
    """Copy the state to the RAM tier; the microseconds that training was blocked.

    A full memory file system costs snapshots, not the run: the reported `snapshot_step` stands still.
    """
    started_us = _now_us()
    session.state.per_rank.update(optim.random_state())
    state, step = session.state, session.state.step

    def done(error: Exception | None) -> None:
        if not session.copies.wants(step):
            return
        if error is not None:
            session.copies.ended(step, str(error))
        else:
            complete = session.copies.complete
            session.emit(CopyStep(generation=session.generation, rank=session.rank, step=step, complete=complete))

    try:
        session.checkpointer.snapshot(replace(state, per_rank=state.per_rank | session.audit.mark()), done)
    except OSError as error:
        log.error("step %d: no snapshot: %s", step, error)
        session.copies.ended(step, str(error))
    return _now_us() - started_us


def _report(
    session: Session, result: StepResult, step_us: int, snapshot_us: int, save_us: int, own_us: int | None
) -> None:
    config, reports = session.config, session.rank == 0
    session.emit(
        StepDone(
            generation=session.generation,
            rank=session.rank,
            step=session.state.step,
            step_us=step_us,
            data_us=result.data_us,
            snapshot_us=snapshot_us,
            save_us=save_us,
            tokens=config.data.global_batch * config.data.seq_len,
            loss=result.loss if reports else None,
            grad_norm=result.grad_norm if reports else None,
            lr=result.lr if reports else None,
            snapshot_step=session.checkpointer.newest_snapshot,
            copied_step=session.copies.complete,
            own_us=own_us,
        )
    )


def _now_us() -> int:
    return time.perf_counter_ns() // 1000
