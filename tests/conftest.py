"""Every test process has its own Ray, should it start one; this must come before anything imports Ray.

Tests with a Ray cluster go one after the other; beside them, in a process of its own (pytest-xdist), the others use
what processor time they leave.
"""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from orchestrator.localcluster import isolate

isolate()
os.environ["OMP_NUM_THREADS"] = "1"

# The same cases each time, however slow the machine is; `--hypothesis-profile=default` draws new ones.
settings.register_profile(
    "gate", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gate")

WITH_RAY = ("chaos", "cluster")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those with Ray first, as one group: it takes the longest."""
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] in WITH_RAY:
            item.add_marker(pytest.mark.xdist_group("ray"))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_configure() -> None:
    # The first process gets the group; who waits for real deadlines must not wait for the others.
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
        os.nice(19)
