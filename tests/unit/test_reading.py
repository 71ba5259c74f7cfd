"""A node reads checkpoints back: what it finds, that it goes no faster than it may, and that it ends when it must."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_body_checkpoints import body_of, settled

from orchestrator.core import events as ev
from orchestrator.core.actions import DeleteCheckpoint, PublishTrust, VerifyCheckpoint
from orchestrator.runtime import reading
from orchestrator.runtime.reading import Interrupted, Pace, Reader, Reading
from storage import commits, pins, statements
from storage.commits import create_commit, list_commits, read_commit
from storage.durable import write_part
from storage.manifest import Commit, RankPart
from storage.state import TrainState
from storage.urls import StoreError

DEADLINE_S = 60.0
FAST = 10**12


def save(url: str, step: int, generation: int = 1) -> Commit:
    state = TrainState(step, {"w": torch.full((100_000,), float(step))}, {})
    part: RankPart = write_part(url, state, step=step, epoch=1, generation=generation, rank=0)
    commit = Commit(run="r", step=step, epoch=1, generation=generation, mesh={}, parts=(part,), versions={})
    assert create_commit(url, commit)
    return commit


def order(step: int, *, number: int = 1, generation: int = 1, bytes_per_s: int = FAST) -> VerifyCheckpoint:
    return VerifyCheckpoint(number=number, step=step, generation=generation, node="a", bytes_per_s=bytes_per_s)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), DEADLINE_S))  # type: ignore[arg-type]


def flip(url: str, commit: Commit) -> None:
    path = Path(url, commit.parts[0].data)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("generation", [0, 1])
def test_what_is_whole_is_read_whole(tmp_path: Path, generation: int) -> None:
    url = str(tmp_path)
    commit = save(url, 5)
    found = run(lambda: Reader(url).read(order(5, generation=generation)))
    assert (found.bytes, found.problems, found.unread) == (commit.parts[0].data_bytes, (), "")


def test_a_flipped_bit_is_named_with_its_block_and_a_damaged_record_is_damage(tmp_path: Path) -> None:
    url = str(tmp_path)
    commit = save(url, 5)
    flip(url, commit)
    (problem,) = run(lambda: Reader(url).read(order(5))).problems
    assert commit.parts[0].data in problem and "damaged" in problem
    record = tmp_path / "checkpoints/commits/step-00000005.json"
    record.write_bytes(record.read_bytes().replace(b'"epoch": 1', b'"epoch": 2'))
    (problem,) = run(lambda: Reader(url).read(order(5))).problems
    assert "commit record is damaged" in problem


def test_what_was_not_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path)
    save(url, 5)
    assert "no record of step 6" in run(lambda: Reader(url).read(order(6))).unread
    assert "is of generation 1" in run(lambda: Reader(url).read(order(5, generation=2))).unread

    def away(*args: Any) -> list[str]:
        raise OSError("[Errno 5] Input/output error: https://user:secret@store")

    monkeypatch.setattr(reading, "verify", away)
    found = run(lambda: Reader(url).read(order(5)))
    assert "Input/output error" in found.unread and "secret" not in found.unread and not found.problems


def test_an_order_that_comes_again_joins_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path)
    save(url, 5)
    readings: list[int] = []
    verify = reading.verify
    monkeypatch.setattr(reading, "verify", lambda *args: readings.append(1) or verify(*args))

    async def work() -> None:
        reader = Reader(url)
        first = await asyncio.gather(reader.read(order(5)), reader.read(order(5)))
        assert first[0] == first[1] == await reader.read(order(5)) and len(readings) == 1
        await reader.read(order(5, number=2))
        assert len(readings) == 2

    run(work)


def test_a_slow_reading_ends_when_a_generation_starts_and_when_another_is_wanted(tmp_path: Path) -> None:
    """At a byte a second it would take days."""
    url = str(tmp_path)
    save(url, 5)

    async def work() -> None:
        reader = Reader(url)
        first = asyncio.ensure_future(reader.read(order(5, bytes_per_s=1)))
        await asyncio.sleep(0)  # it has begun
        reader.interrupt("generation 2 starts")
        assert (await first).unread == "Interrupted: generation 2 starts"
        second = asyncio.ensure_future(reader.read(order(5, number=2, bytes_per_s=1)))
        await asyncio.sleep(0)
        third = await reader.read(order(5, number=3))
        assert third.problems == () and not third.unread
        assert "another checkpoint" in (await second).unread

    run(work)


def test_the_pace_is_kept_and_lost_time_is_not_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(reading.time, "monotonic", lambda: clock.now)
    waits: list[float] = []

    class Waited:
        def wait(self, timeout: float) -> bool:
            waits.append(timeout)
            clock.now += timeout
            return False

    monkeypatch.setattr(reading.threading, "Event", Waited)
    pace = Pace(100)
    pace(50)
    pace(50)
    clock.now += 1000  # the store stood still
    pace(200)
    assert waits == [0.5, 0.5, 2.0]


def test_who_was_ended_does_not_go_on() -> None:
    pace = Pace(FAST)
    pace(1)
    pace.end("the agent ends")
    with pytest.raises(Interrupted, match="the agent ends"):
        pace(1)


@pytest.mark.parametrize("url", ["local", "memory://read-at-once"])
def test_a_reading_ends_between_the_indices_too(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files are read before the first block of some checkpoints."""
    url = str(tmp_path) if url == "local" else url
    commit, pace, indices = save(url, 5), Pace(FAST), []
    many = dataclasses.replace(commit, parts=commit.parts * 20)
    read_index = commits.read_index

    def read_then_end(*args: Any) -> Any:
        indices.append(args)
        pace.end("a generation starts")
        return read_index(*args)

    monkeypatch.setattr(commits, "read_index", read_then_end)
    with pytest.raises(Interrupted, match="a generation starts"):
        commits.verify(url, many, lambda n_bytes: pace(0) if not n_bytes else None)
    assert len(indices) <= commits.VERIFY_STREAMS


