"""Saving while training goes on: what is written is the state of its step, and a failure on one rank is everybody's."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_pool import run_ranks
from test_storage_ranks import check_against, ran, sharded_state, tmp_path_for

from storage import blocks, direct, durable_write
from storage import checkpointer as checkpointers
from storage.checkpointer import Checkpointer
from storage.commits import create_commit, read_commit, state_digest, verify
from storage.durable import CheckpointFailed, load, write_part
from storage.manifest import Commit, ManifestError, RankPart, commit_name
from storage.state import TrainState, local_tensor
from storage.urls import StoreError

WAIT_S = 30.0
LAYOUTS = [(1, 2, 2), (2, 1, 2), (2, 2, 1)]
IDENTITY = {"step": 9, "epoch": 1, "generation": 1}


def checkpointer(url: str, rank: int = 0, world_size: int = 1, before: threading.Thread | None = None) -> Checkpointer:
    return Checkpointer(
        url=url,
        run="r",
        rank=rank,
        world_size=world_size,
        epoch=1,
        generation=1,
        ram_dir=f"{url}/ram",
        node="n",
        before=before,
    )


class Ended:
    """What a save told, once."""

    def __init__(self) -> None:
        self._event, self._results = threading.Event(), []

    def __call__(self, result: RankPart | Exception) -> None:
        self._results.append(result)
        self._event.set()

    def result(self) -> RankPart | Exception:
        assert self._event.wait(WAIT_S), "the save does not end"
        (result,) = self._results
        return result


class Gate:
    """Holds every write of this process up until it is opened; like a store that hangs."""

    def __init__(self, patch: Callable[[Any, str, Any], None]) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        write_files = durable_write.Writer._write_files

        def held_up(*args: Any) -> RankPart:
            self.reached.set()
            assert self.open.wait(WAIT_S)
            return write_files(*args)

        patch(durable_write.Writer, "_write_files", held_up)


def small_state(step: int = 9) -> TrainState:
    g = torch.Generator().manual_seed(step)
    return TrainState(
        step=step,
        tensors={
            "w": torch.randn(300, 40, generator=g),
            "t": torch.randn(6, 4, generator=g).t(),
            "s": torch.tensor(2.0),
        },
        per_rank={"rng": torch.arange(8.0)},
    )


def commit_of(part: RankPart | Exception, **changes: int) -> Commit:
    assert isinstance(part, RankPart), part
    return Commit(run="r", mesh={}, parts=(part,), versions={}, **(IDENTITY | changes))


# --- one rank ---------------------------------------------------------------------------------------------------------


def test_the_state_of_the_step_is_written_however_far_training_has_gone(tmp_path, monkeypatch):
    gate = Gate(monkeypatch.setattr)
    url, state = str(tmp_path), small_state()
    saver, ended = checkpointer(url), Ended()
    saver.begin_save(state, None, ended)
    assert gate.reached.wait(WAIT_S)
    for tensor in (*state.tensors.values(), *state.per_rank.values()):
        tensor.add_(1.0)  # training goes on
    state.step = 10
    assert saver.busy
    with pytest.raises(AssertionError, match="one save at a time"):
        saver.begin_save(state, None, ended)
    gate.open.set()
    commit = commit_of(ended.result())
    reference = write_part(f"{url}/reference", small_state(), rank=0, **IDENTITY)
    assert state_digest(url, commit) == state_digest(f"{url}/reference", commit_of(reference))
    assert verify(url, commit) == []


def test_a_checkpointer_that_is_closed_abandons_its_save_and_completes_its_snapshot(tmp_path, monkeypatch):
    gate = Gate(monkeypatch.setattr)
    url, state = str(tmp_path), small_state()
    saver, ended = checkpointer(url), Ended()
    saver.snapshot(state)
    saver.begin_save(state, None, ended)
    assert gate.reached.wait(WAIT_S)
    assert saver.close(WAIT_S), "the store is not waited for"
    assert "abandoned" in str(ended.result())
    assert saver.newest_snapshot == state.step
    following = checkpointer(url, before=saver.hanging)
    assert following.busy, "the store still has the copy"
    assert not following.close(WAIT_S), "nor for ever is the process to stand in the way of saves"
    gate.open.set()
    saver.hanging.join(WAIT_S)
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    following = checkpointer(url, before=saver.hanging)
    assert not following.busy
    assert following.close(WAIT_S)


def test_buffers_are_made_once_and_hold_the_newest_state(tmp_path):
    url, state, saver = str(tmp_path), small_state(), checkpointer(str(tmp_path))
    addresses = []

    def unchanged(copies: Any) -> list[str]:
        addresses.append({name: tensor.data_ptr() for name, tensor in copies.items()})
        return []

    for step in (9, 10):
        state.step = step
        state.tensors["w"].fill_(step)
        ended = Ended()
        saver.begin_save(state, unchanged, ended)
        commit = commit_of(ended.result(), step=step)
        saver.wait()
        saver._saving.join(WAIT_S)
        restored = TrainState(0, {n: torch.zeros_like(t) for n, t in state.tensors.items()}, {"rng": torch.zeros(8)})
        load(url, commit, restored)
        assert all(torch.equal(restored.tensors[name], state.tensors[name]) for name in state.tensors)
    assert addresses[0] == addresses[1]
    assert set(addresses[0].values()).isdisjoint(tensor.data_ptr() for tensor in state.tensors.values())


def test_a_copy_that_is_not_what_the_step_left_is_not_written(tmp_path):
    ended = Ended()
    checkpointer(str(tmp_path)).begin_save(small_state(), lambda copies: sorted(copies)[:1], ended)
    assert "state changed at rest: s (1 of 3)" in str(ended.result())
    assert not list(tmp_path.rglob("rank-*"))


def test_a_store_that_hangs_fails_the_save_and_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(durable_write, "WRITE_DEADLINE_S", 0.2)
    gate = Gate(monkeypatch.setattr)
    saver, ended = checkpointer(str(tmp_path)), Ended()
    saver.begin_save(small_state(), None, ended)
    assert "has not answered for 0.2 s" in str(ended.result())
    saver.wait()
    assert saver.busy, "the writer still reads the copy"
    gate.open.set()
    saver._saving.join(WAIT_S)
    assert not saver.busy
    assert not list(tmp_path.rglob("rank-*")), "what came too late is removed"
    ended = Ended()
    monkeypatch.setattr(durable_write, "WRITE_DEADLINE_S", WAIT_S)
    saver.begin_save(small_state(10), None, ended)
    assert isinstance(ended.result(), RankPart)


def test_the_last_state_is_not_held_up_by_a_writer_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(durable_write, "WRITE_DEADLINE_S", 0.2)
    with monkeypatch.context() as held:
        gate = Gate(held.setattr)
        saver, ended = checkpointer(str(tmp_path)), Ended()
        saver.begin_save(small_state(9), None, ended)
        assert isinstance(ended.result(), CheckpointFailed) and gate.reached.wait(WAIT_S)
    saver.wait()
    assert saver.busy
    monkeypatch.setattr(durable_write, "WRITE_DEADLINE_S", WAIT_S)
    assert verify(str(tmp_path), commit_of(saver.save(small_state(10)), step=10)) == []
    gate.open.set()
    saver._saving.join(WAIT_S)


def test_a_try_that_hangs_is_not_tried_again_over_itself(tmp_path, monkeypatch):
    """It will remove what it has written when the store answers, and the next try's files have the same names."""
    monkeypatch.setattr(durable_write, "WRITE_DEADLINE_S", 0.2)
    saver = checkpointer(str(tmp_path))
    with monkeypatch.context() as held:
        gate = Gate(held.setattr)
        with pytest.raises(CheckpointFailed, match=r"has not answered for 0\.2 s"):
            saver.save(small_state())
        assert gate.reached.wait(WAIT_S)
    monkeypatch.setattr(durable_write, "WRITE_DEADLINE_S", WAIT_S)
    for _ in range(2):
        with pytest.raises(CheckpointFailed, match="the save before still waits for the store"):
            saver.save(small_state())
    gate.open.set()
    assert saver._writer is not None
    saver._writer.linger()
    assert verify(str(tmp_path), commit_of(saver.save(small_state()))) == []


