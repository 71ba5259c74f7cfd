"""What the body makes of an order to open a generation: copies first, who is asked for what is damaged, who is told."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from test_body_nodes import body_of

from orchestrator.core import events as ev
from orchestrator.core.actions import OpenGeneration, Transfer
from orchestrator.core.state import State
from orchestrator.runtime import body as bodies
from orchestrator.runtime import plans
from orchestrator.runtime.body import Body
from orchestrator.runtime.nodes import AgentHandle
from orchestrator.runtime.reports import MeshFold, NodeStep
from storage.manifest import ManifestError
from storage.wires import PeerError
from trainer.contract import Degrees, ParallelConfig

MESH = ("a", "b", "c", "s")


def order(source: str = "ram", transfers: tuple[Transfer, ...] = (), step: int = 12, **fields: Any) -> OpenGeneration:
    """Of four nodes with a slot each, all replicas of one shard."""
    fixed = {"snapshot_generation": 2, "reason": "", "dp_replicate": 4, "snapshot_dp_replicate": 4}
    opening = {"generation": 3, "nodes": MESH, "source": source, "step": step, "transfers": transfers}
    return OpenGeneration(**{**fixed, **opening, **fields})


class Calls:
    """Agents that note what they are ordered, and fail a fetch with `error`."""

    def __init__(self, body: Body, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.fetched: list[tuple[Any, ...]] = []
        self.opened: dict[str, Any] = {}

        async def fetch(*args: Any) -> None:
            self.fetched.append(args)
            if error is not None:
                raise error

        async def open_store(*args: Any) -> int:
            return 1

        for node in (*MESH, "k"):
            actor = SimpleNamespace(
                fetch=SimpleNamespace(remote=fetch),
                open_store=SimpleNamespace(remote=open_store),
                open=SimpleNamespace(remote=lambda epoch, plan, node=node: self._open(node, plan)),
            )
            handle = AgentHandle(node=node, ray_node=f"ray-{node}", actor=actor, group=None, heard_at=0.0)
            handle.info = SimpleNamespace(address=f"{node}:1", host=node)
            body.agents[node] = handle

        async def call(work: Any, deadline_s: float) -> Any:
            return await work

        monkeypatch.setattr(bodies, "call", call)

    async def _open(self, node: str, plan: Any) -> None:
        self.opened[node] = plan


SPARE = (Transfer(slot=3, to_node="s", from_slot=0, from_node="a"),)


def test_a_copy_for_a_spare_names_who_else_holds_the_snapshot(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body = body_of(tmp_path, [])
    calls = Calls(body, monkeypatch)
    body._plans._keepers = {3: "k", 2: "a"}
    asyncio.run(body._open(order(transfers=SPARE)))
    ((epoch, generation, slot, snapshot, source, others),) = calls.fetched
    assert (epoch, generation, slot, snapshot) == (1, 3, 3, ev.Snapshot(generation=2, step=12))
    assert (source.ray_node, source.address, source.slot) == ("ray-a", "a:1", 0)
    assert [(other.ray_node, other.slot) for other in others] == [("ray-b", 1), ("ray-k", 3)]
    holders = {node: plan.holders for node, plan in calls.opened.items()}
    assert [(h.node, h.slot) for h in holders["s"][3]] == [("a", 0), ("k", 3)]
    assert [(h.node, h.slot) for h in holders["c"][2]] == [("a", 0), ("a", 2)]
    assert body._plans._keepers == {}, "nobody keeps copies of this generation"


@pytest.mark.parametrize("source", ["init", "durable"])
def test_nobody_is_looked_for_where_nothing_is_restored_from_memory(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Of 16,384 slots with 2,048 replicas each, that took 15 s."""
    body = body_of(tmp_path, [])
    calls = Calls(body, monkeypatch)
    monkeypatch.setattr(body._plans, "_holders", lambda *args: pytest.fail("looked for"))
    asyncio.run(body._open(order(source)))
    assert [plan.holders for plan in calls.opened.values()] == [{}] * 4


