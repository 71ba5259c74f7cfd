"""The controller's side of fan-ins: which agents collect for others, and the wires to them.

Nothing of it is journaled and no agent is ordered: an agent that reports to the controller itself is answered with the
address of the fan-in that it shall report to from then on. When a fan-in is lost its nodes come back by themselves, and
are given another.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence

from orchestrator.runtime import fanin
from orchestrator.runtime.groups import Told, from_json
from orchestrator.runtime.nodes import AgentHandle
from storage import peer

logger = logging.getLogger(__name__)

REST_S = 30.0
"""After a fan-in was lost, before the same node is made one again."""

Hear = Callable[[Iterable[str], Sequence[Told]], list[str]]
"""Takes in who was heard and what was told; the nodes among them that are not known."""


class FanIns:
    def __init__(
        self, epoch: int, token: str, agents: dict[str, AgentHandle], hear: Hear, behind: Callable[[], bool]
    ) -> None:
        """`behind` tells that the controller can take no reports now."""
        self._epoch, self._token = epoch, token
        self._agents, self._hear, self._behind = agents, hear, behind
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """Agents that are fan-ins, or are asked to be."""
        self._members: dict[str, dict[str, None]] = {}
        """Fan-ins that serve, and the nodes that were sent to each."""
        self._group: dict[str, str] = {}
        """Node to the fan-in that it was sent to."""
        self._rests_until: dict[str, float] = {}

    def keep(self) -> None:
        """See to it that there are as many as the nodes of now want. They are spread, as neighbours fail together."""
        if len(self._agents) < fanin.FAN_IN_FROM_NODES:
            return
        missing = math.ceil(len(self._agents) / fanin.FAN_IN_NODES) - len(self._tasks)
        now = time.monotonic()
        able = [
            name
            for name, handle in self._agents.items()
            if handle.line is not None and name not in self._tasks and self._rests_until.get(name, 0.0) <= now
        ]
        for name in able[:: max(1, len(able) // max(1, missing))][: max(0, missing)]:
            self._tasks[name] = asyncio.get_running_loop().create_task(self._collect(name))

    def address_for(self, node: str) -> str:
        """Of the fan-in that this node shall report to; empty: to the controller."""
        name = self._group.get(node)
        if name is None:
            name = min(self._members, key=lambda fan_in: len(self._members[fan_in]), default=None)
            if name is None or len(self._members[name]) >= fanin.FAN_IN_NODES:
                return ""
            self._group[node] = name
            self._members[name][node] = None
        info = self._agents[name].info if name in self._agents else None
        return info.address if info is not None else ""

    def forget(self, node: str) -> None:
        """The node is not the controller's any more."""
        self._rests_until.pop(node, None)
        self._members.get(self._group.pop(node, ""), {}).pop(node, None)
        if node in self._tasks:
            self._tasks[node].cancel()

    def end(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _collect(self, name: str) -> None:
        """Have this agent be a fan-in, until its wire breaks."""
        info = self._agents[name].info
        assert info is not None
        try:
            async with peer.open_wire(info.address, self._token, {"op": fanin.COLLECT, "epoch": self._epoch}) as wire:
                await wire.receive(fanin.PATIENCE_S)
                self._members[name] = {}
                await self._take_in(wire)
        except Exception as e:  # whatever a fan-in does, its nodes have another way
            logger.warning("agent %s is no fan-in any more: %s: %s", name, type(e).__name__, e)
        finally:
            del self._tasks[name]
            for node in self._members.pop(name, {}):
                del self._group[node]
            if name in self._agents:
                self._rests_until[name] = time.monotonic() + REST_S

    async def _take_in(self, wire: peer.Wire) -> None:
        """Every frame is answered: what it says of who lives counts at once, its reports when there is room."""
        waiting: list[Told] = []
        taken = 0
        while True:
            frame = await wire.receive(fanin.PATIENCE_S)
            waiting += [from_json(each) for each in frame["told"]]
            ready = [] if self._behind() else waiting
            strangers = self._hear(frame["heard"], ready)
            if ready:
                taken, waiting = taken + len(ready), []
            await wire.send({"taken": taken, "strangers": strangers})
