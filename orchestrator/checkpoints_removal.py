"""`shepherd checkpoints` rm, pin and unpin: what may go, and what must not while a run may be using it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.checkpoints_command import (
    CheckpointsError,
    Leftover,
    Row,
    committed_steps,
    enumerated,
    listing,
    store_errors,
)
from orchestrator.core import events as ev
from orchestrator.need import size
from orchestrator.runtime import journal
from storage import commits, pins
from storage.urls import list_names, remove

LEFTOVER_GRACE_S = 7200.0
"""An uncommitted folder whose files are younger may be of a save under way: one takes 80 minutes at most, its commit a
few more (storage/checkpointer.py: SAVE_DEADLINE_S)."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What is to be removed, and what is known of the run that may be using it."""

    url: str
    rows: tuple[Row, ...]
    leftovers: tuple[Leftover, ...]
    n_young: int
    """Leftovers that stay: they may be of a save under way."""
    life: Life
    force: bool
    address: str | None

    @property
    def is_empty(self) -> bool:
        return not self.rows and not self.leftovers

    @property
    def question(self) -> str:
        return f"{self.life.why}. Remove all the same?" if self.life.state == "unknown" else "Remove?"

    def words(self) -> list[str]:
        """A line for each thing that goes, and one about those that stay."""
        lines = [
            f"step {row.step}: "
            + (f"unreadable: {row.problem}" if row.problem else f"{size(row.n_bytes)}, {row.trust}")
            for row in self.rows
        ]
        lines += [f"uncommitted {left.folder}: {size(left.n_bytes)}" for left in self.leftovers]
        if self.n_young:
            lines.append(f"{self.n_young} uncommitted, of the last two hours, stay: a save may be under way")
        return lines if self.n_young or not self.is_empty else ["nothing to remove"]


@dataclass(frozen=True, kw_only=True)
class Life:
    """Whether a controller is at work on a run directory."""

    state: Literal["over", "live", "unknown"]
    why: str


def plan_removal(
    url: str, steps: Sequence[int], leftovers: bool, force: bool, *, asks: bool, address: str | None
) -> Removal:
    """Look at what is to be removed, and refuse what may not go; `asks`: somebody will be asked before it does.

    Raises:
        CheckpointsError: a step is not there or pinned, a run is live under the URL, or may be and nobody is asked, or
            nothing was named. With `force`, only the first and the last; leftovers of any age go then.
    """
    if not steps and not leftovers:
        raise CheckpointsError("STEP: name the steps to remove, or give --leftovers")
    there = listing(url)
    rows = {row.step: row for row in there.rows}
    for step in steps:
        if step not in rows:
            raise CheckpointsError(f"{url}: no checkpoint of step {step} is committed; there are {enumerated([*rows])}")
        why = rows[step].pinned
        if why is not None and not force:
            told = f" ({why})" if why else ""
            raise CheckpointsError(
                f"step {step} is pinned{told}: `shepherd checkpoints unpin` lets it go, or give --force"
            )
    found = life(url, address)
    if found.state == "live" and not force:
        raise CheckpointsError(f"{url}: {found.why}: stop it first, or give --force")
    if found.state == "unknown" and not asks and not force:
        raise CheckpointsError(f"{found.why}; make sure that none is, and give --force")
    old = [left for left in there.leftovers if force or (left.age_s or 0.0) > LEFTOVER_GRACE_S]
    return Removal(
        url=url,
        rows=tuple(rows[step] for step in dict.fromkeys(steps)),
        leftovers=tuple(old) if leftovers else (),
        n_young=len(there.leftovers) - len(old) if leftovers else 0,
        life=found,
        force=force,
        address=address,
    )


def perform_removal(removal: Removal) -> None:
    """Remove it: each commit record before its data. A pin that was overruled goes, too.

    Raises:
        CheckpointsError: something was pinned meanwhile, or a run is or may be live now; nothing was removed.
    """
    with store_errors(removal.url):
        # People take their time to answer: what was committed meanwhile is no leftover any more, what was pinned stays,
        # and a run may have begun.
        now = life(removal.url, removal.address)
        if not removal.force and now.state != removal.life.state and now.state != "over":
            raise CheckpointsError(f"{removal.url}: meanwhile {now.why}; nothing was removed")
        there = listing(removal.url)
        pinned = {row.step for row in there.rows if row.pinned is not None}
        late = [row.step for row in removal.rows if row.pinned is None and row.step in pinned]
        if late:
            raise CheckpointsError(f"steps {enumerated(late)} were pinned meanwhile: nothing was removed")
        uncommitted = {left.folder for left in there.leftovers}
        for row in removal.rows:
            commits.delete_checkpoint(removal.url, row.step)
            pins.unpin(removal.url, row.step)
        for left in removal.leftovers:
            if left.folder in uncommitted:
                remove(removal.url, left.folder)


def life(url: str, address: str | None) -> Life:
    """Whether a run is live under `url`: by its journal, whose last record tells an end, else by the Ray cluster."""
    try:
        with store_errors("its journal"):
            epochs = [name for name in list_names(url, "epochs") if re.fullmatch(r"\d{8}\.json", name)]
            if not epochs:
                return Life(state="over", why="no run was started there")
            records = journal.read(url)
            last = records[-1] if records else None
    except Exception as e:
        return Life(state="unknown", why=f"whether a run is live cannot be known: {e}")
    ended = last is not None and any(action["type"] == "EndRun" for action in last.actions)
    if ended and last is not None and last.epoch == int(epochs[-1].removesuffix(".json")):
        return Life(state="over", why="its journal tells its end")
    names = [record.event.run for record in records if isinstance(record.event, ev.RunDeclared)]
    return _life_on_ray(names[-1], address) if names else _unknown("no record of it says its name")


def _life_on_ray(run: str, address: str | None) -> Life:
    from orchestrator.runtime import driver

    try:
        driver.connect(address)
        driver.find(run)
    except driver.RunError as e:
        return _unknown(str(e))
    return Life(state="live", why=f"run {run} is active")


def _unknown(why: str) -> Life:
    return Life(state="unknown", why=f"whether a run is live cannot be known: its journal tells no end, and {why}")


def pin(url: str, step: int, why: str) -> None:
    """Keep the checkpoint of `step`.

    Raises:
        CheckpointsError: there is none, or it is pinned for another reason.
    """
    if not why.strip():
        raise CheckpointsError("--why: is empty; say for what the checkpoint is kept")
    steps = committed_steps(url)
    if step not in steps:
        raise CheckpointsError(f"{url}: no checkpoint of step {step} is committed; there are {enumerated(steps)}")
    with store_errors(url):
        if not pins.pin(url, step, why):
            raise CheckpointsError(f"step {step} is pinned already ({pins.why_pinned(url, step)}); unpin it first")


def unpin(url: str, step: int) -> None:
    """Let the checkpoint of `step` go when its time comes.

    Raises:
        CheckpointsError: it is not pinned.
    """
    committed_steps(url)
    with store_errors(url):
        kept = sorted(pins.pinned(url))
        if step not in kept:
            raise CheckpointsError(f"{url}: step {step} is not pinned; pinned are {enumerated(kept)}")
        pins.unpin(url, step)
