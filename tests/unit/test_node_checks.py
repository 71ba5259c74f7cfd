"""`State.check_nodes` sees each thing that cannot be: every invariant that it names, broken by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from test_core_supervisor import started

from orchestrator.core import events as ev
from orchestrator.core.state import NODE_STATES, NodeState, State


def training() -> State:
    """Nodes n0 to n2 train, n3 is a spare, n4 is lost."""
    core = started(nodes=3, slots_per_node=1, spares=2)
    core.handle(ev.NodeLost(at=2_000_000, node="n4", cause="gone"))
    assert core.state.job == "training"
    return core.state


def halting() -> State:
    """Of those, n0 has been lost, too: n1 and n2 have not said yet what they hold."""
    core = started(nodes=3, slots_per_node=1, spares=1)
    core.handle(ev.NodeLost(at=2_000_000, node="n0", cause="gone"))
    assert core.state.job == "halting" and list(core.state.awaiting) == ["n1", "n2"]
    return core.state


@pytest.mark.parametrize("whole", [training, halting])
def test_what_is_true_passes(whole: Callable[[], State]) -> None:
    whole().check_nodes()


@pytest.mark.parametrize("one", NODE_STATES)
def test_a_wrong_count_is_seen(one: NodeState) -> None:
    for other in NODE_STATES:
        state = training()
        state.counts[one] -= 1
        state.counts[other] += 1
        if one == other:
            state.check_nodes()
        else:
            with pytest.raises(AssertionError):
                state.check_nodes()


@pytest.mark.parametrize(
    "names",
    [("n0", "n1", "n1"), ("n0", "n1", "n3"), ("n0", "n1", "n4"), ("n0", "n1", "unknown")],
    ids=["twice", "a spare", "lost", "unknown"],
)
def test_a_mesh_of_others_than_different_active_nodes_is_seen(names: tuple[str, ...]) -> None:
    state = training()
    state.mesh = names
    with pytest.raises(AssertionError):
        state.check_nodes()


@pytest.mark.parametrize("which", ["awaiting", "inventory", "strikes", "convicted", "probation", "leaving"])
def test_a_lost_node_that_is_counted_on_is_seen(which: str) -> None:
    state = halting()
    getattr(state, which)["n3"] = None
    state.check_nodes()
    getattr(state, which)["n0"] = None
    with pytest.raises(AssertionError, match="n0"):
        state.check_nodes()


def test_more_in_quarantine_than_an_update_allows_is_no_fault() -> None:
    """Nobody is let go for it; who is to come there finds no room."""
    state = training()
    state.move_node("n3", "quarantined")
    state.limits = replace(state.declared_limits, quarantined_at_most=0)
    state.check_nodes()
