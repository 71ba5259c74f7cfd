"""Durable checkpoints in one process: round trips, and every kind of damage found before a tensor changes."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parallel_pool import run_ranks
from spoilt import spoilt

from storage import commits, direct
from storage.checkpointer import Checkpointer
from storage.commits import create_commit, delete_checkpoint, list_commits, read_commit, state_digest, verify
from storage.durable import CheckpointFailed, load, write_part
from storage.index import BLOCK_BYTES, Index
from storage.manifest import Commit, ManifestError, RankPart, StateMismatch, commit_name, generation_dir, writers_epoch
from storage.ram import HEADER_BYTES, copies_of
from storage.read_plan import NEAR_BLOCKS
from storage.restore import NEAR_THREADS
from storage.snapshots import RamTier
from storage.state import TrainState
from trainer.contract import Restore

SENTINEL = 7.0


def make_state(step: int = 5, seed: int = 0) -> TrainState:
    """Some 6 MB: several blocks in each of two ranks' files, small tensors that share blocks, odd dtypes and shapes."""
    g = torch.Generator().manual_seed(seed)
    tensors = {f"model/layers.{i}.weight": torch.randn(300, 71 + i, generator=g) for i in range(6)}
    tensors["model/embed"] = torch.randn(700, 900, generator=g)
    tensors["exp_avg/embed"] = torch.randn(700, 900, generator=g)
    tensors["model/half"] = torch.randn(33, 5, generator=g).bfloat16()
    tensors["model/transposed"] = torch.randn(40, 30, generator=g).t()
    tensors["scalar"] = torch.randn((), generator=g)
    tensors["flags"] = torch.tensor([True, False, True])
    tensors["counts"] = torch.arange(11)
    tensors["empty"] = torch.zeros(0, 4)
    return TrainState(step, tensors, {"rng": torch.randint(0, 256, (5056,), generator=g).to(torch.uint8)})


def blank(state: TrainState) -> TrainState:
    def like(tensors):
        return {name: torch.full_like(tensor, SENTINEL) for name, tensor in tensors.items()}

    return TrainState(0, like(state.tensors), like(state.per_rank))


def same(a: TrainState, b: TrainState) -> bool:
    def named(state):
        return {**state.tensors, **{f"rank/{k}": v for k, v in state.per_rank.items()}}

    def bits(tensor):
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    ours, theirs = named(a), named(b)
    return ours.keys() == theirs.keys() and all(
        (t.dtype, t.shape) == (theirs[k].dtype, theirs[k].shape) and torch.equal(bits(t), bits(theirs[k]))
        for k, t in ours.items()
    )


def commit_of(parts: list[RankPart], step: int = 5, generation: int = 1) -> Commit:
    return Commit(
        run="r",
        step=step,
        epoch=1,
        generation=generation,
        mesh={"dp_shard": len(parts)},
        parts=tuple(parts),
        versions={},
    )


def save(url: str, state: TrainState, generation: int = 1) -> Commit:
    part = write_part(url, state, step=state.step, epoch=1, generation=generation, rank=0)
    commit = commit_of([part], state.step, generation)
    create_commit(url, commit)
    return commit


