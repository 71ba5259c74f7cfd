"""What decides the bits of a result besides the configuration: deterministic kernels, and the numeric class.

Two runs give equal bits when their `WorkerConfig` and their numeric class are equal.
"""

from __future__ import annotations

import os
import platform

import torch

from trainer.contract import WorkerConfig

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
