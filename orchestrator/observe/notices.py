"""Events and decisions as lines for the people who watch a run."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from orchestrator.core import events as ev
from orchestrator.core.actions import (
    Action,
    EndRun,
    HaltGeneration,
    InjectFault,
    OpenGeneration,
    PublishTrust,
    ReleaseNode,
    UpdateJob,
)
from orchestrator.core.events import Event
from orchestrator.core.state import State
from trainer.contract import PROCESSES


def by_process(processes: Mapping[str, int]) -> str:
    """How many of the mesh's workers were which kind of process, such as "7 parked, 1 warm"; empty: not known."""
    return ", ".join(f"{processes[kind]} {kind}" for kind in PROCESSES if processes.get(kind))


def notices(event: Event, actions: list[Action], state: State) -> list[str]:
    """What is worth saying about an event that the supervisor, now in `state`, has answered with `actions`."""
    lines = _event(event, state)
    for action in actions:
        match action:
            case HaltGeneration():
                reason = textwrap.shorten(action.reason, 160)
                lines.append(f"generation {action.generation} halts: {reason}")
            case OpenGeneration():
                source = {"init": "new weights", "ram": "shared memory", "durable": "the checkpoint"}[action.source]
                rung = state.incident.rungs[-1] if state.incident and state.incident.rungs else "start"
                lines.append(
                    f"generation {action.generation} opens at step {action.step} from {source} "
                    f"[{rung}: {action.reason}]"
                )
                if state.incident is None and state.high_water > action.step:
                    lines.append(f"lost: steps {action.step + 1} to {state.high_water}, which are computed again")
            case UpdateJob() if isinstance(event, ev.EpochBegan):
                lines.append(f"update {action.number}: the job is the one that it has made")
            case UpdateJob() if isinstance(event, ev.StepsDone):
                lines.append(f"update {action.number}: the job is now the one that was asked for")
            case UpdateJob():
                lines.append(f"update {action.number}: the newest one that is on trial is taken back")
            case PublishTrust():
                why = f": {textwrap.shorten(action.detail, 160)}" if action.trust in ("damaged", "revoked") else ""
                by = f", says {action.by}" if action.by else ""
                lines.append(f"checkpoint of step {action.step} is {action.trust}{by}{why}")
            case ReleaseNode() if action.for_good:
                lines.append(f"node {action.node} is let go: {action.reason}")
            case InjectFault():
                who = f"rank {action.slot} on {action.node}" if action.slot is not None else action.node or "the run"
                lines.append(f"chaos: fault {action.number} is ordered, {action.fault} for {who}")
            case EndRun():
                lines.append(f"the run ends: {action.reason} (exit code {action.exit_code})")
    return lines


def _event(event: Event, state: State) -> list[str]:
    match event:
        case ev.EpochBegan() if event.epoch > 1:
            return [f"epoch {event.epoch} begins"]
        case ev.NodeJoined():
            ready = sum(node.state in ("active", "spare") for node in state.nodes.values())
            return [f"node {event.node} joined ({ready} of {state.ledger.places})"]
        case ev.NodeLost():
            return [f"node {event.node} is lost: {event.cause}"]
        case ev.NodeLeaving():
            waits = "" if state.counts["spare"] else "; it works on until another has come for it"
            return [f"node {event.node} will be taken away: {event.by}{waits}"]
        case ev.NodeSlow():
            return [f"node {event.node} is slow: {event.detail}"]
        case ev.NodeProbed():
            return [f"node {event.node} {'has passed' if event.passed else 'has not passed'} its probe: {event.detail}"]
        case ev.AuditDisagreed():
            return [f"{event.auditor} and {event.accused} disagree about step {event.step}: {event.detail}"]
        case ev.AuditSettled():
            return [f"audit {event.number} is settled: {event.wrong or 'neither'} was wrong: {event.detail}"]
        case ev.WorkerFailed() if event.kind != "collective":
            return [f"rank {event.slot} on {event.node} failed at step {event.step}: {event.error}"]
        case ev.WorkerExited() if event.signal is not None:
            return [f"rank {event.slot} on {event.node} was killed by signal {event.signal}"]
        case ev.CopyDamaged():
            detail = textwrap.shorten(event.detail, 160)
            return [f"node {event.node} holds a damaged copy of slot {event.slot}, step {event.step}: {detail}"]
        case ev.GenerationReady():
            workers = f" (workers: {told})" if (told := by_process(event.processes)) else ""
            return [f"generation {event.generation} trains{workers}"]
        case ev.Validated():
            return [f"validation loss {event.loss_millionths / 1e6:.4f} at step {event.step}"]
        case ev.CheckpointCommitted():
            return [f"checkpoint of step {event.step} is committed"]
        case ev.CheckpointVerified() if event.problems:
            return [f"{event.node} finds the checkpoint of step {event.step} damaged: {event.problems[0]}"]
        case ev.IntervalChosen():
            return [f"a checkpoint each {event.every_steps} steps from here on: {event.why}"]
        case ev.UpdateRequested() if state.update != event:
            return [f"{event.by} has asked for a change of a job that is no more: nothing is changed"]
        case ev.UpdateRequested():
            changes = [f"{name} = {value}" for name, value in event.changes.items()]
            code = [f"code {event.code[:12]}"] if event.code else []
            return [f"{event.by} asks for {', '.join(changes + code)}, from the next step boundary on"]
        case ev.CheckpointFailed():
            return [f"checkpoint of step {event.step} failed: {event.error}"]
        case ev.FaultInjected():
            return [f"chaos: fault {event.number} is done: {event.detail}"]
    return []
