"""What each rank needs of a checkpoint: DCP's load planner with its blind spots closed, and who is to read it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
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

from storage.blocks import Distance
from storage.manifest import StateMismatch
from storage.read_plan import Orders, Place, Want, plan_reads


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


class PlanReader(StorageReader):
    """Reads nothing: takes what DCP plans for this rank, and on its coordinator shares out who reads it.

    After DCP's load, `wants` is what this rank needs, `targets` each item's view of a tensor, `orders` its share.
    """

    def __init__(self, places: Sequence[Place], reach: Mapping[int, Distance | None], longest: int) -> None:
        """`reach` of this rank and `longest`: see `plan_reads`."""
        self.wants: list[Want] = []
        self.targets: dict[int, torch.Tensor] = {}
        self.orders = Orders((), ())
        self._places, self._reach, self._longest = places, reach, longest
        self._numbers = {
            MetadataIndex(place.chunk.fqn, torch.Size(place.chunk.offsets)): number
            for number, place in enumerate(places)
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, TensorStorageMetadata] = {}
        for place in self._places:
            chunk = place.chunk
            if chunk.fqn not in tensors:
                properties = TensorProperties(getattr(torch, chunk.dtype))
                tensors[chunk.fqn] = TensorStorageMetadata(properties, torch.Size(chunk.shape), [])
            box = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            tensors[chunk.fqn].chunks.append(box)
        return Metadata(dict(tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return dataclasses.replace(plan, storage_data=self._reach)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        wants = [[want for want, _ in self._wanted(plan)] for plan in plans]
        orders = plan_reads(self._places, wants, [plan.storage_data for plan in plans], self._longest)
        return [dataclasses.replace(plan, storage_data=own) for plan, own in zip(plans, orders, strict=True)]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def read_data(self, plan: LoadPlan, planner: DcpLoadPlanner) -> Future[None]:
        self.orders = plan.storage_data
        for want, item in self._wanted(plan):
            self.wants.append(want)
            self.targets[want.item] = planner.resolve_tensor(item).detach()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _wanted(self, plan: LoadPlan) -> Iterator[tuple[Want, ReadItem]]:
        for n, item in enumerate(plan.items):
            number = self._numbers[item.storage_index]
            # A scalar's item has one element of one dimension.
            scalar = not self._places[number].chunk.sizes
            box = ((), ()) if scalar else (tuple(item.storage_offsets), tuple(item.lengths))
            if item.lengths.numel():
                yield Want(n, number, box), item
