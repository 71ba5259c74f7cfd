"""A local run directory, killed or failed at every system call that can change it: one complete checkpoint serves.

The writer is cut at each call of a save; the controller at each of a commit, of one that replaces a damaged checkpoint,
and of a deletion. Afterwards a fresh reader finds the new checkpoint or those before it, bit for bit; what is left lies
where no record names it, goes with the next pruning, and is in nobody's way.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from states import checkpointer, commit_of, in_clean_process, refuses, save, served, state_of, write
from traced import Traced, trace

from orchestrator.runtime.checkpoints import _create as commit_as_the_controller
from storage.commits import create_commit, delete_checkpoint, list_commits, prune, read_commit
from storage.manifest import COMMIT_DIR, DATA_DIR, Commit, RankPart, generation_dir
from storage.urls import list_folders, write_exclusive

pytestmark = pytest.mark.timeout(900)

OLD, NEW = 5, 6
FAULTS = [errno.ENOSPC, errno.EIO]


@dataclass
class Act:
    """What is cut, in a folder that holds the checkpoint of OLD."""

    prepare: Callable[[str], Any]
    do: Callable[[str, Any], object]
    check: Callable[[str, Any, Traced], None]
    least_calls: int


def save_at_once(url: str, _: Any) -> None:
    part = checkpointer(url, generation=2).save(state_of(NEW))
    tell(url, part)


def save_in_the_background(url: str, _: Any) -> None:
    results: list[RankPart | Exception] = []
    storage = checkpointer(url, generation=2)
    storage.begin_save(state_of(NEW), None, results.append)
    storage.wait()
    if isinstance(results[0], Exception):
        raise results[0]
    tell(url, results[0])


def tell(url: str, part: RankPart) -> None:
    """What the worker reports, kept beside the run directory for the check of a save that has told success."""
    Path(url + ".told").write_bytes(commit_of([part], NEW, 2).to_json())


def check_save(url: str, _: Any, traced: Traced) -> None:
    assert served(url) == [OLD]
    if traced.returned:
        create_commit(url, Commit.from_json(Path(url + ".told").read_bytes()))
        assert served(url) == [OLD, NEW], "a save that told success"
        return
    save(url, NEW, generation=3)
    assert served(url) == [OLD, NEW], "the next save"
    prune(url, NEW)
    folders = {generation_dir(OLD, 1, 1), generation_dir(NEW, 1, 3)}
    assert {f"{DATA_DIR}/{name}" for name in list_folders(url, DATA_DIR)} == folders
    assert served(url) == [OLD, NEW]


def check_commit(url: str, commit: Commit, traced: Traced) -> None:
    steps = served(url)
    assert steps in ([OLD], [OLD, NEW])
    assert steps == [OLD, NEW] or not traced.returned, "a commit that told success is there"
    assert create_commit(url, commit)
    assert served(url) == [OLD, NEW]
    save(url, NEW + 1, generation=3)
    assert prune(url, NEW + 1) == []
    assert served(url) == [OLD, NEW, NEW + 1]


def damaged_and_replaced(url: str) -> Commit:
    """The checkpoint of NEW is committed and damaged, and a later generation has written another."""
    damage(Path(url, save(url, NEW).parts[0].data))
    return write(url, NEW, generation=2)


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[100] ^= 4
    path.write_bytes(raw)


def check_replacement(url: str, commit: Commit, traced: Traced) -> None:
    if NEW in list_commits(url) and read_commit(url, NEW).generation == 1:
        assert refuses(url, NEW)
        assert not traced.returned
    else:
        steps = served(url)
        assert steps in ([OLD], [OLD, NEW])
        assert steps == [OLD, NEW] or not traced.returned
    assert commit_as_the_controller(url, commit, 1, True) == 2, "the controller that comes after tries it again"
    prune(url, NEW)
    assert served(url) == [OLD, NEW]
    assert len(list_folders(url, DATA_DIR)) == 2


def delete(url: str, _: Any) -> None:
    delete_checkpoint(url, OLD)
    prune(url, OLD)


def check_deletion(url: str, _: Any, traced: Traced) -> None:
    steps = served(url)
    assert steps in ([NEW], [OLD, NEW]), "no half of one is seen, and the other stays"
    assert steps == [NEW] or not traced.returned
    delete(url, _)
    assert served(url) == [NEW]
    assert len(list_folders(url, DATA_DIR)) == 1


ACTS = {
    "save": Act(lambda url: None, save_at_once, check_save, 5),
    "background save": Act(lambda url: None, save_in_the_background, check_save, 5),
    "commit": Act(lambda url: write(url, NEW), lambda url, c: create_commit(url, c), check_commit, 3),
    "commit that replaces": Act(
        damaged_and_replaced, lambda url, c: commit_as_the_controller(url, c, 1, True), check_replacement, 5
    ),
    "deletion": Act(lambda url: save(url, NEW), delete, check_deletion, 3),
}


def run(act: Act, folder: Path, at: int | None = None, fault: int | None = None) -> Traced:
    """The act in a fresh copy of the folder, cut at call `at`, and what is found afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}.told").unlink(missing_ok=True)
    url = str(folder)
    save(url, OLD)
    prepared = act.prepare(url)
    traced = trace(lambda: act.do(url, prepared), folder, at, fault)
    where = f"call {at} of {traced.calls}, {traced}"
    assert "AssertionError" not in traced.error, where
    try:
        act.check(url, prepared, traced)
    except Exception as error:
        raise AssertionError(f"{error!r} after {where}") from error
    for commit in list_commits(url):
        assert not write_exclusive(url, f"{COMMIT_DIR}/step-{commit:08d}.json", b"other"), "no record is overwritten"
    return traced


