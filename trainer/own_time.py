"""A thread's own time: what it computed and what it waited for a core, without what it slept in exchanges with others.

In a mesh all ranks take as long as the slowest, so wall-clock names nobody. A rank on a CPU sleeps while it waits for
others, and the kernel tells both other parts of a thread's time apart from that: on a core, and ready but without one
(/proc/thread-self/schedstat, first and second field, in nanoseconds). A slow core makes the first longer, other load or
a quota the second. While a process is stopped neither grows: that is a hang, and told otherwise.
"""

from __future__ import annotations

from pathlib import Path

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


class OwnTime:
    """Laps of the thread that makes it and asks for them."""

    def __init__(self) -> None:
        self._last_ns = _own_ns()

    def lap_us(self) -> int | None:
        """Own time since the last lap, in microseconds; None where the kernel does not tell it."""
        last_ns, self._last_ns = self._last_ns, _own_ns()
        if last_ns is None or self._last_ns is None:
            return None
        return (self._last_ns - last_ns) // 1000


def _own_ns() -> int | None:
    try:
        computed, waited_for_core, _ = _SCHEDSTAT.read_bytes().split()
    except FileNotFoundError:  # a kernel without CONFIG_SCHED_INFO
        return None
    return int(computed) + int(waited_for_core)
