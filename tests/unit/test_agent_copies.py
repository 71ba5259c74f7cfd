"""Copies of a peer's snapshots into a node: one writer a slot, however often it is ordered, and none after a halt."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.core.actions import Transfer
from orchestrator.runtime import agent as agents
from orchestrator.runtime.agent import Agent

DEADLINE_S = 30.0
COPY = Transfer(slot=1, to_node="a", from_slot=3, from_node="b")


def agent() -> Agent:
    """As far as copies need one; it takes a Ray worker to make a whole one."""
    made = Agent.__new__(Agent)
    made.__dict__.update(
        {"_epoch": 1, "_ended_generation": 0, "_fold": None, "_copies": {}, "_token": "t", "_run": "r", "_node": "a"}
        | {"_ram_dir": "/nowhere", "_ray_node": "x"}
    )
    return made


async def fetch(on: Agent, epoch: int = 1) -> None:
    await on.fetch(epoch, 2, COPY, 7, "host:1", "y")


def test_an_order_that_comes_again_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[int] = []

    async def work() -> None:
        arrived = asyncio.Event()

        async def copy(*args: Any, slot: int, **kwargs: Any) -> None:
            began.append(slot)
            await arrived.wait()

        monkeypatch.setattr(agents, "transfer", SimpleNamespace(fetch_snapshot=copy))
        on = agent()
        first, second = asyncio.create_task(fetch(on)), asyncio.create_task(fetch(on, epoch=2))
        while not began:
            await asyncio.sleep(0)
        first.cancel()  # the controller that ordered it has died
        arrived.set()
        await second
        assert began == [1]

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))


def test_a_copy_that_failed_is_made_again_and_a_halt_ends_those_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[str] = []

    async def work() -> None:
        async def copy(*args: Any, **kwargs: Any) -> None:
            if not ends:
                ends.append("failed")
                raise OSError("reset")
            try:
                await asyncio.Event().wait()
            finally:
                ends.append("cancelled")

        monkeypatch.setattr(agents, "transfer", SimpleNamespace(fetch_snapshot=copy))
        on = agent()
        with pytest.raises(OSError, match="reset"):
            await fetch(on)
        again = asyncio.create_task(fetch(on))
        while len(on._copies) < 1 or next(iter(on._copies.values())).done():
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        await on._end_copies()
        assert ends == ["failed", "cancelled"]
        with pytest.raises(asyncio.CancelledError):
            await again

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
