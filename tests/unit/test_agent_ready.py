"""What an agent does for the next generation while this one trains, or while it serves nobody; and with another job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from test_agent_words import DEADLINE_S, GENERATION, Ranks, agent

from orchestrator.runtime import agent as agents
from orchestrator.runtime.agent import Agent
from orchestrator.runtime.hangs import NodeWatch
from orchestrator.spec import JobSpec, parse

S = 1_000_000
OLD, NEW = "old", "new"


class Node(Ranks):
    """Whose warm workers die as soon as they are made."""

    def __init__(self, serves: bool) -> None:
        super().__init__()
        self.serves, self.code = serves, OLD

    def pids(self) -> dict[int, int]:
        return {0: 1} if self.serves else {}

    def replenish(self) -> bool:
        self.log.append("replenished")
        return True

    def prepare_all(self, config: Any) -> bool:
        self.log.append("prepared for each slot")
        return True

    def prepare_code(self, code: str, env: dict[str, str], deadline_s: float) -> None:
        self.log.append(f"imports {code}")

    def use_code(self, code: str) -> None:
        self.code = code


def spec_of(tmp_path: Any, **recovery: Any) -> JobSpec:
    run = {"name": "r", "url": str(tmp_path / "run"), "steps": 9}
    return parse({"run": run, "model": {"preset": "tiny"}, "recovery": recovery})


def with_node(node: Node, tmp_path: Any) -> Agent:
    made = agent(node, tmp_path)
    made.__dict__.update(_spec=spec_of(tmp_path), _address="a:1", _taking_code=asyncio.Lock())
    return made


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not true():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("serves", "made"), [(True, "replenished"), (False, "prepared for each slot")], ids=["trains", "spare"]
)
def test_warm_workers_that_die_are_made_again_and_not_without_end(tmp_path: Any, monkeypatch, serves, made) -> None:
    monkeypatch.setattr(agents, "SPARE_AFTER_S", 0.01)

    async def work() -> None:
        node = Node(serves)
        a = with_node(node, tmp_path)
        staying = asyncio.create_task(a._stay_ready())
        if serves:  # it has not begun to train
            await asyncio.sleep(0.1)
            assert node.log == []
        a._kept.append(None)  # type: ignore[arg-type]
        await until(lambda: len(node.log) == agents.SPARE_TRIES)
        await asyncio.sleep(0.1)
        assert node.log == [made] * agents.SPARE_TRIES
        node.serves = not serves
        await until(lambda: node.log[-1] != made)
        staying.cancel()

    asyncio.run(work())


def test_another_patience_holds_at_once(tmp_path: Any) -> None:
    async def work() -> None:
        a = with_node(Node(serves=True), tmp_path)
        a._watch = NodeWatch(GENERATION, (0,), a._spec.patience, 0)
        await a.update(1, spec_of(tmp_path, stall_floor_s=60).document(), OLD)
        assert a._watch.patience.stall_floor_us == 60 * S

    asyncio.run(work())


@pytest.mark.parametrize("serves", [True, False], ids=["of the mesh", "spare"])
def test_a_spare_takes_the_newer_code_before_it_is_needed(tmp_path: Any, monkeypatch, serves: bool) -> None:
    monkeypatch.setattr(agents.codes, "unpack", lambda url, code, folder: folder)

    async def work() -> None:
        node = Node(serves)
        a = with_node(node, tmp_path)
        a._watch = NodeWatch(GENERATION, (0,), a._spec.patience, 0) if serves else None
        await a.update(1, spec_of(tmp_path).document(), NEW)
        assert (node.code, node.log) == ((OLD, []) if serves else (NEW, [f"imports {NEW}"]))

    asyncio.run(work())
