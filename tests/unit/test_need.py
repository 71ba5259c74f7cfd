"""The arithmetic of what a run needs, against the model as torch makes and divides it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.need import need_of, size
from orchestrator.spec import JobSpec, parse
from storage.ram import COPY_FILES, FILES_WITH_COPIES
from storage.snapshots import RamTier
from storage.state import TrainState
from trainer.contract import Degrees
from trainer.llama import Llama, load_preset, parameter_count
from trainer.parallel import stage_layers


def spec(preset: str = "tiny", slots: int = 1, **parallel: int) -> JobSpec:
    document: dict[str, Any] = {
        "run": {"name": "r", "url": "/r"},
        "model": {"preset": preset},
        "parallel": parallel,
        "cluster": {"slots_per_node": slots},
        "data": {"seq_len": 128, "global_batch": 96},
    }
    return parse(document)


@pytest.mark.parametrize("preset", ["tiny", "llama2_7b", "llama3_8b", "llama3_405b"])
def test_the_whole_model_is_counted(preset):
    need = need_of(spec(preset))
    assert need.parameters == need.node_parameters == parameter_count(load_preset(preset))
    assert need.checkpoint_bytes == 12 * need.parameters
    assert need.ram_bytes >= 3 * 12 * need.parameters
    assert need.memory_bytes >= need.ram_bytes + (12 + 16) * need.parameters


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("dp_shard", [1, 2, 3])
def test_the_fullest_slot_is_that_of_torchs_own_division(pp, dp_shard):
    """Oracle: the stages of the model on torch's meta device, each parameter cut by torch.chunk as FSDP2 does."""
    model = load_preset("tiny")
    parallel = {"pp": pp, "dp_shard": dp_shard, "microbatches": 4}
    job = spec(**parallel)
    held = []
    for stage in range(pp):
        with torch.device("meta"):
            part = Llama(model, stage_layers(model.n_layers, pp, stage))
        held.append(sum(p.chunk(dp_shard)[0].numel() for p in part.parameters()))
    assert need_of(job).node_parameters == max(held)


def test_tensor_parallelism_halves_the_matrices_and_keeps_the_norms():
    one, two = need_of(spec()), need_of(spec(slots=2, tp=2))
    norms = 64 * (2 * 4 + 1)
    assert two.node_parameters == one.node_parameters + norms


def test_a_node_is_counted_with_all_its_slots():
    """Four stages on two nodes: the node of the last two has the head, which weighs more than the embedding's norm."""
    by_slot = [need_of(spec(slots=1, pp=4, microbatches=4)).node_parameters]
    both = need_of(spec(slots=2, pp=4, microbatches=4))
    assert by_slot[0] < both.node_parameters < 2 * by_slot[0]
    replicas = need_of(spec(slots=2, dp_replicate=2))
    assert replicas.node_parameters == 2 * replicas.parameters


def test_copies_are_counted_where_some_are_made():
    """Two nodes that hold a replica each are each other's copies; two that hold a stage each are not."""
    files = {
        name: round(job.ram_bytes / job.part_bytes)
        for name, job in {
            "one node": need_of(spec(slots=2, dp_shard=2)),
            "replicas": need_of(spec(slots=2, dp_shard=2, dp_replicate=2)),
            "stages": need_of(spec(slots=2, pp=2, dp_replicate=2, microbatches=2)),
            "shards": need_of(spec(slots=2, dp_shard=4)),
            "replicas of stages": need_of(spec(slots=1, pp=2, dp_replicate=2, microbatches=2)),
        }.items()
    }
    whole = {"one node": 3, "replicas": 3, "stages": 6, "shards": 6}
    assert files == whole | {"replicas of stages": 6}, "one that is left of two is copied"


def test_a_smaller_mesh_needs_more_of_a_node():
    """One node takes what two have held, beside the last snapshots of both."""
    whole = spec(slots=2, pp=2, tp=2, microbatches=2)
    alone = need_of(spec(slots=2, tp=2))
    recovery = whole.recovery.model_copy(update={"fallback_meshes": (Degrees(tp=2),)})
    both = need_of(whole.model_copy(update={"recovery": recovery}))
    assert both.node_parameters == alone.node_parameters > need_of(whole).node_parameters
    assert (both.part_bytes, both.checkpoint_bytes) == (alone.part_bytes, alone.checkpoint_bytes)
    files = FILES_WITH_COPIES + COPY_FILES + 1
    assert both.ram_bytes == files * alone.part_bytes
    assert both.memory_bytes - both.ram_bytes == alone.memory_bytes - alone.ram_bytes
    assert both.files == need_of(whole).files
    assert any(line.startswith("fallback tp 2: model: ") for line in both.arithmetic)
    assert f"= {size(both.memory_bytes)} on a node" in both.arithmetic[-1]


def test_a_snapshot_has_room_for_what_the_tier_allocates(tmp_path):
    """Oracle: the files of the tiny model's state."""
    model, need = load_preset("tiny"), need_of(spec())
    with torch.device("meta"):
        parameters = list(Llama(model, stage_layers(model.n_layers, 1, 0)).named_parameters())
    kinds = ("model", "exp_avg", "exp_avg_sq")
    tensors = {f"{kind}/{name}": torch.zeros(p.shape) for name, p in parameters for kind in kinds}
    tier = RamTier(str(tmp_path), "r", "n" * 56, 0, generation=1)
    tier.snapshot(TrainState(1, tensors, {"rng": torch.zeros(5056, dtype=torch.uint8)}))
    tier.wait()
    held = sum(path.stat().st_size for path in tmp_path.rglob("slot-*"))
    assert 0.8 * need.ram_bytes < held <= need.ram_bytes


def test_cuda_trains_on_the_device():
    job = spec("llama3_8b", slots=8, dp_shard=8)
    cuda = job.model_copy(update={"cluster": job.cluster.model_copy(update={"device": "cuda"})})
    assert need_of(job).device_bytes == 0
    assert need_of(cuda).device_bytes * 8 == pytest.approx(16 * need_of(cuda).parameters, rel=1e-3)
    assert need_of(cuda).memory_bytes < need_of(job).memory_bytes


def test_the_arithmetic_is_printed_with_its_result():
    need = need_of(spec("llama3_8b", slots=8, dp_shard=8))
    text = "\n".join(need.arithmetic)
    assert "8,030,261,248 parameters" in text
    assert f"= {size(need.ram_bytes)} on a node" in text and f"= {size(need.memory_bytes)} on a node" in text


@pytest.mark.parametrize(("n", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 40, "3.0 TiB")])
def test_sizes(n, text):
    assert size(n) == text
