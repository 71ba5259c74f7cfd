"""The other checkpointers that checkpoint_speed.py runs, each as its own documentation advises for CPU tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from checkpoints.rank import Rank, Timed

SETTLE_S = 300.0


def dcp_save(rank: Rank, folder: str, threads: int) -> Timed:
    writer = FileSystemWriter(folder, thread_count=threads, sync_files=True)
    return rank.timed(lambda: dcp.save(rank.named, storage_writer=writer))


def dcp_load(rank: Rank, folder: str, same_world: bool) -> Timed:
    """What was saved by another number of ranks has other ranks' own tensors: they are not asked for."""
    rank.clear()
    wanted: dict[str, Any] = dict(rank.named if same_world else rank.tensors)
    return rank.timed(lambda: dcp.load(wanted, storage_reader=FileSystemReader(folder)))


def remove(rank: Rank, folder: str) -> None:
    if rank.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    rank.barrier()


class DcpAsync:
    """`async_save` into a folder that is removed afterwards, with one stager for all, so that its memory is reused.

    Pinned memory and copies that do not block need CUDA.
    """

    def __init__(self, rank: Rank, folder: str, kind: AsyncCheckpointerType, *, in_background: bool) -> None:
        self._rank, self._folder, self._kind = rank, folder, kind
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=in_background,
            use_async_staging=in_background,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options)
        self._upload: Any = None

    def take(self, step: int) -> Callable[[], object]:
        self._path = str(Path(self._folder, f"step-{step}"))
        response = dcp.async_save(
            self._rank.named,
            storage_writer=FileSystemWriter(self._path),
            async_stager=self._stager,
            async_checkpointer_type=self._kind,
        )
        if not isinstance(response, AsyncSaveResponse):
            self._upload = response
            return lambda: None
        self._upload = response.upload_completion
        return lambda: response.staging_completion.result(SETTLE_S)

    def settle(self) -> None:
        self._upload.result(SETTLE_S)
        remove(self._rank, self._path)

    def close(self) -> None:
        self._stager.close()


def dcp_thread(rank: Rank, folder: str) -> DcpAsync:
    return DcpAsync(rank, folder, AsyncCheckpointerType.THREAD, in_background=False)


def dcp_stager(rank: Rank, folder: str) -> DcpAsync:
    return DcpAsync(rank, folder, AsyncCheckpointerType.THREAD, in_background=True)


def dcp_process(rank: Rank, folder: str) -> DcpAsync:
    return DcpAsync(rank, folder, AsyncCheckpointerType.PROCESS, in_background=True)


class TorchCheckpointing:
    """Without a resharder, whose metadata ranks exchange as CUDA tensors."""

    def __init__(self, rank: Rank, folder: str) -> None:
        from torch_checkpointing import CheckpointManager, CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        config = CheckpointManager.Config.with_async_save()
        config.save.staging_config = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        self._rank, self._folder, self._manager = rank, folder, config.build()
        self._write: Any = None
        self._manager.prewarm_staging({"model": rank.named})

    def take(self, step: int) -> Callable[[], object]:
        self._path = str(Path(self._folder, f"torch_checkpointing-{step}"))
        self._write = self._manager.save(self._path, {"model": self._rank.named})
        return self._may_change

    def _may_change(self) -> None:
        with self._manager.lock():
            pass

    def settle(self) -> None:
        self._write.result(SETTLE_S)
        remove(self._rank, self._path)

    def close(self) -> None:
        self._manager.close()


class LmResiliency:
    def __init__(self, rank: Rank, folder: str) -> None:
        from lm_resiliency.checkpointing.config import InMemoryCkptConfig
        from lm_resiliency.checkpointing.manager import InMemoryCheckpointManager

        self._manager = InMemoryCheckpointManager(
            InMemoryCkptConfig(
                interval=1, replication_jump=1, disk_flush_interval=0, disk_folder=folder, pin_memory=False
            )
        )
        self._tensors = list(rank.named.values())

    def take(self, step: int) -> Callable[[], object]:
        self._manager.save_tensors(self._tensors, step)
        return lambda: None

    def settle(self) -> None:
        assert self._manager.finalize_replication(), "the snapshot did not reach its peer"

    def close(self) -> None:
        self._manager.close()
