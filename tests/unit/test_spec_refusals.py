"""What a job's document may not say, and in which words it is refused: field, value, and what would be valid."""

from __future__ import annotations

import math
from typing import Any

import pytest
from test_spec import PRESETS, SECTIONS

from orchestrator import spec as specs
from orchestrator.spec import SpecError, parse


def document(**sections: dict[str, Any]) -> dict[str, Any]:
    return {**sections, "run": {"name": "r", "url": "/runs/r", **sections.get("run", {})}}


def refusal(**sections: Any) -> list[str]:
    """The lines that parse says to this document."""
    with pytest.raises(SpecError) as refused:
        parse(document(**sections))
    return str(refused.value).splitlines()


INTEGER, NUMBER, TRUTH, TEXT = "a valid integer", "a valid number", "a valid boolean", "a valid string"


@pytest.mark.parametrize(
    ("section", "field", "value", "valid"),
    [
        ("run", "name", 3, TEXT),
        ("run", "name", "", "1 to 40 of a-z, 0-9 and -"),
        ("run", "name", "Llama", "1 to 40 of a-z, 0-9 and -"),
        ("run", "name", "-x", "not - at an end"),
        ("run", "name", "x-", "not - at an end"),
        ("run", "name", "a/../b", "1 to 40 of a-z, 0-9 and -"),
        ("run", "name", "x\n", "1 to 40 of a-z, 0-9 and -"),
        ("run", "name", "x" * 41, "1 to 40 of a-z, 0-9 and -"),
        ("run", "url", "nosuch://bucket/run", "use a path, s3:// or the like"),
        ("run", "steps", 0, "greater than or equal to 1"),
        ("run", "steps", "10", INTEGER),
        ("run", "steps", True, INTEGER),
        ("run", "steps", 1.5, INTEGER),
        ("run", "seed", -1, "greater than or equal to 0"),
        ("run", "seed", 2**63, "less than 9223372036854775808"),
        ("run", "deterministic", 1, TRUTH),
        ("run", "deterministic", "yes", TRUTH),
        ("run", "dtype", "float16", "'float32' or 'bfloat16'"),
        ("run", "validation_interval_steps", 0, "greater than or equal to 1"),
        ("model", "preset", "llama9", f"choose one of {', '.join(PRESETS)}"),
        ("model", "preset", 3, "choose one of"),
        ("model", "preset", "../presets/tiny", "choose one of"),
        ("model", "dim", 0, "at least 2"),
        ("model", "dim", "256", INTEGER),
        ("model", "n_layers", 0, "at least 1"),
        ("model", "n_heads", 0, "at least 1"),
        ("model", "n_heads", 12, "must divide model.dim = 256; valid: 1, 2, 4, 8, 16, 32, 64, 128, 256"),
        ("model", "n_kv_heads", -1, "at least 1"),
        ("model", "n_kv_heads", 3, "must divide model.n_heads = 8; valid: 1, 2, 4, 8"),
        ("model", "ffn_dim", 0, "at least 1"),
        ("model", "vocab_size", 259, "at least 260"),
        ("model", "rope_theta", 0.5, "at least 1"),
        ("model", "rope_theta", math.inf, "finite"),
        ("model", "norm_eps", -1e-9, "at least 0"),
        ("data", "corpus", 1, TEXT),
        ("data", "seq_len", 0, "at least 1"),
        ("data", "global_batch", 0, "at least 1"),
        ("data", "validation_fraction", 0.0, "between 0 and 1"),
        ("data", "validation_fraction", 1.0, "between 0 and 1"),
        ("data", "validation_fraction", math.nan, "finite"),
        ("data", "validation_batches", 0, "at least 1"),
        ("parallel", "pp", 0, "at least 1"),
        ("parallel", "pp", 5, "at most model.n_layers = 4"),
        ("parallel", "dp_replicate", 0, "at least 1"),
        ("parallel", "dp_shard", -2, "at least 1"),
        ("parallel", "tp", 0, "at least 1"),
        ("parallel", "tp", 3, "must divide model.n_kv_heads = 4; valid: 1, 2, 4"),
        ("parallel", "tp", 2, "must divide cluster.slots_per_node = 1; valid: 1"),
        ("parallel", "microbatches", 0, "at least 1"),
        ("optimizer", "lr", -1.0, "at least 0"),
        ("optimizer", "lr", math.inf, "finite"),
        ("optimizer", "beta1", 1.0, "at least 0 and below 1"),
        ("optimizer", "beta2", -0.1, "at least 0 and below 1"),
        ("optimizer", "eps", -1.0, "at least 0"),
        ("optimizer", "weight_decay", -0.1, "at least 0"),
        ("optimizer", "warmup_steps", -1, "at least 0"),
        ("optimizer", "final_lr_ratio", 1.5, "between 0 and 1"),
        ("optimizer", "final_lr_ratio", -0.5, "at least 0"),
        ("optimizer", "clip_norm", 0.0, "at least 1e-12"),
        ("checkpoint", "interval_steps", 0, "at least 1"),
        ("checkpoint", "interval", "often", "'fixed' or 'auto'"),
        ("checkpoint", "shortest_interval_steps", 0, "at least 1"),
        ("checkpoint", "longest_interval_steps", 0, "at least 1"),
        ("checkpoint", "snapshot_interval_steps", 0, "at least 1"),
        ("audit", "finite", "no", TRUTH),
        ("cluster", "device", "tpu", "'cpu' or 'cuda'"),
        ("cluster", "slots_per_node", 0, "greater than or equal to 1"),
        ("cluster", "slots_per_node", 2, "must divide parallel's slots = 1; valid: 1"),
        ("cluster", "spares", -1, "greater than or equal to 0"),
        ("cluster", "cpus_per_slot", 0, "greater than 0"),
        ("cluster", "cpus_per_slot", "1", NUMBER),
        ("recovery", "halt_deadline_s", 0, "greater than 0"),
        ("recovery", "start_deadline_s", math.inf, "finite number"),
        ("recovery", "wait_deadline_s", math.nan, "finite number"),
        ("recovery", "commit_deadline_s", -1, "greater than 0"),
        ("recovery", "node_silence_s", 0, "greater than 0"),
        ("recovery", "collective_timeout_s", 0, "greater than 0"),
        ("recovery", "same_error_tries", 0, "greater than or equal to 1"),
        ("recovery", "recoveries_without_progress", 0, "greater than or equal to 1"),
        ("recovery", "min_replicas", 0, "greater than or equal to 1"),
        ("recovery", "min_replicas", 2, "must be at most parallel.dp_replicate = 1"),
        ("recovery", "strikes", 0, "greater than or equal to 1"),
        ("recovery", "driver_lease_s", 0, "greater than 0"),
        ("metrics", "bind", 8, TEXT),
        ("metrics", "port", -1, "greater than or equal to 0"),
        ("metrics", "port", 65536, "less than 65536"),
    ],
)
def test_a_value_that_cannot_run_is_refused_in_one_line_that_says_what_can(section, field, value, valid):
    lines = refusal(**{section: {field: value}})
    said = [line for line in lines if line.startswith(f"{section}.{field} = ") and valid in line]
    assert said, lines
    assert repr(value) in said[0] or str(value) in said[0]
    assert len(lines) == 1 or field in ("tp", "pp"), lines  # these are bound by several others, each with its line


