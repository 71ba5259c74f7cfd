"""What explains an incident: what ranks say of their peers is a consequence, also of a change that was ordered."""

from __future__ import annotations

import pytest

from orchestrator.core import recovery
from orchestrator.core.state import Evidence


def evidence(kind: str, at: int) -> Evidence:
    return Evidence(at=at, node="n0", slot=None, kind=kind, detail="", step=7)


@pytest.mark.parametrize("change", ["leave", "update", "grow"])
def test_of_an_ordered_change_and_a_lost_peer_the_first_seen_is_the_root(change: str) -> None:
    """A rank that hears of the change later than its peer misses it; and what failed by itself stays a failure."""
    ordered, missed = evidence(change, 10), evidence("collective", 11)
    assert recovery._telling(ordered) < recovery._telling(missed)
    assert recovery._telling(evidence("collective", 9)) < recovery._telling(ordered)
    for kind in ("signal", "exit", "hang", "node"):
        assert recovery._telling(evidence(kind, 12)) < recovery._telling(ordered), "what is no consequence explains all"
