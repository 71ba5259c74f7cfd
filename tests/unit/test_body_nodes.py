"""What the body makes of the nodes that Ray lists, and of agents that do not answer."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from orchestrator.chaos import ordered
from orchestrator.core import events as ev
from orchestrator.core.actions import AskStop, HaltGeneration, InjectFault, OpenGeneration, ProbeNode, SaveEvery
from orchestrator.core.state import State
from orchestrator.runtime import body as bodies
from orchestrator.runtime import silence
from orchestrator.runtime.body import Body
from orchestrator.runtime.nodes import AgentHandle, RayNode
from orchestrator.runtime.preparation import NotAdmitted
from orchestrator.runtime.reports import MeshFold
from orchestrator.spec import parse
from trainer import contract

DEADLINE_S = 30.0


def body_of(tmp_path: Any, events: list[ev.Event], document: dict[str, Any] | None = None) -> Body:
    """Of this job; else of a mesh that wants four nodes."""
    four_nodes = {
        "run": {"name": "r", "url": str(tmp_path), "steps": 9},
        "model": {"preset": "tiny"},
        "parallel": {"dp_replicate": 4},
        "recovery": {"min_replicas": 4},
    }
    return Body(
        parse(document or four_nodes),
        "namespace",
        "token",
        1,
        "i",
        "",
        lambda: 0,
        events.append,
        lambda line: None,
        lambda: 0,
        lambda: False,
        lambda node: "good",
        lambda: "",
    )


def there(*names: str) -> list[RayNode]:
    return [RayNode(id=name, domain="", free=True, leaving=False) for name in names]


def test_a_node_that_is_left_alone_ends_no_wait_for_another(tmp_path):
    """Of five nodes one was given up long ago, and one is away for a reboot: the mesh can be filled when it is back."""
    events: list[ev.Event] = []
    body = body_of(tmp_path, events)
    body._given_up["e"] = "node e did not come up: no memory"
    body._check_hope(there("a", "b", "c", "d", "e"))
    body._check_hope(there("a", "c", "d"))
    body._check_hope([])  # Ray did not answer
    assert events == []
    body._check_hope(there("a", "c", "d", "e"))
    assert events == [ev.NodesRefused(at=0, error="node e did not come up: no memory")]
    body._check_hope(there("a", "c", "d", "e"))
    assert len(events) == 1, "told once"


def test_nodes_that_are_left_alone_end_a_wait_only_if_the_smallest_mesh_cannot_be_filled(tmp_path):
    events: list[ev.Event] = []
    body = body_of(tmp_path, events)
    body._spec = body._spec.model_copy(update={"recovery": body._spec.recovery.model_copy(update={"min_replicas": 3})})
    body._given_up["d"] = "node d did not come up: no memory"
    body._check_hope(there("a", "b", "c", "d"))
    assert events == []
    body._given_up["c"] = "node c did not come up: no disk"
    body._check_hope(there("a", "b", "c", "d"))
    assert events == [ev.NodesRefused(at=0, error="node c did not come up: no disk")]


def test_the_loss_of_a_node_is_told_once_however_often_it_is_seen(tmp_path):
    events: list[ev.Event] = []
    body = body_of(tmp_path, events)
    body.agents["a"] = AgentHandle(node="a", ray_node="x", actor=None, group=None, heard_at=0.0)
    body._silence.check()
    body.agents["a"].heard_at = 0.0
    body._silence.check()
    assert [type(event) for event in events] == [ev.NodeLost]


def test_this_controllers_own_standstill_is_no_silence_of_the_nodes(tmp_path, monkeypatch):
    """A node that is heard stays, whatever standstills there are; one that is not heard is lost in spite of them."""
    monkeypatch.setattr(silence, "LOOK_INTERVAL_S", 0.05)
    monkeypatch.setattr(silence, "STALL_S", 0.4)
    events: list[ev.Event] = []
    body = body_of(tmp_path, events)
    body._spec = body._spec.model_copy(
        update={"recovery": body._spec.recovery.model_copy(update={"node_silence_s": 1.5})}
    )

    async def work() -> None:
        for node in "ab":
            handle = AgentHandle(node=node, ray_node=node, actor=None, group=None, heard_at=time.monotonic())
            body.agents[node] = handle
        watch = asyncio.create_task(body._silence.watch())
        for _ in range(3):
            body.hear("a", [])
            await asyncio.sleep(0)
            time.sleep(0.8)  # the fault
            body.hear("a", [])  # what lay unread
            await asyncio.sleep(0.06)  # one look
            assert not events
            assert all(handle.heard_at <= time.monotonic() for handle in body.agents.values())
        while not events:
            body.hear("a", [])
            await asyncio.sleep(0.01)
        watch.cancel()

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
    assert [event.node for event in events if isinstance(event, ev.NodeLost)] == ["b"]


def test_agents_that_end_with_the_run_are_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(silence, "LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr(bodies.nodes, "eligible", lambda spec: [])
    events: list[ev.Event] = []
    body = body_of(tmp_path, events)

    async def shut_down(epoch: int) -> None:
        body.agents["a"].heard_at -= 10 * body._spec.recovery.node_silence_s
        await asyncio.sleep(0.1)  # some looks

    async def call(work: Any, deadline_s: float) -> None:
        await work

    async def release(handle: AgentHandle) -> None:
        pass

    async def work() -> None:
        monkeypatch.setattr(bodies, "call", call)
        monkeypatch.setattr(bodies, "release", release)
        actor = SimpleNamespace(shutdown=SimpleNamespace(remote=shut_down))
        body.agents["a"] = AgentHandle(node="a", ray_node="a", actor=actor, group=None, heard_at=time.monotonic())
        body.start()
        await asyncio.sleep(0)
        await body.end()

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
    assert events == []


class Order:
    """An actor's method that fails some times."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.asked = error, times, 0

    def remote(self, *args: Any) -> Any:
        self.asked += 1
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.asked <= self.times:
            answer.set_exception(self.error)
        else:
            answer.set_result(None)
        return answer


