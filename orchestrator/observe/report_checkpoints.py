"""The durable checkpoints of a run, as its journal tells them: when each was written, committed and deleted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core.actions import Action
from orchestrator.core.state import DISTRUSTED, USABLE, VERIFIED, State

FATES = {
    "committed": "its record stands: it can be restored from",
    "verified": "it was read back whole, and can be restored from",
    "certified": "verified, and a certificate speaks for its computation; it can be restored from",
    "written": "every rank's part is on the store, its record was not seen yet",
    "damaged": "found damaged by those who read it: kept for people to look at, not restored from",
    "revoked": "its state of that step was proven corrupt, or may be: not restored from",
    "replaced": "its step was saved again",
    "deleted": "by retention: newer ones are kept",
    "not committed": "its record could not be created",
    "gone": "a controller that began did not find it any more",
}


@dataclass(kw_only=True)
class CheckpointRow:
    """One checkpoint. Times are microseconds on the run's clock."""

    step: int
    generation: int
    """The generation that wrote it; 0 when it was found by a controller that did not know it."""
    written_at: int | None = None
    bytes: int | None = None
    write_us: int | None = None
    committed_at: int | None = None
    """When a controller knew that its record stands."""
    verified_at: int | None = None
    """When a node first read it back and found it whole."""
    deleted_at: int | None = None
    fate: str = ""
    """A key of FATES."""
    why: str = ""
    """Of one that is distrusted: who says so, and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class SaveFailure:
    at: int
    step: int
    error: str


@dataclass(kw_only=True)
class CheckpointLog:
    """In the order in which they were first heard of."""

    rows: list[CheckpointRow] = field(default_factory=list)
    failures: list[SaveFailure] = field(default_factory=list)
    intervals: list[ev.IntervalChosen] = field(default_factory=list)
    """The controller's choices, where the job leaves the interval to it."""

    def note(self, event: ev.Event, actions: Sequence[Action], state: State, failed: bool) -> None:
        """Take in an event after which the supervisor is in `state`; `failed`: it has counted a failed save."""
        match event:
            case ev.CheckpointWritten():
                known = state.checkpoints.get(event.step)
                if known is not None and known.generation == event.generation:
                    row = self._row(event.step, event.generation)
                    if row.written_at is None:
                        row.written_at, row.bytes, row.write_us = event.at, event.bytes, event.write_us
            case ev.CheckpointCommitted():
                self._committed(event.step, event.at, state)
            case ev.CheckpointsFound():
                for step in event.steps:
                    self._committed(step, event.at, state)
            case ev.CheckpointsPinned():
                self._not_deleted(state)
            case ev.CheckpointVerified():
                self._read(event.step, event.at, state)
            case ev.IntervalChosen():
                self.intervals.append(event)
            case ev.CheckpointFailed() if failed:
                self.failures.append(SaveFailure(at=event.at, step=event.step, error=event.error))
        for action in actions:
            if isinstance(action, ac.DeleteCheckpoint):
                self._standing(action.step).deleted_at = event.at

    def finish(self, state: State) -> None:
        """Say of each what became of it."""
        for row in self.rows:
            current = state.checkpoints.get(row.step)
            if row.deleted_at is not None:
                row.fate = "deleted"
            elif current is not None and current.generation == row.generation:
                row.fate = current.trust
                if current.trust in DISTRUSTED:
                    row.why = f"{current.by}: {current.why}"
            elif row.committed_at is None:
                row.fate = "not committed"
            else:
                row.fate = "gone" if current is None else "replaced"

    def _committed(self, step: int, at: int, state: State) -> None:
        current = state.checkpoints.get(step)
        if current is not None and current.trust in USABLE:
            row = self._row(step, current.generation)
            row.committed_at = at if row.committed_at is None else row.committed_at

    def _not_deleted(self, state: State) -> None:
        """Those that turned out to be pinned when they were to be deleted."""
        standing = {(row.step, row.generation) for row in self.rows if row.deleted_at is None}
        for row in reversed(self.rows):
            known = state.checkpoints.get(row.step)
            own = (row.step, row.generation)
            if known is not None and known.generation == row.generation and own not in standing:
                row.deleted_at = None
                standing.add(own)

    def _read(self, step: int, at: int, state: State) -> None:
        current = state.checkpoints.get(step)
        if current is not None and current.trust in VERIFIED:
            row = self._row(step, current.generation)
            row.verified_at = at if row.verified_at is None else row.verified_at

    def _standing(self, step: int) -> CheckpointRow:
        """The row of what retention deletes; one that is deleted as it is found has none yet."""
        standing = [row for row in self.rows if row.step == step and row.deleted_at is None]
        return standing[-1] if standing else self._row(step, 0)

    def _row(self, step: int, generation: int) -> CheckpointRow:
        """The row of this checkpoint while it stands, or a new one."""
        for row in reversed(self.rows):
            if (row.step, row.generation, row.deleted_at) == (step, generation, None):
                return row
        self.rows.append(CheckpointRow(step=step, generation=generation))
        return self.rows[-1]
