"""The journal: what was decided, durable before it is done.

Records are JSON lines, numbered without gaps. They are gathered in a local tail that is fsynced, and go in immutable
segments, created exclusively, under ``run.url``::

    epochs/00000002.json                    who took over, when, with which version
    journal/00000002-0000000137.jsonl       records 137 and on, written by epoch 2

A controller takes epoch N+1 by exclusive create *before* it reads. What a controller of an older epoch still writes is
ignored from the first record of the newer epoch on: `read` holds that rule.

Without its tail (another machine, a lost disk) a controller misses at most the last `SEGMENT_INTERVAL_S` of progress
reports. A decision is never missing: its segment is durable before the decision is sent.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.actions import DECISIONS, Action
from orchestrator.core.codec import action_to_json, event_from_json, event_to_json
from orchestrator.core.events import Event
from orchestrator.core.supervisor import Supervisor
from storage.urls import StoreError, list_names, read_bytes, write_exclusive

SEGMENT_INTERVAL_S = 30.0
"""Progress reports lost with the head's disk, at most; shorter means more objects on the store."""
TAIL_INTERVAL_S = 1.0
"""Progress reports lost with the controller's machine's power, at most."""

_SEGMENT = re.compile(r"(\d{8})-(\d{10})\.jsonl")
_EPOCH = re.compile(r"(\d{8})\.json")


class JournalError(RuntimeError):
    """The journal cannot be read, or somebody else has taken the run over."""


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


def claim_epoch(url: str, version: str) -> EpochClaim:
    """Take the next epoch of the run under `url`, exclusively.

    Raises:
        JournalError: others took every epoch that was tried (8 in a row).
    """
    for _ in range(8):
        taken = [int(m.group(1)) for name in list_names(url, "epochs") if (m := _EPOCH.fullmatch(name))]
        epoch = max(taken, default=0) + 1
        now = time.time_ns() // 1000
        began = json.loads(read_bytes(url, f"epochs/{min(taken):08d}.json"))["began_unix_us"] if taken else now
        document = {"epoch": epoch, "began_unix_us": began, "taken_unix_us": now, "version": version}
        document["nonce"] = secrets.token_hex(8)  # two controllers must not write the same record
        if write_exclusive(url, f"epochs/{epoch:08d}.json", json.dumps(document).encode()):
            return EpochClaim(epoch=epoch, began_unix_us=began)
    raise JournalError(f"{url}: eight epochs in a row were taken by others")


def exists(url: str) -> bool:
    """Whether a run has been started under `url`."""
    return any(_EPOCH.fullmatch(name) for name in list_names(url, "epochs"))


def read(url: str, tail: Path | None = None) -> list[Record]:
    """All valid records in order, from the segments and then from the local tail.

    A last line of the tail that was cut off by a crash is dropped; any other damage is an error.

    Raises:
        JournalError: a segment is damaged or missing.
    """
    return [_record(line) for line in _read_lines(url, tail)[0]]


def _read_lines(url: str, tail: Path | None) -> tuple[list[dict[str, Any]], int]:
    """The records as JSON objects, and how many of them stand in segments."""
    lines: dict[int, dict[str, Any]] = {}
    written_by: dict[int, int] = {}
    segments = sorted(m.groups() for name in list_names(url, "journal") if (m := _SEGMENT.fullmatch(name)))
    for epoch, first in segments:
        stale = [seq for seq in lines if seq >= int(first) and written_by[seq] < int(epoch)]
        for seq in stale:
            del lines[seq]
        name = f"journal/{epoch}-{first}.jsonl"
        for line in _lines(read_bytes(url, name), name, torn_allowed=False):
            lines[line["seq"]] = line
            written_by[line["seq"]] = int(epoch)
    if sorted(lines) != list(range(1, len(lines) + 1)):
        raise JournalError(f"{url}: the journal has gaps: {len(lines)} records up to number {max(lines)}")
    in_segments = len(lines)
    if tail is not None and tail.exists():
        for line in _lines(tail.read_bytes(), str(tail), torn_allowed=True):
            if line["seq"] == len(lines) + 1:
                lines[line["seq"]] = line
    return [lines[seq] for seq in sorted(lines)], in_segments


