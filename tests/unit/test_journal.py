"""The journal of one controller: what was written is there, cut at any byte; damage is named; a replay compares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core.codec import digest
from orchestrator.core.supervisor import Supervisor
from orchestrator.runtime import journal
from orchestrator.runtime.journal import JournalError, ReplayMismatch, read, replay
from storage.urls import remove

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
        generation=1,
        nodes=(),
        source="init",
        step=0,
        snapshot_generation=0,
        transfers=(),
        reason="first",
        dp_replicate=1,
        snapshot_dp_replicate=1,
    ),
    ac.HaltGeneration(generation=1, nodes=(), reason="", park=False),
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
        "changed": (*actions[:-1], actions[-1] | {"type": "SomethingElse"}),
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
    end = next(n for n, record in enumerate(records) if any(a["type"] == "EndRun" for a in record.actions))
    del records[end:]  # after it no time counts
    at = records[-1].event.at
    late = ev.TimerFired(at=at - 1, timer="a")
    with pytest.raises(ReplayMismatch, match=f"record {len(records) + 1} .*fails on it"):
        replay([*records, journal.Record(seq=len(records) + 1, epoch=1, event=late, actions=())])
