"""What ranks that save or load together tell each other: values, and whose error is everybody's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from storage.manifest import ManifestError, StateMismatch
from storage.urls import StoreError

T = TypeVar("T")


class CheckpointFailed(RuntimeError):
    """A save or load failed on some rank, which the message names; every rank of the group raises it."""


def rank_of(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def size_of(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gathered(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Each rank's value, in the order of ranks. Collective."""
    values = [value] * size_of(group)
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def agree(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Return when no rank has an error; see `agreed`."""
    agreed(None, error, group)


def agreed(value: T, error: Exception | None, group: dist.ProcessGroup | None) -> list[T]:
    """Each rank's value, in the order of ranks, when no rank has an error. Collective.

    Raises:
        StateMismatch, ManifestError, CheckpointFailed: a rank has one; the same on every rank, and naming the rank.
    """
    if error is not None and not isinstance(error, (StateMismatch, ManifestError, StoreError, FileExistsError)):
        error = StoreError(f"{type(error).__name__}: {error}")  # a store's own types need not be known to other ranks
    told = gathered((value, error), group)
    errors = {rank: other for rank, (_, other) in enumerate(told) if other is not None}
    if errors:
        raise _joined(errors) from error
    return [each for each, _ in told]


@contextlib.contextmanager
def dcp_errors() -> Iterator[None]:
    """DCP raises a BaseException that holds each rank's error; make one Exception of ours of it."""
    try:
        with contextlib.ExitStack() as stack:
            if not dist.is_initialized():  # DCP warns that one process works alone, which is meant
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", UserWarning)
            yield
    except CheckpointException as e:
        raise _joined({rank: wrapped[0] for rank, wrapped in sorted(e.failures.items())}) from e


def _joined(errors: Mapping[int, BaseException]) -> Exception:
    kinds = (StateMismatch, ManifestError)
    ours = next((k for k in kinds if any(isinstance(error, k) for error in errors.values())), CheckpointFailed)
    told = (f"rank {rank}: {e if isinstance(e, kinds) else repr(e)}" for rank, e in errors.items())
    return ours("; ".join(told))
