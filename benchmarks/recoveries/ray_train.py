"""The job under Ray Train v2: TorchTrainer with FailureConfig, DCP checkpoints that every worker reports.

python -m recoveries.ray_train JOB.json ADDRESS
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from recoveries import rank as ranks
from recoveries.marks import note


def train(job: dict[str, Any]) -> None:
    from torch.distributed import checkpoint as dcp

    rank = ray.train.get_context().get_world_rank()
    note(job["marks"], "up", rank)

    def save(state: ranks.State, step: int) -> None:
        # Each worker's folder has its own shards; Ray Train merges them in its storage.
        with tempfile.TemporaryDirectory() as folder:
            dcp.save(state, checkpoint_id=folder)
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def load() -> Path | None:
        checkpoint = ray.train.get_checkpoint()
        return None if checkpoint is None else Path(checkpoint.path)

    ranks.train(job, rank, save, load)


def main(job_file: str, address: str) -> None:
    job = json.loads(Path(job_file).read_text())
    parallel = job["config"]["parallel"]
    workers = parallel["pp"] * parallel["dp_replicate"] * parallel["dp_shard"] * parallel["tp"]
    ray.init(address=address)
    TorchTrainer(
        train,
        train_loop_config=job,
        torch_config=TorchConfig(backend="gloo", timeout_s=int(job["config"]["collective_timeout_s"])),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            name="recovery",
            storage_path=job["checkpoints"],
            failure_config=ray.train.FailureConfig(max_failures=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=ranks.KEPT),
        ),
    ).fit()


if __name__ == "__main__":
    os.makedirs(json.loads(Path(sys.argv[1]).read_text())["checkpoints"], exist_ok=True)
    main(sys.argv[1], sys.argv[2])
