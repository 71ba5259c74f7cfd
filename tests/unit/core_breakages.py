"""Cores that are broken in one way each. The rules of core_watch.py or the truth of core_body.py must see every one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core import (
    checkpoints,
    election,
    health,
    interruption,
    placement,
    planned,
    recovery,
    supervisor,
    trust,
    updates,
)
from orchestrator.core import events as ev
from orchestrator.core.actions import InjectFault, UpdateJob
from orchestrator.core.goodput import Ledger
from orchestrator.core.state import Checkpoint, Doubt, State
from orchestrator.core.supervisor import Supervisor

Patch = pytest.MonkeyPatch


def orders_are_forgotten(patch: Patch, handler: str, kind: type) -> None:
    """One handler's answers lack the orders of this kind."""
    whole = getattr(Supervisor, handler)
    event = next(event for event, known in supervisor._HANDLERS.items() if known is whole)
    patch.setitem(supervisor._HANDLERS, event, lambda core, e: [a for a in whole(core, e) if not isinstance(a, kind)])


def the_interval_outlives_a_resume(patch: Patch) -> None:
    whole = Supervisor._on_run_declared

    def broken(core: Supervisor, event: ev.RunDeclared) -> Any:
        interval, answer = core.state.interval, whole(core, event)
        core.state.interval = interval
        return answer

    patch.setitem(supervisor._HANDLERS, ev.RunDeclared, broken)


def lost_nodes_are_used(patch: Patch) -> None:
    patch.setattr(State, "usable", lambda self: tuple(self.nodes))


def a_node_fills_two_places(patch: Patch) -> None:
    place = placement.place

    def broken(*args: Any) -> tuple[str, ...] | None:
        mesh = place(*args)
        return mesh and (mesh[0],) * len(mesh)

    patch.setattr(placement, "place", broken)


def the_newest_snapshot_is_passed_over(patch: Patch) -> None:
    newest = election.newest_in_ram

    def broken(state: State, mesh: tuple[str, ...], layout: ev.Layout) -> Any:
        found = newest(state, mesh, layout)
        if found is None:
            return None
        older = replace(state, bad_snapshots={**state.bad_snapshots, found[0].name: "passed over"})
        return newest(older, mesh, layout) or found

    patch.setattr(election, "newest_in_ram", broken)


def incomplete_snapshots_are_restored(patch: Patch) -> None:
    transfers = election._transfers
    patch.setattr(election, "_transfers", lambda *args: transfers(*args) or ())


def refused_state_is_offered_again(patch: Patch) -> None:
    patch.setattr(Supervisor, "_distrust", lambda *args: [])


def uncommitted_checkpoints_are_restored(patch: Patch) -> None:
    patch.setattr(State, "newest_checkpoint", lambda self: max(self.checkpoints, default=None))


def pending_time_is_forgotten(patch: Patch) -> None:
    settle = Ledger.settle

    def broken(self: Ledger, label: Any, then: Any) -> int:
        before = dict(self.totals)
        span = settle(self, label, then)
        self.totals = before
        return span

    patch.setattr(Ledger, "settle", broken)


def the_high_water_mark_falls(patch: Patch) -> None:
    def broken(state: State, step: int) -> None:
        state.step = state.high_water = step

    patch.setattr(interruption, "reach", broken)


def older_generations_are_heard(patch: Patch) -> None:
    ready = Supervisor._on_generation_ready

    def broken(self: Supervisor, event: ev.GenerationReady) -> Any:
        return ready(self, replace(event, generation=self.state.generation, step=self.state.restored_step))

    patch.setitem(supervisor._HANDLERS, ev.GenerationReady, broken)


def a_new_controller_orders_nothing_again(patch: Patch) -> None:
    def broken(self: Supervisor, event: ev.EpochBegan) -> list[Any]:
        self.state.epoch = event.epoch
        return []

    patch.setitem(supervisor._HANDLERS, ev.EpochBegan, broken)


def silent_nodes_are_awaited_for_ever(patch: Patch) -> None:
    timer = Supervisor._on_timer

    def broken(self: Supervisor, event: ev.TimerFired) -> Any:
        return [] if event.timer.startswith("halt/") else timer(self, event)

    patch.setitem(supervisor._HANDLERS, ev.TimerFired, broken)


