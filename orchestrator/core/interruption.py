"""The road from a failure to the next generation, and where it ends.

1. `fault`: an incident opens, the time in flight becomes detection, and every node of the mesh that is left is ordered
   to halt. Whatever else is seen to fail meanwhile is more evidence for the same incident.
2. `answered`: the last node has said what it holds, or is lost: `_recover` charges the incident to nodes, asks
   `recovery.decide` for the cheapest rung that is sufficient, and opens the next generation, waits, or ends the run.
3. A failure before that generation's first step leads here again, one rung down.
"""

from __future__ import annotations

from dataclasses import replace

from orchestrator.core import election, health, placement, recovery, updates
from orchestrator.core.actions import Action, EndRun, HaltGeneration, OpenGeneration, SetTimer
from orchestrator.core.events import Layout
from orchestrator.core.goodput import Label
from orchestrator.core.state import EXIT_STOPPED, Evidence, Incident, State
from trainer.contract import Degrees


def fault(s: State, evidence: Evidence) -> list[Action]:
    """Something has failed."""
    if s.job == "halting":
        assert s.incident is not None
        recovery.note(s.incident, evidence)
        return []
    return _interrupt(s, evidence)


def _interrupt(s: State, evidence: Evidence) -> list[Action]:
    """Open an incident (or go on with the one whose recovery failed) and halt what is left of the generation."""
    at = evidence.at
    if s.incident is None:
        s.incident = Incident(number=len(s.incidents) + 1, detected_at=at, generation=s.generation, step=s.step)
        in_flight: Label = "recovery" if evidence.kind in recovery.PLANNED else "detection"
        s.incident.cost_us += s.ledger.settle(in_flight, then="recovery")
        s.incident.ledger_before_us = _interruption_us(s)
    else:
        s.ledger.settle("recovery", then="recovery")
        s.incident.answered += s.incident.evidence
        s.incident.evidence = []
    recovery.note(s.incident, evidence)
    s.job, s.growing = "halting", False
    new_code = s.order is not None and s.order.code != s.code
    on_trial = any(trial.code != s.code for trial in s.trials)  # the code before it may be what comes next
    s.parked = "park" in s.capabilities and not s.incident.spent and not new_code and not on_trial
    s.awaiting = _still_active(s, evidence.node)
    if not s.awaiting:
        return _recover(s, at)
    return halt(s, at, f"{evidence.kind} on {evidence.node or 'the mesh'}: {evidence.detail}")


def _still_active(s: State, culprit: str) -> dict[str, None]:
    """The mesh's nodes that can be ordered to halt: as a rule all but the culprit, without a look at thousands."""
    active = dict.fromkeys(s.mesh)
    if culprit in active and s.nodes[culprit].state != "active":
        del active[culprit]
    if len(active) == s.counts["active"]:
        return active
    return {name: None for name in active if s.nodes[name].state == "active"}


def halt(s: State, at: int, reason: str) -> list[Action]:
    """Order those who have not answered yet to halt; the order may come again."""
    return [
        HaltGeneration(generation=s.generation, nodes=tuple(s.awaiting), reason=reason, park=s.parked),
        SetTimer(timer=f"halt/{s.generation}", at=at + s.declared_limits.halt_deadline_us),
    ]


def answered(s: State, at: int, node: str) -> list[Action]:
    """A node has halted, or never will. Nothing to do but for the last of them."""
    if node not in s.awaiting:
        return []
    del s.awaiting[node]
    return [] if s.awaiting else _recover(s, at)


def _recover(s: State, at: int) -> list[Action]:
    """Everybody who can has reported: charge the incident, choose the rung, and open the next generation."""
    incident = s.incident
    assert incident is not None
    incident.halted_at = at
    cause = recovery.root(incident)
    if not incident.rungs:
        incident.cause, incident.culprit = cause.kind, cause.node if recovery.is_of_a_node(cause) else ""
    elif recovery.blames_the_rung(cause):
        incident.spent.append(incident.rungs[-1])
    recovery.note_for_the_job(s, incident)
    health.forgive(s, at)
    actions: list[Action] = []
    for charged in recovery.charged(incident):
        actions += health.charge(s, charged, at)
    actions += health.quarantine_convicts(s, at)
    decision, undone = _decide(s)
    actions += undone
    incident.reason = decision.reason
    if decision.rung == "fail":
        return undone + end(s, decision.exit_code, decision.reason)
    if s.stopping and decision.source != "ram":
        return end(s, EXIT_STOPPED, f"stopped by {s.stopping}, with nothing to save: {decision.reason}")
    if decision.rung == "wait":
        s.job = "waiting"
        s.ledger.settle("recovery", then="waiting_for_nodes")
        return [*actions, SetTimer(timer=f"wait/{s.generation}", at=at + s.declared_limits.wait_deadline_us)]
    return actions + _open_from(s, at, decision)


def _decide(s: State) -> tuple[recovery.Decision, list[Action]]:
    """The next rung; it may be one with the job as it was before its newest update, which is then taken back."""
    decision = recovery.decide(s)
    why = updates.why_back(s, decision)
    if not why:
        return decision, []
    void = f", and what {s.update.by} has asked for since is void" if s.update is not None else ""
    undone = updates.take_back(s)
    decision = recovery.decide(s)
    reason = f"the job's newest update is taken back ({why}){void}; {decision.reason}"
    return replace(decision, reason=reason), undone


