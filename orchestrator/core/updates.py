"""Another job for a run that goes on, and the way back.

An update is on trial until a checkpoint of a later step is committed: by then the job has been built, has trained and
has been saved as it is now. Should the run come to an end of the job's own making before that, or not do a step with
the update, it becomes what it was before, and goes on from a step that was done before, too: what was trained with the
update may be what is wrong. What was counted against the job begins anew: if the update was not to blame, the run ends
all the same, a little later.
"""

from __future__ import annotations

from orchestrator.core import checkpoints, recovery, trust
from orchestrator.core.actions import Action, UpdateJob
from orchestrator.core.events import UpdateRequested
from orchestrator.core.state import EXIT_CRASH_LOOP, EXIT_JOB_FAULT, State, Trial

FAILED_STARTS = 2
"""Generations that come to nothing before the first step with an update: one of them may be a node's fault. What the
program itself says is enough the first time, for a node's fault is much rarer than an update's. So is a failure after
which the next one would restore a checkpoint, and lose what is in memory."""


def carry_out(s: State, asked: UpdateRequested) -> UpdateJob:
    """The job that was asked for is the run's from here on."""
    before = Trial(
        generation=s.generation + asked.restarts,
        step=s.step,
        limits=s.declared_limits,
        total_steps=s.total_steps,
        code=s.code,
        interval=s.interval,
        undo=asked.undo,
    )
    # Older journals do not say what there was before: they are final.
    s.trials = [*s.trials, before] if asked.number else []
    s.limits, s.total_steps, s.code = asked.limits, asked.total_steps, asked.code
    if asked.chooses_interval:
        s.interval = None
    return _changed(s, asked.changes)


def opened(s: State, step: int) -> None:
    """A generation begins at `step`: all that comes after it is trained with what is on trial."""
    for trial in s.trials:
        trial.step = step if trial.generation == s.generation else min(trial.step, step)


def trained(s: State) -> None:
    """A step was done, in a generation that goes on."""
    for trial in s.trials:
        trial.trained = True


def saved(s: State, generation: int, step: int) -> None:
    """A checkpoint is committed: what was on trial when it was made has proven itself."""
    s.trials = [trial for trial in s.trials if generation < trial.generation or step <= trial.step]


def why_back(s: State, decision: recovery.Decision) -> str:
    """What speaks for taking the newest update back, of all that the open incident has come to; empty: nothing, or
    none is on trial, or the run would be over as it was before, or is."""
    incident = s.incident
    assert incident is not None
    if not s.trials or s.stopping or s.trials[-1].total_steps <= s.step or s.step >= s.total_steps:
        return ""
    if decision.exit_code in (EXIT_JOB_FAULT, EXIT_CRASH_LOOP):
        return decision.reason
    cause = recovery.root(incident)
    enough = recovery.is_of_the_job(cause) or decision.source in ("durable", "init")
    if s.trials[-1].trained or len(incident.spent) < (1 if enough else FAILED_STARTS):
        return ""
    return f"not one step was done with it: {recovery.told(cause)}"


def take_back(s: State) -> list[Action]:
    """The job is again what it was before its newest update; what was trained with that is not to be restored.

    One that was asked for since is void: it was checked against the job that is no more. Nor do the failures count any
    more, or the rungs that failed.
    """
    before, s.update = s.trials.pop(), None
    assert s.incident is not None
    s.limits, s.total_steps, s.code, s.interval = before.limits, before.total_steps, before.code, before.interval
    s.errors, s.recoveries_without_progress, s.incident.spent = {}, 0, []
    s.distrust(s.generation, before.step + 1)
    why = "it was made with an update that is taken back"
    revoked = checkpoints.revoke_if(s, "", why, lambda writer, step: writer >= before.generation and step > before.step)
    return [_changed(s, before.undo), *(action for step in revoked for action in trust.publish(s, step))]


def _changed(s: State, changes: dict[str, str]) -> UpdateJob:
    s.changes, s.n_updates = s.changes | changes, s.n_updates + 1
    return UpdateJob(number=s.n_updates, changes=s.changes)