def a_second_failure_is_not_heard(patch: Patch) -> None:
    interrupt = interruption._interrupt
    patch.setattr(interruption, "_interrupt", lambda state, e: interrupt(state, e) if state.incident is None else [])


def decisions_depend_on_more_than_events(patch: Patch) -> None:
    calls = itertools.count()
    usable = State.usable
    patch.setattr(State, "usable", lambda self: usable(self)[:: 1 if next(calls) % 2 else -1])


# --- corruption ---


def corruption_is_forgotten(patch: Patch) -> None:
    patch.setattr(Supervisor, "_mark_unclean", lambda *args: [])


def corruption_is_forgotten_with_its_incident(patch: Patch) -> None:
    archive = interruption._archive

    def broken(state: State) -> None:
        archive(state)
        state.unclean = {}

    patch.setattr(interruption, "_archive", broken)


def checkpoints_of_corrupt_state_are_trusted(patch: Patch) -> None:
    patch.setattr(checkpoints, "revoke", lambda *args: [])


def corrupt_state_is_committed(patch: Patch) -> None:
    patch.setattr(State, "is_unclean", lambda *args: False)


def convicted_nodes_keep_their_slots(patch: Patch) -> None:
    patch.setattr(health, "quarantine_convicts", lambda *args: [])


def a_convict_is_forgotten_for_want_of_a_spare(patch: Patch) -> None:
    convict = health.quarantine_convicts

    def broken(state: State, at: int) -> Any:
        actions = convict(state, at)
        state.convicted = {}
        return actions

    patch.setattr(health, "quarantine_convicts", broken)


def quarantined_nodes_are_used(patch: Patch) -> None:
    patch.setattr(State, "usable", lambda self: tuple(n for n, node in self.nodes.items() if node.state != "lost"))


def evidence_that_comes_later_is_dropped(patch: Patch) -> None:
    note = recovery.note
    patch.setattr(recovery, "note", lambda incident, evidence: incident.evidence or note(incident, evidence))


# --- health of nodes ---


def quarantine_has_no_bound(patch: Patch) -> None:
    patch.setattr(health, "_has_room", lambda state: True)


def an_auditors_word_convicts(patch: Patch) -> None:
    disagreed = health.disagreed

    def broken(state: State, event: ev.AuditDisagreed) -> Any:
        state.convicted[event.accused] = None
        return disagreed(state, event)

    patch.setattr(health, "disagreed", broken)


def a_third_is_not_heard(patch: Patch) -> None:
    patch.setattr(health, "settled", lambda *args, **kwargs: [])


def nodes_that_leave_get_slots(patch: Patch) -> None:
    largest = recovery.largest_mesh

    def broken(state: State, usable: Any, at_most: int) -> Any:
        return largest(replace(state, leaving={}), usable, at_most)

    patch.setattr(recovery, "largest_mesh", broken)


# --- the size of the mesh ---


def a_shrunk_mesh_stays_small(patch: Patch) -> None:
    largest = recovery.largest_mesh
    patch.setattr(recovery, "largest_mesh", lambda state, usable, at_most: largest(state, usable, len(state.mesh)))


def slots_of_another_size_are_mixed_up(patch: Patch) -> None:
    patch.setattr(State, "layout_of", lambda self, generation: self.mesh_layout)


def shards_of_another_mesh_are_mixed_up(patch: Patch) -> None:
    patch.setattr(ev.Layout, "has_shards_of", lambda self, other: True)


def a_mesh_with_other_shards_is_taken_for_the_declared_one(patch: Patch) -> None:
    patch.setattr(interruption, "_as_fallback", lambda state, layout: None)


def workers_that_have_ended_are_resumed(patch: Patch) -> None:
    halted = Supervisor._on_node_halted
    patch.setitem(supervisor._HANDLERS, ev.NodeHalted, lambda self, e: halted(self, replace(e, parked=True)))


# --- hangs, chaos ---


def hangs_are_not_heard(patch: Patch) -> None:
    patch.setitem(supervisor._HANDLERS, ev.WorkerHung, lambda self, event: [])