def replay(records: Iterable[Record]) -> Supervisor:
    """The supervisor that these records made, each decision checked against the one on record.

    Raises:
        ReplayMismatch: this code decides differently.
    """
    supervisor = Supervisor()
    for record in records:
        actions = tuple(action_to_json(action) for action in supervisor.handle(record.event))
        if actions != record.actions:
            raise ReplayMismatch(
                f"record {record.seq} ({type(record.event).__name__}): on record {list(record.actions)}, "
                f"decided now {list(actions)}"
            )
    return supervisor


class Journal:
    """Appends the records of one epoch. Not thread-safe: one thread at a time."""

    def __init__(self, url: str, tail: Path, epoch: int) -> None:
        """Open the journal under `url` for a controller that has claimed `epoch`, and read what is there (`records`).

        Raises:
            JournalError: what is there is damaged.
        """
        lines, kept = _read_lines(url, tail)
        self.records = [_record(line) for line in lines]
        self._url, self._tail_path, self._epoch = url, tail, epoch
        # What only the tail holds is published first, now as part of this epoch.
        self._pending = [_encode(line) for line in lines[kept:]]
        self._published, self._batch = kept, 0
        self._segment_at = self._tail_at = time.monotonic()
        tail.parent.mkdir(parents=True, exist_ok=True)
        self._tail = open(tail, "r+b" if tail.exists() else "w+b")  # noqa: SIM115  (open as long as the journal is)
        self._tail.seek(0, os.SEEK_END)
        self.publish()

    @property
    def next_seq(self) -> int:
        return self._published + len(self._pending) + 1

    def append(self, event: Event, actions: list[Action]) -> bool:
        """Add a record. Returns whether `publish` must succeed before the actions may be sent."""
        document = {
            "seq": self.next_seq,
            "epoch": self._epoch,
            "event": event_to_json(event),
            "actions": [action_to_json(action) for action in actions],
        }
        line = _encode(document)
        self._pending.append(line)
        self._tail.write(line)
        return any(isinstance(action, DECISIONS) for action in actions)

    def keep(self) -> None:
        """What is due by now: the tail on disk within a second, a segment within SEGMENT_INTERVAL_S. Blocks."""
        now = time.monotonic()
        if self._pending and now - self._segment_at >= SEGMENT_INTERVAL_S:
            self.publish()
        elif now - self._tail_at >= TAIL_INTERVAL_S:
            self._tail_at = now
            self._tail.flush()
            os.fsync(self._tail.fileno())

    def publish(self) -> None:
        """Make every record durable under run.url. Blocks.

        Raises:
            JournalError: a segment with other content stands in its place: this controller has been replaced.
            StoreError, OSError: the store failed; nothing is lost, try again.
        """
        while self._pending:
            # A batch that failed is tried again as it was: it may have arrived, and must then be found equal.
            self._batch = self._batch or len(self._pending)
            name = f"journal/{self._epoch:08d}-{self._published + 1:010d}.jsonl"
            if not write_exclusive(self._url, name, b"".join(self._pending[: self._batch])):
                raise JournalError(f"{self._url}/{name} was written by somebody else: this controller was replaced")
            self._published += self._batch
            del self._pending[: self._batch]
            self._batch = 0
        self._segment_at = self._tail_at = time.monotonic()
        self._tail.seek(0)
        self._tail.truncate()

    def close(self) -> None:
        """Publish what is left and remove the tail."""
        self.publish()
        self._tail.close()
        self._tail_path.unlink(missing_ok=True)


def check_not_replaced(url: str, epoch: int) -> None:
    """Raises JournalError when a newer epoch has been taken: a commit of this controller would be refused."""
    newest = max((int(m.group(1)) for name in list_names(url, "epochs") if (m := _EPOCH.fullmatch(name))), default=0)
    if newest > epoch:
        raise JournalError(f"{url}: epoch {newest} has taken over from epoch {epoch}")


def _lines(raw: bytes, name: str, torn_allowed: bool) -> list[dict[str, Any]]:
    whole, _, torn = raw.rpartition(b"\n")
    if torn and not torn_allowed:
        raise JournalError(f"{name}: the last line is cut off")
    try:
        return [json.loads(line) for line in whole.split(b"\n") if line]
    except ValueError as e:
        raise JournalError(f"{name}: a line is damaged: {e}") from e


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _record(line: dict[str, Any]) -> Record:
    return Record(
        seq=line["seq"], epoch=line["epoch"], event=event_from_json(line["event"]), actions=tuple(line["actions"])
    )


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
]