def _save_on_two(url: str) -> RankPart:
    state = make_state()
    state.per_rank["rng"] += torch.distributed.get_rank()
    return write_part(url, state, step=5, epoch=1, generation=1, rank=torch.distributed.get_rank())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, Commit]:
    """A checkpoint of `make_state` whose data lies in the files of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    parts = run_ranks(_save_on_two, 2, tmp_path_factory.mktemp("store"), str(folder))
    commit = commit_of(parts)
    create_commit(str(folder), commit)
    assert all(part.data_bytes > 2 * BLOCK_BYTES for part in parts)
    return folder, commit


@pytest.fixture
def copy(two_ranks, tmp_path) -> tuple[Path, Commit]:
    shutil.copytree(two_ranks[0], tmp_path / "run")
    return tmp_path / "run", two_ranks[1]


def test_a_state_returns_bit_for_bit(tmp_path):
    state = make_state()
    commit = save(str(tmp_path), state)
    restored = blank(state)
    load(str(tmp_path), read_commit(str(tmp_path), 5), restored)
    assert same(restored, state)
    assert restored.step == 5
    assert verify(str(tmp_path), commit) == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]),
)
def test_any_shape_and_dtype_returns(tmp_path_factory, shapes, dtype):
    url = str(tmp_path_factory.mktemp("shapes"))
    tensors = {str(i): torch.randint(0, 2, tuple(shape)).to(dtype) for i, shape in enumerate(shapes)}
    state = TrainState(1, tensors, {})
    save(url, state)
    restored = TrainState(0, {k: torch.zeros_like(v) for k, v in tensors.items()}, {})
    load(url, read_commit(url, 1), restored)
    assert same(restored, state)


def test_two_ranks_parts_load_in_one_process_without_their_per_rank_values(two_ranks):
    folder, commit = two_ranks
    restored = blank(make_state())
    load(str(folder), commit, restored)
    expected = make_state()
    expected.per_rank["rng"].fill_(SENTINEL)
    assert same(restored, expected)


def assert_damage_is_found(folder: Path, commit: Commit, file: str, block: str = "") -> None:
    target = blank(make_state())
    before = blank(make_state())
    with pytest.raises(ManifestError) as found:
        load(str(folder), commit, target)
    assert file in str(found.value)
    assert block in str(found.value), str(found.value)
    assert spoilt(target) if ".bin" in file else same(target, before) and target.step == 0
    assert any(file in problem for problem in verify(str(folder), commit))


def some_byte(rng: random.Random, folder: Path, commit: Commit) -> tuple[Path, str, int, str]:
    """Of some rank's data file: path, name, a position in a chunk, and what names the block there."""
    part = rng.choice(commit.parts)
    chunks = Index.from_json((folder / part.index).read_bytes()).chunks
    # Per-rank ones are not read in another world.
    chunk = rng.choice([c for c in chunks if c.n_bytes and not c.fqn.startswith("rank/")])
    at = rng.randrange(chunk.n_bytes)
    named = f"{part.data}: {chunk.fqn} at {chunk.offsets}, block {at // BLOCK_BYTES} "
    return folder / part.data, part.data, chunk.file_offset + at, named


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_is_found(copy, seed):
    rng = random.Random(seed)
    path, name, at, named = some_byte(rng, *copy)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    assert_damage_is_found(*copy, name, named + "is damaged")


@pytest.mark.parametrize("seed", range(24))
def test_a_zeroed_page_is_found(copy, seed):
    rng, is_zero = random.Random(seed), True
    while is_zero:
        path, name, at, named = some_byte(rng, *copy)
        raw, page = path.read_bytes(), at // 4096 * 4096
        is_zero = not raw[at]
    path.write_bytes(raw[:page] + bytes(4096) + raw[page + 4096 :])
    assert_damage_is_found(*copy, name, named + "is damaged")