def fallbacks(*meshes: Any) -> dict[str, Any]:
    """Of a job on four nodes of two slots, of which two are a replica; it does not go on with one."""
    parallel = {"pp": 2, "dp_replicate": 2, "tp": 2, "microbatches": 4}
    recovery = {"min_replicas": 2, "fallback_meshes": list(meshes)}
    return {"parallel": parallel, "recovery": recovery, "cluster": {"slots_per_node": 2}}


@pytest.mark.parametrize(
    ("sections", "valid"),
    [
        (
            {"parallel": {"dp_replicate": 3}},
            "parallel.dp_replicate x dp_shard x microbatches = 3: must divide data.global_batch = 8; valid: 1, 2, 4, 8",
        ),
        ({"parallel": {"pp": 2}}, "parallel.microbatches = 1: 1F1B needs at least parallel.pp = 2"),
        (fallbacks({"pp": 2, "tp": 0}), "recovery.fallback_meshes[0].tp = 0: must be at least 1"),
        (
            fallbacks({"pp": 2, "ep": 2}),
            "recovery.fallback_meshes[0].ep: there is no such field; valid here: pp, dp_replicate, dp_shard, tp",
        ),
        (
            fallbacks("pp"),
            "recovery.fallback_meshes[0] = 'pp': must be a table, as {pp = 2, tp = 2}, of pp, dp_replicate, dp_shard, "
            "tp",
        ),
        (
            fallbacks({"pp": 3}),
            "cluster.slots_per_node = 2: must divide recovery.fallback_meshes[0]'s slots = 3; valid: 1, 3",
        ),
        (
            fallbacks({"tp": 4}),
            "recovery.fallback_meshes[0].tp = 4: must divide cluster.slots_per_node = 2; valid: 1, 2",
        ),
        (
            fallbacks({"dp_shard": 6}),
            "recovery.fallback_meshes[0].dp_shard = 6: must divide the microbatches of a step = 8; valid: 1, 2, 4, 8",
        ),
        (
            fallbacks({"pp": 6}),
            "recovery.fallback_meshes[0].pp = 6: each stage needs a layer; at most model.n_layers = 4",
        ),
        (
            fallbacks({"pp": 3, "dp_replicate": 4}),
            "recovery.fallback_meshes[0].pp = 3: 1F1B needs at least as many microbatches, and each replica takes 2 of "
            "1 samples in a step; give it fewer replicas, or parallel.microbatches a larger value",
        ),
        (
            fallbacks({"pp": 4}, {"tp": 2}, {"dp_shard": 2}),
            "recovery.fallback_meshes[2]: dp_shard 2 takes 1 nodes; it must take fewer than the 1 of the mesh before "
            "it, or it would never be used",
        ),
        (
            fallbacks({"dp_replicate": 8}),
            "recovery.fallback_meshes[0]: dp_replicate 8 takes 4 nodes; it must take fewer than the 4 of the mesh "
            "before it, or it would never be used",
        ),
        (
            {"model": {"dim": 24, "n_heads": 8}},
            "model.dim / model.n_heads = 3: RoPE turns pairs, so it must be even",
        ),
        (
            {"parallel": {"tp": 4}, "cluster": {"slots_per_node": 4}, "data": {"seq_len": 6}},
            "parallel.tp = 4: must divide data.seq_len = 6; valid: 1, 2, 3, 6",
        ),
        (
            {"parallel": {"tp": 4}, "cluster": {"slots_per_node": 4}, "model": {"ffn_dim": 6}},
            "parallel.tp = 4: must divide model.ffn_dim = 6; valid: 1, 2, 3, 6",
        ),
        (
            {"recovery": {"node_silence_s": 7}, "parallel": {"dp_replicate": 250}, "data": {"global_batch": 250}}
            | {"cluster": {"spares": 6}},
            "recovery.node_silence_s = 7: must be at least 10 with 256 nodes; they notice after 5 s that one through "
            "which they report is silent",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_named(sections, valid):
    assert refusal(**sections) == [valid]


def test_all_that_is_wrong_is_said_at_once():
    lines = refusal(run={"steps": 0}, metrics={"port": -1}, parallel={"tpp": 2})
    assert [line.split(" ")[0].rstrip(":") for line in lines] == ["run.steps", "parallel.tpp", "metrics.port"]
    lines = refusal(data={"seq_len": 0}, model={"dim": 0})
    assert [line.split(" ")[0] for line in lines] == ["model.dim", "data.seq_len"]


@pytest.mark.parametrize("section", SECTIONS)
def test_no_section_takes_a_field_that_it_does_not_have(section):
    (line,) = refusal(**{section: {"nosuch": 1}})
    assert line.startswith(f"{section}.nosuch: there is no such field; valid here: ")
    shown = line.partition("valid here: ")[2].split(", ")
    assert shown == list(parse(document()).document()[section])


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [5, "text", [1]])
def test_a_section_that_is_no_table_is_refused(section, value):
    with pytest.raises(SpecError, match=rf"^{section} = .*: must be a table, \[{section}\], with "):
        parse({**document(), section: value})


def test_a_section_that_does_not_exist_is_refused():
    (line,) = refusal(optimiser={"lr": 1.0})
    assert line == f"optimiser: there is no such field; valid here: {', '.join(SECTIONS)}"


def test_what_is_required_is_named():
    with pytest.raises(SpecError, match=r"^run: is required$"):
        parse({})
    with pytest.raises(SpecError, match=r"^run\.name: is required$"):
        parse({"run": {}})


def test_a_huge_number_is_refused_as_fast_as_a_small_one():
    (line,) = refusal(data={"global_batch": 10**18}, parallel={"dp_shard": 7})
    assert line.startswith("parallel.dp_replicate x dp_shard x microbatches = 7: must divide data.global_batch = 1000")
    assert len(line) < 1000


@pytest.mark.parametrize("first", [9, 1001])
def test_the_first_interval_that_is_to_be_retuned_lies_between_its_bounds(first):
    (line,) = refusal(checkpoint={"interval": "auto", "interval_steps": first})
    assert line.startswith(f"checkpoint.interval_steps = {first}: ")
    assert "between shortest_interval_steps = 10 and longest_interval_steps = 1000" in line


def test_bounds_do_not_bind_what_is_fixed():
    assert specs.parse(document(checkpoint={"interval_steps": 5})).checkpoint.interval_steps == 5
