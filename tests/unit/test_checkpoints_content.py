"""What is inside checkpoints: the comparison of two of them, and what a restore on another mesh would read."""

from __future__ import annotations

import json
import math
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import xxhash
from llama_checkpoints import CONFIG, make_state, save
from parallel_pool import run_ranks
from rank_sessions import config_of

from storage import blocks, windows
from storage.blocks import StoreSource
from storage.commits import create_commit, read_commit
from storage.diff import Difference, compare
from storage.durable import load, write_part
from storage.index import Index
from storage.manifest import Commit, ManifestError, RankPart, commit_name
from storage.reshard import Mesh, boxes, plan
from storage.state import TrainState
from storage.windows import PER_RANK, Saved, open_checkpoint
from trainer.contract import OptimizerConfig, ParallelConfig
from trainer.optim import build_optimizer, train_state
from trainer.parallel import build_mesh, build_stage

MESHES = [
    Mesh(dp_shard=2, tp=2),
    Mesh(pp=2, dp_shard=2),
    Mesh(dp_replicate=2, tp=2),
    Mesh(dp_shard=4),
]


def opened(url: str, step: int) -> Saved:
    return open_checkpoint(url, read_commit(url, step))


def differences(a: Saved, b: Saved) -> dict[str, Difference]:
    """Without the tensors that are equal."""
    return {d.fqn: d for d in compare(a, b) if d.kind != "equal"}


# --- diff ------------------------------------------------------------------------------------------------------------


def test_equal_states_are_equal_whatever_run_and_generation_wrote_them_and_nothing_is_read(tmp_path, monkeypatch):
    save(str(tmp_path / "a"), make_state(3))
    save(str(tmp_path / "b"), make_state(3), generation=4)
    monkeypatch.setattr(windows, "_read", lambda *_: pytest.fail("digests tell"))
    found = list(compare(opened(str(tmp_path / "a"), 3), opened(str(tmp_path / "b"), 3)))
    assert {d.kind for d in found} == {"equal"} and len(found) == 91


def test_differences_are_counted_and_measured_as_torch_does(tmp_path):
    def states() -> TrainState:
        g = torch.Generator().manual_seed(1)
        return TrainState(
            1,
            {
                "f32": torch.randn(300, 71, generator=g),
                "bf16": torch.randn(33, 5, generator=g).bfloat16(),
                "f64": torch.randn(40, generator=g).double(),
                "i64": torch.arange(9),
                "flags": torch.tensor([True, False, True]),
                "scalar": torch.randn((), generator=g),
                "f8": torch.randn(16, generator=g).to(torch.float8_e4m3fn),
                "nan": torch.tensor([1.0, math.nan, math.inf]),
                "zero": torch.tensor([0.0, 1.0]),
                "empty": torch.zeros(0, 3),
                "shape": torch.zeros(4),
                "dtype": torch.zeros(4),
                "gone": torch.zeros(1),
            },
            {"rng": torch.arange(4, dtype=torch.uint8)},
        )

    before, after = states(), states()
    after.tensors["f32"][17:200:7, 3:9] += torch.randn(27, 6, generator=torch.Generator().manual_seed(2))
    after.tensors["bf16"][30, 2] *= -3
    after.tensors["f64"][39] += 1e-300
    after.tensors["i64"][2:4] += 1000
    after.tensors["flags"][1] = True
    after.tensors["scalar"] += 1
    after.tensors["f8"].view(torch.uint8)[5] ^= 64
    after.tensors["nan"][0] = math.nan
    after.tensors["zero"][0] = -0.0
    after.tensors |= {"shape": torch.zeros(2, 2), "dtype": torch.zeros(4).double(), "new": torch.zeros(1)}
    del after.tensors["gone"]
    after.per_rank["rng"][3] = 9
    save(str(tmp_path / "a"), before), save(str(tmp_path / "b"), after)
    found = differences(opened(str(tmp_path / "a"), 1), opened(str(tmp_path / "b"), 1))
    kinds = {fqn: d.kind for fqn, d in found.items()}
    assert {fqn: kind for fqn, kind in kinds.items() if kind != "values"} == {
        "shape": "shape", "dtype": "dtype", "new": "only b", "gone": "only a",
    }  # fmt: skip
    for fqn in ("f32", "bf16", "i64", "flags", "scalar", "zero"):
        ours, theirs = before.tensors[fqn], after.tensors[fqn]
        assert found[fqn].n_elements == ours.numel()
        assert found[fqn].max_abs_difference == (ours.double() - theirs.double()).abs().max().item(), fqn
    assert {fqn: found[fqn].n_differing for fqn in kinds if kinds[fqn] == "values"} == {
        "f32": 27 * 6, "bf16": 1, "i64": 2, "flags": 1, "scalar": 1, "f8": 1, "nan": 1, "zero": 1,
        "rank/00000/rng": 1,
    }  # fmt: skip
    assert (found["nan"].max_abs_difference, found["f8"].max_abs_difference) == (None, None)
    assert found["zero"].max_abs_difference == 0.0
    assert "f64" not in found, "1e-300 is lost in a double of about one"


