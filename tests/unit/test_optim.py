"""Learning rate, clipping and AdamW against closed forms and torch's own."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer import optim
from trainer.contract import OptimizerConfig
from trainer.llama import Llama, initialise, load_preset

CONFIG = OptimizerConfig(lr=1e-3, warmup_steps=10, final_lr_ratio=0.1)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 1e-4),
        (5, 5e-4),
        (10, 1e-3),
        (35, 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))),  # a quarter of the cosine
        (60, 1e-3 * (0.1 + 0.9 * 0.5)),  # its half
        (110, 1e-4),  # its end
    ],
)
def test_learning_rate_at_known_points(step: int, expected: float) -> None:
    assert optim.learning_rate(step, CONFIG, total_steps=110) == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 50), st.integers(1, 200), st.floats(0.0, 1.0))
def test_learning_rate_rises_then_falls_within_its_bounds(warmup: int, total: int, ratio: float) -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=warmup, final_lr_ratio=ratio)
    rates = [optim.learning_rate(step, config, total) for step in range(1, total + 1)]
    peak = min(warmup, total) or 1
    assert all(a < b for a, b in pairwise(rates[:peak]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[peak - 1 :]))
    assert all(0.0 < rate <= 1.0 or (rate == 0.0 and ratio == 0.0) for rate in rates)


def test_warm_up_longer_than_the_run() -> None:
    assert optim.learning_rate(5, OptimizerConfig(lr=1.0, warmup_steps=100), total_steps=5) == pytest.approx(0.05)


def gradients_of(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clips", "leaves"])
def test_clipping_equals_torch(max_norm: float) -> None:
    config = load_preset("tiny")
    ours, theirs = Llama(config), Llama(config)
    for module in (ours, theirs):
        initialise(module, config, seed=1)
        module(torch.arange(60).view(2, 30)).square().sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    norm = optim.squared_norm_share(ours.parameters()).sqrt().item()
    optim.clip_gradients(ours.parameters(), norm, max_norm)
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(gradients_of(ours), gradients_of(theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_first_adamw_step_in_closed_form() -> None:
    """After bias correction the first step is lr * sign(g) and, on matrices alone, decay by lr * weight_decay."""
    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.RMSNorm(2))
    matrix, gain = module[0].weight, module[1].weight
    before_matrix, before_gain = matrix.detach().clone(), gain.detach().clone()
    optimizer = optim.build_optimizer(module, OptimizerConfig(lr=0.01, weight_decay=0.1, eps=1e-12))
    optim.set_learning_rate(optimizer, 0.02)
    matrix.grad = torch.tensor([[1.0, -2.0, 3.0], [-0.1, 0.2, -0.3]])
    gain.grad = torch.tensor([5.0, -5.0])
    optimizer.step()
    torch.testing.assert_close(matrix, before_matrix * (1 - 0.02 * 0.1) - 0.02 * matrix.grad.sign())
    torch.testing.assert_close(gain, before_gain - 0.02 * gain.grad.sign())


def test_state_filled_in_place_continues_bit_for_bit() -> None:
    """The tensors of `train_state` and the step count are all that AdamW needs to go on."""

    def run(module: nn.Module, optimizer: torch.optim.AdamW, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in module.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    first = nn.Linear(4, 4)
    one = optim.build_optimizer(first, OptimizerConfig())
    run(first, one, range(3))
    saved = {name: tensor.clone() for name, tensor in optim.train_state(first, one, 3).tensors.items()}
    run(first, one, range(3, 6))

    second = nn.Linear(4, 4)
    other = optim.build_optimizer(second, OptimizerConfig())
    state = optim.train_state(second, other, 0)
    assert set(state.tensors) == set(saved)
    for name, tensor in state.tensors.items():
        tensor.copy_(saved[name])
    optim.set_completed_steps(other, 3)
    run(second, other, range(3, 6))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, tensor in optim.train_state(first, one, 6).tensors.items():
        assert torch.equal(tensor, state.tensors[name]), name


def test_random_state_round_trip() -> None:
    state = optim.random_state()
    expected = torch.rand(3)
    optim.set_random_state(state)
    assert torch.equal(torch.rand(3), expected)
