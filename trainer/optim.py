"""AdamW over the sharded parameters, its learning rate, and clipping by the gradient norm of the whole mesh.

Everything here is elementwise or a sum of squares, so it works on each rank's local shards directly; the one exchange
that the norm needs is made by the loop, together with what else all ranks must agree on (trainer/loop.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from storage.state import TrainState
from trainer.contract import OptimizerConfig

# Added to the norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does.
CLIP_EPS = 1e-6


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over `module`'s parameters, its moments allocated and zero so that a restore can fill them.

    Weight decay acts on matrices only: pulling a norm's gain towards zero would shrink the activations themselves and
    regularise nothing, since the gain's scale is undone by the next matrix.

    The fused kernel is one elementwise pass over each tensor, without atomics or reductions: same shards, same bits.
    """
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in parameters:
        device = parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_completed_steps(optimizer: AdamW, step: int) -> None:
    """Tell AdamW's bias correction how many steps are done; every parameter takes every step."""
    for state in optimizer.state.values():
        state["step"].fill_(step)


def set_learning_rate(optimizer: AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """The rate of step number `step` (the first is 1): linear warm-up, then a cosine.

    The peak is reached at step `warmup_steps`, and final_lr_ratio of it at step
    `total_steps` (Llama 2, section 2.2).
    """
    assert 1 <= step <= total_steps, (step, total_steps)
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine)


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients' local shards, sharing memory with them."""
    gradients = [parameter.grad for parameter in parameters]
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None]


@torch.no_grad()
def squared_norm_share(parameters: Iterable[nn.Parameter]) -> Tensor:
    """This rank's share of the squared gradient norm, float64 scalar: over all ranks each element counts once.

    A gradient that is replicated over a mesh dimension is counted by the first rank of that dimension alone.
    """
    owned = [parameter for parameter in parameters if parameter.grad is not None and _counts(parameter.grad)]
    if not owned:
        return torch.zeros((), dtype=torch.float64)
    norms = torch._foreach_norm(local_gradients(owned), 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()


def _counts(gradient: Tensor) -> bool:
    if not isinstance(gradient, DTensor):
        return True
    coordinate = gradient.device_mesh.get_coordinate()
    assert coordinate is not None
    assert not any(placement.is_partial() for placement in gradient.placements), gradient.placements
    return all(
        index == 0 for index, placement in zip(coordinate, gradient.placements, strict=True) if placement.is_replicate()
    )


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale the gradients so that their norm over the whole mesh, which is `norm` now, is at most `max_norm`."""
    scale = max_norm / (norm + CLIP_EPS)
    if scale < 1.0:
        torch._foreach_mul_(local_gradients(parameters), scale)


def train_state(module: nn.Module, optimizer: AdamW, step: int) -> TrainState:
    """The state that a checkpoint holds: live references under global names, and this rank's random state.

    AdamW's own step counts are left out: they all equal `step` (see `set_completed_steps`).
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        tensors[f"model/{name}"] = parameter.data
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    return TrainState(step=step, tensors=tensors, per_rank=random_state())


def random_state() -> dict[str, Tensor]:
    """This rank's generator states. No rank seeds by its number, so data-parallel replicas hold equal ones."""
    state = {"rng": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"])
