"""Planned changes, for which a quiet moment is waited: the mesh trains, and no incident is open.

Nodes that will be taken away are replaced as soon as others can take their places, and let go once a step is done
without them. A mesh that has shrunk becomes larger again, unless that costs more than the run's last steps gain by it:
after a while, so that a rack which returns costs one change, and later each time that it did not come up.

Another job begins where a step has ended: what is complete in memory then is that step, and no step is lost.
"""

from __future__ import annotations

from orchestrator.core import health, interruption, recovery, updates
from orchestrator.core.actions import Action, ReleaseNode, SetTimer
from orchestrator.core.events import Layout
from orchestrator.core.state import State

GROW_DOUBLINGS = 6
"""The wait before a mesh grows doubles with each time that it did not come up, so often: from a minute to an hour."""


def in_peace(s: State, at: int, at_boundary: bool) -> list[Action]:
    """What can wait until the mesh trains well; `at_boundary`: every rank has just completed a step."""
    actions: list[Action] = []
    for name in [name for name in s.leaving if s.nodes[name].state != "active"]:
        actions += let_go(s, name, at, "it is not needed any more")
    if s.stopping or not loses_nothing(s):
        return actions
    if s.leaving and s.n_usable - len(s.leaving) >= len(s.mesh):
        first, by = next(iter(s.leaving.items()))
        return actions + interruption.fault(s, recovery.seen(s, at, first, None, "leave", by))
    convict = next((name for name in s.convicted if s.nodes[name].state == "active"), None)
    if convict is not None and health.can_be_replaced(s):
        corrupt = "its state was proven corrupt, and a spare is there now"
        return actions + interruption.fault(s, recovery.seen(s, at, convict, None, "leave", corrupt))
    if s.update is not None and at_boundary:
        return actions + update(s, at)
    if len(s.mesh) < s.declared_layout.nodes and not s.growing and _growth(s, at) is not None:
        s.growing = True
        wait_us = s.declared_limits.grow_settle_us << min(s.grown_in_vain, GROW_DOUBLINGS)
        actions.append(SetTimer(timer=f"grow/{s.generation}", at=at + wait_us))
    return actions


def update(s: State, at: int) -> list[Action]:
    """The job that was asked for is the run's from here on; with the next generation, where workers must begin anew."""
    asked, s.update = s.update, None
    assert asked is not None
    if asked.total_steps <= s.step:  # the mesh was faster than who asked
        return []
    changed: list[Action] = [updates.carry_out(s, asked)]
    if not asked.restarts:
        return changed
    what = ", ".join(f"{name} = {value}" for name, value in asked.changes.items())
    code = f"code {asked.code[:12] or 'as installed'}" if s.order is None or s.order.code != asked.code else ""
    detail = f"{asked.by} asks for {', '.join(filter(None, [what, code]))}"
    return changed + interruption.fault(s, recovery.seen(s, at, "", None, "update", detail))


def loses_nothing(s: State) -> bool:
    """Whether a change of the mesh costs the step under way at most."""
    if s.begins_anew:
        return False
    return {"ram", "peer"} <= set(s.capabilities) or s.newest_checkpoint() == s.step


def _growth(s: State, at: int) -> Layout | None:
    """The mesh that the shrunk one should become now; None when there is no larger one for these nodes."""
    found = s.declared_layout.largest_on(s.n_usable - len(s.leaving))
    return found if found is not None and found.nodes > len(s.mesh) and _pays_off(s, at, found.nodes) else None


def _pays_off(s: State, at: int, nodes: int) -> bool:
    """Whether the steps that are left will be done sooner by what more nodes gain than the change takes.

    It takes as long as the one that this generation began with, and a step's time falls as the number of nodes rises.
    A generation that no incident has opened gives no measure of either: then they will.
    """
    last = s.incidents[-1] if s.incidents else None
    if last is None or last.generation + len(last.rungs) != s.generation:
        return True
    assert last.ready_at is not None and last.closed_at is not None, last
    left_us = (s.total_steps - s.step) * (at - last.ready_at) // max(1, s.step - s.restored_step)
    return left_us * (nodes - len(s.mesh)) // nodes > last.closed_at - last.detected_at


def grow(s: State, at: int) -> list[Action]:
    """The wait is over: open a larger mesh, if its nodes are still there."""
    s.growing = False
    larger = _growth(s, at)
    if larger is None or s.stopping or not loses_nothing(s):
        return []
    s.grown_in_vain += 1  # until it is ready
    there = recovery.seen(s, at, "", None, "grow", f"nodes for {recovery.size_of(s, larger)} are there")
    return interruption.fault(s, there)


def let_go(s: State, name: str, at: int, why: str) -> list[Action]:
    """A node that fills no slot is sent away."""
    s.move_node(name, "lost")
    s.inventory.pop(name, None)
    gone = ReleaseNode(node=name, reason=why, for_good=name in s.drained)
    return [gone, *health.lost(s, name, at)]
