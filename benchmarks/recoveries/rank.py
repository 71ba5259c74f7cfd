"""One rank of a peer: the training loop of this repository without Shepherd, with torch's distributed checkpoints.

    python -m recoveries.rank JOB.json

What the loop does is what trainer/loop.py does, less snapshots, audit and reports. Started by torchrun, by ft_launcher
or by a LocalElasticAgent, it resumes from the newest complete checkpoint, as their documentation has it; Ray Train
brings a way of its own to save and to resume.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recoveries.marks import note

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
KEPT = 2


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    rank = int(os.environ["RANK"])
    note(job["marks"], "up", rank)
    train(job, rank, save=lambda state, step: save(job, rank, state, step), load=lambda: newest(job))


def newest(job: dict[str, Any]) -> Path | None:
    """The newest complete checkpoint: DCP writes .metadata last."""
    return max(
        (path.parent for path in Path(job["checkpoints"]).glob("*/.metadata")),
        key=lambda folder: int(folder.name),
        default=None,
    )


def save(job: dict[str, Any], rank: int, state: State, step: int) -> None:
    from torch.distributed import checkpoint as dcp

    dcp.save(state, checkpoint_id=Path(job["checkpoints"], str(step)))
    if rank == 0:
        for old in sorted(Path(job["checkpoints"]).iterdir(), key=lambda folder: int(folder.name))[:-KEPT]:
            shutil.rmtree(old)


def train(job: dict[str, Any], rank: int, save: Callable[[State, int], None], load: Callable[[], Path | None]) -> None:
    """Join the group that the environment tells, resume, train. `save` is called on every rank after its step.

    `load` names the folder of the checkpoint to resume from, whose "step" is the number of completed steps.
    """
    import torch
    from torch import distributed
    from torch.distributed import checkpoint as dcp

    from trainer.contract import WorkerConfig, build
    from trainer.data import open_dataset
    from trainer.numeric import set_numerics
    from trainer.optim import build_optimizer, set_completed_steps, train_state
    from trainer.parallel import build_mesh, build_stage

    note(job["marks"], "imported", rank)
    config = build(WorkerConfig, job["config"])
    set_numerics(config)
    timeout = timedelta(seconds=config.collective_timeout_s)
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=timeout)
    mesh = build_mesh(config.parallel, config.device, timeout)
    note(job["marks"], "group", rank)

    dataset = open_dataset(config.data, config.model.vocab_size, config.seed)
    checkpoint = load()
    stage = build_stage(config, mesh, initial=checkpoint is None)
    optimizer = build_optimizer(stage.module, config.optimizer)
    state = {**train_state(stage.module, optimizer, step=0).tensors, "step": torch.zeros((), dtype=torch.int64)}
    note(job["marks"], "built", rank)

    if checkpoint is not None:
        dcp.load(state, checkpoint_id=checkpoint)
    step = int(state["step"])
    set_completed_steps(optimizer, step)
    note(job["marks"], "restored", rank, step)

    while step < config.steps:
        step += 1
        train_step(config, stage, optimizer, dataset, step)
        note(job["marks"], "step", rank, step)
        if step % job["save_every"] == 0:
            state["step"].fill_(step)
            save(state, step)
    distributed.barrier()
    distributed.destroy_process_group()


def train_step(config: Any, stage: Any, optimizer: Any, dataset: Any, step: int) -> None:
    """As trainer.loop.train_step: gradients, one sum over the world, clipping, AdamW."""
    import torch
    from torch import distributed

    from trainer import optim
    from trainer.parallel import forward_backward

    inputs_BT, targets_BT = dataset.batch(step, stage.rows)
    loss = forward_backward(stage, inputs_BT if stage.is_first else None, targets_BT if stage.is_last else None)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sums = torch.stack([optim.squared_norm_share(parameters), loss.to(torch.float64)])
    distributed.all_reduce(sums)
    optim.clip_gradients(parameters, float(sums[0]) ** 0.5, config.optimizer.clip_norm)
    optim.set_learning_rate(optimizer, optim.learning_rate(step, config.optimizer, config.steps))
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main(sys.argv[1])
