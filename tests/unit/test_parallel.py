"""The parallel trainer against a single process, bit for bit against itself, and the agreements among its ranks."""

from __future__ import annotations

import functools
import hashlib
import tempfile
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_pool import run_ranks
from torch.distributed.tensor import DTensor

from storage.manifest import RankPart
from trainer import contract, optim
from trainer.contract import ParallelConfig, WorkerConfig
from trainer.llama import Llama, initialise, load_preset
from trainer.loop import NonFiniteError, Session, train, train_step
from trainer.numeric import set_numerics
from trainer.parallel import build_mesh, build_stage, check_layout, stage_layers

SINGLE = ParallelConfig()
HYBRID_3D = ParallelConfig(pp=2, dp_replicate=2, tp=2, microbatches=2)
SHARDED_3D = ParallelConfig(pp=2, dp_shard=2, tp=2, microbatches=2)
QUAD = ParallelConfig(pp=2, dp_shard=2, microbatches=2)


# --- what runs on each rank ------------------------------------------------------------------------------------------


class SeededTokens:
    """A data set whose batch is a pure function of its number: noisy counting, which a small model can learn."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config

    def batch(self, step: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        data, vocab_size = self.config.data, self.config.model.vocab_size
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(vocab_size, (data.global_batch, 1), generator=generator)
        stride = torch.randint(1, 4, (data.global_batch, data.seq_len + 1), generator=generator)
        tokens = (start + stride.cumsum(1)) % vocab_size
        return tokens[rows.start : rows.stop, :-1], tokens[rows.start : rows.stop, 1:]

    def validation_batch(self, index: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch(1_000_000 + index, rows)


class RecordingCheckpointer:
    """Keeps the digests of what it is given to save, by step; fails where told to."""

    def __init__(self, failing_step: int = -1) -> None:
        self.newest_snapshot = 0
        self.failing_step = failing_step
        self.saved: dict[int, dict[str, str]] = {}

    def snapshot(self, state: Any) -> None:
        self.newest_snapshot = state.step

    def save(self, state: Any) -> RankPart:
        if state.step == self.failing_step:
            raise OSError(28, "No space left on device")
        self.saved[state.step] = digests(state)
        return RankPart(rank=0, data="d", index="i", data_bytes=1, index_digest="0")


def digests(state: Any) -> dict[str, str]:
    return {
        name: hashlib.sha256(local(tensor).contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in {**state.tensors, **state.per_rank}.items()
    }


def local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def config_of(parallel: ParallelConfig = SINGLE, n_layers: int = 4, **changes: Any) -> WorkerConfig:
    config = WorkerConfig(
        run="test",
        url="memory://test",
        steps=20,
        seed=7,
        deterministic=True,
        device="cpu",
        dtype="float32",
        validation_interval_steps=10,
        collective_timeout_s=30.0,
        model=replace(load_preset("tiny"), n_layers=n_layers),
        data=contract.DataConfig(seq_len=32, global_batch=8, validation_batches=2),
        parallel=parallel,
        optimizer=contract.OptimizerConfig(lr=1e-3, warmup_steps=5, clip_norm=0.5),
        checkpoint=contract.CheckpointConfig(interval_steps=8),
        audit=contract.AuditConfig(),
    )
    return replace(config, **changes)


def make_session(config: WorkerConfig, messages: list[Any], *, initial: bool = True) -> Session:
    set_numerics(config)
    mesh = build_mesh(config.parallel, "cpu", timedelta(seconds=config.collective_timeout_s))
    stage = build_stage(config, mesh, initial=initial)
    optimizer = optim.build_optimizer(stage.module, config.optimizer)
    return Session(
        config=config,
        generation=1,
        rank=torch.distributed.get_rank(),
        stage=stage,
        optimizer=optimizer,
        state=optim.train_state(stage.module, optimizer, 0),
        dataset=SeededTokens(config),  # type: ignore[arg-type]
        checkpointer=RecordingCheckpointer(),  # type: ignore[arg-type]
        emit=messages.append,
        stop=threading.Event(),
    )


def train_and_record(config: WorkerConfig, stop_at: int = -1) -> tuple[list[Any], dict[int, dict[str, str]]]:
    """Train, each rank asking to stop when step `stop_at` is done; the messages, and digests of what was saved."""
    messages: list[Any] = []
    session = make_session(config, messages)

    def emit(message: Any) -> None:
        messages.append(message)
        # Asked during the step before, since the ranks agree within a step.
        if isinstance(message, contract.StepDone) and message.step == stop_at - 1:
            session.stop.set()

    session.emit = emit
    train(session, saved_step=-1)
    return messages, session.checkpointer.saved  # type: ignore[attr-defined]


def on_ranks(function: Any, config: WorkerConfig, *arguments: Any) -> list[Any]:
    """`function(config, ...)` on each rank of the config's mesh; the first rank's exception if any raised one."""
    with tempfile.TemporaryDirectory() as folder:
        results = run_ranks(function, config.parallel.world_size, Path(folder), config, *arguments)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@functools.cache
def trained(parallel: ParallelConfig) -> list[tuple[list[Any], dict[int, dict[str, str]]]]:
    return on_ranks(train_and_record, config_of(parallel, layers_of(parallel)))


def layers_of(parallel: ParallelConfig) -> int:
    """Four make a pipeline with stages in the middle; under tensor parallelism, which is slow here, two are enough."""
    return 2 if parallel.tp > 1 else 4


def of_type(messages: list[Any], kind: type) -> list[Any]:
    return [message for message in messages if isinstance(message, kind)]


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
    with pytest.raises(NonFiniteError):
        train_step(session)


# --- agreements among ranks ------------------------------------------------------------------------------------------


def test_not_a_number_on_one_rank_is_refused_by_all_before_the_optimizer() -> None:
    for error, before, after, step in on_ranks(poison_rank_3, config_of(HYBRID_3D, n_layers=2)):
        assert error.startswith("step 3: loss nan")
        assert before == after
        assert step == 2


def poison_rank_3(config: WorkerConfig) -> tuple[str, dict[str, str], dict[str, str], int]:
    session = make_session(config, [])
    train_step(session)
    train_step(session)
    if session.rank == 3:
        with torch.no_grad():
            local(session.state.tensors["model/layers.0.attention.wo.weight"])[0, 0] = torch.nan
    before = digests(session.state)
    with pytest.raises(NonFiniteError) as caught:
        train_step(session)
    return str(caught.value), before, digests(session.state), session.state.step


def test_the_finite_check_can_be_turned_off() -> None:
    on_ranks(poison_without_check, config_of(audit=contract.AuditConfig(finite=False)))


def poison_without_check(config: WorkerConfig) -> None:
    session = make_session(config, [])
    with torch.no_grad():
        session.state.tensors["model/norm.weight"][0] = torch.nan
    train_step(session)
    assert session.state.step == 1


def test_all_ranks_stop_at_the_step_after_one_was_asked_to() -> None:
    for messages, saved in on_ranks(stop_rank_2_after_step_3, config_of(QUAD)):
        finished = messages[-1]
        assert (finished.step, finished.reason) == (4, "stopped")
        assert [message.step for message in of_type(messages, contract.ShardWritten)] == [4]
        assert list(saved) == [4]


def stop_rank_2_after_step_3(config: WorkerConfig) -> tuple[list[Any], dict[int, dict[str, str]]]:
    messages: list[Any] = []
    session = make_session(config, messages)

    def emit(message: Any) -> None:
        messages.append(message)
        if isinstance(message, contract.StepDone) and message.step == 3 and session.rank == 2:
            session.stop.set()

    session.emit = emit
    train(session, saved_step=-1)
    return messages, session.checkpointer.saved  # type: ignore[attr-defined]


# --- the loop's calendar ---------------------------------------------------------------------------------------------

CALENDAR = config_of(
    steps=7,
    validation_interval_steps=5,
    checkpoint=contract.CheckpointConfig(interval_steps=3, snapshot_interval_steps=2),
)


def test_saves_validations_and_snapshots_come_when_due() -> None:
    ((messages, saved),) = on_ranks(train_and_record, CALENDAR)
    assert list(saved) == [3, 6, 7]
    assert [message.step for message in of_type(messages, contract.ShardWritten)] == [3, 6, 7]
    assert [message.step for message in of_type(messages, contract.Validated)] == [0, 5, 7]
    steps = of_type(messages, contract.StepDone)
    assert [message.step for message in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [message.snapshot_step for message in steps] == [0, 2, 2, 4, 4, 6, 6]
    assert all(0 <= m.data_us + m.snapshot_us <= m.step_us and m.tokens == 8 * 32 for m in steps)
    assert messages[-1] == contract.Finished(generation=1, rank=0, step=7, reason="completed")


def test_a_failed_save_costs_the_checkpoint_and_not_the_run() -> None:
    ((messages, saved),) = on_ranks(train_with_full_disk_at_step_3, CALENDAR)
    (failed,) = of_type(messages, contract.SaveFailed)
    assert failed.step == 3
    assert "No space left on device" in failed.error
    assert list(saved) == [6, 7]
    assert messages[-1].reason == "completed"


def train_with_full_disk_at_step_3(config: WorkerConfig) -> tuple[list[Any], dict[int, dict[str, str]]]:
    messages: list[Any] = []
    session = make_session(config, messages)
    session.checkpointer = RecordingCheckpointer(failing_step=3)  # type: ignore[assignment]
    train(session, saved_step=-1)
    return messages, session.checkpointer.saved  # type: ignore[attr-defined]


@pytest.mark.parametrize("saved_step", [7, -1], ids=["durable", "snapshot"])
def test_a_finished_state_is_saved_only_if_it_is_not_yet(saved_step: int) -> None:
    ((messages, saved),) = on_ranks(train_from_the_end, CALENDAR, saved_step)
    assert list(saved) == ([] if saved_step == 7 else [7])
    assert of_type(messages, contract.StepDone) == []
    assert messages[-1] == contract.Finished(generation=1, rank=0, step=7, reason="completed")


def train_from_the_end(config: WorkerConfig, saved_step: int) -> tuple[list[Any], dict[int, dict[str, str]]]:
    messages: list[Any] = []
    session = make_session(config, messages)
    session.state.step = config.steps
    train(session, saved_step)
    return messages, session.checkpointer.saved  # type: ignore[attr-defined]


# --- layout ----------------------------------------------------------------------------------------------------------


def test_every_group_of_the_mesh_has_the_timeout() -> None:
    for timeouts in on_ranks(group_timeouts, config_of(QUAD)):
        assert timeouts == [timedelta(seconds=12)] * 4


def group_timeouts(config: WorkerConfig) -> list[timedelta]:
    mesh = build_mesh(config.parallel, "cpu", timedelta(seconds=12))
    device = torch.device("cpu")
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
