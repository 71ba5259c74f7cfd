"""Copies of a peer's snapshots into a node: one writer a slot, however often it is ordered, and none after a halt."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.core.events import Snapshot
from orchestrator.runtime import agent as agents
from orchestrator.runtime.agent import Agent, StaleOrder
from orchestrator.runtime.assignment import NodeAssignment
from orchestrator.runtime.copies import KEEP, Copies
from orchestrator.runtime.hangs import FirstSteps
from orchestrator.runtime.reporting import Outbox
from orchestrator.runtime.reports import NodeStep
from orchestrator.runtime.stacks import Stacks
from orchestrator.spec import parse
from storage.blocks import BadBlock
from storage.manifest import ManifestError
from storage.peer import PeerServer
from storage.ram import inventory
from storage.snapshots import RamTier
from storage.state import TrainState
from trainer import contract

DEADLINE_S = 30.0
SOURCE = contract.Holder(node="b", address="host:1", ray_node="y", slot=3)
OTHER = contract.Holder(node="c", address="host:2", ray_node="z", slot=5)


async def nothing() -> None:
    pass


def agent() -> Agent:
    """As far as copies need one; it takes a Ray worker to make a whole one."""
    made = Agent.__new__(Agent)
    made.__dict__.update(
        {"_epoch": 1, "_ended_generation": 0, "_fold": None, "_copies": {}, "_token": "t", "_run": "r", "_node": "a"}
        | {"_leaving": None, "_ram_dir": "/nowhere", "_ray_node": "x", "_buddies": SimpleNamespace(end=nothing)}
        | {"_first_steps": FirstSteps(), "_taking_code": asyncio.Lock()}
    )
    return made


async def fetch(on: Agent, epoch: int = 1) -> None:
    await on.fetch(epoch, 2, 1, Snapshot(generation=1, step=7), SOURCE, (OTHER,))


def test_an_order_that_comes_again_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[int] = []

    async def work() -> None:
        arrived = asyncio.Event()

        async def copy(*args: Any, slot: int, **kwargs: Any) -> None:
            began.append(slot)
            await arrived.wait()

        monkeypatch.setattr(agents.transfer, "fetch_snapshot", copy)
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

        monkeypatch.setattr(agents.transfer, "fetch_snapshot", copy)
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


def test_others_are_asked_for_what_is_damaged_and_every_holder_of_damage_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    async def copy(*args: Any, bad: list[BadBlock], **kwargs: Any) -> None:
        asked.update(kwargs)
        places = [("y", 1), ("y", 2), ("z", 1)]
        bad += [BadBlock(source=s, data="d", fqn="w", offsets=(0,), block=n, problem="is damaged") for s, n in places]
        raise ManifestError("nobody has it")

    monkeypatch.setattr(agents.transfer, "fetch_snapshot", copy)
    on = agent()
    on._outbox = Outbox()
    with pytest.raises(ManifestError):
        asyncio.run(fetch(on))
    (other,) = asked["others"]
    assert (asked["step"], asked["generation"]) == (7, 1)
    assert other._request == {"op": "snapshot", "run": "r", "node": "z", "slot": 5, "step": 7, "generation": 1}
    told = on._outbox.reports()
    assert [(report.node, report.rank, report.step) for report in told] == [("b", 1, 7), ("c", 1, 7)]


def test_whatever_comes_of_a_copy_the_rank_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it counts as busy for good, and no rank's copies go on."""
    sent: list[Any] = []
    on = agent()

    async def drop_others(generation: int, own: Any) -> None:
        raise OSError("no such folder")

    on._buddies = SimpleNamespace(drop_others=drop_others)
    on._fold = SimpleNamespace(generation=2, ranks=(1,))
    on._copied_step = on._restored_step = 0
    on._workers = SimpleNamespace(send=lambda rank, message: sent.append((rank, message)))
    asyncio.run(on._copy(contract.CopyStep(generation=2, rank=1, step=9, complete=8)))
    assert sent == [(1, contract.Copied(step=9, error="OSError: no such folder"))]


def test_workers_end_while_a_copy_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        halted = asyncio.Event()
        on = agent()
        on._loop = asyncio.get_running_loop()
        on._spec = SimpleNamespace(is_script=False, recovery=SimpleNamespace(halt_deadline_s=1.0, park_deadline_s=1.0))
        on._workers = SimpleNamespace(halt=lambda within_s, park_s: on._loop.call_soon_threadsafe(halted.set))
        on._buddies = SimpleNamespace(end=halted.wait)  # a peer that has stopped
        on._held, on._facts, on._outbox, on._watch = {}, [], Outbox(), None
        on._stacks = Stacks()
        await on.halt(1, 2, False, False)
        assert on._outbox.reports()

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))


# --- what was copied before -------------------------------------------------------------------------------------------

