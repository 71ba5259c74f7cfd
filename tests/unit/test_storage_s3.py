"""An S3 run directory (moto's server): exclusive commits among racing writers, and a checkpoint's round trip."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
import s3fs
import torch
from fsspec.asyn import sync_wrapper
from s3_server import s3_bucket

from storage import s3
from storage.commits import CommitConflict, create_commit, delete_checkpoint, list_commits, prune, read_commit, verify
from storage.durable import CheckpointFailed, load, write_part
from storage.manifest import Commit, ManifestError, generation_dir
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


def test_what_a_killed_save_left_in_the_temporary_folder_goes_with_the_next(tmp_path, monkeypatch):
    """Of a store that takes no parts from memory."""
    other = f"memory://{tmp_path}/run"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = scratch_folder(other, 0) / "step-00000024" / "part.bin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of it")
    assert verify(other, save(other, 25)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_part_goes_in_several_pieces_and_returns(url, monkeypatch):
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    state = make_state(40)
    state.tensors |= {f"w{i}": torch.randn(700, 1000 + i) for i in range(5)}
    part = write_part(url, state, step=40, epoch=1, generation=1, rank=0)
    commit = Commit(run="r", step=40, epoch=1, generation=1, mesh={}, parts=(part,), versions={})
    assert part.data_bytes > 3 * s3.PART_BYTES
    assert verify(url, commit) == []
    assert part.data in uploads(url, "complete")


def uploads(url: str, kind: str) -> str:
    """Keys of the bucket that are complete objects made of several parts, or uploads that nobody has ended."""
    client = boto3.client("s3")
    if kind == "open":
        return str([entry["Key"] for entry in client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])])
    found = client.list_objects_v2(Bucket="bucket").get("Contents", [])
    return str([entry["Key"] for entry in found if "-" in entry["ETag"]])


@pytest.mark.parametrize("failing", ["upload_part", "complete_multipart_upload"])
def test_an_upload_that_fails_leaves_no_object_and_no_parts(url, monkeypatch, failing):
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    state = make_state(41)
    state.tensors["large"] = torch.zeros(5_000_000)
    actual = s3fs.S3FileSystem._call_s3

    async def broken(self, method, *args, **kwargs):
        if method == failing and kwargs.get("PartNumber", 2) == 2:
            raise OSError(5, "Input/output error")
        return await actual(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", broken)
    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", sync_wrapper(broken))
    with pytest.raises(CheckpointFailed, match="Input/output error"):
        write_part(url, state, step=41, epoch=1, generation=1, rank=0)
    monkeypatch.undo()
    assert list_names(url, generation_dir(41, 1, 1)) == []
    assert uploads(url, "open") == "[]"


def test_uploads_that_were_cut_off_are_ended_after_the_grace_period(url, monkeypatch):
    client = boto3.client("s3")
    ours, others = f"run/{generation_dir(50, 1, 1)}/rank-00000.bin", "elsewhere/rank-00000.bin"
    for key in (ours, others):
        client.create_multipart_upload(Bucket="bucket", Key=key)
    with monkeypatch.context() as patience:
        patience.setattr(s3, "STALE_UPLOAD_S", 3e9)  # moto's uploads all began in 2010
        prune(url, 0)
    assert ours in uploads(url, "open"), "it may be under way"
    prune(url, 0)
    assert uploads(url, "open") == str([others])


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
