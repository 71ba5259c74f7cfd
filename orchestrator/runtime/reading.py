"""Reading a checkpoint back for the core, on a node that has other things to do: slowly, nicely, and not during starts.

No torch.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.core.actions import VerifyCheckpoint
from storage.commits import read_commit, verify
from storage.manifest import ManifestError
from storage.redact import redacted

NICENESS = 10
"""Of the thread that reads and hashes, and of those that it starts: training and its saves have the cores first."""
PROBLEMS_TOLD = 8
"""Of a checkpoint; one is enough to distrust it."""


class Interrupted(RuntimeError):
    """The reading ends before its end: something else is more urgent."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What came of it; see events.CheckpointVerified."""

    bytes: int = 0
    read_us: int = 0
    problems: tuple[str, ...] = ()
    unread: str = ""


class Pace:
    """Called with the bytes that were just read, it waits until so many may have been. Time that was lost is not made
    up for, so that it never reads faster than it may: all the threads that call it together."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s, self._free_at = bytes_per_s, 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._why = ""

    def end(self, why: str) -> None:
        """The next call raises Interrupted, and so does one that waits."""
        self._why = why
        self._ended.set()

    def __call__(self, n_bytes: int) -> None:
        with self._lock:
            now = time.monotonic()
            mine = self._free_at = max(self._free_at, now) + n_bytes / self._bytes_per_s
        if self._ended.wait(mine - now):
            raise Interrupted(self._why)


class Reader:
    """Reads checkpoints back, one at a time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._thread = ThreadPoolExecutor(1, "read-back", _be_nice)
        self._number = 0
        self._pace: Pace | None = None
        self._reading: asyncio.Future[Reading] | None = None

    async def read(self, order: VerifyCheckpoint) -> Reading:
        """Read the checkpoint; an order that comes again joins the reading, or has its result. A newer one ends it."""
        if self._reading is None or self._number != order.number:
            self.interrupt("another checkpoint is to be read")
            pace = self._pace = Pace(order.bytes_per_s)
            self._number = order.number
            loop = asyncio.get_running_loop()
            self._reading = loop.run_in_executor(self._thread, read_back, self._url, order, pace)
        return await asyncio.shield(self._reading)

    def interrupt(self, why: str) -> None:
        if self._pace is not None:
            self._pace.end(why)


def read_back(url: str, order: VerifyCheckpoint, pace: Pace) -> Reading:
    """Read a whole checkpoint and check every digest. Blocks; never raises."""
    began = time.monotonic()
    try:
        pace(0)
        commit = read_commit(url, order.step)
        if order.generation not in (0, commit.generation):
            return Reading(unread=f"the record of step {order.step} is of generation {commit.generation}")
        problems = verify(url, commit, pace)
    except ManifestError as e:  # of the record itself
        return Reading(problems=(redacted(str(e)),))
    except FileNotFoundError:
        return Reading(unread=f"there is no record of step {order.step}")
    except Exception as e:  # every store has its own exceptions
        return Reading(unread=redacted(f"{type(e).__name__}: {e}".splitlines()[0]))
    return Reading(
        bytes=sum(part.data_bytes for part in commit.parts),
        read_us=round((time.monotonic() - began) * 1_000_000),
        problems=tuple(redacted(problem) for problem in problems[:PROBLEMS_TOLD]),
    )


def _be_nice() -> None:
    """Of this thread alone, as Linux has it; never less nice than the process was made."""
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
