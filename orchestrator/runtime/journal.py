"""The journal: what was decided, durable before it is done.

Records are JSON lines, numbered without gaps, each with a digest over itself and the record before it. They are
gathered in a local tail that is fsynced, and go in immutable segments, created exclusively, under ``run.url``::

    epochs/00000002.json                    who took over, when, with which version and code
    journal/00000002-0000000137.jsonl       records 137 and on, written by epoch 2
    snapshots/00000002-0000000136.jsonl     what the supervisor knew after record 136 (`core_snapshots.py`)

A controller takes epoch N+1 by exclusive create *before* it reads. The journal is what the newest epoch has written,
and what that follows, record by record, by their digests: whatever else a controller that was replaced still wrote, or
left in a tail, belongs to no history. Damage breaks the chain and is named. It begins with the newest snapshot whose
record is in that history, and folds only what follows; a report reads all records.

Without its tail (another machine, a lost or full disk) a controller misses at most the last `SEGMENT_INTERVAL_S` of
progress reports. A decision is never missing: its segment is durable before the decision is sent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.actions import DECISIONS, Action
from orchestrator.core.codec import action_from_json, action_to_json, event_from_json, event_to_json
from orchestrator.core.events import Event
from orchestrator.core.state import State
from orchestrator.core.supervisor import Supervisor
from orchestrator.runtime import core_snapshots
from orchestrator.runtime.core_snapshots import CoreSnapshot
from orchestrator.runtime.journal_lines import JournalError, Line, chained, encode, read_lines, segment_name
from storage.urls import StoreError, list_names, make_folder, read_bytes, sync_folder, write_exclusive

SEGMENT_INTERVAL_S = 30.0
"""Progress reports lost with the head's disk, at most; shorter means more objects on the store."""
TAIL_INTERVAL_S = 1.0
"""Progress reports lost with the controller's process or its machine's power, at most."""
SEGMENT_RECORDS = 10_000
"""A longer backlog goes in several segments; the largest records, of 16,384 ranks, are few and have 2 MB."""
CLAIM_TRIES = 8
"""More controllers than these never begin at once: one tries again only when another has begun."""

_EPOCH = re.compile(r"(\d{8})\.json")


class Replaced(JournalError):
    """A newer controller has taken the run over: nothing that this one decides counts any more."""


class ReplayMismatch(JournalError):
    """This code does not read a record of the journal, or does not decide what it says was decided."""

    def __init__(self, message: str, epoch: int) -> None:
        super().__init__(message)
        self.epoch = epoch
        """Who wrote the record."""


@dataclass(frozen=True, kw_only=True)
class Record:
    seq: int
    epoch: int
    event: Event
    actions: tuple[dict[str, Any], ...]
    """As JSON objects, to compare with what a replay decides."""


@dataclass(frozen=True, kw_only=True)
class EpochClaim:
    epoch: int
    began_unix_us: int
    """The run's clock: wall-clock time of its microsecond 0."""


def tail_path(folder: Path, url: str) -> Path:
    """Where the local tail of the journal under `url` is, in a run's log folder."""
    return folder / f"journal-tail-{hashlib.sha256(url.encode()).hexdigest()[:16]}.jsonl"


def claim_epoch(url: str, version: str) -> EpochClaim:
    """Take the next epoch of the run under `url`, exclusively.

    Raises:
        JournalError: others took every epoch that was tried.
    """
    for _ in range(CLAIM_TRIES):
        taken = [int(m.group(1)) for name in list_names(url, "epochs") if (m := _EPOCH.fullmatch(name))]
        epoch = max(taken, default=0) + 1
        now = time.time_ns() // 1000
        began = json.loads(read_bytes(url, f"epochs/{min(taken):08d}.json"))["began_unix_us"] if taken else now
        document = {"epoch": epoch, "began_unix_us": began, "taken_unix_us": now, "version": version}
        document["code"] = core_snapshots.code_digest()
        document["nonce"] = secrets.token_hex(8)  # two controllers must not write the same record
        if write_exclusive(url, f"epochs/{epoch:08d}.json", json.dumps(document).encode()):
            return EpochClaim(epoch=epoch, began_unix_us=began)
    raise JournalError(f"{url}: {CLAIM_TRIES} epochs in a row were taken by others")


