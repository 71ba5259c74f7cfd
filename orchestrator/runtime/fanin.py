"""A fan-in: an agent that hears the reports of about 128 nodes and tells them to the controller, folded.

It is a service of the agent's peer server, for as long as the controller holds a wire to it (op "collect"): no process,
no port and no life of its own. The agents of its group hold wires to it (op "report"). It keeps nothing that matters:
an agent forgets a report only when the controller has taken it, so whatever breaks here, the agents tell it again by
another way.

    fan-in -> agent         {"ok": true}
    agent -> fan-in         {"after": number, "told": [[number, report], ...]}
    fan-in -> controller    {"after": count, "heard": [node, ...], "told": [[{node: number, ...}, report], ...]}
    controller -> fan-in    {"taken": count, "strangers": [node, ...]}
    fan-in -> agent         {"taken": number}

An agent speaks each second, and at once when it has something to tell. The answer to its frame comes when the
controller has answered, so it shows that the whole way is open; who gets none goes back to the controller itself. So a
fan-in's silence is nobody's but its own. And that a node lives it says only when it has heard it since it last said so.

`after` is what the frames before it have told on this wire: the number of an agent's newest report (0 at first; numbers
in between are of reports that the agent tells no more), or how many reports a fan-in has told. Who has heard something
else has missed a frame, and cuts the wire: a number that is taken stands for all reports before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from orchestrator.runtime.groups import GroupFold, Told, fitting, report_from_json, to_json
from storage.wires import PeerError, Wire

logger = logging.getLogger(__name__)

COLLECT, REPORT = "collect", "report"
"""The services' names."""
FAN_IN_FROM_NODES = 256
"""Fewer report to the controller itself. A Ray call costs it 0.7 ms of processor time, so these take a fifth of a core
at one a second, and a quarter of a second for a step that all end at once."""
FAN_IN_NODES = 128
"""Nodes that one fan-in hears: 1% of a core of its node, and 98 wires to the controller for 12,500 nodes."""
GATHER_S = 0.05
"""Who has something to say waits so long for others who say the same: all nodes end a step within milliseconds."""
BEAT_S = 0.5
"""Between two words to the controller when nobody has a report; half of what agents take between two of theirs."""
ANSWER_S = 1.5
"""An agent that has spoken is answered after so long: for two of its frames at once, as each answer costs as much as
its frame."""
PATIENCE_S = 5.0
"""A wire on which nothing comes for so long is given up. Answers come after 3 s at most; and well before the 10 s of
recovery.node_silence_s the agents must have reported by another way."""
CONTROLLER_PATIENCE_S = 20.0
"""A fan-in gives up a silent controller so much later than its agents give it up, each by itself: if it were first, one
that stands still would find them all at its own door when it goes on."""
FRAME_BYTES = 1024 * 1024
"""A frame that is longer ends with the report before. Thousands of most reports, and some 100 of a failed worker's last
words, which take the controller a tenth of a second."""
UNANSWERED_FRAMES = 64
"""To a controller that does not answer: half a minute of beats, more than CONTROLLER_PATIENCE_S."""


