"""The durable checkpoints as the core knows them: written, committed, distrusted, deleted.

A checkpoint is `written` when every rank's part is on the store, and exists once its record does (`committed`). Two
things take trust away. A worker that reads it finds it `damaged`; or its generation's state of that step is proven
corrupt, and it is `revoked`: what is at rest is compared before it is written, but that replicas differ is found one
step later. Neither is restored from again, and both are replaced when their step is saved anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from orchestrator.core import events as ev
from orchestrator.core.actions import Action, CommitCheckpoint, DeleteCheckpoint, OpenGeneration
from orchestrator.core.state import Checkpoint, State

DISTRUSTED = ("damaged", "revoked")


def written(state: State, event: ev.CheckpointWritten) -> list[Action]:
    """Order the commit of a checkpoint whose parts are all on the store."""
    if event.generation != state.generation or state.is_unclean(event.generation, event.step):
        return []
    known = state.checkpoints.get(event.step)
    replaces: Literal["", "damaged", "revoked"] = ""
    if known is not None:
        if known.trust == "written" or known.trust == "committed":
            return []
        replaces = known.trust
    state.checkpoints[event.step] = Checkpoint(trust="written", generation=event.generation, replaces=replaces)
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
    state.checkpoints[event.step] = Checkpoint(trust="committed", generation=event.generation, committed_at=event.at)
    state.checkpoints = dict(sorted(state.checkpoints.items()))
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
    state.checkpoints = dict(sorted(kept.items()))
    state.high_water = max(state.high_water, *event.steps, 0)


def retire(state: State) -> list[Action]:
    """Delete the oldest checkpoints beyond those that are kept.

    Not while an incident is open or a generation starts: what is restored from must stay, and it may turn out damaged
    or revoked, so that an older one is wanted. What is distrusted is neither counted nor deleted: people may want to
    look at it. Nor is one beyond the last step: it belongs to a longer run, and this one never restores from it. While
    a third is asked about a step, the newest from before it stays: a verdict revokes all that came of that step.
    """
    assert state.limits is not None
    if state.incident is not None or state.job == "starting":
        return []
    usable = [step for step, c in state.checkpoints.items() if c.trust == "committed" and step <= state.total_steps]
    doubted = min((asked.step for asked in state.disagreements), default=0)
    clean = max((step for step in usable if step < doubted), default=None)
    retired = [step for step in usable[: -state.limits.keep_checkpoints] if step != clean]
    for step in retired:
        del state.checkpoints[step]
        state.retired = max(state.retired, step)
    return [DeleteCheckpoint(step=step) for step in retired]


def refuse(state: State, order: OpenGeneration) -> None:
    """A worker has read the checkpoint that it was ordered to restore from, and found it damaged."""
    if order.step in state.checkpoints:
        state.checkpoints[order.step].trust = "damaged"


def revoke(state: State, generation: int, step: int) -> None:
    """The state of `generation` is not known to be clean from `step` on: nor are the checkpoints that hold it."""
    _revoke_if(state, lambda writer, held: writer == generation and held >= step)


def revoke_what_came_of(state: State, generation: int, step: int) -> None:
    """The computation of `step` in `generation` was wrong."""
    _revoke_if(state, lambda writer, held: state.is_made_of(generation, step, upto=(writer, held)))


def _revoke_if(state: State, is_bad: Callable[[int, int], bool]) -> None:
    """By the generation that wrote a checkpoint, and its step."""
    for held, checkpoint in state.checkpoints.items():
        if checkpoint.trust in ("written", "committed") and is_bad(checkpoint.generation, held):
            checkpoint.trust, checkpoint.replaces = "revoked", ""
