"""A thread's own time: what it computed and what it waited for a core, without what it slept in exchanges with others.

In a mesh all ranks take as long as the slowest, so wall-clock names nobody. A rank on a CPU sleeps while it waits for
others, and the kernel tells both other parts of a thread's time apart from that: on a core, and ready but without one
(/proc/thread-self/schedstat, first and second field, in nanoseconds). A slow core makes the first longer, other load or
a quota the second. While a process is stopped neither grows: that is a hang, and told otherwise.
"""

from __future__ import annotations

import os


class OwnTime:
    """Laps of the thread that makes it."""

    def __init__(self) -> None:
        try:
            self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # a kernel without CONFIG_SCHED_INFO
            self._fd = -1
        self._last_ns = self._now_ns()

    def lap_us(self) -> int | None:
        """Own time since the last lap, in microseconds; None where the kernel does not tell it."""
        if self._fd < 0:
            return None
        last_ns, self._last_ns = self._last_ns, self._now_ns()
        return (self._last_ns - last_ns) // 1000

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _now_ns(self) -> int:
        if self._fd < 0:
            return 0
        computed, waited_for_core, _ = os.pread(self._fd, 128, 0).split()
        return int(computed) + int(waited_for_core)
