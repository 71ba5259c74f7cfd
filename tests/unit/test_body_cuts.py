"""What the controller makes of nodes that are cut off from it or from their peers, and says to who comes back."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from test_body_nodes import DEADLINE_S, body_of

from orchestrator.core import events as ev
from orchestrator.core.actions import ReleaseNode
from orchestrator.core.state import Node, State
from orchestrator.runtime import agent as agent_module
from orchestrator.runtime import body as bodies
from orchestrator.runtime import reporting, silence
from orchestrator.runtime.agent import Agent
from orchestrator.runtime.body import Body, CutOff
from orchestrator.runtime.nodes import AgentHandle
from orchestrator.runtime.reporting import NodeGone, Outbox, Reporter
from orchestrator.runtime.reports import MeshFold, NodeStep
from storage import wires

SILENT_S = 10.0
"""More than recovery.node_silence_s."""


def mesh(tmp_path: Any, told: list[ev.Event], spare: str = "") -> Body:
    """Nodes a and b train, and b has not been heard of for SILENT_S; nor has a spare."""
    body = body_of(tmp_path, told)
    for node, silent_s in (("a", 0.0), ("b", SILENT_S), *([(spare, SILENT_S)] if spare else [])):
        info = SimpleNamespace(address=f"{node}:1")
        handle = AgentHandle(node=node, ray_node=node, actor=None, group=None, info=info)  # type: ignore[arg-type]
        handle.heard_at = time.monotonic() - silent_s
        body.agents[node] = handle
    body.fold = MeshFold(generation=1, nodes=("a", "b"), ranks=2, done=0)
    return body


def step(number: int, generation: int = 1) -> NodeStep:
    return NodeStep(
        generation=generation,
        step=number,
        step_us=1,
        data_us=0,
        checkpoint_us=0,
        validation_us=0,
        tokens=1,
        loss=None,
        grad_norm=None,
        lr=None,
    )


def lost(told: list[ev.Event]) -> list[str]:
    return [event.node for event in told if isinstance(event, ev.NodeLost)]


def test_a_silent_node_whose_peers_do_new_steps_lives_and_is_left_alone(tmp_path):
    told: list[ev.Event] = []
    body = mesh(tmp_path, told)
    body.hear("a", [(1, step(1))])
    body._silence.check()
    assert lost(told) == []
    body.agents["b"].heard_at -= silence.CUT_OFF_S
    body._silence.check()
    assert lost(told) == ["b"], "but not for ever: nothing can be committed meanwhile"


@pytest.mark.parametrize("news", [[], [step(1, generation=2)]], ids=["none", "of another generation"])
def test_without_new_steps_a_silent_node_is_lost(tmp_path, news):
    told: list[ev.Event] = []
    body = mesh(tmp_path, told)
    body.hear("a", [(n + 1, report) for n, report in enumerate(news)])
    body._silence.check()
    assert lost(told) == ["b"]


def actor(method: str, answer: Callable[[Any], Any]) -> Any:
    """An agent's actor that has this method, and answers at once."""

    def remote(asked: Any) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(answer(asked))
        return future

    return SimpleNamespace(**{method: SimpleNamespace(remote=remote)})


@pytest.mark.parametrize("answers", [True, False], ids=["its peer hears from it", "nobody does"])
def test_in_a_step_longer_than_the_silence_a_nodes_peers_say_whether_it_lives(tmp_path, monkeypatch, answers):
    """Two steps of 12 s, and in the third b falls silent."""
    told: list[ev.Event] = []
    now = [time.monotonic()]
    for module in (bodies, silence):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def call(ref: Any, deadline_s: float) -> Any:
        return await ref

    async def work() -> None:
        monkeypatch.setattr(silence, "call", call)
        body = mesh(tmp_path, told)
        body.agents["a"].actor = actor("hears_from", lambda address: answers and address == "b:1")
        for number in (1, 2):
            body.hear("a", [(number, replace(step(number), step_us=12_000_000))])
        body.agents["b"].heard_at = now[0]
        for _ in range(8):
            body.agents["a"].heard_at = now[0]
            body._silence.check()
            await asyncio.gather(*body._tasks)
            now[0] += 1.0
        assert lost(told) == ([] if answers else ["b"])
        for _ in range(30):
            body.agents["a"].heard_at = now[0]
            body._silence.check()
            await asyncio.gather(*body._tasks)
            now[0] += 1.0
        assert lost(told) == ["b"], "three times as long as a step takes, nothing has moved"

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))


def test_steps_that_are_old_or_told_again_show_nothing(tmp_path, monkeypatch):
    told: list[ev.Event] = []
    body = mesh(tmp_path, told)
    body.hear("a", [(1, step(1))])
    now = time.monotonic() + SILENT_S
    monkeypatch.setattr(silence.time, "monotonic", lambda: now)
    body.hear("a", [(2, step(1))])
    body._silence.check()
    assert lost(told) == ["b"]


def test_steps_of_the_mesh_say_nothing_of_a_spare(tmp_path):
    told: list[ev.Event] = []
    body = mesh(tmp_path, told, spare="c")
    body.hear("a", [(1, step(1))])
    body._silence.check()
    assert lost(told) == ["c"]


def test_who_was_let_go_is_told_so_also_by_the_next_controller(tmp_path):
    async def work() -> None:
        body = mesh(tmp_path, [])
        with pytest.raises(RuntimeError, match="no agent") as unknown:
            body.hear("z", [])
        assert not isinstance(unknown.value, NodeGone), "it may be one that comes up"
        body.agents.clear()
        body.perform(ReleaseNode(node="b", reason=""))
        await asyncio.gather(*body._tasks)
        with pytest.raises(NodeGone, match="node b was lost"):
            body.hear("b", [])
        again = body_of(tmp_path, [])
        await again.adopt(State(nodes={"b": Node(domain="", state="lost")}))
        with pytest.raises(NodeGone):
            again.hear("b", [])

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))


