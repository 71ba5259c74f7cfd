"""Faults that a test does from outside to nodes on its own machine, past the run's own road for chaos."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import ray

from orchestrator.chaos import node as on_node
from orchestrator.runtime.nodes import agent_name

CALL_DEADLINE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Injected:
    """The ground truth of one fault."""

    fault: str
    node: str
    rank: int | None
    step: int
    """The newest step that the run had reported."""


def kill_worker(namespace: str, node: str, rank: int, step: int) -> Injected:
    """SIGKILL the worker that fills slot `rank` on `node`, which must be on this machine."""
    agent = ray.get_actor(agent_name(node), namespace)
    pids: Any = ray.get(agent.workers.remote(), timeout=CALL_DEADLINE_S)
    os.kill(pids[rank], signal.SIGKILL)
    return Injected(fault="worker-kill", node=node, rank=rank, step=step)


def kill_node(namespace: str, node: str, run: str, step: int) -> Injected:
    """SIGKILL every process of a node on this machine, its raylet too, and delete what its memory held."""
    agent = ray.get_actor(agent_name(node), namespace)
    info: Any = ray.get(agent.describe.remote(), timeout=CALL_DEADLINE_S)
    on_node.kill_node(info.pid, info.ram_dir, run, info.ray_node)
    return Injected(fault="node-kill", node=node, rank=None, step=step)
