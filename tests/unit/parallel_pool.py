"""Runs a function as the ranks of a small world: processes forked from one server that has imported everything.

Importing torch with FSDP, tensor and pipeline parallelism takes seconds of CPU for each process; a fork takes none.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["trainer.worker", "s3fs"])
# For the slowest of a group to be done with what the others have done.
PEERS_S = 60.0


def run_ranks(
    function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any, timeout_s: float = 240.0
) -> list[Any]:
    """What `function(*arguments)` returns on each rank of a world, in the order of ranks.

    The world is gloo's, and NCCL's beside it where SHEPHERD_TEST_DEVICE is "cuda".

    A rank that raises gives its exception as its result. `folder` must be fresh: the ranks meet in a file there.

    Raises:
        AssertionError: a rank died or did not answer within `timeout_s`.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    processes, pipes = [], []
    for rank in range(world_size):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(
            target=_rank, args=(theirs, str(folder / "store"), rank, world_size, function, arguments), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _collect(pipes, timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join(10)


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        missing = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(missing), timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(missing.values())} did not answer within {timeout_s} s"
        for pipe in ready:
            rank = missing[pipe]
            try:
                results[rank] = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, store: str, rank: int, world_size: int, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    on_cuda = os.environ.get("SHEPHERD_TEST_DEVICE") == "cuda"
    if on_cuda:
        share_one_gpu()
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=distributed.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
    )
    try:
        result = function(*arguments)
    except Exception as error:
        result = error
    pipe.send(result)
    # To leave is to reset connections that peers may still be making; after an error that is what ends their wait.
    if not isinstance(result, Exception):
        pipe.poll(PEERS_S)
    # The file store's destructor and a group that an error has broken can both block the interpreter's shutdown.
    os._exit(0)


def share_one_gpu() -> None:
    """Before this process uses NCCL, which refuses ranks on one GPU unless they seem to be on different machines."""
    os.environ["NCCL_HOSTID"] = str(os.getpid())
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    torch.cuda.set_device(0)
    torch.cuda.init()
