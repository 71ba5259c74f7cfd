"""What the audit of state costs: whole training steps with and without it, interleaved, on a model that computes.

    OMP_NUM_THREADS=1 python -P benchmarks/audit_cost.py --steps 40

Each round is three steps in random order: one with the audit and two without, of which one is the other's double. The
cost is the median over rounds of (with - without) / without, the noise floor that of (double - without) / without, each
with a bootstrap interval of 95%. Beside them stands the audit's own time in the steps with it, which noise hardly
touches. Run it on an idle machine: a neighbour's load is larger than what is measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import threading
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from storage.checkpointer import Checkpointer
from trainer import contract, optim
from trainer.audit import Finding, StateAudit
from trainer.loop import Session, train_step
from trainer.numeric import set_numerics
from trainer.parallel import build_mesh, build_stage
from trainer.saves import Interval

RESULTS = Path(__file__).parent / "results" / "audit_cost.json"
OFF = contract.AuditConfig(at_rest=False, replicas=False)
WARM_UP_STEPS = 2
RESAMPLES = 10_000


class RandomTokens:
    """Random tokens: what a step costs does not depend on them."""

    def __init__(self, config: contract.WorkerConfig) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        shape = (config.data.global_batch, config.data.seq_len + 1)
        self._tokens = torch.randint(config.model.vocab_size, shape, generator=generator)

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        tokens = self._tokens[rows.start : rows.stop]
        return tokens[:, :-1], tokens[:, 1:]


class TimedAudit:
    """A StateAudit that adds up the seconds spent in it."""

    def __init__(self, audit: StateAudit) -> None:
        self._audit = audit
        self.seconds = 0.0

    def record(self) -> None:
        started = time.perf_counter()
        self._audit.record()
        self.seconds += time.perf_counter() - started

    def check(self) -> Finding | None:
        started = time.perf_counter()
        finding = self._audit.check()
        self.seconds += time.perf_counter() - started
        return finding


def job(layers: int) -> contract.WorkerConfig:
    """A model of 3.2 million parameters a layer and 8.4 million in its embeddings, 2048 tokens a step."""
    return contract.WorkerConfig(
        run="audit-cost",
        url="",
        steps=1_000_000,
        seed=1,
        deterministic=True,
        device="cpu",
        dtype="float32",
        validation_interval_steps=1_000_000,
        collective_timeout_s=30.0,
        model=contract.ModelConfig(dim=512, n_layers=layers, n_heads=8, n_kv_heads=8, ffn_dim=1376, vocab_size=8192),
        data=contract.DataConfig(seq_len=512, global_batch=4),
        parallel=contract.ParallelConfig(),
        optimizer=contract.OptimizerConfig(),
        checkpoint=contract.CheckpointConfig(interval_steps=1_000_000),
        audit=contract.AuditConfig(),
    )


def open_session(config: contract.WorkerConfig, folder: str) -> Session:
    set_numerics(config)
    timeout = timedelta(seconds=config.collective_timeout_s)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1, timeout=timeout)
    stage = build_stage(config, build_mesh(config.parallel, config.device, timeout))
    optimizer = optim.build_optimizer(stage.module, config.optimizer)
    state = optim.train_state(stage.module, optimizer, step=0)
    checkpointer = Checkpointer(
        url=f"{folder}/run",
        run=config.run,
        rank=0,
        world_size=1,
        epoch=1,
        generation=1,
        ram_dir=f"{folder}/ram",
        node="local",
    )
    return Session(
        config=config,
        generation=1,
        rank=0,
        stage=stage,
        optimizer=optimizer,
        state=state,
        dataset=RandomTokens(config),  # type: ignore[arg-type]
        checkpointer=checkpointer,
        audit=StateAudit(state.tensors, OFF, None),
        emit=lambda message: None,
        stop=threading.Event(),
        interval=Interval(config.checkpoint.interval_steps),
    )


def measure(session: Session, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round's steps with the audit, without it and without it again; and of the audit alone."""
    on = session.config
    off = replace(on, audit=OFF)
    without, audit = session.audit, TimedAudit(StateAudit(session.state.tensors, on.audit, None))
    order, seconds = random.Random(1), {"with": [], "without": [], "double": [], "alone": []}
    for _ in range(WARM_UP_STEPS):
        train_step(session)
    for number in range(rounds):
        for kind in order.sample(("with", "without", "double"), 3):
            session.config = on if kind == "with" else off
            session.audit = audit if kind == "with" else without  # type: ignore[assignment]
            session.audit.record()  # of the state that the steps without have left; not timed
            audit.seconds = 0.0
            started = time.perf_counter()
            train_step(session)
            seconds[kind].append(time.perf_counter() - started)
            if kind == "with":
                seconds["alone"].append(audit.seconds)
        latest = ", ".join(f"{kind} {values[-1]:.3f} s" for kind, values in seconds.items())
        print(f"round {number + 1} of {rounds}: {latest}", flush=True)
    return seconds


def median_interval(percent: np.ndarray) -> dict[str, float]:
    """The median and its bootstrap interval of 95%."""
    chance = np.random.default_rng(1)
    medians = np.median(chance.choice(percent, (RESAMPLES, len(percent))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {"median": float(np.median(percent)), "low": float(low), "high": float(high)}


def report(session: Session, seconds: dict[str, list[float]]) -> dict[str, Any]:
    step_s = {kind: np.array(values) for kind, values in seconds.items()}
    without = step_s["without"]
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in session.state.tensors.values())
    alone_s = float(np.median(step_s["alone"]))
    return {
        "cost_percent": median_interval(100 * (step_s["with"] - without) / without),
        "noise_percent": median_interval(100 * (step_s["double"] - without) / without),
        "audit_alone_percent": median_interval(100 * step_s["alone"] / without),
        "step_s": float(np.median(without)),
        "audit_s": alone_s,
        "audit_gigabytes_per_s": 2 * state_bytes / alone_s / 1e9,
        "parameters": sum(parameter.numel() for parameter in session.stage.module.parameters()),
        "tokens_per_step": session.config.data.global_batch * session.config.data.seq_len,
        "rounds": len(without),
        "model": asdict(session.config.model),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the audit of state costs, in per cent of a step.")
    parser.add_argument("--steps", type=int, default=40, help="rounds of three steps each (default 40)")
    parser.add_argument("--layers", type=int, default=12, help="of the model (default 12: 46 million parameters)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(job(arguments.layers), folder)
        result = report(session, measure(session, arguments.steps))
        distributed.destroy_process_group()
    for name in ("cost", "noise", "audit_alone"):
        figure = result[f"{name}_percent"]
        print(f"{name:12} {figure['median']:6.2f}% of a step ({figure['low']:.2f} to {figure['high']:.2f})")
    speed = f"{result['audit_gigabytes_per_s']:.1f} GB/s"
    print(f"the audit takes {1e3 * result['audit_s']:.1f} ms of a step of {result['step_s']:.2f} s: {speed}")
    print(f"{result['parameters'] / 1e6:.1f} million parameters, {result['threads']} thread(s), {result['cpu']}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
