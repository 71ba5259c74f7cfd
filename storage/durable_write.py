"""The writing half of a durable checkpoint: DCP's save planner with its blind spots closed, and the file writer."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem
from torch.distributed.checkpoint.planner import SavePlanner as DcpSavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from storage import direct, s3
from storage.blocks import block_digests
from storage.index import ALIGN_BYTES, BLOCK_BYTES, ITEM_BYTES, Chunk, Index, check_tiling
from storage.local import LocalTier
from storage.manifest import WRITE_DEADLINE_S, ManifestError, RankPart, data_name, index_name
from storage.state import dtype_name, host_bytes
from storage.threads import in_threads
from storage.urls import (
    Store,
    StoreError,
    drop_scratch,
    locate,
    make_folder,
    portable_errors,
    scratch_folder,
    sync_folder,
    upload,
)

log = logging.getLogger(__name__)

DISCARD_DEADLINE_S = 60.0
"""To remove a part that nobody will commit; what is left then, `commits.prune` finds."""


class SavePlanner(DefaultSavePlanner):
    """DCP's planner, refusing what it drops in silence: one name for different shapes, dtypes or content."""

    def __init__(self, check: Callable[[], None]) -> None:
        """`check` is called once the content's digests are taken; what it raises fails the save on every rank.

        So what it has found good is what the digests name, and the writer compares with them what it has written.
        """
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.digests: dict[MetadataIndex, tuple[str, ...]] = {}
        self._check = check

    def create_local_plan(self) -> SavePlan:
        with portable_errors():
            plan = super().create_local_plan()
            digests = in_threads(lambda item: block_digests(self.content(item)), plan.items, direct.THREADS)
            self.digests = {item.index: own for item, own in zip(plan.items, digests, strict=True)}
            self._check()
            # To the coordinator goes one digest an item: those of its blocks, of all ranks, would take it gigabytes.
            wholes = {index: xxhash.xxh3_128_hexdigest("".join(own).encode()) for index, own in self.digests.items()}
            return dataclasses.replace(plan, planner_data=wholes)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        _check_replicas(all_plans)
        plans, metadata = super().create_global_plan(
            [dataclasses.replace(plan, planner_data=None) for plan in all_plans]
        )
        for fqn, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
            check_tiling(fqn, tuple(tensor.size), boxes)
        return plans, metadata

    def content(self, item: WriteItem) -> memoryview:
        """The raw bytes of an item's box."""
        tensor = self.resolve_data(item)
        assert isinstance(tensor, torch.Tensor), item
        return host_bytes(tensor).data


def described(item: WriteItem) -> TensorWriteData:
    """Shape, dtype and box of what is to be written."""
    if item.tensor_data is None:
        raise ManifestError(f"{item.index.fqn}: only tensors can be saved")
    return item.tensor_data


