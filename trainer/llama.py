"""The model: Llama 1, 2 and 3 by configuration, plain; parallelism is applied from outside (trainer/parallel.py).

RMSNorm before each block, SwiGLU, rotary position embedding, grouped-query attention and an untied output head
(Touvron et al. 2023a, 2023b; Grattafiori et al. 2024). Rotary pairs are *half-split*: element i turns with element
i + head_dim/2, as in Hugging Face's Llama, so a checkpoint of theirs loads by renaming alone. Meta's own files pair
2i with 2i + 1; wq and wk of such a file must have the rows of each head permuted
(``w.view(heads, head_dim/2, 2, dim).transpose(1, 2).reshape(heads * head_dim, dim)``).

Shapes are named by suffix: B samples, T tokens, D model width (dim), F feed-forward width, V vocabulary, N query heads,
K key/value heads, H head width. Under tensor parallelism N, K and F are the local share, and between blocks so is T.
"""

from __future__ import annotations

import functools
import hashlib
import math
import tomllib
from collections.abc import Iterable
from importlib import resources

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.contract import ModelConfig, build

# Standard deviation of every matrix at the start (Llama does not publish its own; this is GPT-2's, as in torchtitan and
# Megatron). Projections that write into the residual stream are scaled by 1/sqrt(2 * n_layers) so that its variance
# does not grow with depth (Radford et al. 2019, section 2.3).
INIT_STD = 0.02


class Attention(nn.Module):
    """Causal self-attention with rotary positions; n_kv_heads < n_heads shares each key/value head among queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        # The number of heads is left to view(): under tensor parallelism this rank holds only some of them.
        split = (*x_BTD.shape[:2], -1, self.head_dim)
        cos_TH, sin_TH = rotary_table(x_BTD.shape[1], self.head_dim, self.rope_theta, x_BTD.device)
        q_BNTH = rotate(self.wq(x_BTD).view(split).transpose(1, 2), cos_TH, sin_TH)
        k_BKTH = rotate(self.wk(x_BTD).view(split).transpose(1, 2), cos_TH, sin_TH)
        v_BKTH = self.wv(x_BTD).view(split).transpose(1, 2)
        grouped = q_BNTH.shape[1] != k_BKTH.shape[1]
        o_BNTH = functional.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=grouped)
        out_BTD: Tensor = self.wo(o_BNTH.transpose(1, 2).flatten(2))
        return out_BTD


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.w2(functional.silu(self.w1(x_BTD)) * self.w3(x_BTD))
        return out_BTD


class Block(nn.Module):
    """One transformer layer: attention and feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTD: Tensor = x_BTD + self.attention(self.attention_norm(x_BTD))
        h_BTD = h_BTD + self.feed_forward(self.ffn_norm(h_BTD))
        return h_BTD


class Llama(nn.Module):
    """The whole model, or the part of it that one pipeline stage holds.

    `layers` are the numbers of the layers held, counted over the whole model, which keep their global names
    (``layers.17.attention.wq.weight``). The stage of layer 0 also holds the embedding, that of the last layer the final
    norm and the output head.
    """

    def __init__(self, config: ModelConfig, layers: Iterable[int] | None = None) -> None:
        super().__init__()
        held = list(range(config.n_layers) if layers is None else layers)
        first, last = 0 in held, config.n_layers - 1 in held
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim) if first else None
        self.layers = nn.ModuleDict({str(number): Block(config) for number in held})
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if last else None
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False) if last else None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T] int64 (first stage) or activations [B, T, D], to activations or, on the last stage, logits.

        Returns:
            [B, T, D], or logits [B, T, V] where this stage holds the output head.
        """
        h_BTD: Tensor = self.tok_embeddings(x) if self.tok_embeddings is not None else x
        for block in self.layers.values():
            h_BTD = block(h_BTD)
        if self.output is None or self.norm is None:
            return h_BTD
        logits_BTV: Tensor = self.output(self.norm(h_BTD))
        return logits_BTV


@functools.lru_cache(maxsize=4)
def rotary_table(seq_len: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, [T, H] float32 each, both halves of H alike (Su et al. 2021).

    A cache and not a buffer, so that mixed precision, which casts what it wraps, leaves the angles in float32.
    """
    with torch.no_grad():
        frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
        angle_TH = torch.arange(seq_len, device=device, dtype=torch.float32).outer(frequency).repeat(1, 2)
        return angle_TH.cos(), angle_TH.sin()


def rotate(x_BNTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Turn each half-split pair of x by its position's angle; computed in float32, returned in x's dtype."""
    low, high = x_BNTH.float().chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return (x_BNTH.float() * cos_TH + turned * sin_TH).to(x_BNTH.dtype)


@torch.no_grad()
def initialise(module: nn.Module, config: ModelConfig, seed: int, prefix: str = "") -> None:
    """Fill `module`'s parameters, in place and on the CPU, with the values that (seed, name) stand for.

    Each parameter has a generator of its own, seeded from its global name (`prefix` + name inside `module`), so the
    values do not depend on the mesh or on which other parameters this process holds.
    """
    for name, parameter in module.named_parameters(prefix=prefix):
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        writes_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
        std = INIT_STD / math.sqrt(2 * config.n_layers) if writes_residual else INIT_STD
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters of the whole model, embedding and output head included."""
    attention = config.dim * config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    block = attention + 3 * config.dim * config.ffn_dim + 2 * config.dim
    return config.n_layers * block + 2 * config.vocab_size * config.dim + config.dim


def load_preset(name: str) -> ModelConfig:
    """The model of trainer/presets/`name`.toml.

    Raises:
        ValueError: there is no such preset; the message lists those that there are.
    """
    folder = resources.files("trainer.presets")
    file = folder / f"{name}.toml"
    if not file.is_file():
        known = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
        raise ValueError(f"model.preset: no preset {name!r}; there are {', '.join(known)}")
    return build(ModelConfig, {"preset": name, **tomllib.loads(file.read_text())["model"]})