def _claimed(url: str, epoch: int) -> dict[str, str]:
    """Version of the controller that took an epoch, and its code: empty before versions that write snapshots."""
    document = json.loads(read_bytes(url, f"epochs/{epoch:08d}.json"))
    return {"version": document["version"], "code": document.get("code", "")}


def exists(url: str) -> bool:
    """Whether a run has been started under `url`."""
    return any(_EPOCH.fullmatch(name) for name in list_names(url, "epochs"))


def read(url: str, tail: Path | None = None) -> list[Record]:
    """All valid records in order, from the segments and then from the local tail, up to the first damage of the tail.

    Raises:
        JournalError: a segment is damaged or missing, or holds a record that this version does not read.
    """
    return [_record(line) for line in read_lines(url, tail, since=1)[0]]


def replay(records: Iterable[Record], state: State | None = None) -> Supervisor:
    """The supervisor that these records made, from `state` on, each decision checked against the one on record.

    Raises:
        ReplayMismatch: this code decides differently, or refuses the record.
    """
    supervisor = Supervisor(state)
    for record in records:
        name = f"record {record.seq} ({type(record.event).__name__})"
        try:
            actions = supervisor.handle(record.event)
        except Exception as e:
            raise ReplayMismatch(f"{name}: this code fails on it: {e!r}", record.epoch) from e
        if not is_on_record(actions, record):
            decided = [action_to_json(action) for action in actions]
            on_record = f"on record {list(record.actions)}, decided now {decided}"
            raise ReplayMismatch(f"{name}: {on_record}", record.epoch)
    return supervisor


def is_on_record(actions: list[Action], record: Record) -> bool:
    """Whether these are the actions on record; a field that the writer's code did not have yet has its default."""
    try:
        return actions == [action_from_json(action) for action in record.actions]
    except ValueError:
        return False