@pytest.mark.parametrize(("flipped", "found"), [("before", "state changed at rest: w"), ("between", "w: changed")])
def test_what_changes_in_memory_around_the_write_fails_the_save(tmp_path, monkeypatch, flipped, found):
    """What changes before it is digested is for the audit to find, what changes afterwards for the second look."""
    saver, ended, state, actual = checkpointer(str(tmp_path)), Ended(), small_state(), direct.write

    def flip(pieces: Any) -> None:
        (piece,) = (piece for _, piece in pieces if len(piece) == state.tensors["w"].nbytes)
        piece[7] ^= 1 << 4

    def write(path: Path, pieces: Any, size: int, look: Any, buffers: Any) -> None:
        if flipped == "before":
            flip(pieces)
        else:  # as if between the disk's read of it and the second look
            for number, (_, piece) in enumerate(pieces):
                look(number, 0, piece)
            flip(pieces)
        actual(path, pieces, size, look, buffers)

    def unchanged(copies: Any) -> list[str]:
        return [name for name, tensor in copies.items() if not torch.equal(tensor, state.tensors[name])]

    monkeypatch.setattr(direct, "write", write)
    saver.begin_save(state, unchanged, ended)
    assert found in str(ended.result())
    assert not list(tmp_path.rglob("rank-*"))
    saver._saving.join(WAIT_S)


