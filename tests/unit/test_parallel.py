"""The parallel trainer against a single process, and bit for bit against itself."""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

import pytest
import torch
from rank_sessions import (
    HYBRID_3D,
    QUAD,
    SHARDED_3D,
    SINGLE,
    config_of,
    digests,
    local,
    make_session,
    of_type,
    on_ranks,
    train_and_record,
)
from torch.distributed.tensor import DTensor

from trainer import contract, optim
from trainer.contract import Degrees, ParallelConfig, WorkerConfig
from trainer.llama import Llama, initialise
from trainer.loop import NonFiniteError, train, train_step
from trainer.parallel import build_mesh, check_layout, stage_layers


@functools.cache
def trained(parallel: ParallelConfig) -> list[tuple[list[Any], dict[int, dict[str, str]]]]:
    return on_ranks(train_and_record, config_of(parallel, layers_of(parallel)))


def layers_of(parallel: ParallelConfig) -> int:
    """Four make a pipeline with stages in the middle; under tensor parallelism, which is slow here, two are enough."""
    return 2 if parallel.tp > 1 else 4


@functools.cache
def single(n_layers: int) -> list[Any]:
    """The messages of a single process."""
    ((messages, _),) = on_ranks(train_and_record, config_of(SINGLE, n_layers))
    return messages


# --- the same numbers whatever the mesh ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parallel",
    [
        HYBRID_3D,
        SHARDED_3D,
        ParallelConfig(microbatches=4),
        ParallelConfig(pp=2, microbatches=4),
        ParallelConfig(pp=4, microbatches=4),
        ParallelConfig(tp=2, microbatches=2),
        ParallelConfig(dp_shard=2, microbatches=2),
        ParallelConfig(dp_replicate=2, dp_shard=2),
        QUAD,
    ],
    ids=lambda p: f"pp{p.pp}-rep{p.dp_replicate}-shard{p.dp_shard}-tp{p.tp}-mb{p.microbatches}",
)
def test_follows_a_single_process_step_for_step(parallel: ParallelConfig) -> None:
    expected, actual = single(layers_of(parallel)), trained(parallel)[0][0]
    for kind, field in (
        (contract.StepDone, "loss"),
        (contract.StepDone, "grad_norm"),
        (contract.StepDone, "lr"),
        (contract.Validated, "loss"),
    ):
        want = [getattr(message, field) for message in of_type(expected, kind)]
        assert len(want) == (20 if kind is contract.StepDone else 3)
        got = [getattr(message, field) for message in of_type(actual, kind)]
        assert got == pytest.approx(want, rel=1e-5, abs=0), (kind.__name__, field)
    losses = [message.loss for message in of_type(expected, contract.Validated)]
    assert losses[-1] < losses[0] - 0.2, "the run must learn, else equal losses show little"


