"""What the body does with a store that fails while it commits and deletes checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.core import events as ev
from orchestrator.core.actions import CommitCheckpoint, DeleteCheckpoint
from orchestrator.runtime import checkpoints as orders
from orchestrator.runtime.body import Body
from orchestrator.runtime.journal import JournalError
from orchestrator.runtime.reports import MeshFold
from orchestrator.spec import parse
from storage.commits import create_commit, list_commits, read_commit, verify
from storage.durable import write_part
from storage.manifest import DATA_DIR, Commit
from storage.state import TrainState
from storage.urls import StoreError, list_folders
from trainer import contract

DEADLINE_S = 30.0


def write(url: str, step: int) -> dict[str, Any]:
    state = TrainState(step, {"w": torch.full((4,), float(step))}, {})
    return vars(write_part(url, state, step=step, epoch=1, generation=1, rank=0))


def body_of(url: str, events: list[ev.Event]) -> Body:
    spec = parse({"run": {"name": "r", "url": url, "steps": 9}, "model": {"preset": "tiny"}})
    body = Body(
        spec,
        "namespace",
        "token",
        1,
        "instance",
        "",
        lambda: 0,
        events.append,
        lambda line: None,
        lambda: 0,
        lambda: False,
        lambda node: "good",
        lambda: "",
    )
    body.fold = MeshFold(generation=1, nodes=("a",), ranks=1, done=0)
    return body


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))  # type: ignore[arg-type]


async def settled(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(("failures", "commits"), [(0, True), (3, True), (4, False)])
def test_a_commit_is_tried_again_within_bounds(tmp_path, monkeypatch, failures, commits):
    url, events, tries = str(tmp_path), [], []
    monkeypatch.setattr(orders, "COMMIT_RETRIES_S", (0.0, 0.0, 0.0))

    def flaky(url: str, commit: Commit) -> bool:
        tries.append(commit.step)
        if len(tries) <= failures:
            raise StoreError("503 slow down")
        return create_commit(url, commit)

    monkeypatch.setattr(orders, "create_commit", flaky)

    async def work() -> None:
        body = body_of(url, events)
        part = contract.ShardWritten(generation=1, rank=0, step=5, part=write(url, 5), write_us=1)
        assert body.fold is not None
        assert [type(event) for event in body.fold.feed(0, ("a",), part)] == [ev.CheckpointWritten]
        body.perform(CommitCheckpoint(step=5, epoch=1, generation=1, replaces_damaged=False))
        await settled(lambda: bool(events))

    run(work)
    (event,) = events
    if commits:
        assert event == ev.CheckpointCommitted(at=0, step=5, epoch=1, generation=1)
        assert verify(url, read_commit(url, 5)) == []
    else:
        assert isinstance(event, ev.CheckpointFailed) and "503 slow down" in event.error
        assert list_commits(url) == []
    assert len(tries) == min(failures + 1, 4)


def test_who_has_been_replaced_commits_nothing_and_does_not_insist(tmp_path, monkeypatch):
    url, events, asked = str(tmp_path), [], []

    def replaced(url: str, epoch: int) -> None:
        asked.append(epoch)
        raise JournalError("epoch 2 has taken over")

    monkeypatch.setattr(orders, "check_not_replaced", replaced)

    async def work() -> None:
        body = body_of(url, events)
        assert body.fold is not None
        body.fold.feed(0, ("a",), contract.ShardWritten(generation=1, rank=0, step=5, part=write(url, 5), write_us=1))
        body.perform(CommitCheckpoint(step=5, epoch=1, generation=1, replaces_damaged=False))
        await settled(lambda: bool(events))

    run(work)
    assert asked == [1]
    assert list_commits(url) == []


def test_what_could_not_be_deleted_is_deleted_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked = str(tmp_path), []
    for step in (1, 2, 3, 4):
        part = write(url, step)
        if step != 2:  # an attempt that was cut off
            parts = (orders.RankPart(**part),)
            create_commit(url, Commit(run="r", step=step, epoch=1, generation=1, mesh={}, parts=parts, versions={}))
    delete = orders.delete_checkpoint

    def flaky(url: str, step: int) -> None:
        asked.append(step)
        if len(asked) == 1:
            raise OSError(30, "Read-only file system")
        delete(url, step)

    monkeypatch.setattr(orders, "delete_checkpoint", flaky)

    async def work() -> None:
        body = body_of(url, [])
        body.perform(DeleteCheckpoint(step=1))
        await settled(lambda: asked == [1])
        body.perform(DeleteCheckpoint(step=3))
        await settled(lambda: list_folders(url, DATA_DIR) == ["step-00000004-e1-g1"])

    run(work)
    assert asked == [1, 1, 3]
    assert list_commits(url) == [4]