def test_a_copy_that_is_found_changed_gives_its_memory_back(tmp_path):
    saver, state, places = checkpointer(str(tmp_path)), small_state(), []

    def changed(copies: Any) -> list[str]:
        places.append(copies["w"])  # kept, so that no new tensor can get the same place
        return ["w"] if len(places) == 1 else []

    for _ in range(2):
        ended = Ended()
        saver.begin_save(state, changed, ended)
        last = ended.result()
        saver._saving.join(WAIT_S)
    assert isinstance(last, RankPart)
    assert places[0].data_ptr() != places[1].data_ptr()


def test_no_memory_for_the_copy_fails_the_save(tmp_path, monkeypatch):
    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    saver, ended = checkpointer(str(tmp_path)), Ended()
    with monkeypatch.context() as full:
        full.setattr("storage.staging.direct.memory", no_memory)
        saver.begin_save(small_state(), None, ended)
        assert "Cannot allocate memory" in str(ended.result())
    saver._saving.join(WAIT_S)
    ended = Ended()
    saver.begin_save(small_state(), None, ended)
    assert isinstance(ended.result(), RankPart)


# --- restoring from a store that fails ---


@dataclass(frozen=True)
class Assigned:
    source: str = "durable"
    step: int = 9
    commit: str = commit_name(9)


def saved(url: str) -> TrainState:
    """A state of zeros, beside a committed checkpoint of `small_state`."""
    create_commit(url, commit_of(write_part(url, small_state(), rank=0, **IDENTITY)))
    like = small_state()
    return TrainState(0, {n: torch.zeros_like(t) for n, t in like.tensors.items()}, {"rng": torch.zeros(8)})


@pytest.mark.parametrize("failing", ["read_commit", "load"])
def test_a_store_that_fails_for_a_while_is_asked_again(tmp_path, monkeypatch, failing):
    monkeypatch.setattr(checkpointers, "LOAD_RETRIES_S", (0.0, 0.0))
    works, tries = getattr(checkpointers, failing), []

    def flaky(*args: Any, **options: Any) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise CheckpointFailed("rank 0: 503") if failing == "load" else OSError(5, "Input/output error")
        return works(*args, **options)

    monkeypatch.setattr(checkpointers, failing, flaky)
    state = saved(str(tmp_path))
    checkpointer(str(tmp_path)).restore(state, Assigned())
    assert state.step == 9 and torch.equal(state.tensors["w"], small_state().tensors["w"])

    tries.clear()
    monkeypatch.setattr(checkpointers, "LOAD_RETRIES_S", (0.0,))
    with pytest.raises((CheckpointFailed, StoreError)):
        checkpointer(str(tmp_path)).restore(state, Assigned())
    assert len(tries) == 2


def test_a_checkpoint_that_is_not_there_is_not_asked_for_again(tmp_path):
    with pytest.raises(ManifestError, match=r"step-00000009\.json is not there any more"):
        checkpointer(str(tmp_path)).restore(small_state(), Assigned())


