"""What ranks that save or load together tell each other: values, and whose error is everybody's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
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
    error = _portable(error)
    told = gathered((value, error), group)
    errors = _errors(told)
    if errors:
        raise _joined(errors) from error
    return [each for each, _ in told]


def all_true(value: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether every rank's is. Collective."""
    told = torch.tensor([value], dtype=torch.uint8)
    if size_of(group) > 1:
        dist.all_reduce(told, op=dist.ReduceOp.MIN, group=group)
    return bool(told)


def judged(
    value: T, error: Exception | None, judge: Callable[[list[T]], None], group: dist.ProcessGroup | None
) -> None:
    """Have the first rank judge all ranks' values, when no rank has an error. Collective.

    Raises:
        StateMismatch, ManifestError, CheckpointFailed: a rank has an error, or `judge` has raised one; on every rank.
    """
    error = _portable(error)
    first = rank_of(group) == 0
    told: list[tuple[T, Exception | None]] = [(value, error)] * size_of(group)
    if len(told) > 1:
        dist.gather_object((value, error), told if first else None, group=group, group_dst=0)
    verdict = [_errors(told) if first else {}]
    if first and not verdict[0]:
        try:
            judge([each for each, _ in told])
        except Exception as e:
            verdict = [_errors([(None, _portable(e))])]
    if len(told) > 1:
        dist.broadcast_object_list(verdict, group=group, group_src=0)
    if verdict[0]:
        raise _joined(verdict[0]) from error


def _portable(error: Exception | None) -> Exception | None:
    if error is None or isinstance(error, (StateMismatch, ManifestError, StoreError, FileExistsError)):
        return error
    return StoreError(f"{type(error).__name__}: {error}")  # a store's own types need not be known to other ranks


def _errors(told: Iterable[tuple[object, Exception | None]]) -> dict[int, Exception]:
    return {rank: error for rank, (_, error) in enumerate(told) if error is not None}


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
