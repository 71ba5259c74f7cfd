"""What differs between two checkpoints, tensor by tensor, bit by bit, in bounded memory. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from storage.windows import PER_RANK, Raw, Saved, SavedTensor, chunk_windows, decoded, same_content, windows


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How one tensor compares. `only a`: it is in the first checkpoint alone."""

    fqn: str
    kind: Literal["equal", "values", "shape", "dtype", "only a", "only b"]
    detail: str = ""
    n_elements: int = 0
    n_differing: int = 0
    """Elements whose bits differ."""
    max_abs_difference: float | None = None
    """Of the differing elements; None when one of them is no finite number, or the type is not one that numpy knows."""


@dataclass(kw_only=True)
class _Tally:
    """Of a tensor's differing elements."""

    n_differing: int = 0
    max_abs: float = 0.0
    finite: bool = True

    def add(self, a: Raw, b: Raw, dtype: str) -> None:
        unequal = a != b
        count = int(np.count_nonzero(unequal))
        if not count:
            return
        self.n_differing += count
        ours, theirs = decoded(a[unequal], dtype), decoded(b[unequal], dtype)
        if ours is None or theirs is None:
            self.finite = False
            return
        wide = np.complex128 if np.iscomplexobj(ours) else np.float64
        with np.errstate(invalid="ignore", over="ignore"):
            largest = float(np.abs(ours.astype(wide) - theirs.astype(wide)).max())
        self.finite = self.finite and math.isfinite(largest)
        self.max_abs = max(self.max_abs, largest) if self.finite else 0.0


def compare(a: Saved, b: Saved) -> Iterator[Difference]:
    """Each tensor of either checkpoint in the order of names.

    Content is compared by digests where both have cut a tensor alike, and read where they differ or have not. Per-rank
    tensors belong to a number of ranks: checkpoints of different numbers are compared without them.

    Raises:
        ManifestError: a block that had to be read is damaged, cut off or missing.
    """
    for fqn in sorted({*a.tensors, *b.tensors}):
        if fqn.startswith(PER_RANK) and not same_ranks(a, b):
            continue
        ours, theirs = a.tensors.get(fqn), b.tensors.get(fqn)
        if theirs is None:
            yield Difference(fqn=fqn, kind="only a")
        elif ours is None:
            yield Difference(fqn=fqn, kind="only b")
        elif ours.shape != theirs.shape:
            yield Difference(fqn=fqn, kind="shape", detail=f"{list(ours.shape)}, {list(theirs.shape)}")
        elif ours.dtype != theirs.dtype:
            yield Difference(fqn=fqn, kind="dtype", detail=f"{ours.dtype}, {theirs.dtype}")
        else:
            yield _values(a, ours, b, theirs)


def same_ranks(a: Saved, b: Saved) -> bool:
    """Whether as many ranks have written both checkpoints."""
    return len(a.commit.parts) == len(b.commit.parts)


def _values(a: Saved, ours: SavedTensor, b: Saved, theirs: SavedTensor) -> Difference:
    tally = _Tally()
    for left, right in _pairs(a, ours, b, theirs):
        tally.add(left, right, ours.dtype)
    return Difference(
        fqn=ours.fqn,
        kind="values" if tally.n_differing else "equal",
        n_elements=ours.n_elements,
        n_differing=tally.n_differing,
        max_abs_difference=tally.max_abs if tally.finite else None,
    )


def _pairs(a: Saved, ours: SavedTensor, b: Saved, theirs: SavedTensor) -> Iterator[tuple[Raw, Raw]]:
    """Windows of both that may differ."""
    boxes = [(chunk.offsets, chunk.sizes) for _, chunk in ours.parts]
    if boxes != [(chunk.offsets, chunk.sizes) for _, chunk in theirs.parts]:
        yield from zip(windows(a, ours), windows(b, theirs), strict=True)
        return
    for (index, chunk), (other_index, other) in zip(ours.parts, theirs.parts, strict=True):
        if not same_content(chunk, other):
            read = chunk_windows(a.store, index, chunk), chunk_windows(b.store, other_index, other)
            yield from zip(*read, strict=True)
