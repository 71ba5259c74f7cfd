"""The suites' tables of what was tried and found, printed at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

_TALLIES: dict[str, dict[str, Counter[str]]] = {}


@pytest.fixture(scope="session")
def tally() -> Callable[..., None]:
    """Adds counts to a row of a suite's table."""

    def add(suite: str, row: str, **counts: int) -> None:
        _TALLIES.setdefault(suite, {}).setdefault(row, Counter()).update(counts)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for suite, rows in sorted(_TALLIES.items()):
        terminalreporter.section(suite)
        names = list(dict.fromkeys(name for counts in rows.values() for name in counts))
        width = max(map(len, rows))
        terminalreporter.write_line(" " * width + "".join(f"{name:>14}" for name in names))
        for row, counts in rows.items():
            terminalreporter.write_line(f"{row:<{width}}" + "".join(f"{counts[name]:>14}" for name in names))
