"""The model against Hugging Face's Llama, and the presets against published sizes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.contract import ModelConfig
from trainer.llama import Llama, initialise, load_preset, parameter_count

# Numbers of elements in the published safetensors files (the model cards' "model size"); for Llama 1, which was not
# published that way, Table 2 of the paper, in billions.
PUBLISHED = {
    "llama1_7b": 6.7e9,
    "llama1_13b": 13.0e9,
    "llama1_33b": 32.5e9,
    "llama1_65b": 65.2e9,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
}

HUGGING_FACE_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def hugging_face_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        return f"model.layers.{number}.{HUGGING_FACE_NAMES[rest]}.weight"
    return f"{HUGGING_FACE_NAMES[name]}.weight"


@pytest.mark.parametrize("n_kv_heads", [6, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_logits_and_gradients_equal_hugging_face(n_kv_heads: int) -> None:
    config = ModelConfig(
        dim=96, n_layers=3, n_heads=6, n_kv_heads=n_kv_heads, ffn_dim=160, vocab_size=200, rope_theta=10_000.0
    )
    theirs = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            intermediate_size=config.ffn_dim,
            vocab_size=config.vocab_size,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
        )
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():  # also the norms, which would be one and hide a mistake
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    ours = Llama(config)
    weights = dict(theirs.named_parameters())
    assert {hugging_face_name(name) for name, _ in ours.named_parameters()} == set(weights)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(weights[hugging_face_name(name)])

    tokens = torch.randint(config.vocab_size, (2, 50))
    expected, actual = theirs(tokens).logits, ours(tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    expected.square().mean().backward()
    actual.square().mean().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            weights[hugging_face_name(name)].grad,
            rtol=1e-3,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config = load_preset(name)
    tolerance = 0.0 if isinstance(PUBLISHED[name], int) else 0.006  # Table 2 gives three digits
    assert parameter_count(config) == pytest.approx(PUBLISHED[name], rel=tolerance, abs=0)
    with torch.device("meta"):
        allocated = sum(parameter.numel() for parameter in Llama(config).parameters())
    assert allocated == parameter_count(config)


def test_small_presets() -> None:
    assert 0.25e6 < parameter_count(load_preset("tiny")) < 0.4e6
    demo = load_preset("demo_5m")
    assert parameter_count(demo) >= 5_000_000
    assert demo.vocab_size == 4096
    assert demo.n_layers % 2 == 0


def test_unknown_preset_names_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"no preset 'llama9_1b'.*llama3_8b"):
        load_preset("llama9_1b")


def test_a_stage_is_initialised_like_the_whole() -> None:
    config = load_preset("tiny")
    whole, part = Llama(config), Llama(config, [2, 3])
    initialise(whole, config, seed=3)
    initialise(part, config, seed=3)
    expected = dict(whole.named_parameters())
    names = [name for name, _ in part.named_parameters()]
    assert "layers.2.attention.wq.weight" in names
    assert "output.weight" in names
    assert not any(name.startswith(("tok_embeddings", "layers.0")) for name in names)
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_initial_values_depend_on_seed_and_name_and_have_the_stated_spread() -> None:
    config = load_preset("tiny")
    first, second = Llama(config), Llama(config)
    initialise(first, config, seed=3)
    initialise(second, config, seed=4)
    parameters, others = dict(first.named_parameters()), dict(second.named_parameters())
    assert not torch.equal(parameters["output.weight"], others["output.weight"])
    assert not torch.equal(parameters["layers.0.attention.wq.weight"], parameters["layers.1.attention.wq.weight"])
    assert torch.equal(parameters["norm.weight"], torch.ones(config.dim))
    assert parameters["layers.0.feed_forward.w1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert parameters["layers.0.feed_forward.w2.weight"].std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