def test_memory_of_a_comparison_is_bounded_by_the_window(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_BYTES", 1 << 18)
    monkeypatch.setattr(blocks, "READ_BLOCKS", 1)
    state = TrainState(1, {"w": torch.zeros(10_000, 800)}, {})
    save(str(tmp_path / "a"), state)
    state.tensors["w"] += 1
    save(str(tmp_path / "b"), state)
    a, b = opened(str(tmp_path / "a"), 1), opened(str(tmp_path / "b"), 1)
    peaks = []
    for _ in range(3):  # the least counts: other tests may have left threads that are just ending
        tracemalloc.start()
        try:
            found = differences(a, b)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert found["w"].n_differing == state.tensors["w"].numel() == 8_000_000
    assert min(peaks) < 12 << 20, peaks


def test_chunks_that_do_not_tile_a_tensor_are_refused(tmp_path):
    commit = save(str(tmp_path), make_state(1))
    path = tmp_path / commit.parts[0].index
    document = json.loads(path.read_text())
    document["chunks"] = [c for c in document["chunks"] if c["fqn"] != "model/norm.weight"] + [
        {**c, "sizes": [40], "n_bytes": 160} for c in document["chunks"] if c["fqn"] == "model/norm.weight"
    ]
    path.write_text(json.dumps(document))
    part = replace(commit.parts[0], index_digest=xxhash.xxh3_128_hexdigest(path.read_bytes()))
    (tmp_path / commit_name(1)).write_bytes(replace(commit, parts=(part,)).to_json())
    with pytest.raises(ManifestError, match=r"model/norm\.weight: chunks hold 40 of 48 elements"):
        opened(str(tmp_path), 1)


# --- meshes ----------------------------------------------------------------------------------------------------------


READ: Counter[str] = Counter()
"""Bytes that a restore reads of each data file on this rank."""


def counting(read: Callable[..., int]) -> Callable[..., int]:
    def counted(self: StoreSource, index: Index, start: int, into: memoryview) -> int:
        """Without what lies between chunks."""
        ends = [(chunk.file_offset, chunk.file_offset + chunk.n_bytes) for chunk in index.chunks]
        with LOCK:
            READ[index.data] += sum(max(0, min(e, start + len(into)) - max(b, start)) for b, e in ends)
        return read(self, index, start, into)

    return counted


LOCK = threading.Lock()


def trainers_state(mesh: Mesh, step: int) -> TrainState:
    """The initial state as the trainer has it on this mesh; the same for all meshes."""
    config = replace(config_of(ParallelConfig(**asdict(mesh), microbatches=2)), model=CONFIG)
    device_mesh = build_mesh(config.parallel, "cpu", timedelta(seconds=config.collective_timeout_s))
    stage = build_stage(config, device_mesh)
    state = train_state(stage.module, build_optimizer(stage.module, OptimizerConfig()), step)
    state.per_rank["rng"] = torch.full((3,), float(dist.get_rank()))
    return state


def save_and_restore_on_all_meshes(folder: str) -> dict[tuple[int, int], dict[str, int]]:
    """What this rank reads, by the mesh that saved and the one that restores."""
    states = [trainers_state(mesh, 5) for mesh in MESHES]
    for number, mesh in enumerate(MESHES):
        part = write_part(f"{folder}/{number}", states[number], step=5, epoch=1, generation=1, rank=dist.get_rank())
        parts: list[RankPart] = [part] * dist.get_world_size()
        dist.all_gather_object(parts, part)
        if dist.get_rank() == 0:
            commit = Commit(run="r", step=5, epoch=1, generation=1, mesh=asdict(mesh), parts=tuple(parts), versions={})
            create_commit(f"{folder}/{number}", commit)
    dist.barrier()
    StoreSource.read = counting(StoreSource.read)  # type: ignore[method-assign]
    found = {}
    for target, state in enumerate(states):
        for source in {(target + 1) % len(MESHES), (target + 2) % len(MESHES)}:
            READ.clear()
            load(f"{folder}/{source}", read_commit(f"{folder}/{source}", 5), state)
            found[source, target] = dict(READ)
    return found


@pytest.fixture(scope="module")
def on_meshes(tmp_path_factory) -> tuple[Path, list[dict[tuple[int, int], dict[str, int]]]]:
    """The same state, saved by four ranks on each of MESHES, and what each rank read when it was restored on others."""
    folder = tmp_path_factory.mktemp("meshes")
    ranks = run_ranks(save_and_restore_on_all_meshes, 4, tmp_path_factory.mktemp("store"), str(folder))
    assert not any(isinstance(rank, Exception) for rank in ranks), ranks
    return folder, ranks


@pytest.fixture
def saved_on_meshes(on_meshes) -> Path:
    return on_meshes[0]


@pytest.mark.parametrize("number", range(len(MESHES)), ids=[str(asdict(mesh)) for mesh in MESHES])
def test_the_assumed_cuts_are_the_trainers(saved_on_meshes, number):
    """The boxes that a checkpoint holds are those that the plan assumes of its mesh; of replicas one is saved."""
    saved, mesh = opened(str(saved_on_meshes / str(number)), 5), MESHES[number]
    tensors = {fqn: tensor for fqn, tensor in saved.tensors.items() if not fqn.startswith(PER_RANK)}
    held = {
        (fqn, chunk.offsets, chunk.sizes)
        for fqn, tensor in tensors.items()
        for _, chunk in tensor.parts
        if chunk.n_bytes
    }
    assumed = {
        (fqn, offsets, sizes)
        for stage in range(mesh.pp)
        for shard in range(mesh.dp_shard)
        for tp in range(mesh.tp)
        for fqn, (offsets, sizes) in boxes(tensors, mesh, stage, shard, tp).items()
        if math.prod(sizes)
    }
    assert held == assumed


def test_a_plan_is_what_a_restore_reads(on_meshes):
    folder, ranks = on_meshes
    assert len(ranks[0]) == 2 * len(MESHES)
    for source, target in ranks[0]:
        made = plan(opened(str(folder / str(source)), 5), MESHES[target])
        assert made.problems == () and made.per_rank_restored
        assert [rank.files for rank in made.ranks] == [rank[source, target] for rank in ranks], (source, target)


def test_one_state_is_equal_across_meshes(saved_on_meshes):
    everything = [opened(str(saved_on_meshes / str(number)), 5) for number in range(len(MESHES))]
    for other in everything[1:]:
        assert differences(everything[0], other) == {}


def test_the_ranks_own_tensors_are_compared_between_meshes_of_one_size_only(saved_on_meshes, tmp_path):
    four = opened(str(saved_on_meshes / "0"), 5)
    tensors = {
        fqn: torch.cat([torch.from_numpy(w.view("f4").copy()) for w in windows.windows(four, tensor)])
        for fqn, tensor in four.tensors.items()
        if not fqn.startswith(PER_RANK)
    }
    save(str(tmp_path), TrainState(5, tensors, {"rng": torch.zeros(3)}))
    assert differences(four, opened(str(tmp_path), 5)) == {}


def test_a_plan_for_more_ranks_than_rows_and_one_that_cannot_be(saved_on_meshes):
    saved = opened(str(saved_on_meshes / "0"), 5)
    state_bytes = plan(saved, Mesh()).state_bytes
    one = plan(saved, Mesh())
    assert (one.read_bytes, one.per_rank_restored) == (state_bytes, False)
    many = plan(saved, Mesh(dp_replicate=3, dp_shard=400))
    assert len(many.ranks) == 1200
    assert sum(rank.state_bytes for rank in many.ranks) == 3 * state_bytes
    assert many.read_bytes == state_bytes
    assert all(rank.read_bytes + rank.received_bytes >= rank.state_bytes for rank in many.ranks)
    assert "pp = 4: each stage needs a layer; at most 3" in plan(saved, Mesh(pp=4)).problems
    (problem,) = plan(saved, Mesh(tp=9)).problems
    assert problem.startswith("tp = 9: must divide dimension")
