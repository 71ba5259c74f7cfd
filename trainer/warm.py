"""A warm worker: what the first step of a process costs once, paid before the process is needed.

Most of a first step's time is Python: DTensor works out how each operation is sharded, and keeps the answer for the next
step. So a worker that waits for an assignment takes one step of its likely rank over process groups that exchange
nothing. Meshes of one rank and one shape get groups of the same names, so what it has worked out holds in the real one.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.contract import Prepare, WorkerConfig
from trainer.groups import destroy_groups
from trainer.numeric import set_numerics
from trainer.parallel import build_mesh, build_stage, forward_backward


def prepare(order: Prepare) -> None:
    """Open the device; on a CPU, take a step that leaves nothing behind but caches."""
    set_numerics(order.config)
    if order.config.device == "cuda":
        # No step there: the device's memory is the working rank's.
        torch.cuda.set_device(order.local_rank)
        torch.cuda.synchronize()
        return
    _step(_small(order.config), order.rank)
    destroy_groups(None)


def _small(config: WorkerConfig) -> WorkerConfig:
    """The same shapes with one block in each stage, to take little memory."""
    return replace(config, model=replace(config.model, n_layers=config.parallel.pp))


def _step(config: WorkerConfig, rank: int) -> None:
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=config.parallel.world_size)  # type: ignore[no-untyped-call]
    mesh = build_mesh(config.parallel, config.device, timedelta(seconds=config.collective_timeout_s), backend="fake")
    try:
        stage = build_stage(config, mesh, initial=False)
        tokens_BT = torch.zeros(len(stage.rows), config.data.seq_len, dtype=torch.int64)
        forward_backward(stage, tokens_BT if stage.is_first else None, tokens_BT if stage.is_last else None)
    finally:
        mesh._pg_registry.clear()