@pytest.mark.parametrize(
    ("error", "times", "asked", "lost"),
    [
        (ray.exceptions.ActorUnavailableError("reset", b"0" * 16), 2, 3, False),
        (ray.exceptions.ActorDiedError(), 1, 1, True),
        (ValueError("refused"), 1, 1, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_a_broken_connection_is_no_death(tmp_path, monkeypatch, error, times, asked, lost):
    events: list[ev.Event] = []
    order = Order(error, times)

    async def call(ref: Any, deadline_s: float) -> Any:
        return await ref

    monkeypatch.setattr(bodies, "call", call)
    monkeypatch.setattr(bodies, "ORDER_RETRY_S", 0.0)

    async def work() -> None:
        body = body_of(tmp_path, events)
        actor = SimpleNamespace(ask_stop=order)
        body.agents["a"] = AgentHandle(node="a", ray_node="x", actor=actor, group=None)
        body.fold = MeshFold(generation=1, nodes=("a",), ranks=1, done=0)
        body.perform(AskStop(generation=1))
        await asyncio.gather(*body._tasks)

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
    assert order.asked == asked
    assert [type(event) for event in events] == [ev.NodeLost] * lost


@pytest.mark.parametrize(
    ("kind", "heard"), [("corrupt", True), ("diverged", True), ("unclean", True), ("memory", False)]
)
def test_ranks_are_heard_out_where_state_was_found_corrupt(tmp_path, monkeypatch, kind, heard):
    orders: list[tuple[Any, ...]] = []

    async def call(ref: Any, deadline_s: float) -> None:
        orders.append(ref)

    monkeypatch.setattr(bodies, "call", call)

    async def work() -> None:
        body = body_of(tmp_path, [])
        actor = SimpleNamespace(halt=SimpleNamespace(remote=lambda *args: args))
        body.agents["a"] = AgentHandle(node="a", ray_node="x", actor=actor, group=None)
        body.fold = MeshFold(generation=2, nodes=("a",), ranks=1, done=0)
        body.fold.feed(0, ("a",), contract.Failed(generation=2, rank=0, step=3, kind=kind, error="", traceback=""))
        body.perform(HaltGeneration(generation=2, nodes=("a",), reason="", park=False))
        await asyncio.gather(*body._tasks)

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
    assert orders == [(1, 2, heard, False)]


def opened(*nodes: str) -> OpenGeneration:
    """The order for a second generation on these, with a replica on each."""
    return OpenGeneration(
        generation=2,
        nodes=nodes,
        source="init",
        step=0,
        snapshot_generation=0,
        transfers=(),
        reason="",
        dp_replicate=len(nodes),
        snapshot_dp_replicate=len(nodes),
    )


def assigned_intervals(body: Body) -> list[int]:
    order = opened("a", "b")
    return [plan.config.checkpoint.interval_steps for _, plan in body._plans.assignments(order, "host", 1, "")]


def test_an_interval_goes_to_rank_0s_node_and_into_what_is_assigned_from_then_on(tmp_path, monkeypatch):
    told: list[tuple[Any, ...]] = []

    async def call(ref: Any, deadline_s: float) -> None:
        told.append(ref)

    monkeypatch.setattr(bodies, "call", call)

    async def work() -> None:
        body = body_of(tmp_path, [])
        for name in ("a", "b"):
            actor = SimpleNamespace(save_every=SimpleNamespace(remote=lambda *args, name=name: (name, *args)))
            body.agents[name] = AgentHandle(node=name, ray_node="x", actor=actor, group=None)
        body.fold = MeshFold(generation=1, nodes=("a", "b"), ranks=2, done=0)
        assert assigned_intervals(body) == [100, 100]
        body.perform(SaveEvery(generation=1, steps=37))
        await asyncio.gather(*body._tasks)
        assert assigned_intervals(body) == [37, 37]

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
    assert told == [("a", 1, 1, 37)]


def test_a_controller_that_comes_back_assigns_the_interval_that_was_chosen(tmp_path):
    chosen = ev.IntervalChosen(
        at=0, every_steps=37, step_us=1, stall_us=1, write_us=1, restores=0, exposed_us=1, why=""
    )
    body = body_of(tmp_path, [])
    asyncio.run(body.adopt(State(interval=chosen)))
    assert assigned_intervals(body) == [37, 37]


@pytest.mark.parametrize("unclean", [{}, {1: 3}, {2: 3}])
def test_a_controller_that_comes_back_knows_that_state_was_found_corrupt(tmp_path, unclean):
    order = opened("a")
    body = body_of(tmp_path, [])
    asyncio.run(body.adopt(State(generation=2, order=order, unclean=unclean)))
    assert body.fold is not None and body.fold.unclean == (2 in unclean)


def test_what_an_agent_could_not_do_is_told_in_its_own_words(tmp_path, monkeypatch):
    told: list[ev.Event] = []
    body = body_of(tmp_path, told)

    async def refuse(*args: Any) -> str:
        raise ray.exceptions.RayTaskError(
            "inject", "a traceback", LookupError("no live worker in slot 2")
        ).as_instanceof_cause()

    monkeypatch.setattr(ordered, "harm", refuse)
    order = InjectFault(number=7, fault="worker-kill", node="a", slot=2, generation=1, parameters={})
    asyncio.run(asyncio.wait_for(body._inject(order), DEADLINE_S))
    assert told == [ev.FaultInjected(at=0, number=7, detail="not done: LookupError: no live worker in slot 2")]


@pytest.mark.parametrize(
    ("answer", "passed", "detail"),
    [
        ("cpu 0.1 TFLOP/s", True, "cpu 0.1 TFLOP/s"),
        (NotAdmitted("a computes what is wrong: cpu: row 7"), False, "a computes what is wrong: cpu: row 7"),
        (None, False, "node a has no agent any more"),
    ],
    ids=["right", "wrong", "gone"],
)
def test_a_quarantined_node_is_probed_and_what_came_of_it_is_told(tmp_path, monkeypatch, answer, passed, detail):
    told: list[ev.Event] = []
    body = body_of(tmp_path, told)

    def remote(epoch: int) -> Any:
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if isinstance(answer, Exception):
            done.set_exception(answer)
        else:
            done.set_result(answer)
        return done

    async def call(ref: Any, deadline_s: float) -> Any:
        return await ref

    async def work() -> None:
        monkeypatch.setattr(bodies, "call", call)
        if answer is not None:
            actor = SimpleNamespace(probe=SimpleNamespace(remote=remote))
            body.agents["a"] = AgentHandle(node="a", ray_node="x", actor=actor, group=None)
        body.perform(ProbeNode(node="a", number=3))
        await asyncio.gather(*body._tasks)

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
    assert told == [ev.NodeProbed(at=0, node="a", number=3, passed=passed, detail=detail)]