@pytest.mark.parametrize("seed", range(24))
def test_a_truncated_file_is_found(copy, seed):
    rng = random.Random(seed)
    path, name, at, _ = some_byte(rng, *copy)
    path.write_bytes(path.read_bytes()[: rng.choice([at, at // 4096 * 4096])])
    assert_damage_is_found(*copy, name, "is cut off")


def test_what_stands_between_tensors_is_looked_at_by_verify_alone(copy):
    folder, commit = copy
    part = commit.parts[0]
    first = min((c for c in Index.from_json((folder / part.index).read_bytes()).chunks), key=lambda c: c.n_bytes % 4096)
    raw = bytearray((folder / part.data).read_bytes())
    raw[first.file_offset + first.n_bytes] = 1
    (folder / part.data).write_bytes(raw)
    assert [problem.partition(": ")[0] for problem in verify(str(folder), commit)] == [part.data]
    target = blank(make_state())
    load(str(folder), commit, target)
    assert same(TrainState(5, target.tensors, {}), TrainState(5, make_state().tensors, {}))


def test_the_last_page_of_a_file_is_looked_at_to_its_end(copy):
    folder, commit = copy
    path = folder / commit.parts[0].data
    last = max(Index.from_json((folder / commit.parts[0].index).read_bytes()).chunks, key=lambda c: c.file_offset)
    raw = path.read_bytes()
    assert last.file_offset + last.n_bytes < len(raw)
    for damaged in (raw[:-1] + b"\1", raw[:-1]):
        path.write_bytes(damaged)
        (problem,) = verify(str(folder), commit)
        assert problem.startswith(f"{commit.parts[0].data}: bytes {last.file_offset + last.n_bytes} to {len(raw)} ")


def test_verify_reads_whole_pages_into_pages_so_that_it_reads_the_disk(two_ranks, monkeypatch):
    folder, commit = two_ranks
    asked: list[tuple[int, int, int]] = []
    actual = direct.read

    def read(path: Path, start: int, into: memoryview) -> int:
        asked.append((start, len(into), direct.address(into)))
        return actual(path, start, into)

    monkeypatch.setattr(direct, "read", read)
    assert verify(str(folder), commit) == []
    assert sum(length for _, length, _ in asked) == sum(part.data_bytes for part in commit.parts)
    assert all(number % direct.PAGE_BYTES == 0 for numbers in asked for number in numbers)


def test_swapped_data_files_are_found(copy):
    folder, commit = copy
    a, b = (folder / part.data for part in commit.parts)
    a.rename(folder / "x"), b.rename(a), (folder / "x").rename(b)
    assert_damage_is_found(*copy, ".bin", "is damaged")


def test_swapped_parts_are_found(copy):
    folder, commit = copy
    for kind in ("data", "index"):
        a, b = (folder / getattr(part, kind) for part in commit.parts)
        a.rename(folder / "x"), b.rename(a), (folder / "x").rename(b)
    assert_damage_is_found(*copy, commit.parts[0].index)


def test_a_part_of_another_step_is_found(copy):
    """The files of a later save under an earlier name: each is whole in itself."""
    folder, commit = copy
    other = save(str(folder / "other"), make_state(step=6, seed=1))
    shutil.copy(folder / "other" / other.parts[0].data, folder / commit.parts[0].data)
    shutil.copy(folder / "other" / other.parts[0].index, folder / commit.parts[0].index)
    assert_damage_is_found(*copy, commit.parts[0].index)


def test_a_commit_that_names_whole_parts_of_another_checkpoint_is_refused(tmp_path):
    commit = save(str(tmp_path), make_state())
    wrong = commit_of(list(commit.parts), step=6)
    with pytest.raises(ManifestError, match="belongs to another part"):
        load(str(tmp_path), wrong, blank(make_state()))
    assert len(verify(str(tmp_path), wrong)) == 1
    with pytest.raises(ManifestError, match="not each rank once"):
        load(str(tmp_path), commit_of(list(commit.parts) * 2), blank(make_state()))


@pytest.mark.parametrize("kind", ["data", "index"])
def test_a_missing_file_is_found(copy, kind):
    folder, commit = copy
    (folder / getattr(commit.parts[1], kind)).unlink()
    assert_damage_is_found(*copy, getattr(commit.parts[1], kind))


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_index_is_found(copy, seed):
    rng = random.Random(seed)
    folder, commit = copy
    path = folder / rng.choice(commit.parts).index
    raw = bytearray(path.read_bytes())
    if seed % 4:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    else:
        raw = raw[: rng.randrange(len(raw))]
    path.write_bytes(raw)
    assert_damage_is_found(*copy, path.name)


def test_every_damaged_bit_and_length_of_a_commit_record_is_found(two_ranks):
    raw = (two_ranks[0] / commit_name(5)).read_bytes()
    flips = random.Random(0).sample(range(len(raw) * 8), 600)
    for at in flips:
        damaged = bytearray(raw)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(ManifestError):
            Commit.from_json(bytes(damaged))
    for length in range(len(raw) - 1):  # the last byte is the line's end
        with pytest.raises(ManifestError):
            Commit.from_json(raw[:length])


def test_what_is_damaged_in_memory_while_it_is_written_is_not_saved(tmp_path, monkeypatch):
    state, written = make_state(), os.pwrite

    def flipping(fd, content, at):
        n_bytes = written(fd, content, at)
        content[17] ^= 4
        return n_bytes

    monkeypatch.setattr(os, "pwrite", flipping)
    with pytest.raises(ManifestError, match="changed in memory while it was written"):
        save(str(tmp_path), state)
    assert not list(tmp_path.rglob("rank-*"))


def load_of_damage(folder: Path, name: str, state: TrainState) -> TrainState:
    """What a load leaves that meets a flipped bit in the tensor `name`."""
    commit = save(str(folder), state)
    (chunk,) = (c for c in Index.from_json((folder / commit.parts[0].index).read_bytes()).chunks if c.fqn == name)
    with (folder / commit.parts[0].data).open("r+b") as file:
        file.seek(chunk.file_offset)
        byte = file.read(1)[0]
        file.seek(chunk.file_offset)
        file.write(bytes([byte ^ 1]))
    target = blank(state)
    with pytest.raises(ManifestError, match=f"{name} at .* is damaged"):
        load(str(folder), commit, target)
    return target


def test_no_byte_of_a_damaged_block_reaches_a_tensor(tmp_path):
    target = load_of_damage(tmp_path, "counts", make_state())
    assert torch.equal(target.tensors["counts"], blank(make_state()).tensors["counts"])


def test_nobody_goes_on_with_a_state_into_which_a_load_failed(tmp_path):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    target = load_of_damage(damaged, "model/half", make_state())
    assert spoilt(target)
    with pytest.raises(CheckpointFailed, match="a load into this state has failed"):
        save(str(tmp_path / "again"), target)
    assert not list((tmp_path / "again").rglob("*.bin"))
    with pytest.raises(ValueError, match="a load into this state has failed"):
        RamTier(str(tmp_path / "ram"), "r", "n", 0, generation=1).snapshot(target)
    commit = save(str(whole), make_state())
    load(str(whole), commit, target)
    assert same(target, make_state()) and target.step == 5


def test_a_load_takes_no_more_memory_for_a_larger_state(tmp_path, monkeypatch):
    """Beside the state itself: for each thread a segment that is read, and one that rests."""
    state = TrainState(5, {f"w{i}": torch.randn(1 << 21) for i in range(8)}, {})
    commit, taken = save(str(tmp_path), state), list[int]()
    actual = direct.memory
    monkeypatch.setattr(direct, "memory", lambda n_bytes: (taken.append(n_bytes), actual(n_bytes))[1])
    restored = blank(state)
    load(str(tmp_path), commit, restored)
    assert same(restored, state)
    most_bytes = 2 * NEAR_THREADS * NEAR_BLOCKS * BLOCK_BYTES
    assert sum(taken) <= most_bytes < sum(tensor.nbytes for tensor in state.tensors.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.tensors.update({"model/embed": s.tensors["model/embed"].bfloat16()}),
            "model/embed.*float32.*bfloat16",
        ),
        (lambda s: s.tensors.update({"model/embed": torch.zeros(3, 3)}), r"model/embed.*\(700, 900\).*\(3, 3\)"),
        (lambda s: s.tensors.update({"new": torch.zeros(1)}), "new: not in the checkpoint"),
        (lambda s: s.per_rank.update({"new": torch.zeros(1)}), "rank/00000/new: not in the checkpoint"),
        (lambda s: s.tensors.pop("scalar"), "no rank asks for.*scalar"),
        (lambda s: s.per_rank.pop("rng"), "no rank asks for.*rank/00000/rng"),
    ],
)
def test_a_state_that_does_not_match_is_refused_untouched(tmp_path, change, message):
    save(str(tmp_path), make_state())
    target = blank(make_state())
    change(target)
    before = TrainState(0, {k: v.clone() for k, v in target.tensors.items()}, dict(target.per_rank))
    with pytest.raises(StateMismatch, match=message):
        load(str(tmp_path), read_commit(str(tmp_path), 5), target)
    assert same(target, before)


def test_a_reserved_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reserved for per_rank"):
        write_part(str(tmp_path), TrainState(1, {"rank/0": torch.zeros(1)}, {}), step=1, epoch=1, generation=1, rank=0)


def test_a_generation_saves_a_step_once(tmp_path):
    commit = save(str(tmp_path), make_state())
    with pytest.raises(CheckpointFailed, match="FileExistsError"):
        write_part(str(tmp_path), make_state(seed=1), step=5, epoch=1, generation=1, rank=0)
    assert verify(str(tmp_path), commit) == []


def test_a_failed_write_leaves_no_data_behind(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("storage.durable_write.os.fsync", full)
    with pytest.raises(CheckpointFailed, match="No space left"):
        write_part(str(tmp_path), make_state(), step=5, epoch=1, generation=1, rank=0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_state_digest_is_of_the_content_alone(tmp_path):
    urls = [str(tmp_path / name) for name in "abc"]
    first = save(urls[0], make_state())
    again = save(urls[1], make_state(), generation=9)
    assert state_digest(urls[0], first) == state_digest(urls[1], again)
    changed = make_state()
    changed.per_rank["rng"][0] += 1
    assert state_digest(urls[2], save(urls[2], changed)) != state_digest(urls[0], first)
    for name in ("model/half", "flags", "counts", "scalar"):
        url, changed = str(tmp_path / name.replace("/", "-")), make_state()
        changed.tensors[name].view(-1)[0] = 1 - changed.tensors[name].view(-1)[0].int()
        assert state_digest(url, save(url, changed)) != state_digest(urls[0], first)


def test_deleting_removes_the_record_before_the_data(tmp_path, monkeypatch):
    url = str(tmp_path)
    save(url, make_state())
    save(url, make_state(step=6))
    removed: list[str] = []
    actual = commits.remove
    monkeypatch.setattr(commits, "remove", lambda url, name: (removed.append(name), actual(url, name)))
    delete_checkpoint(url, 5)
    assert removed == [commit_name(5), generation_dir(5, 1, 1)]
    assert list_commits(url) == [6]
    assert not (tmp_path / generation_dir(5, 1, 1)).exists()
    delete_checkpoint(url, 5)
    assert verify(url, read_commit(url, 6)) == []


def test_the_checkpointer_restores_from_every_source(tmp_path):
    def checkpointer(generation):
        return Checkpointer(
            url=str(tmp_path / "run"), run="r", rank=0, world_size=1, epoch=1, generation=generation,
            ram_dir=str(tmp_path / "ram"), node="n",
        )  # fmt: skip

    first = checkpointer(1)
    state = make_state()
    first.restore(state, Restore(source="init"))
    assert (state.step, first.newest_snapshot) == (0, 0)
    state.step = 5
    create_commit(str(tmp_path / "run"), commit_of([first.save(state)]))
    for step in (5, 6):
        state.step = step
        state.tensors["scalar"].fill_(step)
        first.snapshot(state)
        first.await_snapshot()
    second = checkpointer(2)
    assert second.newest_snapshot == 6
    restored = blank(state)
    second.restore(restored, Restore(source="ram", step=6, generation=1))
    assert same(restored, state)
    assert restored.step == 6
    restored = blank(state)
    second.restore(restored, Restore(source="durable", step=5, commit=commit_name(5)))
    assert same(restored, make_state())
    assert restored.step == 5
    assert second.newest_snapshot == 5, "the snapshot of step 6 is of a history that was given up"
    with pytest.raises(ManifestError, match="step 4 was assigned"):
        second.restore(restored, Restore(source="durable", step=4, commit=commit_name(5)))
    with pytest.raises(ManifestError, match="no complete snapshot"):
        second.restore(restored, Restore(source="ram", step=6, generation=1))


@pytest.mark.parametrize("damaged", ["store", "memory"])
def test_a_checkpoint_is_read_from_memory_that_holds_the_same(tmp_path, damaged, caplog):
    """Of a snapshot of the same step; only what is the same: another tensor has changed in it."""
    one = Checkpointer(
        url=str(tmp_path / "run"), run="r", rank=0, world_size=1, epoch=1, generation=1,
        ram_dir=str(tmp_path / "ram"), node="n",
    )  # fmt: skip
    state = make_state()
    part = one.save(state)
    create_commit(str(tmp_path / "run"), commit_of([part]))
    state.tensors["scalar"].fill_(7)
    one.snapshot(state)
    one.await_snapshot()
    (snapshot,) = copies_of(str(tmp_path / "ram"), "r", "n", state.step)
    index = Index.from_json((tmp_path / "run" / part.index).read_bytes())
    in_file, where = (
        (index, tmp_path / "run" / part.data) if damaged == "store" else (snapshot.index, snapshot.source.path)
    )
    (chunk,) = (chunk for chunk in in_file.chunks if chunk.fqn == "model/embed")
    raw = bytearray(where.read_bytes())
    raw[chunk.file_offset + (0 if damaged == "store" else HEADER_BYTES)] ^= 1
    with where.open("r+b") as file:  # in place: it is mapped
        file.write(raw)
    restored = blank(state)
    one.restore(restored, Restore(source="durable", step=5, commit=commit_name(5)))
    assert same(restored, make_state())
    assert ("model/embed at (0, 0), block 0 is damaged" in caplog.text) == (damaged == "memory")


def test_a_commit_names_the_epoch_of_its_writers_whoever_commits():
    def part(rank, folder):
        return RankPart(rank=rank, data=f"{folder}/rank-{rank}.bin", index="", data_bytes=1, index_digest="")

    assert writers_epoch([part(0, generation_dir(7, 12, 3)), part(1, generation_dir(7, 12, 3))]) == 12
    for wrong in ([], [part(0, "elsewhere")], [part(0, generation_dir(7, 1, 3)), part(1, generation_dir(7, 2, 3))]):
        with pytest.raises(ManifestError, match="not in one folder"):
            writers_epoch(wrong)
