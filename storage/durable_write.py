"""Writes a rank's part of a durable checkpoint: its data file, digested block by block, and its index."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import xxhash
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.planner import SavePlanner as DcpSavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from storage import direct, s3
from storage.blocks import block_digests
from storage.index import ALIGN_BYTES, BLOCK_BYTES, ITEM_BYTES, Chunk, Index
from storage.local import LocalTier
from storage.manifest import WRITE_DEADLINE_S, ManifestError, RankPart, data_name, index_name
from storage.save_plan import SavePlanner, described, different_content
from storage.state import dtype_name
from storage.threads import in_threads
from storage.urls import (
    Store,
    StoreError,
    drop_scratch,
    locate,
    make_folder,
    make_scratch,
    portable_errors,
    scratch_folder,
    sync_folder,
    upload,
)

log = logging.getLogger(__name__)

DISCARD_DEADLINE_S = 60.0
"""To remove a part that nobody will commit; what is left then, `commits.prune` finds."""
ABANDONED_S = 0.5
"""For a store that is at work when a save is abandoned, before it is left to itself: seconds count for who abandons."""
LOOK_S = 0.05
"""Between two looks whether that has come."""


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
            abandoned: once it is set, what is being written fails within a second, whatever the store does.
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
        """Whether a store that was not waited for still has not answered: till then it uses state, files and names."""
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
        """On the coordinator: check that ranks which hold the same box hold the same content.

        It does not end the checkpoint: the controller's commit record does.
        """
        seen: dict[MetadataIndex, tuple[int, str]] = {}
        for rank, own in enumerate(results):
            for result in own:
                holder, digest = seen.setdefault(result.index, (rank, result.storage_data))
                if digest != result.storage_data:
                    raise different_content(result.index, holder, rank)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def write_data(self, plan: SavePlan, planner: DcpSavePlanner) -> Future[list[WriteResult]]:
        assert isinstance(planner, SavePlanner)
        digests: dict[MetadataIndex, str] = {}

        def digest_others() -> None:
            """Of what another rank writes. One thread is faster than the disk."""
            written = {item.index for item in plan.items}
            for item in planner.held:
                if item.index in plan.planner_data - written:
                    self._check_wanted()
                    digests[item.index] = _digest(block_digests(planner.content(item)))

        def work() -> None:
            content = _Content(plan, planner, self._identity, self._check_wanted)
            works: tuple[Callable[[], None], ...] = (partial(self._write, content), digest_others)
            try:
                in_threads(lambda each: each(), works, len(works))
            finally:
                if self._given_up and self._began:
                    self._remove()
            if not self._given_up:
                digests.update((box, digest) for box, digest in content.digests() if box in plan.planner_data)
                self.part = content.part()

        with portable_errors():
            self._within(WRITE_DEADLINE_S, work)
            planner.check()
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(box, 0, digest) for box, digest in digests.items()])
        return done

    def _within(self, deadline_s: float, work: Callable[[], None]) -> None:
        """Do `work` in a thread of its own, which cannot be ended when the store hangs.

        Raises:
            StoreError: it was not done by the deadline, or is wanted no more; it may still be going on (see `linger`).
        """
        errors: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as e:
                errors.append(e)

        self._at_work = threading.Thread(target=run, name="store", daemon=True)
        self._at_work.start()
        deadline = time.monotonic() + deadline_s
        while self._at_work.is_alive() and time.monotonic() < deadline and not self._abandoned.is_set():
            self._at_work.join(LOOK_S)
        if self._abandoned.is_set():
            self._at_work.join(ABANDONED_S)
        if self._at_work.is_alive():
            self._given_up = True
            if self._abandoned.is_set():
                raise StoreError(f"the save was abandoned while {self._url} was at work")
            raise StoreError(f"{self._url} has not answered for {deadline_s:g} s")
        if errors:
            raise errors[0]

    def _check_wanted(self) -> None:
        """Raises StoreError when nobody wants it any more."""
        if self._abandoned.is_set():
            raise StoreError("the save was abandoned")

    def _write(self, content: _Content) -> None:
        store, kept = locate(self._url), self._keep_local(content)
        path = store.path(content.data)
        if store.local:
            make_folder(os.path.dirname(path))
            Path(path).touch(exist_ok=False)
            self._began = True
            self._write_files(Path(path), content)
            sync_folder(os.path.dirname(path))
        elif s3.exists(store.fs, path) if s3.is_s3(store.fs) else store.fs.exists(path):
            raise FileExistsError(f"{content.data} exists: a generation saves a step once")
        else:
            self._began = True
            self._upload(store, content, kept)

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
        path, names = self._local.path(content.data), (content.data, content.index)
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
        if s3.is_s3(store.fs):
            content.look_at_all()
            looks = (self._check_wanted, content.look_at_all)
            s3.upload(store.fs, store.path(content.data), content.pieces, content.size, *looks)
        elif kept is not None:
            upload(store, str(kept), content.data)
        else:
            scratch = scratch_folder(self._url, self._identity["rank"])
            drop_scratch(scratch)  # of a save that was killed
            folder = scratch / f"step-{self.step:08d}"
            make_scratch(folder)
            try:
                self._write_files(folder / "part.bin", content)
                upload(store, str(folder / "part.bin"), content.data)
            finally:
                drop_scratch(folder)
        store.fs.pipe_file(store.path(content.index), content.raw_index)

    def _write_files(self, path: Path, content: _Content) -> None:
        """Write and sync the data file at `path`, empty or new, and the index beside it, which may not exist."""
        path.touch()
        direct.write(path, content.pieces, content.size, content.look, self._buffers)
        _write_record(path.with_suffix(".json"), content.raw_index)


class _Content:
    """What a data file is to hold, and the digests of its blocks as they become known."""

    def __init__(
        self, plan: SavePlan, planner: SavePlanner, identity: dict[str, int], check_wanted: Callable[[], None]
    ) -> None:
        self.pieces: list[tuple[int, memoryview]] = []
        """Each one's place in the file and where it lies in memory."""
        self.size = 0
        self.data, self.index = data_name(**identity), index_name(**identity)
        self._identity = identity
        self._check_wanted = check_wanted
        self._items = plan.items
        self._blocks: list[list[str]] = []
        for item in plan.items:
            _check_dtype(item)
            piece = planner.content(item)
            self.pieces.append((self.size, piece))
            self._blocks.append([""] * -(-len(piece) // BLOCK_BYTES))
            self.size += -(-len(piece) // ALIGN_BYTES) * ALIGN_BYTES

    def look(self, number: int, begin: int, memory: memoryview) -> None:
        """Digest a run of a piece, from a block's start on, at the first look; compare at each later one.

        Raises:
            ManifestError: it has changed.
            StoreError: nobody wants it any more.
        """
        self._check_wanted()
        first, digests, blocks = begin // BLOCK_BYTES, block_digests(memory), self._blocks[number]
        last = first + len(digests)
        if any(known and known != new for known, new in zip(blocks[first:last], digests, strict=True)):
            raise ManifestError(f"{self._items[number].index.fqn}: changed in memory while it was written")
        blocks[first:last] = digests

    def look_at_all(self) -> None:
        in_threads(lambda number: self.look(number, 0, self.pieces[number][1]), range(len(self.pieces)), direct.THREADS)

    def digests(self) -> list[tuple[MetadataIndex, str]]:
        """Of each box, once all was looked at."""
        return [(item.index, _digest(blocks)) for item, blocks in zip(self._items, self._blocks, strict=True)]

    @cached_property
    def raw_index(self) -> bytes:
        """The index as it is written, once all was looked at."""
        places = zip(self._items, self.pieces, self._blocks, strict=True)
        chunks = tuple(_chunk(item, at, piece, tuple(blocks)) for item, (at, piece), blocks in places)
        return Index(data=self.data, data_bytes=self.size, chunks=chunks, **self._identity).to_json()

    def part(self) -> RankPart:
        """What the commit record will say of it, once all was looked at."""
        return RankPart(
            rank=self._identity["rank"],
            data=self.data,
            index=self.index,
            data_bytes=self.size,
            index_digest=xxhash.xxh3_128_hexdigest(self.raw_index),
        )


def _digest(blocks: Iterable[str]) -> str:
    """Of a box: digests of its blocks would take the coordinator gigabytes for all ranks."""
    return xxhash.xxh3_128_hexdigest("".join(blocks).encode())


def _write_record(path: Path, raw: bytes) -> None:
    with open(path, "xb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def _check_dtype(item: WriteItem) -> None:
    dtype = dtype_name(described(item).properties.dtype)
    if dtype not in ITEM_BYTES:
        raise ManifestError(f"{item.index.fqn}: dtype {dtype} has no place in the checkpoint format")


def _chunk(item: WriteItem, file_offset: int, piece: memoryview, blocks: tuple[str, ...]) -> Chunk:
    tensor = described(item)
    dtype = dtype_name(tensor.properties.dtype)
    assert all(blocks), item
    assert tensor.chunk.sizes.numel() * ITEM_BYTES[dtype] == len(piece), item
    return Chunk(
        fqn=item.index.fqn,
        shape=tuple(tensor.size),
        dtype=dtype,
        offsets=tuple(tensor.chunk.offsets),
        sizes=tuple(tensor.chunk.sizes),
        file_offset=file_offset,
        n_bytes=len(piece),
        blocks=blocks,
    )