class Journal:
    """Appends the records of one epoch. One thread may `append` while another does the rest."""

    def __init__(self, url: str, tail: Path, epoch: int) -> None:
        """Open the journal under `url` for a controller that has claimed `epoch`, and read what is there.

        Raises:
            ReplayMismatch: a record is not one that this version reads.
            JournalError: what is there is damaged, or a newer controller has taken over.
            StoreError, OSError: the store failed; nothing is lost, try again.
        """
        self._url, self._tail_path, self.epoch = url, tail, epoch
        self.start, lines, kept, self.passed_over = _from_newest_snapshot(url, tail)
        """The newest snapshot that serves; None: the journal is read from its first record. And why newer ones do not.
        """
        try:
            self.records = [_record(line) for line in lines if self.start is None or line.seq > self.start.header.seq]
        except ReplayMismatch as e:
            raise self._told(e) from e
        # What only the tail holds is published first, now as part of this epoch.
        self._pending = [line.raw for line in lines[kept:]]
        self._published, self._batch = lines[kept - 1].seq if kept else 0, 0
        self._digest = lines[-1].digest if lines else ""
        self._segment_at = self._tail_at = time.monotonic()
        self._unkept, self._tail_bytes = b"", 0
        self._lock = threading.Lock()
        self._tail = -1
        self.tail_error = ""
        """Why the tail could not be written last; a full local disk stops nobody."""
        try:
            self._publish()
        except BaseException:
            if self._tail >= 0:
                os.close(self._tail)  # it is tried again for as long as the store is away
            raise

    def replay(self) -> Supervisor:
        """The supervisor as the journal leaves it. Once: it goes on with the snapshot's own state.

        Raises:
            ReplayMismatch: this code decides differently than what follows the snapshot.
        """
        try:
            return replay(self.records, self.start.state if self.start is not None else None)
        except ReplayMismatch as e:
            raise self._told(e) from e

    def read_again(self) -> Supervisor:
        """The supervisor as the records until now leave it, from the store. Blocks.

        Raises:
            JournalError: what is there is damaged, or a newer controller has taken over.
            StoreError, OSError: the store failed; nothing is lost, try again.
        """
        self.publish()
        return last_known(self._url, self._tail_path)

    def _told(self, mismatch: ReplayMismatch) -> ReplayMismatch:
        """With what is to be done, when other code wrote the record."""
        wrote, here = (_claimed(self._url, epoch) for epoch in (mismatch.epoch, self.epoch))
        if wrote["code"] == here["code"]:
            return mismatch
        code = wrote["code"][:12] or "unknown"
        by = f"{mismatch}. Shepherd {wrote['version']} (code {code}) wrote it, this is {here['version']}"
        fix = (
            f"resume the run once with {wrote['version']} and stop it; that leaves a snapshot of the run's end, from "
            "which this version starts"
            if wrote["code"]
            else "it is of the time before snapshots, so that no newer version can go on; finish the run with that one"
        )
        told = f"{by} (code {here['code'][:12]}). Fix: {fix}"
        return ReplayMismatch("; ".join([told, *self.passed_over]), mismatch.epoch)

    @property
    def next_seq(self) -> int:
        return self._published + len(self._pending) + 1

    @property
    def head(self) -> tuple[int, str]:
        """Number and digest of the newest record; 0 and nothing while there is none."""
        with self._lock:
            return self.next_seq - 1, self._digest

    @property
    def backlog(self) -> int:
        """Records that are not under run.url yet."""
        return len(self._pending)

    def append(self, event: Event, actions: list[Action]) -> bool:
        """Add a record. Returns whether `publish` must succeed before the actions may be sent."""
        with self._lock:
            seq = self.next_seq
        document = {
            "seq": seq,
            "epoch": self.epoch,
            "event": event_to_json(event),
            "actions": [action_to_json(action) for action in actions],
        }
        self._digest = chained(self._digest, document)
        line = encode(document | {"digest": self._digest})
        with self._lock:
            self._pending.append(line)
            self._unkept += line
        return any(isinstance(action, DECISIONS) for action in actions)

    def keep(self) -> None:
        """What is due by now: the tail on disk within a second, a segment within SEGMENT_INTERVAL_S. See `publish`."""
        now = time.monotonic()
        if self._pending and now - self._segment_at >= SEGMENT_INTERVAL_S:
            self.publish()
        elif now - self._tail_at >= TAIL_INTERVAL_S:
            self._keep_tail()

    def _keep_tail(self) -> None:
        """Bring the tail up to date on the disk. What a full disk cut off is written again, at the same place."""
        self._tail_at = time.monotonic()
        unkept = self._unkept
        try:
            if self._tail < 0:
                self._open_tail()
            written = 0
            while written < len(unkept):
                written += os.pwrite(self._tail, unkept[written:], self._tail_bytes + written)
            os.fsync(self._tail)
        except OSError as e:
            self.tail_error = repr(e)
            return
        self.tail_error = ""
        self._tail_bytes += len(unkept)
        with self._lock:
            self._unkept = self._unkept[len(unkept) :]

    def _open_tail(self) -> None:
        make_folder(str(self._tail_path.parent))
        self._tail = os.open(self._tail_path, os.O_RDWR | os.O_CREAT, 0o644)
        sync_folder(str(self._tail_path.parent))

    def publish(self) -> None:
        """Make every record of now durable under run.url. Blocks.

        Raises:
            JournalError: a newer controller has taken over: what this one writes counts no more.
            StoreError, OSError: the store failed; nothing is lost, try again. The tail holds it meanwhile.
        """
        try:
            self._publish()
        except JournalError:
            raise
        except Exception:
            self._keep_tail()
            raise

    def _publish(self) -> None:
        last = self.next_seq - 1
        while self._published < last:
            with self._lock:
                # A batch that failed is tried again as it was: it may have arrived, and must then be found equal.
                self._batch = self._batch or min(len(self._pending), SEGMENT_RECORDS)
                lines = b"".join(self._pending[: self._batch])
            name = segment_name(self.epoch, self._published + 1)
            if not write_exclusive(self._url, name, lines):
                raise JournalError(f"{self._url}/{name} was written by somebody else")
            with self._lock:
                self._published += self._batch
                del self._pending[: self._batch]
                self._batch = 0
        check_not_replaced(self._url, self.epoch)
        self._empty_tail()
        self._segment_at = time.monotonic()

    def _empty_tail(self) -> None:
        """What the tail held is under run.url now; what came meanwhile goes to its begin."""
        try:
            if self._tail < 0:
                self._open_tail()
            os.ftruncate(self._tail, 0)
        except OSError as e:
            self.tail_error = repr(e)
            return
        with self._lock:
            self._unkept, self._tail_bytes = b"".join(self._pending), 0

    def close(self) -> None:
        """Publish what is left and remove the tail."""
        self.publish()
        if self._tail >= 0:
            os.close(self._tail)
        self._tail_path.unlink(missing_ok=True)


