"""The tensors of a committed checkpoint, whichever mesh has written it, read in windows of bounded memory. No torch.

Elements are raw: unsigned integers of the element's size, since numpy has no bfloat16. `decoded` makes numbers of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.blocks import Copy, StoreSource, read_chunk
from storage.commits import read_indices
from storage.index import ITEM_BYTES, Chunk, Index
from storage.manifest import Commit
from storage.urls import Store, locate

# What is held of a tensor at a time, at least one row along dimension 0: large enough for an object store's latency.
WINDOW_BYTES = 16 * 1024 * 1024

PER_RANK = "rank/"
"""Names that begin so are one rank's own, and mean something only to a mesh of as many ranks."""

Raw = npt.NDArray[Any]

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_NO_NUMBERS = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor of a checkpoint; its chunks tile it exactly, in the order of their first rows."""

    fqn: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[tuple[Index, Chunk], ...]

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n_elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint whose indices have been read and checked."""

    store: Store
    commit: Commit
    tensors: dict[str, SavedTensor]


def open_checkpoint(url: str, commit: Commit) -> Saved:
    """Read the indices of a checkpoint.

    Raises:
        ManifestError: one is missing or damaged, or the chunks do not tile each tensor exactly.
    """
    parts: dict[str, list[tuple[Index, Chunk]]] = {}
    for index in read_indices(url, commit):
        for chunk in index.chunks:
            parts.setdefault(chunk.fqn, []).append((index, chunk))
    tensors = {
        fqn: SavedTensor(
            fqn=fqn,
            shape=found[0][1].shape,
            dtype=found[0][1].dtype,
            parts=tuple(sorted(found, key=lambda part: part[1].offsets)),
        )
        for fqn, found in sorted(parts.items())
    }
    return Saved(store=locate(url), commit=commit, tensors=tensors)


def windows(saved: Saved, tensor: SavedTensor) -> Iterator[Raw]:
    """A tensor in row-major order, a window of rows along dimension 0 at a time, each of shape [rows, ...].

    Raises:
        ManifestError: a block is damaged, cut off or missing.
    """
    shape = tensor.shape or (1,)
    for first, stop in _row_windows(shape, tensor.dtype):
        yield _read_rows(saved.store, tensor, shape, first, stop)


def chunk_windows(store: Store, index: Index, chunk: Chunk) -> Iterator[Raw]:
    """The elements of one chunk in row-major order, flat, a window at a time.

    Raises:
        ManifestError: a block is damaged, cut off or missing.
    """
    for first, stop in _row_windows(chunk.sizes or (1,), chunk.dtype):
        row_bytes = _row_bytes(chunk)
        yield _elements(_read(store, index, chunk, first * row_bytes, stop * row_bytes), chunk.dtype)


def same_content(a: Chunk, b: Chunk) -> bool:
    """Whether two chunks of one shape and dtype hold the same bytes, by their digests."""
    return a.blocks == b.blocks


def decoded(raw: Raw, dtype: str) -> Raw | None:
    """The numbers that raw elements stand for; None for types that numpy cannot express."""
    if dtype in _NO_NUMBERS:
        return None
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.dtype(dtype))


def _read(store: Store, index: Index, chunk: Chunk, start: int, stop: int) -> memoryview:
    """Bytes [start, stop) of a chunk, verified."""
    size = index.block_bytes
    begin, end = start // size, -(-stop // size)
    buffer = memoryview(bytearray(min(end * size, chunk.n_bytes) - begin * size))
    read_chunk([(Copy(index, StoreSource(store)), chunk)], begin, end, buffer, [])
    return buffer[start - begin * size : stop - begin * size]


def _read_rows(store: Store, tensor: SavedTensor, shape: Sequence[int], first: int, stop: int) -> Raw:
    window = np.empty((stop - first, *shape[1:]), _UNSIGNED[ITEM_BYTES[tensor.dtype]])
    for index, chunk in tensor.parts:
        offsets, sizes = chunk.offsets or (0,), chunk.sizes or (1,)
        begin, end = max(first, offsets[0]), min(stop, offsets[0] + sizes[0])
        if begin >= end or not chunk.n_bytes:
            continue
        row_bytes = _row_bytes(chunk)
        raw = _read(store, index, chunk, (begin - offsets[0]) * row_bytes, (end - offsets[0]) * row_bytes)
        box = (
            slice(begin - first, end - first),
            *(slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True)),
        )
        window[box] = _elements(raw, tensor.dtype).reshape(end - begin, *sizes[1:])
    return window


def _row_windows(shape: Sequence[int], dtype: str) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most WINDOW_BYTES, or of one row."""
    row_bytes = math.prod(shape[1:]) * ITEM_BYTES[dtype]
    if not row_bytes:
        return
    group = max(1, WINDOW_BYTES // row_bytes)
    for first in range(0, shape[0], group):
        yield first, min(first + group, shape[0])


def _row_bytes(chunk: Chunk) -> int:
    return math.prod(chunk.sizes[1:]) * ITEM_BYTES[chunk.dtype]


def _elements(raw: memoryview, dtype: str) -> Raw:
    return np.frombuffer(raw, _UNSIGNED[ITEM_BYTES[dtype]])
