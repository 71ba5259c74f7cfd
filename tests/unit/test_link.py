"""A worker that cannot park is told from one whose machine stands still."""

from __future__ import annotations

import time

import pytest

from trainer import link, pulse


def test_a_machine_that_stands_still_is_no_exchange_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(link.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(link.time, "clock_gettime", lambda clock: 1.0)
    monkeypatch.setattr(pulse, "standing", lambda thread: (True, "allreduce"))
    waits = link._Standstill()
    assert waits.lasts_s() == 0.0

    def after(seconds: float) -> float:
        now[0] += seconds
        return waits.lasts_s()

    assert after(10.0) <= link.FORGOTTEN_S / 2, "nobody had a core meanwhile"
    looks = [after(link.CUT_INTERVAL_S) for _ in range(20)]
    assert looks == sorted(looks) and looks[-1] > link.FORGOTTEN_S
    monkeypatch.setattr(pulse, "standing", lambda thread: (True, "broadcast"))
    assert after(link.CUT_INTERVAL_S) == 0.0, "it goes on"
