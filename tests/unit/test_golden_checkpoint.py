"""A checkpoint that an earlier Shepherd has written is read, bit for bit, for ever after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from golden_checkpoint import EPOCH, GENERATION, RANKS, STEP, full_tensors, rank_state, rng
from parallel_pool import run_ranks

from storage.commits import list_commits, read_commit, state_digest, verify
from storage.durable import load
from storage.index import Index
from storage.manifest import Commit, ManifestError, commit_name
from storage.state import TrainState, local_tensor

FOLDER = str(Path(__file__).parent.parent / "golden" / "checkpoint-format-2")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    blanks = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in blanks.values():
        local_tensor(tensor).view(torch.uint8).zero_() if tensor.ndim else tensor.zero_()
    return blanks


def test_the_record_is_read():
    assert list_commits(FOLDER) == [STEP]
    commit = read_commit(FOLDER, STEP)
    assert (commit.run, commit.step, commit.epoch, commit.generation) == ("golden", STEP, EPOCH, GENERATION)
    assert commit.mesh == {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "tp": 1}
    assert verify(FOLDER, commit) == []


def test_the_digest_of_its_content_stays_what_it_was():
    assert (
        state_digest(FOLDER, read_commit(FOLDER, STEP))
        == "b714a75c7307632fc882894f622acc8eeaa1fa88ba4625ea4c503c3768a037c9"
    )


def test_one_process_reads_every_value():
    expected = full_tensors()
    state = TrainState(0, blank(expected), {})
    load(FOLDER, read_commit(FOLDER, STEP), state)
    assert state.step == STEP
    for name, tensor in expected.items():
        assert bits(state.tensors[name]) == bits(tensor), name


def _load() -> list[str]:
    rank = dist.get_rank()
    expected = rank_state(rank)
    state = TrainState(0, blank(expected.tensors), {"rng": torch.zeros_like(rng(rank))})
    load(FOLDER, read_commit(FOLDER, STEP), state)
    wrong = [n for n, t in expected.tensors.items() if bits(local_tensor(t)) != bits(local_tensor(state.tensors[n]))]
    return wrong + ([] if torch.equal(state.per_rank["rng"], rng(rank)) else ["rng"])


def test_two_ranks_read_their_shards_and_their_own_values(tmp_path):
    assert run_ranks(_load, RANKS, tmp_path) == [[]] * RANKS


def test_the_padding_and_order_of_its_files_are_what_the_format_says():
    for part in read_commit(FOLDER, STEP).parts:
        index = Index.from_json(Path(FOLDER, part.index).read_bytes())
        raw = Path(FOLDER, part.data).read_bytes()
        assert len(raw) == index.data_bytes == part.data_bytes
        end = 0
        for chunk in index.chunks:
            assert chunk.file_offset == -(-end // 4096) * 4096, "each chunk begins on the next page"
            assert not any(raw[end : chunk.file_offset])
            end = chunk.file_offset + chunk.n_bytes
        assert len(raw) == -(-end // 4096) * 4096


@pytest.mark.parametrize("version", [1, 3, 99])
def test_another_version_is_refused_with_what_reads_it(tmp_path, version):
    shutil.copytree(FOLDER, tmp_path / "run")
    commit = read_commit(FOLDER, STEP)
    fix = "use Shepherd 0.2, which wrote it" if version == 1 else "or a newer one"
    for name, read in ((commit.parts[0].index, Index.from_json), (commit_name(STEP), Commit.from_json)):
        document = json.loads((tmp_path / "run" / name).read_bytes())
        document["format_version"] = version
        with pytest.raises(ManifestError, match=f"has format_version {version}, this Shepherd reads 2: .*{fix}"):
            read(json.dumps(document).encode())