def _check_replicas(plans: list[SavePlan]) -> None:
    """Check that ranks which hold the same box of a tensor hold the same content, before DCP keeps one of them."""
    kinds: dict[str, tuple[int, Any, Any]] = {}
    seen: dict[MetadataIndex, tuple[int, Any, str]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            tensor, fqn = described(item), item.index.fqn
            first, *kind = kinds.setdefault(fqn, (rank, tensor.size, tensor.properties.dtype))
            if kind != [tensor.size, tensor.properties.dtype]:
                raise ManifestError(
                    f"{fqn}: rank {first} holds {kind[1]} of shape {tuple(kind[0])}, rank {rank} holds "
                    f"{tensor.properties.dtype} of shape {tuple(tensor.size)}; names must be global"
                )
            holder, sizes, digest = seen.setdefault(
                item.index, (rank, tensor.chunk.sizes, plan.planner_data[item.index])
            )
            if (sizes, digest) != (tensor.chunk.sizes, plan.planner_data[item.index]):
                raise ManifestError(
                    f"{fqn} at {tuple(tensor.chunk.offsets)}: ranks {holder} and {rank} hold different content; "
                    "values that differ between ranks belong into per_rank, stages need global names"
                )


class Writer(StorageWriter):
    """Writes one rank's data file and its index, and then knows its RankPart."""

    def __init__(
        self,
        url: str,
        *,
        step: int,
        epoch: int,
        generation: int,
        rank: int,
        buffers: direct.Buffers | None = None,
        local: LocalTier | None = None,
        abandoned: threading.Event | None = None,
    ) -> None:
        """
        Args:
            buffers: of writers that write one after another, so that only the first allocates.
            local: where the part is to stay on this node's disk, too.
            abandoned: once it is set, what is being written fails soon.
        """
        self.part: RankPart | None = None
        self._buffers = buffers or direct.Buffers()
        self._local = local
        self._abandoned = abandoned or threading.Event()
        self._url = url
        self._identity = {"step": step, "epoch": epoch, "generation": generation, "rank": rank}
        self._began = False
        """Whether there may be files that this writer has made."""
        self._at_work = threading.Thread()
        self._given_up = False

    @property
    def step(self) -> int:
        return self._identity["step"]

    @property
    def hangs(self) -> bool:
        """Whether a store that did not answer in time still has not: till then it uses state, files and their names."""
        return self._at_work.is_alive()

    def linger(self) -> None:
        """Until the store has answered."""
        if self.hangs:
            self._at_work.join()

    def discard(self) -> None:
        """Remove what this writer has written, as far as the store allows: nobody will commit it."""
        if self._began and not self._given_up:
            with contextlib.suppress(Exception):
                self._within(DISCARD_DEADLINE_S, self._remove)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass  # the controller's commit record ends a checkpoint, not DCP's coordinator

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def write_data(self, plan: SavePlan, planner: DcpSavePlanner) -> Future[list[WriteResult]]:
        assert isinstance(planner, SavePlanner)
        with portable_errors():
            self._within(WRITE_DEADLINE_S, lambda: self._write(plan, planner))
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def _within(self, deadline_s: float, work: Callable[[], None]) -> None:
        """Do `work` in a thread of its own, which cannot be ended when the store hangs.

        Raises:
            StoreError: it was not done by the deadline; it may still be going on (see `linger`).
        """
        errors: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as e:
                errors.append(e)

        self._at_work = threading.Thread(target=run, name="store", daemon=True)
        self._at_work.start()
        self._at_work.join(deadline_s)
        if self._at_work.is_alive():
            self._given_up = True
            raise StoreError(f"{self._url} has not answered for {deadline_s:g} s")
        if errors:
            raise errors[0]

    def _write(self, plan: SavePlan, planner: SavePlanner) -> None:
        store, content = locate(self._url), self._content(plan, planner)
        kept = self._keep_local(content)
        path = store.path(content.part.data)
        if store.local:
            make_folder(os.path.dirname(path))
            Path(path).touch(exist_ok=False)
            self._began = True
            self._write_files(Path(path), content)
            sync_folder(os.path.dirname(path))
        elif store.fs.exists(path):
            raise FileExistsError(f"{content.part.data} exists: a generation saves a step once")
        else:
            self._began = True
            self._upload(store, content, kept)
        if self._given_up:
            self._remove()
        else:
            self.part = content.part

    def _remove(self) -> None:
        names = (data_name(**self._identity), index_name(**self._identity))
        if self._local is not None:
            self._local.drop(*names)
        store = locate(self._url)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                store.fs.rm_file(store.path(name))

    def _keep_local(self, content: _Content) -> Path | None:
        """Write the part to the local tier; the data file there. None: there is no tier, or it has no room for it."""
        if self._local is None:
            return None
        path, names = self._local.path(content.part.data), (content.part.data, content.part.index)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._local.prune(self.step)
            self._local.drop(*names)
            self._write_files(path, content)
            return path
        except BaseException as e:
            self._local.drop(*names)
            if not isinstance(e, OSError):
                raise
            log.warning("not kept on this node, the store serves: %s: %s", path, e)
            return None

    def _upload(self, store: Store, content: _Content, kept: Path | None) -> None:
        part = content.part
        if s3.is_s3(store.fs):
            s3.upload(store.fs, store.path(part.data), content.pieces, part.data_bytes, content.check_all)
        elif kept is not None:
            upload(store, str(kept), part.data)
        else:
            scratch = scratch_folder(self._url, part.rank)
            drop_scratch(scratch)  # of a save that was killed
            folder = scratch / f"step-{self.step:08d}"
            folder.mkdir(parents=True, mode=0o700)
            try:
                self._write_files(folder / "part.bin", content)
                upload(store, str(folder / "part.bin"), part.data)
            finally:
                drop_scratch(folder)
        store.fs.pipe_file(store.path(part.index), content.raw)

    def _write_files(self, path: Path, content: _Content) -> None:
        """Write and sync the data file at `path`, empty or new, and the index beside it, which may not exist."""
        path.touch()
        index = partial(_write_record, path.with_suffix(".json"), content.raw)
        data = partial(direct.write, path, content.pieces, content.part.data_bytes, content.check, self._buffers)
        in_threads(lambda write: write(), (index, data), 2)

    def _content(self, plan: SavePlan, planner: SavePlanner) -> _Content:
        chunks: list[Chunk] = []
        pieces: list[tuple[int, memoryview]] = []
        size = 0
        for item in plan.items:
            pieces.append((size, planner.content(item)))
            chunks.append(_chunk(item, size, planner.digests[item.index]))
            assert len(pieces[-1][1]) == chunks[-1].n_bytes, chunks[-1]
            size += -(-chunks[-1].n_bytes // ALIGN_BYTES) * ALIGN_BYTES
        name = data_name(**self._identity)
        index = Index(data=name, data_bytes=size, chunks=tuple(chunks), **self._identity)
        raw = index.to_json()
        part = RankPart(
            rank=self._identity["rank"],
            data=name,
            index=index_name(**self._identity),
            data_bytes=size,
            index_digest=xxhash.xxh3_128_hexdigest(raw),
        )
        return _Content(index, raw, part, pieces, self._abandoned)


@dataclass(frozen=True)
class _Content:
    """What a data file is to hold: its pieces in memory, its index, and what the commit record will say of it."""

    index: Index
    raw: bytes
    """The index as it is written."""
    part: RankPart
    pieces: list[tuple[int, memoryview]]
    abandoned: threading.Event

    def check(self, number: int, begin: int, written: memoryview) -> None:
        """Check what was written of a piece: what was digested before planning may have changed in memory since.

        Raises:
            ManifestError: it has.
            StoreError: nobody wants it any more.
        """
        if self.abandoned.is_set():
            raise StoreError("the save was abandoned")
        chunk, first, digests = self.index.chunks[number], begin // BLOCK_BYTES, block_digests(written)
        if digests != chunk.blocks[first : first + len(digests)]:
            raise ManifestError(f"{chunk.fqn}: changed in memory while it was written")

    def check_all(self) -> None:
        for number, (_, piece) in enumerate(self.pieces):
            self.check(number, 0, piece)


def _write_record(path: Path, raw: bytes) -> None:
    with open(path, "xb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def _chunk(item: WriteItem, file_offset: int, blocks: tuple[str, ...]) -> Chunk:
    tensor = described(item)
    dtype = dtype_name(tensor.properties.dtype)
    if dtype not in ITEM_BYTES:
        raise ManifestError(f"{item.index.fqn}: dtype {dtype} has no place in the checkpoint format")
    return Chunk(
        fqn=item.index.fqn,
        shape=tuple(tensor.size),
        dtype=dtype,
        offsets=tuple(tensor.chunk.offsets),
        sizes=tuple(tensor.chunk.sizes),
        file_offset=file_offset,
        n_bytes=tensor.chunk.sizes.numel() * ITEM_BYTES[dtype],
        blocks=blocks,
    )
