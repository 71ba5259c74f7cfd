"""A thread's own time has what it computes and what it waits for a core, and not what it sleeps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from trainer import own_time
from trainer.own_time import OwnTime

TICK_US = 10_000
"""Of the kernel's clocks against each other; it may account a slice of a thread that runs a tick late."""


def test_sleep_is_not_counted_and_work_is() -> None:
    began, clock = time.perf_counter_ns(), OwnTime()
    time.sleep(0.3)
    asleep_us = clock.lap_us()
    wall_us = (time.perf_counter_ns() - began) // 1000
    assert asleep_us is not None and asleep_us <= wall_us - 300_000 + TICK_US

    began = time.thread_time_ns()
    while time.thread_time_ns() - began < 200_000_000:
        pass
    working_us = clock.lap_us()
    assert working_us is not None and working_us >= 200_000 - TICK_US


def test_where_the_kernel_does_not_tell_it_it_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(own_time, "_SCHEDSTAT", tmp_path / "absent")
    assert OwnTime().lap_us() is None
