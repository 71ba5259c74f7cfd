"""The harm that a node's agent does on its own node, as ordered."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Protocol

import psutil

from orchestrator.core.actions import InjectFault
from storage import ram
from trainer import contract

GONE_DEADLINE_S = 10.0
"""For killed processes to be gone; the kernel takes milliseconds, unless a driver holds one."""

_SIGNALS = {"worker-kill": signal.SIGKILL, "worker-stop": signal.SIGSTOP}


class NodeWorkers(Protocol):
    """What of orchestrator.runtime.elastic.NodeWorkers is needed here."""

    def signal(self, rank: int, signum: int) -> int: ...
    def send(self, rank: int, message: object) -> None: ...


async def harm_worker(workers: NodeWorkers, order: InjectFault) -> str:
    """Hurt the worker of slot `order.slot`; what was done, or nothing when the worker itself will tell.

    Raises:
        LookupError: the slot has no live worker on this node.
        OSError: the worker does not take the order.
    """
    assert order.slot is not None, order
    if order.fault in _SIGNALS:
        signum = _SIGNALS[order.fault]
        pid = await asyncio.to_thread(workers.signal, order.slot, signum)
        return f"{signum.name} for process {pid}"
    tensors = order.parameters.get("tensors", "any")
    message = contract.Inject(
        number=order.number,
        fault="flip" if order.fault == "flip" else "exception",
        tensors="" if tensors == "any" else f"{tensors}/",
        pattern=order.parameters.get("pattern", "bit"),  # type: ignore[arg-type]
        seed=int(order.parameters.get("seed", "0")),
    )
    await asyncio.to_thread(workers.send, order.slot, message)
    return ""


def family_of(agent_pid: int) -> list[psutil.Process]:
    """The raylet above an agent and every process under it.

    Raises:
        LookupError: the agent's parent is no raylet.
    """
    raylet = psutil.Process(agent_pid).parent()
    if raylet is None or "raylet" not in raylet.name():
        raise LookupError(f"the parent of agent process {agent_pid} is no raylet: {raylet}")
    return [raylet, *raylet.children(recursive=True)]


def kill_node(agent_pid: int, ram_dir: str, run: str, ray_node: str) -> None:
    """SIGKILL every process of an agent's node and delete what the run had in its memory. May be the agent's own call.

    Raylets on one machine share one /dev/shm, and that of a container outlives its processes: a real node takes its
    memory with it, so the fault must, too. Who calls goes last, or its own node would outlive it.
    """
    victims = [process for process in family_of(agent_pid) if process.pid != os.getpid()]
    for process in victims:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    deadline = time.monotonic() + GONE_DEADLINE_S
    while any(_runs(process) for process in victims) and time.monotonic() < deadline:
        time.sleep(0.02)
    ram.delete(ram_dir, run, ray_node)
    if agent_pid == os.getpid():
        os.kill(agent_pid, signal.SIGKILL)


def _runs(process: psutil.Process) -> bool:
    """Whether it is still there; a zombie that nobody has reaped yet is not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
