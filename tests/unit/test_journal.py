"""The journal: what was published is there, whoever dies, whoever writes at the same time, whatever the store does."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from core_body import Body
from core_world import Tape
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_storage_s3 import url as s3_url  # noqa: F401  (a fixture)

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core.codec import action_to_json, digest
from orchestrator.core.supervisor import Supervisor
from orchestrator.runtime import journal
from orchestrator.runtime.journal import Journal, JournalError, ReplayMismatch, claim_epoch, read, replay
from storage.urls import StoreError, list_names, read_bytes, remove, write_exclusive

Log = list[tuple[ev.Event, list[ac.Action]]]
Patch = pytest.MonkeyPatch


@cache
def recorded(seed: int) -> Log:
    """What a supervisor was told and ordered in one hostile history."""
    body = Body(Tape(random.Random(seed).randbytes(300)))
    body.run()
    return body.watch.log


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    return str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path}/run"


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the journal's clocks show."""
    now = SimpleNamespace(seconds=1000.0)
    fake = SimpleNamespace(monotonic=lambda: now.seconds, time_ns=lambda: int(now.seconds * 1e9))
    monkeypatch.setattr(journal, "time", fake)
    return now


def begin(url: str, tail: Path) -> Journal:
    return Journal(url, tail, claim_epoch(url, "test").epoch)


def append(to: Journal, log: Log) -> None:
    for event, actions in log:
        to.append(event, actions)


