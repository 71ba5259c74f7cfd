"""Snapshots of the core: any cut from any snapshot is the live state; what is damaged or foreign is passed over."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal_runs import (  # noqa: F401  (fixtures)
    append,
    as_json,
    as_log,
    begin,
    crash,
    folded,
    keep,
    recorded,
    s3_url,
    segments,
    snapshot,
    url_on_every_store,
)

from orchestrator.core import events as ev
from orchestrator.core.codec import digest, state_from_json, state_to_json
from orchestrator.core.goodput import LABELS
from orchestrator.runtime import core_snapshots
from orchestrator.runtime.journal import Journal, JournalError, ReplayMismatch, claim_epoch, read, replay
from storage.urls import remove

GOLDEN_RUN = Path(__file__).parents[1] / "golden" / "run-0.2.0"
LATE = (ev.TimerFired(at=0, timer="late"), [])


# --- replay ---


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 9), data=st.data())
def test_a_journal_cut_at_any_event_is_the_live_state_from_any_snapshot_and_from_record_1(tmp_path_factory, seed, data):
    folder, log = tmp_path_factory.mktemp("cut"), recorded(seed)
    url, tail = str(folder / "run"), folder / "tail"
    cut = data.draw(st.integers(1, len(log)), "cut")
    at = data.draw(st.integers(1, cut), "snapshot")
    published = data.draw(st.sets(st.integers(1, cut), max_size=4), "published")
    one = begin(url, tail)
    for n, step in enumerate(log[:cut], 1):
        append(one, [step])
        if n == at:
            snapshot(one, folded(log[:at]).state)
        if n in published:
            one.publish()
    keep(one)
    crash(one)

    again = begin(url, tail)
    assert again.passed_over == []
    assert again.start is not None and again.start.header.seq == at
    assert again.start.header.state_digest == digest(folded(log[:at]).state)
    assert as_log(again.records) == as_json(log[at:cut])
    live = digest(folded(log[:cut]).state)
    assert digest(again.replay().state) == live
    assert digest(replay(read(url, tail)).state) == live
    append(again, log[cut:])
    again.close()
    assert as_log(read(url)) == as_json(log)


def test_a_snapshot_serves_on_every_store(url, tmp_path):
    log = recorded(1)
    one = begin(url, tmp_path / "tail")
    append(one, log[:40])
    snapshot(one, folded(log[:40]).state)
    append(one, log[40:60])
    one.close()
    again = begin(url, tmp_path / "tail")
    assert again.start is not None and len(again.records) == 20
    assert digest(again.replay().state) == digest(folded(log[:60]).state)


def in_ten_segments(url: str, tail: Path) -> None:
    """60 records, and a snapshot after the 45th."""
    one, log = begin(url, tail), recorded(1)
    for n in range(0, 60, 6):
        append(one, log[n : min(n + 6, 45)])
        if n + 6 > 45 and n < 45:
            snapshot(one, folded(log[:45]).state)
        append(one, log[max(n, 45) : n + 6])
        one.publish()
    crash(one)


def test_segments_before_the_snapshots_record_are_not_read(tmp_path):
    url, log = str(tmp_path / "run"), recorded(1)
    in_ten_segments(url, tmp_path / "tail")
    for name in segments(url)[:7]:
        Path(url, "journal", name).write_bytes(b"damaged\n")
    again = begin(url, tmp_path / "tail")
    assert digest(again.replay().state) == digest(folded(log[:60]).state)
    assert again.next_seq == 61
    with pytest.raises(JournalError, match="a line is damaged"):
        read(url)


@pytest.mark.parametrize("missing", [7, 8])
def test_a_segment_from_there_on_that_is_missing_is_refused(tmp_path, missing):
    """7 holds the snapshot's own record: without it nobody knows that the snapshot is of this history."""
    url = str(tmp_path / "run")
    in_ten_segments(url, tmp_path / "tail")
    remove(url, f"journal/{segments(url)[missing]}")
    with pytest.raises(JournalError, match=rf"record {missing * 6 + 6} is missing"):
        begin(url, tmp_path / "tail")


# --- damage ---


