"""Sharded checkpoints on any fsspec URL: torch DCP plans who saves and reads which box, the bytes are our own.

DCP's public planners divide replicated tensors between ranks and reshard between meshes. Its own reader and writer are
not used: they check nothing that they read, and keep their metadata as a pickle. Layout: storage/manifest.py; commit
records: storage/commits.py; how a state is filled: storage/restore.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult

from storage.blocks import BadBlock, Copy, StoreSource
from storage.commits import check_whole, index_of, read_index_bytes
from storage.durable_write import Writer
from storage.index import Index
from storage.local import LocalTier
from storage.manifest import IMPORT_EPOCH, Commit, RankPart
from storage.ranks import CheckpointFailed, agreed, all_true, dcp_errors, judged, rank_of, size_of
from storage.restore import load_copies
from storage.save_plan import Planned, SavePlanner
from storage.state import TrainState, check_usable, named_tensors
from storage.urls import locate, portable_errors

__all__ = ["CheckpointFailed", "load", "save_part", "write_part"]


def write_part(url: str, state: TrainState, *, step: int, epoch: int, generation: int, rank: int) -> RankPart:
    """Save this rank's part of a checkpoint over the default process group; see `save_part`."""
    return save_part(Writer(url, step=step, epoch=epoch, generation=generation, rank=rank), state, rank)


def save_part(
    writer: Writer,
    state: TrainState,
    rank: int,
    *,
    check: Callable[[], None] = lambda: None,
    failure: Exception | None = None,
    group: dist.ProcessGroup | None = None,
    planned: Planned | None = None,
) -> RankPart:
    """Save this rank's part of a checkpoint; durable when this returns. Collective over `group`, or over the default.

    Without a process group, this process saves everything. The checkpoint exists once its commit record does. When any
    rank fails, every rank does, and removes what it has written.

    The first rank plans for all, in Python: of thousands of ranks' tensors that takes it minutes. So a plan serves
    until a rank holds other tensors.

    Args:
        check: called on this rank once digests of all that it holds are taken; when it raises, the save fails.
        failure: why this rank can save nothing; it is told to the others, and nothing is written.
        planned: from save to save over one group. None: planned anew.

    Raises:
        ManifestError: ranks hold different content under one name, or the parts do not make whole tensors.
        CheckpointFailed: a rank could not write, or has a state into which a load has failed; nothing may be committed.
    """
    assert rank == rank_of(None), f"rank {rank} saves as rank {rank_of(None)} of its process group"

    def checks() -> None:
        check_usable(state)
        check()

    planner = SavePlanner(checks, failure, planned or Planned())
    try:
        named = named_tensors(state, rank)
        plan = planner.plan_as_before(named)
        if all_true(plan is not None, group):
            assert plan is not None
            _write_as_planned(writer, plan, planner, group)
        else:
            with dcp_errors():
                dcp_save(named, storage_writer=writer, planner=planner, process_group=group)
    except Exception:
        writer.discard()
        raise
    assert writer.part is not None
    return writer.part


def _write_as_planned(writer: Writer, plan: SavePlan, planner: SavePlanner, group: dist.ProcessGroup | None) -> None:
    """What follows the planning in `dcp_save`."""
    results: list[WriteResult] = []
    error: Exception | None = None
    try:
        results = writer.write_data(plan, planner).value()
    except Exception as e:
        error = e
    judged(results, error, lambda told: writer.finish(Metadata({}), told), group)


def load(
    url: str,
    commit: Commit,
    state: TrainState,
    *,
    group: dist.ProcessGroup | None = None,
    local: LocalTier | None = None,
    near: Sequence[Copy] = (),
) -> list[BadBlock]:
    """Fill `state` in place from a checkpoint written on any mesh; damage that was found on the way. See `load_copies`.

    Collective over `group`, or over the default process group, which has to be of the CPU. What this node has in
    `local` or in `near`, with the same content, is read from there. An import has no per-rank tensors.

    Raises:
        StateMismatch: the checkpoint does not hold exactly the tensors that the ranks ask for, each in its shape and
            dtype. No tensor has changed.
        ManifestError: a file is missing or damaged (named with its block). The state is spoilt, unless it was an index.
        CheckpointFailed: a rank could not read. The state is spoilt, unless it was an index.
    """
    source = StoreSource(locate(url))
    parts = [[Copy(index, source)] for index in _indices(url, commit, group)]
    if local is not None:
        for copies, part in zip(parts, commit.parts, strict=True):
            here = local.copy(part.index)
            if here is not None:
                copies.insert(0, here)
    if near:
        parts[0] = [*near, *parts[0]]  # matched by content, with any part's chunks
    return load_copies(parts, state, per_rank=commit.epoch != IMPORT_EPOCH, group=group)


def _indices(url: str, commit: Commit, group: dist.ProcessGroup | None) -> list[Index]:
    """The indices of all parts, each read by one rank."""
    own: dict[int, bytes] = {}
    indices: dict[int, Index] = {}
    error: Exception | None = None
    try:
        with portable_errors():
            store = locate(url)
            for number in range(rank_of(group), len(commit.parts), size_of(group)):
                own[number] = read_index_bytes(store, commit, commit.parts[number])
                indices[number] = index_of(own[number], commit, commit.parts[number])
    except Exception as e:
        error = e
    for told in agreed(own, error, group):
        indices.update({n: index_of(raw, commit, commit.parts[n]) for n, raw in told.items() if n not in indices})
    found = [indices[number] for number in range(len(commit.parts))]
    check_whole(commit, found)
    return found
