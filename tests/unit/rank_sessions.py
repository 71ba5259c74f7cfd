"""What tests of the parallel trainer run on each rank: a session over seeded data that records what it is told."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Collection
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from parallel_pool import run_ranks
from torch.distributed.tensor import DTensor

from storage.manifest import RankPart
from trainer import contract, optim
from trainer.audit import StateAudit, replica_group
from trainer.contract import ParallelConfig, WorkerConfig
from trainer.llama import load_preset
from trainer.loop import Session, train
from trainer.numeric import set_numerics
from trainer.parallel import build_mesh, build_stage
from trainer.saves import Interval

DEVICE: Any = os.environ.get("SHEPHERD_TEST_DEVICE", "cpu")
"""On which these tests train; on "cuda" all ranks share one GPU."""
SINGLE = ParallelConfig()
HYBRID_3D = ParallelConfig(pp=2, dp_replicate=2, tp=2, microbatches=2)
SHARDED_3D = ParallelConfig(pp=2, dp_shard=2, tp=2, microbatches=2)
QUAD = ParallelConfig(pp=2, dp_shard=2, microbatches=2)


class SeededTokens:
    """A data set whose batch is a pure function of its number: noisy counting, which a small model can learn."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config

    def batch(self, step: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        data, vocab_size = self.config.data, self.config.model.vocab_size
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(vocab_size, (data.global_batch, 1), generator=generator)
        stride = torch.randint(1, 4, (data.global_batch, data.seq_len + 1), generator=generator)
        tokens = ((start + stride.cumsum(1)) % vocab_size)[rows.start : rows.stop]
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def validation_batch(self, index: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch(1_000_000 + index, rows)


class RecordingCheckpointer:
    """Keeps the digests of what it is given to save, by step; fails where told to."""

    busy = False

    def __init__(self, failing_steps: Collection[int] = ()) -> None:
        self.newest_snapshot = 0
        self.failing_steps = failing_steps
        self.saved: dict[int, dict[str, str]] = {}

    def snapshot(self, state: Any, done: Any) -> None:
        self.newest_snapshot = state.step
        done(None)

    def await_snapshot(self) -> None:
        pass

    def pin_snapshots(self, *steps: int) -> None:
        pass

    def begin_save(self, state: Any, unchanged: Any, done: Any) -> None:
        try:
            done(self.save(state, unchanged))
        except OSError as error:
            done(error)

    def await_reads(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def save(self, state: Any, unchanged: Any) -> RankPart:
        assert unchanged({name: local(tensor) for name, tensor in state.tensors.items()}) == []
        if state.step in self.failing_steps:
            raise OSError(28, "No space left on device")
        self.saved[state.step] = digests(state)
        return RankPart(rank=0, data="d", index="i", data_bytes=1, index_digest="0")


def digests(state: Any) -> dict[str, str]:
    return {
        name: hashlib.sha256(local(tensor).cpu().contiguous().numpy().tobytes()).hexdigest()
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
        device=DEVICE,
        dtype="float32",
        validation_interval_steps=10,
        collective_timeout_s=120.0,
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
    mesh = build_mesh(config.parallel, config.device, timedelta(seconds=config.collective_timeout_s))
    stage = build_stage(config, mesh, initial=initial)
    optimizer = optim.build_optimizer(stage.module, config.optimizer)
    state = optim.train_state(stage.module, optimizer, 0)
    audit = StateAudit(state.tensors, config.audit, replica_group(mesh))
    audit.record()
    return Session(
        config=config,
        generation=1,
        rank=torch.distributed.get_rank(),
        stage=stage,
        optimizer=optimizer,
        state=state,
        dataset=SeededTokens(config),  # type: ignore[arg-type]
        checkpointer=RecordingCheckpointer(),  # type: ignore[arg-type]
        audit=audit,
        emit=messages.append,
        stop=threading.Event(),
        interval=Interval(config.checkpoint.interval_steps),
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


def of_type(messages: list[Any], kind: type) -> list[Any]:
    return [message for message in messages if isinstance(message, kind)]


def order_of(config: WorkerConfig, **changes: Any) -> contract.Assign:
    """An assignment of the first rank, from new weights, whose store nobody serves."""
    order = contract.Assign(
        epoch=1,
        generation=1,
        rank=0,
        world_size=config.parallel.world_size,
        local_rank=0,
        node="node-a",
        store_host="127.0.0.1",
        store_port=1,
        restore=contract.Restore(source="init"),
        config=config,
        ram_dir="",
    )
    return replace(order, **changes)
