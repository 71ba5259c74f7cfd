"""Whose a node's folder in the RAM tier is. No torch.

The agent that lives holds a lock on its node's folder, which ends with its process. What nobody holds was left by a
node whose Ray has died: before a run goes on after the loss of its whole cluster, the next agent on that machine adopts
such a folder, with its snapshots, as its own node's; what nobody has adopted is swept once the run trains.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import xxhash

from storage.ram import HEADER_BYTES, MAGIC, PREFIX, Header, node_folder, parse_header


def own(ram_dir: str, run: str, node: str, adopts: bool) -> int:
    """Make and lock the node's folder. With `adopts`, one that nobody holds becomes it: that with the newest snapshot.

    Returns:
        The descriptor that holds the lock until it is closed, or its process ends.

    Raises:
        OSError: the folder cannot be made, or somebody else holds it.
    """
    folder = node_folder(ram_dir, run, node)
    if adopts and not folder.exists():
        for left in sorted(_others(folder), key=_newest_step, reverse=True):
            lock = _locked(left)
            if lock is not None:
                os.rename(left, folder)
                _rename_snapshots(folder)
                return lock
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = _locked(folder)
    if lock is None:
        raise OSError(f"{folder} is held by another agent, which still lives")
    return lock


def sweep(ram_dir: str, run: str, node: str) -> list[str]:
    """Delete the folders of other nodes than this one that nobody holds; their names."""
    swept = []
    for left in _others(node_folder(ram_dir, run, node)):
        lock = _locked(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
            swept.append(left.name)
    return swept


def _others(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(path for path in folder.parent.iterdir() if path != folder and path.is_dir())
    return []


def _locked(folder: Path) -> int | None:
    """A descriptor with the lock on a folder; None when somebody holds it, or it has been taken from here meanwhile."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(folder)):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _newest_step(folder: Path) -> int:
    return max((header.step for _, _, header in _snapshots(folder)), default=-1)


def _snapshots(folder: Path) -> Iterator[tuple[Path, int, Header]]:
    """Path, sequence counter and header of each complete snapshot, whosever it says it is."""
    for path in sorted(folder.glob("slot-*")):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            sequence, header = parse_header(file.read(HEADER_BYTES))
            if header is not None:
                yield path, sequence, header


def _rename_snapshots(folder: Path) -> None:
    """Each header names the node on which its snapshot lies. One that is torn by a crash holds no snapshot."""
    for path, sequence, header in _snapshots(folder):
        text = json.dumps(asdict(replace(header, node=folder.name)), separators=(",", ":")).encode()
        with open(path, "r+b") as file:
            file.write(PREFIX.pack(MAGIC, sequence, len(text), xxhash.xxh3_128_digest(text)) + text)
