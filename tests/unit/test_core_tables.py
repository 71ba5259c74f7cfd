"""docs/states.md says what the code says."""

from __future__ import annotations

from pathlib import Path

from orchestrator.core.state import JOB_STATES, NODE_STATES
from orchestrator.core.tables import page


def test_the_page_of_states_is_not_stale() -> None:
    stored = (Path(__file__).parents[2] / "docs" / "states.md").read_text()
    assert stored == page(), "run: python -m orchestrator.core.tables > docs/states.md"
    assert all(f"| `{name}` |" in stored for name in (*JOB_STATES, *NODE_STATES))
