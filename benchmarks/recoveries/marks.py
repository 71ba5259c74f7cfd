"""What ranks write down while they train, and what is read from it. Standard library only: every contestant has it.

A mark is a line of JSON in a file that all ranks of a run share: when (seconds of the machine's clock), which rank in
which process, what it has reached. Step k is the k-th, and its mark is made when the optimizer has taken it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

REACHED = ("up", "imported", "group", "built", "restored")
"""On its way to the first step: the process runs, torch is imported, the process groups and the mesh stand, the model
and the optimizer are made, the state is in place."""


@dataclass(frozen=True)
class Mark:
    at: float
    rank: int
    pid: int
    what: str
    """One of REACHED, "step", or "shrunk" before a step that was made without some ranks."""
    step: int
    """Completed steps."""


def note(path: str | Path, what: str, rank: int, step: int = 0) -> None:
    """Append a mark: one write, so that the lines of several ranks do not mix."""
    mark = {"at": time.time(), "rank": rank, "pid": os.getpid(), "what": what, "step": step}
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # On a line of its own, wherever the one before was cut by a kill.
        os.write(descriptor, b"\n" + json.dumps(mark).encode() + b"\n")
    finally:
        os.close(descriptor)


def parse(lines: Iterable[str]) -> list[Mark]:
    """Whole lines only: a writer that was killed leaves half of one."""
    found = []
    for line in lines:
        line = line.strip()
        if line.startswith("{") and line.endswith("}"):
            found.append(Mark(**json.loads(line)))
    return found


@dataclass
class Watch:
    """The marks of one run as they come."""

    path: Path
    world_size: int
    marks: list[Mark] = field(default_factory=list)
    pids: dict[int, int] = field(default_factory=dict)
    """Rank to its newest process."""
    steps: dict[int, int] = field(default_factory=dict)
    """Rank to the highest step that it has completed in any process."""
    _file: TextIO | None = None
    _rest: str = ""

    def read(self) -> list[Mark]:
        """The new ones."""
        if self._file is None:
            if not self.path.exists():
                return []
            self._file = open(self.path)  # noqa: SIM115 as long as the watch
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        new = parse(lines)
        for mark in new:
            self.pids[mark.rank] = mark.pid
            if mark.what == "step":
                self.steps[mark.rank] = max(self.steps.get(mark.rank, 0), mark.step)
        self.marks += new
        return new

    @property
    def complete(self) -> int:
        """The highest step that every rank has completed."""
        return min(self.steps.values()) if len(self.steps) == self.world_size else 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


# --- what a kill has cost --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recovery:
    victims: tuple[int, ...]
    """Ranks."""
    killed_at: float
    highest: int
    """The highest step that any rank had completed when it was killed."""
    resumed: int
    """The step from which training went on."""
    new_step_s: float
    """From the kill until every rank had completed step `highest` + 1."""
    stages: dict[str, float]
    """What was reached by the last rank to reach it, in seconds from the kill; only what the contestant shows."""

    @property
    def steps_lost(self) -> int:
        """Steps that were complete and had to be done again."""
        return self.highest - self.resumed


def recovery(marks: list[Mark], world_size: int, killed_at: float, victims: tuple[int, ...]) -> Recovery | None:
    """What a kill at `killed_at` has cost; None while the run has not recovered from it.

    A step after the kill counts by those processes of the victims' ranks that came after it: a step that was in flight
    may still be completed by the others.
    """
    before = {mark.pid for mark in marks if mark.at <= killed_at and mark.rank in victims}
    highest = max((mark.step for mark in marks if mark.at <= killed_at and mark.what == "step"), default=0)
    after = [mark for mark in marks if mark.at > killed_at and not (mark.rank in victims and mark.pid in before)]
    first: dict[int, Mark] = {}
    for mark in after:
        if mark.what == "step" and mark.rank in victims:
            first.setdefault(mark.rank, mark)
    if len(first) < len(victims):
        return None
    resumed = min(mark.step for mark in first.values()) - 1
    again_at = last_of(after, "step", world_size, resumed + 1)
    new_at = last_of(after, "step", world_size, max(highest, resumed) + 1)
    if again_at is None or new_at is None:
        return None
    stages = {"first step": again_at - killed_at}
    for what in REACHED:
        at = last_of([mark for mark in after if mark.at <= again_at], what, world_size)
        if at is not None:
            stages[what] = at - killed_at
    return Recovery(victims, killed_at, highest, min(resumed, highest), new_at - killed_at, stages)


def shrunk(marks: list[Mark], world_size: int, killed_at: float, victims: tuple[int, ...]) -> Recovery | None:
    """The same where the others go on without the victims: until they have completed a step so, all of them.

    They lose no step that was complete; what the kill has interrupted they throw away and begin anew.
    """
    highest = max((mark.step for mark in marks if mark.at <= killed_at and mark.what == "step"), default=0)
    first: dict[int, Mark] = {}
    for mark in marks:
        if mark.at > killed_at and mark.what == "shrunk" and mark.rank not in victims:
            first.setdefault(mark.rank, mark)
    if len(first) < world_size - len(victims):
        return recovery(marks, world_size, killed_at, victims)  # the victim may be back before they go on
    at = max(mark.at for mark in first.values())
    return Recovery(victims, killed_at, highest, highest, at - killed_at, {"first step": at - killed_at})


def last_of(marks: list[Mark], what: str, world_size: int, step: int | None = None) -> float | None:
    """When the last rank reached it; None when not all have. Of a rank that did it again, the last time."""
    times = {mark.rank: mark.at for mark in marks if mark.what == what and step in (None, mark.step)}
    return max(times.values()) if len(times) == world_size else None
