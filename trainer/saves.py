"""Durable saves as one rank lives them: when one is begun, that all ranks begin it together, and what is told of it.

Training goes on while a save is written. Rank 0 decides when the next is wanted; its wish, and whether anybody still
writes the one before, travel in the step's one exchange (trainer/loop.py), so that all ranks begin a save after the
same step or none does. For the same reason a new interval need be told to rank 0 only, at any time. A failure on one
rank is a failure on all, so rank 0 learns of it from its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from storage.durable import CheckpointFailed
from storage.manifest import ManifestError, RankPart
from trainer import optim
from trainer.contract import SaveFailed, ShardWritten

if TYPE_CHECKING:
    from trainer.loop import Session

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""From a save's first failure to its second try; each further wait is twice as long. A store that is overloaded or
restarts is back in seconds; for a full disk somebody must make room, which the tries at later intervals find done."""
TRIES = 5
"""Of one due checkpoint: with RETRY_S, over 75 s."""


@dataclass
class Interval:
    """Steps between durable saves. Another thread may set it while training goes on: each step reads it once."""

    steps: int


@dataclass
class SavePolicy:
    """Rank 0's judgement. Pure; asked once a step."""

    interval: Interval
    _due: bool = False
    _failures: int = 0
    """Of the checkpoint that is due."""
    _not_before_s: float = 0.0

    def wants(self, step: int, now_s: float) -> bool:
        """Whether a save should begin at the boundary after `step`."""
        if step % self.interval.steps == 0:
            self._due, self._failures = True, 0
        return self._due and now_s >= self._not_before_s

    def began(self) -> None:
        self._due = False

    def failed(self, now_s: float) -> None:
        """The save that was begun last has failed: try again after a while, or else when the next one is due."""
        self._failures += 1
        self._not_before_s = now_s + retry_wait_s(self._failures)
        self._due = self._due or self._failures < TRIES


def retry_wait_s(failures: int) -> float:
    """Seconds to wait after the so-manieth failure of a save."""
    return RETRY_S * float(2 ** (failures - 1))


class Saves:
    """The saves of one rank. For the thread that trains."""

    def __init__(self, interval: Interval) -> None:
        self._policy = SavePolicy(interval)
        self._failed: bool | None = None
        """How the last save ended, as its own thread has told; None once the policy knows."""

    def shares(self, session: Session, step: int) -> tuple[bool, bool]:
        """This rank's part of the agreement for the boundary after `step`: whether it wants a save, and is busy."""
        busy = session.checkpointer.busy
        if not busy and self._failed is not None:
            if self._failed:
                self._policy.failed(time.monotonic())
            self._failed = None
        wants = self._policy.wants(step, time.monotonic())
        return session.rank == 0 and wants, busy

    def begin(self, session: Session) -> int:
        """Begin to save the state of this step, as all ranks do; the microseconds that training was blocked."""
        began_us, step = _now_us(), session.state.step

        def done(result: RankPart | Exception) -> None:
            self._failed = isinstance(result, Exception)
            _tell(session, step, result, _now_us() - began_us)

        session.state.per_rank.update(optim.random_state())
        session.checkpointer.begin_save(session.state, session.audit.expectation(), done)
        self._policy.began()
        return _now_us() - began_us

    def save_last(self, session: Session, check: Callable[[Session], None]) -> None:
        """Save the state that no step will follow, and wait for it. Collective. Storage that keeps failing ends it.

        Args:
            check: the audit of the state, before each try and after the one that succeeds; collective.
        """
        session.phase("checkpoint")
        session.checkpointer.wait()
        session.state.per_rank.update(optim.random_state())
        for failures in range(1, TRIES + 1):
            session.phase("checkpoint")  # a sign of progress: each try may last
            check(session)
            began_us, step = _now_us(), session.state.step
            try:
                part = session.checkpointer.save(session.state, session.audit.expectation())
            except (OSError, CheckpointFailed, ManifestError) as error:
                _tell(session, step, error, _now_us() - began_us)
            else:
                check(session)  # what was written was read from the live state
                _tell(session, step, part, _now_us() - began_us)
                return
            if failures < TRIES:
                time.sleep(retry_wait_s(failures))


def _tell(session: Session, step: int, result: RankPart | Exception, write_us: int) -> None:
    generation, rank = session.generation, session.rank
    if isinstance(result, Exception):
        log.error("step %d: not saved", step, exc_info=None if session.parking.is_set() else result)
        error = " ".join(f"{type(result).__name__}: {result}".split())
        session.emit(SaveFailed(generation=generation, rank=rank, step=step, error=error, write_us=write_us))
    else:
        part = asdict(result)
        session.emit(ShardWritten(generation=generation, rank=rank, step=step, part=part, write_us=write_us))


def _now_us() -> int:
    return time.perf_counter_ns() // 1000
