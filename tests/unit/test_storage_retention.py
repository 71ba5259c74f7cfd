"""Deleting checkpoints, and what saves that were cut off have left: on a disk and on an object store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_server import s3_bucket

from storage import commits
from storage.commits import create_commit, delete_checkpoint, list_commits, prune, read_commit, verify
from storage.durable import write_part
from storage.manifest import COMMIT_DIR, DATA_DIR, Commit, commit_name, generation_dir
from storage.state import TrainState
from storage.urls import list_folders, list_names, locate, write_exclusive


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["disk", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def write(url: str, step: int, generation: int = 1, *, commit: bool = True) -> str:
    """One attempt to save `step`; the name of its folder."""
    state = TrainState(step, {"w": torch.full((4, 4), float(step))}, {})
    part = write_part(url, state, step=step, epoch=1, generation=generation, rank=0)
    if commit:
        create_commit(
            url, Commit(run="r", step=step, epoch=1, generation=generation, mesh={}, parts=(part,), versions={})
        )
    return generation_dir(step, 1, generation).removeprefix(f"{DATA_DIR}/")


def test_a_deletion_that_was_cut_off_is_completed(url, monkeypatch):
    folders = [write(url, step) for step in (1, 2)]
    remove = commits.remove

    def cut_off(url: str, name: str) -> None:
        remove(url, name)
        raise OSError("the controller dies here")

    with monkeypatch.context() as patch:
        patch.setattr(commits, "remove", cut_off)
        with pytest.raises(OSError, match="dies here"):
            delete_checkpoint(url, 1)
    assert list_commits(url) == [2]
    assert list_folders(url, DATA_DIR) == folders
    delete_checkpoint(url, 1)
    assert prune(url, 1) == [f"{DATA_DIR}/{folders[0]}"]
    assert list_folders(url, DATA_DIR) == folders[1:]
    assert verify(url, read_commit(url, 2)) == []
    delete_checkpoint(url, 1)
    assert prune(url, 1) == []


def test_only_what_no_commit_names_is_pruned_and_only_of_old_steps(url):
    kept = [write(url, 2, 3), write(url, 4, 3), write(url, 5, 4, commit=False)]
    write(url, 1, 1, commit=False)
    write(url, 2, 1, commit=False)
    write(url, 3, 2, commit=False)
    write_exclusive(url, f"{DATA_DIR}/notes/readme.txt", b"somebody's own")
    assert len(prune(url, 4)) == 3
    assert list_folders(url, DATA_DIR) == sorted([*kept, "notes"])
    assert list_commits(url) == [2, 4]
    for step in (2, 4):
        assert verify(url, read_commit(url, step)) == []


def test_data_of_a_damaged_record_stays_for_people_to_look_at(url):
    folder = write(url, 1)
    store = locate(url)
    store.fs.pipe_file(store.path(commit_name(1)), b"{}")
    assert prune(url, 9) == []
    assert list_folders(url, DATA_DIR) == [folder]
    delete_checkpoint(url, 1)
    assert list_names(url, COMMIT_DIR) == []
    assert prune(url, 9) == [f"{DATA_DIR}/{folder}"]


def test_nothing_is_pruned_where_nothing_was_saved(url: str) -> None:
    assert prune(url, 9) == []


def test_a_folder_that_cannot_be_removed_is_told(tmp_path, monkeypatch):
    write(str(tmp_path), 1, commit=False)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(OSError, match="Read-only"):
        prune(str(tmp_path), 1)
