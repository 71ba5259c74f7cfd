"""Faults on purpose that any process of a run can be ordered to have: a wall clock that leaps, a store that refuses.

Both end with the process. Nothing here is reached unless `shepherd chaos` has ordered it.
"""

from __future__ import annotations

import time

_now, _now_ns = time.time, time.time_ns
_leap_ns = 0
_refused: dict[str, float] = {}
"""URL to the monotonic second until which it refuses."""


def leap_clock(seconds: float) -> None:
    """From now on `time.time` and `time.time_ns` of this process are `seconds` (negative: back) away from before.

    Not `datetime`, nor what a module has imported by name before, nor the monotonic clocks, which cannot leap.
    """
    global _leap_ns
    _leap_ns += round(seconds * 1e9)
    time.time = lambda: _now() + _leap_ns / 1e9
    time.time_ns = lambda: _now_ns() + _leap_ns


def refuse_store(url: str, seconds: float) -> None:
    """For so long no store under `url` opens to this process; what has begun goes on."""
    _refused[url] = time.monotonic() + seconds


def check_store(url: str) -> None:
    """Raises ConnectionRefusedError while the store refuses."""
    if not _refused:
        return
    for refused, until in list(_refused.items()):
        if time.monotonic() > until:
            _refused.pop(refused, None)
        elif url.startswith(refused):
            raise ConnectionRefusedError("the store refuses, as chaos has ordered")
