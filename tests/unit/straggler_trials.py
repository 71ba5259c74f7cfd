"""Two real workers, each on a core of its own, one of them slowed by other load on its core: is it named, and how soon?

python tests/unit/straggler_trials.py --trials 13 --json FILE     (on a machine that does nothing else)
python tests/unit/straggler_trials.py --record FILE               (own times of a clean run, for simulations)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from rank_sessions import config_of
from test_worker import INIT, Process, workers

from orchestrator.core.events import NodeSlow
from orchestrator.runtime.reports import MeshFold, NodeFold, OwnTimes
from orchestrator.runtime.stragglers import WINDOW_STEPS
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
        for rank, worker in enumerate(self.group):
            seen = len(worker.messages)
            worker.read_until(lambda message: isinstance(message, StepDone))
            for message in worker.messages[seen:]:
                if isinstance(message, StepDone):
                    assert message.own_us is not None
                    self.own_us[rank].append(message.own_us)
                for report in self._folds[rank].feed(message):
                    if isinstance(report, OwnTimes):
                        found += self._mesh.feed(0, (NODES[rank],), report)
            del worker.messages[:]
        return found


@contextmanager
def pinned_pair(folder: Path, config: WorkerConfig = PAIR) -> Iterator[Mesh]:
    with workers(config, folder, INIT) as group:
        mesh = Mesh(group)
        for _ in range(2 * WINDOW_STEPS):  # with all their threads started
            mesh.step()
        for core, worker in enumerate(group):
            pin(worker.process.pid, core)
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
    parser.add_argument("--seconds", type=float, default=90.0, help="for --record")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pinned_pair(Path(folder)) as mesh:
        if arguments.record:
            mesh.own_us = [[], []]
            named, deadline = 0, time.monotonic() + arguments.seconds
            while time.monotonic() < deadline:
                named += len(mesh.step())
            arguments.record.write_text(json.dumps({"named": named, "own_us": mesh.own_us}))
            print(f"{len(mesh.own_us[0])} clean steps, {named} named")
        if arguments.trials:
            results = trials(mesh, arguments.trials, arguments.times)
            right = sum(result["named"] == result["slowed"] for result in results)
            print(f"{right} of {len(results)} named rightly: {[(r['ratio'], r['steps']) for r in results]}")
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
