"""Blocks of chunks: digested before they are written, checked before a byte of them is used. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol

import xxhash

from storage import direct, s3
from storage.index import BLOCK_BYTES, Chunk, Index
from storage.manifest import ManifestError
from storage.urls import Store

# Blocks fetched by one request: 16 MiB. With single 1 MiB reads, loading fell to a tenth of the disk's rate.
READ_BLOCKS = 16


class Source(Protocol):
    """A place that holds data files: a store, this node's memory, a peer's memory."""

    @property
    def name(self) -> str:
        """For people: which copy was bad."""
        ...

    def read(self, index: Index, start: int, into: memoryview) -> int:
        """Fill `into` with the bytes of the data file of `index` from `start` on; how many of them there were.

        Raises:
            SourceError: the place cannot be read, or holds no such file any more.
        """
        ...


class SourceError(RuntimeError):
    """A place that was said to hold a copy cannot be read."""


class Distance(IntEnum):
    """From a rank to a copy: what a byte from there costs. The first two lie on its own node, for it alone."""

    MEMORY = 0
    DISK = 1
    PEER = 2
    STORE = 3


@dataclass(frozen=True)
class Copy:
    """A data file in one place. Of a chunk, another index's is a copy when key and block digests are the same."""

    index: Index
    source: Source
    distance: Distance = Distance.STORE


@dataclass(frozen=True, kw_only=True)
class BadBlock:
    """A block that was not what its digest says, in one place: evidence."""

    source: str
    data: str
    fqn: str
    offsets: tuple[int, ...]
    block: int
    problem: str

    def __str__(self) -> str:
        return f"{self.data}: {self.fqn} at {self.offsets}, block {self.block} {self.problem} ({self.source})"


@dataclass(frozen=True)
class StoreSource:
    """Data files under a URL."""

    store: Store

    @property
    def name(self) -> str:
        return self.store.url

    def read(self, index: Index, start: int, into: memoryview) -> int:
        if not into:
            return 0  # s3fs would send a range without an end
        path = self.store.path(index.data)
        try:
            if self.store.local:
                return direct.read(Path(path), start, into)
            if s3.is_s3(self.store.fs):
                return s3.read(self.store.fs, path, start, into)
            raw = self.store.fs.cat_file(path, start=start, end=start + len(into))
        except FileNotFoundError:
            return 0
        except Exception as e:
            if self._ends_by(path, start):
                return 0
            raise SourceError(f"{self.name}: {index.data}: {type(e).__name__}: {e}") from e
        into[: len(raw)] = raw
        return len(raw)

    def _ends_by(self, path: str, start: int) -> bool:
        """Whether a file is over at `start`: S3 refuses such a range (416), which is damage and no failure to read."""
        with contextlib.suppress(Exception):
            return int(self.store.fs.size(path)) <= start
        return False


class Holder(Source, Protocol):
    """Somebody who may hold a copy. Nobody is asked before it is needed."""

    @property
    def slot(self) -> int:
        """Whose snapshot it may hold."""
        ...

    def copy(self) -> Copy:
        """Raises SourceError or ManifestError when there is none."""
        ...


def block_digests(data: memoryview, block_bytes: int = BLOCK_BYTES) -> tuple[str, ...]:
    """xxh3_128 of each block of a chunk's bytes."""
    return tuple(
        xxhash.xxh3_128_hexdigest(data[start : start + block_bytes]) for start in range(0, len(data), block_bytes)
    )


def read_chunk(
    copies: Sequence[tuple[Copy, Chunk]], begin: int, end: int, into: memoryview, bad: list[BadBlock]
) -> None:
    """Fill `into` with blocks [begin, end) of a chunk, each from the first of `copies` that holds it whole.

    `copies` pairs each place with the chunk as its index describes it; all have the same key and block digests. What
    is found damaged is added to `bad`. A block is asked for twice where it was damaged: what was damaged on its way is
    whole where it lies.

    Raises:
        ManifestError: no copy holds a block whole. `into` is partly filled.
        SourceError: a copy that was needed cannot be read, and no other has what it should have brought.
    """
    assert copies and len({(chunk.key, chunk.blocks) for _, chunk in copies}) == 1, copies
    todo, problems, unread = list(range(begin, end)), [], None
    for copy, chunk in copies:
        for _ in range(2):
            found: list[BadBlock] = []
            try:
                for first, last in runs(todo):
                    target = _blocks_of(into, begin, first, last, chunk, copy.index)
                    found += read_blocks(copy, chunk, first, last, target)
            except SourceError as e:
                unread = e
                break
            todo = [damaged.block for damaged in found]
            if not todo:
                return
        bad += found
        problems += found
    if unread is not None:
        raise unread
    raise ManifestError("; ".join(str(damaged) for damaged in problems))


def read_blocks(copy: Copy, chunk: Chunk, begin: int, end: int, into: memoryview) -> list[BadBlock]:
    """Fill `into` with blocks [begin, end) of a chunk from one place; those that are not what they must be."""
    size = copy.index.block_bytes
    assert len(into) == min(end * size, chunk.n_bytes) - begin * size, (len(into), begin, end, chunk)
    done = copy.source.read(copy.index, chunk.file_offset + begin * size, into)
    return check_blocks(copy, chunk, begin, end, into, done)


def check_blocks(copy: Copy, chunk: Chunk, begin: int, end: int, data: memoryview, done: int) -> list[BadBlock]:
    """Those of blocks [begin, end) that are not what they must be, when the first `done` bytes of `data` were read."""
    size, bad = copy.index.block_bytes, []
    for block in range(begin, end):
        content = data[(block - begin) * size : (block - begin + 1) * size]
        held = min(max(0, done - (block - begin) * size), len(content))
        problem = ""
        if held != len(content):
            problem = f"is cut off ({held} of {len(content)} bytes)"
        elif xxhash.xxh3_128_hexdigest(content) != chunk.blocks[block]:
            problem = "is damaged (its xxh3_128 does not match)"
        if problem:
            bad.append(
                BadBlock(
                    source=copy.source.name,
                    data=copy.index.data,
                    fqn=chunk.fqn,
                    offsets=chunk.offsets,
                    block=block,
                    problem=problem,
                )
            )
    return bad


def fetch_block(chunk: Chunk, block: int, into: memoryview, holders: Sequence[Holder], bad: list[BadBlock]) -> None:
    """Fill `into` with a block of a chunk, from the first of `holders` that has it whole; see `read_chunk`.

    Raises:
        ManifestError: nobody has; the message says what is wrong with each.
    """
    copies: list[tuple[Copy, Chunk]] = []
    problems = []
    for holder in holders:
        try:
            copy = holder.copy()
        except (SourceError, ManifestError) as e:
            problems.append(str(e))
            continue
        same = (held for held in copy.index.chunks if (held.key, held.blocks) == (chunk.key, chunk.blocks))
        copies += [(copy, held) for held in same]
    if copies:
        try:
            return read_chunk(copies, block, block + 1, into, bad)
        except (SourceError, ManifestError) as e:
            problems.append(str(e))
    raise ManifestError("; ".join(problems) or f"nobody else holds {chunk.fqn} at {chunk.offsets}")


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Adjacent numbers as ranges [first, last), none longer than READ_BLOCKS."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number and number - found[-1][0] < READ_BLOCKS:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def _blocks_of(into: memoryview, begin: int, first: int, last: int, chunk: Chunk, index: Index) -> memoryview:
    size = index.block_bytes
    return into[(first - begin) * size : min(last * size, chunk.n_bytes) - begin * size]