def faults_are_ordered_again(patch: Patch) -> None:
    again = Supervisor._on_epoch_began

    def broken(self: Supervisor, event: ev.EpochBegan) -> Any:
        open_ones = [f for f in self.state.faults if f.injected_at is None]
        orders = [
            InjectFault(number=f.number, generation=0, fault=f.fault, node=f.node, slot=f.slot, parameters={})
            for f in open_ones
        ]
        return again(self, event) + orders

    patch.setitem(supervisor._HANDLERS, ev.EpochBegan, broken)


# --- checkpoints ---


def deleted_checkpoints_stay_in_mind(patch: Patch) -> None:
    retire = checkpoints.retire

    def broken(state: State) -> Any:
        before = dict(state.checkpoints)
        actions = retire(state)
        state.checkpoints = before
        return actions

    patch.setattr(checkpoints, "retire", broken)


def one_checkpoint_too_few_is_kept(patch: Patch) -> None:
    retire = checkpoints.retire

    def broken(state: State) -> Any:
        limits, state.limits = state.limits, replace(state.limits, keep_checkpoints=state.limits.keep_checkpoints - 1)
        actions = retire(state)
        state.limits = limits
        return actions

    patch.setattr(checkpoints, "retire", broken)


def what_is_being_restored_from_is_deleted(patch: Patch) -> None:
    retire = checkpoints.retire

    def broken(state: State) -> Any:
        job, state.job = state.job, "training"
        actions = retire(state)
        state.job = job
        return actions

    patch.setattr(checkpoints, "retire", broken)


def nothing_is_ever_deleted(patch: Patch) -> None:
    patch.setattr(checkpoints, "retire", lambda state: [])


def a_commit_that_is_told_again_revives_what_is_deleted(patch: Patch) -> None:
    committed = checkpoints.committed

    def broken(state: State, event: ev.CheckpointCommitted) -> bool:
        trust = Checkpoint(trust="written", generation=event.generation)
        state.checkpoints.setdefault(event.step, trust)
        return committed(state, event)

    patch.setattr(checkpoints, "committed", broken)


def failed_saves_are_forgotten(patch: Patch) -> None:
    failed = checkpoints.failed

    def broken(state: State, event: ev.CheckpointFailed) -> bool:
        was_written = failed(state, event)
        state.save_error = ""
        return was_written

    patch.setattr(checkpoints, "failed", broken)


# --- trust ---


def one_nodes_word_makes_a_checkpoint_damaged(patch: Patch) -> None:
    reader = trust._reader
    patch.setattr(trust, "_reader", lambda state, c: None if c.doubt is not None else reader(state, c))


def two_verifications_are_under_way(patch: Patch) -> None:
    following = trust.next_verification
    patch.setattr(trust, "next_verification", lambda state, at: following(_without_verification(state), at))


def _without_verification(state: State) -> State:
    state.verification = None
    return state


def anybody_is_asked_to_verify(patch: Patch) -> None:
    patch.setattr(trust, "may_judge", lambda state, name: name in state.nodes)


def damage_that_two_have_found_is_forgotten(patch: Patch) -> None:
    patch.setattr(trust, "_damaged", lambda *args: [])


def what_was_not_read_counts_as_whole(patch: Patch) -> None:
    answered = trust.answered
    patch.setattr(trust, "answered", lambda state, event: answered(state, replace(event, unread="")))


def who_misreads_is_not_struck(patch: Patch) -> None:
    patch.setattr(trust, "Doubt", lambda **doubt: Doubt(**{**doubt, "by_itself": False}))


def unread_checkpoints_count_as_verified(patch: Patch) -> None:
    patch.setattr(
        checkpoints, "_counted", lambda state, usable: usable[-max(2, state.declared_limits.keep_checkpoints) :]
    )


def a_conviction_asks_for_no_certificate(patch: Patch) -> None:
    patch.setattr(trust, "rewind", lambda *args: [])


def pins_are_not_heard(patch: Patch) -> None:
    patch.setattr(checkpoints, "_kept_besides", lambda *args: ())


def a_resume_forgets_what_memory_holds(patch: Patch) -> None:
    patch.setattr(recovery, "first_decision", recovery.durable_decision)


