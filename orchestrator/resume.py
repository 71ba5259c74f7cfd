"""What a resume goes on from, and what was lost, said before anything starts: from the journal and the commits."""

from __future__ import annotations

from orchestrator.core.state import USABLE, State
from orchestrator.runtime import journal
from orchestrator.runtime.preparation import run_log_dir
from orchestrator.spec import JobSpec
from storage.commits import list_commits


def statement(spec: JobSpec) -> list[str]:
    """Lines for the person who resumes a run. Blocks; reads the run directory, and the journal's tail if it is here.

    Raises:
        storage.urls.StoreError, OSError: the store failed.
    """
    url = spec.run.url
    try:
        state = journal.last_known(url, journal.tail_path(run_log_dir(spec), url)).state
    except journal.JournalError as e:
        return [f"what was lost cannot be said before the controller has started: {e}"]
    restorable = _newest_checkpoint(state, list_commits(url), spec.run.steps)
    return [_how_it_ended(state), _where_it_goes_on(state, restorable, spec)]


def _newest_checkpoint(state: State, found: list[int], total_steps: int) -> int | None:
    """The newest step that is committed under run.url, and that nothing on record speaks against."""
    known = state.checkpoints
    usable = [step for step in found if step not in known or known[step].trust in (*USABLE, "written")]
    return max((step for step in usable if step <= total_steps), default=None)


def _how_it_ended(state: State) -> str:
    if state.job == "ended":
        return f"the run had ended at step {state.step}: {state.verdict} (exit code {state.exit_code})"
    return (
        f"the run has no end on record, so its head node or its whole cluster was lost, in generation "
        f"{state.generation} after step {state.high_water}; what was done in the last "
        f"{journal.SEGMENT_INTERVAL_S:g} s before may not be on record"
    )


def _where_it_goes_on(state: State, restorable: int | None, spec: JobSpec) -> str:
    untold = [] if state.job == "ended" else ["what is not on record"]
    if restorable is None:
        lost = " and ".join([*_steps(0, state.high_water), *untold]) or "no step"
        return f"lost: {lost}; no checkpoint is committed, so it begins anew"
    lost = " and ".join([*_steps(restorable, state.high_water), *untold]) or "no step"
    goes_on = f"it goes on from the checkpoint of step {restorable}"
    # Memory outlives only what had no time to give it back, and is of use only to the same mesh.
    if state.job != "ended" and state.layout is not None and state.layout.is_same_mesh(spec.layout):
        return (
            f"lost: at most {lost}; {goes_on}, or from a newer step if the nodes' shared memory has kept one complete"
        )
    return f"lost: {lost}; {goes_on}"


def _steps(after: int, last: int) -> list[str]:
    if last <= after:
        return []
    return [f"step {last}" if last == after + 1 else f"steps {after + 1} to {last}"]
