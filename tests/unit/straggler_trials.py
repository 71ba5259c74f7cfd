"""Two real workers, each on a core of its own, one of them slowed by other load on its core: is it named, and how soon?

python tests/unit/straggler_trials.py --trials 13 --json FILE     (on a machine that does nothing else)
python tests/unit/straggler_trials.py --record FILE               (own times of a clean run, for simulations)
With --batch 96 a step takes about a second, instead of 0.15 s. Both at once: first the record.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
from parallel_pool import CONTEXT
from rank_sessions import SeededTokens, config_of
from test_worker import DEADLINE_S, INIT, Process, assign
from torch import distributed

from orchestrator.core.events import NodeSlow
from orchestrator.runtime.reports import MeshFold, NodeFold, OwnTimes
from orchestrator.runtime.stragglers import WINDOW_STEPS
from trainer import worker
from trainer.contract import DataConfig, ModelConfig, ParallelConfig, StepDone, WorkerConfig

WITHIN_STEPS = 50
"""After it is slowed, a rank has so many steps to be named in."""
REST_STEPS = 12
NODES = ("a", "b")
PAIR = config_of(
    ParallelConfig(dp_replicate=2),
    model=ModelConfig(dim=192, n_layers=3, n_heads=4, n_kv_heads=4, ffn_dim=512, vocab_size=512),
    data=DataConfig(seq_len=128, global_batch=8),
    steps=1_000_000,
    validation_interval_steps=1_000_000,
)
"""A step takes 0.15 s on a core of this kind of machine."""

# Takes a share of its core, by the time that it gets there: in slices that are short against a step, one each 10 ms.
HOG = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
share, began = float(sys.argv[2]), time.monotonic()
while True:
    while time.thread_time() < share * (time.monotonic() - began):
        pass
    time.sleep(0.01)
"""


def pin(pid: int, core: int) -> None:
    """All threads of a process, and those that they start."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), {core})


@contextmanager
def slowed(core: int, times: float) -> Iterator[None]:
    """Whoever computes on this core takes so many times as long."""
    hog = subprocess.Popen([sys.executable, "-c", HOG, str(core), str(1 - 1 / times)])
    try:
        yield
    finally:
        hog.kill()
        hog.wait()


class Burden(SeededTokens):
    """Data whose reading makes the second rank's steps take three times as much of its own time, while a file is there.

    A core that many share gives each as little, but who has three times as much to do takes three times as long.
    """

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self._file = burden_of(config)
        self._last = time.thread_time()

    def batch(self, step: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        now = time.thread_time()
        while rows.start and self._file.exists() and time.thread_time() < 3 * now - 2 * self._last:
            pass
        self._last = time.thread_time()
        return super().batch(step, rows)


def burden_of(config: WorkerConfig) -> Path:
    return Path(config.url).with_name("burden")


def serve(sock: socket.socket, config: WorkerConfig) -> None:
    worker.open_dataset = lambda *_: Burden(config)  # type: ignore[assignment]
    os._exit(worker.main(sock))


class Mesh:
    """Two workers, each as a node of its own, and what their own times come to."""

    def __init__(self, group: list[Process]) -> None:
        self.group = group
        self.own_us: list[list[int]] = [[], []]
        self.watch_anew()

    def watch_anew(self) -> None:
        self._folds = [NodeFold(generation=1, ranks=(rank,)) for rank in range(2)]
        self._mesh = MeshFold(generation=1, nodes=NODES, ranks=2, done=0)

    def step(self) -> list[NodeSlow]:
        """Both ranks do one more; who is named."""
        found: list[Any] = []
        for rank, member in enumerate(self.group):
            seen = len(member.messages)
            member.read_until(lambda message: isinstance(message, StepDone))
            for message in member.messages[seen:]:
                if isinstance(message, StepDone):
                    assert message.own_us is not None
                    self.own_us[rank].append(message.own_us)
                for report in self._folds[rank].feed(message):
                    if isinstance(report, OwnTimes):
                        found += self._mesh.feed(0, (NODES[rank],), report)
            del member.messages[:]
        return found


@contextmanager
def pair(folder: Path, batch: int = PAIR.data.global_batch) -> Iterator[Mesh]:
    """Two workers that have begun to train, with so many sequences a step."""
    config = replace(PAIR, url=str(folder / "run"), data=replace(PAIR.data, global_batch=batch))
    patience = timedelta(seconds=DEADLINE_S)
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
    group: list[Process] = []
    try:
        for rank in range(2):
            ours, theirs = socket.socketpair()
            process = CONTEXT.Process(target=serve, args=(theirs, config), daemon=True)
            process.start()
            theirs.close()
            group.append(Process(process, ours))
            assign(group[rank], rank, config, folder, INIT, store.port, generation=1)
        mesh = Mesh(group)
        for _ in range(2 * WINDOW_STEPS):  # with all their threads started
            mesh.step()
        mesh.watch_anew()
        yield mesh
    finally:
        for member in group:
            member.process.kill()
            member.process.join(DEADLINE_S)
            member.sock.close()


@contextmanager
def pinned_pair(folder: Path, batch: int = PAIR.data.global_batch) -> Iterator[Mesh]:
    """The same, each on a core of its own."""
    with pair(folder, batch) as mesh:
        for core, member in enumerate(mesh.group):
            pin(member.process.pid, core)
        yield mesh


def trials(mesh: Mesh, number: int, times: float) -> list[dict[str, Any]]:
    """Ranks are slowed in turn; who is named after how many steps (None, None: nobody within WITHIN_STEPS)."""
    results = []
    for trial in range(number):
        for _ in range(REST_STEPS):
            mesh.step()
        mesh.watch_anew()
        for _ in range(trial % WINDOW_STEPS):  # it begins anywhere within a window
            mesh.step()
        named, steps = None, None
        with slowed(trial % 2, times):
            for taken in range(1, WITHIN_STEPS + 1):
                if found := mesh.step():
                    named, steps = found[0].slot, taken
                    break
            own = [median(own_us[-taken:]) for own_us in mesh.own_us]
        ratio = round(own[trial % 2] / own[1 - trial % 2], 3)
        results.append({"slowed": trial % 2, "ratio": ratio, "named": named, "steps": steps})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=0)
    parser.add_argument("--times", type=float, default=1.3, help="as long as its peer's the slowed rank's work takes")
    parser.add_argument("--batch", type=int, default=PAIR.data.global_batch, help="sequences a step")
    parser.add_argument("--seconds", type=float, default=90.0, help="for --record")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pinned_pair(Path(folder), arguments.batch) as mesh:
        if arguments.record:
            mesh.own_us = [[], []]
            named, deadline = 0, time.monotonic() + arguments.seconds
            while time.monotonic() < deadline:
                named += len(mesh.step())
            arguments.record.write_text(json.dumps({"named": named, "own_us": mesh.own_us}))
            print(f"{len(mesh.own_us[0])} clean steps, {named} named", flush=True)
        if arguments.trials:
            results = trials(mesh, arguments.trials, arguments.times)
            right = sum(result["named"] == result["slowed"] for result in results)
            print(f"{right} of {len(results)} named rightly: {[(r['ratio'], r['steps']) for r in results]}")
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
