"""The journal: what was decided, durable before it is done.

Records are JSON lines, numbered without gaps, each with a digest over itself and the record before it. They are
gathered in a local tail that is fsynced, and go in immutable segments, created exclusively, under ``run.url``::

    epochs/00000002.json                    who took over, when, with which version
    journal/00000002-0000000137.jsonl       records 137 and on, written by epoch 2

A controller takes epoch N+1 by exclusive create *before* it reads. The journal is what the newest epoch has written,
and what that follows, record by record, by their digests: whatever else a controller that was replaced still wrote, or
left in a tail, belongs to no history. Damage breaks the chain and is named.

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.core.actions import DECISIONS, Action
from orchestrator.core.codec import action_to_json, event_from_json, event_to_json
from orchestrator.core.events import Event
from orchestrator.core.supervisor import Supervisor
from storage.urls import StoreError, list_names, make_folder, read_bytes, sync_folder, write_exclusive

SEGMENT_INTERVAL_S = 30.0
"""Progress reports lost with the head's disk, at most; shorter means more objects on the store."""
TAIL_INTERVAL_S = 1.0
"""Progress reports lost with the controller's process or its machine's power, at most."""
SEGMENT_RECORDS = 10_000
"""A longer backlog goes in several segments; the largest records, of 16,384 ranks, are few and have 2 MB."""
READERS = 16
"""Segments that are read at once."""
CLAIM_TRIES = 8
"""More controllers than these never begin at once: one tries again only when another has begun."""

_SEGMENT = re.compile(r"(\d{8})-(\d{10})\.jsonl")
_EPOCH = re.compile(r"(\d{8})\.json")


class JournalError(RuntimeError):
    """The journal cannot be read, or somebody else has taken the run over."""


class Replaced(JournalError):
    """A newer controller has taken the run over: nothing that this one decides counts any more."""


class ReplayMismatch(JournalError):
    """This code does not decide what the journal says was decided."""


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
        document["nonce"] = secrets.token_hex(8)  # two controllers must not write the same record
        if write_exclusive(url, f"epochs/{epoch:08d}.json", json.dumps(document).encode()):
            return EpochClaim(epoch=epoch, began_unix_us=began)
    raise JournalError(f"{url}: {CLAIM_TRIES} epochs in a row were taken by others")


def exists(url: str) -> bool:
    """Whether a run has been started under `url`."""
    return any(_EPOCH.fullmatch(name) for name in list_names(url, "epochs"))


def read(url: str, tail: Path | None = None) -> list[Record]:
    """All valid records in order, from the segments and then from the local tail, up to the first damage of the tail.

    Raises:
        JournalError: a segment is damaged or missing.
    """
    return [_record(line) for line in _read_lines(url, tail)[0]]


def _read_lines(url: str, tail: Path | None) -> tuple[list[_Line], int]:
    """The journal's lines in order, and how many of them stand in segments."""
    candidates: dict[int, list[_Line]] = {}
    head: _Line | None = None
    segments = sorted(m.groups() for name in list_names(url, "journal") if (m := _SEGMENT.fullmatch(name)))
    names = [f"journal/{epoch}-{first}.jsonl" for epoch, first in segments]
    # A run leaves thousands a day, and an object store answers each in tens of milliseconds.
    with ThreadPoolExecutor(READERS) as readers:
        contents = readers.map(partial(read_bytes, url), names)
        segments_read = list(zip(names, segments, contents, strict=True))
    for name, (_, first), content in segments_read:
        for line in _segment(content, name, int(first)):
            candidates.setdefault(line.seq, []).append(line)
            head = line
    lines = _history(url, head, candidates) if head is not None else []
    in_segments = len(lines)
    for line in _tail_lines(tail):
        if line.follows(lines[-1] if lines else None):
            lines.append(line)
    return lines, in_segments


def _history(url: str, head: _Line, candidates: dict[int, list[_Line]]) -> list[_Line]:
    """What `head` follows, from the first record to itself."""
    lines = [head]
    while (seq := lines[-1].seq) > 1:
        before = candidates.get(seq - 1)
        if before is None:
            raise JournalError(f"{url}: record {seq - 1} is missing, before {lines[-1].name}")
        follows = [line for line in before if lines[-1].follows(line)]
        if not follows:
            names = " and ".join(dict.fromkeys(line.name for line in (*before, lines[-1])))
            raise JournalError(f"{url}: record {seq} does not follow any record {seq - 1}: damage in {names}")
        lines.append(follows[0])
    if not lines[-1].follows(None):
        raise JournalError(f"{url}: record 1 is damaged, in {lines[-1].name}")
    return lines[::-1]


