"""Records under a URL: exclusive creation on honest and dishonest stores, listing, probing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from parallel_pool import CONTEXT

from storage import urls
from storage.commits import CommitConflict, create_commit, list_commits, read_commit
from storage.manifest import Commit, ManifestError, commit_name
from storage.urls import (
    SINGLE_WRITER,
    StoreError,
    drop_scratch,
    list_names,
    locate,
    make_scratch,
    probe,
    read_bytes,
    remove,
    scratch_folder,
    write_exclusive,
)


def make_commit(step: int = 3, epoch: int = 1) -> Commit:
    return Commit(run="r", step=step, epoch=epoch, generation=1, mesh={"tp": 1}, parts=(), versions={})


class Store(MemoryFileSystem):
    """A remote store in memory (each test its own), with the faults that real ones show."""

    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    cachable = False
    fault = ""

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        cls = type(self)
        if cls.fault == "ignores-create":
            mode = "overwrite"
        if cls.fault == "conflict-once":
            cls.fault = ""
            raise OSError(22, "ConditionalRequestConflict")
        if cls.fault == "down":
            raise ConnectionError("down")
        try:
            super().pipe_file(path, value, mode=mode)
        except FileExistsError as e:
            raise OSError(22, "Unknown") from e  # as s3fs reports a 412 of Ceph RGW
        if cls.fault == "lost-answer":
            raise TimeoutError("no answer")


@pytest.fixture
def faulty(monkeypatch):
    fsspec.register_implementation("faulty", Store, clobber=True)
    monkeypatch.setattr(Store, "protocol", "faulty")
    monkeypatch.setattr(
        Store, "_strip_protocol", classmethod(lambda cls, p: "/" + p.removeprefix("faulty://").strip("/"))
    )
    monkeypatch.setattr(Store, "store", {})
    monkeypatch.setattr(Store, "pseudo_dirs", [""])
    monkeypatch.setattr(urls, "CREATE_RETRY_S", 0.0)

    def use(fault: str) -> str:
        Store.fault = fault
        return "faulty://bucket/run"

    yield use
    Store.fault = ""


@pytest.fixture(params=["plain", "file", "remote"])
def url(request, tmp_path, faulty):
    return {"plain": str(tmp_path / "a" / "b"), "file": f"file://{tmp_path}/c", "remote": faulty("")}[request.param]


def test_a_record_is_created_once_and_never_changed(url):
    assert write_exclusive(url, "epochs/1", b"mine")
    assert write_exclusive(url, "epochs/1", b"mine")
    assert not write_exclusive(url, "epochs/1", b"other")
    assert read_bytes(url, "epochs/1") == b"mine"
    remove(url, "epochs/1")
    with pytest.raises(FileNotFoundError):
        read_bytes(url, "epochs/1")
    remove(url, "epochs/1")


def test_listing_shows_records_only(url):
    assert list_names(url, "journal") == []
    for name in ("journal/2", "journal/1", "journal/deep/3"):
        assert write_exclusive(url, name, b"x")
    assert list_names(url, "journal") == ["1", "2"]


def test_probe_accepts_an_honest_store_and_leaves_nothing(url):
    probe(url)
    store = locate(url)
    assert store.fs.find(store.root) == []


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", "."])
def test_names_cannot_leave_the_url(tmp_path, name):
    with pytest.raises(ValueError, match="relative path"):
        write_exclusive(str(tmp_path), name, b"")


def test_probe_names_a_store_that_lets_two_writers_win(faulty):
    with pytest.raises(StoreError, match=r"faulty://bucket/run.*created twice.*Fix: use a store with conditional"):
        probe(faulty("ignores-create"))


def test_probe_refuses_a_file_system_that_checks_and_then_writes(monkeypatch, faulty):
    monkeypatch.setattr(Store, "pipe_file", fsspec.AbstractFileSystem.pipe_file)
    with pytest.raises(StoreError, match="cannot create a file exclusively"):
        probe(faulty(""))


def test_a_store_that_lets_two_writers_win_serves_one_writer_who_asks_for_it(faulty):
    url = SINGLE_WRITER + faulty("ignores-create")
    probe(url)
    assert write_exclusive(url, "epochs/1", b"mine")
    assert write_exclusive(url, "epochs/1", b"mine")
    assert not write_exclusive(url, "epochs/1", b"yours")
    assert read_bytes(url, "epochs/1") == b"mine"
    assert list_names(url, "epochs") == ["1"]


def test_a_file_system_without_links_serves_one_writer_who_asks_for_it(tmp_path, monkeypatch):
    def no_links(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(urls.os, "link", no_links)
    with pytest.raises(StoreError, match="put single-writer:: before the URL"):
        probe(str(tmp_path))
    url = f"{SINGLE_WRITER}file://{tmp_path}/run"
    probe(url)
    assert write_exclusive(url, "epochs/1", b"mine")
    assert read_bytes(url, "epochs/1") == b"mine"
    assert list_names(url, "epochs") == ["1"]


@pytest.mark.parametrize("url", ["nosuch://x", f"{SINGLE_WRITER}nosuch://x", f"{SINGLE_WRITER}/mnt/run"])
def test_what_no_file_system_serves_is_refused(url):
    with pytest.raises(StoreError, match=r"no file system for nosuch://|stands before a URL"):
        urls.check_protocol(url)


def test_probe_names_an_unwritable_url():
    with pytest.raises(StoreError, match=r"'/proc/run'.*Fix: give run.url"):
        probe("/proc/run")


def test_probe_reports_an_unknown_protocol():
    with pytest.raises(StoreError, match=r"nosuch://x.*Fix"):
        probe("nosuch://x")


def test_a_create_whose_answer_is_lost_is_recognised(faulty):
    assert write_exclusive(faulty("lost-answer"), "a", b"1")


def test_a_conditional_conflict_is_tried_again(faulty):
    assert write_exclusive(faulty("conflict-once"), "a", b"1")


def test_a_store_that_is_down_is_an_error_after_a_bounded_number_of_tries(faulty):
    with pytest.raises(StoreError, match="5 tries"):
        write_exclusive(faulty("down"), "a", b"1")


def test_committing_again_is_the_same_commit_and_another_one_conflicts(url):
    assert create_commit(url, make_commit())
    assert create_commit(url, make_commit())
    with pytest.raises(CommitConflict, match="step 3"):
        create_commit(url, make_commit(epoch=2))
    assert read_commit(url, 3) == make_commit() == read_commit(url, commit_name(3))


def test_commits_are_listed_in_the_order_of_steps(url):
    for step in (12, 3, 100_000_000, 20):
        create_commit(url, make_commit(step))
    write_exclusive(url, "checkpoints/commits/step-xx.json", b"")
    assert list_commits(url) == [3, 12, 20, 100_000_000]
    assert list_commits(url + "/none") == []


def test_a_commit_under_another_name_is_refused(tmp_path):
    write_exclusive(str(tmp_path), commit_name(5), make_commit(3).to_json())
    with pytest.raises(ManifestError, match="step 3"):
        read_commit(str(tmp_path), 5)


def _racer(url: str, epoch: int, barrier, results) -> None:
    barrier.wait(30)
    try:
        results.put((epoch, create_commit(url, make_commit(epoch=epoch))))
    except CommitConflict:
        results.put((epoch, False))


def test_of_racing_processes_exactly_one_commits(tmp_path):
    for trial in range(3):
        url = str(tmp_path / str(trial))
        barrier, results = CONTEXT.Barrier(6), CONTEXT.Queue()
        racers = [CONTEXT.Process(target=_racer, args=(url, epoch, barrier, results)) for epoch in range(6)]
        for racer in racers:
            racer.start()
        outcome = [results.get(timeout=60) for _ in racers]
        for racer in racers:
            racer.join(30)
        winners = [epoch for epoch, won in outcome if won]
        assert len(winners) == 1
        assert read_commit(url, 3).epoch == winners[0]
        assert list_names(url, "checkpoints/commits") == ["step-00000003.json"]


def test_a_reader_never_sees_a_part_of_a_record(tmp_path):
    url, seen = str(tmp_path), []
    contents = [bytes([n]) * 200_000 for n in range(60)]
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.extend(read_bytes(url, f"r/{name}") for name in list_names(url, "r")[-3:])

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        for n, content in enumerate(contents):
            assert write_exclusive(url, f"r/{n:03d}", content)
        stop.set()
        reading.result(30)
    assert seen
    assert all(content in contents for content in seen)


def test_scratch_folders_go_with_the_last_that_lies_in_them_and_the_temporary_folder_stays(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    folders = [scratch_folder("s3://bucket/run", rank) for rank in (0, 1)]
    for folder in folders:
        make_scratch(folder / "step-00000001")
    drop_scratch(folders[0] / "step-00000001")
    assert folders[1].exists() and not folders[0].exists()
    drop_scratch(folders[1])
    assert list(own.iterdir()) == []
    drop_scratch(folders[1])
    assert own.exists()


def test_ranks_that_begin_and_end_their_saves_at_once_do_not_take_each_others_scratch_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def save(rank: int) -> None:
        folder = scratch_folder("s3://bucket/run", rank) / "step-00000001"
        for _ in range(500):
            make_scratch(folder)
            drop_scratch(folder)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(4)))
    assert list(tmp_path.iterdir()) == []


def test_what_the_controller_imports_does_not_import_torch():
    modules = "storage.urls, storage.commits, storage.index, storage.ram, storage.peer, storage.manifest"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    root = os.path.dirname(os.path.dirname(urls.__file__))
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0
