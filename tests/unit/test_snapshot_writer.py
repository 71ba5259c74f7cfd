"""When snapshots of the core are written, and that none stops or delays anybody: the writer, and its controller."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from journal_runs import append, begin, folded, recorded, segments
from test_controller_hold import DEADLINE_S, RecordingBody, World, run, steps

from orchestrator.core import events as ev
from orchestrator.core.actions import HaltGeneration
from orchestrator.core.codec import digest
from orchestrator.core.supervisor import Supervisor
from orchestrator.runtime import controller as controllers
from orchestrator.runtime import core_snapshots, snapshot_writer
from orchestrator.runtime.controller import Controller
from orchestrator.runtime.journal import claim_epoch, read, replay
from orchestrator.runtime.snapshot_writer import SNAPSHOT_EVENTS, SNAPSHOT_INTERVAL_S, SnapshotWriter
from storage.urls import StoreError

LOG = recorded(23)
READY = [n for n, (event, _) in enumerate(LOG, 1) if isinstance(event, ev.GenerationReady)]


@pytest.fixture(name="clock")
def clock_by_hand(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(snapshot_writer, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def numbers(url: str) -> list[int]:
    """Records of the snapshots that are there, in order."""
    return sorted(int(name[-16:-6]) for name in core_snapshots.names(url))


class Life:
    """A controller's journal, supervisor and writer, without its loop."""

    def __init__(self, folder: Path) -> None:
        self.url, self.notices = str(folder / "run"), list[str]()
        self.journal, self.supervisor = begin(self.url, folder / "tail"), Supervisor()
        self.writer = SnapshotWriter(self.url, "test", self.notices.append)

    async def live(self, first: int, last: int) -> None:
        """Records `first` to `last` of the log; after each the controller asks whether a snapshot is due."""
        for event, actions in LOG[first - 1 : last]:
            self.supervisor.handle(event)
            append(self.journal, [(event, actions)])
            await self.ask()

    async def ask(self) -> None:
        self.writer.write_if_due(self.journal, self.supervisor.state)
        await self.writer.settle()


def test_one_is_written_when_a_generation_is_ready_and_once_for_each(tmp_path, clock):
    life = Life(tmp_path)

    async def work() -> None:
        for n in range(1, READY[2] + 3):
            clock.seconds += SNAPSHOT_INTERVAL_S
            await life.live(n, n)

    asyncio.run(work())
    trained = [n for n in READY[:3] if folded(LOG[:n]).state.job == "training"]
    assert numbers(life.url) == trained and len(trained) >= 2
    state = core_snapshots.read(life.url, core_snapshots.names(life.url)[0]).state
    assert digest(state) == digest(folded(LOG[: trained[-1]]).state)


def test_one_is_written_every_so_many_events(tmp_path, clock, monkeypatch):
    assert SNAPSHOT_EVENTS == 10_000
    monkeypatch.setattr(snapshot_writer, "SNAPSHOT_EVENTS", 5)
    life = Life(tmp_path)

    async def work() -> None:
        for n in range(1, READY[0]):
            clock.seconds += SNAPSHOT_INTERVAL_S
            await life.live(n, n)

    asyncio.run(work())
    assert numbers(life.url) == list(range(5, READY[0], 5))[-core_snapshots.KEPT :] != []


def test_the_loop_is_held_up_for_one_at_most_once_in_the_interval(tmp_path, clock):
    life = Life(tmp_path)

    async def work() -> None:
        await life.live(1, READY[0])
        clock.seconds += SNAPSHOT_INTERVAL_S - 1
        await life.live(READY[0] + 1, READY[1])
        assert numbers(life.url) == [READY[0]]
        clock.seconds += 1
        await life.ask()
        assert numbers(life.url) == [READY[0], READY[1]]

    asyncio.run(work())


def test_older_ones_are_deleted_segments_are_not(tmp_path, clock):
    life = Life(tmp_path)

    async def work() -> None:
        for n in range(5):
            await life.live(10 * n + 1, 10 * n + 10)
            life.journal.publish()
            await life.writer.write(life.journal, life.supervisor.state)

    asyncio.run(work())
    assert numbers(life.url) == [30, 40, 50]
    assert len(segments(life.url)) == 5
    assert digest(replay(read(life.url)).state) == digest(life.supervisor.state)


