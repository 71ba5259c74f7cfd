"""When a controller has the core's snapshots written: beside its loop, and never on the road of a decision.

- When it begins and has folded anything: a change of code or of the job comes with a new controller.
- When a generation has become ready: what follows is progress for the most part, so that newer code, which starts from
  there, has hardly a decision to repeat.
- Every `SNAPSHOT_EVENTS`, and when the run has ended.

One that cannot be written is a notice, and is tried again. The segments of the journal hold everything meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from orchestrator.core.codec import state_to_json
from orchestrator.core.state import State
from orchestrator.runtime import core_snapshots
from orchestrator.runtime.journal import Journal, check_not_replaced

SNAPSHOT_EVENTS = 10_000
"""A controller that comes back folds these in about a second."""
SNAPSHOT_INTERVAL_S = 60.0
"""Between two tries, at least: the copy of a state of 12,500 nodes holds the loop up for 25 ms."""
WRITE_DEADLINE_S = 15.0
"""A begin and an end wait so long for a snapshot, and then go on without."""


class SnapshotWriter:
    """Writes the snapshots of one controller, one at a time."""

    def __init__(self, url: str, version: str, notice: Callable[[str], None]) -> None:
        self._url, self._version, self._notice = url, version, notice
        self._writing: asyncio.Task[None] | None = None
        self._seq = self._generation = 0
        """Of the newest one: its record, and the generation that was training."""
        self._tried_at = -SNAPSHOT_INTERVAL_S
        self._failed = False
        """The last try, of which people have been told."""

    def write_if_due(self, journal: Journal, state: State) -> None:
        """Begin to write a snapshot of `state`, which is the newest record's, if it is time for one."""
        seq, _ = journal.head
        is_ready = state.job == "training" and state.generation != self._generation
        rested = time.monotonic() - self._tried_at >= SNAPSHOT_INTERVAL_S
        if rested and (is_ready or seq - self._seq >= SNAPSHOT_EVENTS):
            self._begin(journal, state)

    async def write(self, journal: Journal, state: State) -> None:
        """Write a snapshot of `state`, which is the newest record's, after the one that is being written."""
        await self.settle()
        self._begin(journal, state)
        await self.settle()

    async def settle(self) -> None:
        """Wait until the snapshot that is being written is there, or has failed; up to the deadline."""
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=WRITE_DEADLINE_S)

    def _begin(self, journal: Journal, state: State) -> None:
        if self._writing is not None and not self._writing.done():
            return  # the store does not answer
        self._tried_at = time.monotonic()
        seq, digest = journal.head
        generation = state.generation if state.job == "training" else 0
        self._writing = asyncio.create_task(self._write(journal.epoch, seq, digest, state_to_json(state), generation))

    async def _write(self, epoch: int, seq: int, digest: str, state: dict[str, Any], generation: int) -> None:
        def store() -> None:
            check_not_replaced(self._url, epoch)
            core_snapshots.write(self._url, epoch, seq, digest, self._version, state)

        try:
            await asyncio.to_thread(store)
            self._seq, self._generation = seq, generation or self._generation
            await asyncio.to_thread(core_snapshots.prune, self._url)
            self._failed = False
        except Exception as e:  # every store has its own exceptions
            if not self._failed:
                self._notice(f"a snapshot of the core could not be written, or an older one not be deleted: {e!r}")
            self._failed = True
