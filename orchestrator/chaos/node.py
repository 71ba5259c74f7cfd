"""The harm that a node's agent does on its own node, as ordered."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import Any, Protocol

import psutil

from orchestrator.chaos import hog
from orchestrator.core.actions import InjectFault
from storage import faults, ram
from trainer import contract

GONE_DEADLINE_S = 10.0
"""For killed processes to be gone; the kernel takes milliseconds, unless a driver holds one."""

LAST_ANSWER_S = 0.2
"""Between the answer to the order to kill a node and the deed; an answer within a cluster takes milliseconds."""

_SIGNALS = {"worker-kill": signal.SIGKILL, "worker-stop": signal.SIGSTOP}
_DONE_BY_WORKERS: dict[str, Any] = {
    "worker-exception": "exception",
    "worker-segfault": "segfault",
    "worker-lock": "lock",
    "worker-loop": "loop",
    "memory": "memory",
    "flip": "flip",
    "clock-jump": "clock",
}
"""A scenario's name to the worker's word for it."""


class NodeWorkers(Protocol):
    """What of orchestrator.runtime.elastic.NodeWorkers is needed here."""

    def signal(self, rank: int, signum: int) -> int: ...
    def send(self, rank: int, message: object) -> None: ...
    def pids(self) -> dict[int, int]: ...


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
    if order.fault == "worker-slow":
        pid = await asyncio.to_thread(workers.signal, order.slot, 0)
        return await asyncio.to_thread(hog.slow, pid, float(order.parameters["seconds"]))
    tensors = order.parameters.get("tensors", "any")
    message = contract.Inject(
        number=order.number,
        fault=_DONE_BY_WORKERS[order.fault],
        tensors="" if tensors == "any" else f"{tensors}/",
        pattern=order.parameters.get("pattern", "bit"),  # type: ignore[arg-type]
        seed=int(order.parameters.get("seed", "0")),
        seconds=float(order.parameters.get("seconds", "0")),
    )
    await asyncio.to_thread(workers.send, order.slot, message)
    return ""


async def refuse_store(workers: NodeWorkers, url: str, order: InjectFault) -> str:
    """Have the store refuse this agent and its workers; who has heard of it."""
    seconds = float(order.parameters["seconds"])
    faults.refuse_store(url, seconds)
    message = contract.Inject(number=order.number, fault="outage", seconds=seconds)
    told = 0
    for rank in workers.pids():
        with contextlib.suppress(LookupError, OSError):  # it has ended
            await asyncio.to_thread(workers.send, rank, message)
            told += 1
    return f"{told} workers"


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