def a_job_changes_in_the_middle_of_a_step(patch: Patch) -> None:
    in_peace = planned.in_peace
    patch.setattr(planned, "in_peace", lambda s, at, at_boundary: in_peace(s, at, at_boundary=True))


def a_new_controller_forgets_the_update(patch: Patch) -> None:
    orders_are_forgotten(patch, "_on_epoch_began", UpdateJob)


def new_code_is_not_ordered(patch: Patch) -> None:
    open_from = interruption._open_from

    def broken(s: State, at: int, decision: recovery.Decision) -> Any:
        order, *rest = open_from(s, at, decision)
        s.order = replace(order, code="")
        return [s.order, *rest]

    patch.setattr(interruption, "_open_from", broken)


def an_update_is_taken_back_that_was_saved_from(patch: Patch) -> None:
    patch.setattr(updates, "saved", lambda s, generation, step: None)


def _keeps_through_the_way_back(patch: Patch, name: str) -> None:
    """A field of the state is afterwards what it was with the update."""
    take_back = updates.take_back

    def broken(s: State) -> Any:
        kept, orders = copy(getattr(s, name)), take_back(s)
        setattr(s, name, kept)
        return orders

    patch.setattr(updates, "take_back", broken)


def what_is_taken_back_keeps_its_code(patch: Patch) -> None:
    _keeps_through_the_way_back(patch, "code")


def what_is_taken_back_keeps_its_limits(patch: Patch) -> None:
    _keeps_through_the_way_back(patch, "limits")


def what_was_trained_with_it_is_restored(patch: Patch) -> None:
    _keeps_through_the_way_back(patch, "unclean")


SEEN_AT_ONCE: tuple[Callable[[Patch], None], ...] = (
    lost_nodes_are_used,
    a_node_fills_two_places,
    the_newest_snapshot_is_passed_over,
    incomplete_snapshots_are_restored,
    refused_state_is_offered_again,
    uncommitted_checkpoints_are_restored,
    pending_time_is_forgotten,
    the_high_water_mark_falls,
    older_generations_are_heard,
    a_new_controller_orders_nothing_again,
    silent_nodes_are_awaited_for_ever,
    a_second_failure_is_not_heard,
    corruption_is_forgotten,
    corruption_is_forgotten_with_its_incident,
    checkpoints_of_corrupt_state_are_trusted,
    corrupt_state_is_committed,
    convicted_nodes_keep_their_slots,
    a_convict_is_forgotten_for_want_of_a_spare,
    quarantined_nodes_are_used,
    evidence_that_comes_later_is_dropped,
    quarantine_has_no_bound,
    an_auditors_word_convicts,
    a_third_is_not_heard,
    nodes_that_leave_get_slots,
    a_shrunk_mesh_stays_small,
    slots_of_another_size_are_mixed_up,
    shards_of_another_mesh_are_mixed_up,
    a_mesh_with_other_shards_is_taken_for_the_declared_one,
    workers_that_have_ended_are_resumed,
    hangs_are_not_heard,
    faults_are_ordered_again,
    deleted_checkpoints_stay_in_mind,
    one_checkpoint_too_few_is_kept,
    nothing_is_ever_deleted,
    a_commit_that_is_told_again_revives_what_is_deleted,
    failed_saves_are_forgotten,
    one_nodes_word_makes_a_checkpoint_damaged,
    two_verifications_are_under_way,
    anybody_is_asked_to_verify,
    damage_that_two_have_found_is_forgotten,
    what_was_not_read_counts_as_whole,
    who_misreads_is_not_struck,
    unread_checkpoints_count_as_verified,
    pins_are_not_heard,
    a_job_changes_in_the_middle_of_a_step,
    a_new_controller_forgets_the_update,
    new_code_is_not_ordered,
    an_update_is_taken_back_that_was_saved_from,
    what_is_taken_back_keeps_its_code,
    what_is_taken_back_keeps_its_limits,
    what_was_trained_with_it_is_restored,
)
"""What a random history shows. Of the others, one shows in its replay, and those that random histories seldom come to
show in tests/golden: retention_while_starting, rewind, head_lost_and_resumed."""
