"""Real workers on cores of their own, of which one is slowed by other load: it is the one that is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from straggler_trials import pinned_pair, slowed, trials

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each of two workers wants a core of its own"),
]


def test_the_slowed_one_of_two_real_workers_is_named(tmp_path: Path) -> None:
    """By much, and in as many steps as it takes, for other tests may load both cores."""
    with pinned_pair(tmp_path) as mesh:
        mesh.watch_anew()
        with slowed(1, 3.0):
            found = next(found for found in (mesh.step() for _ in range(500)) if found)
    assert [(event.node, event.slot) for event in found] == [("b", 1)]


@pytest.mark.long
def test_a_slow_down_by_30_percent_is_named_within_50_steps(tmp_path: Path) -> None:
    """On a machine that does nothing else."""
    with pinned_pair(tmp_path) as mesh:
        results = trials(mesh, 40, times=1.3)
    right = sum(result["named"] == result["slowed"] for result in results)
    assert right >= 38, results