def test_a_line_that_nobody_answers_is_no_death_and_one_that_is_refused_is(tmp_path, monkeypatch):
    told: list[ev.Event] = []
    errors = [wires.PeerUnreachable("no packet"), wires.PeerUnreachable("no packet"), wires.PeerError("refused")]
    tried = []

    async def hold_line(address: str, token: str) -> None:
        assert lost(told) == []
        tried.append(address)
        raise errors[len(tried) - 1]

    monkeypatch.setattr(wires, "hold_line", hold_line)
    monkeypatch.setattr(bodies, "LINE_RETRY_S", 0.0)
    body = mesh(tmp_path, told)
    asyncio.run(asyncio.wait_for(body._hold_line(body.agents["b"]), DEADLINE_S))
    assert (tried, lost(told)) == (["b:1"] * 3, ["b"])


def agent_that_misses(*missed: str) -> Any:
    """An actor whose node reaches all but these."""
    return actor("unreached", lambda addresses: frozenset(missed) & addresses.keys())


def test_the_node_that_its_peers_do_not_reach_is_lost_and_only_that_one(tmp_path, monkeypatch):
    told: list[ev.Event] = []

    async def call(ref: Any, deadline_s: float) -> Any:
        return await ref

    async def work() -> None:
        monkeypatch.setattr(bodies, "call", call)
        body = mesh(tmp_path, told, spare="c")
        for node, missed in (("a", "b"), ("b", "ac"), ("c", "b")):
            body.agents[node].actor = agent_that_misses(*missed)
        await body._look_for_cuts()
        assert lost(told) == ["b"]
        handle = AgentHandle(node="d", ray_node="d", actor=agent_that_misses("a"), group=None)
        await body._check_reach(handle)
        handle.actor = agent_that_misses("a", "b")
        with pytest.raises(CutOff, match="does not reach a, b"):
            await body._check_reach(handle)
        del body.agents["b"], body.agents["c"]
        handle.actor = agent_that_misses("a")
        await body._check_reach(handle)  # which of two is cut off?

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))


# --- the agent that was cut off ---


def test_an_agent_that_hears_that_it_was_let_go_ends_at_once(monkeypatch):
    class RayTaskError(RuntimeError):
        cause: Exception | None = None

    class Ended(Exception):
        pass

    answers: list[Exception | None] = [None, NodeGone("node b was lost"), None]

    def report(node: str, batch: Any) -> Any:
        error = RayTaskError("as Ray wraps it")
        error.cause = answers.pop(0)
        raise error

    async def die(why: str) -> None:
        raise Ended(why)

    controller = SimpleNamespace(report=SimpleNamespace(remote=report))
    errors = SimpleNamespace(RayTaskError=RayTaskError)
    fake = SimpleNamespace(get_actor=lambda name, namespace: controller, exceptions=errors)
    monkeypatch.setattr(reporting, "ray", fake)
    monkeypatch.setattr(reporting, "REPORT_RETRY_S", 0.0)

    async def work() -> None:
        reporter = Reporter(node="b", namespace="", token="", outbox=Outbox(), epoch=lambda: 1, die=die)
        with pytest.raises(Ended, match="let go: node b was lost"):
            await reporter.run()

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
    assert len(answers) == 1, "not by an answer that says something else"


@pytest.mark.parametrize(
    ("answered_s", "moved_s", "epoch", "abandoned"),
    [(301, 301, 1, True), (301, 10, 1, False), (10, 301, 1, False), (301, 301, 0, False)],
    ids=["cut off from all", "its mesh trains", "idle", "being prepared"],
)
def test_an_agent_that_nobody_wants_ends_by_itself(answered_s, moved_s, epoch, abandoned):
    now = time.monotonic()
    agent = SimpleNamespace(
        _reporter=SimpleNamespace(answered_at=now - answered_s), _moved_at=now - moved_s, _epoch=epoch
    )
    assert Agent._is_abandoned(agent) == abandoned  # type: ignore[arg-type]


@pytest.mark.parametrize("idle_s", [0, 10_000], ids=["of a mesh", "a spare"])
@pytest.mark.parametrize("suspended_s", [400, 0])
def test_a_job_that_was_suspended_is_not_abandoned(
    monkeypatch: pytest.MonkeyPatch, suspended_s: int, idle_s: int
) -> None:
    """Nobody could be heard; the clock went on."""
    now = [1000.0]
    monkeypatch.setattr(agent_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Ended(Exception):
        pass

    async def die(why: str, **_: bool) -> None:
        raise Ended(why)

    agent = SimpleNamespace(
        _parent=os.getppid(),
        _reporter=SimpleNamespace(answered_at=now[0]),
        _moved_at=now[0] - idle_s,
        _epoch=1,
        _die=die,
    )
    agent._is_abandoned = partial(Agent._is_abandoned, agent)

    async def sleep(interval_s: float) -> None:
        now[0] += interval_s
        if now[0] > 1299 and suspended_s:
            now[0] += suspended_s
            agent._parent = 0  # it looks once more, and no further
        assert now[0] < 1302 + suspended_s

    monkeypatch.setattr(agent_module, "asyncio", SimpleNamespace(sleep=sleep))
    with pytest.raises(Ended, match="raylet" if suspended_s else "nothing was heard"):
        asyncio.run(Agent._watch_parent(agent))  # type: ignore[arg-type]
