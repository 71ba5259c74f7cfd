"""The controller while the journal's store is away: nothing is ordered, all is seen, and no deadline runs out."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.core import events as ev
from orchestrator.core import supervisor
from orchestrator.core.actions import Action, AskStop, HaltGeneration, OpenGeneration, SetTimer
from orchestrator.core.supervisor import Supervisor
from orchestrator.observe.status import Status
from orchestrator.runtime import controller as controllers
from orchestrator.runtime import journal as journals
from orchestrator.runtime.controller import Controller
from orchestrator.runtime.journal import Journal, claim_epoch, read, replay
from storage.urls import StoreError

DEADLINE_S = 30.0
HOLD_S = 0.5


class RecordingBody:
    """Notes what it is ordered; what agents report are events already."""

    fold, rates, evidence = None, (), SimpleNamespace(tracebacks={})

    def __init__(self) -> None:
        self.performed: list[Action] = []

    def hear(self, node: str, reports: list[Any]) -> list[ev.Event]:
        return reports

    def fan_in_for(self, node: str) -> str:
        return ""

    def perform(self, action: Action) -> None:
        self.performed.append(action)

    def start(self) -> None:
        pass

    async def end(self) -> None:
        pass


class World:
    """A controller without Ray, a store that can be away, and the run at step 3 of its first generation."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.url, self.folder, self.away = str(folder / "run"), folder, False
        self.answers = threading.Event()
        """Cleared: the store neither works nor fails."""
        self.answers.set()
        self.swept = 0
        self.checkpoint: dict[str, Any] = {}
        self.body = RecordingBody()
        write = journals.write_exclusive

        def write_or_fail(url: str, name: str, data: bytes) -> bool:
            assert self.answers.wait(DEADLINE_S)
            if self.away:
                raise StoreError("503 the store is away")
            return write(url, name, data)

        async def begin(controller: Controller, restarted: bool) -> None:
            epoch = claim_epoch(self.url, "test").epoch
            controller._journal = Journal(self.url, folder / "tail", epoch)
            controller._supervisor, controller._epoch = Supervisor(), epoch
            controller._clock = (time.monotonic(), 0)
            controller._body = self.body  # type: ignore[assignment]
            spec = controller._spec
            began: list[ev.Event] = [
                ev.RunDeclared(at=0, run="r", layout=spec.layout, limits=spec.limits, total_steps=99, capabilities=()),
                ev.EpochBegan(at=0, epoch=epoch, version="test"),
                ev.CheckpointsFound(at=0, steps=()),
            ]
            for at, action in await controller._decide(began):
                controller._perform(at, action)

        runtime = SimpleNamespace(was_current_actor_reconstructed=False, current_actor=None)
        ray = SimpleNamespace(get_runtime_context=lambda: runtime, kill=lambda actor, no_restart: None)

        async def sweep(namespace: str, known: set[str]) -> None:
            self.swept += 1

        patch.setattr(journals, "write_exclusive", write_or_fail)
        patch.setattr(controllers, "ray", ray)
        patch.setattr(controllers, "sweep", sweep)
        patch.setattr(controllers, "HOLD_RETRY_S", 0.02)
        patch.setattr(Controller, "_begin", begin)

    async def open(self) -> None:
        run_ = {"name": "r", "url": self.url, "steps": 99}
        document = {"run": run_, "model": {"preset": "tiny"}, "checkpoint": self.checkpoint}
        self.controller = Controller(spec_document=document, token="t", detached=True)
        await self.until(lambda status: status.run == "r")
        await self.tell(ev.NodeJoined(at=0, node="a", domain="", snapshots={}))
        await self.until(lambda status: status.generation == 1)
        ready = ev.GenerationReady(at=0, generation=1, step=0, rendezvous_us=1, build_us=1, restore_us=1)
        await self.tell(ready, steps(3))
        await self.until(lambda status: status.step == 3)

    async def tell(self, *events: ev.Event) -> None:
        await self.controller.report("a", list(events))  # type: ignore[arg-type]

    async def until(self, condition: Callable[[Status], bool]) -> Status:
        while True:
            status, _ = await self.controller.poll(0, lease=False)
            assert not status.failure, status.failure
            if condition(status):
                return status
            await asyncio.sleep(0.01)

    def ordered(self, kind: type) -> list[Any]:
        return [action for action in self.body.performed if isinstance(action, kind)]


def steps(last: int) -> ev.StepsDone:
    return ev.StepsDone(
        at=0,
        generation=1,
        first=last,
        last=last,
        data_wait_us=0,
        checkpoint_us=0,
        validation_us=0,
        tokens=1,
        loss_millionths=(),
    )