def keep(of: Journal) -> None:
    """The tail is due."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "TAIL_INTERVAL_S", 0.0)
        of.keep()


def crash(of: Journal) -> None:
    """Its process dies: nothing more is written, and its files are closed by the kernel."""
    os.close(of._tail)


def as_log(records: list[journal.Record]) -> list[tuple[ev.Event, list[Any]]]:
    return [(record.event, list(record.actions)) for record in records]


def as_json(log: Log) -> list[tuple[ev.Event, list[Any]]]:
    return [(event, [json.loads(json.dumps(action_to_json(a))) for a in actions]) for event, actions in log]


def segments(url: str) -> list[str]:
    return list_names(url, "journal")


# --- what is written is there ---


def test_what_is_published_is_read_back_in_order_and_replays(url, tmp_path):
    log = recorded(1)
    first = begin(url, tmp_path / "tail")
    assert first.records == [] and first.next_seq == 1
    append(first, log[:40])
    assert read(url) == []
    first.publish()
    append(first, log[40:60])
    first.close()
    assert not (tmp_path / "tail").exists()
    assert segments(url) == ["00000001-0000000001.jsonl", "00000001-0000000041.jsonl"]

    second = begin(url, tmp_path / "elsewhere")
    assert second.next_seq == 61
    assert as_log(second.records) == as_json(log[:60])
    append(second, log[60:])
    second.close()
    records = read(url)
    assert as_log(records) == as_json(log)
    assert [r.seq for r in records] == list(range(1, len(log) + 1))
    assert [r.epoch for r in records] == [1] * 60 + [2] * (len(log) - 60)

    folded = Supervisor()
    for event, _ in log:
        folded.handle(event)
    assert digest(replay(records).state) == digest(folded.state)


def test_only_the_tail_is_there_after_a_crash_and_the_next_controller_publishes_it(tmp_path, clock):
    url, tail, log = str(tmp_path / "run"), tmp_path / "logs" / "tail", recorded(1)
    first = begin(url, tail)
    append(first, log[:7])
    first.keep()
    assert read(url, tail) == []
    clock.seconds += journal.TAIL_INTERVAL_S
    first.keep()
    append(first, log[7:9])
    first.keep()
    crash(first)
    assert as_log(read(url, tail)) == as_json(log[:7])
    assert read(url) == []
    second = begin(url, tail)
    assert as_log(second.records) == as_json(log[:7])
    assert as_log(read(url)) == as_json(log[:7])
    assert tail.read_bytes() == b""
    append(second, log[7:])
    second.close()
    assert as_log(read(url)) == as_json(log)


def test_progress_is_published_within_the_segment_interval(tmp_path, clock):
    url, log = str(tmp_path / "run"), recorded(1)
    one = begin(url, tmp_path / "tail")
    append(one, log[:3])
    clock.seconds += journal.SEGMENT_INTERVAL_S - 1
    one.keep()
    assert read(url) == []
    assert len(read(url, tmp_path / "tail")) == 3
    clock.seconds += 1
    one.keep()
    assert as_log(read(url)) == as_json(log[:3])
    assert (tmp_path / "tail").read_bytes() == b""
    clock.seconds += journal.SEGMENT_INTERVAL_S
    one.keep()
    assert len(segments(url)) == 1, "nothing new, no segment"


def test_a_long_backlog_goes_in_bounded_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SEGMENT_RECORDS", 25)
    url, log = str(tmp_path / "run"), recorded(1)[:60]
    one = begin(url, tmp_path / "tail")
    append(one, log)
    one.publish()
    assert [name[9:19] for name in segments(url)] == ["0000000001", "0000000026", "0000000051"]
    assert as_log(read(url)) == as_json(log)


DECISIONS = (
    ac.OpenGeneration(
        generation=1, nodes=(), source="init", step=0, snapshot_generation=0, transfers=(), reason="first"
    ),
    ac.HaltGeneration(generation=1, nodes=(), reason=""),
    ac.CommitCheckpoint(step=1, epoch=1, generation=1, replaces_damaged=False),
    ac.ReleaseNode(node="a", reason=""),
    ac.EndRun(exit_code=0, reason=""),
)


@pytest.mark.parametrize(
    ("actions", "must"),
    [
        ([], False),
        ([ac.SetTimer(timer="a", at=1)], False),
        ([ac.AskStop(generation=1)], False),
        *[([ac.SetTimer(timer="a", at=1), decision], True) for decision in DECISIONS],
    ],
)
def test_decisions_must_be_published_before_they_are_sent(tmp_path, actions, must):
    one = begin(str(tmp_path / "run"), tmp_path / "tail")
    assert one.append(ev.TimerFired(at=1, timer="a"), actions) is must


# --- cut anywhere, damaged anywhere ---


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 9), data=st.data())
def test_a_crash_at_any_byte_leaves_a_valid_history(tmp_path_factory, seed, data):
    """Segments and the tail up to any byte: exactly the records that were whole, and a state that checks."""
    folder, log = tmp_path_factory.mktemp("cut"), recorded(seed)
    url, tail = str(folder / "run"), folder / "tail"
    published = data.draw(st.integers(0, len(log)), "published")
    one = begin(url, tail)
    append(one, log[:published])
    one.publish()
    append(one, log[published:])
    keep(one)
    crash(one)
    whole = tail.read_bytes()
    cut = data.draw(st.integers(0, len(whole)), "cut")
    left = data.draw(st.sampled_from([b"", bytes(4096), b'{"seq":1,"digest":"x"}\n', b"\xff\n", b"7\n"]), "left")
    tail.write_bytes(whole[:cut] + left)
    lines_left = (whole[:cut] + left).count(b"\n") - left.count(b"\n")
    if cut and whole[cut - 1 : cut] != b"\n" and left[:1] == b"\n":
        lines_left += 1

    records = read(url, tail)
    assert as_log(records) == as_json(log[: published + lines_left])
    folded = Supervisor()
    for event, _ in log[: len(records)]:
        folded.handle(event)
    supervisor = replay(records)
    supervisor.state.check()
    supervisor.state.check_nodes()
    assert digest(supervisor.state) == digest(folded.state)

    again = begin(url, tail)
    assert again.records == records
    append(again, log[len(records) :])
    again.close()
    assert as_log(read(url)) == as_json(log)


def published_in_three(url: str, tail: Path, log: Log) -> None:
    one = begin(url, tail)
    for part in (log[:20], log[20:35], log[35:60]):
        append(one, part)
        one.publish()
    one.close()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_a_segment_is_refused_and_the_segment_named(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip")
    url = str(folder / "run")
    published_in_three(url, folder / "tail", recorded(2))
    name = data.draw(st.sampled_from(segments(url)))
    path = Path(url, "journal", name)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(raw))
    with pytest.raises(JournalError, match=name):
        read(url)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_segment_that_is_cut_off_is_refused_and_named(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("short")
    url = str(folder / "run")
    published_in_three(url, folder / "tail", recorded(2))
    name = data.draw(st.sampled_from(segments(url)[:2]))
    path = Path(url, "journal", name)
    raw = path.read_bytes()
    line_ends = [at + 1 for at in range(len(raw) - 1) if raw[at : at + 1] == b"\n"]
    path.write_bytes(raw[: data.draw(st.one_of(st.sampled_from([0, *line_ends]), st.integers(0, len(raw) - 1)))])
    following = segments(url)[segments(url).index(name) + 1]
    with pytest.raises(JournalError, match=f"{name}|{following}"):
        read(url)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_newest_segment_that_is_empty_or_ends_within_a_line_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("torn")
    url = str(folder / "run")
    published_in_three(url, folder / "tail", recorded(2))
    name = segments(url)[-1]
    path = Path(url, "journal", name)
    raw = path.read_bytes()
    within = [at for at in range(1, len(raw)) if raw[at - 1 : at] != b"\n"]
    path.write_bytes(raw[: data.draw(st.one_of(st.just(0), st.sampled_from(within)))])
    with pytest.raises(JournalError, match=name):
        read(url)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_segment_is_refused(tmp_path, missing):
    url = str(tmp_path / "run")
    published_in_three(url, tmp_path / "tail", recorded(2))
    remove(url, f"journal/{segments(url)[missing]}")
    with pytest.raises(JournalError, match=rf"record {(20, 35)[missing]} is missing"):
        read(url)


def test_records_in_another_order_are_refused(tmp_path):
    url = str(tmp_path / "run")
    published_in_three(url, tmp_path / "tail", recorded(2))
    path = Path(url, "journal", segments(url)[1])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(JournalError, match=segments(url)[1]):
        read(url)


@dataclass(frozen=True, kw_only=True)
class MoonRose:
    """An event of another version."""

    at: int


def test_a_record_of_another_version_is_refused_by_its_number(tmp_path):
    url = str(tmp_path / "run")
    one = begin(url, tmp_path / "tail")
    append(one, [(ev.TimerFired(at=1, timer="a"), []), (MoonRose(at=2), [])])
    one.publish()
    with pytest.raises(JournalError, match=r"0000000001\.jsonl: record 2 is not one that this version reads.*MoonRose"):
        read(url)


# --- replay ---


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9), data=st.data())
def test_a_decision_that_is_not_the_recorded_one_is_found(seed, data):
    log = recorded(seed)
    records = [
        journal.Record(seq=n, epoch=1, event=event, actions=tuple(actions))
        for n, (event, actions) in enumerate(as_json(log), 1)
    ]
    decided = [n for n, record in enumerate(records) if record.actions]
    at = data.draw(st.sampled_from(decided))
    kind = data.draw(st.sampled_from(["changed", "dropped", "added"]))
    actions = records[at].actions
    altered = {
        "changed": (*actions[:-1], actions[-1] | {"type": "AskStop"}),
        "dropped": actions[:-1],
        "added": (*actions, actions[0]),
    }[kind]
    records[at] = journal.Record(seq=at + 1, epoch=1, event=records[at].event, actions=altered)
    with pytest.raises(ReplayMismatch, match=f"record {at + 1} "):
        replay(records)


def test_a_clock_that_runs_backwards_is_refused():
    records = [
        journal.Record(seq=n, epoch=1, event=event, actions=tuple(actions))
        for n, (event, actions) in enumerate(as_json(recorded(1)), 1)
    ]
    at = records[-1].event.at
    late = ev.TimerFired(at=at - 1, timer="a")
    with pytest.raises(ReplayMismatch, match=f"record {len(records) + 1} .*fails on it"):
        replay([*records, journal.Record(seq=len(records) + 1, epoch=1, event=late, actions=())])


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
        with pytest.raises(StoreError):
            Journal(url, tail, epoch)
    assert as_log(Journal(url, tail, epoch).records) == as_json(log[:5])


def test_a_full_disk_is_an_error_of_keep_and_its_second_try_repairs_the_tail(tmp_path, monkeypatch, clock):
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
        with pytest.raises(OSError, match="No space left"):
            one.keep()
    assert as_log(read(url, tail)) == as_json(log[:2])
    one.keep()
    crash(one)
    assert as_log(read(url, tail)) == as_json(log[:9])
