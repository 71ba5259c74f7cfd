"""One rank of checkpoint_speed.py: a process that does what its standard input asks, one JSON object a line.

    python -m checkpoints.rank RANK WORLD_SIZE SIZE_BYTES

A request names a function of this folder as ``module.function``, and its arguments; the first it gets is this rank.
The answer is what it returns, or ``{"error": ...}``. Needs torch and numpy only: it runs where other libraries live.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

TENSORS, COLUMNS = 64, 1024
REPLICATED_BYTES, PER_RANK_BYTES = 1 << 20, 1 << 16
GROUP_TIMEOUT_S = 120.0

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "fsdp2": ((2,), (Shard(0),)),
    "tp2": ((2,), (Shard(1),)),
    "fsdp4": ((4,), (Shard(0),)),
    "tp4": ((4,), (Shard(1),)),
    "fsdp2-tp2": ((2, 2), (Shard(0), Shard(1))),
    "hsdp2x2": ((2, 2), (Replicate(), Shard(0))),
}
"""Shape of the mesh, and what each of its dimensions does with a matrix."""


class Timed(NamedTuple):
    seconds: float
    read_bytes: int
    """What the process has read by system calls meanwhile, from files whether cached or not; not from sockets."""


@dataclass
class Rank:
    rank: int
    world_size: int
    size_bytes: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Global ones; a name means the same tensor on every rank."""
    per_rank: dict[str, Tensor] = field(default_factory=dict)
    layout: str = ""
    kept: dict[str, Any] = field(default_factory=dict)
    """What the functions keep between requests, by their own names."""
    meshes: dict[str, DeviceMesh] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, Tensor]:
        """All of this rank's tensors under names that no other rank has for something else."""
        return self.tensors | {f"rank/{self.rank}/{name}": tensor for name, tensor in self.per_rank.items()}

    @property
    def local_bytes(self) -> int:
        return sum(view.nbytes for view in map(local, self.named.values()))

    @property
    def global_bytes(self) -> int:
        """Of the global tensors, each once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def barrier(self) -> None:
        if self.world_size > 1:
            distributed.barrier()

    def timed(self, work: Callable[[], object]) -> Timed:
        """What `work` takes on this rank, begun by all ranks at once."""
        self.barrier()
        read, began = read_so_far(), time.perf_counter()
        work()
        return Timed(time.perf_counter() - began, read_so_far() - read)

    def fill(self) -> None:
        """Give every tensor the content that its name stands for."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                local(tensor).copy_(self._expected(name, tensor))
            for number, tensor in enumerate(self.per_rank.values()):
                tensor.copy_(torch.full_like(tensor, 10 * self.rank + number))

    def touch(self) -> None:
        """Change some of each 256 KiB, as a training step changes all: nothing can be known as saved already."""
        for tensor in self.named.values():
            local(tensor).view(-1).view(torch.int32)[:: 1 << 16] += 1

    def clear(self) -> None:
        for tensor in self.named.values():
            local(tensor).zero_()

    def check(self) -> None:
        """What `fill` has written is there."""
        for name, tensor in self.tensors.items():
            expected = self._expected(name, tensor)
            same = torch.equal(local(tensor).view(torch.int32), expected.view(torch.int32))
            assert same, f"{name} is not what was saved"

    def _expected(self, name: str, tensor: Tensor) -> Tensor:
        start = 7919 * list(self.tensors).index(name)
        whole = torch.arange(start, start + tensor.numel(), dtype=torch.int32).view(torch.float32).view(tensor.shape)
        if isinstance(tensor, DTensor):
            for dim, placement in enumerate(tensor.placements):
                if isinstance(placement, Shard):
                    part = tensor.device_mesh.get_local_rank(dim)
                    whole = whole.chunk(tensor.device_mesh.size(dim), placement.dim)[part]
        return whole.contiguous()


def host_views(rank: Rank) -> list[np.ndarray]:
    """The bytes of each of this rank's tensors; they share its memory."""
    return [local(tensor).reshape(-1).view(torch.uint8).numpy() for tensor in rank.named.values()]


def local(tensor: Tensor) -> Tensor:
    """This rank's part; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def read_so_far() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def build(rank: Rank, layout: str) -> dict[str, int]:
    """Make the state anew on the mesh of `layout`; without one, as plain tensors that are this rank's shard alone."""
    rank.tensors, rank.per_rank, rank.layout = {}, {}, layout
    parts = 1 if layout else 2
    rows = rank.size_bytes // parts // (TENSORS * COLUMNS * 4) // 8 * 8
    assert rows, f"{rank.size_bytes} bytes are too few"
    for number in range(TENSORS):
        rank.tensors[f"layers.{number}.weight"] = _matrix(rank, layout, (rows, COLUMNS))
    rank.tensors["norm.weight"] = torch.zeros(REPLICATED_BYTES // 4)
    rank.per_rank = {"rng": torch.zeros(PER_RANK_BYTES, dtype=torch.uint8)}
    rank.fill()
    world_bytes = rank.world_size * sum(tensor.nbytes for tensor in rank.per_rank.values())
    sizes = {"local_bytes": rank.local_bytes, "global_bytes": rank.global_bytes}
    return sizes | {"state_bytes": rank.global_bytes + world_bytes}


def _matrix(rank: Rank, layout: str, shape: tuple[int, int]) -> Tensor:
    if not layout:
        return torch.zeros(shape)
    mesh_shape, placements = LAYOUTS[layout]
    if layout not in rank.meshes:
        rank.meshes[layout] = init_device_mesh("cpu", mesh_shape)
    sizes = list(shape)
    for size, placement in zip(mesh_shape, placements, strict=True):
        if isinstance(placement, Shard):
            sizes[placement.dim] //= size
    return DTensor.from_local(torch.zeros(sizes), rank.meshes[layout], placements, run_check=False)


def snapshot(rank: Rank, contestant: str, folder: str, step: int) -> dict[str, float]:
    """Let ``module.function`` take one snapshot, and wait until nothing of it goes on in the background.

    Returns the seconds of the call, the seconds until the live tensors may change, those of them in which a processor
    worked for this thread, the seconds until it is complete, and the processor seconds of this process for all of that.
    """
    if contestant not in rank.kept:
        rank.kept[contestant] = find(contestant)(rank, folder)
    taker = rank.kept[contestant]
    rank.touch()
    rank.barrier()
    cpu, own, began = time.process_time(), time.thread_time(), time.perf_counter()
    free = taker.take(step)
    called = time.perf_counter()
    free()
    blocked, own = time.perf_counter(), time.thread_time() - own
    taker.settle()
    done, cpu = time.perf_counter(), time.process_time() - cpu
    rank.barrier()
    return {
        "call_s": called - began,
        "blocked_s": blocked - began,
        "blocked_cpu_s": own,
        "complete_s": done - began,
        "cpu_s": cpu,
    }


def find(name: str) -> Callable[..., Any]:
    module, *names = name.split(".")
    return functools.reduce(getattr, names, importlib.import_module(f"checkpoints.{module}"))  # type: ignore[arg-type]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    rank = Rank(*map(int, sys.argv[1:4]))
    torch.set_num_threads(1)
    if rank.world_size > 1:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=GROUP_TIMEOUT_S))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = find(request.pop("do"))(rank, **request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    for taker in rank.kept.values():
        if hasattr(taker, "settle") and hasattr(taker, "close"):
            taker.close()


if __name__ == "__main__":
    # The functions import this module by its name: it must be one and the same.
    sys.modules["checkpoints.rank"] = sys.modules["__main__"]
    main()
