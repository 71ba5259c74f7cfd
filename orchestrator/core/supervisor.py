"""The supervisor: everything that Shepherd decides, in one deterministic state machine.

    actions = supervisor.handle(event)

It knows no Ray, no torch, no clock, no file and no thread. The same events give the same actions, so its journal is
its memory: a controller that comes back folds the journal and stands where the last one stood.

What happens when a node dies, told once:

1. `_on_node_lost` marks the node and calls `interruption.fault`: an incident opens, the time in flight becomes
   detection, and every other node of the mesh is ordered to halt (`HaltGeneration`). State "halting".
2. Each halted node answers `NodeHalted` with the snapshots in its shared memory. One that does not answer within
   `halt_deadline` is lost, too.
3. With the last answer, `recovery.decide` names the cheapest rung that is sufficient, and `OpenGeneration` is ordered
   with the spare in the dead node's place. State "starting".
4. `GenerationReady`: every rank has its state. State "training". The first completed step closes the incident.

A dead worker takes the same road; its node stays. A failure on the way is more evidence for the open incident, and the
next rung down is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from orchestrator.core import checkpoints, election, health, interruption, planned, recovery, trust, updates
from orchestrator.core import events as ev
from orchestrator.core.actions import (
    Action,
    AskStop,
    EndRun,
    InjectFault,
    OpenGeneration,
    ReleaseNode,
    SaveEvery,
    SetTimer,
    UpdateJob,
)
from orchestrator.core.goodput import Label
from orchestrator.core.state import (
    DISTRUSTED,
    EXIT_FAILED,
    EXIT_NO_NODES,
    EXIT_OK,
    EXIT_STOPPED,
    NODE_STATES,
    OWN_PLACE,
    USABLE,
    Evidence,
    Fault,
    Held,
    State,
)

_HOLDS_SLOTS = ("starting", "training", "halting")


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
            interruption.suspend(self.state)
        over = self.state.job == "ended" and not isinstance(event, ev.RunDeclared)
        if over and not isinstance(event, ev.EpochBegan):
            return []
        if not over:  # the ledger stays as it was told with the verdict; a resume counts the time since
            self.state.ledger.advance(event.at)
        before = (self.state.job, self.state.generation)
        actions = _HANDLERS[type(event)](self, event)
        if self.state.job == "training" and self.state.incident is None:
            actions += planned.in_peace(self.state, event.at, isinstance(event, ev.StepsDone))
        if self.state.job == "training" and self.state.incident is None:
            actions += trust.next_verification(self.state, event.at)
        self._count_nodes()
        self.state.check()
        if before != (self.state.job, self.state.generation) and self.state.job != "training":
            self.state.check_nodes()
        return actions

    # --- the run ----------------------------------------------------------------------------------------------------

    def _on_run_declared(self, event: ev.RunDeclared) -> list[Action]:
        """The first event, or a resume: nodes and generation start anew, checkpoints and ledger go on.

        What shared memory has kept through the loss of the whole cluster counts, if the mesh is the same.
        """
        s = self.state
        assert s.run in ("", event.run), (s.run, event.run)
        if s.layout is None or not s.layout.is_same_mesh(event.layout):
            s.first_generation = s.generation + 1
            s.shapes, s.fallbacks, s.lineage, s.unclean, s.bad_snapshots = {}, {}, {}, {}, {}
        s.began_at = s.began_at if s.run else event.at
        s.run, s.layout, s.limits = event.run, event.layout, event.limits
        s.total_steps, s.capabilities = event.total_steps, event.capabilities
        s.job, s.exit_code, s.verdict, s.stopping = "waiting", None, "", ""
        s.interval, s.update, s.trials, s.changes, s.code = None, None, [], {}, ""  # the document says what it is now
        s.mesh, s.nodes, s.inventory, s.order, s.awaiting = (), {}, {}, None, {}
        s.replicas = s.shapes[s.generation + 1] = event.layout.dp_replicate
        s.fallback = None
        s.growing, s.grown_in_vain = False, 0
        s.counts = dict.fromkeys(NODE_STATES, 0)
        s.strikes, s.convicted, s.probation, s.leaving, s.drained = {}, {}, {}, {}, {}
        s.disputes, s.disagreements, s.probes, s.slow = {}, [], {}, {}
        s.errors, s.recoveries_without_progress = {}, 0
        s.verification, s.readers, s.misread = None, {}, {}
        checkpoints.resumed(s)
        s.damaged_copies = {}
        s.ledger.places = event.layout.nodes + event.layout.spares
        s.ledger.mesh_label = s.ledger.empty_label = "provisioning"
        return [SetTimer(timer=f"wait/{s.generation}", at=event.at + event.limits.wait_deadline_us)]

    def _on_epoch_began(self, event: ev.EpochBegan) -> list[Action]:
        """A controller came back: order again what may not have arrived. What agents held back, they will report."""
        s = self.state
        assert event.epoch > s.epoch, (event.epoch, s.epoch)
        s.epoch = event.epoch
        if s.exit_code is not None:
            return [EndRun(exit_code=s.exit_code, reason=s.verdict)]
        written = [step for step, checkpoint in s.checkpoints.items() if checkpoint.trust == "written"]
        again: list[Action] = [UpdateJob(number=s.n_updates, changes=s.changes)] if s.changes else []
        again += [checkpoints.commit(s, step) for step in written]
        if s.job == "starting":
            assert s.order is not None
            again += [
                s.order,
                SetTimer(timer=f"start/{s.generation}", at=event.at + s.declared_limits.start_deadline_us),
            ]
        elif s.job == "halting":
            again += interruption.halt(s, event.at, "the controller came back while the generation was halting")
        elif s.job == "waiting" and s.run:
            again.append(SetTimer(timer=f"wait/{s.generation}", at=event.at + s.declared_limits.wait_deadline_us))
        elif s.job == "committing":
            again.append(SetTimer(timer=f"commit/{s.generation}", at=event.at + s.declared_limits.commit_deadline_us))
        elif s.job == "training" and s.stopping:
            again.append(AskStop(generation=s.generation))
        s.growing = False  # its timer went with the controller
        for name in list(s.probes):
            again += health.probe(s, name, event.at)
        for asked in s.disagreements:
            again += health.ask(s, asked, event.at)
        again += self._published(s.checkpoints) + trust.order_again(s, event.at)
        return again + self._save_every()

    def _on_stop_requested(self, event: ev.StopRequested) -> list[Action]:
        s = self.state
        if event.graceful and s.job == "training":
            s.stopping = event.by
            return [AskStop(generation=s.generation)]
        if event.graceful and s.job in ("starting", "halting", "committing"):
            s.stopping = event.by
            return []
        return interruption.end(s, EXIT_STOPPED, f"stopped by {event.by}")

    def _on_nodes_refused(self, event: ev.NodesRefused) -> list[Action]:
        """Waiting would not help. A mesh that runs goes on."""
        return interruption.end(self.state, EXIT_FAILED, event.error) if self.state.job == "waiting" else []

    # --- nodes come and go ------------------------------------------------------------------------------------------

    def _on_node_joined(self, event: ev.NodeJoined) -> list[Action]:
        s = self.state
        known = s.nodes.get(event.node)
        if known is not None and known.state != "lost":
            return []
        if known is not None:
            return [ReleaseNode(node=event.node, reason="its name was lost before")]
        s.add_node(event.node, event.domain)
        if s.places_taken > s.ledger.places:
            s.move_node(event.node, "lost")
            return [ReleaseNode(node=event.node, reason="no place is free")]
        s.inventory[event.node] = election.inventory_of(event.snapshots, s.first_generation)
        return interruption.open_mesh(s, event.at, "enough nodes have joined") if s.job == "waiting" else []

    def _on_node_lost(self, event: ev.NodeLost) -> list[Action]:
        s = self.state
        node = s.nodes.get(event.node)
        if node is None or node.state == "lost":
            return []
        held = node.state == "active" and s.job in _HOLDS_SLOTS
        s.move_node(event.node, "lost")
        s.inventory.pop(event.node, None)
        gone = ReleaseNode(node=event.node, reason=event.cause, for_good=event.node in s.drained)
        actions: list[Action] = [gone]
        if held:
            actions += interruption.fault(s, recovery.seen(s, event.at, event.node, None, "node", event.cause))
        return actions + health.lost(s, event.node, event.at) + interruption.answered(s, event.at, event.node)

    def _on_node_leaving(self, event: ev.NodeLeaving) -> list[Action]:
        """It works until it is gone, or until another can take its place without a loss: see planned.py."""
        s = self.state
        node = s.nodes.get(event.node)
        if node is None or node.state == "lost" or event.node in s.leaving:
            return []
        s.leaving[event.node] = event.by
        return []

    def _on_node_slow(self, event: ev.NodeSlow) -> list[Action]:
        """A strike; where a spare can take its place, it is swapped, for the mesh is as slow as its slowest node.

        Neither when that is not wanted, or when it is not the node.
        """
        s = self.state
        if event.generation != s.generation or s.job != "training" or event.node not in s.mesh:
            return []
        if event.workload or not s.declared_limits.swaps_slow:
            s.slow[event.node] = s.generation
            return []
        health.forgive(s, event.at)
        quiet = s.incident is None and not s.stopping and planned.loses_nothing(s)
        if quiet and health.can_be_replaced(s):
            return interruption.fault(s, recovery.seen(s, event.at, event.node, event.slot, "slow", event.detail))
        health.found_slow(s, event.node, event.at)
        return []

    def _on_node_probed(self, event: ev.NodeProbed) -> list[Action]:
        return self._probed(event.at, event.number, event.passed)

    def _probed(self, at: int, number: int, passed: bool) -> list[Action]:
        s = self.state
        # Where another has come for it, it stays in quarantine, and is at hand when the run is short of nodes: let go,
        # its machine would come back as a node of which nothing is known.
        back = health.probed(s, number, passed and s.places_taken < s.ledger.places, at)
        if back is None:
            return []
        return interruption.open_mesh(s, at, "a node has passed its probe") if s.job == "waiting" else []

    # --- audits -----------------------------------------------------------------------------------------------------

    def _on_audit_disagreed(self, event: ev.AuditDisagreed) -> list[Action]:
        return health.disagreed(self.state, event)

    def _on_audit_settled(self, event: ev.AuditSettled) -> list[Action]:
        """A third node has convicted one: all that came of the step is not to be trusted, and only that."""
        s = self.state
        settled = health.settled(s, event.number, event.wrong)
        revoked: list[int] = []
        for asked in settled:
            revoked += checkpoints.revoke_what_came_of(s, asked.generation, asked.step, asked.judge)
            heirs = [g for g in s.lineage if s.is_made_of(asked.generation, asked.step, upto=(g, asked.step))]
            for last in heirs[-1:]:  # what is held of it by those before is not clean, either: see is_unclean
                s.distrust(last, asked.step)
        # A step may be audited before it is told that every rank has done it.
        here = [d for d in settled if s.is_made_of(d.generation, d.step, upto=(s.generation, max(s.step, d.step)))]
        if here and s.job in (*_HOLDS_SLOTS, "committing"):
            first = min(here, key=lambda asked: asked.step)
            revoked += trust.rewind(s, first.step, first.judge)
            detail = f"wrong in the audit of step {first.step}, says {first.judge}: {event.detail}"
            evidence = Evidence(
                at=event.at, node=event.wrong, slot=None, kind="corrupt", detail=detail, step=first.step
            )
            return self._published(revoked) + interruption.fault(s, evidence)
        told = self._published(revoked)
        return told + (health.convict(s, event.wrong, event.at) if settled else []) + self._finish_if_saved()

    def _published(self, steps: Iterable[int]) -> list[Action]:
        return [action for step in steps for action in trust.publish(self.state, step)]

    # --- a generation -----------------------------------------------------------------------------------------------

    def _on_generation_ready(self, event: ev.GenerationReady) -> list[Action]:
        s = self.state
        if s.job != "starting" or event.generation != s.generation:
            return []
        if event.step != s.restored_step:
            wrong = f"ready at step {event.step}, ordered was {s.restored_step}"
            return interruption.fault(s, recovery.seen(s, event.at, "", None, "start", wrong))
        s.job = "training"
        if s.incident is not None and s.mesh_layout.nodes > s.layout_of(s.incident.generation).nodes:
            s.grown_in_vain = 0
        s.ledger.settle("other", then="recovery")
        s.ledger.train()
        s.ledger.fill(event.processes)
        if s.incident is not None:
            s.incident.ready_at, s.incident.processes = event.at, dict(event.processes)
            s.incident.rendezvous_us, s.incident.build_us = event.rendezvous_us, event.build_us
            s.incident.restore_us = event.restore_us
            if s.begins_anew:  # it may never tell a step
                interruption.close(s, event.at)
        return self._save_every() + ([AskStop(generation=s.generation)] if s.stopping else [])

    def _on_steps_done(self, event: ev.StepsDone) -> list[Action]:
        s = self.state
        if s.job not in ("training", "halting") or event.generation != s.generation or event.last <= s.step:
            return []
        stalls: dict[Label, int] = {
            "data_wait": event.data_wait_us,
            "checkpoint_stall": event.checkpoint_us,
            "validation": event.validation_us,
            "straggling": event.straggling_us,
        }
        self._complete(event.at, event.last, stalls)
        return []

    def _complete(self, at: int, step: int, stalls: dict[Label, int]) -> None:
        """Every rank has completed `step`, and so all before it."""
        s = self.state
        steps, new_steps = step - s.step, max(0, step - s.high_water)
        interruption.reach(s, step)
        if s.job == "halting":  # done before the halt reached it; its time is settled as detection already
            if s.incident is not None and not s.incident.rungs:
                s.incident.step = step
            return
        updates.trained(s)
        recomputed = s.ledger.settle_steps(steps, new_steps, stalls)
        if s.incident is not None:
            interruption.close(s, at)
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
        if not s.is_open_ended and (last is None or last.trust in DISTRUSTED):
            unsaved = "the last checkpoint could not be written"
            return interruption.fault(s, recovery.seen(s, event.at, "", None, "save", unsaved))
        s.ledger.settle("checkpoint_stall", then="checkpoint_stall")
        s.job = "committing"
        if s.incident is not None:
            interruption.close(s, event.at)
        return self._finish_if_saved() or [
            SetTimer(timer=f"commit/{s.generation}", at=event.at + s.declared_limits.commit_deadline_us)
        ]

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _on_checkpoint_written(self, event: ev.CheckpointWritten) -> list[Action]:
        return checkpoints.written(self.state, event)

    def _on_checkpoint_committed(self, event: ev.CheckpointCommitted) -> list[Action]:
        if not checkpoints.committed(self.state, event):
            return []
        updates.saved(self.state, event.generation, event.step)
        return checkpoints.retire(self.state) + self._finish_if_saved()

    def _on_checkpoint_failed(self, event: ev.CheckpointFailed) -> list[Action]:
        s = self.state
        if checkpoints.failed(s, event) and s.job == "committing" and event.step == s.step:
            if s.is_open_ended:
                return self._finish_if_saved()
            return interruption.fault(s, recovery.seen(s, event.at, "", None, "save", event.error))
        return []

    def _on_checkpoints_found(self, event: ev.CheckpointsFound) -> list[Action]:
        checkpoints.found(self.state, event)
        for step, checkpoint in self.state.checkpoints.items():  # also one whose commit was told to nobody
            if checkpoint.trust in USABLE:
                updates.saved(self.state, checkpoint.generation, step)
        return checkpoints.retire(self.state) + self._finish_if_saved()

    def _on_checkpoint_verified(self, event: ev.CheckpointVerified) -> list[Action]:
        return trust.answered(self.state, event) + checkpoints.retire(self.state)

    def _on_checkpoint_certified(self, event: ev.CheckpointCertified) -> list[Action]:
        return trust.certified(self.state, event) + checkpoints.retire(self.state)

    def _on_checkpoints_pinned(self, event: ev.CheckpointsPinned) -> list[Action]:
        checkpoints.pinned(self.state, event)
        return checkpoints.retire(self.state)

    def _on_update_requested(self, event: ev.UpdateRequested) -> list[Action]:
        """It waits for a step boundary in peace: see planned.py. One at a time; who asks again is told so before."""
        if self.state.update is None and event.number in (0, self.state.n_updates + 1):
            self.state.update = event
        return []

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
        told: list[Action] = []
        if event.kind == "state":
            told = self._distrust(s.order, event.node, event.error)
        if event.kind in recovery.UNCLEAN:
            told = self._published(self._mark_unclean(s.order, event.node, event.step))
        if s.job not in _HOLDS_SLOTS:
            return told
        return told + interruption.fault(
            self.state,
            Evidence(
                at=event.at, node=event.node, slot=event.slot, kind=event.kind, detail=event.error, step=event.step
            ),
        )

    def _on_worker_exited(self, event: ev.WorkerExited) -> list[Action]:
        s = self.state
        if event.generation != s.generation or s.job not in _HOLDS_SLOTS:
            return []
        halted = s.incident if s.job == "halting" else None
        if halted is not None and recovery.has_told_why(halted, event.node, event.slot, event.exit_code):
            return []
        kind = "exit" if event.signal is None else "signal"
        detail = f"exit code {event.exit_code}" if event.signal is None else f"signal {event.signal}"
        return interruption.fault(s, recovery.seen(s, event.at, event.node, event.slot, kind, detail))

    def _on_copy_damaged(self, event: ev.CopyDamaged) -> list[Action]:
        """A strike for each bad copy, whether it could be mended or not: memory that flips one bit flips others."""
        copy = f"{event.node}: slot {event.slot}, step {event.step}, found by generation {event.generation}"
        if event.generation == self.state.generation and copy not in self.state.damaged_copies:
            self.state.damaged_copies[copy] = event.detail
            health.strike(self.state, event.node, event.at)
        return []

    def _on_generation_failed(self, event: ev.GenerationFailed) -> list[Action]:
        s = self.state
        if event.generation != s.generation or s.job != "starting":
            return []
        assert s.order is not None and event.kind in ("start", "state"), event
        told = self._distrust(s.order, event.node, event.error) if event.kind == "state" else []
        return told + interruption.fault(s, recovery.seen(s, event.at, event.node, None, event.kind, event.error))

    def _on_worker_hung(self, event: ev.WorkerHung) -> list[Action]:
        """Its agent has lost patience with it; the halt's SIGKILL ends also what is stopped."""
        s = self.state
        if event.generation != s.generation or s.job not in _HOLDS_SLOTS:
            return []
        return interruption.fault(
            self.state,
            Evidence(at=event.at, node=event.node, slot=event.slot, kind="hang", detail=event.detail, step=event.step),
        )

    def _on_node_halted(self, event: ev.NodeHalted) -> list[Action]:
        s = self.state
        if s.job != "halting" or event.generation != s.generation or event.node not in s.awaiting:
            return []
        s.inventory[event.node] = election.inventory_of(event.snapshots, s.first_generation)
        s.parked = s.parked and event.parked
        return interruption.answered(s, event.at, event.node)

    def _on_nodes_halted(self, event: ev.NodesHalted) -> list[Action]:
        s = self.state
        if s.job != "halting" or event.generation != s.generation:
            return []
        snapshots = tuple(snapshot for snapshot in event.snapshots if snapshot.generation >= s.first_generation)
        alike = Held(first=OWN_PLACE, slots=s.declared_layout.slots_per_node, snapshots=snapshots)
        held = (alike,) if snapshots else ()
        s.parked = s.parked and event.parked
        awaited = [name for name in dict.fromkeys(event.nodes) if name in s.awaiting]
        for name in awaited:
            s.inventory[name] = held
        for name in awaited[:-1]:
            del s.awaiting[name]
        return interruption.answered(s, event.at, awaited[-1]) if awaited else []

    def _on_timer(self, event: ev.TimerFired) -> list[Action]:
        s = self.state
        name, _, about = event.timer.partition("/")
        if name == "probe":
            return self._probed(event.at, int(about), passed=False)
        if name == "verify":
            return trust.unanswered(s, int(about), event.at)
        if name == "third":
            health.settled(s, int(about), wrong="")
            return self._finish_if_saved()
        if about != str(s.generation):
            return []
        if name == "wait" and s.job == "waiting":
            need = recovery.fewest_nodes(s)
            health.take_back(s, need - s.n_usable, event.at)
            have = s.n_usable
            if have >= need:
                return interruption.open_mesh(s, event.at, "the wait for more nodes has ended", at_least=need)
            return interruption.end(
                self.state, EXIT_NO_NODES, f"the mesh needs {need} nodes, {have} were usable when the wait ended"
            )
        if name == "halt" and s.job == "halting":
            actions: list[Action] = []
            for node in tuple(s.awaiting):
                lost = ev.NodeLost(at=event.at, node=node, cause="did not halt within its deadline")
                actions += self._on_node_lost(lost)
            return actions
        if name == "grow" and s.growing and s.job == "training" and s.incident is None:
            return planned.grow(s, event.at)
        if name == "start" and s.job == "starting":
            return interruption.fault(
                self.state, recovery.seen(s, event.at, "", None, "start", "not ready within its deadline")
            )
        if name == "commit" and s.job == "committing":
            s.disagreements = []
            if finished := self._finish_if_saved():
                return finished
            if s.is_open_ended:
                return self._finish()
            return interruption.end(
                self.state, EXIT_FAILED, f"the last checkpoint (step {s.step}) was not committed within its deadline"
            )
        return []

    # --- chaos ------------------------------------------------------------------------------------------------------

    def _on_fault_requested(self, event: ev.FaultRequested) -> list[Action]:
        """Harm is ordered by somebody who tests the run: its ground truth stands in the journal before it is done."""
        s = self.state
        node, slot = event.node, event.slot
        if not node and slot is not None and slot < len(s.mesh) * s.declared_layout.slots_per_node:
            node = s.mesh[slot // s.declared_layout.slots_per_node]
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

    # --- small parts ------------------------------------------------------------------------------------------------

    def _distrust(self, order: OpenGeneration, node: str, error: str) -> list[Action]:
        """State that was to be restored is damaged: do not give it again."""
        s = self.state
        if order.source == "durable":
            return trust.refuse(s, order, node, error)
        if order.source == "ram":
            s.bad_snapshots[ev.Snapshot(generation=order.snapshot_generation, step=order.step).name] = error
        return []

    def _mark_unclean(self, order: OpenGeneration, by: str, step: int) -> list[int]:
        """State was found corrupt after `step`: what holds that state, or what came of it, is not restored from.

        The check before was passed, so a snapshot of the step before is clean. When that state was restored, not
        computed, it is its writer's checkpoint that may hold it; a durable one was whole when it was read.

        Returns:
            The steps of checkpoints that are revoked.
        """
        s = self.state
        s.distrust(s.generation, step)
        if step > order.step:
            return checkpoints.revoke(s, s.generation, step, by)
        return checkpoints.revoke(s, order.snapshot_generation, step, by) if order.source == "ram" else []

    def _finish_if_saved(self) -> list[Action]:
        s = self.state
        if s.is_open_ended:  # its program has saved what it wanted; a commit that is under way is waited for
            saved = all(checkpoint.trust != "written" for checkpoint in s.checkpoints.values())
        else:
            saved = s.step in s.checkpoints and s.checkpoints[s.step].trust in USABLE
        # A third that is still asked may find that what was saved is wrong; the commit's timer bounds the wait.
        return self._finish() if s.job == "committing" and saved and not s.disagreements else []

    def _finish(self) -> list[Action]:
        s = self.state
        if s.is_open_ended and not s.stopping:
            return interruption.end(s, EXIT_OK, f"the script has ended on every rank, after step {s.step}")
        if s.step == s.total_steps:
            return interruption.end(s, EXIT_OK, f"all {s.total_steps} steps done")
        return interruption.end(s, EXIT_STOPPED, f"stopped by {s.stopping} at step {s.step}")

    def _count_nodes(self) -> None:
        """Tell the ledger who holds places; while the mesh trains, its number is that of its nodes."""
        s = self.state
        if s.job == "ended":
            s.ledger.populate(0, 0)
            return
        s.ledger.populate(s.counts["active"], s.spares_counted)


_HANDLERS: dict[type, Callable[[Supervisor, Any], list[Action]]] = {
    ev.RunDeclared: Supervisor._on_run_declared,
    ev.EpochBegan: Supervisor._on_epoch_began,
    ev.StopRequested: Supervisor._on_stop_requested,
    ev.NodesRefused: Supervisor._on_nodes_refused,
    ev.NodeJoined: Supervisor._on_node_joined,
    ev.NodeLost: Supervisor._on_node_lost,
    ev.NodeLeaving: Supervisor._on_node_leaving,
    ev.NodeSlow: Supervisor._on_node_slow,
    ev.NodeProbed: Supervisor._on_node_probed,
    ev.AuditDisagreed: Supervisor._on_audit_disagreed,
    ev.AuditSettled: Supervisor._on_audit_settled,
    ev.GenerationReady: Supervisor._on_generation_ready,
    ev.StepsDone: Supervisor._on_steps_done,
    ev.Validated: lambda self, event: [],
    ev.GenerationFinished: Supervisor._on_generation_finished,
    ev.CheckpointWritten: Supervisor._on_checkpoint_written,
    ev.CheckpointCommitted: Supervisor._on_checkpoint_committed,
    ev.CheckpointFailed: Supervisor._on_checkpoint_failed,
    ev.CheckpointsFound: Supervisor._on_checkpoints_found,
    ev.CheckpointVerified: Supervisor._on_checkpoint_verified,
    ev.CheckpointCertified: Supervisor._on_checkpoint_certified,
    ev.CheckpointsPinned: Supervisor._on_checkpoints_pinned,
    ev.UpdateRequested: Supervisor._on_update_requested,
    ev.IntervalChosen: Supervisor._on_interval_chosen,
    ev.WorkerFailed: Supervisor._on_worker_failed,
    ev.WorkerExited: Supervisor._on_worker_exited,
    ev.WorkerHung: Supervisor._on_worker_hung,
    ev.CopyDamaged: Supervisor._on_copy_damaged,
    ev.GenerationFailed: Supervisor._on_generation_failed,
    ev.NodeHalted: Supervisor._on_node_halted,
    ev.NodesHalted: Supervisor._on_nodes_halted,
    ev.FaultRequested: Supervisor._on_fault_requested,
    ev.FaultInjected: Supervisor._on_fault_injected,
    ev.TimerFired: Supervisor._on_timer,
}
