"""Snapshots of the core: what the supervisor knew after one record of the journal, so that nobody folds from record 1.

A snapshot is a file of two JSON lines under ``run.url``, created exclusively and never changed::

    snapshots/00000002-0000000137.jsonl     the state after record 137, written by epoch 2

The first line says which record that is, by number and digest, so that it belongs to one history only; which code has
folded it; and the digest of the second line, which is the state (`codec.digest`). A digest over the first line ends it.

The journal stays the truth: a snapshot that is damaged, that belongs to another history, or that this version does not
read is passed over, and the one before serves. Segments are never deleted for a snapshot.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orchestrator.core
import storage.manifest
import trainer.contract
from orchestrator.core.codec import state_from_json
from orchestrator.core.state import State
from storage.urls import StoreError, list_names, read_bytes, remove, write_exclusive
from trainer.contract import build

KEPT = 3
"""Snapshots that are kept, the newest: two may be damaged or of another history, and the third still serves."""

_NAME = re.compile(r"\d{8}-\d{10}\.jsonl")


class Unusable(ValueError):
    """A snapshot from which this code cannot start."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a snapshot's first line says."""

    seq: int
    """The last record that the state has folded."""
    record_digest: str
    code: str
    """`code_digest` of who folded it."""
    version: str
    """The same for people: Shepherd's version."""
    state_digest: str


@dataclass(frozen=True, kw_only=True)
class CoreSnapshot:
    name: str
    """The file."""
    header: Header
    state: State


@functools.cache
def code_digest() -> str:
    """Names the code that decides: a digest over the sources of the core and of what it imports."""
    (core,) = orchestrator.core.__path__
    sources = [*sorted(Path(core).glob("*.py")), Path(trainer.contract.__file__), Path(storage.manifest.__file__)]
    digests = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sources]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:32]


def names(url: str) -> list[str]:
    """Of all snapshots, the newest first."""
    found = [name for name in list_names(url, "snapshots") if _NAME.fullmatch(name)]
    return [f"snapshots/{name}" for name in sorted(found, reverse=True)]


def write(url: str, epoch: int, seq: int, record_digest: str, version: str, state: dict[str, Any]) -> None:
    """Create the snapshot of a state (`codec.state_to_json`) after record `seq`, which has this digest.

    Raises:
        StoreError, OSError: the store failed, or holds another snapshot under this name.
    """
    text = _compact(state)
    header = Header(
        seq=seq, record_digest=record_digest, code=code_digest(), version=version, state_digest=_sha256(text)
    )
    first = asdict(header)
    line = _compact(first | {"digest": _sha256(_compact(first))})
    name = f"snapshots/{epoch:08d}-{seq:010d}.jsonl"
    if not write_exclusive(url, name, line + b"\n" + text + b"\n"):
        raise StoreError(f"{url}/{name} was written by somebody else")


def read(url: str, name: str) -> CoreSnapshot:
    """The snapshot in the file `name`, checked.

    Raises:
        Unusable: it is damaged, or of a version whose state this one does not read.
        FileNotFoundError: it has been deleted.
    """
    lines = read_bytes(url, name).split(b"\n")
    header = _header(lines, name)
    try:
        state = state_from_json(json.loads(lines[1]))
        state.check()
        state.check_nodes()
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as e:  # it is as it was written
        wrote = f"Shepherd {header.version} (code {header.code[:12]})"
        raise Unusable(f"{name}, written by {wrote}, is not one that this version reads: {e!r}") from e
    return CoreSnapshot(name=name, header=header, state=state)


def _header(lines: list[bytes], name: str) -> Header:
    """The header of a snapshot's lines, when all of them are as they were written."""
    try:
        first, text, end = lines
        document = json.loads(first)
        digest = document.pop("digest")
        header = build(Header, document)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise Unusable(f"{name} is damaged: {e!r}") from e
    if digest != _sha256(_compact(document)) or header.state_digest != _sha256(text) or end:
        raise Unusable(f"{name} is damaged: a digest does not match")
    return header


def prune(url: str) -> None:
    """Delete all snapshots but the newest."""
    for name in names(url)[KEPT:]:
        remove(url, name)


def _compact(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
