"""An order for chaos as the controller has it carried out: by itself, or by the agents of the nodes that are meant."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Mapping

import ray

from orchestrator.chaos import ballast, head, net
from orchestrator.core.actions import InjectFault
from orchestrator.runtime.nodes import AgentHandle, call
from storage import faults

ORDER_DEADLINE_S = 30.0
"""For an agent to do it and to answer."""
RECOVERY_DEADLINE_S = 120.0
"""For the recovery in which chaos shall strike again to begin: longer than any detector needs."""
RECOVERY_LOOK_S = 0.02
"""Between two looks: a recovery may take a second."""


async def harm(
    order: InjectFault, url: str, epoch: int, agents: Mapping[str, AgentHandle], opened: Callable[[], int]
) -> str:
    """Do it; what was done, or nothing when somebody else tells.

    Args:
        url: run.url.
        epoch: the controller's.
        agents: those of now, by node.
        opened: tells the newest generation that was ordered.

    Raises:
        Exception: it was not done; the message says why.
    """
    given = order.parameters
    match order.fault:
        case "controller-kill":
            os.kill(os.getpid(), signal.SIGKILL)  # the next epoch tells that it was done
        case "head-kill":
            await asyncio.to_thread(head.kill)
            return ""
        case "disk-full":
            return await ballast.fill(url, float(given["seconds"]), int(given["ballast_bytes"]))
        case "store-outage":
            return await _refuse_store(order, url, epoch, agents)
        case "clock-jump" if given["process"] == "controller":
            faults.leap_clock(float(given["seconds"]))
            return f"time.time() of the controller leaps by {float(given['seconds']):+g} s"
        case "net-cut":
            order = dataclasses.replace(order, parameters=given | _addresses(order.node, agents))
    if given.get("during") == "recovery":
        return await _in_recovery(order, epoch, agents, opened)
    return await _by_the_agent(order, epoch, agents)


async def _by_the_agent(order: InjectFault, epoch: int, agents: Mapping[str, AgentHandle]) -> str:
    if order.node not in agents:
        raise LookupError(f"node {order.node} has no agent any more")
    return str(await call(agents[order.node].actor.inject.remote(epoch, order), ORDER_DEADLINE_S))


def _addresses(node: str, agents: Mapping[str, AgentHandle]) -> dict[str, str]:
    """For a cut: where the controller is, with the ports of its process, and where the node's peers are."""
    hosts = {name: handle.info.host for name, handle in agents.items() if handle.info is not None}
    peers = ",".join(sorted({host for name, host in hosts.items() if name != node}))
    own, ports = str(ray.util.get_node_ip_address()), ",".join(map(str, net.listening_ports()))  # type: ignore[no-untyped-call]
    return {"controller": f"{own}|{ports}", "peers": peers}


async def _refuse_store(order: InjectFault, url: str, epoch: int, agents: Mapping[str, AgentHandle]) -> str:
    """The controller's own accesses, too: so this truth cannot be written before the outage is over."""
    actors = [handle.actor for handle in agents.values() if handle.actor is not None]
    told = [call(actor.inject.remote(epoch, order), ORDER_DEADLINE_S) for actor in actors]
    seconds = float(order.parameters["seconds"])
    faults.refuse_store(url, seconds)
    heard = [answer for answer in await asyncio.gather(*told, return_exceptions=True) if isinstance(answer, str)]
    return f"run.url refuses the controller and {len(heard)} agents ({', '.join(heard)}) for {seconds:g} s"


async def _in_recovery(
    order: InjectFault, epoch: int, agents: Mapping[str, AgentHandle], opened: Callable[[], int]
) -> str:
    """Once the next generation is being opened, as soon as it has a worker in that slot."""
    deadline = time.monotonic() + RECOVERY_DEADLINE_S
    while opened() <= order.generation:
        if time.monotonic() > deadline:
            raise TimeoutError(f"there was no recovery within {RECOVERY_DEADLINE_S:g} s")
        await asyncio.sleep(RECOVERY_LOOK_S)
    while True:
        now = dataclasses.replace(order, generation=opened())
        try:
            detail = await _by_the_agent(now, epoch, agents)
        except ray.exceptions.RayTaskError as e:  # not there yet
            if time.monotonic() > deadline:
                raise e.cause if isinstance(e.cause, Exception) else e from e
            await asyncio.sleep(RECOVERY_LOOK_S)
            continue
        return f"{detail}, while generation {now.generation} began"
