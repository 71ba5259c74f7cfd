"""Saves one after another: planned once for all ranks, and anew when a rank holds other tensors."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_pool import run_ranks
from test_storage_ranks import ran, sharded_state
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from storage.checkpointer import Checkpointer
from storage.commits import create_commit
from storage.durable import load
from storage.manifest import Commit, RankPart
from storage.state import TrainState, local_tensor

MESH = (1, 2, 1)


def count_plans() -> list[int]:
    """Of how many ranks each plan that this process makes is."""
    made: list[int] = []
    actual = DefaultSavePlanner.create_global_plan

    def counted(self, plans):
        made.append(len(plans))
        return actual(self, plans)

    DefaultSavePlanner.create_global_plan = counted
    return made


def checkpointer(folder: str, generation: int = 1) -> Checkpointer:
    rank = dist.get_rank()
    return Checkpointer(
        url=f"{folder}/run",
        run="r",
        rank=rank,
        world_size=dist.get_world_size(),
        epoch=1,
        generation=generation,
        ram_dir=f"{folder}/ram",
        node="n",
    )


def save_all(folder: str, what: str) -> object:
    """Saves of steps 10 to 13; before that of step 12 something changes on rank 1."""
    made, saver, rank = count_plans(), checkpointer(folder), dist.get_rank()
    state = sharded_state(MESH)
    told: list[str] = []
    for step in range(10, 14):
        state.step = step
        local_tensor(state.tensors["large"]).add_(step)
        if step == 12 and rank == 1:
            if what == "names":
                state.per_rank["more"] = torch.ones(3)
            elif what == "content":
                state.tensors["plain"].add_(1)
            elif what == "place":  # where the data file is to be
                Path(folder, "run", "checkpoints", "data", "step-00000012-e1-g1", "rank-00001.bin").mkdir(parents=True)
        try:
            part = saver.save(state)
        except Exception as error:
            told.append(f"{step} {type(error).__name__}: {error}")
            if what == "content" and rank == 1:
                state.tensors["plain"].sub_(1)
            continue
        parts: list[RankPart] = [part] * dist.get_world_size()
        dist.all_gather_object(parts, part)
        commit = Commit(run="r", step=step, epoch=1, generation=1, mesh={}, parts=tuple(parts), versions={})
        if rank == 0:
            create_commit(f"{folder}/run", commit)
        dist.barrier()
        restored = TrainState(0, {n: torch.zeros_like(t) for n, t in state.tensors.items()}, dict(state.per_rank))
        load(f"{folder}/run", commit, restored)
        for name, tensor in state.tensors.items():
            assert torch.equal(local_tensor(restored.tensors[name]), local_tensor(tensor)), (step, name)
    left = sorted(os.listdir(Path(folder, "run", "checkpoints", "data", "step-00000012-e1-g1")))
    return made, told, left


def test_one_plan_serves_as_long_as_all_ranks_hold_the_same(tmp_path):
    (planned, told, _), (elsewhere, _, _) = ran(run_ranks(save_all, 2, tmp_path, str(tmp_path), ""))
    assert planned == [2] and elsewhere == [] and told == []


def test_what_one_rank_holds_anew_is_planned_anew(tmp_path):
    (planned, told, _), _ = ran(run_ranks(save_all, 2, tmp_path, str(tmp_path), "names"))
    assert planned == [2, 2] and told == []


def test_a_save_by_an_old_plan_is_refused_for_replicas_that_differ(tmp_path):
    results = ran(run_ranks(save_all, 2, tmp_path, str(tmp_path), "content"))
    for planned, told, left in results:
        assert len(told) == 1 and told[0].startswith("12 ManifestError") and "plain" in told[0], told
        assert not [name for name in left if not name.startswith(".")], left
        assert sum(planned) in (0, 2), "the next save needs no new plan"


def test_a_rank_that_cannot_write_fails_a_save_by_an_old_plan_on_every_rank(tmp_path):
    for planned, told, _ in ran(run_ranks(save_all, 2, tmp_path, str(tmp_path), "place")):
        assert len(told) == 1 and told[0].startswith("12 CheckpointFailed: rank 1") and "FileExists" in told[0], told
        assert sum(planned) in (0, 2)
