"""What a snapshot of a GPU's state costs a training step, ours and others', in one run.

    python benchmarks/cuda_snapshots.py [--size BYTES] [--compute-ms MS] [--rounds N] [--folder PATH] [--json PATH]

One process holds a state on the first GPU. A step is matrix products for some time, then a change of every tensor in
place, as an optimizer makes it. Whatever is compared takes turns, step by step: no snapshot; ours into shared memory
(pinned, on a stream of its own, digests taken beside the next step); a plain copy into pinned memory that is waited
for, which is what the connection to the host gives; and torch DCP's `async_save` with its stager in the background, as
its documentation advises for CUDA. A step's time is from its first product to the end of its change, and what counts is
how much longer it takes with a snapshot in it. In the end ours is restored into fresh tensors and compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from storage.snapshots import RamTier
from storage.state import TrainState

TENSORS = 64
SETTLE_S = 120.0
MATRIX = 8192
WARM_UP_ROUNDS = 3
"""Ours has three files of snapshots, whose memory the first rounds allocate."""

MayChange = Callable[[], object]


class Ours:
    def __init__(self, tensors: dict[str, Tensor], folder: Path) -> None:
        (folder / "ram").mkdir()
        self.tier = RamTier(str(folder / "ram"), "speed", "node", 0, generation=1)
        self.state = TrainState(0, tensors, {})

    def take(self, step: int) -> MayChange:
        self.state.step = step
        self.tier.snapshot(self.state)
        return self.tier.await_reads

    def settle(self) -> None:
        self.tier.wait()


class PinnedCopy:
    def __init__(self, tensors: dict[str, Tensor], folder: Path) -> None:
        self._pairs = [(torch.empty(t.shape, dtype=t.dtype, pin_memory=True), t) for t in tensors.values()]

    def take(self, step: int) -> MayChange:
        for target, source in self._pairs:
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return lambda: None

    def settle(self) -> None:
        pass


class DcpStager:
    """Each save has a stager of its own: torch 2.11's DefaultStager serves one (`_stage` closes it), 2.13's many."""

    def __init__(self, tensors: dict[str, Tensor], folder: Path) -> None:
        self._tensors, self._folder = dict(tensors), folder

    def take(self, step: int) -> MayChange:
        self._path = self._folder / f"dcp-{step}"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=True, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=True
            )
        )
        response = dcp.async_save(
            self._tensors,
            storage_writer=FileSystemWriter(str(self._path)),
            async_stager=self._stager,
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
        )
        assert isinstance(response, AsyncSaveResponse)
        self._upload: Any = response.upload_completion
        return lambda: response.staging_completion.result(SETTLE_S)

    def settle(self) -> None:
        self._upload.result(SETTLE_S)
        self._stager.close()
        shutil.rmtree(self._path)


class Nothing:
    def __init__(self, tensors: dict[str, Tensor], folder: Path) -> None:
        pass

    def take(self, step: int) -> MayChange:
        return lambda: None

    def settle(self) -> None:
        pass


CONTESTANTS: dict[str, Any] = {
    "no snapshot": Nothing,
    "ours": Ours,
    "pinned copy, waited for": PinnedCopy,
    "torch DCP async_save": DcpStager,
}


def products_for(milliseconds: float) -> Callable[[], None]:
    """Matrix products that take about so long."""
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in "ab")

    def products(count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    products(20)
    count = max(1, round(milliseconds / 1000 / (products(50) / 50)))

    def compute() -> None:
        for _ in range(count):
            torch.mm(a, b)

    return compute


def step_of(contestant: Any, tensors: dict[str, Tensor], step: int, compute: Callable[[], None]) -> dict[str, float]:
    """One step that begins with a snapshot of the state of the step before; seconds."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    may_change = contestant.take(step)
    called = time.perf_counter()
    compute()
    may_change()
    for tensor in tensors.values():
        tensor.mul_(1.0001).add_(0.25)
    torch.cuda.synchronize()
    ended = time.perf_counter()
    contestant.settle()
    return {"call": called - began, "step": ended - began, "complete": time.perf_counter() - began}


def restores(ours: Ours, tensors: dict[str, Tensor]) -> float:
    """The seconds of a restore into fresh tensors, whose bits are those of the state at the last snapshot."""
    ours.take(10**6)()
    ours.settle()
    fresh = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    torch.cuda.synchronize()
    began = time.perf_counter()
    ours.tier.restore(10**6, TrainState(0, fresh, {}))
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    assert all(torch.equal(fresh[name].view(torch.int32), tensors[name].view(torch.int32)) for name in tensors)
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4 * 10**9, metavar="BYTES")
    parser.add_argument("--compute-ms", type=float, default=300.0, metavar="MS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    rows = options.size // (4 * TENSORS * 4096)
    tensors = {f"layer.{n:02d}": torch.randn(rows, 4096, device="cuda") for n in range(TENSORS)}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    compute = products_for(options.compute_ms)
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        contestants = {name: kind(tensors, Path(folder)) for name, kind in CONTESTANTS.items()}
        for number in range(WARM_UP_ROUNDS + options.rounds):
            print(f"round {number + 1} of {WARM_UP_ROUNDS + options.rounds}", file=sys.stderr)
            for name, contestant in contestants.items():
                took = step_of(contestant, tensors, number + 1, compute)
                if number >= WARM_UP_ROUNDS:
                    seen[name].append(took)
        restore_s = restores(contestants["ours"], tensors)

    def median(name: str, what: str) -> float:
        return statistics.median(took[what] for took in seen[name])

    untouched = median("no snapshot", "step")
    table = Table("", "call ms", "step ms", "longer ms", "complete ms", "GB/s")
    for name in CONTESTANTS:
        call, step, complete = (median(name, what) for what in ("call", "step", "complete"))
        rate = "" if name == "no snapshot" else f"{size / complete / 1e9:.1f}"
        table.add_row(name, *(f"{1000 * s:.1f}" for s in (call, step, step - untouched, complete)), rate)
    console = Console()
    console.print(f"{torch.cuda.get_device_name()}, {size / 1e9:.1f} GB of float32, {options.rounds} rounds, medians")
    console.print(table)
    rate = f"{size / restore_s / 1e9:.1f} GB/s"
    console.print(f"restore of ours into tensors of the GPU, digests checked: {restore_s:.2f} s, {rate}")
    if options.json:
        machine = {
            "gpu": torch.cuda.get_device_name(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        result = {"machine": machine, "size_bytes": size, "seconds": seen, "restore_s": restore_s}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
