"""The supervisor: everything that Shepherd decides, in one deterministic state machine.

    actions = supervisor.handle(event)

It knows no Ray, no torch, no clock, no file and no thread. The same events give the same actions, so its journal is
its memory: a controller that comes back folds the journal and stands where the last one stood.

What happens when a node dies, told once:

1. `_on_node_lost` marks the node and calls `_fault`: an incident opens, the time in flight becomes detection, and
   every other node of the mesh is ordered to halt (`HaltGeneration`). State "halting".
2. Each halted node answers `NodeHalted` with the snapshots in its shared memory. One that does not answer within
   `halt_deadline` is lost, too.
3. `_recover` asks `recovery.decide` for the cheapest rung that is sufficient, and orders `OpenGeneration` with the
   spare in the dead node's place. State "starting".
4. `GenerationReady`: every rank has its state. State "training". The first completed step closes the incident.

A dead worker takes the same road; its node stays. A failure on the way is more evidence for the open incident, and the
next rung down is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.core import checkpoints, election, placement, recovery
from orchestrator.core import events as ev
from orchestrator.core.actions import (
    Action,
    AskStop,
    EndRun,
    HaltGeneration,
    InjectFault,
    OpenGeneration,
    ReleaseNode,
    SaveEvery,
    SetTimer,
)
from orchestrator.core.goodput import Label
from orchestrator.core.state import (
    EXIT_FAILED,
    EXIT_NO_NODES,
    EXIT_OK,
    EXIT_STOPPED,
    NODE_STATES,
    OWN_PLACE,
    Evidence,
    Fault,
    Held,
    Incident,
    State,
)


class Supervisor:
    """Folds events into `state` and answers each with actions. Not thread-safe: it has one caller."""

    def __init__(self, state: State | None = None) -> None:
        self.state = state or State()

    def handle(self, event: ev.Event) -> list[Action]:
        """What to do about `event`.

        Raises:
            AssertionError: an invariant does not hold; the caller must not use this supervisor's state any more.
        """
        if isinstance(event, ev.RunDeclared):
            self._suspend()
        self.state.ledger.advance(event.at)
        if self.state.job == "ended" and not isinstance(event, (ev.RunDeclared, ev.EpochBegan)):
            return []
        before = (self.state.job, self.state.generation)
        actions = _HANDLERS[type(event)](self, event)
        self._count_nodes()
        self.state.check()
        if before != (self.state.job, self.state.generation) and self.state.job != "training":
            self.state.check_nodes()
        return actions

    # --- the run ----------------------------------------------------------------------------------------------------

    def _on_run_declared(self, event: ev.RunDeclared) -> list[Action]:
        """The first event, or a resume: nodes and generation start anew, checkpoints and ledger go on."""
        s = self.state
        assert s.run in ("", event.run), (s.run, event.run)
        s.began_at = s.began_at if s.run else event.at
        s.run, s.layout, s.limits = event.run, event.layout, event.limits
        s.total_steps, s.capabilities = event.total_steps, event.capabilities
        s.job, s.exit_code, s.verdict, s.stopping = "waiting", None, "", ""
        s.interval = None  # the document may say another one now
        s.first_generation = s.generation + 1
        s.mesh, s.nodes, s.inventory, s.order, s.awaiting = (), {}, {}, None, {}
        s.counts = dict.fromkeys(NODE_STATES, 0)
        s.errors, s.bad_snapshots, s.unclean, s.recoveries_without_progress = {}, {}, {}, 0
        # Who resumes has looked: what was found damaged may have been mended, and is tried again.
        s.checkpoints = {step: c for step, c in s.checkpoints.items() if c.trust != "damaged"}
        s.ledger.places = event.layout.nodes + event.layout.spares
        s.ledger.mesh_label = s.ledger.empty_label = "provisioning"
        return [self._timer(f"wait/{s.generation}", event.at + event.limits.wait_deadline_us)]

    def _on_epoch_began(self, event: ev.EpochBegan) -> list[Action]:
        """A controller came back: order again what may not have arrived. What agents held back, they will report."""
        s = self.state
        assert event.epoch > s.epoch, (event.epoch, s.epoch)
        s.epoch = event.epoch
        if s.exit_code is not None:
            return [EndRun(exit_code=s.exit_code, reason=s.verdict)]
        written = [step for step, checkpoint in s.checkpoints.items() if checkpoint.trust == "written"]
        again: list[Action] = [checkpoints.commit(s, step) for step in written]
        if s.job == "starting":
            assert s.order is not None
            again += [s.order, self._timer(f"start/{s.generation}", event.at + self._limits.start_deadline_us)]
        elif s.job == "halting":
            again += self._halt(event.at, "the controller came back while the generation was halting")
        elif s.job == "waiting" and s.run:
            again.append(self._timer(f"wait/{s.generation}", event.at + self._limits.wait_deadline_us))
        elif s.job == "committing":
            again.append(self._timer(f"commit/{s.generation}", event.at + self._limits.commit_deadline_us))
        elif s.job == "training" and s.stopping:
            again.append(AskStop(generation=s.generation))
        return again + self._save_every()

    def _on_stop_requested(self, event: ev.StopRequested) -> list[Action]:
        s = self.state
        if event.graceful and s.job == "training":
            s.stopping = event.by
            return [AskStop(generation=s.generation)]
        if event.graceful and s.job in ("starting", "halting", "committing"):
            s.stopping = event.by
            return []
        return self._end(EXIT_STOPPED, f"stopped by {event.by}")

    def _on_nodes_refused(self, event: ev.NodesRefused) -> list[Action]:
        """Waiting would not help. A mesh that runs goes on."""
        return self._end(EXIT_FAILED, event.error) if self.state.job == "waiting" else []

    # --- nodes come and go ------------------------------------------------------------------------------------------

    def _on_node_joined(self, event: ev.NodeJoined) -> list[Action]:
        s = self.state
        known = s.nodes.get(event.node)
        if known is not None and known.state != "lost":
            return []
        if known is not None:
            return [ReleaseNode(node=event.node, reason="its name was lost before")]
        s.add_node(event.node, event.domain)
        if s.n_usable > s.ledger.places:
            s.move_node(event.node, "lost")
            return [ReleaseNode(node=event.node, reason="no place is free")]
        s.inventory[event.node] = election.inventory_of(event.snapshots, s.first_generation)
        return self._open(event.at, "enough nodes have joined") if s.job == "waiting" else []

    def _on_node_lost(self, event: ev.NodeLost) -> list[Action]:
        s = self.state
        node = s.nodes.get(event.node)
        if node is None or node.state == "lost":
            return []
        held = node.state == "active" and s.job in ("starting", "training", "halting")
        s.move_node(event.node, "lost")
        s.inventory.pop(event.node, None)
        actions: list[Action] = [ReleaseNode(node=event.node, reason=event.cause)]
        if held:
            actions += self._fault(self._evidence(event.at, event.node, None, "node", event.cause))
        return actions + self._no_longer_awaited(event.at, event.node)

    # --- a generation -----------------------------------------------------------------------------------------------

    def _on_generation_ready(self, event: ev.GenerationReady) -> list[Action]:
        s = self.state
        if s.job != "starting" or event.generation != s.generation:
            return []
        if event.step != s.restored_step:
            wrong = f"ready at step {event.step}, ordered was {s.restored_step}"
            return self._fault(self._evidence(event.at, "", None, "start", wrong))
        s.job = "training"
        s.ledger.settle("other", then="recovery")
        s.ledger.train()
        if s.incident is not None:
            s.incident.ready_at = event.at
            s.incident.rendezvous_us, s.incident.build_us = event.rendezvous_us, event.build_us
            s.incident.restore_us = event.restore_us
        return self._save_every() + ([AskStop(generation=s.generation)] if s.stopping else [])

    def _on_steps_done(self, event: ev.StepsDone) -> list[Action]:
        s = self.state
        if s.job not in ("training", "halting") or event.generation != s.generation or event.last <= s.step:
            return []
        stalls: dict[Label, int] = {
            "data_wait": event.data_wait_us,
            "checkpoint_stall": event.checkpoint_us,
            "validation": event.validation_us,
        }
        self._complete(event.at, event.last, stalls)
        return []

    def _complete(self, at: int, step: int, stalls: dict[Label, int]) -> None:
        """Every rank has completed `step`, and so all before it."""
        s = self.state
        steps, new_steps = step - s.step, max(0, step - s.high_water)
        self._reach(step)
        if s.job == "halting":  # done before the halt reached it; its time is settled as detection already
            if s.incident is not None and not s.incident.rungs:
                s.incident.step = step
            return
        recomputed = s.ledger.settle_steps(steps, new_steps, stalls)
        if s.incident is not None:
            self._close_incident(at)
        if s.incidents:
            s.incidents[-1].cost_us += recomputed

    def _on_generation_finished(self, event: ev.GenerationFinished) -> list[Action]:
        """Every rank has saved and left: what happens to a worker or a node from here on changes nothing."""
        s = self.state
        if s.job != "training" or event.generation != s.generation or event.step < s.step:
            return []
        if event.step > s.step:  # the last report of steps was lost with the controller before
            self._complete(event.at, event.step, {})
        last = s.checkpoints.get(s.step)
        if last is None or last.trust in checkpoints.DISTRUSTED:
            return self._fault(self._evidence(event.at, "", None, "save", "the last checkpoint could not be written"))
        s.ledger.settle("checkpoint_stall", then="checkpoint_stall")
        s.job = "committing"
        if s.incident is not None:
            self._close_incident(event.at)
        return self._finish_if_saved() or [
            self._timer(f"commit/{s.generation}", event.at + self._limits.commit_deadline_us)
        ]

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _on_checkpoint_written(self, event: ev.CheckpointWritten) -> list[Action]:
        return checkpoints.written(self.state, event)

    def _on_checkpoint_committed(self, event: ev.CheckpointCommitted) -> list[Action]:
        if not checkpoints.committed(self.state, event):
            return []
        return checkpoints.retire(self.state) + self._finish_if_saved()

    def _on_checkpoint_failed(self, event: ev.CheckpointFailed) -> list[Action]:
        s = self.state
        if checkpoints.failed(s, event) and s.job == "committing" and event.step == s.step:
            return self._fault(self._evidence(event.at, "", None, "save", event.error))
        return []

    def _on_checkpoints_found(self, event: ev.CheckpointsFound) -> list[Action]:
        checkpoints.found(self.state, event)
        return checkpoints.retire(self.state) + self._finish_if_saved()

    def _on_interval_chosen(self, event: ev.IntervalChosen) -> list[Action]:
        assert event.every_steps >= 1, event
        self.state.interval = event
        return self._save_every()

    def _save_every(self) -> list[Action]:
        """The chosen interval, told to a generation that trains. One that starts is told as soon as it does."""
        s = self.state
        if s.interval is None or s.job != "training":
            return []
        return [SaveEvery(generation=s.generation, steps=s.interval.every_steps)]

    # --- failures ---------------------------------------------------------------------------------------------------

    def _on_worker_failed(self, event: ev.WorkerFailed) -> list[Action]:
        s = self.state
        if event.generation != s.generation or s.order is None:
            return []
        if event.kind == "state":
            self._distrust(s.order, event.error)
        if event.kind in recovery.UNCLEAN:
            self._mark_unclean(s.order, event.step)
        if s.job not in ("starting", "training", "halting"):
            return []
        return self._fault(
            Evidence(
                at=event.at, node=event.node, slot=event.slot, kind=event.kind, detail=event.error, step=event.step
            )
        )

    def _on_worker_exited(self, event: ev.WorkerExited) -> list[Action]:
        s = self.state
        if event.generation != s.generation or s.job not in ("starting", "training", "halting"):
            return []
        halted = s.incident if s.job == "halting" else None
        if halted is not None and recovery.has_told_why(halted, event.node, event.slot, event.exit_code):
            return []
        kind = "exit" if event.signal is None else "signal"
        detail = f"exit code {event.exit_code}" if event.signal is None else f"signal {event.signal}"
        return self._fault(self._evidence(event.at, event.node, event.slot, kind, detail))

    def _on_generation_failed(self, event: ev.GenerationFailed) -> list[Action]:
        s = self.state
        if event.generation != s.generation or s.job != "starting":
            return []
        return self._fault(self._evidence(event.at, event.node, None, "start", event.error))

    def _on_worker_hung(self, event: ev.WorkerHung) -> list[Action]:
        """Its agent has lost patience with it; the halt's SIGKILL ends also what is stopped."""
        s = self.state
        if event.generation != s.generation or s.job not in ("starting", "training", "halting"):
            return []
        return self._fault(
            Evidence(at=event.at, node=event.node, slot=event.slot, kind="hang", detail=event.detail, step=event.step)
        )

    def _on_node_halted(self, event: ev.NodeHalted) -> list[Action]:
        s = self.state
        if s.job != "halting" or event.generation != s.generation or event.node not in s.awaiting:
            return []
        s.inventory[event.node] = election.inventory_of(event.snapshots, s.first_generation)
        return self._no_longer_awaited(event.at, event.node)

    def _on_nodes_halted(self, event: ev.NodesHalted) -> list[Action]:
        s = self.state
        if s.job != "halting" or event.generation != s.generation:
            return []
        snapshots = tuple(snapshot for snapshot in event.snapshots if snapshot.generation >= s.first_generation)
        alike = Held(first=OWN_PLACE, slots=self._layout.slots_per_node, snapshots=snapshots)
        held = (alike,) if snapshots else ()
        for name in event.nodes:
            if name in s.awaiting:
                del s.awaiting[name]
                s.inventory[name] = held
        return [] if s.awaiting else self._recover(event.at)

    def _on_timer(self, event: ev.TimerFired) -> list[Action]:
        s = self.state
        name, _, generation = event.timer.partition("/")
        if generation != str(s.generation):
            return []
        if name == "wait" and s.job == "waiting":
            have, need = s.n_usable, self._layout.nodes
            return self._end(EXIT_NO_NODES, f"the mesh needs {need} nodes, {have} were usable when the wait ended")
        if name == "halt" and s.job == "halting":
            actions: list[Action] = []
            for node in tuple(s.awaiting):
                lost = ev.NodeLost(at=event.at, node=node, cause="did not halt within its deadline")
                actions += self._on_node_lost(lost)
            return actions
        if name == "start" and s.job == "starting":
            return self._fault(self._evidence(event.at, "", None, "start", "not ready within its deadline"))
        if name == "commit" and s.job == "committing":
            return self._end(EXIT_FAILED, f"the last checkpoint (step {s.step}) was not committed within its deadline")
        return []

    # --- chaos ------------------------------------------------------------------------------------------------------

    def _on_fault_requested(self, event: ev.FaultRequested) -> list[Action]:
        """Harm is ordered by somebody who tests the run: its ground truth stands in the journal before it is done."""
        s = self.state
        node, slot = event.node, event.slot
        if not node and slot is not None and slot < len(s.mesh) * self._layout.slots_per_node:
            node = s.mesh[slot // self._layout.slots_per_node]
        number = len(s.faults) + 1
        s.faults.append(Fault(number=number, fault=event.fault, node=node, slot=slot, step=s.step, ordered_at=event.at))
        return [
            InjectFault(
                number=number,
                generation=s.generation,
                fault=event.fault,
                node=node,
                slot=slot,
                parameters=event.parameters,
            )
        ]

    def _on_fault_injected(self, event: ev.FaultInjected) -> list[Action]:
        faults = self.state.faults
        fault = faults[event.number - 1] if 1 <= event.number <= len(faults) else None
        if fault is not None and fault.injected_at is None:
            fault.injected_at, fault.detail = event.at, event.detail
        return []

    # --- the road from a failure to the next generation --------------------------------------------------------------

    def _fault(self, evidence: Evidence) -> list[Action]:
        s = self.state
        if s.job == "halting":
            assert s.incident is not None
            recovery.note(s.incident, evidence)
            return []
        return self._interrupt(evidence.at, evidence)

    def _interrupt(self, at: int, evidence: Evidence) -> list[Action]:
        """Open an incident (or go on with the one whose recovery failed) and halt what is left of the generation."""
        s = self.state
        if s.incident is None:
            s.incident = Incident(number=len(s.incidents) + 1, detected_at=at, generation=s.generation, step=s.step)
            s.incident.ledger_before_us = _interruption_us(s)
            s.incident.cost_us += s.ledger.settle("detection", then="recovery")
        else:
            s.ledger.settle("recovery", then="recovery")
            s.incident.answered += s.incident.evidence
            s.incident.evidence = []
        recovery.note(s.incident, evidence)
        s.job = "halting"
        s.awaiting = dict.fromkeys(name for name in s.mesh if s.nodes[name].state == "active")
        if not s.awaiting:
            return self._recover(at)
        return self._halt(at, f"{evidence.kind} on {evidence.node or 'the mesh'}: {evidence.detail}")

    def _halt(self, at: int, reason: str) -> list[Action]:
        s = self.state
        return [
            HaltGeneration(generation=s.generation, nodes=tuple(s.awaiting), reason=reason),
            self._timer(f"halt/{s.generation}", at + self._limits.halt_deadline_us),
        ]

    def _no_longer_awaited(self, at: int, node: str) -> list[Action]:
        s = self.state
        if node not in s.awaiting:
            return []
        del s.awaiting[node]
        return [] if s.awaiting else self._recover(at)

    def _recover(self, at: int) -> list[Action]:
        """Everybody who can has reported: charge the incident, choose the rung, and open the next generation."""
        s = self.state
        incident = s.incident
        assert incident is not None
        incident.halted_at = at
        cause = recovery.root(incident)
        if not incident.rungs:
            incident.cause, incident.culprit = cause.kind, cause.node if recovery.is_of_a_node(cause) else ""
        elif recovery.blames_the_rung(cause):
            incident.spent.append(incident.rungs[-1])
        recovery.note_for_the_job(s, incident)
        for charged in recovery.charged(incident):
            self._charge_node(charged)
        self._quarantine_convicts()
        decision = recovery.decide(s)
        incident.reason = decision.reason
        if decision.rung == "fail":
            return self._end(decision.exit_code, decision.reason)
        if s.stopping and decision.source != "ram":
            return self._end(EXIT_STOPPED, f"stopped by {s.stopping}, with nothing to save: {decision.reason}")
        if decision.rung == "wait":
            s.job = "waiting"
            s.ledger.settle("recovery", then="waiting_for_nodes")
            return [self._timer(f"wait/{s.generation}", at + self._limits.wait_deadline_us)]
        return self._open_from(at, decision)

    def _open(self, at: int, why: str) -> list[Action]:
        """A generation where none runs: the first, or the one that a wait was for."""
        s = self.state
        if s.n_usable < self._layout.nodes:
            return []
        self._quarantine_convicts()
        if s.incident is not None:
            decision = recovery.decide(s)
            s.incident.reason = decision.reason
        else:
            mesh = placement.place(self._layout, s.mesh, s.usable(), {})
            assert mesh is not None
            decision = recovery.durable_decision(s, mesh, why)
        if decision.rung == "fail":
            return self._end(decision.exit_code, decision.reason)
        return self._open_from(at, decision)

    def _open_from(self, at: int, decision: recovery.Decision) -> list[Action]:
        s = self.state
        assert decision.rung not in ("fail", "wait"), decision
        staying = set(decision.mesh)
        for place, name in enumerate(s.mesh):
            if name not in staying:
                if name in s.inventory:
                    s.inventory[name] = election.placed(s.inventory[name], place * self._layout.slots_per_node)
                if s.nodes[name].state == "active":
                    s.move_node(name, "spare")
        for name in decision.mesh:
            if s.nodes[name].state != "active":
                s.move_node(name, "active")
            s.inventory.pop(name, None)
        first = s.incident is None
        s.generation += 1
        s.mesh, s.job = decision.mesh, "starting"
        s.restored_step = decision.step
        if decision.step < s.floor:
            s.floor = s.reached = decision.step
        self._reach(decision.step)  # a dead node's last report may be missing, its snapshot not
        s.recoveries_without_progress += not first
        s.ledger.mesh_label = "start_up" if first else "recovery"
        s.ledger.empty_label = "degraded_capacity"
        if s.incident is not None:
            s.incident.rungs.append(decision.rung)
            s.incident.ordered_at, s.incident.restored_step = at, decision.step
        s.order = OpenGeneration(
            generation=s.generation,
            nodes=decision.mesh,
            source=decision.source,
            step=decision.step,
            snapshot_generation=decision.snapshot_generation,
            transfers=decision.transfers,
            reason=decision.reason,
        )
        return [s.order, self._timer(f"start/{s.generation}", at + self._limits.start_deadline_us)]

    def _suspend(self) -> None:
        """Nothing runs from here on; the time until a resume is a pause."""
        s = self.state
        settled = s.ledger.settle("detection" if s.incident is not None else "other", then="paused")
        s.ledger.empty_label = "paused"
        if s.incident is not None:
            s.incident.cost_us += settled
            self._archive_incident()

    # --- small parts ------------------------------------------------------------------------------------------------

    def _reach(self, step: int) -> None:
        """The mesh has completed `step`, or holds its state."""
        s = self.state
        s.step = step
        if step > s.reached:
            s.reached, s.recoveries_without_progress = step, 0
        if step > s.high_water:
            s.high_water = s.floor = step

    def _charge_node(self, cause: Evidence) -> None:
        """A strike for a node that failed; it is quarantined when that is its fault and a spare can replace it."""
        s = self.state
        node = s.nodes.get(cause.node)
        if node is None:
            return
        node.strikes += 1
        node.convicted = node.convicted or cause.kind == "corrupt"
        if node.strikes >= self._limits.strikes or recovery.follows_one_node(s, cause):
            self._quarantine(cause.node)

    def _quarantine(self, name: str) -> None:
        s = self.state
        if s.nodes[name].state in ("active", "spare") and s.n_usable > self._layout.nodes:
            s.move_node(name, "quarantined")

    def _quarantine_convicts(self) -> None:
        """Also those that no spare could replace when they were convicted."""
        for name, node in self.state.nodes.items():
            if node.convicted:
                self._quarantine(name)

    def _distrust(self, order: OpenGeneration, error: str) -> None:
        """A worker refused the state that it was given: never give it again."""
        s = self.state
        if order.source == "durable":
            checkpoints.refuse(s, order)
        elif order.source == "ram":
            s.bad_snapshots[ev.Snapshot(generation=order.snapshot_generation, step=order.step).name] = error

    def _mark_unclean(self, order: OpenGeneration, step: int) -> None:
        """State was found corrupt after `step`: what holds that state, or what came of it, is not restored from.

        The check before was passed, so a snapshot of the step before is clean. When that state was restored, not
        computed, it is its writer's checkpoint that may hold it; a durable one was whole when it was read.
        """
        s = self.state
        s.unclean[s.generation] = min(step, s.unclean.get(s.generation, step))
        if step > order.step:
            checkpoints.revoke(s, s.generation, step)
        elif order.source == "ram":
            checkpoints.revoke(s, order.snapshot_generation, step)

    def _close_incident(self, at: int) -> None:
        assert self.state.incident is not None
        self.state.incident.closed_at = at
        self._archive_incident()

    def _archive_incident(self) -> None:
        s = self.state
        assert s.incident is not None
        s.incident.cost_us += _interruption_us(s) - s.incident.ledger_before_us
        s.incidents.append(s.incident)
        s.incident = None

    def _finish_if_saved(self) -> list[Action]:
        s = self.state
        saved = s.step in s.checkpoints and s.checkpoints[s.step].trust == "committed"
        return self._finish() if s.job == "committing" and saved else []

    def _finish(self) -> list[Action]:
        s = self.state
        if s.step == s.total_steps:
            return self._end(EXIT_OK, f"all {s.total_steps} steps done")
        return self._end(EXIT_STOPPED, f"stopped by {s.stopping} at step {s.step}")

    def _end(self, exit_code: int, reason: str) -> list[Action]:
        s = self.state
        self._suspend()
        s.job, s.exit_code, s.verdict, s.awaiting = "ended", exit_code, reason, {}
        return [EndRun(exit_code=exit_code, reason=reason)]

    def _timer(self, timer: str, at: int) -> SetTimer:
        return SetTimer(timer=timer, at=at)

    def _evidence(self, at: int, node: str, slot: int | None, kind: str, detail: str) -> Evidence:
        return Evidence(at=at, node=node, slot=slot, kind=kind, detail=detail, step=self.state.step)

    def _count_nodes(self) -> None:
        """Tell the ledger who holds places; while the mesh trains, its number is that of its nodes."""
        s = self.state
        if s.job == "ended":
            s.ledger.populate(0, 0)
            return
        s.ledger.populate(s.counts["active"], s.counts["spare"])

    @property
    def _limits(self) -> ev.Limits:
        assert self.state.limits is not None
        return self.state.limits

    @property
    def _layout(self) -> ev.Layout:
        assert self.state.layout is not None
        return self.state.layout


def _interruption_us(state: State) -> int:
    """Node-microseconds that interruptions have cost so far, detection and recomputation apart."""
    return state.ledger.totals["recovery"] + state.ledger.totals["waiting_for_nodes"]


_HANDLERS: dict[type, Callable[[Supervisor, Any], list[Action]]] = {
    ev.RunDeclared: Supervisor._on_run_declared,
    ev.EpochBegan: Supervisor._on_epoch_began,
    ev.StopRequested: Supervisor._on_stop_requested,
    ev.NodesRefused: Supervisor._on_nodes_refused,
    ev.NodeJoined: Supervisor._on_node_joined,
    ev.NodeLost: Supervisor._on_node_lost,
    ev.GenerationReady: Supervisor._on_generation_ready,
    ev.StepsDone: Supervisor._on_steps_done,
    ev.Validated: lambda self, event: [],
    ev.GenerationFinished: Supervisor._on_generation_finished,
    ev.CheckpointWritten: Supervisor._on_checkpoint_written,
    ev.CheckpointCommitted: Supervisor._on_checkpoint_committed,
    ev.CheckpointFailed: Supervisor._on_checkpoint_failed,
    ev.CheckpointsFound: Supervisor._on_checkpoints_found,
    ev.IntervalChosen: Supervisor._on_interval_chosen,
    ev.WorkerFailed: Supervisor._on_worker_failed,
    ev.WorkerExited: Supervisor._on_worker_exited,
    ev.WorkerHung: Supervisor._on_worker_hung,
    ev.GenerationFailed: Supervisor._on_generation_failed,
    ev.NodeHalted: Supervisor._on_node_halted,
    ev.NodesHalted: Supervisor._on_nodes_halted,
    ev.FaultRequested: Supervisor._on_fault_requested,
    ev.FaultInjected: Supervisor._on_fault_injected,
    ev.TimerFired: Supervisor._on_timer,
}