def replay(records: Iterable[Record]) -> Supervisor:
    """The supervisor that these records made, each decision checked against the one on record.

    Raises:
        ReplayMismatch: this code decides differently, or refuses the record.
    """
    supervisor = Supervisor()
    for record in records:
        try:
            actions = tuple(action_to_json(action) for action in supervisor.handle(record.event))
        except Exception as e:
            raise ReplayMismatch(f"{_name(record)}: this code fails on it: {e!r}") from e
        if actions != record.actions:
            raise ReplayMismatch(f"{_name(record)}: on record {list(record.actions)}, decided now {list(actions)}")
    return supervisor


def _name(record: Record) -> str:
    return f"record {record.seq} ({type(record.event).__name__})"


class Journal:
    """Appends the records of one epoch. One thread may `append` while another does the rest."""

    def __init__(self, url: str, tail: Path, epoch: int) -> None:
        """Open the journal under `url` for a controller that has claimed `epoch`, and read what is there (`records`).

        Raises:
            JournalError: what is there is damaged, or a newer controller has taken over.
            StoreError, OSError: the store failed; nothing is lost, try again.
        """
        lines, kept = _read_lines(url, tail)
        self.records = [_record(line) for line in lines]
        self._url, self._tail_path, self._epoch = url, tail, epoch
        # What only the tail holds is published first, now as part of this epoch.
        self._pending = [line.raw for line in lines[kept:]]
        self._published, self._batch = kept, 0
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

    @property
    def next_seq(self) -> int:
        return self._published + len(self._pending) + 1

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
            "epoch": self._epoch,
            "event": event_to_json(event),
            "actions": [action_to_json(action) for action in actions],
        }
        self._digest = _digest(self._digest, document)
        line = _encode(document | {"digest": self._digest})
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
            name = f"journal/{self._epoch:08d}-{self._published + 1:010d}.jsonl"
            if not write_exclusive(self._url, name, lines):
                raise JournalError(f"{self._url}/{name} was written by somebody else")
            with self._lock:
                self._published += self._batch
                del self._pending[: self._batch]
                self._batch = 0
        check_not_replaced(self._url, self._epoch)
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


def check_not_replaced(url: str, epoch: int) -> None:
    """Raises Replaced when a newer epoch has been taken."""
    newest = max((int(m.group(1)) for name in list_names(url, "epochs") if (m := _EPOCH.fullmatch(name))), default=0)
    if newest > epoch:
        raise Replaced(f"{url}: epoch {newest} has taken over from epoch {epoch}")


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A record as it stands in a file."""

    name: str
    """The file."""
    raw: bytes
    document: dict[str, Any]

    @property
    def seq(self) -> int:
        return int(self.document["seq"])

    @property
    def digest(self) -> str:
        return str(self.document["digest"])

    def follows(self, before: _Line | None) -> bool:
        """Whether this record was written after that one (None: as the first), and both are as they were written."""
        content = {key: value for key, value in self.document.items() if key != "digest"}
        return self.digest == _digest(before.digest if before is not None else "", content)


def _line(raw: bytes, name: str) -> _Line:
    """Raises ValueError when it is no record's line."""
    document = json.loads(raw)
    if not isinstance(document, dict) or not isinstance(document.get("seq"), int) or "digest" not in document:
        raise ValueError(f"not a record: {raw[:80]!r}")
    return _Line(name=name, raw=raw + b"\n", document=document)


def _segment(raw: bytes, name: str, first: int) -> list[_Line]:
    *whole, torn = raw.split(b"\n")
    try:
        lines = [_line(text, name) for text in whole]
    except ValueError as e:
        raise JournalError(f"{name}: a line is damaged: {e}") from e
    if torn or [line.seq for line in lines] != list(range(first, first + max(1, len(lines)))):
        raise JournalError(f"{name}: is cut off, or not all there")
    return lines


def _tail_lines(tail: Path | None) -> list[_Line]:
    """Up to what a crash has left unfinished: a torn line, or blocks that never reached the disk."""
    lines: list[_Line] = []
    if tail is not None and tail.exists():
        for text in tail.read_bytes().split(b"\n")[:-1]:
            try:
                lines.append(_line(text, str(tail)))
            except ValueError:
                break
    return lines


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _digest(before: str, content: dict[str, Any]) -> str:
    """Names a record and all that came before it: half a SHA-256."""
    return hashlib.sha256(before.encode() + _encode(content)).hexdigest()[:32]


def _record(line: _Line) -> Record:
    content = line.document
    try:
        event = event_from_json(content["event"])
        return Record(seq=line.seq, epoch=content["epoch"], event=event, actions=tuple(content["actions"]))
    except (KeyError, TypeError, ValueError) as e:  # as it was written: the chain holds
        raise JournalError(f"{line.name}: record {line.seq} is not one that this version reads: {e!r}") from e


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
    "read",
    "replay",
    "tail_path",
]
