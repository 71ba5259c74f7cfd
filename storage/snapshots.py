"""A rank's side of the RAM tier: copy its own shard into the node's shared memory, and fill tensors from there."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch.distributed.tensor import DTensor

from storage.manifest import ManifestError
from storage.ram import (
    HEADER_BYTES,
    Header,
    SnapshotFile,
    choose_file,
    file_paths,
    newest_step,
    read_header,
    safe_name,
    snapshot_path,
)
from storage.state import TrainState, dtype_name, local_tensor

log = logging.getLogger(__name__)

# Tensors start on cache lines.
_ALIGN_BYTES = 64


class RamTier:
    """The snapshots of one slot. `generation` marks what this rank writes."""

    def __init__(self, ram_dir: str, run: str, node: str, slot: int, *, generation: int = 0) -> None:
        self._place = (ram_dir, run, node, slot)
        self._generation = generation
        self._files: list[SnapshotFile] = []
        self._pinned: int | None = None
        self._layout: _Layout | None = None

    @property
    def newest(self) -> int:
        """Step of the newest complete snapshot; 0 when there is none."""
        return newest_step(*self._place)

    def pin(self, step: int) -> None:
        """Keep the snapshot of `step`, the newest that is complete on all ranks, until a later step is pinned."""
        self._pinned = step

    def snapshot(self, state: TrainState) -> None:
        """Copy the state into shared memory. The first call allocates all three files, later ones nothing.

        Raises:
            OSError: the memory file system is full; earlier snapshots stay.
        """
        layout = self._layout_of(state)
        if not self._files or self._files[0].capacity < layout.n_bytes:
            self._files = [SnapshotFile(path, layout.n_bytes) for path in file_paths(*self._place)]
        file = self._files[choose_file([f.header() for f in self._files], self._pinned)]
        file.begin()
        payload = file.payload(layout.n_bytes)
        for tensor, (offset, n_bytes) in zip(_tensors(state), layout.places, strict=True):
            _copy_out(local_tensor(tensor), payload[offset : offset + n_bytes])
        _, run, node, slot = self._place
        header = Header(
            run=safe_name(run),
            node=safe_name(node),
            slot=slot,
            origin_slot=slot,
            step=state.step,
            generation=self._generation,
            payload_bytes=layout.n_bytes,
            layout=layout.digest,
            payload_digest=xxhash.xxh3_128_hexdigest(payload.data),
        )
        file.finish(header)

    def restore(self, step: int, state: TrainState) -> None:
        """Fill `state` from the snapshot of `step`, after checking its digest.

        A snapshot taken over from a replica fills `tensors` only: its per-rank tensors are the other rank's.

        Raises:
            ManifestError: there is no such snapshot, it is damaged, or of other tensors. No tensor has changed.
        """
        path = snapshot_path(*self._place, step)
        if path is None:
            raise ManifestError(f"no complete snapshot of slot {self._place[3]}, step {step} in {self._place[0]}")
        file = SnapshotFile(path, path.stat().st_size - HEADER_BYTES)
        header = read_header(path)
        if header is None or header.step != step:
            raise ManifestError(f"{path}: the snapshot of step {step} was overwritten")
        layout = self._layout_of(state)
        if header.layout != layout.digest or header.payload_bytes != layout.n_bytes:
            raise ManifestError(f"{path}: the snapshot holds other tensors, shapes or shards than this rank has")
        file.check_payload(header)
        payload = file.payload(layout.n_bytes)
        own = header.origin_slot == header.slot
        if not own and state.per_rank:
            log.warning(
                "slot %d takes over the shard of slot %d; per-rank values stay", header.slot, header.origin_slot
            )
        targets = _tensors(state) if own else _tensors(state)[: len(state.tensors)]
        with torch.no_grad():
            for tensor, (offset, n_bytes) in zip(targets, layout.places, strict=False):
                _copy_in(payload[offset : offset + n_bytes], local_tensor(tensor))
        state.step = step

    def _layout_of(self, state: TrainState) -> _Layout:
        key = [(name, t.dtype, t.shape, getattr(t, "placements", None)) for name, t in _named(state)]
        if self._layout is None or self._layout.key != key:
            self._layout = _Layout(key, state)
        return self._layout


class _Layout:
    """Where each tensor lies in a payload. Computed once a shape of state: the boxes of DTensors are slow to find."""

    def __init__(self, key: list[Any], state: TrainState) -> None:
        self.key = key
        self.places: list[tuple[int, int]] = []
        entries = []
        end = 0
        for name, tensor in _named(state):
            local = local_tensor(tensor)
            n_bytes = math.prod(local.shape) * local.element_size()
            self.places.append((end, n_bytes))
            boxes = tensor.__create_chunk_list__() if isinstance(tensor, DTensor) else []  # type: ignore[no-untyped-call]
            offsets = [list(box.offsets) for box in boxes]
            entries.append([name, dtype_name(tensor.dtype), list(tensor.shape), list(local.shape), offsets, end])
            end += -(-n_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        self.n_bytes = end
        self.digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:32]


def _named(state: TrainState) -> list[tuple[str, torch.Tensor]]:
    """All tensors by name in the order of the payload: global ones first, then per-rank ones."""
    own = [(f"rank/{name}", tensor) for name, tensor in sorted(state.per_rank.items())]
    return [*sorted(state.tensors.items()), *own]


def _tensors(state: TrainState) -> list[torch.Tensor]:
    return [tensor for _, tensor in _named(state)]


def _copy_out(source: torch.Tensor, target: npt.NDArray[np.uint8]) -> None:
    if source.device.type == "cpu" and source.is_contiguous():
        # numpy's copy is 1.8 times as fast as one thread of Tensor.copy_ between host buffers.
        np.copyto(target, source.reshape(-1).view(torch.uint8).numpy())
    elif len(target):
        torch.from_numpy(target).view(source.dtype).view(source.shape).copy_(source)


def _copy_in(source: npt.NDArray[np.uint8], target: torch.Tensor) -> None:
    if len(source):
        target.copy_(torch.from_numpy(source).view(target.dtype).view(target.shape))
