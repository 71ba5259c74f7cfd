"""Nodes that fall silent: which of them are lost, and which live and only cannot reach the controller.

A mesh that goes on shows that all its nodes live, for no rank completes a step without the others. In a step that takes
longer than a node may be silent, its peers are asked whether its agent answers them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from orchestrator.runtime import links
from orchestrator.runtime.hangs import PACE_FACTOR
from orchestrator.runtime.nodes import AgentHandle, call
from orchestrator.runtime.reports import NodeStep

LOOK_INTERVAL_S = 0.5
"""Between two looks at who is silent: a ninth of recovery.node_silence_s."""
STALL_S = 2.0
"""From here on this controller's own inattention counts as no silence of the nodes. Less is common when many events
come at once, and leaves the nodes most of recovery.node_silence_s."""
CUT_OFF_S = 60.0
"""How long a node of the mesh may be silent while the steps of its peers show that it lives: it is cut off from the
controller, which cannot commit what is saved meanwhile. So long cuts are no accident of a switch any more."""
ASK_PEERS_S = 1.5
"""A node of the mesh is silent for so long before its peers are asked whether its agent answers them, and from then on
each time that so long has passed since it did."""
ANSWER_S = links.REACH_S + 1.0
"""For a peer to say."""
ASKED_ABOUT = 64
"""Silent nodes whose peers are asked at a time: should all be silent, it is this node that is cut off."""
PACES = 64
"""Steps whose time is remembered."""


class SilenceWatch:
    """Of one controller, over all its nodes.

    Args:
        agents: those that there are, by node; the owner's own. Each handle tells when it was heard last.
        now: recovery.node_silence_s, and the nodes of the mesh.
        lost: is told the node that is lost and why, again while it is there.
    """

    def __init__(
        self,
        agents: Mapping[str, AgentHandle],
        now: Callable[[], tuple[float, Sequence[str]]],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[Any]],
        lost: Callable[[str, str], None],
    ) -> None:
        self._agents, self._now = agents, now
        self._spawn, self._lost = spawn, lost
        self._furthest, self._moved_at = 0, 0.0
        """The newest step that any node has told of in the generation that trains, and the monotonic second of it."""
        self._paces_s: deque[float] = deque(maxlen=PACES)
        """How long the newest steps of the generation that trains took, passes of validation and saves among them."""
        self._asking: set[str] = set()
        """Silent nodes whose peers are being asked whether they reach them."""

    def begin(self, step: int) -> None:
        """A generation opens with the state after `step`."""
        self._furthest, self._moved_at = step, 0.0
        self._paces_s.clear()

    def moves(self, report: NodeStep) -> None:
        """A node of the generation that trains has told of a step."""
        if report.step > self._furthest:
            self._furthest, self._moved_at = report.step, time.monotonic()
            self._paces_s.append(report.step_us / 1e6)

    async def watch(self) -> None:
        """Look at them until it is cancelled; while this process stands still, what they send waits to be read."""
        for handle in self._agents.values():  # to adopt them may have taken long
            handle.heard_at = time.monotonic()
        while True:
            began = time.monotonic()
            await asyncio.sleep(LOOK_INTERVAL_S)
            now = time.monotonic()
            stood_still_s = now - began - LOOK_INTERVAL_S
            if stood_still_s >= STALL_S:
                self._moved_at = min(now, self._moved_at + stood_still_s)
                for handle in self._agents.values():
                    handle.heard_at = min(now, handle.heard_at + stood_still_s)
                    handle.reached_at = min(now, handle.reached_at + stood_still_s)
            self.check()

    def check(self) -> None:
        """Tell of those that are lost, and have peers asked about those of whom it is not known."""
        (silence_s, mesh), now = self._now(), time.monotonic()
        moves = now - self._moved_at <= silence_s
        longest_s = PACE_FACTOR * max(self._paces_s, default=0.0)
        may_move = silence_s < longest_s and now - self._moved_at <= longest_s
        for handle in list(self._agents.values()):
            silent_s = now - handle.heard_at
            # No rank completes a step without all the others: a mesh that goes on shows that all its nodes live. In a
            # step that takes longer than that, so do the node's peers, if its agent answers them.
            lives = moves or (may_move and now - handle.reached_at <= silence_s)
            if silent_s > silence_s and not (handle.node in mesh and lives and silent_s <= CUT_OFF_S):
                self._lost(handle.node, f"silent for {silent_s:.3g} s")
            elif silent_s > ASK_PEERS_S and may_move and handle.node in mesh and now - handle.reached_at > ASK_PEERS_S:
                self._ask_about(handle, mesh, now)

    def _ask_about(self, handle: AgentHandle, mesh: Sequence[str], now: float) -> None:
        if handle.node in self._asking or len(self._asking) >= ASKED_ABOUT:
            return
        known = (self._agents[node] for node in links.whom_to_try(mesh)[handle.node] if node in self._agents)
        self._asking.add(handle.node)
        self._spawn(self._ask_peers(handle, [peer for peer in known if now - peer.heard_at <= ASK_PEERS_S]))

    async def _ask_peers(self, handle: AgentHandle, peers: Sequence[AgentHandle]) -> None:
        """Whether the agent of a node that is silent here answers most of the others that are asked."""
        assert handle.info is not None
        address = handle.info.address
        asked = [asyncio.ensure_future(call(peer.actor.hears_from.remote(address), ANSWER_S)) for peer in peers]
        answered = 0
        try:
            for each in asyncio.as_completed(asked):
                with contextlib.suppress(Exception):  # who cannot say is not counted for it
                    answered += bool(await each)
                if 2 * answered > len(asked):
                    handle.reached_at = time.monotonic()
                    return
        finally:
            self._asking.discard(handle.node)
            for task in asked:
                task.cancel()
