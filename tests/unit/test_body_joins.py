"""Who may join: a node is taken when it reaches the others, its links carry enough and its devices are right."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from test_body_nodes import DEADLINE_S, body_of, there

from orchestrator.core import events as ev
from orchestrator.runtime import body as bodies
from orchestrator.runtime import nodes
from orchestrator.runtime.agent import NodeInfo
from orchestrator.runtime.body import START_TRIES, Body
from orchestrator.runtime.nodes import AgentHandle
from orchestrator.runtime.preparation import NotAdmitted
from storage import wires

(NEW,) = there("new" + 53 * "0")


class Agent:
    """An actor that answers at once, and notes what it is asked."""

    def __init__(self, missed: frozenset[str] = frozenset(), mb_s: float = 1000.0) -> None:
        self.answers: dict[str, Any] = {"unreached": missed, "link_rate": mb_s}
        self.asked: dict[str, tuple[Any, ...]] = {}

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self.asked[method] = arguments
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            answer.set_result(self.answers.get(method))
            return answer

        return SimpleNamespace(remote=remote)


def info_of(node: str) -> NodeInfo:
    return NodeInfo(ray_node=node, address=f"{node}:1", host="h", pid=1, ram_dir="", data_digest="d", snapshots={})


class World:
    """A body with nodes a, b and c, and what becomes of one that comes up with `actor`, or does not."""

    def __init__(self, folder: Any, patch: pytest.MonkeyPatch, came_up: Agent | Exception) -> None:
        self.told: list[ev.Event] = []
        self.body: Body = body_of(folder, self.told)
        self.released: list[str] = []
        for node in "abc":
            self.body.agents[node] = AgentHandle(
                node=node, ray_node=node, actor=Agent(), group=None, info=info_of(node)
            )

        async def start_agent(spec: Any, namespace: str, node: str, *rest: Any) -> tuple[AgentHandle, NodeInfo]:
            if isinstance(came_up, Exception):
                raise came_up
            info = info_of(node)
            return AgentHandle(node=node, ray_node=NEW.id, actor=came_up, group=None, info=info), info

        async def call(ref: Any, deadline_s: float) -> Any:
            return await ref

        async def release(handle: AgentHandle) -> None:
            self.released.append(handle.node)

        async def hold_line(address: str, token: str) -> None:
            await asyncio.sleep(DEADLINE_S)

        patch.setattr(bodies, "start_agent", start_agent)
        patch.setattr(bodies, "release", release)
        patch.setattr(bodies, "call", call)
        patch.setattr(nodes, "call", call)
        patch.setattr(wires, "hold_line", hold_line)

    def join(self) -> list[str]:
        """Names of the nodes that have joined."""

        async def work() -> None:
            await self.body._join(NEW)
            for task in self.body._tasks:
                task.cancel()

        asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
        return [event.node for event in self.told if isinstance(event, ev.NodeJoined)]

    def require_mb_s(self, least: int) -> None:
        spec = self.body._spec
        cluster = spec.cluster.model_copy(update={"least_bandwidth_mb_s": least})
        self.body._spec = spec.model_copy(update={"cluster": cluster})


def test_a_sound_node_joins(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, Agent())
    world.require_mb_s(20)
    (name,) = world.join()
    assert name in world.body.agents and not world.released
    assert {"unreached", "link_rate", "attach"} <= world.body.agents[name].actor.asked.keys()
    assert "update" not in world.body.agents[name].actor.asked


def test_a_node_that_does_not_reach_most_others_rests_and_may_try_again(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, Agent(missed=frozenset("ab")))
    assert world.join() == [] and len(world.released) == 1 and sorted(world.body.agents) == ["a", "b", "c"]
    assert world.body._rests_until[NEW.id] > time.monotonic()
    assert world.body._tries_left(NEW.id), "its network may be mended"


def test_a_node_with_slow_links_is_left_alone_after_some_tries(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, Agent(mb_s=3.0))
    world.require_mb_s(20)
    for tries in range(1, START_TRIES + 1):
        assert world.join() == [] and len(world.released) == tries
        assert world.body._tries_left(NEW.id) == (tries < START_TRIES)


def test_a_node_whose_device_is_wrong_is_not_tried_again(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, NotAdmitted("new computes what is wrong: cpu: row 7"))
    assert world.join() == [] and not world.body._tries_left(NEW.id)
    assert "computes what is wrong" in world.body._given_up[NEW.id]


def test_a_node_that_comes_late_learns_the_job_and_the_code_as_they_are_now(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, Agent())
    world.body._code = lambda: "newer"
    (name,) = world.join()
    epoch, document, code = world.body.agents[name].actor.asked["update"]
    assert (epoch, document, code) == (1, world.body._spec.document(), "newer")
