"""Who saves what of a durable checkpoint: DCP's save planner with its blind spots closed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem

from storage.index import check_tiling
from storage.manifest import ManifestError
from storage.state import host_bytes
from storage.urls import portable_errors


class SavePlanner(DefaultSavePlanner):
    """DCP's planner, refusing what it drops in silence: one name for different shapes, dtypes or content.

    A final plan's `planner_data` are those of the rank's boxes that other ranks hold, too. One of them writes each; the
    digests of all go to the coordinator with the results (`Writer.finish`), so that no write waits for digests.
    """

    def __init__(self, check: Callable[[], None], failure: Exception | None) -> None:
        """
        Args:
            check: called once the content's digests are taken; what it raises fails the save on every rank. So what it
                has found good is what the digests name.
            failure: why this rank cannot take part; fails the save on every rank before anything is written.
        """
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.check = check
        self.held: list[WriteItem] = []
        """All boxes of this rank, whoever writes them."""
        self._failure = failure

    def create_local_plan(self) -> SavePlan:
        with portable_errors():
            if self._failure is not None:
                raise self._failure
            plan = super().create_local_plan()
            self.held = plan.items
            return plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        shared = _held_twice(all_plans)
        plans, metadata = super().create_global_plan(all_plans)
        for fqn, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
            check_tiling(fqn, tuple(tensor.size), boxes)
        own = [frozenset(item.index for item in plan.items) & shared for plan in all_plans]
        return [dataclasses.replace(p, planner_data=o) for p, o in zip(plans, own, strict=True)], metadata

    def content(self, item: WriteItem) -> memoryview:
        """The raw bytes of an item's box."""
        tensor = self.resolve_data(item)
        assert isinstance(tensor, torch.Tensor), item
        return host_bytes(tensor).data


def described(item: WriteItem) -> TensorWriteData:
    """Shape, dtype and box of what is to be written."""
    if item.tensor_data is None:
        raise ManifestError(f"{item.index.fqn}: only tensors can be saved")
    return item.tensor_data


def _held_twice(plans: list[SavePlan]) -> frozenset[MetadataIndex]:
    """Boxes that several ranks hold, of which DCP keeps one.

    Raises:
        ManifestError: ranks use one name for tensors of different shape, dtype or boxes.
    """
    kinds: dict[str, tuple[int, Any, Any]] = {}
    seen: dict[MetadataIndex, tuple[int, Any]] = {}
    twice = set()
    for rank, plan in enumerate(plans):
        for item in plan.items:
            tensor, fqn = described(item), item.index.fqn
            first, *kind = kinds.setdefault(fqn, (rank, tensor.size, tensor.properties.dtype))
            if kind != [tensor.size, tensor.properties.dtype]:
                raise ManifestError(
                    f"{fqn}: rank {first} holds {kind[1]} of shape {tuple(kind[0])}, rank {rank} holds "
                    f"{tensor.properties.dtype} of shape {tuple(tensor.size)}; names must be global"
                )
            holder, sizes = seen.setdefault(item.index, (rank, tensor.chunk.sizes))
            if sizes != tensor.chunk.sizes:
                raise different_content(item.index, holder, rank)
            if holder != rank:
                twice.add(item.index)
    return frozenset(twice)


def different_content(box: MetadataIndex, first: int, second: int) -> ManifestError:
    return ManifestError(
        f"{box.fqn} at {tuple(box.offset or ())}: ranks {first} and {second} hold different content; "
        "values that differ between ranks belong into per_rank, stages need global names"
    )
