"""What decides the bits of a result besides the configuration: deterministic kernels, and the numeric class.

Two runs give equal bits when their `WorkerConfig` and their numeric class are equal.

``python -P -m trainer.numeric`` reads a `WorkerConfig` as JSON from its standard input and prints one line of JSON: the
numeric class that a worker of this node has, and the node's CUDA devices.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from typing import Any

import torch

from trainer.contract import WorkerConfig, build

# Read by the libraries when they first start up, so set before the first CUDA or NCCL call. NCCL chooses algorithm and
# protocol by size and topology unless told; each sums in another order. The workspace size is the one that
# torch.use_deterministic_algorithms asks for.
DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
}


def set_numerics(config: WorkerConfig) -> None:
    """Fix threads, seed and, if asked, deterministic kernels for this process. Call before the device is touched."""
    # OpenMP's own default is one thread a core, which several workers on a node would all take.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if config.deterministic:
        for name, value in DETERMINISTIC_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        torch.use_deterministic_algorithms(True)
        # Filling each fresh buffer is for finding reads of uninitialised memory, not for equal results.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(config.seed)


def numeric_class(config: WorkerConfig) -> dict[str, str]:
    """The environment's part of the class, as names and values that a checkpoint records and an audit compares."""
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "dtype": config.dtype,
        "deterministic": str(config.deterministic).lower(),
    }
    if config.device == "cuda":
        facts["cuda"] = str(torch.version.cuda)
        facts["gpu"] = torch.cuda.get_device_name()
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return facts


def cuda_devices() -> list[dict[str, Any]]:
    """Name and memory of each CUDA device that this process sees."""
    found = []
    for number in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found.append({"name": name, "total_bytes": total_bytes, "free_bytes": free_bytes})
    return found


def main() -> int:
    config = build(WorkerConfig, json.load(sys.stdin))
    set_numerics(config)
    devices = cuda_devices() if config.device == "cuda" else []
    # A node without devices has the class of its CPU: what it lacks is told by the list.
    seen = config if devices or config.device == "cpu" else dataclasses.replace(config, device="cpu")
    print(json.dumps({"numeric_class": numeric_class(seen), "devices": devices}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
