"""The local disk tier: parts that a node keeps are read instead of the store, and never trusted for what they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_storage_durable import blank, commit_of, make_state, same

from storage import blocks, direct
from storage.checkpointer import Checkpointer
from storage.commits import create_commit, verify
from storage.index import Index
from storage.manifest import Commit, commit_name
from trainer.contract import Restore


@pytest.fixture
def node(tmp_path):
    """Makes a rank of a run, with this test's disk."""

    def make(generation: int = 1, keep: int = 2) -> Checkpointer:
        return Checkpointer(
            url=f"{tmp_path}/run", run="r", rank=0, world_size=1, epoch=1, generation=generation,
            ram_dir=f"{tmp_path}/ram", node="n", local_dir=f"{tmp_path}/disk", keep=keep,
        )  # fmt: skip

    return make


def saved(checkpointer: Checkpointer, url: str, step: int, generation: int = 1) -> Commit:
    commit = commit_of([checkpointer.save(make_state(step, seed=step))], step, generation)
    create_commit(url, commit)
    return commit


def restored(checkpointer: Checkpointer, step: int) -> bool:
    state = blank(make_state())
    checkpointer.restore(state, Restore(source="durable", step=step, commit=commit_name(step)))
    return same(state, make_state(step, seed=step))


def kept(tmp_path: Path, pattern: str) -> list[Path]:
    return sorted((tmp_path / "disk").rglob(pattern))


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the places that are read."""
    names: list[str] = []
    actual = blocks.StoreSource.read

    def read(self: blocks.StoreSource, index: Index, start: int, into: memoryview) -> int:
        names.append(self.name)
        return actual(self, index, start, into)

    monkeypatch.setattr(blocks.StoreSource, "read", read)
    return names


def test_a_part_is_kept_and_read_from_there(tmp_path, node, reads):
    url = f"{tmp_path}/run"
    commit = saved(node(), url, 5)
    assert kept(tmp_path, "rank-*.bin")[0].read_bytes() == Path(url, commit.parts[0].data).read_bytes()
    assert restored(node(2), 5)
    assert reads and all(name.startswith(f"{tmp_path}/disk") for name in reads)
    assert verify(url, commit) == []


@pytest.mark.parametrize("harm", ["flipped", "cut off", "foreign", "no index", "gone"])
def test_what_is_wrong_with_a_kept_part_does_no_harm(tmp_path, node, reads, harm):
    url = f"{tmp_path}/run"
    saved(node(), url, 5)
    saved(node(), url, 6)
    data, index = (kept(tmp_path, f"*00005*/rank-*.{kind}")[0] for kind in ("bin", "json"))
    raw = bytearray(data.read_bytes())
    if harm == "flipped":
        raw[len(raw) // 2] ^= 1
        data.write_bytes(raw)
    elif harm == "cut off":
        data.write_bytes(raw[: len(raw) // 2])
    elif harm == "foreign":
        other = [kept(tmp_path, f"*00006*/rank-*.{kind}")[0] for kind in ("bin", "json")]
        shutil.copy(other[0], data), shutil.copy(other[1], index)
    elif harm == "no index":
        index.write_bytes(index.read_bytes()[:100])
    else:
        data.unlink()
    assert restored(node(2), 5)
    assert url in reads, "the store has what the disk has not"


def test_the_newest_are_kept(tmp_path, node):
    for step in (5, 6, 7):
        saved(node(), f"{tmp_path}/run", step)
    assert [path.parent.name[:13] for path in kept(tmp_path, "rank-*.bin")] == ["step-00000006", "step-00000007"]


def test_a_disk_without_room_costs_the_copy_and_not_the_save(tmp_path, node, monkeypatch):
    actual = direct.write

    def full(path, *arguments):
        if path.is_relative_to(tmp_path / "disk"):
            raise OSError(28, "No space left on device")
        actual(path, *arguments)

    monkeypatch.setattr(direct, "write", full)
    commit = saved(node(), f"{tmp_path}/run", 5)
    assert verify(f"{tmp_path}/run", commit) == []
    assert kept(tmp_path, "rank-*") == []
    assert restored(node(2), 5)
