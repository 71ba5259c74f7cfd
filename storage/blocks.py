"""Block digests of a data file: computed while it is written, checked before a byte of it is used. No torch."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from storage.index import Index
from storage.manifest import ManifestError
from storage.urls import Store

# Blocks fetched by one request: 16 MiB. With single 1 MiB reads, loading fell to a tenth of the disk's rate.
READ_BLOCKS = 16


class BlockDigester:
    """xxh3_128 of each `block_bytes` of a stream."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._digests: list[str] = []
        self._open = xxhash.xxh3_128()
        self._filled = 0

    def update(self, data: memoryview) -> None:
        start = 0
        while start < len(data):
            piece = data[start : start + self._block_bytes - self._filled]
            self._open.update(piece)
            self._filled += len(piece)
            start += len(piece)
            if self._filled == self._block_bytes:
                self._close()

    def digests(self) -> tuple[str, ...]:
        """The digests of all blocks; ends the stream."""
        if self._filled:
            self._close()
        return tuple(self._digests)

    def _close(self) -> None:
        self._digests.append(self._open.hexdigest())
        self._open.reset()
        self._filled = 0


class VerifiedFile:
    """A rank's data file, read in ascending order; each needed block is fetched and checked once."""

    def __init__(self, store: Store, index: Index, ranges: Iterable[tuple[int, int]]) -> None:
        """`ranges` are the byte ranges [start, stop) that will be read; blocks outside of them are not fetched."""
        self._store, self._index = store, index
        size = index.block_bytes
        self._needed = sorted({b for start, stop in ranges for b in range(start // size, -(-stop // size))})
        self._next = 0
        self._held: dict[int, memoryview] = {}

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of the file. No call may start before an earlier one's first block.

        Raises:
            ManifestError: a block is damaged, cut off or missing.
        """
        size = self._index.block_bytes
        first, last = start // size, -(-stop // size)
        self._held = {b: data for b, data in self._held.items() if b >= first}
        while self._next < len(self._needed) and self._needed[self._next] < last:
            self._fetch(first)
        blocks = [self._held[b] for b in range(first, last)]
        if not blocks:
            return bytearray()
        blocks[-1] = blocks[-1][: stop - (last - 1) * size]
        blocks[0] = blocks[0][start - first * size :]
        return bytearray().join(blocks)

    def _fetch(self, first: int) -> None:
        """Read the next run of adjacent needed blocks, and keep those from block `first` on."""
        begin = end = self._needed[self._next]
        while self._next < len(self._needed) and self._needed[self._next] == end and end - begin < READ_BLOCKS:
            self._next += 1
            end += 1
        for number, data in enumerate(read_blocks(self._store, self._index, begin, end), start=begin):
            if isinstance(data, ManifestError):
                # Once more: what was damaged on its way here is whole where it lies.
                (data,) = read_blocks(self._store, self._index, number, number + 1)
            if isinstance(data, ManifestError):
                raise data
            if number >= first:
                self._held[number] = data


def read_blocks(store: Store, index: Index, begin: int, end: int) -> list[memoryview | ManifestError]:
    """Blocks [begin, end) of a data file: each one's bytes, or what is wrong with it."""
    size = index.block_bytes
    try:
        raw = store.fs.cat_file(store.path(index.data), start=begin * size, end=min(end * size, index.data_bytes))
    except FileNotFoundError:
        raw = b""
    results: list[memoryview | ManifestError] = []
    for number in range(begin, end):
        wanted = min(size, index.data_bytes - number * size)
        data = memoryview(raw)[(number - begin) * size :][:wanted]
        if len(data) != wanted:
            results.append(ManifestError(f"{index.data}: block {number} is cut off ({len(data)} of {wanted} bytes)"))
        elif xxhash.xxh3_128_hexdigest(data) != index.blocks[number]:
            results.append(ManifestError(f"{index.data}: block {number} is damaged (its xxh3_128 does not match)"))
        else:
            results.append(data)
    return results
