"""The journal among several controllers, and on stores and disks that fail: one history, nothing published is lost."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from journal_runs import (  # noqa: F401  (fixtures)
    Log,
    append,
    as_json,
    as_log,
    begin,
    clock_by_hand,
    crash,
    keep,
    recorded,
    s3_url,
    segments,
    url_on_every_store,
)

from orchestrator.core import events as ev
from orchestrator.runtime import journal
from orchestrator.runtime.journal import Journal, JournalError, claim_epoch, read
from storage.urls import StoreError, read_bytes, write_exclusive

Patch = pytest.MonkeyPatch


# --- several controllers ---


def race(url: str, controllers: int) -> list[journal.EpochClaim]:
    barrier = threading.Barrier(controllers)

    def claim(_: int) -> journal.EpochClaim:
        barrier.wait(30)
        return claim_epoch(url, "test")

    with ThreadPoolExecutor(controllers) as pool:
        return list(pool.map(claim, range(controllers)))


def test_controllers_that_begin_at_once_take_different_epochs(url):
    for trial in range(1 if url.startswith("s3:") else 5):
        claims = race(f"{url}/{trial}", 8)
        assert sorted(claim.epoch for claim in claims) == list(range(1, 9))
        assert len({claim.began_unix_us for claim in claims}) == 1, "one run has one beginning"


def test_controllers_that_begin_in_the_same_microsecond_take_different_epochs(tmp_path, clock):
    assert sorted(claim.epoch for claim in race(str(tmp_path), 8)) == list(range(1, 9))


def test_a_later_epoch_keeps_the_clock_of_the_first(tmp_path, clock):
    url = str(tmp_path)
    assert not journal.exists(url)
    assert claim_epoch(url, "test") == journal.EpochClaim(epoch=1, began_unix_us=1_000_000_000)
    assert journal.exists(url)
    clock.seconds += 86_400
    assert claim_epoch(url, "test") == journal.EpochClaim(epoch=2, began_unix_us=1_000_000_000)
    assert json.loads(read_bytes(url, "epochs/00000002.json"))["version"] == "test"


def test_an_epoch_that_others_always_take_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "write_exclusive", lambda *args: False)
    with pytest.raises(JournalError, match="were taken by others"):
        claim_epoch(str(tmp_path), "test")


def test_a_controller_that_was_replaced_is_told_so(url, tmp_path):
    log = recorded(1)
    old = begin(url, tmp_path / "old")
    journal.check_not_replaced(url, 1)
    new = begin(url, tmp_path / "new")
    with pytest.raises(JournalError, match="epoch 2 has taken over from epoch 1"):
        journal.check_not_replaced(url, 1)
    append(old, log[:3])
    with pytest.raises(JournalError, match="epoch 2 has taken over from epoch 1"):
        old.publish()
    append(new, log[3:5])
    new.publish()
    assert as_log(read(url)) == as_json(log[3:5])


def publish_late(late: Journal) -> None:
    with pytest.raises(JournalError, match="taken over"):
        late.publish()


def test_what_a_replaced_controller_still_writes_is_ignored(url, tmp_path):
    log = recorded(1)
    old = begin(url, tmp_path / "old")
    append(old, log[:10])
    old.publish()
    new = begin(url, tmp_path / "new")
    append(old, [(ev.TimerFired(at=0, timer="late"), [])] * 30)
    publish_late(old)
    append(new, log[10:15])
    new.publish()
    append(old, [(ev.TimerFired(at=0, timer="later"), [])])
    publish_late(old)
    append(new, log[15:])
    new.publish()
    assert as_log(read(url)) == as_json(log)


@pytest.mark.parametrize("third_reads", ["before the second writes", "after the second has written"])
def test_of_three_controllers_only_the_newest_one_and_what_it_read_count(tmp_path, third_reads):
    """The second was replaced before it wrote: its records come late, and reach back behind what the third has read."""
    url, log = str(tmp_path / "run"), recorded(1)
    first = begin(url, tmp_path / "1")
    append(first, log[:4])
    first.publish()
    second = begin(url, tmp_path / "2")
    append(first, log[4:9])
    publish_late(first)
    append(second, [(ev.TimerFired(at=0, timer="second"), [])] * 2)
    if third_reads == "after the second has written":
        second.publish()
        third = begin(url, tmp_path / "3")
        known = [*as_json(log[:4]), *[(ev.TimerFired(at=0, timer="second"), [])] * 2]
    else:
        third = begin(url, tmp_path / "3")
        publish_late(second)
        known = as_json(log[:9])
    assert as_log(third.records) == known
    append(third, log[9:12])
    third.publish()
    assert as_log(read(url)) == [*known, *as_json(log[9:12])]


def test_a_tail_that_was_left_on_another_machine_is_not_mixed_in(tmp_path, clock):
    """Head A dies with a tail; B goes on without it, and dies; on A the old tail no longer follows."""
    url, log = str(tmp_path / "run"), recorded(1)
    on_a = begin(url, tmp_path / "a")
    append(on_a, log[:5])
    on_a.publish()
    append(on_a, [(ev.TimerFired(at=0, timer="lost with A"), [])] * 6)
    keep(on_a)
    crash(on_a)
    on_b = begin(url, tmp_path / "b")
    append(on_b, log[5:8])
    on_b.publish()
    crash(on_b)
    again_on_a = begin(url, tmp_path / "a")
    assert as_log(again_on_a.records) == as_json(log[:8])
    assert (tmp_path / "a").read_bytes() == b""
    append(again_on_a, log[8:])
    again_on_a.close()
    assert as_log(read(url)) == as_json(log)


# --- a store that fails ---


def failing(patch: Patch, *, takes_effect: bool, times: int = 1) -> list[str]:
    """Let the next exclusive creates of a segment fail, done or not; the names that were tried."""
    tried: list[str] = []

    def write(url: str, name: str, data: bytes) -> bool:
        tried.append(name)
        if len(tried) > times:
            return write_exclusive(url, name, data)
        if takes_effect:
            assert write_exclusive(url, name, data)
        raise StoreError("no answer")

    patch.setattr(journal, "write_exclusive", write)
    return tried


@pytest.mark.parametrize("takes_effect", [False, True])
def test_a_store_that_fails_loses_nothing_and_a_second_try_is_the_same_segment(
    url, tmp_path, monkeypatch, takes_effect
):
    log = recorded(1)
    one = begin(url, tmp_path / "tail")
    append(one, log[:5])
    tried = failing(monkeypatch, takes_effect=takes_effect, times=2)
    for n in range(2):
        with pytest.raises(StoreError, match="no answer"):
            one.publish()
        append(one, log[5 + n : 6 + n])
        assert one.next_seq == 7 + n
    one.publish()
    one.publish()
    assert [name[17:27] for name in tried] == ["0000000001"] * 3 + ["0000000006"]
    assert as_log(read(url)) == as_json(log[:7])


def test_a_controller_that_dies_before_the_answer_of_the_store_leaves_a_whole_journal(tmp_path, monkeypatch):
    url, tail, log = str(tmp_path / "run"), tmp_path / "tail", recorded(1)
    one = begin(url, tail)
    append(one, log[:5])
    keep(one)
    failing(monkeypatch, takes_effect=True)
    with pytest.raises(StoreError):
        one.publish()
    append(one, log[5:7])
    keep(one)
    crash(one)
    again = begin(url, tail)
    assert as_log(again.records) == as_json(log[:7])
    assert as_log(read(url)) == as_json(log[:7])


def test_a_store_that_is_away_when_a_controller_begins_keeps_the_tail(tmp_path, monkeypatch):
    url, tail, log = str(tmp_path / "run"), tmp_path / "tail", recorded(1)
    one = begin(url, tail)
    append(one, log[:5])
    keep(one)
    crash(one)
    epoch = claim_epoch(url, "test").epoch
    with monkeypatch.context() as patch:
        failing(patch, takes_effect=False)
        open_files = os.listdir("/proc/self/fd")
        with pytest.raises(StoreError):
            Journal(url, tail, epoch)
        assert len(os.listdir("/proc/self/fd")) == len(open_files)
    assert as_log(Journal(url, tail, epoch).records) == as_json(log[:5])


def test_a_full_local_disk_stops_nobody_and_the_next_try_repairs_the_tail(tmp_path, monkeypatch, clock):
    url, tail, log = str(tmp_path / "run"), tmp_path / "tail", recorded(1)
    one = begin(url, tail)
    append(one, log[:2])
    keep(one)
    append(one, log[2:9])
    clock.seconds += journal.TAIL_INTERVAL_S
    write: Callable[..., int] = os.pwrite
    with monkeypatch.context() as patch:
        free = [20, 10]

        def full(fd: int, data: bytes, offset: int) -> int:
            if not free:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(fd, data[: free.pop()], offset)

        patch.setattr(os, "pwrite", full)
        one.keep()
        assert "No space left" in one.tail_error
    assert as_log(read(url, tail)) == as_json(log[:2])
    keep(one)
    assert one.tail_error == ""
    crash(one)
    assert as_log(read(url, tail)) == as_json(log[:9])


def test_with_no_room_for_a_tail_the_store_holds_the_journal(tmp_path, monkeypatch):
    url, tail, log = str(tmp_path / "run"), tmp_path / "logs" / "tail", recorded(1)
    with monkeypatch.context() as patch:

        def full(path: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(journal, "make_folder", full)
        one = begin(url, tail)
        append(one, log[:5])
        keep(one)
        one.publish()
        assert "No space left" in one.tail_error
    append(one, log[5:9])
    keep(one)
    assert as_log(read(url)) == as_json(log[:5])
    assert as_log(read(url, tail)) == as_json(log[:9])


def test_while_the_store_is_away_the_tail_holds_what_is_appended(tmp_path, monkeypatch):
    url, tail, log = str(tmp_path / "run"), tmp_path / "tail", recorded(1)
    one = begin(url, tail)
    append(one, log[:5])
    with monkeypatch.context() as patch:
        failing(patch, takes_effect=False, times=2)
        with pytest.raises(StoreError):
            one.publish()
        append(one, log[5:8])
        with pytest.raises(StoreError):
            one.publish()
    assert read(url) == []
    assert as_log(read(url, tail)) == as_json(log[:8])


def test_what_is_appended_while_a_segment_is_written_goes_to_the_tail_and_the_next_segment(tmp_path, monkeypatch):
    url, tail, log = str(tmp_path / "run"), tmp_path / "tail", recorded(1)
    one = begin(url, tail)
    append(one, log[:5])
    write, later = journal.write_exclusive, iter([log[5:8]])

    def slow(url: str, name: str, data: bytes) -> bool:
        append(one, next(later, []))
        return write(url, name, data)

    monkeypatch.setattr(journal, "write_exclusive", slow)
    one.publish()
    assert as_log(read(url)) == as_json(log[:5])
    assert one.backlog == 3
    keep(one)
    assert as_log(read(url, tail)) == as_json(log[:8])
    one.publish()
    assert as_log(read(url)) == as_json(log[:8])
