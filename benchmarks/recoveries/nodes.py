"""Nodes that are killed whole, and what takes their place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

GONE_S = 10.0


@dataclass
class Node:
    """What dies together."""

    processes: list[psutil.Process]
    forget: Callable[[], None] = lambda: None
    """Deletes what it had in memory that outlives its processes here: nodes of one machine share one /dev/shm."""

    def kill(self) -> None:
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.processes, GONE_S)
        self.forget()


def raylet_of(pid: int) -> Node:
    """The raylet above a process, with all under it."""
    raylet = next(parent for parent in psutil.Process(pid).parents() if "raylet" in parent.name())
    return Node([raylet, *raylet.children(recursive=True)])
