"""Who is cut off: nodes try to reach each other, and the answers tell which of them the others do not reach.

A node that its peers cannot reach may still talk to the controller. To the mesh it looks like a hang of everybody, and
a start with it never ends; so the nodes are asked when a generation is opened after a failure, and when one joins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from storage.wires import is_swallowed

REACH_S = 2.0
"""For one try to connect: the kernel of the other side answers, whatever its processes do; a lost packet is sent again
after a second."""
REACH_TRIES = 2
REACH_DEADLINE_S = 15.0
"""For an agent's answer; a machine without a free core takes longer than the tries."""
ASKED_OF_ONE = 8
"""Peers that one node tries: on large clusters not everybody can try everybody."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A node's answer: whom it has tried, and whom of them it did not reach."""

    asked: frozenset[str]
    failed: frozenset[str]


async def unreached(addresses: Mapping[str, str]) -> frozenset[str]:
    """Of nodes and their addresses (host:port), those from which no packet comes back."""
    answers = await asyncio.gather(*(_is_silent(address) for address in addresses.values()))
    return frozenset(node for node, silent in zip(addresses, answers, strict=True) if silent)


async def _is_silent(address: str) -> bool:
    host, _, port = address.rpartition(":")
    for _ in range(REACH_TRIES):
        try:
            async with asyncio.timeout(REACH_S):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.transport.abort()
            return False
        except OSError as e:
            if not is_swallowed(e):
                return False
    return True


def whom_to_try(nodes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Node to the peers that it shall try: all of them, or some at distances that double, so that every node is tried
    by several."""
    count = len(nodes)
    if count <= ASKED_OF_ONE + 1:
        return {node: tuple(other for other in nodes if other != node) for node in nodes}
    distances = [sign * 2**power for power in range(ASKED_OF_ONE // 2) for sign in (1, -1)]
    return {
        node: tuple(dict.fromkeys(nodes[(place + d) % count] for d in distances if d % count))
        for place, node in enumerate(nodes)
    }


def cut_off(answers: Mapping[str, Tried]) -> list[str]:
    """The nodes that most of those they have to do with cannot reach, or that cannot reach them.

    Only when the others all reach each other, and are more than half: of two halves nobody can say which is cut off.
    """
    links: dict[str, dict[str, bool]] = {}
    for node, tried in answers.items():
        for peer in tried.asked:
            sound = peer not in tried.failed and links.get(node, {}).get(peer, True)
            links.setdefault(node, {})[peer] = links.setdefault(peer, {})[node] = sound
    total, found = len(links), []
    while broken := {node: _share_broken(peers) for node, peers in links.items() if not all(peers.values())}:
        worst = max(broken, key=lambda node: (broken[node], node))
        if broken[worst] <= 0.5:
            return []
        found.append(worst)
        _without(links, worst)
    return found if len(links) > total / 2 else []


def _share_broken(peers: Mapping[str, bool]) -> float:
    return sum(not sound for sound in peers.values()) / len(peers)


def _without(links: dict[str, dict[str, bool]], node: str) -> None:
    for peer in links.pop(node):
        links[peer].pop(node, None)
