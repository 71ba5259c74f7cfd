"""How an agent's reports reach the controller: an outbox, and the way that is open.

The way is the controller's own method, or a wire to a fan-in when the controller has named one. A report stays in the
outbox until the controller has taken it; whenever a way breaks, the next begins with the oldest that is left.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import islice
from typing import Any

import ray

from orchestrator.runtime import fanin
from orchestrator.runtime.groups import fitting
from orchestrator.runtime.reports import Report
from storage import wires
from trainer.contract import encode

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
"""Also the heartbeat; what matters is sent at once."""
REPORT_TIMEOUT_S = 10.0
"""A controller that takes this long for one report is treated as gone; the report is sent again."""
REPORT_RETRY_S = 0.3
ORPHAN_GRACE_S = 60.0
"""How long a controller's name may be unknown to Ray before its agents end: longer than an actor's restart."""
DISOWNED_GRACE_S = 300.0
"""How long a controller may say that it does not know this agent: far longer than it takes to adopt its agents."""
OUTBOX_REPORTS = 20_000
"""Beyond this the oldest are dropped; a thousand a minute fill it in 20 minutes without a controller."""
BATCH_REPORTS = 500
"""Reports that are under way at once."""
SPREAD_S = 2.0
"""Agents whose fan-ins fall silent, as all do when the controller stands still, go to it spread over so long. With
fanin.PATIENCE_S and an answer's age it stays below the 10 s of recovery.node_silence_s with so many nodes."""
SHUN_S = 10.0
"""After a fan-in was of no use, before it is tried again: trying it takes up to its patience, and nobody is told of
this node meanwhile."""


class NodeGone(RuntimeError):
    """The controller has let this agent go: its node was lost, or is wanted no more. Its name is never used again."""


class Outbox:
    """Reports in order, each with a number that rises, until the controller has taken them."""

    def __init__(self) -> None:
        self._entries: deque[tuple[int, Report]] = deque(maxlen=OUTBOX_REPORTS)
        self._newest = 0
        self.wake = asyncio.Event()
        """Set when there is something to send."""

    def push(self, report: Report) -> None:
        self._newest += 1
        self._entries.append((self._newest, report))
        self.wake.set()

    def reports(self) -> list[Report]:
        return [report for _, report in self._entries]

    def batch(self) -> list[tuple[int, Report]]:
        """The oldest."""
        return list(islice(self._entries, BATCH_REPORTS))

    def taken(self, number: int) -> None:
        """The controller has taken everything up to this one."""
        while self._entries and self._entries[0][0] <= number:
            self._entries.popleft()
        if self._entries:
            self.wake.set()

    def withdraw(self, unwanted: Callable[[Report], bool]) -> None:
        """Tell no more what is not true any more."""
        if any(unwanted(report) for _, report in self._entries):
            kept = [entry for entry in self._entries if not unwanted(entry[1])]
            self._entries.clear()
            self._entries.extend(kept)