def two_snapshots(url: str, tail: Path) -> list[str]:
    """After 20 and after 30 of 40 records; their names, the newer first."""
    one, log = begin(url, tail), recorded(2)
    for first, last in ((0, 20), (20, 30)):
        append(one, log[first:last])
        snapshot(one, folded(log[:last]).state)
    append(one, log[30:40])
    one.close()
    return core_snapshots.names(url)


def in_header(change: Callable[[dict[str, Any]], object], *, forged: bool = False) -> Callable[[bytes], bytes]:
    def damaged(raw: bytes) -> bytes:
        first, rest = raw.split(b"\n", 1)
        document = json.loads(first)
        change(document)
        if forged:
            del document["digest"]
            document["digest"] = core_snapshots._sha256(core_snapshots._compact(document))
        return core_snapshots._compact(document) + b"\n" + rest

    return damaged


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "seq": in_header(lambda d: d.update(seq=29)),
    "record_digest": in_header(lambda d: d.update(record_digest="0" * 32)),
    "code": in_header(lambda d: d.update(code="0" * 32)),
    "version": in_header(lambda d: d.update(version="9.9.9")),
    "state_digest": in_header(lambda d: d.update(state_digest="0" * 64)),
    "digest": in_header(lambda d: d.update(digest="0" * 64)),
    "a field more": in_header(lambda d: d.update(moon=1), forged=True),
    "a field less": in_header(lambda d: d.pop("code"), forged=True),
    "forged seq": in_header(lambda d: d.update(seq=29), forged=True),
    "forged record": in_header(lambda d: d.update(record_digest="0" * 32), forged=True),
    "state": lambda raw: raw.replace(b'"step":', b'"step":1', 1),
    "no state": lambda raw: raw.split(b"\n")[0] + b"\n",
    "cut off": lambda raw: raw[:-40],
    "more at the end": lambda raw: raw + b"x",
    "header is a list": lambda raw: b"[]\n" + raw.split(b"\n", 1)[1],
    "empty": lambda raw: b"",
    "not text": lambda raw: b"\xff" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_snapshot_is_passed_over_and_the_one_before_serves(tmp_path, damage, damaged):
    url = str(tmp_path / "run")
    names = two_snapshots(url, tmp_path / "tail")
    for name in names[:damaged]:
        path = Path(url, name)
        raw = path.read_bytes()
        assert damage(raw) != raw
        path.write_bytes(damage(raw))
    again = begin(url, tmp_path / "tail")
    assert len(again.passed_over) == damaged
    assert all(name in told for name, told in zip(names, again.passed_over, strict=False))
    if damaged == 1:
        assert again.start is not None and again.start.header.seq == 20
    else:
        assert again.start is None
    assert digest(again.replay().state) == digest(folded(recorded(2)[:40]).state)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_a_snapshot_is_found(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip")
    url = str(folder / "run")
    name, _ = two_snapshots(url, folder / "tail")
    raw = bytearray(Path(url, name).read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    Path(url, name).write_bytes(bytes(raw))
    again = begin(url, folder / "tail")
    assert again.start is not None and again.start.header.seq == 20
    assert name in again.passed_over[0]


def test_a_state_that_breaks_an_invariant_is_passed_over(tmp_path):
    """With it the first event would end in a hold."""
    url = str(tmp_path / "run")
    one, log = begin(url, tmp_path / "tail"), recorded(2)
    append(one, log[:20])
    broken = folded(log[:20]).state
    broken.ledger.owed += 1
    snapshot(one, broken)
    one.close()
    again = begin(url, tmp_path / "tail")
    assert again.start is None and "AssertionError" in again.passed_over[0]


# --- several controllers ---


@pytest.mark.parametrize("late", [3, 300])
def test_a_replaced_controllers_snapshot_is_of_no_history(url, tmp_path, late):
    """Its record has a number that the history has, too, or does not have yet."""
    log = recorded(1)
    old = begin(url, tmp_path / "old")
    append(old, log[:10])
    old.publish()
    new = begin(url, tmp_path / "new")
    append(old, [LATE] * late)
    misleading = snapshot(old, folded(log[:13]).state)
    with pytest.raises(JournalError, match="taken over"):
        old.publish()
    append(new, log[10:60])
    new.close()
    third = begin(url, tmp_path / "third")
    assert third.passed_over == [f"{misleading}: the journal does not have its record {10 + late}"]
    assert third.start is None
    assert digest(third.replay().state) == digest(folded(log[:60]).state)


def test_what_a_replaced_controller_writes_late_hides_no_segment(tmp_path):
    """It begins where a segment of the history begins, which holds the snapshot's record and goes on behind it."""
    url, log = str(tmp_path / "run"), recorded(1)
    first = begin(url, tmp_path / "1")
    append(first, log[:4])
    first.publish()
    second = begin(url, tmp_path / "2")
    append(first, log[4:7])
    snapshot(first, folded(log[:7]).state)
    append(first, log[7:9])
    with pytest.raises(JournalError, match="taken over"):
        first.publish()
    third = begin(url, tmp_path / "3")
    append(second, [LATE])
    with pytest.raises(JournalError, match="taken over"):
        second.publish()
    append(third, log[9:12])
    third.close()
    fourth = begin(url, tmp_path / "4")
    assert fourth.start is not None and fourth.start.header.seq == 7
    assert as_log(fourth.records) == as_json(log[7:12])


def test_a_snapshot_of_a_record_that_was_lost_with_its_machine_is_passed_over(tmp_path):
    url, log = str(tmp_path / "run"), recorded(1)
    one = begin(url, tmp_path / "tail")
    append(one, log[:20])
    one.publish()
    append(one, log[20:25])
    snapshot(one, folded(log[:25]).state)
    append(one, log[25:27])
    keep(one)
    crash(one)
    shutil.copytree(url, tmp_path / "seen from elsewhere")

    there = begin(str(tmp_path / "seen from elsewhere"), tmp_path / "no tail")
    assert there.start is None and len(there.passed_over) == 1
    assert digest(there.replay().state) == digest(folded(log[:20]).state)

    here = begin(url, tmp_path / "tail")
    assert here.start is not None and here.start.header.seq == 25
    assert as_log(here.records) == as_json(log[25:27])
    assert as_log(read(url)) == as_json(log[:27]), "what only the tail held is published, also from before the snapshot"


def test_the_newest_are_kept_and_segments_are_not_touched(url, tmp_path):
    one, log = begin(url, tmp_path / "tail"), recorded(1)
    for n in range(5):
        append(one, log[10 * n : 10 * n + 10])
        snapshot(one, folded(log[: 10 * n + 10]).state)
        one.publish()
    core_snapshots.prune(url)
    assert [name[-15:-6] for name in core_snapshots.names(url)] == ["000000050", "000000040", "000000030"]
    assert as_log(read(url)) == as_json(log[:50])


def test_one_that_is_deleted_while_it_is_looked_for_is_none(tmp_path, monkeypatch):
    """By a controller that was replaced in the midst of its work."""
    url = str(tmp_path / "run")
    names = two_snapshots(url, tmp_path / "tail")
    remove(url, names[0])
    monkeypatch.setattr(core_snapshots, "names", lambda url: names)
    again = begin(url, tmp_path / "tail")
    assert again.passed_over == [] and again.start is not None and again.start.header.seq == 20


# --- other code ---


def as_other_code(patch: pytest.MonkeyPatch, url: str, tail: Path) -> Journal:
    patch.setattr(core_snapshots, "code_digest", lambda: "f" * 32)
    return Journal(url, tail, claim_epoch(url, "9.9.9").epoch)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state: state.update(moon=1), "moon"),
        (lambda state: next(iter(state["nodes"].values())).pop("state"), "Node: .*missing fields .*state"),
        (lambda state: state["ledger"]["totals"].update(moonlight=0), "moonlight"),
        (lambda state: state.update(nodes=[]), "AttributeError"),
    ],
)
def test_a_state_that_this_version_does_not_read_is_named_and_the_one_before_serves(tmp_path, change, why):
    """As after a return to an older version, whose own snapshot may be there still."""
    url, log = str(tmp_path / "run"), recorded(23)
    one = begin(url, tmp_path / "tail")
    append(one, log[:20])
    snapshot(one, folded(log[:20]).state)
    append(one, log[20:49])
    newer = state_to_json(folded(log[:49]).state)
    change(newer)
    core_snapshots.write(url, 1, *one.head, "9.9.9", newer)
    one.close()
    again = begin(url, tmp_path / "tail")
    assert again.start is not None and again.start.header.seq == 20
    (told,) = again.passed_over
    assert f"Shepherd 9.9.9 (code {core_snapshots.code_digest()[:12]})" in told
    assert re.search(why, told), told


