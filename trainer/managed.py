"""A session under Shepherd: the steps, snapshots and saves of one rank of a user's script in one generation.

All ranks call `restore` and `snapshot` alike. Each snapshot begins with one exchange over a process group of its own
(gloo, on the CPU), which tells every rank what all must agree on: whether to stop, and whether to begin a durable save
or copies of snapshots. Before it comes, a rank's snapshot before is complete; so ranks are never more than one snapshot
apart, as the RAM tier needs it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import MutableMapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import distributed

from storage.checkpointer import Checkpointer
from storage.durable import CheckpointFailed
from storage.manifest import ManifestError, RankPart
from storage.state import TrainState
from trainer.contract import CopyStep, Phase, SaveFailed, ShardWritten, StepDone
from trainer.copies import Copies
from trainer.link import Agent, Assignment
from trainer.saves import TRIES, SavePolicy, retry_wait_s
from trainer.script_state import take_over, to_restore, train_state
from trainer.worker import CLOSE_DEADLINE_S, checkpointer_of, restore

log = logging.getLogger(__name__)


class Managed:
    """For the thread that runs the script."""

    def __init__(self, assignment: Assignment, agent: Agent) -> None:
        self._assignment, self._order, self._agent = assignment, assignment.order, agent
        self._config = assignment.order.config
        self._restores = self._order.restore.source != "init"
        """Whether the generation begins with a state that the script has not taken yet."""
        self._done = self._kept = self._order.restore.step
        """The newest step that was told, and the newest that was kept."""
        self._marked_us = _now_us()
        self._snapshot_us = self._save_us = 0
        self._saves = SavePolicy(assignment.interval)
        self._save_failed: bool | None = None
        """How the last save ended; None once the policy knows."""
        self._saved_step = self._order.restore.step if self._order.restore.source == "durable" else -1
        self._checkpointer: Checkpointer | None = None
        self._group: distributed.ProcessGroup | None = None
        self._copies: Copies | None = None

    @property
    def step(self) -> int:
        """The newest step that was told or kept; what the generation began with before that."""
        return max(self._done, self._kept)

    @property
    def saves(self) -> bool:
        """Whether the script keeps snapshots, so that a run that is to stop can wait for one."""
        return self._checkpointer is not None or self._order.restore.source != "init"

    # --- the three calls ----------------------------------------------------------------------------------------------

    def restore(self, state: MutableMapping[str, Any]) -> int | None:
        """See `trainer.session.Session.restore`."""
        if self.step != self._order.restore.step:
            raise ValueError(f"session.restore after step {self.step}: call it once, before the first step")
        checkpointer, _, _ = self._tiers()
        if self._order.restore.source == "init":
            return None
        kept = to_restore(state)
        restore(checkpointer, kept, self._order, self._agent)
        take_over(state, kept)
        self._restores = False
        self._marked_us = _now_us()
        return kept.step

    def step_done(self, step: int, loss: float | None, tokens: int) -> None:
        """See `trainer.session.Session.step`."""
        self._check_restored("step")
        first = self._done == self._order.restore.step
        if step < self._done or (first and step == self._done):
            raise ValueError(f"session.step({step}): step {self._done} is done already; the first step is number 1")
        again, self._done = step == self._done, step
        if first or again:
            self._tell_phase("compute")
        if again:
            return
        now_us = _now_us()
        self._agent.emit(
            StepDone(
                generation=self._order.generation,
                rank=self._order.rank,
                step=step,
                step_us=now_us - self._marked_us,
                data_us=0,
                snapshot_us=self._snapshot_us,
                save_us=self._save_us,
                tokens=tokens,
                loss=loss if self._order.rank == 0 else None,
                grad_norm=None,
                lr=None,
                snapshot_step=0 if self._checkpointer is None else self._checkpointer.newest_snapshot,
                copied_step=0 if self._copies is None else self._copies.complete,
            )
        )
        self._marked_us, self._snapshot_us, self._save_us = now_us, 0, 0

    def snapshot(self, step: int, state: MutableMapping[str, Any], durable: bool) -> None:
        """See `trainer.session.Session.snapshot`."""
        self._check_restored("snapshot")
        if step < self.step:
            raise ValueError(f"session.snapshot({step}): step {self.step} is done already")
        began_us = _now_us()
        kept = train_state(state, step)
        checkpointer, group, copies = self._tiers()
        checkpointer.await_snapshot()
        wants_save, busy = self._save_shares(checkpointer, step)
        copying, not_copied = copies.shares()
        shares = (self._assignment.stop.is_set(), wants_save, busy, copying, not_copied)
        stops, wanted, savers, copying_ranks, failed_ranks = self._agree(group, step, shares)
        taken = step % self._config.checkpoint.snapshot_interval_steps == 0
        copies.agree(step, copying_ranks, failed_ranks, taken)
        if taken:
            self._take(checkpointer, copies, kept)
        self._kept = step
        self._snapshot_us += _now_us() - began_us
        began_us = _now_us()
        if durable or stops:
            self._save_now(checkpointer, kept)
        elif wanted and not savers:
            self._begin_save(checkpointer, kept)
        checkpointer.await_reads()
        self._save_us += _now_us() - began_us
        if stops:
            raise SystemExit(0)

    def close(self) -> None:
        """The script has ended: let what was begun be completed.

        Raises:
            TimeoutError: it is not, in minutes.
        """
        if self._checkpointer is None:
            return
        self._tell_phase("checkpoint")
        self._checkpointer.await_snapshot()
        self._checkpointer.wait()
        if not self._checkpointer.close(CLOSE_DEADLINE_S):
            raise TimeoutError(f"a snapshot or save has not ended in {CLOSE_DEADLINE_S:g} s")
        self._tell_phase("compute")

    # --- parts --------------------------------------------------------------------------------------------------------

    def _check_restored(self, call: str) -> None:
        if self._restores:
            raise ValueError(
                f"session.{call} before session.restore: this generation goes on from step {self._order.restore.step}"
            )

    def _tell_phase(self, phase: Literal["checkpoint", "compute"]) -> None:
        """Once a step has been told: before that nobody judges how long anything takes."""
        if self._done > self._order.restore.step:
            order = self._order
            self._agent.emit(Phase(generation=order.generation, rank=order.rank, step=self.step, phase=phase))

    def _tiers(self) -> tuple[Checkpointer, distributed.ProcessGroup | None, Copies]:
        """Made with the first call that needs them, by all ranks together, once the script has its process group."""
        order, config = self._order, self._config
        if self._checkpointer is None or self._copies is None:
            if order.world_size > 1 and not distributed.is_initialized():
                raise ValueError("session.restore and session.snapshot come after init_process_group: ranks must agree")
            if distributed.is_initialized():
                timeout = timedelta(seconds=config.collective_timeout_s)
                self._group = distributed.new_group(backend="gloo", timeout=timeout)
            self._checkpointer = checkpointer_of(order)
            self._copies = Copies(
                on=order.copies,
                every_steps=config.checkpoint.copy_interval_steps,
                complete=order.copied_step,
                pin=self._checkpointer.pin_snapshots,
            )
            self._assignment.on_copied = self._copies.ended
        return self._checkpointer, self._group, self._copies

    @staticmethod
    def _agree(group: distributed.ProcessGroup | None, step: int, shares: tuple[bool, ...]) -> list[int]:
        """How many ranks say yes to each of `shares`.

        Raises:
            ValueError: not all ranks are at this step.
        """
        sums = torch.tensor([step, step * step, *shares], dtype=torch.int64)
        ranks = 1
        if group is not None:
            distributed.all_reduce(sums, group=group)
            ranks = group.size()
        total, squares, *counts = sums.tolist()
        if (total, squares) != (step * ranks, step * step * ranks):
            raise ValueError(f"session.snapshot({step}): other ranks are at other steps, {total / ranks:g} on average")
        return [int(count) for count in counts]

    def _take(self, checkpointer: Checkpointer, copies: Copies, kept: TrainState) -> None:
        """A full memory file system costs snapshots, not the run."""
        generation, rank, step = self._order.generation, self._order.rank, kept.step

        def done(error: Exception | None) -> None:
            if not copies.wants(step):
                return
            if error is not None:
                copies.ended(step, str(error))
            else:
                self._agent.emit(CopyStep(generation=generation, rank=rank, step=step, complete=copies.complete))

        try:
            checkpointer.snapshot(kept, done)
        except OSError as error:
            log.error("step %d: no snapshot: %s", step, error)
            copies.ended(step, str(error))

    def _save_shares(self, checkpointer: Checkpointer, step: int) -> tuple[bool, bool]:
        """Whether this rank wants a durable save to begin, and is busy with the last one."""
        busy = checkpointer.busy
        if not busy and self._save_failed is not None:
            if self._save_failed:
                self._saves.failed(time.monotonic())
            self._save_failed = None
        wants = self._saves.wants(step, time.monotonic())
        return self._order.rank == 0 and wants, busy

    def _begin_save(self, checkpointer: Checkpointer, kept: TrainState) -> None:
        began_us, step = _now_us(), kept.step

        def done(result: RankPart | Exception) -> None:
            self._save_failed = isinstance(result, Exception)
            self._tell_save(step, result, _now_us() - began_us)

        checkpointer.begin_save(kept, None, done)
        self._saves.began()

    def _save_now(self, checkpointer: Checkpointer, kept: TrainState) -> None:
        """Unless this very step is saved: a generation saves a step once."""
        self._tell_phase("checkpoint")
        checkpointer.wait()
        if self._saved_step != kept.step:
            self._save_with_tries(checkpointer, kept)
        self._tell_phase("compute")

    def _save_with_tries(self, checkpointer: Checkpointer, kept: TrainState) -> None:
        began_us = _now_us()
        for failures in range(1, TRIES + 1):
            self._tell_phase("checkpoint")  # a sign of progress: each try may last
            try:
                part = checkpointer.save(kept)
            except (OSError, CheckpointFailed, ManifestError) as error:  # alike on every rank
                self._tell_save(kept.step, error, _now_us() - began_us)
                if failures == TRIES:
                    raise
                time.sleep(retry_wait_s(failures))
            else:
                self._tell_save(kept.step, part, _now_us() - began_us)
                return

    def _tell_save(self, step: int, result: RankPart | Exception, write_us: int) -> None:
        generation, rank = self._order.generation, self._order.rank
        if isinstance(result, Exception):
            log.error("step %d: not saved", step, exc_info=result)
            error = " ".join(f"{type(result).__name__}: {result}".split())
            self._agent.emit(SaveFailed(generation=generation, rank=rank, step=step, error=error, write_us=write_us))
        else:
            self._saved_step = step
            self._agent.emit(
                ShardWritten(generation=generation, rank=rank, step=step, part=asdict(result), write_us=write_us)
            )


def _now_us() -> int:
    return time.perf_counter_ns() // 1000