def test_replicas_are_looked_at_until_one_is_found(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body = body_of(tmp_path, [])
    Calls(body, monkeypatch)
    looked: list[int] = []
    slots = plans.placement.slots_of_shard
    watched = lambda *args: (looked.append(slot) or slot for slot in slots(*args))  # noqa: E731
    monkeypatch.setattr(plans.placement, "slots_of_shard", watched)
    assert [h.node for h in body._plans._holders(order(), 3, {"s"})] == ["a"]
    assert looked == [0]


def test_what_is_whole_nowhere_is_no_fault_of_the_start(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    body = body_of(tmp_path, events)
    Calls(body, monkeypatch, ManifestError("w, block 4 is damaged"))
    asyncio.run(body._open(order(transfers=SPARE)))
    (failed,) = events
    assert (failed.generation, failed.node, failed.kind) == (3, "s", "state")
    assert failed.error == "slot 3: w, block 4 is damaged"


def test_a_peer_that_is_gone_is_a_fault_of_the_start(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    body = body_of(tmp_path, events)
    Calls(body, monkeypatch, PeerError("gone"))
    asyncio.run(body._open(order(transfers=SPARE)))
    assert events == [ev.GenerationFailed(at=0, generation=3, node="", error="PeerError: gone")]


def told(step: int, copied_step: int) -> NodeStep:
    return NodeStep(
        generation=1, step=step, step_us=1, data_us=0, checkpoint_us=0, validation_us=0, tokens=1, loss=None,
        grad_norm=None, lr=None, copied_step=copied_step,
    )  # fmt: skip


def test_what_was_copied_is_known_over_generations(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body = body_of(tmp_path, [])
    calls = Calls(body, monkeypatch)
    known = []

    async def work() -> None:
        for step, last in ((12, (12, 10)), (12, None), (9, (13, 12)), (10, (10, 0)), (14, (14, 13))):
            body.fold = MeshFold(generation=1, nodes=MESH, ranks=4, done=0)
            body.fold.last = told(*last) if last is not None else None
            body.perform(order(step=step))
            await body._opening
            known.append(calls.opened["a"].copied_step)

    asyncio.run(work())
    assert known == [10, 10, 12, 9, 13], "one that never trained takes nothing along; after a rewind, no later step"


def test_a_smaller_mesh_has_its_own_numbers_and_restores_by_the_old_ones(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages of two replicas, on a b and c s; a is lost. Who had the same shard may mend what is damaged."""
    document = {
        "run": {"name": "r", "url": str(tmp_path)},
        "model": {"preset": "tiny"},
        "data": {"global_batch": 8},
        "parallel": {"pp": 2, "dp_replicate": 2, "microbatches": 2},
    }
    body = body_of(tmp_path, [], document)
    calls = Calls(body, monkeypatch)

    async def work() -> None:
        for opening in (
            order("init", generation=2, step=0, dp_replicate=2, snapshot_dp_replicate=2),
            order(generation=3, nodes=("b", "c"), dp_replicate=1, snapshot_dp_replicate=2),
        ):
            body.perform(opening)
            await body._opening
            body.agents.pop("a", None)

    asyncio.run(work())
    assert (body.fold.ranks, body.fold.loads, body._plans.layout.dp_replicate) == (2, (4,), 1)
    plans = [calls.opened[node] for node in ("b", "c")]
    assert [(plan.ranks, plan.world_size, plan.group_world_size) for plan in plans] == [((0,), 2, 2), ((1,), 2, 2)]
    assert [plan.snapshot_slots for plan in plans] == [{0: range(0, 2)}, {1: range(2, 4)}]
    assert [[(h.node, h.slot) for h in plan.holders[rank]] for rank, plan in enumerate(plans)] == [[], [("s", 3)]]
    parallel = plans[0].config.parallel
    assert (parallel.dp_replicate, parallel.world_size, parallel.microbatches) == (1, 2, 4)
    assert plans[0].config.samples == calls.opened["s"].config.samples == 2


def test_a_mesh_with_other_shards_has_each_node_offer_what_it_holds(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four stages on a b c s, and a goes on alone: with its own snapshots, what it kept of c's, and copies from b."""
    document = {
        "run": {"name": "r", "url": str(tmp_path)},
        "model": {"preset": "tiny"},
        "data": {"global_batch": 8},
        "parallel": {"pp": 4, "microbatches": 4},
        "recovery": {"fallback_meshes": [{}]},
    }
    body = body_of(tmp_path, [], document)
    calls = Calls(body, monkeypatch)
    copies = tuple(Transfer(slot=slot, to_node="a", from_slot=slot, from_node="b") for slot in (1, 3))
    declared = {"dp_replicate": 1, "snapshot_dp_replicate": 1}

    async def work() -> None:
        for opening in (
            order("init", generation=2, step=0, buddies=(2, 3, 0, 1), **declared),
            order(transfers=copies, generation=3, nodes=("a",), fallback=Degrees(), **declared),
        ):
            body.perform(opening)
            await body._opening
            body.agents.pop("s", None)

    asyncio.run(work())
    assert (body.fold.ranks, body.fold.stages, body.fold.loads, body._plans.layout.degrees) == (1, 1, (4,), Degrees())
    before, plan = calls.opened["c"], calls.opened["a"]
    assert not before.restore.reshard and plan.restore.reshard
    assert (plan.ranks, plan.world_size, plan.snapshot_slots) == ((0,), 1, {})
    assert (plan.config.parallel, plan.config.samples) == (ParallelConfig(microbatches=4), before.config.samples)
    assert [(h.node, h.slot) for h in plan.holders[0]] == [("c", 0), ("b", 1), ("c", 2), ("b", 3)]
    state = State(nodes={}, generation=3, order=order(nodes=("a",), fallback=Degrees(), **declared))
    again = body_of(tmp_path, [], document)
    asyncio.run(again.adopt(state))
    assert (again.fold.ranks, again.fold.stages, again._plans.layout) == (1, 1, body._plans.layout)


def test_a_copy_in_another_meshs_numbers_names_holders_by_them(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mesh grows: the third replica is copied from the first of two; the second has the same."""
    body = body_of(tmp_path, [])
    calls = Calls(body, monkeypatch)
    body._plans._filled = {2: ("a", "b")}
    copy = Transfer(slot=0, to_node="c", from_slot=0, from_node="a")
    asyncio.run(body._open(order(transfers=(copy,), nodes=("a", "b", "c", "s"), snapshot_dp_replicate=2)))
    ((*_, source, others),) = calls.fetched
    assert (source.node, source.slot, [(h.node, h.slot) for h in others]) == ("a", 0, [("b", 1)])
    assert [(h.node, h.slot) for h in calls.opened["a"].holders[0]] == [("b", 1)]
