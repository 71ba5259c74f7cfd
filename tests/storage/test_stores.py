"""One suite for every kind of store: a disk, and S3 as moto, LocalStack and Ceph's gateway serve it.

They differ where it matters: moto and LocalStack take any credentials, Ceph checks them; Ceph ignores a condition on a
multipart upload, and s3fs tells its refusal of a conditional PUT as OSError(22). rclone ignores all conditions: a store
that a run must refuse.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import s3fs
import servers
import torch
from states import SENTINEL, blank, checkpointer, commit_of, refuses, same, save, served, state_of

from storage.commits import CommitConflict, create_commit, delete_checkpoint, list_commits, prune, read_commit, verify
from storage.durable import CheckpointFailed, load, write_part
from storage.manifest import COMMIT_DIR, DATA_DIR
from storage.state import TrainState
from storage.urls import (
    MAX_RECORD_BYTES,
    StoreError,
    list_folders,
    list_names,
    locate,
    probe,
    read_bytes,
    remove,
    write_exclusive,
)

WRITERS = 32


@dataclass(frozen=True)
class Store:
    kind: str
    root: str
    checks_credentials: bool


@contextmanager
def disk(folder: Path) -> Iterator[str]:
    yield str(folder / "run")


KINDS = {"disk": disk, "moto": servers.moto, "localstack": servers.localstack, "ceph": servers.ceph_rgw}
LONG = ("localstack", "ceph")


@pytest.fixture(scope="module", params=[pytest.param(k, marks=pytest.mark.long) if k in LONG else k for k in KINDS])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with KINDS[request.param](tmp_path_factory.mktemp(request.param)) as root:
        yield Store(request.param, root, request.param == "ceph")


@pytest.fixture
def url(store: Store, request: pytest.FixtureRequest) -> str:
    """A run directory of the test's own."""
    return f"{store.root}/{abs(hash(request.node.name))}"


def test_a_probe_accepts_the_store_and_leaves_nothing(store, url):
    probe(url)
    assert list_names(url, "x") == []
    if store.kind != "disk":
        assert not locate(url).fs.exists(locate(url).root)
        with pytest.raises(StoreError, match=r"s3://missing-bucket/run.*bucket that exists"):
            probe("s3://missing-bucket/run")


def test_a_record_is_created_once(url):
    assert write_exclusive(url, "epochs/1", b"mine")
    assert write_exclusive(url, "epochs/1", b"mine")
    assert not write_exclusive(url, "epochs/1", b"other")
    assert read_bytes(url, "epochs/1") == b"mine"
    assert list_names(url, "epochs") == ["1"]
    remove(url, "epochs/1")
    remove(url, "epochs/1")
    with pytest.raises(FileNotFoundError):
        read_bytes(url, "epochs/1")


@pytest.mark.long
def test_the_largest_record_is_one_conditional_request(url):
    """A multipart upload would overwrite what exists on Ceph, without a word."""
    first, second = bytes(MAX_RECORD_BYTES), b"\1" * MAX_RECORD_BYTES
    assert write_exclusive(url, "large", first)
    assert not write_exclusive(url, "large", second)
    assert read_bytes(url, "large") == first


def test_of_racing_writers_exactly_one_commits(url):
    def race(generation: int) -> bool:
        try:
            return create_commit(url, commit_of([], 1, generation))
        except CommitConflict:
            return False

    for trial in range(3):
        with ThreadPoolExecutor(WRITERS) as pool:
            won = list(pool.map(race, range(WRITERS)))
        assert won.count(True) == 1, trial
        assert read_commit(url, 1).generation == won.index(True)
        delete_checkpoint(url, 1)


def test_a_generation_saves_a_step_once(url):
    commit = save(url, 19)
    with pytest.raises(CheckpointFailed, match="exists"):
        save(url, 19)
    restored = blank()
    load(url, commit, restored)
    assert same(restored, state_of(19))


def test_checkpoints_return_and_are_deleted(url):
    assert list_commits(url) == []
    commits = [save(url, step) for step in (19, 20)]
    assert create_commit(url, commits[1])
    assert served(url) == [19, 20]
    with pytest.raises(CheckpointFailed, match="exists"):
        save(url, 20)
    delete_checkpoint(url, 20)
    assert served(url) == [19]
    assert list_names(url, commits[1].parts[0].data.rsplit("/", 1)[0]) == []
    write_part(url, TrainState(18, {"w": torch.zeros(9)}, {}), step=18, epoch=1, generation=1, rank=0)
    assert len(prune(url, 20)) == 1
    assert len(list_folders(url, DATA_DIR)) == 1
    assert served(url) == [19]


@pytest.mark.long
def test_a_part_of_many_megabytes_returns(url):
    """Larger than one request of an upload is; blocks are asked for in ranges."""
    state = TrainState(3, {"w": torch.arange(28_000_000, dtype=torch.float32)}, {})
    part = checkpointer(url).save(state)
    commit = commit_of([part], 3)
    create_commit(url, commit)
    restored = TrainState(0, {"w": torch.full((28_000_000,), float(SENTINEL))}, {})
    load(url, read_commit(url, 3), restored)
    assert torch.equal(restored.tensors["w"], state.tensors["w"])


@pytest.mark.parametrize("kind", ["data", "index", "commit"])
def test_damage_is_found(url, kind):
    commit = save(url, 30)
    store = locate(url)
    name = f"{COMMIT_DIR}/step-00000030.json" if kind == "commit" else getattr(commit.parts[0], kind)
    raw = bytearray(store.fs.cat_file(store.path(name)))
    raw[len(raw) // 3] ^= 1
    store.fs.pipe_file(store.path(name), bytes(raw))
    assert refuses(url, 30)
    if kind != "commit":
        assert any(name in problem for problem in verify(url, commit))


def test_credentials_are_the_environments_and_never_told(store, url, monkeypatch, caplog):
    """Neither right nor wrong ones stand in an error or in what is logged."""
    if store.kind == "disk":
        pytest.skip("a disk wants none")
    right = os.environ["AWS_SECRET_ACCESS_KEY"]
    s3fs.S3FileSystem.clear_instance_cache()
    told = []
    with caplog.at_level(logging.DEBUG), monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret-of-40-characters-012345678")
        try:
            probe(url)
        except StoreError:
            told.append(traceback.format_exc())
        s3fs.S3FileSystem.clear_instance_cache()
    assert bool(told) == store.checks_credentials
    with caplog.at_level(logging.DEBUG):
        probe(url)
        save(url, 1)
    for text in (caplog.text, *told):
        assert "a-wrong-secret" not in text
        assert len(right) < 8 or right not in text


@pytest.mark.long
def test_a_probe_refuses_a_store_that_ignores_conditions(tmp_path):
    with servers.rclone(tmp_path) as root:
        url = f"{root}/run"
        assert write_exclusive(url, "a", b"1")
        assert write_exclusive(url, "a", b"2"), "two writers win: that is what makes it hostile"
        with pytest.raises(StoreError, match=r"created twice.*Fix: use a store with conditional writes"):
            probe(url)