CONFIG = parse({"run": {"name": "r", "url": "/nowhere"}, "model": {"preset": "tiny"}}).worker_config


def plan_of(generation: int, step: int, **fields: Any) -> NodeAssignment:
    """Of one worker."""
    restore = contract.Restore(source="ram", step=step, generation=1)
    return NodeAssignment(
        epoch=1, generation=generation, group_rank=0, group_world_size=1, ranks=(0,), world_size=1, store_host="",
        store_port=1, restore=restore, config=CONFIG, ram_dir="", **fields,
    )  # fmt: skip


def opened(on: Agent, generation: int, step: int, copied_step: int) -> int:
    """Open a generation; what it is told of copies."""
    told: list[NodeAssignment] = []
    on._workers = SimpleNamespace(assign=told.append, code="")
    asyncio.run(on.open(1, plan_of(generation, step, copied_step=copied_step, keeper="b:1")))
    return told[0].copied_step


def reported(on: Agent, generation: int, step: int, copied_step: int) -> int:
    """What the agent makes of a rank's word."""
    on._outbox = Outbox()
    done = contract.StepDone(
        generation=generation, rank=0, step=step, step_us=1, data_us=0, snapshot_us=0, save_us=0, tokens=1, loss=1.0,
        grad_norm=1.0, lr=1.0, snapshot_step=step, copied_step=copied_step,
    )  # fmt: skip
    on._on_message(done)
    (report,) = [report for report in on._outbox.reports() if isinstance(report, NodeStep)]
    return report.copied_step


def opening() -> Agent:
    on = agent()
    on._copied_step = on._restored_step = on._supposed_copied = 0
    on._spec = SimpleNamespace(patience=None)
    on._facts, on._kept, on._held, on._watch = [], [], {}, None
    on._begins_to_train = lambda: None
    on._reader = SimpleNamespace(interrupt=lambda why: None)
    return on


def test_an_agent_that_is_new_learns_what_was_copied_before_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first copies would else take the place of the only ones that there are."""
    monkeypatch.setattr(agents, "NodeWatch", lambda *args: None)
    on = opening()
    assert opened(on, 2, step=12, copied_step=10) == 10
    assert reported(on, 2, 13, 10) == 10


def test_copies_of_what_was_given_up_are_neither_kept_nor_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "NodeWatch", lambda *args: None)
    on = opening()
    assert opened(on, 2, step=12, copied_step=12) == 12
    assert opened(on, 3, step=9, copied_step=12) == 9, "should one have stayed, it stays"
    assert reported(on, 3, 10, 9) == 0
    assert opened(on, 4, step=10, copied_step=9) == 9
    assert reported(on, 4, 11, 9) == 0
    assert reported(on, 4, 12, 11) == 11


def test_a_generation_that_is_halted_while_its_code_is_imported_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "NodeWatch", lambda *args: None)
    on = opening()

    async def use_code(epoch: int, code: str) -> None:
        on._ended_generation = 2

    on._use_code = use_code
    on._workers = SimpleNamespace(assign=lambda plan: pytest.fail("it started"))
    with pytest.raises(StaleOrder, match="2 is over"):
        asyncio.run(on.open(1, plan_of(2, step=11)))


# --- what is of no use any more ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keeper", "dropped"), [("", [13]), ("b:1", [])])
def test_snapshots_of_other_slots_go_once_all_ranks_have_one_of_this_mesh(
    monkeypatch: pytest.MonkeyPatch, keeper: str, dropped: list[int]
) -> None:
    """Where copies are kept, they go when the copies of a later step are complete."""
    monkeypatch.setattr(agents, "NodeWatch", lambda *args: None)
    drops: list[Any] = []

    async def work() -> None:
        on = opening()
        at = 0

        async def drop_others(generation: int, own: tuple[int, ...], but: Any = None) -> None:
            drops.append((own, but, at))

        on._buddies = SimpleNamespace(end=nothing, drop_others=drop_others)
        on._workers = SimpleNamespace(assign=lambda plan: None, code="")
        on._sending = set()
        await on.open(1, plan_of(2, step=11, keeper=keeper, snapshot_slots={0: range(1, 3)}))
        for at in (12, 13, 14):
            reported(on, 2, at, 0)
            await asyncio.gather(*on._sending)

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
    assert drops == [((0,), (1, 11), 0), *(((0,), None, at) for at in dropped)]


# --- the end ----------------------------------------------------------------------------------------------------------


class Writer:
    """Workers of which one writes on until it is ended, in the place of what was deleted, too."""

    def __init__(self, folder: Path) -> None:
        source = f"""
import contextlib, itertools, pathlib
for number in itertools.count():
    folder = pathlib.Path({str(folder)!r})
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        (folder / f"slot-00001.{{number % 3}}").write_bytes(bytes(9000))
    print(number, flush=True)
