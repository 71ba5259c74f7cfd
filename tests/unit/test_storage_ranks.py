"""Durable checkpoints of several ranks: resharding against DCP's own reader, refusals that every rank sees."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_pool import run_ranks
from spoilt import spoilt
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from storage import blocks
from storage.commits import create_commit, read_commit, state_digest, verify
from storage.durable import CheckpointFailed, load, write_part
from storage.index import Index
from storage.manifest import Commit, ManifestError, RankPart, data_name
from storage.state import TrainState, local_tensor

MESHES = {4: [(1, 4, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2), (1, 1, 4)], 2: [(1, 2, 1), (1, 1, 2), (2, 1, 1)]}
# Even and uneven, more ranks than rows, one dimension, several blocks.
SHAPES = {"even": (16, 8), "uneven": (10, 7), "few": (3, 5), "vector": (13,), "large": (1031, 600)}


def make_model() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(12, 22), nn.Linear(22, 9), nn.Linear(9, 3))


def full_tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def sharded_state(shape: tuple[int, int, int], *, zero: bool = False) -> TrainState:
    """Tensors over a mesh (replicate, shard, tp): plain DTensors, and a model with real FSDP2 over tensor parallelism
    (its column-parallel weights are sharded twice along dimension 0)."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("rep", "shard", "tp"))
    tensors: dict[str, torch.Tensor] = {}
    for name, full in full_tensors().items():
        tp = Shard(1) if full.ndim == 2 else Replicate()
        tensors[name] = distribute_tensor(full, mesh, [Replicate(), Shard(0), tp])
        tensors[f"{name}/half"] = distribute_tensor(
            full.bfloat16(), mesh, [Replicate(), Shard(full.ndim - 1), Shard(0)]
        )
    model = make_model()
    if shape[2] > 1:
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel(), "2": ColwiseParallel()})
    fully_shard(model, mesh=mesh["rep", "shard"] if shape[0] > 1 else mesh["shard"])
    tensors |= {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    tensors["plain"] = torch.arange(7.0)
    state = TrainState(9, tensors, {"rng": torch.full((3,), float(dist.get_rank() + 1))})
    if zero:
        for tensor in [*tensors.values(), *state.per_rank.values()]:
            local_tensor(tensor).zero_()
        state.step = 0
    return state


def expected_full() -> dict[str, torch.Tensor]:
    model = make_model()
    full = {name: tensor.detach() for name, tensor in full_tensors().items()}
    full |= {f"{name}/half": tensor.bfloat16() for name, tensor in full.items()}
    return {**full, **{f"model/{k}": v for k, v in model.state_dict().items()}, "plain": torch.arange(7.0)}


def save(url: str, state: TrainState, generation: int = 1) -> Commit:
    """All ranks save; rank 0 commits as the controller would."""
    part = write_part(url, state, step=state.step, epoch=1, generation=generation, rank=dist.get_rank())
    parts: list[RankPart] = [part] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    commit = Commit(run="r", step=state.step, epoch=1, generation=generation, mesh={}, parts=tuple(parts), versions={})
    if dist.get_rank() == 0:
        create_commit(url, commit)
    dist.barrier()
    return commit


def check_against(state: TrainState, oracle: dict[str, torch.Tensor]) -> list[str]:
    """Names whose local part differs from the oracle's, or whose whole differs from the tensor that was saved."""
    full = expected_full()
    wrong = []
    for name, tensor in state.tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not torch.equal(whole, full[name]) or not torch.equal(local_tensor(tensor), local_tensor(oracle[name])):
            wrong.append(name)
    return wrong


def _save_all(folder: str, meshes: list[tuple[int, int, int]]) -> None:
    for shape in meshes:
        state = sharded_state(shape)
        name = "-".join(map(str, shape))
        save(f"{folder}/ours/{name}", state)
        dcp.save(dict(state.tensors), storage_writer=dcp.FileSystemWriter(f"{folder}/dcp/{name}"))


def _load_all(folder: str, pairs: list[tuple[tuple[int, int, int], tuple[int, int, int]]]) -> list[tuple]:
    """For each pair, the names that are wrong, and the bytes that this rank has read."""
    found = []
    read = [0]
    actual = blocks.StoreSource.read

    def counted(self: blocks.StoreSource, index: Index, start: int, into: memoryview) -> int:
        read[0] += len(into)
        return actual(self, index, start, into)

    blocks.StoreSource.read = counted  # type: ignore[method-assign]
    for saved, shape in pairs:
        read[0], name = 0, "-".join(map(str, saved))
        state, oracle = sharded_state(shape, zero=True), sharded_state(shape, zero=True)
        load(f"{folder}/ours/{name}", read_commit(f"{folder}/ours/{name}", 9), state)
        dcp.load(oracle.tensors, storage_reader=dcp.FileSystemReader(f"{folder}/dcp/{name}"))
        wrong = [f"{saved} -> {shape}: {tensor}" for tensor in check_against(state, oracle.tensors)]
        same_world = torch.Size(saved).numel() == dist.get_world_size()
        if state.per_rank["rng"].tolist() != [float(dist.get_rank() + 1) if same_world else 0.0] * 3:
            wrong.append(f"{saved} -> {shape}: rng {state.per_rank['rng'].tolist()}")
        found.append((wrong, read[0]))
    return found


def ran(results: list) -> list:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def test_every_mesh_restores_into_every_other_as_with_dcp(tmp_path):
    for world in MESHES:
        ran(run_ranks(_save_all, world, tmp_path_for(tmp_path, f"save{world}"), str(tmp_path), MESHES[world]))
    saved = [*MESHES[4], *MESHES[2]]
    for world in MESHES:
        pairs = list(itertools.product(saved, MESHES[world]))[::2]  # every mesh on both sides
        results = ran(run_ranks(_load_all, world, tmp_path_for(tmp_path, f"load{world}"), str(tmp_path), pairs))
        for (before, after), *found in zip(pairs, *results, strict=True):
            assert [wrong for wrong, _ in found] == [[]] * world
            url = f"{tmp_path}/ours/{'-'.join(map(str, before))}"
            stored = sum(part.data_bytes for part in read_commit(url, 9).parts)
            n_bytes = sum(n for _, n in found)
            assert 0.9 * stored < n_bytes <= stored, f"{before} -> {after}: {n_bytes} of {stored} bytes were read"
    for shape in saved:
        url = f"{tmp_path}/ours/{'-'.join(map(str, shape))}"
        assert verify(url, read_commit(url, 9)) == []


def tmp_path_for(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def _replicas_are_saved_once(url: str) -> tuple[int, int]:
    state = sharded_state((2, 2, 1))
    commit = save(url, state)
    unique = sum(tensor.numel() * tensor.element_size() for tensor in expected_full().values())
    return sum(part.data_bytes for part in commit.parts), unique


def test_replicas_are_saved_once(tmp_path):
    written, unique = ran(run_ranks(_replicas_are_saved_once, 4, tmp_path_for(tmp_path, "s"), f"{tmp_path}/run"))[0]
    assert unique <= written < unique * 1.1, "more than padding was added: a replica was saved again"


def _digests(url: str) -> list[str]:
    digests = []
    for generation, change in ((1, None), (2, None), (3, "rng"), (4, "even")):
        state = sharded_state((1, 2, 2))
        if change and dist.get_rank() == 3:
            local_tensor({**state.tensors, **state.per_rank}[change]).view(-1)[0] += 1
        digests.append(state_digest(f"{url}/{generation}", save(f"{url}/{generation}", state, generation)))
    return digests


def test_the_state_digest_sees_each_ranks_content_and_nothing_else(tmp_path):
    a, b, c, d = ran(run_ranks(_digests, 4, tmp_path_for(tmp_path, "s"), str(tmp_path)))[0]
    assert a == b
    assert len({a, c, d}) == 3


def _pipeline(url: str) -> list[str]:
    """Two stages of two shards each hold different layers; then four shards hold all layers."""
    full = {f"layers.{i}": torch.full((6, 2), float(i)) for i in range(4)}
    rank = dist.get_rank()
    pipe = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "shard"))
    mine = [f"layers.{i}" for i in range(4) if i // 2 == rank // 2]
    save(url, TrainState(9, {name: distribute_tensor(full[name], pipe["shard"], [Shard(0)]) for name in mine}, {}))
    flat = init_device_mesh("cpu", (4,))
    target = {name: distribute_tensor(torch.zeros(6, 2), flat, [Shard(0)]) for name in full}
    load(url, read_commit(url, 9), TrainState(0, target, {}))
    wrong = [name for name in full if not torch.equal(target[name].full_tensor(), full[name])]
    staged = {name: distribute_tensor(torch.zeros(6, 2), pipe["shard"], [Shard(0)]) for name in mine}
    load(url, read_commit(url, 9), TrainState(0, staged, {}))
    return wrong + [name for name in mine if not torch.equal(staged[name].full_tensor(), full[name])]


def test_pipeline_stages_restore_into_another_depth(tmp_path):
    assert ran(run_ranks(_pipeline, 4, tmp_path_for(tmp_path, "s"), f"{tmp_path}/run")) == [[]] * 4


def _save_local(url: str, kind: str) -> None:
    rank = dist.get_rank()
    if kind == "plain":
        tensors = {"w": torch.ones(2), "position": torch.tensor(float(rank))}
    elif kind == "stage":
        mesh: DeviceMesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "shard"))["shard"]
        tensors = {"layers.0": distribute_tensor(torch.full((4,), float(rank)), mesh, [Shard(0)])}
    elif kind == "shape":
        tensors = {"w": torch.ones(2 + rank)}
    elif kind == "dtype":
        tensors = {"w": torch.ones(2).to([torch.float32, torch.bfloat16][rank])}
    else:
        tensors = {"w": torch.ones(2, dtype=torch.complex128)}
    write_part(url, TrainState(1, tensors, {}), step=1, epoch=1, generation=1, rank=rank)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("plain", "position.*ranks 0 and 1 hold different content.*per_rank"),
        ("stage", r"layers.0.*different content.*global names"),
        ("shape", r"w: rank 0 holds.*\(2,\).*rank 1.*\(3,\)"),
        ("dtype", "w: rank 0 holds torch.float32.*rank 1 holds torch.bfloat16"),
        ("complex", "complex128 has no place"),
    ],
)
def test_what_dcp_would_drop_in_silence_is_refused_on_every_rank(tmp_path, kind, message):
    results = run_ranks(_save_local, 2, tmp_path_for(tmp_path, "s"), f"{tmp_path}/run", kind)
    for result in results:
        with pytest.raises(ManifestError, match=message):
            raise result


