"""A state filled from mixtures of copies on several ranks: memory that one rank sees, stale and damaged copies, the
store; and what is left of a state when one rank fails."""

from __future__ import annotations

import os
import tracemalloc
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from parallel_pool import run_ranks
from spoilt import spoilt
from test_storage_ranks import check_against, ran, save, sharded_state, tmp_path_for

from storage.blocks import Copy, Distance, SourceError, StoreSource
from storage.checkpointer import Checkpointer
from storage.commits import read_indices
from storage.durable import CheckpointFailed
from storage.index import Index
from storage.manifest import ManifestError, RankPart
from storage.ranks import gathered
from storage.restore import load_copies
from storage.state import TrainState, local_tensor
from storage.urls import locate

Mesh = tuple[int, int, int]


@dataclass
class Bytes:
    """A data file in this process, some bits of it flipped; what is read of it is counted."""

    name: str
    content: bytearray
    n_bytes: int = 0

    def read(self, index: Index, start: int, into: memoryview) -> int:
        raw = self.content[start : start + len(into)]
        into[: len(raw)] = raw
        self.n_bytes += len(raw)
        return len(raw)


@dataclass
class Counted:
    """The store, and what is read of it."""

    store: StoreSource
    reads: list[tuple[str, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.store.name

    def read(self, index: Index, start: int, into: memoryview) -> int:
        self.reads.append((index.data, len(into)))
        return self.store.read(index, start, into)


class Away:
    name = "a peer"

    def read(self, index: Index, start: int, into: memoryview) -> int:
        raise SourceError("a peer does not answer")


def content(url: str, index: Index) -> bytearray:
    with open(f"{url}/{index.data}", "rb") as file:
        return bytearray(file.read())


def flipped(raw: bytearray, index: Index, name: str) -> bytearray:
    """With a bit of the middle of each of this tensor's chunks turned over."""
    for chunk in index.chunks:
        if chunk.fqn == name and chunk.n_bytes:
            raw[chunk.file_offset + chunk.n_bytes // 2] ^= 4
    return raw


def untouched(state: TrainState) -> bool:
    return state.step == 0 and not any(local_tensor(tensor).any() for tensor in state.tensors.values())


def _mixture(url: str, saved: Mesh, shape: Mesh) -> tuple[list[str], list[str], int, list[tuple[str, int]]]:
    """Rank r sees part r in memory, damaged in one tensor; all see a stale disk, a dead peer and the store."""
    indices = read_indices(url, save(url, sharded_state(saved)))
    other = sharded_state(saved)
    for tensor in [*other.tensors.values(), *other.per_rank.values()]:
        local_tensor(tensor).mul_(3)
    stale = read_indices(f"{url}-stale", save(f"{url}-stale", other))
    rank, store = dist.get_rank(), Counted(StoreSource(locate(url)))
    memory = Bytes(f"memory of {rank}", flipped(content(url, indices[rank]), indices[rank], "large"))
    parts = [[Copy(index, Away(), Distance.PEER), Copy(index, store)] for index in indices]
    parts[0].insert(0, Copy(stale[0], Bytes("stale disk", content(f"{url}-stale", stale[0])), Distance.DISK))
    parts[rank].insert(0, Copy(indices[rank], memory, Distance.MEMORY))
    state, oracle = sharded_state(shape, zero=True), sharded_state(shape)
    bad = load_copies(parts, state)
    wrong = check_against(state, oracle.tensors)
    if state.per_rank["rng"].tolist() != oracle.per_rank["rng"].tolist():
        wrong.append("rng")
    return wrong, [str(damaged) for damaged in bad], memory.n_bytes, store.reads


@pytest.mark.parametrize(("saved", "shape"), [((1, 2, 2), (1, 2, 2)), ((1, 4, 1), (2, 1, 2)), ((2, 2, 1), (1, 1, 4))])
def test_any_mixture_of_copies_fills_any_mesh_and_only_damage_is_read_from_the_store(tmp_path, saved, shape):
    results = ran(run_ranks(_mixture, 4, tmp_path_for(tmp_path, "s"), f"{tmp_path}/run", saved, shape))
    assert [wrong for wrong, *_ in results] == [[]] * 4
    evidence = [problem for _, bad, *_ in results for problem in bad]
    damaged = [problem for problem in evidence if "is damaged" in problem]
    assert damaged and all("large at" in problem and "(memory of " in problem for problem in damaged)
    assert all(n_bytes for _, _, n_bytes, _ in results)
    stored = sum(n for *_, reads in results for _, n in reads)
    assert stored <= len(damaged) * 2**20, "a block that is whole nearer by was read from the store"


def _memory_alone(url: str, saved: Mesh, shape: Mesh) -> list[str]:
    """Each rank sees its own snapshot and nothing else of the others, not even their indices."""
    index = read_indices(url, save(url, sharded_state(saved)))[dist.get_rank()]
    parts: list[list[Copy]] = [[] for _ in range(dist.get_world_size())]
    parts[dist.get_rank()] = [Copy(index, Bytes("memory", content(url, index)), Distance.MEMORY)]
    state, oracle = sharded_state(shape, zero=True), sharded_state(shape)
    assert load_copies(parts, state) == []
    return check_against(state, oracle.tensors)


def test_ranks_that_see_their_own_memory_alone_fill_another_mesh(tmp_path):
    folder = tmp_path_for(tmp_path, "s")
    assert ran(run_ranks(_memory_alone, 4, folder, f"{tmp_path}/run", (1, 4, 1), (1, 2, 2))) == [[]] * 4


def _one_fails(url: str, kind: str) -> bool:
    indices = read_indices(url, save(url, sharded_state((1, 2, 1))))
    parts = [[Copy(index, StoreSource(locate(url)))] for index in indices]
    if dist.get_rank() == 1:
        raw = flipped(content(url, indices[1]), indices[1], "even")
        source = Away() if kind == "away" else Bytes("bad", raw)
        parts[1] = [Copy(indices[1], source)]
    target = sharded_state((1, 2, 1), zero=True)
    try:
        load_copies(parts, target)
    except (ManifestError, CheckpointFailed):
        assert spoilt(target)
        raise
    return False


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [("away", CheckpointFailed, "rank 1: .*does not answer"), ("bad", ManifestError, r"rank 1: .*even at .*\(bad\)")],
)
def test_a_failure_of_one_rank_while_it_reads_spoils_all_states(tmp_path, kind, error, message):
    for result in run_ranks(_one_fails, 2, tmp_path_for(tmp_path, "s"), f"{tmp_path}/run", kind):
        with pytest.raises(error, match=message):
            raise result


def _different_parts(url: str) -> None:
    commits = [save(f"{url}/{n}", sharded_state((1, 2, 1)), n) for n in (1, 2)]
    state = sharded_state((1, 2, 1))
    local_tensor(state.tensors["even"]).add_(1)
    commits.append(save(f"{url}/3", state, 3))
    own = 2 if dist.get_rank() else 0
    indices = read_indices(f"{url}/{own + 1}", commits[own])
    target = sharded_state((1, 2, 1), zero=True)
    try:
        load_copies([[Copy(index, StoreSource(locate(f"{url}/{own + 1}")))] for index in indices], target)
    finally:
        assert untouched(target)


def test_ranks_that_are_told_of_different_states_refuse(tmp_path):
    for result in run_ranks(_different_parts, 2, tmp_path_for(tmp_path, "s"), f"{tmp_path}/run"):
        with pytest.raises(ManifestError, match="part 0: ranks know 2 contents"):
            raise result


def test_saves_allocate_nothing_once_they_are_under_way(tmp_path):
    """Neither Python's memory nor the process's grows by a noticeable part of the state from save to save."""
    saver = Checkpointer(
        url=f"{tmp_path}/run", run="r", rank=0, world_size=1, epoch=1, generation=1,
        ram_dir=f"{tmp_path}/ram", node="n",
    )  # fmt: skip
    n_bytes = 48 * 2**20
    state = TrainState(0, {f"w{i}": torch.randn(n_bytes // 24 - 7) for i in range(6)}, {})

    def saved(step: int) -> RankPart:
        told: list[RankPart | Exception] = []
        state.step = step
        saver.begin_save(state, None, told.append)
        saver.wait()
        saver._saving.join(60)
        assert isinstance(told[0], RankPart), told
        return told[0]

    def resident_pages() -> int:
        with open(f"/proc/{os.getpid()}/statm") as file:
            return int(file.read().split()[1])

    saved(1), saved(2)
    tracemalloc.start()
    try:
        before, pages = tracemalloc.get_traced_memory()[0], resident_pages()
        for step in range(3, 7):
            tracemalloc.reset_peak()
            saved(step)
            assert tracemalloc.get_traced_memory()[1] - before < n_bytes // 24, f"save {step}"
        assert (resident_pages() - pages) * 4096 < n_bytes // 4
    finally:
        tracemalloc.stop()


def test_gathered_values_come_in_the_order_of_ranks(tmp_path):
    assert ran(run_ranks(_gathered, 2, tmp_path_for(tmp_path, "s"))) == [[0, 1], [0, 1]]


def _gathered() -> list[int]:
    return gathered(dist.get_rank(), None)
