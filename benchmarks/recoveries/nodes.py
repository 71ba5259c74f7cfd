"""Nodes that are killed whole, and what takes their place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from orchestrator.localcluster import node_arguments

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


def replace_dead_nodes(cluster: Any, cpus: int) -> None:
    """A new raylet for each that has died in Ray's own `Cluster`; waits until it is there."""
    for node in list(cluster.worker_nodes):
        if node.dead_processes():
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(**node_arguments(cpus))