def test_a_store_is_read_with_several_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """One alone is too slow for what a large checkpoint has."""
    streams = commits.VERIFY_STREAMS
    commit, together = save("memory://streams", 5), threading.Barrier(streams)
    read_index = commits.read_index

    def meet(*args: Any) -> Any:
        together.wait(DEADLINE_S)
        return read_index(*args)

    monkeypatch.setattr(commits, "read_index", meet)
    many = dataclasses.replace(commit, parts=commit.parts * streams)
    (problem,) = commits.verify("memory://streams", many)  # raises when fewer come together
    assert "digest" not in problem, "only that all parts hold the same tensor"


def test_of_a_file_with_many_damaged_blocks_the_first_are_named_and_the_others_counted(tmp_path: Path) -> None:
    state = TrainState(5, {"w": torch.ones(3 * 1024 * 1024)}, {})
    part = write_part(str(tmp_path), state, step=5, epoch=1, generation=1, rank=0)
    commit = Commit(run="r", step=5, epoch=1, generation=1, mesh={}, parts=(part,), versions={})
    path = tmp_path / part.data
    path.write_bytes(bytes(path.stat().st_size))
    *named, rest = commits.verify(str(tmp_path), commit)
    assert len(named) == commits.PROBLEMS_KEPT and all(part.data in problem for problem in named)
    assert rest == f"{part.data}: and {12 - commits.PROBLEMS_KEPT} more"


# --- the body ---


class FakeAgent:
    """Answers `verify` as Ray would."""

    def __init__(self, answer: Reading | Exception) -> None:
        self.asked: list[Any] = []
        future: Future[Reading] = Future()
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

        def remote(*args: Any) -> Any:
            self.asked.append(args)
            return SimpleNamespace(future=lambda: future)

        self.actor = SimpleNamespace(verify=SimpleNamespace(remote=remote))


@pytest.mark.parametrize(
    ("answer", "problems", "unread"),
    [(Reading(bytes=7, problems=("block 3",)), ("block 3",), ""), (RuntimeError("dead"), (), "RuntimeError")],
)
def test_what_a_node_has_read_is_told_to_the_core(tmp_path, answer, problems, unread):
    events: list[ev.Event] = []
    agent: Any = FakeAgent(answer)

    async def work() -> None:
        body = body_of(str(tmp_path), events)
        body.agents["a"] = agent
        body.perform(order(5, number=4, generation=3))
        await settled(lambda: bool(events))

    run(work)
    (event,) = events
    assert isinstance(event, ev.CheckpointVerified) and agent.asked == [(1, order(5, number=4, generation=3))]
    assert (event.number, event.step, event.generation, event.node) == (4, 5, 3, "a")
    assert (event.problems, event.unread) == (problems, unread)


def test_what_is_thought_is_published_and_what_could_not_be_is_with_the_next(tmp_path, monkeypatch):
    url, tries = str(tmp_path), []
    write = statements.write

    def flaky(url: str, statement: statements.Statement) -> None:
        tries.append(statement.step)
        if len(tries) == 1:
            raise StoreError("503 slow down")
        write(url, statement)

    monkeypatch.setattr(statements, "write", flaky)

    def trust(step: int, what: Any) -> PublishTrust:
        return PublishTrust(step=step, generation=1, epoch=2, trust=what, by="n1", detail="d", certificate=None)

    async def work() -> None:
        body = body_of(url, [])
        body.perform(trust(5, "verified"))
        await settled(lambda: tries == [5])
        body.perform(trust(6, "damaged"))
        await settled(lambda: len(statements.read(url)) == 2)

    run(work)
    said = {step: [(s.trust, s.epoch, s.by) for s in of] for step, of in statements.read(url).items()}
    assert said == {5: [("verified", 2, "n1")], 6: [("damaged", 2, "n1")]}


def test_a_statement_that_can_never_be_written_keeps_no_other_back(tmp_path, monkeypatch):
    url, refused = str(tmp_path), []
    write = statements.write

    def full(url: str, statement: statements.Statement) -> None:
        if statement.step == 5:
            refused.append(statement.step)
            raise StoreError("was written 100 times with other content")
        write(url, statement)

    monkeypatch.setattr(statements, "write", full)

    async def work() -> None:
        body = body_of(url, [])
        for step in (5, 6):
            body.perform(
                PublishTrust(step=step, generation=1, epoch=2, trust="damaged", by="n1", detail="d", certificate=None)
            )
        await settled(lambda: list(statements.read(url)) == [6])

    run(work)
    assert refused == [5], "it is tried again with the next, not before"


def test_a_pinned_checkpoint_is_not_deleted_and_the_core_is_told(tmp_path):
    url, events = str(tmp_path), []
    for step in (5, 6, 7):
        save(url, step)
    pins.pin(url, 5, "the paper's")

    async def work() -> None:
        body = body_of(url, events)
        body.perform(DeleteCheckpoint(step=5))
        body.perform(DeleteCheckpoint(step=6))
        await settled(lambda: bool(events) and list_commits(url) == [5, 7])

    run(work)
    assert all(event == ev.CheckpointsPinned(at=0, steps=(5,)) for event in events)
    assert read_commit(url, 5).step == 5