async def until_one_ends(*works: Coroutine[Any, Any, None]) -> None:
    """Do all of these until the first of them ends. Raises what it raises."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class _Member:
    """A node that reports here."""

    wire: Wire
    heard_at: float
    """Monotonic seconds of its last frame."""
    told: int = 0
    """Number of the newest report that it has told on this wire."""


@dataclass
class _Group:
    """The nodes that one controller hears through this fan-in."""

    epoch: int
    wire: Wire

    def __post_init__(self) -> None:
        self.members: dict[str, _Member] = {}
        self._fold = GroupFold()
        self._seen: dict[str, int] = {}
        """Number of each node's newest report. What a node tells again after a break is here already."""
        self._taken: dict[str, int] = {}
        """Number of each node's newest report that the controller has taken."""
        self._heard: dict[str, None] = {}
        self._flying: list[Told] = []
        """What was sent and is not taken; until it is, no more is sent."""
        self._sent = 0
        """Reports that were sent to the controller."""
        self._unanswered: deque[tuple[str, ...]] = deque()
        """For each frame to the controller that it has not answered, of whom it said that they were heard."""
        self._owed: dict[str, float] = {}
        """Whom of those that the controller has answered for, and since when (monotonic seconds), the oldest first."""
        self._wake = asyncio.Event()

    async def pass_on(self) -> None:
        """Until the controller's wire ends."""
        await until_one_ends(self._send(), self._answer())

    async def hear_out(self, node: str, wire: Wire) -> None:
        """What a node tells, until its wire ends."""
        before, member = self.members.get(node), _Member(wire, time.monotonic())
        self.members[node] = member
        if before is not None:
            before.wire.cut()
        try:
            wire.post({"ok": True})
            await wire.deliver(lambda frame: self._hear(node, member, frame))
        finally:
            if self.members.get(node) is member:
                del self.members[node]

    def _hear(self, node: str, member: _Member, frame: dict[str, Any]) -> None:
        if frame["after"] != member.told:
            raise PeerError(f"a frame is missing: this one comes after report {frame['after']}, not {member.told}")
        self._heard[node] = None
        member.heard_at = time.monotonic()
        for number, report in frame["told"]:
            if number <= member.told:
                raise PeerError(f"report {number} comes after {member.told}")
            member.told = number
            if number > self._seen.get(node, 0):
                self._fold.add(node, number, report_from_json(report))
                self._seen[node] = number
                if not self._flying:
                    self._wake.set()

    def _let_go_of_silent(self, stood_still_s: float) -> None:
        """While this process stands still, what nodes send waits to be read."""
        now = time.monotonic()
        for member in self.members.values():
            member.heard_at = min(now, member.heard_at + max(0.0, stood_still_s))
            if member.heard_at < now - PATIENCE_S:
                member.wire.cut()

    async def _send(self) -> None:
        while True:
            began = time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._wake.wait()
            if self._wake.is_set():
                await asyncio.sleep(GATHER_S)
            self._wake.clear()
            self._let_go_of_silent(time.monotonic() - began - BEAT_S - GATHER_S)
            if len(self._unanswered) >= UNANSWERED_FRAMES:
                raise PeerError(f"the controller has left {UNANSWERED_FRAMES} frames unanswered")
            told = fitting(map(to_json, self._fold), FRAME_BYTES) if not self._flying else []
            heard, self._heard = tuple(self._heard), {}
            frame = {"after": self._sent, "heard": heard, "told": told}
            if told:
                self._flying = self._fold.take(len(told))
            self._sent += len(told)
            self._unanswered.append(heard)
            await self.wire.send(frame)

    async def _answer(self) -> None:
        """Pass the controller's answers on to those who wait for one."""
        while True:
            answer = await self.wire.receive(CONTROLLER_PATIENCE_S)
            if not self._unanswered:
                raise PeerError("the controller answers what was not asked")
            now = time.monotonic()
            for node in self._unanswered.popleft():
                self._owed.setdefault(node, now)
            if self._flying and answer["taken"] == self._sent:
                self._note_taken()
            for node in answer["strangers"]:
                if node in self.members:
                    self.members[node].wire.cut()
            while self._owed and (oldest := next(iter(self._owed.items())))[1] <= now - ANSWER_S:
                self._pay(oldest[0])

    def _note_taken(self) -> None:
        for told in self._flying:
            self._taken |= told.tellers
        self._flying = []
        if len(self._fold):
            self._wake.set()

    def _pay(self, node: str) -> None:
        del self._owed[node]
        if node in self.members:
            with contextlib.suppress(PeerError):  # one that does not read finds its wire gone
                self.members[node].wire.post({"taken": self._taken.get(node, 0)})


class FanIn:
    """The two services of an agent's peer server that make it a fan-in."""

    def __init__(self) -> None:
        self._group: _Group | None = None

    async def collect(self, request: dict[str, Any], wire: Wire) -> None:
        """For a controller: hear nodes, until this wire ends or a newer controller opens one."""
        epoch = int(request["epoch"])
        if self._group is not None and self._group.epoch > epoch:
            await wire.send({"error": f"a controller of epoch {self._group.epoch} collects here"})
            return
        if self._group is not None:
            self._group.wire.cut()
        group = self._group = _Group(epoch, wire)
        try:
            await wire.send({"ok": True})
            await group.pass_on()
        finally:
            if self._group is group:
                self._group = None
            for member in list(group.members.values()):
                with contextlib.suppress(PeerError):
                    member.wire.post({"error": "the controller collects here no more"})
                member.wire.writer.close()

    async def report(self, request: dict[str, Any], wire: Wire) -> None:
        """For an agent: pass its reports on to the controller that it answers to."""
        group, epoch = self._group, int(request["epoch"])
        if group is None or group.epoch != epoch:
            await wire.send({"error": f"no controller of epoch {epoch} collects here"})
            return
        node = str(request["node"])
        try:
            await group.hear_out(node, wire)
        except Exception as e:  # whatever a node says, it alone is cut off
            logger.warning("%s reports through here no more: %s: %s", node, type(e).__name__, e)