def open_mesh(s: State, at: int, why: str, at_least: int | None = None) -> list[Action]:
    """A generation where none runs: the first, or the one that a wait was for.

    A run begins with the whole mesh, unless no more nodes have come in the time that it waits.
    """
    if s.n_usable < (at_least or (s.declared_layout.nodes if s.incident is None else recovery.fewest_nodes(s))):
        return []
    actions = health.quarantine_convicts(s, at)
    undone: list[Action] = []
    if s.incident is not None:
        decision, undone = _decide(s)
        s.incident.reason = decision.reason
    else:
        found = recovery.largest_mesh(s, s.usable(), at_most=s.declared_layout.nodes)
        assert found is not None
        decision = recovery.first_decision(s, *found, why)
    if decision.rung == "fail":
        return undone + end(s, decision.exit_code, decision.reason)
    return actions + undone + _open_from(s, at, decision)


def _open_from(s: State, at: int, decision: recovery.Decision) -> list[Action]:
    layout = decision.layout
    assert decision.rung not in ("fail", "wait") and layout is not None, decision
    staying = set(decision.mesh)
    for place, name in enumerate(s.mesh):
        if name not in staying:
            if name in s.inventory:
                s.inventory[name] = election.placed(s.inventory[name], place * s.declared_layout.slots_per_node)
            if s.nodes[name].state == "active":
                s.move_node(name, "spare")
    for name in decision.mesh:
        if s.nodes[name].state != "active":
            s.move_node(name, "active")
        s.inventory.pop(name, None)
    first = s.incident is None
    s.generation += 1
    s.lineage[s.generation] = (_parent(s, decision), decision.step)
    updates.opened(s, decision.step)
    s.mesh, s.job = decision.mesh, "starting"
    if layout != s.mesh_layout:
        s.replicas = s.shapes[s.generation] = layout.dp_replicate
        s.fallback = _as_fallback(s, layout)
        if s.fallback is not None:
            s.fallbacks[s.generation] = s.fallback
    s.restored_step = decision.step
    if decision.step < s.floor:
        s.floor = s.reached = decision.step
    reach(s, decision.step)  # a dead node's last report may be missing, its snapshot not
    s.recoveries_without_progress += not (first or recovery.is_planned(s.incident))
    s.ledger.mesh_label = "start_up" if first else "recovery"
    s.ledger.empty_label = "degraded_capacity"
    s.ledger.idle_label = "idle_spare" if layout == s.declared_layout else "degraded_capacity"
    if s.incident is not None:
        s.incident.rungs.append(decision.rung)
        s.incident.ordered_at, s.incident.restored_step = at, decision.step
    writers = s.layout_of(decision.snapshot_generation) if decision.source == "ram" else layout
    s.order = OpenGeneration(
        generation=s.generation,
        nodes=decision.mesh,
        source=decision.source,
        step=decision.step,
        snapshot_generation=decision.snapshot_generation,
        transfers=decision.transfers,
        reason=decision.reason,
        dp_replicate=layout.dp_replicate,
        snapshot_dp_replicate=writers.dp_replicate,
        fallback=s.fallback,
        snapshot_fallback=_as_fallback(s, writers),
        buddies=_buddies(s),
        code=s.code,
    )
    return [s.order, SetTimer(timer=f"start/{s.generation}", at=at + s.declared_limits.start_deadline_us)]


def _as_fallback(s: State, layout: Layout) -> Degrees | None:
    """The layout as one of those that the declared one falls back to, if it is."""
    declared = s.declared_layout
    return None if layout == declared.with_replicas(layout.dp_replicate) else layout.degrees


def _parent(s: State, decision: recovery.Decision) -> int:
    """The generation whose state is restored."""
    if decision.source == "durable":
        return s.checkpoints[decision.step].generation
    return decision.snapshot_generation


def _buddies(s: State) -> tuple[int, ...]:
    """Who keeps copies; nobody where the replicas of every shard are copies, in more than one failure domain."""

    def domain_of(name: str) -> str:
        return s.nodes[name].domain

    if "buddy" not in s.capabilities or placement.replicas_apart(s.mesh_layout, s.mesh, domain_of):
        return ()
    return placement.buddies(s.mesh, domain_of)


def suspend(s: State) -> None:
    """Nothing runs from here on; the time until a resume is a pause."""
    settled = s.ledger.settle("detection" if s.incident is not None else "other", then="paused")
    s.ledger.empty_label = "paused"
    if s.incident is not None:
        s.incident.cost_us += settled
        _archive(s)


def reach(s: State, step: int) -> None:
    """The mesh has completed `step`, or holds its state."""
    s.step = step
    if step > s.reached:
        s.reached, s.recoveries_without_progress = step, 0
    if step > s.high_water:
        s.high_water = s.floor = step


def close(s: State, at: int) -> None:
    """The mesh has completed a step again."""
    assert s.incident is not None
    s.incident.closed_at = at
    _archive(s)


def _archive(s: State) -> None:
    assert s.incident is not None
    s.incident.cost_us += _interruption_us(s) - s.incident.ledger_before_us
    s.incidents.append(s.incident)
    s.incident = None


def end(s: State, exit_code: int, reason: str) -> list[Action]:
    """The run is over."""
    suspend(s)
    s.job, s.exit_code, s.verdict, s.awaiting = "ended", exit_code, reason, {}
    return [EndRun(exit_code=exit_code, reason=reason)]


def _interruption_us(s: State) -> int:
    """Node-microseconds that interruptions have cost so far, detection and recomputation apart."""
    return s.ledger.totals["recovery"] + s.ledger.totals["waiting_for_nodes"]