"""
        self.process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"0\n"
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def shutdown(self, deadline_s: float) -> None:
        self.process.terminate()
        self.process.wait(deadline_s)


def ending(folder: Path, workers: Any) -> Agent:
    """One that serves generation 4 and keeps copies of others' snapshots, behind a real server."""
    on = agent()
    on._ram_dir, on._run, on._ray_node, on._token = str(folder), "run", "b", "t"
    on._loop, on._tasks, on._memory, on._workers = asyncio.get_running_loop(), [], None, workers
    on._fold = SimpleNamespace(generation=4, ranks=())
    on._spec = SimpleNamespace(recovery=SimpleNamespace(halt_deadline_s=DEADLINE_S))
    on._reader = SimpleNamespace(interrupt=lambda why: None)
    on._buddies = Copies(run="run", node="b", ram_dir=str(folder), token="t", bytes_per_s=0)
    on._buddies.serve(on._serves)
    on._peer = PeerServer("127.0.0.1", "t", str(folder), "run", "b", {KEEP: on._buddies.keep})
    return on


def test_a_node_that_ends_keeps_no_copies_of_one_that_still_trains(tmp_path: Path) -> None:
    """All of them end at once, and the workers of some sooner: what is kept now would stay there for good."""

    async def work() -> None:
        tier = RamTier(str(tmp_path), "run", "a", 3, generation=4)
        tier.snapshot(TrainState(7, {"w": torch.arange(1000.0)}, {"rng": torch.tensor([7])}))
        tier.wait()
        owner = Copies(run="run", node="a", ram_dir=str(tmp_path), token="t", bytes_per_s=0)
        server = PeerServer("127.0.0.1", "t", str(tmp_path), "run", "a")
        owner_at, loop, told = await server.start(), asyncio.get_running_loop(), []

        def shutdown(deadline_s: float) -> None:
            sending = owner.send(keeper_at, owner_at, 4, 3, 7, 0)
            told.append(asyncio.run_coroutine_threadsafe(sending, loop).result(DEADLINE_S))

        on = ending(tmp_path, SimpleNamespace(shutdown=shutdown))
        keeper_at = await on._peer.start()
        assert await owner.send(keeper_at, owner_at, 4, 3, 7, 0) == ""
        assert inventory(str(tmp_path), "run", "b") == {3: [7]}
        await on.shutdown(1)
        assert "serves no generation 4" in told[0]
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["a"]
        await server.close()

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))


def test_a_node_that_dies_and_is_let_go_meanwhile_ends_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken line of one that ends by itself has its controller let go of it: that order comes in mid-end."""
    told: list[str] = []

    async def work() -> None:
        ending_now, may_end, ended = asyncio.Event(), threading.Event(), asyncio.Event()

        def shutdown(deadline_s: float) -> None:
            told.append(f"workers, and {len(list(tmp_path.rglob('slot-*')))} snapshots")
            loop.call_soon_threadsafe(ending_now.set)
            assert may_end.wait(DEADLINE_S)

        def end(code: int) -> None:
            told.append("process")
            ended.set()

        monkeypatch.setattr(os, "_exit", end)
        loop, on = asyncio.get_running_loop(), ending(tmp_path, SimpleNamespace(shutdown=shutdown))
        snapshot = tmp_path / "run" / "b" / "slot-00001.0"
        snapshot.parent.mkdir(parents=True)
        snapshot.touch()
        on._tasks = [asyncio.create_task(on._die("its raylet is gone"))]
        await ending_now.wait()
        letting_go = asyncio.create_task(on.shutdown(1))
        await asyncio.sleep(0)
        may_end.set()
        await letting_go
        await ended.wait()

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
    assert told == ["workers, and 0 snapshots", "process"], "Ray may end this process any time"


def test_an_agent_that_ends_opens_nothing_any_more(tmp_path: Path) -> None:
    async def work() -> None:
        on = ending(tmp_path, SimpleNamespace(shutdown=lambda deadline_s: None))
        await on.shutdown(1)
        with pytest.raises(StaleOrder, match="ends"):
            await on.open(1, plan_of(5, 1))

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))


@pytest.mark.parametrize("keeps", [False, True])
def test_an_agent_that_dies_ends_its_workers_before_it_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended

    async def work() -> None:
        folder = tmp_path / "run" / "b"
        writer = Writer(folder)
        on = ending(tmp_path, writer)
        await on._peer.start()
        try:
            monkeypatch.setattr(os, "_exit", end)
            with pytest.raises(Ended):
                await on._die("it is let go", keep_snapshots=keeps)
            assert (writer.process.poll() is None) == keeps, "they end with the process"
            assert folder.exists() == keeps
        finally:
            await on._peer.close()
            writer.process.kill()
            writer.process.wait()

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
