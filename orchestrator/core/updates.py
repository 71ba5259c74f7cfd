"""Another job for a run that goes on, and the way back.

An update is on trial until a checkpoint of a later step is committed: by then the job has been built, has trained and
has been saved as it is now. Should the run come to an end of the job's own making before that, or not do a step with
the update, it becomes what it was before, and goes on from the newest step that it can trust. What was counted against
the job begins anew: if the update was not to blame, the run ends all the same, a little later.
"""

from __future__ import annotations

from orchestrator.core import recovery
from orchestrator.core.actions import UpdateJob
from orchestrator.core.events import UpdateRequested
from orchestrator.core.state import EXIT_CRASH_LOOP, EXIT_JOB_FAULT, State, Trial

FAILED_STARTS = 2
"""Generations that come to nothing before the first step with an update: one of them may be a node's fault. (What the
program itself says is enough the first time: a node's fault is much rarer than an update's.)"""


def carry_out(s: State, asked: UpdateRequested) -> UpdateJob:
    """The job that was asked for is the run's from here on."""
    before = Trial(
        generation=s.generation,
        step=s.step,
        limits=s.declared_limits,
        total_steps=s.total_steps,
        code=s.code,
        interval=s.interval,
        changes=s.changes | asked.undo,
    )
    s.trial = before if asked.undo.keys() == asked.changes.keys() else None
    s.limits, s.total_steps, s.code = asked.limits, asked.total_steps, asked.code
    if asked.chooses_interval:
        s.interval = None
    return _changed(s, s.changes | asked.changes)


def trained(s: State) -> None:
    """A step was done, in a generation that goes on."""
    if s.trial is not None:
        s.trial.trained = True


def saved(s: State, generation: int, step: int) -> None:
    """A checkpoint is committed."""
    if s.trial is not None and generation >= s.trial.generation and step > s.trial.step:
        s.trial = None


def why_back(s: State, decision: recovery.Decision) -> str:
    """What speaks for taking the newest update back, of all that the open incident has come to; empty: nothing, or it
    is no more on trial, or as it was before the run would be over by now."""
    trial, incident = s.trial, s.incident
    assert incident is not None
    if trial is None or s.stopping or trial.total_steps <= s.high_water:
        return ""
    if decision.exit_code in (EXIT_JOB_FAULT, EXIT_CRASH_LOOP):
        return decision.reason
    cause = recovery.root(incident)
    failed_starts = 1 if recovery.is_of_the_job(cause) else FAILED_STARTS
    if trial.trained or len(incident.spent) < failed_starts:
        return ""
    return f"not one step was done with it: {recovery.told(cause)}"


def take_back(s: State) -> UpdateJob:
    """The job is again what it was before its newest update.

    One that was asked for since is void: it was checked against the job that is no more. Nor do the failures count any
    more, or the rungs that failed.
    """
    before, s.trial, s.update = s.trial, None, None
    assert before is not None and s.incident is not None
    s.limits, s.total_steps, s.code, s.interval = before.limits, before.total_steps, before.code, before.interval
    s.errors, s.recoveries_without_progress, s.incident.spent = {}, 0, []
    return _changed(s, before.changes)


def _changed(s: State, changes: dict[str, str]) -> UpdateJob:
    s.changes, s.n_updates = changes, s.n_updates + 1
    return UpdateJob(number=s.n_updates, changes=changes)