def run(world: World, work: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await world.open()
        await work()
        world.controller._task.cancel()

    asyncio.run(asyncio.wait_for(whole(), DEADLINE_S))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_steps_and_failed_saves_are_seen_while_nothing_can_be_written(world, monkeypatch):
    monkeypatch.setattr(journals, "SEGMENT_INTERVAL_S", 0.0)

    async def work() -> None:
        world.away = True
        await world.tell(steps(4))
        await world.until(lambda status: "the store is away" in status.hold)
        await world.tell(steps(5), ev.CheckpointFailed(at=0, step=5, error="rank 0: no"), steps(6))
        status = await world.until(lambda status: status.step == 6)
        assert (status.saves_failed, status.save_error) == (1, "step 5: rank 0: no")
        assert status.hold
        world.away = False
        await world.until(lambda status: not status.hold)
        await world.until(lambda status: len(read(world.url)) >= 8)

    run(world, work)
    assert replay(read(world.url)).state.step == 6


def test_a_decision_waits_for_the_store_and_its_deadline_with_it(world):
    async def work() -> None:
        halt_deadline_us = world.controller._spec.limits.halt_deadline_us
        world.away, fails_at = True, world.controller._now()
        await world.tell(ev.WorkerExited(at=0, node="a", generation=1, slot=0, exit_code=None, signal=9))
        await world.until(lambda status: bool(status.hold))
        await world.tell(steps(4))
        await world.until(lambda status: status.step == 4)
        # What forces a second decision is the last that is folded.
        await world.tell(ev.NodeHalted(at=0, node="a", generation=1, snapshots={}), steps(5))
        status = await world.until(lambda status: status.generation == 2)
        while world.controller._now() < fails_at + HOLD_S * 1e6:
            await asyncio.sleep(0.01)
        assert world.ordered(HaltGeneration) == []
        assert [order.generation for order in world.ordered(OpenGeneration)] == [1]
        assert status.job == "starting" and status.hold
        world.away, back_at = False, world.controller._now()
        await world.until(lambda status: len(world.ordered(OpenGeneration)) == 2)
        (halt_timer,) = [timer for timer in world.ordered(SetTimer) if timer.timer == "halt/1"]
        assert halt_timer.at >= back_at + halt_deadline_us
        orders = [type(a) for a in world.body.performed if isinstance(a, HaltGeneration | OpenGeneration)]
        assert orders == [OpenGeneration, HaltGeneration, OpenGeneration]

    run(world, work)
    replay(read(world.url))


def test_a_store_that_does_not_answer_at_all_is_a_hold_too(world, monkeypatch):
    monkeypatch.setattr(controllers, "STORE_SILENCE_S", 0.05)

    async def work() -> None:
        world.answers.clear()
        await world.tell(ev.WorkerExited(at=0, node="a", generation=1, slot=0, exit_code=None, signal=9))
        await world.until(lambda status: "the store has not answered for" in status.hold)
        assert world.ordered(HaltGeneration) == []
        world.answers.set()
        await world.until(lambda status: not status.hold)
        await world.until(lambda status: len(world.ordered(HaltGeneration)) == 1)

    run(world, work)
    replay(read(world.url))


def test_an_end_is_had_from_a_store_that_does_not_answer(world, monkeypatch):
    monkeypatch.setattr(controllers, "STORE_SILENCE_S", 0.05)

    async def work() -> None:
        world.answers.clear()
        await world.tell(ev.WorkerExited(at=0, node="a", generation=1, slot=0, exit_code=None, signal=9))
        await world.until(lambda status: bool(status.hold))
        await world.controller.stop("t", "somebody", graceful=False)
        while not (await world.controller.poll(0, lease=True))[0].ended:
            await asyncio.sleep(0.01)
        world.answers.set()

    run(world, work)
    assert world.swept == 1


def test_a_graceful_stop_does_not_end_the_run_because_one_write_fails(world, monkeypatch):
    """The ranks are saving: to end them now would lose what the stop was to keep."""
    monkeypatch.setattr(journals, "SEGMENT_INTERVAL_S", 0.0)

    async def work() -> None:
        await world.controller.stop("t", "somebody", graceful=True)
        await world.until(lambda status: bool(world.ordered(AskStop)))
        world.away = True
        await world.tell(steps(4))
        await world.until(lambda status: bool(status.hold))
        await world.tell(steps(5))
        await world.until(lambda status: status.step == 5)
        world.away = False
        await world.until(lambda status: not status.hold)

    run(world, work)


def test_reports_are_not_taken_but_not_disowned_either_while_the_controller_is_behind(world, monkeypatch):
    async def work() -> None:
        body, world.controller._body = world.controller._body, None
        assert await world.controller.report("a", [steps(4)]) is None
        world.controller._body = body
        assert await world.controller.report("a", [steps(4)]) == ""
        await world.until(lambda status: status.step == 4)
        monkeypatch.setattr(controllers, "INBOX_EVENTS", -1)
        assert await world.controller.report("a", [steps(5)]) is None

    run(world, work)


def test_the_body_is_told_what_is_to_be_thought_of_a_node(world):
    async def work() -> None:
        await world.tell(ev.NodeJoined(at=0, node="surplus", domain="", snapshots={}))
        await world.until(lambda status: status.nodes.get("surplus") == "lost")
        standing = world.controller._standing
        assert [standing(node) for node in ("a", "surplus", "stranger")] == ["good", "", ""]
        await world.tell(ev.NodeLeaving(at=0, node="a", by="me"))
        await world.until(lambda status: status.standings.get("a") == "leaving")
        assert standing("a") == "leaving"

    run(world, work)


def test_what_a_script_without_steps_could_only_lose_by_is_refused(world):
    async def work() -> None:
        state = world.controller._supervisor.state
        state.total_steps, state.high_water = ev.OPEN_END, 0
        with pytest.raises(ValueError, match=r"told no step \(session.step\)"):
            await world.controller.update("t", ["recovery.strikes=5"], None, "somebody")
        with pytest.raises(ValueError, match=r"a: its script has told no step"):
            await world.controller.drain("t", "a", "somebody")
        state.high_water = 1
        await world.controller.drain("t", "a", "somebody")
        assert await world.controller.update("t", ["recovery.strikes=5"], None, "somebody")

    run(world, work)


def test_who_has_been_replaced_leaves_the_agents_to_the_successor(world, monkeypatch):
    ends = []

    async def end(body: Any) -> None:
        ends.append(body)

    monkeypatch.setattr(RecordingBody, "end", end)

    async def work() -> None:
        claim_epoch(world.url, "test")
        await world.tell(ev.WorkerExited(at=0, node="a", generation=1, slot=0, exit_code=None, signal=9))
        while not (await world.controller.poll(0, lease=True))[0].ended:
            await asyncio.sleep(0.01)
        assert "has taken over" in (await world.controller.poll(0, lease=True))[0].failure

    run(world, work)
    assert ends == [] and world.swept == 0


def test_to_stop_in_a_hold_ends_the_run(world):
    async def work() -> None:
        world.away = True
        await world.tell(ev.WorkerExited(at=0, node="a", generation=1, slot=0, exit_code=None, signal=9))
        await world.until(lambda status: bool(status.hold))
        await world.controller.stop("t", "somebody", graceful=False)
        while not (await world.controller.poll(0, lease=True))[0].ended:
            await asyncio.sleep(0.01)
        assert "stopped while nothing could be decided" in (await world.controller.poll(0, lease=True))[0].failure

    run(world, work)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> ev.Event:
    """An event on which the supervisor fails when it has changed half of its state."""

    def half(self: Supervisor, event: ev.Event) -> list[Action]:
        self.state.step = self.state.high_water = 77
        raise AssertionError("half done")

    monkeypatch.setitem(supervisor._HANDLERS, ev.NodesRefused, half)
    return ev.NodesRefused(at=0, error="poison")


def test_what_poison_has_half_done_is_undone_and_nothing_is_decided_any_more(world, poison):
    async def work() -> None:
        await world.tell(steps(4), poison)
        await world.until(lambda status: "the supervisor failed on NodesRefused" in status.hold)
        await world.until(lambda status: status.step == status.high_water == 4)
        await world.tell(steps(5), ev.WorkerExited(at=0, node="a", generation=1, slot=0, exit_code=None, signal=9))
        while not world.controller._inbox.empty():
            await asyncio.sleep(0.01)
        status, _ = await world.controller.poll(0, lease=False)
        assert (status.job, status.step, status.incidents) == ("training", 4, ())
        assert world.ordered(HaltGeneration) == []

    run(world, work)
    told = [type(record.event) for record in read(world.url)]
    assert told.count(ev.StepsDone) == 2 and ev.NodesRefused not in told
    assert replay(read(world.url)).state.step == 4


def test_poison_is_undone_when_the_store_is_back(world, poison):
    async def work() -> None:
        world.away = True
        await world.tell(steps(4), poison)
        await world.until(lambda status: "the store is away" in status.hold and status.step == 77)
        world.away = False
        await world.until(lambda status: status.step == 4 and "the supervisor failed" in status.hold)

    run(world, work)
