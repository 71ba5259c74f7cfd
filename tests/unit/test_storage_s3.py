"""Parts on their way to S3 (moto's server): in several pieces, cut off, ended. For every store: tests/storage."""

from __future__ import annotations

import tempfile
import threading

import boto3
import pytest
import s3fs
import torch
from fsspec.asyn import sync_wrapper
from s3_server import s3_bucket

from storage import s3
from storage.commits import prune, verify
from storage.durable import CheckpointFailed, save_part, write_part
from storage.durable_write import Writer
from storage.manifest import Commit, generation_dir
from storage.state import TrainState
from storage.urls import list_names, scratch_folder


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


def test_an_upload_that_is_abandoned_sends_no_further_part(url, monkeypatch):
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3, "CONCURRENCY", 1)
    state, abandoned, sent = make_state(42), threading.Event(), []
    state.tensors["large"] = torch.zeros(5_000_000)
    actual = s3fs.S3FileSystem._call_s3

    async def counted(self, method, *args, **kwargs):
        if method == "upload_part":
            sent.append(kwargs["PartNumber"])
            abandoned.set()
        return await actual(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", sync_wrapper(counted))
    writer = Writer(url, step=42, epoch=1, generation=1, rank=0, abandoned=abandoned)
    with pytest.raises(CheckpointFailed, match="abandoned"):
        save_part(writer, state, 0)
    writer.linger()
    assert sent == [1]
    assert list_names(url, generation_dir(42, 1, 1)) == []
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
