"""The index of a rank's data file: which box of which tensor lies where, and the digest of every block. No torch.

The index is one JSON object. Its own digest stands in the commit record, so a reader trusts it once that matches. Data
files hold raw little-endian elements in row-major order; each chunk starts on a multiple of ALIGN_BYTES.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from storage.manifest import FORMAT_VERSION, ManifestError, wrong_version

# Chunks start on pages, so that a file can be written with O_DIRECT and mapped.
ALIGN_BYTES = 4096
# Unit of damage: what is refetched when a digest fails. 16 bytes of digest a MiB keeps the index at 0.003% of the data.
BLOCK_BYTES = 1024 * 1024

# Bytes of one element by torch's dtype name.
ITEM_BYTES = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
}


ChunkKey = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name, offsets and sizes: which box of which tensor."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A box of one tensor in a data file: the box [offsets, offsets + sizes) of a tensor of shape `shape`."""

    fqn: str
    shape: tuple[int, ...]
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file_offset: int
    n_bytes: int
    blocks: tuple[str, ...]
    """xxh3_128 of each BLOCK_BYTES of the chunk's own bytes; the last block may be shorter. Equal content has equal
    digests wherever it lies, so a chunk of the same digests in another file is a copy of this one."""

    @property
    def key(self) -> ChunkKey:
        return self.fqn, self.offsets, self.sizes


@dataclass(frozen=True, kw_only=True)
class Index:
    rank: int
    step: int
    epoch: int
    generation: int
    data: str
    """Path of the data file, relative to ``run.url``."""
    data_bytes: int
    chunks: tuple[Chunk, ...]
    block_bytes: int = BLOCK_BYTES
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"

    @staticmethod
    def from_json(raw: bytes) -> Index:
        """The index of these bytes, checked in itself.

        Raises:
            ManifestError: not an index, of another format, or inconsistent.
        """
        try:
            document: dict[str, Any] = json.loads(raw)
            version = document["format_version"]
            if version != FORMAT_VERSION:
                raise ManifestError(f"index {wrong_version(version, FORMAT_VERSION)}")
            chunks = tuple(_chunk(entry) for entry in document.pop("chunks"))
            index = Index(chunks=chunks, **document)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise e if isinstance(e, ManifestError) else ManifestError(f"not an index: {e!r}") from e
        for chunk in index.chunks:
            _check_chunk(chunk, index)
        return index


def _chunk(entry: dict[str, Any]) -> Chunk:
    boxes = {name: tuple(int(n) for n in entry[name]) for name in ("shape", "offsets", "sizes")}
    return Chunk(**{**entry, **boxes, "blocks": tuple(entry["blocks"])})


def _check_chunk(chunk: Chunk, index: Index) -> None:
    if chunk.dtype not in ITEM_BYTES:
        raise ManifestError(f"{chunk.fqn}: dtype {chunk.dtype!r} is unknown to this Shepherd")
    if chunk.n_bytes != math.prod(chunk.sizes) * ITEM_BYTES[chunk.dtype]:
        raise ManifestError(f"{chunk.fqn}: {chunk.n_bytes} bytes are not {chunk.sizes} of {chunk.dtype}")
    if chunk.file_offset % ALIGN_BYTES or not 0 <= chunk.file_offset <= index.data_bytes - chunk.n_bytes:
        raise ManifestError(f"{chunk.fqn}: chunk at {chunk.file_offset} does not lie inside {index.data}")
    if len(chunk.blocks) != -(-chunk.n_bytes // index.block_bytes):
        raise ManifestError(f"{chunk.fqn}: {len(chunk.blocks)} digests for {chunk.n_bytes} bytes")


def check_tiling(fqn: str, shape: tuple[int, ...], boxes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Check that boxes (offsets, sizes) cover a tensor of this shape exactly once.

    Raises:
        ManifestError: a box lies outside, two overlap, or elements are missing.
    """
    boxes = [(offsets, sizes) for offsets, sizes in boxes if math.prod(sizes)]
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ManifestError(f"{fqn}: chunk at {offsets} of {sizes} does not fit shape {shape}")
        if any(o < 0 or o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            raise ManifestError(f"{fqn}: chunk at {offsets} of {sizes} lies outside shape {shape}")
    held, wanted = sum(math.prod(sizes) for _, sizes in boxes), math.prod(shape)
    if held < wanted:
        raise ManifestError(f"{fqn}: chunks hold {held} of {wanted} elements")
    # In bounds and of the right volume, boxes tile exactly when no two overlap. Sweep along the dimension that cuts
    # the boxes finest, so that few are open at once.
    dim = max(range(len(shape)), key=lambda d: len({offsets[d] for offsets, _ in boxes}), default=None)
    if dim is None:
        if len(boxes) != 1:
            raise ManifestError(f"{fqn}: a scalar is saved {len(boxes)} times")
        return
    open_boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for offsets, sizes in sorted(boxes, key=lambda box: box[0][dim]):
        open_boxes = [(o, s) for o, s in open_boxes if o[dim] + s[dim] > offsets[dim]]
        for o, s in open_boxes:
            if all(a < b + t and b < a + u for a, u, b, t in zip(offsets, sizes, o, s, strict=True)):
                raise ManifestError(f"{fqn}: chunks at {offsets} of {sizes} and at {o} of {s} overlap")
        open_boxes.append((offsets, sizes))


def check_tensors(chunks: Iterable[Chunk]) -> dict[str, list[Chunk]]:
    """All chunks of a checkpoint by tensor name, checked: one shape and dtype a name, and an exact tiling.

    Raises:
        ManifestError: they do not make whole tensors.
    """
    tensors: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        tensors.setdefault(chunk.fqn, []).append(chunk)
    for fqn, parts in tensors.items():
        kinds = {(chunk.shape, chunk.dtype) for chunk in parts}
        if len(kinds) != 1:
            raise ManifestError(f"{fqn}: ranks disagree on its shape and dtype: {sorted(kinds)}")
        check_tiling(fqn, parts[0].shape, [(chunk.offsets, chunk.sizes) for chunk in parts])
    return tensors
