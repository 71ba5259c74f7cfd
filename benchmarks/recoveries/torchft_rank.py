"""One replica of torchft: DistributedDataParallel under its Manager, which heals a replica from a live one.

    REPLICA_GROUP_ID=0 NUM_REPLICA_GROUPS=4 TORCHFT_LIGHTHOUSE=http://... torchrun ... recoveries.torchft_rank JOB.json

It knows no pipeline and no tensor parallelism, so it trains the `dp` layout with this repository's model and data. A
step counts where the Manager says that it is committed.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from recoveries.marks import note

TIMEOUT_S = 30.0
"""As in torchft's own example."""


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    rank, replicas = int(os.environ["REPLICA_GROUP_ID"]), int(os.environ["NUM_REPLICA_GROUPS"])
    note(job["marks"], "up", rank)
    import torch
    from torchft import DistributedDataParallel, Manager, ProcessGroupGloo

    from trainer import optim
    from trainer.contract import WorkerConfig, build
    from trainer.data import open_dataset
    from trainer.llama import Llama, initialise
    from trainer.numeric import set_numerics

    note(job["marks"], "imported", rank)
    config = build(WorkerConfig, job["config"])
    set_numerics(config)
    dataset = open_dataset(config.data, config.model.vocab_size, config.seed)
    module = Llama(config.model, range(config.model.n_layers))
    initialise(module, config.model, config.seed, "")
    adamw = optim.build_optimizer(module, config.optimizer)

    def state() -> dict[str, Any]:
        return {"model": module.state_dict(), "optimizer": adamw.state_dict()}

    def load(found: dict[str, Any]) -> None:
        module.load_state_dict(found["model"])
        adamw.load_state_dict(found["optimizer"])

    timeout = timedelta(seconds=TIMEOUT_S)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=load,
        state_dict=state,
        min_replica_size=1,
        replica_id=f"replica_{rank}",
        timeout=timeout,
    )
    model = DistributedDataParallel(manager, module)
    note(job["marks"], "built", rank)

    each = config.data.global_batch // replicas
    parameters = list(module.parameters())
    while manager.current_step() < config.steps:
        manager.start_quorum()
        adamw.zero_grad()
        inputs_BT, targets_BT = dataset.batch(manager.current_step() + 1, range(rank * each, (rank + 1) * each))
        logits_BTV = model(inputs_BT)
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()).backward()
        optim.clip_gradients(parameters, float(optim.squared_norm_share(parameters)) ** 0.5, config.optimizer.clip_norm)
        if manager.should_commit():
            optim.set_learning_rate(adamw, optim.learning_rate(manager.current_step(), config.optimizer, config.steps))
            adamw.step()
            if manager.num_participants() < replicas:
                note(job["marks"], "shrunk", rank, manager.current_step())
            note(job["marks"], "step", rank, manager.current_step())


if __name__ == "__main__":
    main(sys.argv[1])
