"""A report's sentences: what became of a run, what each incident was, in plain English."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Sequence

from orchestrator.chaos.scorecard import Score
from orchestrator.core.actions import OpenGeneration
from orchestrator.core.state import (
    EXIT_CRASH_LOOP,
    EXIT_FAILED,
    EXIT_JOB_FAULT,
    EXIT_NO_NODES,
    EXIT_OK,
    EXIT_STOPPED,
    Evidence,
    Incident,
    JobState,
)
from orchestrator.observe.notices import by_process
from orchestrator.observe.report_fold import Generation, History, Story

EXIT_MEANINGS: dict[int, str] = {
    EXIT_OK: "all steps are done and the last checkpoint is committed",
    EXIT_FAILED: "the run failed for a reason that has no code of its own. Usually the store must be mended; then go "
    "on with --resume",
    EXIT_JOB_FAULT: "the job's own fault: the same failure came back. Requeueing will not help; mend the program, the "
    "data or the job",
    EXIT_CRASH_LOOP: "a crash loop: recovery after recovery without one new step. Look for what all nodes share: "
    "network, store, memory",
    EXIT_NO_NODES: "too few usable nodes for the mesh. Add nodes, or make the mesh smaller, and go on with --resume",
    EXIT_STOPPED: "stopped on request, or because the driver fell silent. --resume goes on from the newest checkpoint",
}
"""By exit code; docs/exit-codes.md says more."""

SOURCES = {"init": "new weights", "ram": "the nodes' shared memory", "durable": "the checkpoint"}

_DOING: dict[JobState, str] = {
    "waiting": "waiting for nodes",
    "starting": "bringing a generation up",
    "training": "training",
    "halting": "ending a generation that had failed",
    "committing": "committing its last checkpoint",
}

_SECOND = 1_000_000


def duration(us: int) -> str:
    """As people say it, with three digits or so."""
    seconds = us / _SECOND
    if seconds < 10:
        return f"{seconds:.2f} s"
    if round(seconds, 1) < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return _in_two(seconds, (60, "min"), (1, "s"))
    if seconds < 172_800:
        return _in_two(seconds, (3600, "h"), (60, "min"))
    return _in_two(seconds, (86_400, "d"), (3600, "h"))


def _in_two(seconds: float, large: tuple[int, str], small: tuple[int, str]) -> str:
    whole, part = divmod(round(seconds / small[0]), large[0] // small[0])
    return f"{whole} {large[1]} {part} {small[1]}"


def node_time(us: int) -> str:
    """Node-microseconds for people."""
    return f"{us / _SECOND:,.1f} node-seconds" if us < 36_000 * _SECOND else f"{us / _SECOND / 3600:,.1f} node-hours"


def count(n: int, noun: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{n:,} {noun}" + "s" * (n != 1)


def listed(items: Sequence[str], limit: int = 8) -> str:
    """ "a, b and c"; of more than `limit` the number of those that are not named."""
    shown = list(items[:limit]) + ([f"{len(items) - limit} more"] if len(items) > limit else [])
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]])) if shown else ""


# --- the verdict ------------------------------------------------------------------------------------------------------


def verdict(history: History) -> str:
    """What became of the run, in a few sentences."""
    return " ".join([_end(history), _goodput(history), _interruptions(history), *_last_checkpoint(history)])


def _end(history: History) -> str:
    s = history.state
    of = f"{s.high_water:,} steps" if s.is_open_ended else f"{s.high_water:,} of {s.total_steps:,} steps"
    took = f"{duration(history.active_us)} on {_places(history)}{_parts(history)}"
    if s.exit_code is None:
        return f"Not ended yet: by its journal's last record, after {took}, it was {_DOING[s.job]}, with {of} done."
    if s.exit_code == EXIT_OK:
        return f"Completed {of} in {took}."
    how = "Stopped" if s.exit_code == EXIT_STOPPED else "Failed"
    return (
        f"{how} with {of} done, after {took}: {s.verdict.rstrip('.')}. "
        f"Exit code {s.exit_code} means {EXIT_MEANINGS.get(s.exit_code, 'something this version does not know')}."
    )


def _places(history: History) -> str:
    places = [d.layout.nodes + d.layout.spares for d in history.declared]
    different = [n for n, before in zip(places, [None, *places[:-1]], strict=True) if n != before]
    return f"{', then '.join(str(n) for n in different)} node{'s' * (different[-1] != 1)}"


def _parts(history: History) -> str:
    """That a run was resumed, and how long it lay still."""
    resumes = len(history.declared) - 1
    if not resumes:
        return ""
    paused = history.wall_clock_us - history.active_us
    return f" (in {resumes + 1} parts, {duration(paused)} of pause not counted)"


def _goodput(history: History) -> str:
    totals = history.state.ledger.totals
    settled = sum(totals.values())
    if not settled:
        return "No node's time has been settled."
    awake = settled - totals["paused"]
    without = f" ({totals['productive'] / awake:.1%} without the pauses)" if totals["paused"] and awake else ""
    return f"Goodput {totals['productive'] / settled:.1%}{without}."


def _interruptions(history: History) -> str:
    stories = history.stories
    if not stories:
        return f"Nothing interrupted it; {_lost(history)}."
    cost = node_time(sum(story.cost_us for story in stories))
    return f"{count(len(stories), 'interruption')} cost {cost}; {_lost(history)}."


def _lost(history: History) -> str:
    """Completed steps that were done again, or must be."""
    s = history.state
    again = [f"{count(history.steps_redone, 'completed step')} had to be done again"] if history.steps_redone else []
    if s.exit_code is None and s.high_water > s.step:
        again.append(f"{count(s.high_water - s.step, 'completed step')} must still be done again")
    in_checkpoint = s.newest_checkpoint() or 0
    if s.exit_code not in (None, EXIT_OK) and s.high_water > in_checkpoint:
        again.append(f"a resume must do {count(s.high_water - in_checkpoint, 'completed step')} again")
    return ", and ".join(again) or "no completed step was lost"


def _last_checkpoint(history: History) -> list[str]:
    s = history.state
    newest = s.newest_checkpoint()
    if s.exit_code == EXIT_OK:
        return []
    return [f"The newest checkpoint holds step {newest:,}." if newest else "No checkpoint is committed."]


# --- incidents --------------------------------------------------------------------------------------------------------


def root(incident: Incident) -> Evidence:
    """The piece of evidence that the incident was judged by, or the first while it is not judged."""
    seen = [*incident.answered, *incident.evidence]
    return next((e for e in seen if e.kind == incident.cause), seen[0])


def what_happened(evidence: Evidence) -> str:
    """One piece of evidence as a clause."""
    node, detail = evidence.node, evidence.detail
    slot = "" if evidence.slot is None else f" of slot {evidence.slot}"
    worker = f"the worker{slot} on node {node}" if node else f"the worker{slot}" if slot else "the mesh"
    match evidence.kind:
        case "node":
            return f"node {node} was lost: {detail}"
        case "signal":
            return f"{worker} was killed by {_signal(detail)}"
        case "exit":
            return f"{worker} ended by itself, with {detail}"
        case "hang":
            return f"{worker} made no progress: {detail}"
        case "slow":
            return f"node {node} was slower than its peers: {detail}"
        case "leave":
            return f"node {node} was to be taken away: {detail}"
        case "grow":
            return f"the mesh could become larger again: {detail}"
        case "update":
            return f"the job was changed: {detail}"
        case "exception":
            return f"{worker} raised an exception: {detail}"
        case "memory":
            return f"{worker} ran out of memory: {detail}"
        case "audit":
            return f"{worker} met a number that is not finite: {detail}"
        case "corrupt":
            return f"{worker} found its own state corrupted: {detail}"
        case "diverged":
            return f"{worker} found that replicas of the state differ: {detail}"
        case "unclean":
            return f"{worker} was stopped because another rank's state was corrupt: {detail}"
        case "state":
            return f"{worker} refused the state that it was given: {detail}"
        case "store":
            return f"{worker} could not read the checkpoint, because the store failed: {detail}"
        case "collective":
            return f"{worker} lost its peers in an exchange: {detail}"
        case "start":
            return f"the generation could not be brought up{f' on node {node}' if node else ''}: {detail}"
        case "save":
            return f"the last checkpoint could not be saved: {detail}"
    return f"{evidence.kind} on {node or 'the mesh'}: {detail}"


def _signal(detail: str) -> str:
    try:
        return f"{detail} ({signal.Signals(int(detail.removeprefix('signal '))).name})"
    except ValueError:
        return detail


def headline(incident: Incident) -> str:
    """What an incident was, as a title."""
    return sentence(what_happened(root(incident)))


def sentence(clause: str) -> str:
    """With a capital letter; names at the beginning are quoted by their noun, so that they keep theirs."""
    return clause[:1].upper() + clause[1:]


def told(story: Story, interrupted: Generation) -> list[str]:
    """The course of an incident of the generation `interrupted`: sentences in the order of time."""
    incident, phases = story.incident, story.phases_us
    struck = f"It struck generation {incident.generation} after step {incident.step:,}"
    noticed = (
        f"; the step in flight and the time until it was noticed took {duration(story.detection_us)}"
        if story.detection_us
        else ""
    )
    lines = [f"{struck}{noticed}."]
    others = len(incident.evidence) + len(incident.answered) - 1
    if others:
        lines.append(f"{count(others, 'other piece')} of evidence came after it.")
    if phases["teardown"] or incident.halted_at is not None:
        lines.append(f"All its workers had ended {duration(phases['teardown'])} later.")
    lines += [f"It had to wait: {why}." for why in dict.fromkeys(story.waits)]
    lines += [took_rung(generation, before) for before, generation in itertools.pairwise([interrupted, *story.tried])]
    if incident.closed_at is not None:
        lines.append(f"The mesh had completed a step again {duration(story.total_us)} after the notice.")
    elif story.end:
        lines.append(f"The run ended before the mesh had completed a step again: {story.end}.")
    else:
        lines.append("It is still open.")
    return lines


def took_rung(generation: Generation, before: Generation) -> str:
    """One recovery that was tried, as a sentence."""
    order = generation.order
    state = f"restored step {order.step:,} from {SOURCES[order.source]}"
    if order.source == "init":
        state = "began again at step 0 with new weights"
    failed = f" It failed: {generation.end}." if generation.ready is None and generation.ended_at is not None else ""
    moved = _moved(order, before.order)
    told = by_process(generation.ready.processes) if generation.ready is not None else ""
    workers = f"its workers ({told})" if told else "its workers"
    return f"Rung “{generation.rung}”: in generation {order.generation} {moved}{workers} {state}.{failed}"


def _moved(order: OpenGeneration, before: OpenGeneration) -> str:
    """What became of the mesh, as the beginning of a sentence; empty when its nodes stay."""
    gone = [node for node in before.nodes if node not in order.nodes]
    new = [node for node in order.nodes if node not in before.nodes]
    replicas = count(order.dp_replicate, "replica")
    if order.fallback != before.fallback:
        was, now = (f"one of {each.fallback}" if each.fallback else "the declared one" for each in (before, order))
        moves = [f"with {listed(new)}"] * bool(new) + [f"without {listed(gone)}"] * bool(gone)
        return f"the mesh, until then {was}, became {now}, {' and '.join(moves)}, and "
    if order.dp_replicate > before.dp_replicate:
        return f"the mesh grew from {before.dp_replicate} to {replicas}, with {listed(new)}, and "
    if order.dp_replicate < before.dp_replicate:
        return f"the mesh went on with {replicas} instead of {before.dp_replicate}, without {listed(gone)}, and "
    return f"{listed(new)} took the place of {listed(gone)}, and " if new else ""


def cost(story: Story) -> str:
    """What the incident cost, and of what that is made up."""
    incident = story.incident
    rest = story.cost_us - story.detection_cost_us - story.recomputed_cost_us
    parts = (
        (story.detection_cost_us, "detection"),
        (rest, "recovery and waiting"),
        (story.recomputed_cost_us, "doing steps again"),
    )
    made_of = ", ".join(f"{node_time(us)} of {what}" for us, what in parts if us)
    lost = f"{count(incident.steps_lost, 'completed step')} lost" if incident.steps_lost else "no completed step lost"
    return f"Cost: {node_time(story.cost_us)}" + (f" ({made_of})" if made_of else "") + f"; {lost}."


# --- chaos ------------------------------------------------------------------------------------------------------------


def truth(score: Score) -> str:
    """What is known to be true of an injected fault, and how the run saw it."""
    where = f" of slot {score.rank}" if score.rank is not None else ""
    place = f" on node {score.node}" if score.node else ""
    lines = [f"Fault {score.number}, {score.fault}{where}{place}, ordered by {score.by} after step {score.step:,}:"]
    lines.append(f"{score.truth.rstrip('.') or 'what was done was never told'}.")
    if score.detected_after_s is not None:
        lines.append(f"Found {duration(round(score.detected_after_s * _SECOND))} after the order: {score.found}.")
    else:
        lines.append("It was not found.")
    if score.right_node is not None:
        lines.append("The right node was named." if score.right_node else "Another node was named.")
    if score.right_rank is not None:
        lines.append("The right rank was named." if score.right_rank else "Another rank was named.")
    return " ".join(lines)