def last_known(url: str, tail: Path | None = None) -> Supervisor:
    """The supervisor as the journal leaves it: what is under `url`, and in a local tail. Takes nothing over.

    Raises:
        JournalError: what is there is damaged, or this code does not decide what is on record.
        StoreError, OSError: the store failed.
    """
    start, lines, _, _ = _from_newest_snapshot(url, tail)
    records = (_record(line) for line in lines if start is None or line.seq > start.header.seq)
    return replay(records, start.state if start is not None else None)


def _from_newest_snapshot(url: str, tail: Path | None) -> tuple[CoreSnapshot | None, list[Line], int, list[str]]:
    """Where to start, the lines from there on, how many of them stand in segments, and why newer snapshots are passed
    over."""
    passed_over = []
    for name in core_snapshots.names(url):
        try:
            snapshot = core_snapshots.read(url, name)
        except FileNotFoundError:
            continue  # who was replaced has just deleted it
        except core_snapshots.Unusable as e:
            passed_over.append(str(e))
            continue
        header = snapshot.header
        lines, kept = read_lines(url, tail, since=header.seq)
        if any(line.seq == header.seq and line.digest == header.record_digest for line in lines):
            return snapshot, lines, kept, passed_over
        passed_over.append(f"{name}: the journal does not have its record {header.seq}")
    return None, *read_lines(url, tail, since=1), passed_over


def check_not_replaced(url: str, epoch: int) -> None:
    """Raises Replaced when a newer epoch has been taken."""
    newest = max((int(m.group(1)) for name in list_names(url, "epochs") if (m := _EPOCH.fullmatch(name))), default=0)
    if newest > epoch:
        raise Replaced(f"{url}: epoch {newest} has taken over from epoch {epoch}")


def _record(line: Line) -> Record:
    content = line.document
    try:
        event = event_from_json(content["event"])
        return Record(seq=line.seq, epoch=content["epoch"], event=event, actions=tuple(content["actions"]))
    except (KeyError, TypeError, ValueError) as e:  # as it was written: the chain holds
        why = f"{line.name}: record {line.seq} is not one that this version reads: {e!r}"
        raise ReplayMismatch(why, int(content["epoch"])) from e


__all__ = [
    "EpochClaim",
    "Journal",
    "JournalError",
    "Record",
    "ReplayMismatch",
    "StoreError",
    "check_not_replaced",
    "claim_epoch",
    "exists",
    "is_on_record",
    "last_known",
    "read",
    "replay",
    "tail_path",
]
