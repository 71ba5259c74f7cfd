"""docs/states.md, drawn from the tables of the code: ``python -m orchestrator.core.tables > docs/states.md``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.core.goodput import LABELS
from orchestrator.core.state import JOB_STATES, NODE_STATES, STANDINGS, TRUSTS, VERIFICATIONS
from trainer.contract import PROCESSES


def page() -> str:
    """The page, in Markdown."""
    return "\n".join(
        [
            "# States and labels",
            "",
            "Written by `python -m orchestrator.core.tables > docs/states.md`; a test fails when it is stale.",
            "",
            "## A job is",
            "",
            *_table("state", JOB_STATES),
            "",
            "## A node is",
            "",
            *_table("state", NODE_STATES),
            "",
            "## A node that may hold a slot is",
            "",
            *_table("standing", STANDINGS),
            "",
            "## A checkpoint is",
            "",
            *_table("trust", TRUSTS),
            "",
            "## A verification of a checkpoint comes out",
            "",
            *_table("outcome", VERIFICATIONS),
            "",
            "## A microsecond of a node counts as",
            "",
            *_table("label", LABELS),
            "",
            "## The process that fills a slot when a generation comes up is",
            "",
            *_table("process", PROCESSES),
            "",
        ]
    )


def _table(what: str, rows: Mapping[Any, str]) -> list[str]:
    return [f"| {what} | meaning |", "|---|---|", *(f"| `{name}` | {meaning} |" for name, meaning in rows.items())]


if __name__ == "__main__":
    print(page(), end="")