@pytest.mark.parametrize(
    ("declared", "mesh"),
    [
        (ParallelConfig(dp_replicate=4), Degrees(dp_replicate=3)),
        (ParallelConfig(pp=2, dp_replicate=4, microbatches=2), Degrees(pp=2, dp_replicate=3)),
        (ParallelConfig(dp_replicate=2, dp_shard=2, microbatches=2), Degrees(dp_shard=2)),
        (ParallelConfig(pp=2, dp_shard=2, tp=2, microbatches=2), Degrees(dp_replicate=3)),
    ],
    ids=["uneven", "uneven pipelines", "sharded", "other shards"],
)
def test_a_shrunk_mesh_follows_a_single_process_step_for_step(declared: ParallelConfig, mesh: Degrees) -> None:
    """Also where some replicas take a microbatch more than others. Microbatches keep their size."""
    whole = config_of(declared)
    results = on_ranks(train_and_record_rows, whole.on_mesh(mesh))
    expected = single(4)
    for kind in (contract.StepDone, contract.Validated):
        losses = [message.loss for message in of_type(results[0][0], kind)]
        assert losses == pytest.approx([message.loss for message in of_type(expected, kind)], rel=1e-5, abs=0), kind
    rows = [row for _, own, _ in results[:: mesh.tp] for row in own]
    assert sorted(rows) == sorted(list(range(8)) * mesh.pp), "each sample once, whatever the mesh"
    samples = 8 // (declared.dp * declared.microbatches)
    assert all(len(own) == count * samples for _, own, count in results)
    rounds = declared.dp * declared.microbatches // mesh.dp_shard
    assert max(count for *_, count in results) == -(-rounds // mesh.dp_replicate)


def train_and_record_rows(config: WorkerConfig) -> tuple[list[Any], list[int], int]:
    messages: list[Any] = []
    session = make_session(config, messages)
    train(session, saved_step=-1)
    return messages, list(session.stage.rows), session.stage.microbatches


@pytest.mark.parametrize("parallel", [HYBRID_3D, SHARDED_3D], ids=["hybrid", "sharded"])
def test_runs_of_one_mesh_are_bit_identical(parallel: ParallelConfig) -> None:
    first, second = trained(parallel), on_ranks(train_and_record, config_of(parallel, layers_of(parallel)), 8)
    for rank, ((_, ours), (_, theirs)) in enumerate(zip(first, second, strict=True)):
        assert {name.split("/")[0] for name in ours[8]} == {"model", "exp_avg", "exp_avg_sq", "rng"}
        assert ours[8] == theirs[8], f"rank {rank}"
    report = [(m.loss, m.grad_norm) for m in of_type(first[0][0], contract.StepDone)]
    assert report[:8] == [(m.loss, m.grad_norm) for m in of_type(second[0][0], contract.StepDone)]


def test_replicas_hold_equal_state() -> None:
    """Parameters, moments and random state: a replica's snapshot may stand in for a lost one."""
    saved = [saves[20] for _, saves in trained(HYBRID_3D)]
    for rank in (0, 1, 4, 5):  # row-major over (pp, dp_replicate, dp_shard, tp): the replica is two ranks on
        assert saved[rank] == saved[rank + 2]
    assert saved[0] != saved[1], "tp ranks hold different shards"


def test_bfloat16_learns_like_float32_and_keeps_float32_state() -> None:
    config = config_of(QUAD, dtype="bfloat16")
    results = on_ranks(train_and_record_dtypes, config)
    losses = [message.loss for message in of_type(results[0][0], contract.StepDone)]
    exact = [message.loss for message in of_type(single(4), contract.StepDone)]
    assert losses == pytest.approx(exact, rel=5e-3)
    assert losses != pytest.approx(exact, rel=1e-6), "nothing was computed in bfloat16"
    assert all(dtypes == {torch.float32} for _, dtypes in results)


def train_and_record_dtypes(config: WorkerConfig) -> tuple[list[Any], set[torch.dtype]]:
    messages: list[Any] = []
    session = make_session(config, messages)
    train(session, saved_step=-1)
    return messages, {tensor.dtype for tensor in session.state.tensors.values()}


def test_shards_together_are_the_initial_model() -> None:
    on_ranks(compare_initial_values, config_of(ParallelConfig(pp=2, dp_shard=2, tp=2, microbatches=2)))


def compare_initial_values(config: WorkerConfig) -> None:
    whole = Llama(config.model)
    initialise(whole, config.model, config.seed)
    expected = dict(whole.named_parameters())
    module = make_session(config, []).stage.module
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().numel() < expected[name].numel(), f"{name} is not sharded"
        assert torch.equal(parameter.full_tensor(), expected[name]), name


# --- continuing from a state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [SINGLE, QUAD, ParallelConfig(tp=2)], ids=["single", "pp-fsdp", "tp"])
def test_a_restored_session_continues_bit_for_bit(parallel: ParallelConfig) -> None:
    config = config_of(parallel, steps=6, validation_interval_steps=2)
    for untouched, continued in on_ranks(continue_halfway, config):
        assert untouched == continued


def continue_halfway(config: WorkerConfig) -> tuple[dict[str, str], dict[str, str]]:
    """The final digests of a run, and those of a session without initial values that was given its state at step 3."""
    first = make_session(config, [])
    copied: dict[str, torch.Tensor] = {}

    def copy_at_step_3(message: Any) -> None:
        if isinstance(message, contract.StepDone) and message.step == 3:
            copied.update({name: local(tensor).clone() for name, tensor in first.state.tensors.items()})

    first.emit = copy_at_step_3
    train(first, saved_step=-1)

    second = make_session(config, [], initial=False)
    with torch.no_grad():
        for name, tensor in second.state.tensors.items():
            local(tensor).copy_(copied[name])
    second.audit.record()
    second.state.step = 3
    optim.set_completed_steps(second.optimizer, 3)
    train(second, saved_step=-1)
    return digests(first.state), digests(second.state)


def test_a_parameter_that_a_restore_forgets_is_refused() -> None:
    on_ranks(forget_one_parameter, config_of())


def forget_one_parameter(config: WorkerConfig) -> None:
    session = make_session(config, [], initial=False)
    with torch.no_grad():
        for name, tensor in session.state.tensors.items():
            if name != "model/layers.1.ffn_norm.weight":
                tensor.fill_(0.5)
    session.audit.record()
    with pytest.raises(NonFiniteError):
        train_step(session)


# --- layout ----------------------------------------------------------------------------------------------------------


def test_every_group_of_the_mesh_has_the_timeout() -> None:
    for timeouts in on_ranks(group_timeouts, config_of(QUAD)):
        assert timeouts == [timedelta(seconds=12)] * 4


def group_timeouts(config: WorkerConfig) -> list[timedelta]:
    mesh = build_mesh(config.parallel, config.device, timedelta(seconds=12))
    device = torch.device(config.device)
    return [mesh.get_group(name)._get_backend(device).options._timeout for name in mesh.mesh_dim_names or ()]


@pytest.mark.parametrize(("n_layers", "pp"), [(4, 1), (4, 2), (4, 4), (126, 16), (7, 3)])
def test_stages_partition_the_layers_evenly(n_layers: int, pp: int) -> None:
    stages = [stage_layers(n_layers, pp, stage) for stage in range(pp)]
    assert [layer for stage in stages for layer in stage] == list(range(n_layers))
    sizes = [len(stage) for stage in stages]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(tp=4), r"model.n_kv_heads = 2 must be a multiple of parallel.tp = 4"),
        (ParallelConfig(dp_shard=3), r"data.global_batch = 8 must be a multiple of .* = 3"),
        (ParallelConfig(microbatches=16), r"data.global_batch = 8 must be a multiple of .* = 16"),
        (ParallelConfig(pp=8, microbatches=8), r"parallel.pp = 8 must be at most model.n_layers = 4"),
        (ParallelConfig(pp=2), r"parallel.microbatches = 1 must be at least parallel.pp = 2"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(config_of(parallel))
