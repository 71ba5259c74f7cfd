"""Nodes as Ray has them: which can serve, and an agent actor on each in a placement group of its own.

One placement group per node, because a group with a bundle for every node could not lose or gain one.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.state
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.runtime import bandwidth
from orchestrator.runtime.agent import ZYGOTE_DEADLINE_S, Agent, NodeInfo
from orchestrator.runtime.preparation import PREPARE_DEADLINE_S
from orchestrator.spec import JobSpec

HEAD_RESOURCE = "node:__internal_head__"
"""Ray's own mark of the head node."""
PLACE_DEADLINE_S = 60.0
"""For Ray to reserve the bundle on a node that has the resources free."""
KILL_DEADLINE_S = 10.0
OTHERS = 2
"""With whom the links of a node that wants to join are measured: one slow pair does not say whose fault it is."""

logger = logging.getLogger(__name__)


class SlowLinks(RuntimeError):
    """A node that wants to join carries less than it has to."""


@dataclass
class AgentHandle:
    """A node's agent as the controller holds it."""

    node: str
    ray_node: str
    actor: Any
    group: PlacementGroup | None
    info: NodeInfo | None = None
    heard_at: float = 0.0
    """Monotonic seconds of its last report."""
    reached_at: float = 0.0
    """Monotonic seconds of when its agent last answered its peers while it was silent here."""
    taken: int = 0
    """Number of the newest of its reports that was taken in; older ones may come again by another way."""
    line: asyncio.Task[None] | None = None


@dataclass(frozen=True, kw_only=True)
class RayNode:
    id: str
    domain: str
    free: bool
    """Whether nobody else has taken what an agent needs there. Ray's view of this is up to a second old."""
    leaving: bool
    """Ray drains it: an autoscaler takes it away, or its cloud has given notice."""


def eligible(spec: JobSpec) -> list[RayNode]:
    """The live nodes of the cluster whose resources fit an agent, in a fixed order. Blocks for three RPCs."""
    bundle = bundle_of(spec)
    # Ray has no public call for what is free on each node; its own `ray status` reads this one.
    available = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    # Nor for who is drained; Ray Train reads this one.
    draining = ray._private.state.state.get_draining_nodes()

    def fits(resources: dict[str, float]) -> bool:
        return all(resources.get(name, 0) >= amount for name, amount in bundle.items())

    return [
        RayNode(
            id=node["NodeID"],
            domain=(node.get("Labels") or {}).get(spec.cluster.domain_label, ""),
            free=fits(available.get(node["NodeID"], {})),
            leaving=node["NodeID"] in draining,
        )
        for node in sorted(ray.nodes(), key=lambda node: str(node["NodeID"]))  # type: ignore[no-untyped-call]
        if node["Alive"] and fits(node["Resources"])
    ]


def bundle_of(spec: JobSpec) -> dict[str, float]:
    """The resources that one agent reserves."""
    slots = spec.cluster.slots_per_node
    gpus = {"GPU": float(slots)} if spec.cluster.device == "cuda" else {}
    return {"CPU": slots * spec.cluster.cpus_per_slot, **gpus}


async def start_agent(
    spec: JobSpec, namespace: str, node: str, ray_node: RayNode, token: str, instance: str, adopts: bool
) -> tuple[AgentHandle, NodeInfo]:
    """Reserve the node and bring an agent up on it, prepared. With `adopts` it takes snapshots over that a dead node
    of its machine has left.

    Raises:
        Exception: what went wrong; nothing of the agent is left.
    """
    bundle = bundle_of(spec)
    group = await asyncio.to_thread(
        placement_group,
        [bundle],
        name=f"{namespace}/{node}",
        lifetime="detached",
        bundle_label_selector=[{"ray.io/node-id": ray_node.id}],
    )
    handle = AgentHandle(node=node, ray_node=ray_node.id, actor=None, group=group)
    try:
        await asyncio.wait_for(asyncio.wrap_future(group.ready().future()), PLACE_DEADLINE_S)
        handle.actor = (
            ray.remote(Agent)
            .options(
                name=agent_name(node),
                namespace=namespace,
                lifetime="detached",
                max_restarts=0,
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            )
            .remote(
                run=spec.run.name,
                node=node,
                ray_node=ray_node.id,
                namespace=namespace,
                token=token,
                instance=instance,
                spec_document=spec.document(),
                adopts=adopts,
            )
        )
        info = await call(handle.actor.prepare.remote(), PREPARE_DEADLINE_S + ZYGOTE_DEADLINE_S)
    except BaseException:
        await release(handle)
        raise
    handle.info, handle.heard_at = info, time.monotonic()
    return handle, info


