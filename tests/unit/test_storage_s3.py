"""An S3 run directory (moto's server): exclusive commits among racing writers, and a checkpoint's round trip."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import s3fs
import torch
from s3_server import s3_bucket

from storage.commits import CommitConflict, create_commit, delete_checkpoint, list_commits, read_commit, verify
from storage.durable import CheckpointFailed, load, write_part
from storage.manifest import Commit, ManifestError
from storage.state import TrainState
from storage.urls import StoreError, list_names, probe, read_bytes, scratch_folder, write_exclusive


@pytest.fixture(scope="module")
def url():
    with s3_bucket() as bucket:
        yield f"{bucket}/run"


def make_state(step: int) -> TrainState:
    g = torch.Generator().manual_seed(step)
    tensors = {"w": torch.randn(1200, 1000, generator=g), "half": torch.randn(7, 3, generator=g).bfloat16()}
    return TrainState(step, tensors, {"rng": torch.arange(8.0)})


def save(url: str, step: int, generation: int = 1) -> Commit:
    part = write_part(url, make_state(step), step=step, epoch=1, generation=generation, rank=0)
    return Commit(run="r", step=step, epoch=1, generation=generation, mesh={}, parts=(part,), versions={})


def test_probe_accepts_a_bucket_and_names_a_missing_one(url):
    probe(url)
    assert list_names("s3://bucket", "run") == []
    with pytest.raises(StoreError, match=r"s3://missing/run.*bucket that exists"):
        probe("s3://missing/run")


def test_a_record_is_created_once(url):
    assert write_exclusive(url, "epochs/1", b"mine")
    assert write_exclusive(url, "epochs/1", b"mine")
    assert not write_exclusive(url, "epochs/1", b"other")
    assert read_bytes(url, "epochs/1") == b"mine"
    assert list_names(url, "epochs") == ["1"]


def test_of_racing_writers_exactly_one_commits(url):
    def race(epoch: int) -> bool:
        try:
            return create_commit(
                url, Commit(run="r", step=1, epoch=epoch, generation=1, mesh={}, parts=(), versions={})
            )
        except CommitConflict:
            return False

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(race, range(16)))
    assert won.count(True) == 1
    assert read_commit(url, 1).epoch == won.index(True)


def test_a_checkpoint_returns_and_is_deleted(url):
    commit = save(url, 20)
    assert list_commits(f"{url}/other") == []
    create_commit(url, commit)
    assert create_commit(url, commit)
    restored = TrainState(
        0, {k: torch.zeros_like(v) for k, v in make_state(20).tensors.items()}, {"rng": torch.zeros(8)}
    )
    load(url, read_commit(url, 20), restored)
    assert all(torch.equal(restored.tensors[k], v) for k, v in make_state(20).tensors.items())
    assert torch.equal(restored.per_rank["rng"], torch.arange(8.0))
    assert verify(url, commit) == []
    with pytest.raises(CheckpointFailed, match="exists"):
        save(url, 20)
    delete_checkpoint(url, 20)
    assert 20 not in list_commits(url)
    assert list_names(url, commit.parts[0].data.rsplit("/", 1)[0]) == []


def test_what_a_killed_save_left_in_the_temporary_folder_goes_with_the_next(url, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = scratch_folder(url, 0) / "step-00000024" / "part.bin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of it")
    save(url, 25)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_object_is_found(url):
    commit = save(url, 30)
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    key = f"bucket/run/{commit.parts[0].data}"
    raw = bytearray(fs.cat_file(key))
    raw[2_000_000] ^= 1
    fs.pipe_file(key, bytes(raw))
    target = TrainState(0, {k: torch.zeros_like(v) for k, v in make_state(30).tensors.items()}, {"rng": torch.zeros(8)})
    with pytest.raises(ManifestError, match=r"rank-00000\.bin: w at \(0, 0\), block 1 "):
        load(url, commit, target)
    assert not any(tensor.any() for tensor in target.tensors.values())