def _one_rank_cannot_write(url: str) -> None:
    state = sharded_state((1, 2, 1))
    if dist.get_rank() == 1:
        path = Path(url, data_name(9, 1, 1, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    dist.barrier()
    write_part(url, state, step=9, epoch=1, generation=1, rank=dist.get_rank())


def test_when_one_rank_cannot_write_all_ranks_know(tmp_path):
    results = run_ranks(_one_rank_cannot_write, 2, tmp_path_for(tmp_path, "s"), f"{tmp_path}/run")
    for result in results:
        with pytest.raises(CheckpointFailed, match=r"rank 1.*FileExistsError"):
            raise result


def _one_rank_reads_damage(url: str) -> tuple[str, bool]:
    state = sharded_state((1, 4, 1))
    commit = save(url, state)
    if dist.get_rank() == 0:
        path = Path(url, commit.parts[3].data)
        with open(path, "r+b") as f:
            f.seek(os.path.getsize(path) // 2)
            byte = f.read(1)
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte[0] ^ 8]))
    dist.barrier()
    target = sharded_state((1, 4, 1), zero=True)
    try:
        load(url, commit, target)
    except ManifestError as e:
        return str(e), spoilt(target)
    return "", False


def test_damage_that_one_rank_reads_spoils_every_ranks_state(tmp_path):
    results = ran(run_ranks(_one_rank_reads_damage, 4, tmp_path_for(tmp_path, "s"), f"{tmp_path}/run"))
    for text, is_spoilt in results:
        assert "rank 3: " in text
        assert re.search(r"rank-00003\.bin: .*, block \d+ is damaged", text)
        assert is_spoilt