def test_what_older_code_did_not_know_has_its_default():
    document = state_to_json(folded(recorded(23)[:49]).state)
    before = state_from_json(document)
    del document["retired"], document["strikes"]
    del document["ledger"]["totals"]["paused"], document["counts"]["lost"], document["verifications"]["misread"]
    state = state_from_json(document)
    assert (state.retired, state.strikes) == (0, {})
    assert list(state.ledger.totals) == list(LABELS) and state.ledger.totals["paused"] == 0
    assert list(state.counts) == list(before.counts) and state.verifications == before.verifications


def test_a_record_that_other_code_wrote_and_this_one_decides_differently_names_both_and_the_way_out(
    tmp_path, monkeypatch
):
    url, log = str(tmp_path / "run"), recorded(2)
    one = begin(url, tmp_path / "tail")
    append(one, log[:20])
    snapshot(one, folded(log[:20]).state)
    append(one, [*log[20:22], (ev.TimerFired(at=log[22][0].at, timer="a"), log[0][1])])
    one.close()
    here = core_snapshots.code_digest()[:12]
    with pytest.raises(ReplayMismatch, match=r"record 23 \(TimerFired\): on record .*SetTimer") as same:
        begin(url, tmp_path / "tail").replay()
    assert "Fix" not in str(same.value), "the same code: nothing to change it for"
    with pytest.raises(ReplayMismatch, match=r"record 23 \(TimerFired\): on record .*SetTimer") as other:
        as_other_code(monkeypatch, url, tmp_path / "tail").replay()
    wrote = f"Shepherd test (code {here}) wrote it, this is 9.9.9 (code ffffffffffff)"
    assert f"{wrote}. Fix: resume the run once with test" in str(other.value)


