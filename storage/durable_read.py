"""The reading half of a durable checkpoint: DCP's load planner with its blind spots closed, the verifying reader."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner import LoadPlanner as DcpLoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from storage.blocks import READ_BLOCKS, BadBlock, Copy, StoreSource, read_chunk
from storage.commits import read_indices
from storage.index import ITEM_BYTES, Chunk, Index
from storage.manifest import Commit, StateMismatch
from storage.state import dtype_name
from storage.urls import locate, portable_errors


class LoadPlanner(DefaultLoadPlanner):
    """DCP's planner, refusing what it does in silence: casting dtypes, and leaving saved tensors unread."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        for fqn, tensor in self.state_dict.items():
            if fqn not in saved:
                raise StateMismatch(f"{fqn}: not in the checkpoint")
            kind, wanted = saved[fqn], (tuple(tensor.size()), tensor.dtype)
            assert isinstance(kind, TensorStorageMetadata)
            if (tuple(kind.size), kind.properties.dtype) != wanted:
                raise StateMismatch(
                    f"{fqn}: the checkpoint holds {kind.properties.dtype} of shape {tuple(kind.size)}, "
                    f"the run wants {wanted[1]} of shape {wanted[0]}"
                )
        return dataclasses.replace(super().create_local_plan(), planner_data=sorted(self.state_dict))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        assert self.metadata is not None
        asked = {fqn for plan in global_plan for fqn in plan.planner_data}
        unread = sorted(set(self.metadata.state_dict_metadata) - asked)
        if unread:
            raise StateMismatch(f"the checkpoint holds tensors that no rank asks for: {unread[:10]} ({len(unread)})")
        return super().create_global_plan(global_plan)


class Reader(StorageReader):
    """Reads and verifies what a load plan needs, and stages it: `staged` pairs each target (a view) with its value."""

    def __init__(self, url: str, commit: Commit, *, skip_prefix: str) -> None:
        """Tensors whose name starts with a non-empty `skip_prefix` are treated as not saved."""
        self.staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.bad: list[BadBlock] = []
        self._url, self._commit, self._skip = url, commit, skip_prefix
        self._failure: Exception | None = None
        self._places: dict[MetadataIndex, tuple[Index, Chunk]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        # DCP hides an exception raised here behind an assertion of its own; the next hook raises it in full.
        metadata = Metadata({})
        try:
            with portable_errors():
                for index in read_indices(self._url, self._commit):
                    for chunk in index.chunks:
                        if not (self._skip and chunk.fqn.startswith(self._skip)):
                            self._add(metadata, index, chunk)
        except Exception as e:
            self._failure = e
        return metadata

    def _add(self, metadata: Metadata, index: Index, chunk: Chunk) -> None:
        empty = TensorStorageMetadata(TensorProperties(getattr(torch, chunk.dtype)), torch.Size(chunk.shape), [])
        tensor = metadata.state_dict_metadata.setdefault(chunk.fqn, empty)
        assert isinstance(tensor, TensorStorageMetadata)
        tensor.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
        self._places[MetadataIndex(chunk.fqn, chunk.offsets)] = (index, chunk)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self._failure is not None:
            raise self._failure

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def read_data(self, plan: LoadPlan, planner: DcpLoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[int, ReadItem]]] = {}
        for item in plan.items:
            index, chunk = self._places[item.storage_index]
            if item.lengths.numel():
                by_file.setdefault(index.data, []).append((chunk.file_offset, item))
        with portable_errors():
            for items in by_file.values():
                self._read_file([item for _, item in sorted(items, key=lambda pair: pair[0])], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(self, items: list[ReadItem], planner: DcpLoadPlanner) -> None:
        """Stage items of one data file, given in the order of their chunks."""
        index, _ = self._places[items[0].storage_index]
        copy = Copy(index, StoreSource(locate(self._url)))
        for item in items:
            target = planner.resolve_tensor(item).detach()
            value = _read_box(copy, item, self._places[item.storage_index][1], self.bad)
            assert target.dtype == value.dtype, (target.dtype, value.dtype)
            self.staged.append((target, value.reshape(target.shape)))


def _read_box(copy: Copy, item: ReadItem, chunk: Chunk, bad: list[BadBlock]) -> torch.Tensor:
    """The box of a chunk that an item wants, in memory of its own, shape `item.lengths`."""
    value = torch.empty(tuple(item.lengths) or (1,), dtype=getattr(torch, chunk.dtype))
    assert dtype_name(value.dtype) == chunk.dtype
    row_bytes = math.prod(chunk.sizes[1:]) * ITEM_BYTES[chunk.dtype]
    first = item.storage_offsets[0] if chunk.sizes else 0
    n_rows = item.lengths[0] if chunk.sizes else 1
    group = max(1, READ_BLOCKS * copy.index.block_bytes // row_bytes)
    for row in range(first, first + n_rows, group):
        stop = min(row + group, first + n_rows)
        raw = _read_range(copy, chunk, row * row_bytes, stop * row_bytes, bad)
        rows = torch.frombuffer(raw, dtype=value.dtype).view(-1, *chunk.sizes[1:])
        for dim in range(1, len(item.lengths)):
            rows = rows.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
        value[row - first : stop - first] = rows
    return value


def _read_range(copy: Copy, chunk: Chunk, start: int, stop: int, bad: list[BadBlock]) -> memoryview:
    """Bytes [start, stop) of a chunk."""
    size = copy.index.block_bytes
    begin, end = start // size, -(-stop // size)
    buffer = memoryview(bytearray(min(end * size, chunk.n_bytes) - begin * size))
    read_chunk([(copy, chunk)], begin, end, buffer, bad)
    return buffer[start - begin * size : stop - begin * size]