class Reporter:
    """Sends an outbox for as long as the agent lives."""

    def __init__(
        self,
        *,
        node: str,
        namespace: str,
        token: str,
        outbox: Outbox,
        epoch: Callable[[], int],
        die: Callable[[str], Awaitable[None]],
    ) -> None:
        self._node, self._namespace, self._token, self._outbox = node, namespace, token, outbox
        self._epoch, self._die = epoch, die
        self._shunned = ("", 0.0)
        """A fan-in's address, and until when."""
        self.answered_at = time.monotonic()
        """Monotonic second of the controller's newest answer, also through a fan-in."""

    async def run(self) -> None:
        while True:
            fan_in = await self._report_to_controller()
            try:
                await self._report_through(fan_in)
            except wires.PeerRefused as e:
                logger.info("%s reports to the controller itself again: %s", self._node, e)
            except Exception as e:
                logger.warning("%s reports to the controller itself again: %s: %r", self._node, fan_in, e)
                self._shunned = (fan_in, time.monotonic() + SHUN_S)
            self._outbox.wake.set()  # at once, also to say no more than that it lives

    async def _report_to_controller(self) -> str:
        """Until the controller names a fan-in: its address. One that is gone, or disowns this agent, for too long ends
        the agent."""
        taken_at = time.monotonic()
        controller: Any = None
        while True:
            await self._something_to_say()
            batch = self._outbox.batch()
            try:
                controller = controller or await asyncio.to_thread(ray.get_actor, "controller", self._namespace)
            except ValueError:
                if time.monotonic() - taken_at > ORPHAN_GRACE_S:
                    await self._die("the controller is gone for good")
                await self._retry()
                continue
            except Exception:  # Ray's head is away; training goes on
                await self._retry()
                continue
            try:
                async with asyncio.timeout(REPORT_TIMEOUT_S):
                    fan_in = await asyncio.wrap_future(controller.report.remote(self._node, batch).future())
            except Exception as e:
                controller = None
                if isinstance(e, ray.exceptions.RayTaskError):
                    self.answered_at = time.monotonic()
                    if isinstance(e.cause, NodeGone):
                        await self._die(f"it has been let go: {e.cause}")
                disowned = isinstance(e, ray.exceptions.RayTaskError) and self._epoch() > 0
                if disowned and time.monotonic() - taken_at > DISOWNED_GRACE_S:
                    await self._die(f"the controller does not want it: {e}")
                await self._retry()
                continue
            taken_at = self.answered_at = time.monotonic()
            if fan_in is None:  # it lives, and reads its journal or is behind: that may take its time
                await self._retry()
                continue
            self._outbox.taken(batch[-1][0] if batch else 0)
            if fan_in and (fan_in != self._shunned[0] or self._shunned[1] < taken_at):
                return str(fan_in)

    async def _report_through(self, fan_in: str) -> None:
        """Until the wire breaks, or another controller than that of now is to be told.

        Raises:
            PeerRefused: this fan-in serves no such controller (any more).
            Exception: it is of no use.
        """
        epoch = self._epoch()
        request = {"op": fanin.REPORT, "node": self._node, "epoch": epoch}
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(fanin.PATIENCE_S):
                wire = await stack.enter_async_context(wires.open_wire(fan_in, self._token, request))
                await wire.receive(fanin.PATIENCE_S)
            passage = _Passage(wire, self._outbox)
            self._outbox.wake.set()
            await fanin.until_one_ends(self._tell(passage, epoch), passage.hear_answers(self._note_answer))

    def _note_answer(self) -> None:
        self.answered_at = time.monotonic()

    async def _tell(self, passage: _Passage, epoch: int) -> None:
        while True:
            await self._something_to_say()
            if epoch != self._epoch():
                return
            await passage.send()

    async def _something_to_say(self) -> None:
        """Wait for it; for the next heartbeat, if there is nothing."""
        try:
            async with asyncio.timeout(REPORT_INTERVAL_S):
                await self._outbox.wake.wait()
        except TimeoutError:
            return
        self._outbox.wake.clear()

    async def _retry(self) -> None:
        await asyncio.sleep(REPORT_RETRY_S)
        self._outbox.wake.set()


class _Passage:
    """An outbox on its way through a fan-in: at most a batch of it is under way."""

    def __init__(self, wire: wires.Wire, outbox: Outbox) -> None:
        self._wire, self._outbox = wire, outbox
        self._sent = 0

    async def send(self) -> None:
        """What is new; a heartbeat if nothing is."""
        new = [(number, report) for number, report in self._outbox.batch() if number > self._sent]
        told = fitting(([number, encode(report)] for number, report in new), fanin.FRAME_BYTES)
        frame = {"after": self._sent, "told": told}
        if told:
            self._sent = told[-1][0]
        if len(told) < len(new):
            self._outbox.wake.set()
        await self._wire.send(frame)

    async def hear_answers(self, note: Callable[[], None]) -> None:
        patience_s = fanin.PATIENCE_S
        while True:
            answer = await self._wire.receive(patience_s)
            note()
            self._outbox.taken(int(answer["taken"]))
            patience_s = fanin.PATIENCE_S + random.uniform(0.0, SPREAD_S)
