"""The durable checkpoints as the core knows them: written, committed, replaced, distrusted, kept and deleted.

A checkpoint is `written` when every rank's part is on the store, and exists once its record does (`committed`). What
is thought of it from then on stands in trust.py. Two things take trust away for good. It is found `damaged` by whoever
reads it; or its generation's state of that step is proven corrupt, and it is `revoked`: what is at rest is compared
before it is written, but that replicas differ is found one step later. Neither is restored from again, and both are
replaced when their step is saved anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from orchestrator.core import events as ev
from orchestrator.core.actions import Action, CommitCheckpoint, DeleteCheckpoint
from orchestrator.core.state import DISTRUSTED, USABLE, VERIFIED, Checkpoint, State

UNREAD_KEPT = 2
"""Newer ones than the newest verified that are kept: where verification cannot keep up, the one that is read and the
newest. Those between would be read by nobody before they are too old."""
RETIRING_KEPT = 32
"""Orders to delete whose answer "it is pinned" is heard; it comes within seconds, and a commit gives few orders."""


def written(state: State, event: ev.CheckpointWritten) -> list[Action]:
    """Order the commit of a checkpoint whose parts are all on the store."""
    if event.generation != state.generation or state.is_unclean(event.generation, event.step):
        return []
    known = state.checkpoints.get(event.step)
    replaces: Literal["", "damaged", "revoked"] = ""
    if known is not None:
        if known.trust != "damaged" and known.trust != "revoked":
            return []
        replaces = known.trust
    state.checkpoints[event.step] = Checkpoint(
        trust="written", generation=event.generation, replaces=replaces, bytes=event.bytes
    )
    return [commit(state, event.step)]


def commit(state: State, step: int) -> CommitCheckpoint:
    checkpoint = state.checkpoints[step]
    return CommitCheckpoint(
        step=step,
        epoch=state.epoch,
        generation=checkpoint.generation,
        replaces_damaged=bool(checkpoint.replaces),
    )


def committed(state: State, event: ev.CheckpointCommitted) -> bool:
    """Note that a record stands. Whether that is news: one that is told again may be distrusted or deleted by now."""
    known = state.checkpoints.get(event.step)
    if known is None or known.trust != "written":
        return False
    if known.replaces and known.generation != event.generation:
        return False  # the record that is to be replaced
    state.checkpoints[event.step] = Checkpoint(
        trust="committed", generation=event.generation, committed_at=event.at, bytes=known.bytes
    )
    state.checkpoints = dict(sorted(state.checkpoints.items()))
    state.retiring.pop(event.step, None)
    state.save_error = ""
    return True


def failed(state: State, event: ev.CheckpointFailed) -> bool:
    """Note that a save or its commit failed. Whether it was one whose parts were all written."""
    state.saves_failed, state.save_error = state.saves_failed + 1, f"step {event.step}: {event.error}"
    known = state.checkpoints.get(event.step)
    if known is None or known.trust != "written":
        return False
    if known.replaces:
        known.trust, known.replaces = known.replaces, ""
    else:
        del state.checkpoints[event.step]
    return True


def found(state: State, event: ev.CheckpointsFound) -> None:
    """The store is the authority on what is committed; who is distrusted stays so until it is removed."""
    kept = {step: c for step, c in state.checkpoints.items() if c.trust == "written" or step in event.steps}
    for step in event.steps:
        known = kept.setdefault(step, Checkpoint(trust="committed", generation=0, committed_at=event.at))
        if known.trust == "written" and not known.replaces:
            known.trust = "committed"
    state.checkpoints, state.retiring = dict(sorted(kept.items())), {}
    state.high_water = max(state.high_water, *event.steps, 0)


def resumed(state: State) -> None:
    """Who resumes has looked: what was found damaged may have been mended, and is tried again.

    What was in doubt is read anew, and what was put off is not any more.
    """
    state.checkpoints = {step: c for step, c in state.checkpoints.items() if c.trust != "damaged"}
    for checkpoint in state.checkpoints.values():
        if checkpoint.doubt is not None:
            checkpoint.doubt, checkpoint.trust = None, "committed"
        checkpoint.tries = checkpoint.not_before = 0


def pinned(state: State, event: ev.CheckpointsPinned) -> None:
    """Somebody wants to keep these. One whose deletion was ordered is still there."""
    state.pinned = dict.fromkeys(event.steps)
    back = {step: state.retiring.pop(step) for step in event.steps if step in state.retiring}
    state.checkpoints = dict(sorted((back | state.checkpoints).items()))


def retire(state: State) -> list[Action]:
    """Delete the checkpoints beyond those that are kept.

    Not while an incident is open or a generation starts: what is restored from must stay, and it may turn out damaged
    or revoked, so that an older one is wanted. What is distrusted is neither counted nor deleted: people may want to
    look at it. Nor is one beyond the last step: it belongs to a longer run, and this one never restores from it. While
    a third is asked about a step, the newest from before it stays: a verdict revokes all that came of that step.
    """
    if state.incident is not None or state.job == "starting":
        return []
    usable = [step for step, c in state.checkpoints.items() if c.trust in USABLE and step <= state.total_steps]
    doubted = min((asked.step for asked in state.disagreements), default=0)
    clean = max((step for step in usable if step < doubted), default=None)
    kept = {clean, *_counted(state, usable), *_kept_besides(state, usable)}
    retired = [step for step in usable if step not in kept]
    for step in retired:
        state.retiring[step] = state.checkpoints.pop(step)
        state.retired = max(state.retired, step)
    for step in list(state.retiring)[:-RETIRING_KEPT]:
        del state.retiring[step]
    return [DeleteCheckpoint(step=step) for step in retired]


def _counted(state: State, usable: list[int]) -> list[int]:
    """The newest `keep` verified ones, and of those that are newer and not verified yet a few.

    Where fewer are verified, others fill up. Where nobody verifies, all count alike.
    """
    keep = state.declared_limits.keep_checkpoints
    if "verify" not in state.capabilities:
        return _newest(usable, keep)
    known = state.checkpoints
    whole = _newest([step for step in usable if known[step].trust in VERIFIED and known[step].doubt is None], keep)
    unread = [step for step in usable if step > max(whole, default=-1)]
    under_way = [step for step in unread if state.verification is not None and step == state.verification.step]
    waiting = _newest([step for step in unread if step not in under_way], UNREAD_KEPT - len(under_way))
    kept = {*whole, *under_way, *waiting}
    return [*kept, *_newest([step for step in usable if step not in kept], keep - len(kept))]


def _newest(steps: list[int], n: int) -> list[int]:
    return steps[max(0, len(steps) - max(0, n)) :]


def _kept_besides(state: State, usable: list[int]) -> Iterable[int]:
    """Whatever their age: the pinned ones, every K-th, the newest certified, and those whose damage is in doubt."""
    every = state.declared_limits.keep_every_steps
    certified = [step for step in usable if state.checkpoints[step].trust == "certified"]
    yield from certified[-1:]
    for step in usable:
        if step in state.pinned or (every and step % every == 0) or state.checkpoints[step].doubt is not None:
            yield step


def revoke(state: State, generation: int, step: int, by: str) -> list[int]:
    """The state of `generation` is not known to be clean from `step` on: nor are the checkpoints that hold it."""
    why = f"the state of generation {generation} was found corrupt after step {step}"
    return revoke_if(state, by, why, lambda writer, held: writer == generation and held >= step)


def revoke_what_came_of(state: State, generation: int, step: int, by: str) -> list[int]:
    """The computation of `step` in `generation` was wrong."""
    why = f"it came of step {step} of generation {generation}, whose computation was wrong"
    return revoke_if(state, by, why, lambda writer, held: state.is_made_of(generation, step, upto=(writer, held)))


def revoke_if(state: State, by: str, why: str, is_bad: Callable[[int, int], bool]) -> list[int]:
    """By the generation that wrote a checkpoint, and its step. The steps that were trusted until now."""
    revoked = []
    for held, checkpoint in (state.retiring | state.checkpoints).items():
        if checkpoint.trust not in DISTRUSTED and is_bad(checkpoint.generation, held):
            checkpoint.trust, checkpoint.replaces = "revoked", ""
            checkpoint.by, checkpoint.why, checkpoint.doubt = by, why, None
            if held in state.checkpoints:
                revoked.append(held)
    return revoked