def test_older_records_that_other_code_does_not_read_are_not_asked_for(tmp_path, monkeypatch):
    url, log = str(tmp_path / "run"), recorded(2)
    one = begin(url, tmp_path / "tail")
    monkeypatch.setattr("orchestrator.runtime.journal.event_to_json", lambda event: {"type": "MoonRose"})
    append(one, log[:20])
    one.publish()
    with pytest.raises(ReplayMismatch, match=r"record 1 is not one that this version reads.*MoonRose.* Fix: resume"):
        as_other_code(monkeypatch, url, tmp_path / "tail")
    snapshot(one, folded(log[:20]).state)
    assert digest(as_other_code(monkeypatch, url, tmp_path / "tail").replay().state) == digest(folded(log[:20]).state)


def test_epochs_of_a_version_that_did_not_name_its_code_are_of_other_code(tmp_path):
    url, log = str(tmp_path / "run"), recorded(2)
    one = begin(url, tmp_path / "tail")
    append(one, [(log[0][0], [])])
    one.close()
    claim = Path(url, "epochs", "00000001.json")
    document = json.loads(claim.read_bytes())
    del document["code"]
    claim.write_text(json.dumps(document))
    with pytest.raises(ReplayMismatch, match=r"\(code unknown\) wrote it.*time before snapshots"):
        begin(url, tmp_path / "tail").replay()


def test_a_run_that_version_0_2_0_left_can_be_taken_over(tmp_path):
    """The snapshot is of a journal that newer code may decide otherwise; two progress reports follow it."""
    shutil.copytree(GOLDEN_RUN, tmp_path / "run")
    taken = begin(str(tmp_path / "run"), tmp_path / "tail")
    assert taken.passed_over == []
    assert taken.start is not None and taken.start.header.seq == 47
    assert [type(record.event) for record in taken.records] == [ev.StepsDone, ev.StepsDone]
    state = taken.replay().state
    assert (state.job, state.generation, state.step, state.high_water) == ("training", 4, 8, 8)
    assert [incident.cause for incident in state.incidents] == ["corrupt", "signal", "collective"]
    assert (state.replicas, state.shapes, sorted(state.lineage)) == (2, {1: 2}, [1, 2, 3, 4])
    assert (list(state.strikes), list(state.convicted), state.leaving) == (["n1", "n2"], ["n1"], {"n2": "the cloud"})
