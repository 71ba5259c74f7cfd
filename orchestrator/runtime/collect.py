"""The controller's side of fan-ins: which agents collect for others, and the wires to them.

Nothing of it is journaled and no agent is ordered: an agent that reports to the controller itself is answered with the
address of the fan-in that it shall report to from then on. When a fan-in is lost its nodes come back by themselves, and
are given another; so is a node that comes back because it cannot reach its own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from orchestrator.runtime import fanin
from orchestrator.runtime.groups import Told, from_json
from orchestrator.runtime.nodes import AgentHandle
from storage import wires

logger = logging.getLogger(__name__)

REST_S = 30.0
"""After a fan-in was lost, before the same node is made one again; after a node could not reach one, before it is sent
there again."""

Hear = Callable[[Iterable[str], Sequence[Told]], list[str]]
"""Takes in who was heard and what was told; the nodes among them that are not known."""


class FanIns:
    def __init__(
        self,
        epoch: int,
        token: str,
        agents: dict[str, AgentHandle],
        hear: Hear,
        behind: Callable[[], bool],
        standing: Callable[[str], str],
    ) -> None:
        """`behind` tells that the controller can take no reports now; `standing` what is to be thought of a node, empty
        for one that is not to be used."""
        self._epoch, self._token = epoch, token
        self._agents, self._hear, self._behind, self._standing = agents, hear, behind, standing
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """Agents that are fan-ins, or are asked to be."""
        self._members: dict[str, dict[str, None]] = {}
        """Fan-ins that serve, and the nodes that were sent to each."""
        self._group: dict[str, str] = {}
        """Node to the fan-in that it was sent to."""
        self._back: dict[str, None] = {}
        """Nodes that were sent to one, and have reported here since."""
        self._avoids: dict[str, tuple[str, float]] = {}
        """Node to the fan-in that it could not reach, and until when it is not sent there."""
        self._rests_until: dict[str, float] = {}

    def keep(self) -> None:
        """See to it that there are as many as the nodes of now want, on nodes that will stay. They are spread, as
        neighbours fail together."""
        for name, task in self._tasks.items():
            if self._standing(name) in ("", "leaving"):
                task.cancel()
        missing = math.ceil(len(self._agents) / fanin.FAN_IN_NODES) - len(self._tasks)
        if len(self._agents) < fanin.FAN_IN_FROM_NODES or missing <= 0:
            return
        able = [name for name, handle in self._agents.items() if handle.line is not None and self._is_able(name)]
        for name in able[:: max(1, len(able) // missing)][:missing]:
            task = self._tasks[name] = asyncio.get_running_loop().create_task(self._collect(name))
            task.add_done_callback(partial(self._ended, name))

    def _is_able(self, name: str) -> bool:
        rests = self._rests_until.get(name, 0.0) > time.monotonic()
        return name not in self._tasks and not rests and self._standing(name) == "good"

    def address_for(self, node: str) -> str:
        """Of the fan-in that this node, which reports here, shall report to; empty: to the controller.

        Once it is told the same again: the answer may have been lost, or the wire broken. Then it is given another.
        """
        name = self._group.get(node)
        if name is not None and node in self._back:
            self._leave(node)
            self._avoids[node] = (name, time.monotonic() + REST_S)
            name = None
        elif name is not None:
            self._back[node] = None
        name = name or self._send_to_one(node)
        info = self._agents[name].info if name in self._agents else None
        return info.address if info is not None else ""

    def _send_to_one(self, node: str) -> str:
        """The fan-in with the fewest nodes of those that have room, but not one that this node could not reach lately;
        empty if there is none."""
        avoided, until = self._avoids.get(node, ("", 0.0))
        if until <= time.monotonic():
            self._avoids.pop(node, None)
            avoided = ""
        room = {name: len(m) for name, m in self._members.items() if len(m) < fanin.FAN_IN_NODES and name != avoided}
        name = min(room, key=room.__getitem__, default="")
        if name:
            self._group[node] = name
            self._members[name][node] = None
        return name

    def _leave(self, node: str) -> None:
        self._members.get(self._group.pop(node, ""), {}).pop(node, None)
        self._back.pop(node, None)

    def forget(self, node: str) -> None:
        """The node is not the controller's any more."""
        self._rests_until.pop(node, None)
        self._avoids.pop(node, None)
        self._leave(node)
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
            async with wires.open_wire(info.address, self._token, {"op": fanin.COLLECT, "epoch": self._epoch}) as wire:
                await wire.receive(fanin.PATIENCE_S)
                self._members[name] = {}
                await self._take_in(wire)
        except Exception as e:  # whatever a fan-in does, its nodes have another way
            logger.warning("agent %s is no fan-in any more: %s: %s", name, type(e).__name__, e)

    def _ended(self, name: str, _: asyncio.Task[None]) -> None:
        del self._tasks[name]
        for node in list(self._members.get(name, {})):
            self._leave(node)
        self._members.pop(name, None)
        if name in self._agents:
            self._rests_until[name] = time.monotonic() + REST_S

    async def _take_in(self, wire: wires.Wire) -> None:
        """Every frame is answered: what it says of who lives counts at once, its reports when there is room."""
        waiting: list[Told] = []
        taken = 0
        while True:
            frame = await wire.receive(fanin.PATIENCE_S)
            if frame["after"] != taken + len(waiting):
                raise wires.PeerError(
                    f"a frame is missing: {frame['after']} reports told, {taken + len(waiting)} heard"
                )
            waiting += [from_json(each) for each in frame["told"]]
            ready = [] if self._behind() else waiting
            strangers = self._hear(frame["heard"], ready)
            if ready:
                taken, waiting = taken + len(ready), []
            await wire.send({"taken": taken, "strangers": strangers})