async def call(ref: Any, deadline_s: float) -> Any:
    """The result of a Ray call, within a deadline."""
    return await asyncio.wait_for(asyncio.wrap_future(ref.future()), deadline_s)


def last_line(error: BaseException) -> str:
    """What an error says itself: Ray puts a traceback before it."""
    return (str(error).strip() or repr(error)).splitlines()[-1]


async def release(handle: AgentHandle) -> None:
    """End an agent's actor and give its reservation back. Raises TimeoutError when Ray does not answer."""
    if handle.line is not None:
        handle.line.cancel()
    try:
        if handle.actor is not None:
            await asyncio.wait_for(asyncio.to_thread(ray.kill, handle.actor), KILL_DEADLINE_S)
    finally:
        if handle.group is not None:
            await asyncio.wait_for(asyncio.to_thread(remove_placement_group, handle.group), KILL_DEADLINE_S)


async def sweep(namespace: str, known: set[str]) -> None:
    """End the agents of this run that its journal does not know, and give back what they reserved.

    A controller that dies while an agent comes up leaves one; so does a run whose controller could not end it.
    """
    prefix = f"{namespace}/"
    table = await asyncio.wait_for(asyncio.to_thread(placement_group_table), KILL_DEADLINE_S)
    names = [row["name"] for row in table.values() if row["name"].startswith(prefix) and row["state"] != "REMOVED"]
    failed: list[Exception] = []
    for node in {name.removeprefix(prefix) for name in names} - known:
        handle = AgentHandle(node=node, ray_node="", actor=None, group=None)
        try:
            handle.group = await asyncio.to_thread(get_placement_group, f"{prefix}{node}")
            handle.actor = await asyncio.to_thread(ray.get_actor, agent_name(node), namespace)
        except ValueError:  # one of the two is gone already
            pass
        try:
            await release(handle)
        except Exception as e:  # the others are given back all the same
            failed.append(e)
    if failed:
        raise failed[0]


def agent_name(node: str) -> str:
    return f"agent/{node}"


async def check_links(new: AgentHandle, others: Sequence[AgentHandle], least_mb_s: int) -> None:
    """Measure `new` with OTHERS of the others, drawn. With fewer there is no verdict.

    Raises:
        SlowLinks: with each of them it carries less than `least_mb_s`, in one direction or the other.
    """
    if not least_mb_s:
        return
    drawn = random.sample(list(others), min(OTHERS, len(others)))
    rates = [await _pair(new, other) for other in drawn]
    slow = {other.node: rate for other, rate in zip(drawn, rates, strict=True) if rate < least_mb_s}
    words = ", ".join(f"{rate:.0f} MB/s with {node}" for node, rate in slow.items())
    if len(slow) == OTHERS:
        raise SlowLinks(f"its links carry {words}; cluster.least_bandwidth_mb_s is {least_mb_s}")
    if slow:
        logger.warning("%s: the link carries %s, less than cluster.least_bandwidth_mb_s", new.node, words)


async def _pair(new: AgentHandle, other: AgentHandle) -> float:
    """MB/s of the slower direction, 0 if they do not reach each other. One after the other, lest they share a core."""
    assert new.info is not None and other.info is not None
    ways = ((new, other.info.address), (other, new.info.address))
    try:
        rates = [await call(to.actor.link_rate.remote(address), bandwidth.MEASURED_S) for to, address in ways]
        return float(min(rates))
    except Exception as e:
        logger.warning("%s and %s do not reach each other: %s: %s", new.node, other.node, type(e).__name__, e)
        return 0.0
