"""Who saves what of a durable checkpoint: DCP's save planner with its blind spots closed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem

from storage.index import check_tiling
from storage.manifest import ManifestError
from storage.state import host_bytes
from storage.urls import portable_errors


@dataclasses.dataclass
class Planned:
    """What a rank of a group proposed for its last save, and what it was to write then.

    Who writes what depends on all ranks' proposals and on nothing else: see `storage.durable.save_part`.
    """

    proposed: SavePlan | None = None
    final: SavePlan | None = None


class SavePlanner(DefaultSavePlanner):
    """DCP's planner, refusing what it drops in silence: one name for different shapes, dtypes or content.

    A final plan's `planner_data` are those of the rank's boxes that other ranks hold, too. One of them writes each; the
    digests of all go to the coordinator with the results (`Writer.finish`), so that no write waits for digests.
    """

    def __init__(self, check: Callable[[], None], failure: Exception | None, planned: Planned) -> None:
        """
        Args:
            check: called once the content's digests are taken; what it raises fails the save on every rank. So what it
                has found good is what the digests name.
            failure: why this rank cannot take part; fails the save on every rank before anything is written.
            planned: of the save before, and then of this one.
        """
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.check = check
        self.held: list[WriteItem] = []
        """All boxes of this rank, whoever writes them."""
        self._failure = failure
        self._planned = planned

    def create_local_plan(self) -> SavePlan:
        with portable_errors():
            if self._failure is not None:
                raise self._failure
            plan = super().create_local_plan()
            self.held = plan.items
            if self._planned.proposed != plan:
                self._planned.proposed, self._planned.final = plan, None
            return plan

    def plan_as_before(self, named: Mapping[str, torch.Tensor]) -> SavePlan | None:
        """What this rank is to write if every rank proposes what it did for the save before; None: this one does not.

        What is wrong with the state is told when it is planned anew.
        """
        if self._planned.final is not None:
            self.set_up_planner(dict(named))
            try:
                self.create_local_plan()
            except Exception:
                return None
        return self._planned.final

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        shared = _held_twice(all_plans)
        plans, metadata = super().create_global_plan(all_plans)
        for fqn, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
            check_tiling(fqn, tuple(tensor.size), boxes)
        own = [frozenset(item.index for item in plan.items) & shared for plan in all_plans]
        plans = [dataclasses.replace(p, planner_data=o) for p, o in zip(plans, own, strict=True)]
        return plans, Metadata({})  # DCP sends it to every rank, and none needs the boxes of all

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self._planned.final = plan = super().finish_plan(new_plan)
        return plan

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
