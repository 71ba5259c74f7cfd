"""The state of tests/golden/checkpoint-format-2, by formula; run as a script, it writes such a checkpoint anew.

    python tests/unit/golden_checkpoint.py FOLDER

A new format gets a new folder beside the old one: what a released Shepherd has written is never written again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_pool import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from storage.commits import create_commit
from storage.durable import write_part
from storage.manifest import Commit
from storage.state import TrainState

STEP, EPOCH, GENERATION, RANKS = 120, 2, 3, 2


def full_tensors() -> dict[str, torch.Tensor]:
    """Every kind of tensor whole: n-th element n / 8 and the like, exact in each dtype."""
    return {
        "model/layers.0.weight": torch.arange(41 * 33, dtype=torch.float32).view(41, 33) / 8 - 50,
        "model/layers.0.half": (torch.arange(7 * 5, dtype=torch.float32).view(7, 5) / 4).bfloat16(),
        "scales": (torch.arange(24, dtype=torch.float32) - 12).to(torch.float8_e4m3fn),
        "model/layers.0.moment": torch.arange(6, dtype=torch.float64).view(2, 3) / 3,
        "counts": torch.arange(9) ** 5 - 1000,
        "flags": torch.tensor([True, False, False, True, True]),
        "loss": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
    }


def rng(rank: int) -> torch.Tensor:
    return (torch.arange(300) * (rank + 3) % 251).to(torch.uint8)


def rank_state(rank: int) -> TrainState:
    """What a rank of two holds: matrices sharded by rows, the rest whole on both."""
    mesh = init_device_mesh("cpu", (RANKS,))
    tensors = {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) if name.startswith("model") else tensor
        for name, tensor in full_tensors().items()
    }
    return TrainState(STEP, tensors, {"rng": rng(rank)})


def _save(folder: str) -> Commit:
    rank = dist.get_rank()
    part = write_part(folder, rank_state(rank), step=STEP, epoch=EPOCH, generation=GENERATION, rank=rank)
    parts = [part] * RANKS
    dist.all_gather_object(parts, part)
    mesh = {"pp": 1, "dp_replicate": 1, "dp_shard": RANKS, "tp": 1}
    return Commit(
        run="golden", step=STEP, epoch=EPOCH, generation=GENERATION, mesh=mesh, parts=tuple(parts),
        versions={"shepherd": "0.3"},
    )  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as meeting:
        for result in run_ranks(_save, RANKS, Path(meeting), sys.argv[1]):
            if isinstance(result, Exception):
                raise result
    create_commit(sys.argv[1], result)