def test_one_that_fails_is_told_once_and_tried_again(tmp_path, clock, monkeypatch):
    life, away = Life(tmp_path), SimpleNamespace(yes=True)
    write = core_snapshots.write_exclusive

    def write_or_fail(*args: Any) -> bool:
        if away.yes:
            raise StoreError("503")
        return write(*args)

    monkeypatch.setattr(core_snapshots, "write_exclusive", write_or_fail)

    async def work() -> None:
        await life.live(1, READY[0])
        await life.ask()
        clock.seconds += SNAPSHOT_INTERVAL_S
        await life.ask()
        assert ["503" in line for line in life.notices] == [True]
        away.yes = False
        await life.ask()
        assert numbers(life.url) == [], "not before the interval is over"
        clock.seconds += SNAPSHOT_INTERVAL_S
        await life.ask()

    asyncio.run(work())
    assert numbers(life.url) == [READY[0]] and len(life.notices) == 1


def test_that_none_can_be_deleted_does_not_make_more_of_them(tmp_path, clock, monkeypatch):
    life = Life(tmp_path)

    def denied(url: str, name: str) -> None:
        raise PermissionError(name)

    monkeypatch.setattr(core_snapshots, "remove", denied)

    async def work() -> None:
        for n in range(4):
            await life.live(READY[0] * n // 4 + 1, READY[0] * (n + 1) // 4)
            await life.writer.write(life.journal, life.supervisor.state)
        for _ in range(3):
            clock.seconds += SNAPSHOT_INTERVAL_S
            await life.ask()

    asyncio.run(work())
    assert len(numbers(life.url)) == 4
    assert ["PermissionError" in line for line in life.notices] == [True]


def test_a_replaced_controller_writes_and_deletes_none(tmp_path, clock):
    life = Life(tmp_path)

    async def work() -> None:
        await life.live(1, READY[0])
        claim_epoch(life.url, "test")
        await life.writer.write(life.journal, life.supervisor.state)

    asyncio.run(work())
    assert numbers(life.url) == [READY[0]]
    assert "has taken over" in life.notices[0]


def test_a_store_that_does_not_answer_is_waited_for_up_to_the_deadline_and_asked_no_second_time(
    tmp_path, clock, monkeypatch
):
    life, answers, asked = Life(tmp_path), threading.Event(), []

    def write(*args: Any) -> None:
        asked.append(args)
        assert answers.wait(DEADLINE_S)

    monkeypatch.setattr(core_snapshots, "write", write)
    monkeypatch.setattr(snapshot_writer, "WRITE_DEADLINE_S", 0.05)

    async def work() -> None:
        await life.live(1, READY[0])
        clock.seconds += SNAPSHOT_INTERVAL_S
        await life.ask()
        await life.writer.write(life.journal, life.supervisor.state)
        assert len(asked) == 1
        answers.set()

    asyncio.run(work())


# --- the controller ---


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_a_controller_writes_one_when_its_generation_is_ready_and_one_at_the_runs_end(world):
    async def work() -> None:
        await until(lambda: numbers(world.url))
        await world.controller.stop("t", "somebody", graceful=False)
        await until(lambda: world.controller._ended.is_set())

    run(world, work)
    records = read(world.url)
    assert numbers(world.url)[-1] == len(records)
    state = core_snapshots.read(world.url, core_snapshots.names(world.url)[0]).state
    assert state.job == "ended" and digest(state) == digest(replay(records).state)


@pytest.mark.parametrize("answers", [True, False])
def test_decisions_do_not_wait_for_a_snapshot_nor_does_a_verdict_depend_on_one(world, monkeypatch, answers):
    never, tried = threading.Event(), []

    def write(*args: Any) -> bool:
        tried.append(args)
        if answers:
            raise StoreError("403 no snapshots here")
        return never.wait(DEADLINE_S)

    monkeypatch.setattr(core_snapshots, "write_exclusive", write)
    monkeypatch.setattr(snapshot_writer, "WRITE_DEADLINE_S", 0.05)

    async def work() -> None:
        await until(lambda: tried)
        await world.tell(ev.WorkerExited(at=0, node="a", generation=1, slot=0, exit_code=None, signal=9))
        await until(lambda: world.ordered(HaltGeneration))
        await world.controller.stop("t", "somebody", graceful=False)
        await until(lambda: world.controller._ended.is_set())
        status, _ = await world.controller.poll(0, lease=True)
        assert (status.exit_code, status.failure, status.hold) == (96, "", "")
        never.set()

    run(world, work)


def test_what_a_poisoned_supervisor_knows_is_not_written(world, monkeypatch):
    monkeypatch.setattr(snapshot_writer, "SNAPSHOT_INTERVAL_S", 0.0)
    monkeypatch.setattr(snapshot_writer, "SNAPSHOT_EVENTS", 1)

    async def work() -> None:
        await until(lambda: numbers(world.url))

        def handle(event: ev.Event) -> None:
            world.controller._supervisor.state.step = -1
            raise AssertionError("poison")

        monkeypatch.setattr(world.controller._supervisor, "handle", handle)
        await world.tell(steps(4))
        await world.until(lambda status: "poison" in status.hold)
        await world.controller._snapshots.settle()
        before = numbers(world.url)
        await world.tell(steps(5))
        await until(lambda: world.controller._inbox.empty())
        await world.controller._snapshots.settle()
        assert numbers(world.url) == before

    run(world, work)
    assert core_snapshots.read(world.url, core_snapshots.names(world.url)[0]).state.step >= 0


def test_an_event_that_the_journal_cannot_take_is_poison_too(world):
    async def work() -> None:
        await until(lambda: numbers(world.url))
        await world.tell(dataclasses.replace(steps(4), tokens=1.5))
        await world.until(lambda status: "the supervisor failed on" in status.hold)
        assert not world.controller._ended.is_set(), "training goes on"
        await world.controller.stop("t", "somebody", graceful=False)

    run(world, work)


class Begin:
    """Controllers that begin one after the other on one journal, on a head without Ray."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.url, self.log_dir = str(folder / "run"), str(folder / "logs")
        self.runtime = SimpleNamespace(was_current_actor_reconstructed=False, current_actor=None)

        async def sweep(namespace: str, known: set[str]) -> None:
            pass

        async def adopt(body: RecordingBody, state: Any) -> None:
            pass

        ray = SimpleNamespace(get_runtime_context=lambda: self.runtime, kill=lambda actor, no_restart: None)
        patch.setattr(controllers, "ray", ray)
        patch.setattr(controllers, "sweep", sweep)
        patch.setattr(RecordingBody, "adopt", adopt, raising=False)
        patch.setattr(controllers, "Body", lambda *args: RecordingBody())

    async def one(self, work: Callable[[Controller], Awaitable[None]], *, restarted: bool, steps: int = 99) -> None:
        document = {
            "run": {"name": "r", "url": self.url, "steps": steps},
            "model": {"preset": "tiny"},
            "cluster": {"log_dir": self.log_dir},
        }
        self.runtime.was_current_actor_reconstructed = restarted
        controller = Controller(spec_document=document, token="t", detached=True)
        while controller._body is None or not controller._observes:
            assert not controller._failure, controller._failure
            await asyncio.sleep(0.01)
        await work(controller)
        controller._task.cancel()
        controller._journal.publish()


def test_a_controller_that_begins_writes_what_it_has_folded_before_its_own_first_record(tmp_path, monkeypatch):
    """So does one that a changed job comes with: its declaration is the first record after the snapshot."""
    life, after = Begin(tmp_path, monkeypatch), list[list[int]]()

    async def train(controller: Controller) -> None:
        await controller.report("a", [ev.NodeJoined(at=0, node="a", domain="", snapshots={})])  # type: ignore[list-item]
        await until(lambda: controller._supervisor.state.generation == 1)
        after.append(numbers(life.url))

    async def look(controller: Controller) -> None:
        assert controller._supervisor.state.job == ("starting" if len(after) == 1 else "waiting")
        after.append(numbers(life.url))

    async def work() -> None:
        await life.one(train, restarted=False)
        await life.one(look, restarted=True)
        await life.one(look, restarted=False, steps=120)

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
    records = read(life.url)
    begun = [record.seq for record in records if isinstance(record.event, ev.EpochBegan)]
    declared = [record.seq for record in records if isinstance(record.event, ev.RunDeclared)]
    assert after == [[], [begun[1] - 1], [begun[1] - 1, declared[1] - 1]]
    assert [name[10:18] for name in core_snapshots.names(life.url)] == ["00000003", "00000002"]
    for name in core_snapshots.names(life.url):
        found = core_snapshots.read(life.url, name)
        assert digest(found.state) == digest(replay(records[: found.header.seq]).state)


def test_a_controller_that_begins_tells_what_it_passed_over_and_goes_on(tmp_path, monkeypatch):
    life = Begin(tmp_path, monkeypatch)

    async def nothing(controller: Controller) -> None:
        pass

    async def look(controller: Controller) -> None:
        assert [line for _, line in controller._notices if "is passed over" in line and "is damaged" in line]
        assert controller._last_at >= controller._supervisor.state.ledger.mark > 0

    async def work() -> None:
        await life.one(nothing, restarted=False)
        await life.one(nothing, restarted=True)
        Path(life.url, core_snapshots.names(life.url)[0]).write_bytes(b"")
        await life.one(look, restarted=True)

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
