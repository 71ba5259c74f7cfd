"""Checkpoints of small Llamas, as a single rank of the trainer saves them, for tests of what reads them."""

from __future__ import annotations

import torch

from storage.commits import create_commit, read_commit
from storage.durable import write_part
from storage.manifest import Commit
from storage.state import TrainState
from trainer.contract import ModelConfig, OptimizerConfig
from trainer.llama import Llama
from trainer.optim import build_optimizer, train_state

# Grouped-query attention, a vocabulary that no power of two divides, and a rotary base that is nobody's default.
CONFIG = ModelConfig(
    dim=48, n_layers=3, n_heads=6, n_kv_heads=2, ffn_dim=80, vocab_size=270, rope_theta=70_000.0, norm_eps=3e-5
)


def make_state(step: int, seed: int = 0, config: ModelConfig = CONFIG) -> TrainState:
    """Random parameters and moments; norms too, which would be one and hide a mistake."""
    torch.manual_seed(seed)
    model = Llama(config)
    state = train_state(model, build_optimizer(model, OptimizerConfig()), step)
    for tensor in state.tensors.values():
        tensor.copy_(torch.randn(tensor.shape) * 0.1 + (1.0 if tensor.dim() == 1 else 0.0))
    return state


def save(url: str, state: TrainState, generation: int = 1, *, committed: bool = True) -> Commit | None:
    """Save and commit; without `committed`, what a save leaves that was cut off."""
    part = write_part(url, state, step=state.step, epoch=1, generation=generation, rank=0)
    if not committed:
        return None
    commit = Commit(
        run="job",
        step=state.step,
        epoch=1,
        generation=generation,
        mesh={"pp": 1, "dp_replicate": 1, "dp_shard": 1, "tp": 1},
        parts=(part,),
        versions={},
    )
    create_commit(url, commit)
    return read_commit(url, state.step)
