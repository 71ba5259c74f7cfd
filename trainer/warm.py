"""A warm worker: what the first step of a process costs once, paid before the process is needed.

Most of a first step's time is Python: DTensor works out how each operation is sharded, and keeps the answer for the
next step. So a worker that waits for an assignment takes one step of its likely rank over process groups that exchange
nothing. A rank's groups have the same names in every mesh of one shape, so what it works out holds in the real one.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.contract import Prepare, WorkerConfig
from trainer.groups import destroy_groups
from trainer.numeric import set_numerics
from trainer.parallel import build_mesh, build_stage, forward_backward, has_warm_up


def prepare(order: Prepare) -> None:
    """Open the device; on a CPU, take a step that leaves nothing behind but caches."""
    # Who wakes up from a wait goes before a batch process; and this policy can be left again without a privilege.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        _prepare(order)
    finally:
        for thread in map(int, os.listdir("/proc/self/task")):  # those that it has started have it from this one
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def _prepare(order: Prepare) -> None:
    set_numerics(order.config)
    if order.config.device == "cuda":
        # No step there: the device's memory is the working rank's.
        torch.cuda.set_device(order.local_rank)
        torch.cuda.synchronize()
        return
    destroy_groups(_step(_small(order.config), order.rank))


def _small(config: WorkerConfig) -> WorkerConfig:
    """The same shapes with one block in each stage, to take little memory."""
    return replace(config, model=replace(config.model, n_layers=config.parallel.pp))


def _step(config: WorkerConfig, rank: int) -> DeviceMesh:
    """Take it; what is left is its mesh."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=config.parallel.world_size)
    mesh = build_mesh(config.parallel, config.device, timedelta(seconds=config.collective_timeout_s), backend="fake")
    stage = build_stage(config, mesh, initial=False)
    if stage.schedule is not None:
        _know_shapes(stage.schedule)
    tokens_BT = torch.zeros(len(stage.rows), config.data.seq_len, dtype=torch.int64)
    forward_backward(stage, tokens_BT if stage.is_first else None, tokens_BT if stage.is_last else None)
    return mesh


def _know_shapes(schedule: Schedule1F1B) -> None:
    """Have it take the shapes that its stage was given: its ranks agree to that by messages, which do not come here."""
    if not has_warm_up(schedule):
        return
    from torch.distributed.pipelining._utils import InferenceMode

    def agree(stages: list[PipelineStage], *_: bool) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    schedule._warmup_p2p = agree  # type: ignore[assignment]
