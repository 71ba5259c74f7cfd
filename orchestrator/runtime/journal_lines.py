"""The journal's records as they stand in files: JSON lines, chained by their digests, in segments and in a local tail.

What is one history, and what is not, is decided here; what the records say is `journal.py`'s.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from storage.urls import list_names, read_bytes

READERS = 16
"""Segments that are read at once."""

_SEGMENT = re.compile(r"(\d{8})-(\d{10})\.jsonl")


class JournalError(RuntimeError):
    """The journal cannot be read, or somebody else has taken the run over."""


@dataclass(frozen=True, kw_only=True)
class Line:
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

    def follows(self, before: Line | None) -> bool:
        """Whether this record was written after that one (None: as the first), and both are as they were written."""
        content = {key: value for key, value in self.document.items() if key != "digest"}
        return self.digest == chained(before.digest if before is not None else "", content)


def segment_name(epoch: int, first: int) -> str:
    return f"journal/{epoch:08d}-{first:010d}.jsonl"


def encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def chained(before: str, content: dict[str, Any]) -> str:
    """Names a record and all that came before it: half a SHA-256."""
    return hashlib.sha256(before.encode() + encode(content)).hexdigest()[:32]


def read_lines(url: str, tail: Path | None, since: int) -> tuple[list[Line], int]:
    """The journal's lines in order, from record `since` on, and how many of them stand in segments.

    They begin earlier when the segments end before `since`: with the last line that stands in one. Segments that hold
    older records only are not read.

    Raises:
        JournalError: a segment that is read is damaged, or one is missing.
    """
    candidates: dict[int, list[Line]] = {}
    head: Line | None = None
    segments = _segments(url, since)
    names = [segment_name(epoch, first) for epoch, first in segments]
    # A run leaves thousands a day, and an object store answers each in tens of milliseconds.
    with ThreadPoolExecutor(READERS) as readers:
        contents = list(readers.map(partial(read_bytes, url), names))
    for name, (_, first), content in zip(names, segments, contents, strict=True):
        for line in _segment(content, name, first):
            candidates.setdefault(line.seq, []).append(line)
            head = line
    lines = _history(url, head, candidates, since) if head is not None else []
    in_segments = len(lines)
    for line in _tail_lines(tail):
        if line.follows(lines[-1] if lines else None):
            lines.append(line)
    return lines, in_segments


def _segments(url: str, since: int) -> list[tuple[int, int]]:
    """Epoch and first record of every segment that may hold record `since` or a later one."""
    found = (_SEGMENT.fullmatch(name) for name in list_names(url, "journal"))
    segments = sorted((int(m.group(1)), int(m.group(2))) for m in found if m)
    # One that is followed by another of its epoch ends where that begins; where an epoch's last one ends is not known.
    older = {this for this, next in itertools.pairwise(segments) if this[0] == next[0] and next[1] <= since}
    return [segment for segment in segments if segment not in older]


def _history(url: str, head: Line, candidates: dict[int, list[Line]], since: int) -> list[Line]:
    """What `head` follows, from record `since` to itself."""
    lines = [head]
    while (seq := lines[-1].seq) > since:
        before = candidates.get(seq - 1)
        if before is None:
            raise JournalError(f"{url}: record {seq - 1} is missing, before {lines[-1].name}")
        follows = [line for line in before if lines[-1].follows(line)]
        if not follows:
            names = " and ".join(dict.fromkeys(line.name for line in (*before, lines[-1])))
            raise JournalError(f"{url}: record {seq} does not follow any record {seq - 1}: damage in {names}")
        lines.append(follows[0])
    if lines[-1].seq == 1 and not lines[-1].follows(None):
        raise JournalError(f"{url}: record 1 is damaged, in {lines[-1].name}")
    return lines[::-1]


def _line(raw: bytes, name: str) -> Line:
    """Raises ValueError when it is no record's line."""
    document = json.loads(raw)
    if not isinstance(document, dict) or not isinstance(document.get("seq"), int) or "digest" not in document:
        raise ValueError(f"not a record: {raw[:80]!r}")
    return Line(name=name, raw=raw + b"\n", document=document)


def _segment(raw: bytes, name: str, first: int) -> list[Line]:
    *whole, torn = raw.split(b"\n")
    try:
        lines = [_line(text, name) for text in whole]
    except ValueError as e:
        raise JournalError(f"{name}: a line is damaged: {e}") from e
    if torn or [line.seq for line in lines] != list(range(first, first + max(1, len(lines)))):
        raise JournalError(f"{name}: is cut off, or not all there")
    return lines


def _tail_lines(tail: Path | None) -> list[Line]:
    """Up to what a crash has left unfinished: a torn line, or blocks that never reached the disk."""
    lines: list[Line] = []
    if tail is not None and tail.exists():
        for text in tail.read_bytes().split(b"\n")[:-1]:
            try:
                lines.append(_line(text, str(tail)))
            except ValueError:
                break
    return lines
