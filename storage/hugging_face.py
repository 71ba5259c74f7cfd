"""Hugging Face's Llama on disk: names and shapes of tensors, config.json, headers of safetensors files. No torch.

Our rotary pairs are half-split, as theirs are (trainer/llama.py), so rows of q and k are not permuted on the way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

MODEL_PREFIX = "model/"
"""Of a checkpoint's names of parameters; the others are moments and random states."""

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""safetensors' names of the types that parameters have."""
MAX_HEADER_BYTES = 100_000_000
"""As safetensors' own reader has it."""
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}

_PER_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}


class FormatError(ValueError):
    """Files are not what a Hugging Face Llama is, or not one that Shepherd's model can be."""


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """A Llama by its shape; the fields of trainer.contract.ModelConfig that decide it."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float
    norm_eps: float

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Our name of each parameter, without MODEL_PREFIX, to theirs and its shape; in the order of a forward pass."""
        kv_dim = self.n_kv_heads * (self.dim // self.n_heads)
        shapes = {
            "attention.wq.weight": (self.dim, self.dim),
            "attention.wk.weight": (kv_dim, self.dim),
            "attention.wv.weight": (kv_dim, self.dim),
            "attention.wo.weight": (self.dim, self.dim),
            "feed_forward.w1.weight": (self.ffn_dim, self.dim),
            "feed_forward.w2.weight": (self.dim, self.ffn_dim),
            "feed_forward.w3.weight": (self.ffn_dim, self.dim),
        }
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "tok_embeddings.weight": ("model.embed_tokens.weight", (self.vocab_size, self.dim))
        }
        for layer in range(self.n_layers):
            for ours, theirs in _PER_LAYER.items():
                found[f"layers.{layer}.{ours}"] = (f"model.layers.{layer}.{theirs}", shapes.get(ours, (self.dim,)))
        found["norm.weight"] = ("model.norm.weight", (self.dim,))
        found["output.weight"] = ("lm_head.weight", (self.vocab_size, self.dim))
        return found


def config_json(shape: LlamaShape, dtype: str, max_positions: int) -> bytes:
    """The config.json of a model; `dtype` is that of the files."""
    document = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.dim // shape.n_heads,
        "intermediate_size": shape.ffn_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        # The run keeps no tokenizer, and Llama's own ids would be wrong.
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
    }
    return json.dumps(document, indent=2).encode() + b"\n"


def read_config(raw: bytes) -> tuple[LlamaShape, bool]:
    """The model of a config.json, and whether its output head is the embedding.

    Raises:
        FormatError: not a Llama, or one that Shepherd's model cannot be; the message names the field.
    """
    try:
        config: dict[str, Any] = json.loads(raw)
        assert isinstance(config, dict)
    except (ValueError, AssertionError) as e:
        raise FormatError(f"{CONFIG_FILE} is not a JSON object") from e
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    wanted = {
        "model_type": (config.get("model_type"), "llama"),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "quantization_config": (config.get("quantization_config"), None),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
    }
    for field, (value, only) in wanted.items():
        if value != only:
            raise FormatError(f"{CONFIG_FILE}: {field} = {value!r}: Shepherd's model has {only!r} only")
    try:
        shape = LlamaShape(
            dim=_integer(config, "hidden_size"),
            n_layers=_integer(config, "num_hidden_layers"),
            n_heads=_integer(config, "num_attention_heads"),
            n_kv_heads=_integer(config, "num_key_value_heads", config.get("num_attention_heads")),
            ffn_dim=_integer(config, "intermediate_size"),
            vocab_size=_integer(config, "vocab_size"),
            # Where the field is left out: Hugging Face's defaults.
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        )
    except (TypeError, ValueError) as e:
        raise e if isinstance(e, FormatError) else FormatError(f"{CONFIG_FILE}: {e}") from e
    head_dim = config.get("head_dim") or shape.dim // shape.n_heads
    if head_dim * shape.n_heads != shape.dim or shape.n_heads % shape.n_kv_heads or head_dim % 2:
        raise FormatError(
            f"{CONFIG_FILE}: {shape.n_heads} heads of {head_dim} over {shape.n_kv_heads} key/value heads: Shepherd's "
            f"model has heads of hidden_size / num_attention_heads, an even number, and a multiple of its key/value "
            "heads"
        )
    return shape, bool(config.get("tie_word_embeddings", False))


def _integer(config: dict[str, Any], field: str, default: Any = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise FormatError(f"{CONFIG_FILE}: {field} = {value!r}: must be a positive whole number")
    return value


# --- safetensors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor in a safetensors file; its bytes are [start, stop) of the whole file."""

    name: str
    dtype: str
    """By torch's name."""
    shape: tuple[int, ...]
    start: int
    stop: int


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[Entry]]:
    """The beginning of a file of these tensors (name, dtype, shape), which lie in this order, and where each will."""
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, entries = 0, []
    for name, dtype, shape in tensors:
        n_bytes = math.prod(shape) * _ITEM_BYTES[DTYPES[dtype]]
        document[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        entries.append(Entry(name=name, dtype=dtype, shape=shape, start=at, stop=at + n_bytes))
        at += n_bytes
    raw = json.dumps(document, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    begin = 8 + len(raw)
    placed = [Entry(**(asdict(e) | {"start": begin + e.start, "stop": begin + e.stop})) for e in entries]
    return len(raw).to_bytes(8, "little") + raw, placed


def read_header(file: str, raw: bytes, file_bytes: int) -> list[Entry]:
    """The tensors of a file whose header, the length before it included, is `raw`; in the order of their bytes.

    Raises:
        FormatError: not a header, or the tensors do not fill the file exactly.
    """
    names = {theirs: ours for ours, theirs in DTYPES.items()}
    try:
        document: dict[str, Any] = json.loads(raw[8:])
        document.pop("__metadata__", None)
        entries = []
        for name, told in document.items():
            if told["dtype"] not in names:
                raise FormatError(f"{file}: {name} is {told['dtype']}; parameters must be {', '.join(names)}")
            start, stop = told["data_offsets"]
            shape = tuple(int(n) for n in told["shape"])
            entries.append(
                Entry(name=name, dtype=names[told["dtype"]], shape=shape, start=len(raw) + start, stop=len(raw) + stop)
            )
            if stop - start != math.prod(shape) * _ITEM_BYTES[told["dtype"]]:
                raise FormatError(f"{file}: {name} has {stop - start} bytes, not those of {list(shape)}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise e if isinstance(e, FormatError) else FormatError(f"{file}: is not a safetensors file: {e!r}") from e
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    at = len(raw)
    for entry in entries:
        if entry.start != at:
            raise FormatError(
                f"{file}: {entry.name} begins at byte {entry.start}, not {at}: bytes overlap or are spare"
            )
        at = entry.stop
    if at != file_bytes:
        raise FormatError(f"{file}: has {file_bytes} bytes, its header tells of {at}: it is cut off or damaged")
    return entries
