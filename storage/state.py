"""The state of a training run as storage sees it: named tensors in place, and the step that they have completed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing
import torch
from torch.distributed.tensor import DTensor

RANK_PREFIX = "rank/"
"""Of the names under which per-rank tensors are kept: ``rank/00003/rng``."""

SPOILT_STEP = -1
"""Of a state into which a load has failed: see `spoil`."""


@dataclass
class TrainState:
    """Live references: saving reads these tensors, restoring fills them in place.

    `tensors` are global: a name means the same tensor on every rank, such as ``model/layers.3.attention.wq.weight`` or
    ``exp_avg/layers.3.attention.wq.weight``. A DTensor is saved in parts, one from each shard; a plain tensor must be
    equal on all ranks that hold it. `per_rank` are plain tensors that belong to this rank alone, such as ``rng``.
    `optional` are names of either kind that what is restored may lack: they are taken out of the state then.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    per_rank: dict[str, torch.Tensor]
    optional: frozenset[str] = frozenset()

    def without_missing(self, held: Collection[str], rank: int | None) -> TrainState:
        """This state less what is optional and not among the names `held`, as a data file's index knows them.

        For no `rank` the per-rank tensors are not looked at: they are not restored.
        """
        if not self.optional:
            return self
        prefix = f"{RANK_PREFIX}{rank:05d}/" if rank is not None else ""
        return replace(
            self,
            tensors={n: t for n, t in self.tensors.items() if n in held or n not in self.optional},
            per_rank={
                n: t for n, t in self.per_rank.items() if rank is None or prefix + n in held or n not in self.optional
            },
        )

    def restored(self, part: TrainState, step: int) -> None:
        """`part` of this state has been filled, with that of `step`: no other tensors belong to it any more."""
        self.tensors, self.per_rank, self.step = part.tensors, part.per_rank, step


def named_tensors(state: TrainState, rank: int | None) -> dict[str, torch.Tensor]:
    """All tensors under the names by which a data file's index knows them; without the per-rank ones for None.

    Raises:
        ValueError: a global name is reserved for per-rank tensors.
    """
    reserved = sorted(name for name in state.tensors if name.startswith(RANK_PREFIX))
    if reserved:
        raise ValueError(f"names that start with {RANK_PREFIX!r} are reserved for per_rank: {reserved}")
    if rank is None:
        return dict(state.tensors)
    return {**state.tensors, **{f"{RANK_PREFIX}{rank:05d}/{name}": tensor for name, tensor in state.per_rank.items()}}


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, detached; shares its memory."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


def copy_tensor(target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool = False) -> None:
    """Copy all elements; `non_blocking` concerns copies between a device and pinned memory."""
    assert (target.shape, target.dtype) == (source.shape, source.dtype), (target, source)
    on_host = target.device.type == source.device.type == "cpu"
    if on_host and target.is_contiguous() and source.is_contiguous():
        # numpy's copy is 1.8 times as fast as one thread of Tensor.copy_ between host buffers.
        np.copyto(target.reshape(-1).view(torch.uint8).numpy(), source.reshape(-1).view(torch.uint8).numpy())
    else:
        target.copy_(source, non_blocking=non_blocking)


def spoil(state: TrainState, tensors: Iterable[torch.Tensor]) -> None:
    """Make a state useless whose `tensors` may be filled in part: a loss computed from it is NaN, and it has no step.

    Integers and booleans keep what they hold: the older content, or the newer one that was checked.
    """
    state.step = SPOILT_STEP
    for tensor in map(local_tensor, tensors):
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))


def check_usable(state: TrainState) -> None:
    """Raises ValueError when a load into `state` has failed."""
    if state.step == SPOILT_STEP:
        raise ValueError("a load into this state has failed: load into it again, or build it anew")


def host_bytes(tensor: torch.Tensor) -> np.typing.NDArray[np.uint8]:
    """A tensor's elements in row-major order as uint8, shape [n_bytes]; a view when it is contiguous on the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")