def test_a_block_that_was_damaged_on_its_way_is_read_again(tmp_path, monkeypatch):
    state, read = saved(str(tmp_path)), blocks.StoreSource.read
    calls: list[int] = []

    def noisy(source: Any, index: Any, start: int, into: memoryview) -> int:
        calls.append(start)
        done = read(source, index, start, into)
        into[0] ^= len(calls) == 1
        return done

    monkeypatch.setattr(blocks.StoreSource, "read", noisy)
    checkpointer(str(tmp_path)).restore(state, Assigned())
    assert torch.equal(state.tensors["w"], small_state().tensors["w"])
    assert calls.count(calls[0]) == 2


# --- several ranks ----------------------------------------------------------------------------------------------------


def _save_beside_training(folder: str, shape: tuple[int, int, int]) -> list[str]:
    """Save in the background while the default group is busy with training's exchanges; then restore what was saved."""
    rank, world = dist.get_rank(), dist.get_world_size()
    url = f"{folder}/{'-'.join(map(str, shape))}"
    state, saver, ended = sharded_state(shape), checkpointer(url, rank, world), Ended()
    gate = Gate(setattr)
    saver.begin_save(state, lambda copies: [] if copies.keys() == state.tensors.keys() else ["names"], ended)
    for number in range(50):
        for tensor in state.tensors.values():
            local_tensor(tensor).add_(1.0)
        total = torch.tensor(float(number + rank))
        dist.all_reduce(total)
        assert total == world * number + sum(range(world))
        if number == 25:
            gate.open.set()
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, ended.result())
    commit = Commit(run="r", mesh={}, parts=tuple(parts), versions={}, **IDENTITY)
    part = write_part(f"{url}/sync", sharded_state(shape), rank=rank, **IDENTITY)
    dist.all_gather_object(parts, part)
    sync = Commit(run="r", mesh={}, parts=tuple(parts), versions={}, **IDENTITY)
    if rank == 0:
        create_commit(url, commit)
        assert state_digest(url, commit) == state_digest(f"{url}/sync", sync)
        assert verify(url, commit) == []
    dist.barrier()
    restored = sharded_state(shape, zero=True)
    load(url, read_commit(url, 9), restored)
    return check_against(restored, sharded_state(shape).tensors)


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_the_copy_of_a_sharded_state_is_saved_like_the_state_itself(tmp_path, shape):
    assert ran(run_ranks(_save_beside_training, 4, tmp_path_for(tmp_path, "world"), str(tmp_path), shape)) == [[]] * 4


def _fail_on_rank_1(folder: str, how: str) -> tuple[str, str, list[str]]:
    rank = dist.get_rank()
    state, saver, ended = sharded_state((1, 2, 1)), checkpointer(folder, rank, 2), Ended()
    write_files = durable_write.Writer._write_files
    full = OSError(28, "No space left on device")

    def fail(*args: Any) -> RankPart:
        write_files(*args)
        raise full

    if rank == 1 and how == "disk":
        durable_write.Writer._write_files = fail  # type: ignore[method-assign]
    changed = ["plain"] if rank == 1 and how == "state" else []
    saver.begin_save(state, lambda copies: changed, ended)
    error = ended.result()
    saver._saving.join(WAIT_S)
    dist.barrier()
    left = [str(path) for path in Path(folder).rglob("rank-*")]
    durable_write.Writer._write_files = write_files  # type: ignore[method-assign]
    state.step, again = 10, Ended()
    saver.begin_save(state, None, again)
    return type(error).__name__, str(error), left if isinstance(again.result(), RankPart) else ["failed again"]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("disk", ("CheckpointFailed", 'rank 1: StoreError("OSError: [Errno 28] No space left on device")')),
        ("state", ("ManifestError", "rank 1: state changed at rest: plain")),
    ],
)
def test_a_failure_on_one_rank_fails_the_save_on_all_and_nothing_is_left(tmp_path, how, expected):
    for kind, error, left in ran(run_ranks(_fail_on_rank_1, 2, tmp_path_for(tmp_path, "w"), str(tmp_path), how)):
        assert kind == expected[0]
        assert expected[1] in error.replace("'", '"')
        assert left == []
