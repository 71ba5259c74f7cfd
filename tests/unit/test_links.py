"""Who is cut off, by whom nodes do not reach; and how it is tried."""

from __future__ import annotations

import asyncio
import socket

import pytest

from orchestrator.runtime import links
from orchestrator.runtime.links import Tried, cut_off, whom_to_try


def answers(nodes: str, broken: set[str], silent: str = "") -> dict[str, Tried]:
    """What all nodes but the `silent` say when the links in `broken`, such as "ab" (a does not reach b), are."""
    return {
        node: Tried(asked=frozenset(peers), failed=frozenset(peer for peer in peers if f"{node}{peer}" in broken))
        for node, peers in whom_to_try(nodes).items()
        if node not in silent
    }


def both(node: str, others: str) -> set[str]:
    return {f"{node}{other}" for other in others} | {f"{other}{node}" for other in others}


@pytest.mark.parametrize(
    ("nodes", "broken", "found"),
    [
        ("abc", set(), []),
        ("abc", both("a", "bc"), ["a"]),
        ("abc", {"ba", "ca"}, ["a"]),  # packets to it are lost: it reaches nobody either, but one way is enough
        ("abc", {"ab", "ac"}, ["a"]),
        ("ab", both("a", "b"), []),  # nobody can say which of two
        ("abcd", both("a", "cd") | both("b", "cd"), []),  # two halves
        ("abcde", both("a", "cde") | both("b", "cde"), ["a", "b"]),  # the smaller part of a cluster in two
        ("abcde", both("a", "b"), []),  # one link of many is neither's
        ("abcde", both("a", "bcde") | both("b", "acde"), ["a", "b"]),
    ],
)
def test_who_most_others_do_not_reach_is_cut_off(nodes: str, broken: set[str], found: list[str]) -> None:
    assert sorted(cut_off(answers(nodes, broken))) == found


def test_who_cannot_answer_is_judged_by_the_others() -> None:
    assert cut_off(answers("abcd", both("a", "bcd"), silent="a")) == ["a"]
    assert cut_off({}) == []


def test_on_a_large_cluster_each_tries_a_few_and_is_tried_by_several() -> None:
    nodes = [f"{n:05d}" for n in range(12_500)]
    tries = whom_to_try(nodes)
    assert {len(peers) for peers in tries.values()} == {links.ASKED_OF_ONE}
    tried = [peer for peers in tries.values() for peer in peers]
    assert all(tried.count(node) == links.ASKED_OF_ONE for node in nodes[:3])
    broken = nodes[77]
    said = {
        node: Tried(
            asked=frozenset(peers), failed=frozenset(peers) if node == broken else frozenset({broken} & {*peers})
        )
        for node, peers in tries.items()
    }
    assert cut_off(said) == [broken]


def test_a_host_that_answers_is_reached_whatever_its_processes_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as idle, socket.create_server(("127.0.0.1", 0)) as gone:
        addresses = {name: f"127.0.0.1:{s.getsockname()[1]}" for name, s in (("idle", idle), ("gone", gone))}
        gone.close()
        assert asyncio.run(links.unreached(addresses)) == frozenset()


def test_a_host_from_which_no_packet_comes_back_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "REACH_S", 0.05)

    async def swallowed(*args: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(asyncio, "open_connection", swallowed)
    assert asyncio.run(links.unreached({"a": "10.0.0.1:1"})) == frozenset({"a"})
