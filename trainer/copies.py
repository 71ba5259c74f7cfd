"""Copies of snapshots on other nodes as one rank lives them: of which step, and which snapshots must stay for them.

All ranks copy the same step: whether anybody's copy is under way, and whether one has failed, travels in the step's one
exchange (trainer/loop.py), so that all ranks begin the next copy after the same step. The step S that is being copied
is pinned until the copies of all ranks have arrived, and so is the step P that was copied before it: when a node dies
meanwhile, P is all that is left of its slots, and every other rank must still have it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Copies:
    """The copies of one rank. For the thread that trains, but for `ended`."""

    def __init__(self, *, on: bool, every_steps: int, complete: int, pin: Callable[..., None]) -> None:
        """`complete` is the step that was copied last before this generation, 0 for none; `pin` keeps snapshots."""
        self._on, self._every_steps, self._pin = on, every_steps, pin
        self.complete = complete
        """P: the newest step of which every rank's copy has arrived; 0: none."""
        self._copied = 0
        """S: the step that is being copied; 0: none."""
        self._lock = threading.Lock()
        self._busy = self._failed = self._due = False
        self._pin_both()

    def shares(self) -> tuple[bool, bool]:
        """This rank's part of the agreement: whether its copy is under way, and whether it has failed."""
        with self._lock:
            return self._busy, self._failed

    def agree(self, step: int, busy: int, failed: int, taken: bool) -> None:
        """At the boundary after `step`, before its snapshot: what follows from so many ranks being busy or failed.

        Args:
            taken: whether there will be a snapshot of this step.
        """
        if not self._on:
            return
        self._due = self._due or step % self._every_steps == 0
        if self._copied and not busy:
            if not failed:
                self.complete = self._copied
            self._copied = 0
        if not self._copied and self._due and taken:
            self._copied, self._due = step, False
            with self._lock:
                self._busy, self._failed = True, False
        self._pin_both()

    def wants(self, step: int) -> bool:
        """Whether the snapshot of `step` is to be copied."""
        return self._on and step == self._copied

    def ended(self, step: int, error: str) -> None:
        """The copy of `step` has arrived, or failed with `error`. From any thread."""
        with self._lock:
            if step == self._copied:
                self._busy, self._failed = False, bool(error)

    def _pin_both(self) -> None:
        self._pin(*(step for step in (self.complete, self._copied) if step))
