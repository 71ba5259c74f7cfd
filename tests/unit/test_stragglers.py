"""Two real workers, of which one has more to do than the other, or less of its core: it is the one that is named."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from straggler_trials import PAIR, burden_of, pair, pinned_pair, trials

pytestmark = pytest.mark.timeout(900)


def test_of_two_real_workers_the_one_that_has_more_to_do_is_named(tmp_path: Path) -> None:
    """In as many steps as it takes: other tests may load both cores."""
    with pair(tmp_path) as mesh:
        burden_of(replace(PAIR, url=str(tmp_path / "run"))).touch()
        found = next(found for found in (mesh.step() for _ in range(200)) if found)
    assert [(event.node, event.slot) for event in found] == [("b", 1)]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each of two workers wants a core of its own")
@pytest.mark.long
def test_a_slow_down_by_30_percent_is_named_within_50_steps(tmp_path: Path) -> None:
    """On a machine that does nothing else."""
    with pinned_pair(tmp_path) as mesh:
        results = trials(mesh, 40, times=1.3)
    right = sum(result["named"] == result["slowed"] for result in results)
    assert right >= 38, results
