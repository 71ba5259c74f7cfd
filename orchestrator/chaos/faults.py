"""Faults for real runs. Each does to real processes what the world does to them, and says what it did."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import psutil
import ray

from orchestrator.runtime.nodes import agent_name
from storage import ram

CALL_DEADLINE_S = 10.0


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
    """SIGKILL every process of a node on this machine, its raylet too, and delete what its memory held.

    Raylets on one machine share one /dev/shm: a real node takes its memory with it, so the fault must, too.
    """
    agent = ray.get_actor(agent_name(node), namespace)
    info: Any = ray.get(agent.describe.remote(), timeout=CALL_DEADLINE_S)
    raylet = psutil.Process(info.pid).parent()
    assert raylet is not None and "raylet" in raylet.name(), f"the parent of agent {node} is no raylet: {raylet}"
    victims = [raylet, *raylet.children(recursive=True)]
    for process in victims:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    deadline = time.monotonic() + CALL_DEADLINE_S
    while any(_runs(process) for process in victims) and time.monotonic() < deadline:
        time.sleep(0.02)
    ram.delete(info.ram_dir, run, info.ray_node)
    return Injected(fault="node-kill", node=node, rank=None, step=step)


def _runs(process: psutil.Process) -> bool:
    """Whether it is still there; a zombie that nobody has reaped yet is not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
