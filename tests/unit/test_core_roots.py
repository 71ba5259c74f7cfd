"""What explains an incident: what ranks say of their peers is a consequence, also of a change that was ordered."""

from __future__ import annotations

import pytest

from orchestrator.core.recovery import root
from orchestrator.core.state import Evidence, Incident


def incident(*kinds: str) -> Incident:
    """In which these were seen, one after the other."""
    seen = [Evidence(at=at, node="n0", slot=None, kind=kind, detail="", step=7) for at, kind in enumerate(kinds)]
    return Incident(number=1, detected_at=0, generation=1, step=7, evidence=seen)


@pytest.mark.parametrize("change", ["leave", "update", "grow"])
def test_of_an_ordered_change_and_a_lost_peer_the_first_seen_is_the_root(change: str) -> None:
    """A rank that hears of the change later than its peer misses it; and what failed by itself stays a failure."""
    assert root(incident(change, "collective")).kind == change
    assert root(incident("collective", change)).kind == "collective"
    for kind in ("signal", "exit", "hang", "node"):
        assert root(incident(change, "collective", kind)).kind == kind
