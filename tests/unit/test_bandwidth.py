"""Links of a node that wants to join: measured over real connections, and judged only by two others."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.runtime import bandwidth
from orchestrator.runtime.agent import NodeInfo
from orchestrator.runtime.nodes import AgentHandle, SlowLinks, check_links
from storage.peer import PeerServer
from storage.wires import PeerError

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))
from tcp_proxy import Proxy

TOKEN = "t"
SLOW_S = 0.1
"""For each 64 KiB: some 0.7 MB/s."""


class Actor:
    """What `check_links` asks of an agent actor, without Ray."""

    def __init__(self) -> None:
        self.link_rate = self

    def remote(self, address: str) -> Any:
        return Reference(bandwidth.rate_mb_s(address, TOKEN))


class Reference:
    def __init__(self, work: Any) -> None:
        self._work = work

    def future(self) -> Any:
        return asyncio.run_coroutine_threadsafe(self._work, asyncio.get_running_loop())


async def nodes_of(tmp_path: Path, through: dict[str, Proxy], *names: str) -> list[AgentHandle]:
    """Nodes with real servers; those in `through` are reached through a proxy, which is made here."""
    handles = []
    for name in names:
        server = PeerServer("127.0.0.1", TOKEN, str(tmp_path), "r", name, {bandwidth.PROBE: bandwidth.serve})
        address = await server.start()
        if name in through:
            through[name] = Proxy(address)
            through[name].passing = slowly
            address = through[name].address
        info = NodeInfo(
            ray_node=name, address=address, host="127.0.0.1", pid=1, ram_dir="", data_digest="", snapshots={}
        )
        handles.append(AgentHandle(node=name, ray_node=name, actor=Actor(), group=None, info=info))
    return handles


def slowly(before: int, piece: bytes) -> bytes:
    time.sleep(SLOW_S)  # the fault
    return piece


def run(work: Callable[[], Any]) -> Any:
    return asyncio.run(work())


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "PROBE_S", 1.0)


def test_a_link_is_measured_as_fast_as_it_is(tmp_path: Path) -> None:
    async def work() -> tuple[float, float]:
        slow, fast = await nodes_of(tmp_path, {"a": None}, "a", "b")  # type: ignore[dict-item]
        assert slow.info is not None and fast.info is not None
        return await bandwidth.rate_mb_s(slow.info.address, TOKEN), await bandwidth.rate_mb_s(fast.info.address, TOKEN)

    slow, fast = run(work)
    assert 0 < slow <= 0.065536 / SLOW_S, "no more than is let through"
    assert fast > 2 * slow


def test_nobody_is_measured_without_the_token(tmp_path: Path) -> None:
    async def work() -> None:
        (node,) = await nodes_of(tmp_path, {}, "a")
        assert node.info is not None
        await bandwidth.rate_mb_s(node.info.address, "another")

    with pytest.raises(PeerError, match="token"):
        run(work)


@pytest.mark.parametrize("slow", ["new", "others"], ids=["to it", "from it"])
def test_a_node_that_is_slow_with_two_others_stays_out(tmp_path: Path, slow: str) -> None:
    async def work() -> None:
        through: Any = dict.fromkeys(["new"] if slow == "new" else ["a", "b"])
        new, *others = await nodes_of(tmp_path, through, "new", "a", "b")
        await check_links(new, others, 2)

    with pytest.raises(SlowLinks, match=r"its links carry \d MB/s with [ab], \d MB/s with [ab].*least_bandwidth_mb_s"):
        run(work)


def test_a_slow_pair_does_not_say_whose_fault_it_is(tmp_path: Path) -> None:
    async def work() -> None:
        new, *others = await nodes_of(tmp_path, {"a": None}, "new", "a", "b")  # type: ignore[dict-item]
        await check_links(new, others, 2)
        await check_links(new, others[:1], 2)

    run(work)


def test_a_node_that_reaches_no_other_stays_out(tmp_path: Path) -> None:
    async def work() -> None:
        new, *others = await nodes_of(tmp_path, {}, "new", "a", "b")
        assert new.info is not None
        new.info = NodeInfo(**{**vars(new.info), "address": "127.0.0.1:1"})
        await check_links(new, others, 1)

    with pytest.raises(SlowLinks, match="0 MB/s"):
        run(work)


def test_nothing_is_measured_unless_it_is_asked_for(tmp_path: Path) -> None:
    async def work() -> None:
        new = AgentHandle(node="new", ray_node="new", actor=None, group=None)
        await check_links(new, [new, new], 0)

    run(work)
