"""Sharded checkpoints on any fsspec URL: torch DCP plans who saves and reads which box, the bytes are our own.

DCP's public planners divide replicated tensors between ranks and reshard between meshes. Its own reader and writer are
not used: they check nothing that they read, and keep their metadata as a pickle. Layout: storage/manifest.py; commit
records: storage/commits.py.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from storage.durable_read import LoadPlanner, Reader
from storage.durable_write import SavePlanner, Writer
from storage.manifest import IMPORT_EPOCH, Commit, ManifestError, RankPart, StateMismatch
from storage.state import TrainState

RANK_PREFIX = "rank/"


class CheckpointFailed(RuntimeError):
    """A save or load failed on some rank, which the message names; every rank of the group raises it."""


def write_part(url: str, state: TrainState, *, step: int, epoch: int, generation: int, rank: int) -> RankPart:
    """Save this rank's part of a checkpoint over the default process group; see `save_part`."""
    return save_part(Writer(url, step=step, epoch=epoch, generation=generation, rank=rank), state, rank)


def save_part(
    writer: Writer,
    state: TrainState,
    rank: int,
    *,
    check: Callable[[], None] = lambda: None,
    group: dist.ProcessGroup | None = None,
) -> RankPart:
    """Save this rank's part of a checkpoint; durable when this returns. Collective over `group`, or over the default.

    Without a process group, this process saves everything. The checkpoint exists once its commit record does. When any
    rank fails, every rank does, and removes what it has written.

    Args:
        check: called on this rank first; when it raises, nothing is written.

    Raises:
        ManifestError: ranks hold different content under one name, or the parts do not make whole tensors.
        CheckpointFailed: a rank could not write; nothing may be committed.
    """
    assert rank == _rank(), f"rank {rank} saves as rank {_rank()} of its process group"
    try:
        with _dcp_errors():
            named = _named(state, rank, per_rank=True)
            dcp_save(named, storage_writer=writer, planner=SavePlanner(check), process_group=group)
    except Exception:
        writer.discard()
        raise
    assert writer.part is not None
    return writer.part


def load(url: str, commit: Commit, state: TrainState) -> None:
    """Fill `state` in place from a checkpoint written on any mesh. Collective over the default process group.

    Every rank first reads and checks all that it needs; tensors change only after all ranks have. Per-rank tensors are
    restored when the world size is the one that saved them, and left alone otherwise. An import has none.

    Raises:
        StateMismatch: the checkpoint does not hold exactly the tensors that the ranks ask for, each in its shape and
            dtype. No tensor has changed.
        ManifestError: a file is missing or damaged (named with its block). No tensor has changed.
        CheckpointFailed: a rank could not read. No tensor has changed.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    same_world = commit.epoch != IMPORT_EPOCH and len(commit.parts) == world_size
    reader = Reader(url, commit, skip_prefix="" if same_world else RANK_PREFIX)
    with _dcp_errors():
        dcp_load(_named(state, _rank(), per_rank=same_world), storage_reader=reader, planner=LoadPlanner())
    with torch.no_grad():
        for target, value in reader.staged:
            target.copy_(value)
    state.step = commit.step


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _named(state: TrainState, rank: int, *, per_rank: bool) -> dict[str, Any]:
    reserved = sorted(name for name in state.tensors if name.startswith(RANK_PREFIX))
    if reserved:
        raise ValueError(f"names that start with {RANK_PREFIX!r} are reserved for per_rank: {reserved}")
    own = {f"{RANK_PREFIX}{rank:05d}/{name}": tensor for name, tensor in state.per_rank.items()}
    return {**state.tensors, **own} if per_rank else dict(state.tensors)


@contextlib.contextmanager
def _dcp_errors() -> Iterator[None]:
    """DCP raises a BaseException that holds each rank's error; make one Exception of ours of it."""
    try:
        with contextlib.ExitStack() as stack:
            if not dist.is_initialized():  # DCP warns that one process works alone, which is meant
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", UserWarning)
            yield
    except CheckpointException as e:
        errors = {rank: wrapped[0] for rank, wrapped in sorted(e.failures.items())}
        kinds = (StateMismatch, ManifestError)
        ours = next((k for k in kinds if any(isinstance(error, k) for error in errors.values())), CheckpointFailed)
        text = "; ".join(
            f"rank {rank}: {error if isinstance(error, kinds) else repr(error)}" for rank, error in errors.items()
        )
        raise ours(text) from e
