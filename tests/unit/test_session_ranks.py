"""A session of two ranks: each gets back its own, DTensors are kept in parts, and all agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from parallel_pool import run_ranks
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from orchestrator.spec import parse
from storage.commits import create_commit
from storage.manifest import Commit, RankPart, commit_name
from trainer import contract
from trainer.contract import Assign, Restore
from trainer.link import Assignment
from trainer.managed import Managed
from trainer.session import Session


class Recorder:
    def __init__(self) -> None:
        self.messages: list[Any] = []

    def emit(self, message: object) -> None:
        self.messages.append(message)


def session(folder: str, restore: Restore, generation: int) -> tuple[Session, Managed, Recorder]:
    document = {"run": {"name": "own", "url": f"{folder}/run"}, "script": {"command": ["a.py"], "nodes": 2}}
    rank = distributed.get_rank()
    order = Assign(
        epoch=1,
        generation=generation,
        rank=rank,
        world_size=2,
        local_rank=0,
        node=f"node-{rank}",
        store_host="",
        store_port=0,
        restore=restore,
        config=parse(document).worker_config,
        ram_dir=f"{folder}/ram",
    )
    agent = Recorder()
    managed = Managed(Assignment(order), agent)  # type: ignore[arg-type]
    return Session(managed), managed, agent


def new_state() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    return {"sharded": distribute_tensor(torch.zeros(6, 2), mesh, [Shard(0)]), "own": torch.zeros(2), "rank": -1}


def content(state: dict[str, Any]) -> tuple[list[Any], list[float], int]:
    return state["sharded"].full_tensor().flatten().tolist(), state["own"].tolist(), state["rank"]


def keep_and_restore(folder: str) -> Any:
    """A run of three steps, then its restores: from memory, and from the checkpoint."""
    rank = distributed.get_rank()
    first, managed, agent = session(folder, Restore(source="init"), 1)
    state = new_state()
    assert first.restore(state) is None
    for step in (1, 2, 3):
        state["sharded"] += 1
        state["own"] += step * (rank + 1)
        state["rank"] = rank
        first.snapshot(step, state, durable=step == 3)
        first.step(step, loss=float(rank))
    expected = content(state)
    managed.close()
    losses = [m.loss for m in agent.messages if isinstance(m, contract.StepDone)]
    (written,) = [m for m in agent.messages if isinstance(m, contract.ShardWritten)]
    parts: list[Any] = [None, None]
    distributed.all_gather_object(parts, written.part)
    if rank == 0:
        ranks = tuple(RankPart(**part) for part in parts)
        commit = Commit(run="own", step=3, epoch=1, generation=1, mesh={}, parts=ranks, versions={})
        create_commit(f"{folder}/run", commit)
    distributed.barrier()
    found = []
    for generation, restore in (
        (2, Restore(source="ram", step=3, generation=1)),
        (3, Restore(source="durable", step=3, commit=commit_name(3))),
    ):
        again, managed, _ = session(folder, restore, generation)
        state = new_state()
        found.append((again.restore(state), content(state)))
        managed.close()
    return expected, found, losses


def disagree(folder: str) -> Any:
    first, _, _ = session(folder, Restore(source="init"), 1)
    state = new_state()
    first.restore(state)
    try:
        first.snapshot(5 + distributed.get_rank(), state)
    except ValueError as error:
        return str(error)
    return "agreed"


def stop_on_one(folder: str) -> Any:
    first, managed, agent = session(folder, Restore(source="init"), 1)
    state = new_state()
    first.restore(state)
    if distributed.get_rank() == 1:
        managed._assignment.stop.set()
    try:
        first.snapshot(1, state)
    except SystemExit as end:
        return end.code, [m.step for m in agent.messages if isinstance(m, contract.ShardWritten)]
    return "went on"


def test_each_rank_gets_back_its_own_and_its_part(tmp_path: Path) -> None:
    results = run_ranks(keep_and_restore, 2, tmp_path, str(tmp_path))
    for rank, (expected, found, losses) in enumerate(results):
        assert expected == ([3.0] * 12, [6.0 * (rank + 1)] * 2, rank)
        assert found == [(3, expected), (3, expected)]
        assert losses == ([0.0] * 3 if rank == 0 else [None] * 3)


def test_ranks_that_are_at_different_steps_are_told(tmp_path: Path) -> None:
    said = run_ranks(disagree, 2, tmp_path, str(tmp_path))
    assert all("other ranks are at other steps, 5.5 on average" in each for each in said), said


def test_all_ranks_stop_when_one_is_asked(tmp_path: Path) -> None:
    assert run_ranks(stop_on_one, 2, tmp_path, str(tmp_path)) == [(0, [1]), (0, [1])]