def sweep(name: str, folder: Path, faults: list[int | None], stride: int = 1) -> dict[str, int]:
    """How many runs there were of each ending: each fault at every `stride`-th call, the second fault at the others."""
    act = ACTS[name]
    calls = run(act, folder).calls
    assert len(calls) >= act.least_calls, calls
    endings = {"calls": len(calls), "killed": 0, "raised": 0, "returned": 0}
    for first, fault in enumerate(faults):
        for at in range(first % stride, len(calls), stride):
            traced = run(act, folder, at, fault)
            assert len(traced.calls) > at, f"call {at} of {calls} was not met: {traced}"
            assert traced.killed == (fault is None), traced
            endings["killed" if traced.killed else "returned" if traced.returned else "raised"] += 1
            if traced.error:
                assert any(os.strerror(f) in traced.error for f in FAULTS), traced.error
    return endings


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: what a kill leaves does not depend on how long a disk takes to sync."""
    path = Path(f"/dev/shm/shepherd-test-{os.getpid()}-{random.randrange(1 << 32):x}")
    path.mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("name", ACTS)
def test_a_kill_at_every_system_call(name, folder, tally):
    endings = in_clean_process(sweep, name, folder / "run", [None])
    assert endings["killed"] == endings["calls"]
    tally("crash points", name, kills=endings["killed"])


@pytest.mark.parametrize("name", [name for name in ACTS if name != "background save"])
def test_a_full_or_a_failing_disk_at_every_system_call(name, folder, tally):
    check_failures(in_clean_process(sweep, name, folder / "run", FAULTS, 2), name, tally)


@pytest.mark.long
@pytest.mark.parametrize("name", ACTS)
def test_a_full_and_a_failing_disk_at_every_system_call(name, folder, tally):
    check_failures(in_clean_process(sweep, name, folder / "run", FAULTS), name, tally)


def check_failures(endings: dict[str, int], name: str, tally: Callable[..., None]) -> None:
    # A call whose failure changes nothing may be overlooked: such as removing a temporary name that is gone already.
    assert endings["raised"] > endings["returned"]
    tally("failing calls", name, raised=endings["raised"], returned=endings["returned"])
