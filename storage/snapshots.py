"""A rank's side of the RAM tier: copy its own shard into the node's shared memory, and fill tensors from there.

Training is blocked for the copy. A thread takes the digests while the next step computes, and the snapshot is complete
once it has; `wait` for it before the ranks' exchange of that step, so that whoever writes step k + 1 knows that all
ranks have step k.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch.distributed.tensor import DTensor

from storage.blocks import BadBlock, Copy, Holder, block_digests, fetch_block
from storage.index import ALIGN_BYTES, BLOCK_BYTES, Chunk, Index
from storage.manifest import ManifestError
from storage.ram import (
    FILES,
    FILES_WITH_COPIES,
    Header,
    SnapshotFile,
    checked_index,
    choose_file,
    file_paths,
    newest_step,
    safe_name,
    snapshot_path,
)
from storage.state import TrainState, check_usable, dtype_name, host_bytes, local_tensor

log = logging.getLogger(__name__)

_Views = tuple[Any, Any, bool]
"""A tensor's memory and its place in a file, both as numpy or both as torch sees them; whether the place is pinned."""

RANK_PREFIX = "rank/"
DIGEST_DEADLINE_S = 600.0
"""For the copy from a device and the digests of one snapshot: 100 GB at 0.2 GB/s, a fiftieth of what a core does."""


class RamTier:
    """The snapshots of one slot. `generation` marks what this rank writes. For the thread that trains."""

    def __init__(
        self, ram_dir: str, run: str, node: str, slot: int, *, generation: int = 0, copies: bool = False
    ) -> None:
        """With `copies`, snapshots are copied to other nodes: two can be pinned, and there is a file more."""
        self._place = (ram_dir, run, node, slot)
        self._generation = generation
        self._n_files = FILES_WITH_COPIES if copies else FILES
        self._files: list[SnapshotFile] = []
        self._pinned: tuple[int, ...] = ()
        self._layout: _Layout | None = None
        self._views: dict[int, list[_Views]] = {}
        """By number of the file."""
        self._views_key: tuple[_Layout, list[Any]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._pending: Future[None] | None = None
        self._device = _Device()

    @property
    def newest(self) -> int:
        """Step of the newest complete snapshot; 0 when there is none."""
        return newest_step(*self._place)

    def pin(self, *steps: int) -> None:
        """Keep the snapshots of these steps, of which there may be two fewer than files, until others are pinned."""
        assert len(steps) <= self._n_files - 2, steps
        self._pinned = steps

    def snapshot(self, state: TrainState, done: Callable[[Exception | None], None] = lambda error: None) -> None:
        """Copy the state into shared memory. The first call allocates all files, later ones nothing.

        On CUDA the copy runs beside what comes next on the device: the live tensors may change after `await_reads`.

        Args:
            done: called from another thread once the snapshot is complete, or with the reason why it is not.

        Raises:
            OSError: the memory file system is full; earlier snapshots stay.
            TimeoutError: see `wait`.
            ValueError: a load into `state` has failed.
        """
        check_usable(state)
        self.wait()
        layout = self._layout_of(state)
        if not self._files or self._files[0].room < layout.room:
            self._device.forget()
            self._files = [SnapshotFile(path, layout.room) for path in file_paths(*self._place)[: self._n_files]]
            self._device.register(self._files, state)
            self._views.clear()
        number = choose_file([f.header() for f in self._files], self._pinned)
        file = self._files[number]
        file.begin()
        with torch.no_grad(), self._device.beside_training():
            for source, target, pinned in self._views_of(state, layout, number):
                if isinstance(source, torch.Tensor):
                    target.copy_(source, non_blocking=pinned)
                else:  # numpy's copy is 1.8 times as fast as one thread of Tensor.copy_ between host buffers
                    np.copyto(target, source)
        self._pending = self._pool.submit(self._complete, file, layout, state.step, done)

    def _views_of(self, state: TrainState, layout: _Layout, number: int) -> list[_Views]:
        """What to copy into file `number`, and where to. The tensors lie where they lay a step ago: found once."""
        sources = [local_tensor(tensor) for tensor in _tensors(state)]
        key = (layout, [(source.data_ptr(), source.stride()) for source in sources])
        if self._views_key != key:
            self._views_key, self._views = key, {}
        if number not in self._views:
            payload = self._files[number].payload(layout.n_bytes)
            places = (payload[c.file_offset : c.file_offset + c.n_bytes] for c in layout.chunks)
            pairs = zip(sources, places, strict=True)
            self._views[number] = [_views(source, place) for source, place in pairs if len(place)]
        return self._views[number]

    def await_reads(self) -> None:
        """Let what this thread does next to the live tensors come after the copy has read them; blocks no CPU."""
        self._device.await_reads()

    def wait(self) -> None:
        """Until the last snapshot is complete, or has failed: then there is one snapshot less, and the log says why.

        Raises:
            TimeoutError: it is not in DIGEST_DEADLINE_S.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.exception(DIGEST_DEADLINE_S)
        if error is not None:
            log.error("a snapshot of slot %d has failed", self._place[3], exc_info=error)

    def close(self, deadline_s: float) -> bool:
        """Let the last snapshot be completed, and let go of the files; whether that was done in time."""
        pending, self._pending = self._pending, None
        done = pending is None or bool(futures.wait([pending], deadline_s).done)
        self._pool.shutdown(wait=done)
        if done:
            self._device.forget()
        return done

    def _complete(
        self, file: SnapshotFile, layout: _Layout, step: int, done: Callable[[Exception | None], None]
    ) -> None:
        try:
            self._digest(file, layout, step)
        except Exception as error:
            done(error)
            raise
        done(None)

    def _digest(self, file: SnapshotFile, layout: _Layout, step: int) -> None:
        self._device.synchronize()
        payload = file.payload(layout.n_bytes).data
        chunks = tuple(
            replace(chunk, blocks=block_digests(payload[chunk.file_offset : chunk.file_offset + chunk.n_bytes]))
            for chunk in layout.chunks
        )
        _, run, node, slot = self._place
        raw = _index(slot, step, self._generation, layout.n_bytes, chunks, node).to_json()
        header = Header(
            run=safe_name(run),
            node=safe_name(node),
            slot=slot,
            origin_slot=slot,
            step=step,
            generation=self._generation,
            payload_bytes=layout.n_bytes,
            index_bytes=len(raw),
            index_digest=xxhash.xxh3_128_hexdigest(raw),
        )
        file.finish(header, raw)

    def restore(
        self,
        step: int,
        state: TrainState,
        holders: Sequence[Holder] = (),
        bad: list[BadBlock] | None = None,
        *,
        generation: int | None = None,
        slots: Sequence[int] = (),
    ) -> None:
        """Fill `state` from the snapshot of `step`, after checking every block.

        What is damaged is fetched from the first of `holders` that has it whole, and mended where it lies. A snapshot
        taken over from a replica fills `tensors` only: its per-rank tensors are the other rank's.

        Args:
            bad: what is found damaged is added here, in this snapshot and at holders.
            generation: that wrote the snapshot; None: the newest that has written this step here.
            slots: the first of these is read of which the node has the snapshot: all have held this rank's shard, in a
                mesh whose slots had other numbers. None of them: this rank's own.

        Raises:
            ManifestError: there is no such snapshot, it is of other tensors, or a block is damaged that nobody else
                has whole. No tensor has changed.
        """
        path = self._found(slots or self._place[3:], step, generation)
        file = SnapshotFile.existing(path)
        header = file.header()
        if header is None or header.step != step or generation not in (None, header.generation):
            raise ManifestError(f"{path}: the snapshot of step {step} was overwritten")
        if header.n_bytes > file.room:
            raise ManifestError(f"snapshot of slot {header.slot}, step {step}: it is cut off")
        payload = file.payload(header.n_bytes)
        index = checked_index(header, payload[header.payload_bytes :].tobytes())
        own = header.origin_slot == self._place[3]
        part = state.without_missing({chunk.fqn for chunk in index.chunks}, self._place[3]) if own else state
        chunks = self._matching(index, header, part)
        bad = [] if bad is None else bad
        for chunk in chunks:
            _check(index, chunk, payload.data, header.node, holders, bad)
        if not own and state.per_rank:
            origin = header.origin_slot
            log.warning("slot %d takes over the shard of slot %d; per-rank values stay", self._place[3], origin)
        targets = _tensors(part) if own else _tensors(part)[: len(part.tensors)]
        with torch.no_grad():
            for tensor, chunk in zip(targets, chunks, strict=True):
                _copy_in(payload[chunk.file_offset : chunk.file_offset + chunk.n_bytes], local_tensor(tensor))
        state.restored(part, step)

    def _found(self, slots: Sequence[int], step: int, generation: int | None) -> Path:
        """The file on this node that holds the snapshot of the first of `slots` of which there is one."""
        ram_dir, run, node, _ = self._place
        paths = (snapshot_path(ram_dir, run, node, slot, step, generation) for slot in slots)
        path = next((path for path in paths if path is not None), None)
        if path is None:
            wrote = "" if generation is None else f" that generation {generation} wrote"
            which = f"{slots[0]}" if len(slots) == 1 else f"{slots[0]} or of {len(slots) - 1} others"
            raise ManifestError(f"no complete snapshot of slot {which}, step {step}{wrote} in {ram_dir}")
        return path

    def _matching(self, index: Index, header: Header, state: TrainState) -> list[Chunk]:
        """The chunks that fill this rank's tensors, in the order of the payload.

        Raises:
            ManifestError: the snapshot holds other tensors.
        """
        own = header.origin_slot == self._place[3]
        wanted = [c for c in self._layout_of(state).chunks if own or not c.fqn.startswith(RANK_PREFIX)]
        chunks = [c for c in index.chunks if own or not c.fqn.startswith(RANK_PREFIX)]
        if [(c.key, c.shape, c.dtype) for c in chunks] != [(c.key, c.shape, c.dtype) for c in wanted]:
            raise ManifestError(f"{index.data}: the snapshot holds other tensors, shapes or shards than this rank has")
        return chunks

    def _layout_of(self, state: TrainState) -> _Layout:
        key = [(name, t.dtype, t.shape, getattr(t, "placements", None)) for name, t in _named(state, self._place[3])]
        if self._layout is None or self._layout.key != key:
            self._layout = _Layout(key, state, self._place[3], self._place[2])
        return self._layout


def _check(
    index: Index, chunk: Chunk, held: memoryview, node: str, holders: Sequence[Holder], bad: list[BadBlock]
) -> None:
    """Check a chunk where it lies in `held`, and mend what is damaged.

    Raises:
        ManifestError: nobody has a block whole.
    """
    for block, expected in enumerate(chunk.blocks):
        begin = chunk.file_offset + block * index.block_bytes
        data = held[begin : min(begin + index.block_bytes, chunk.file_offset + chunk.n_bytes)]
        if xxhash.xxh3_128_hexdigest(data) == expected:
            continue
        mine = BadBlock(
            source=node,
            data=index.data,
            fqn=chunk.fqn,
            offsets=chunk.offsets,
            block=block,
            problem="is damaged (its xxh3_128 does not match)",
        )
        bad.append(mine)
        try:
            fetch_block(chunk, block, data, holders, bad)
        except ManifestError as error:
            raise ManifestError(f"{mine}; {error}") from error
        log.error("%s; mended from another copy", mine)


def tensors_of(copy: Copy) -> Iterator[tuple[str, torch.Tensor]]:
    """What a snapshot holds, in the order of names: the writer's part of each tensor, and its per-rank ones under
    RANK_PREFIX. Each is read when it is asked for, and not checked.

    Raises:
        SourceError: the snapshot was overwritten.
    """
    for chunk in sorted(copy.index.chunks, key=lambda chunk: chunk.fqn):
        tensor = torch.empty(chunk.sizes, dtype=getattr(torch, chunk.dtype))
        if chunk.n_bytes:
            copy.source.read(copy.index, chunk.file_offset, host_bytes(tensor).data)
        yield chunk.fqn, tensor


class _Layout:
    """Where each tensor lies in a payload. Computed once a shape of state: the boxes of DTensors are slow to find."""

    def __init__(self, key: list[Any], state: TrainState, slot: int, node: str) -> None:
        self.key = key
        self.chunks: list[Chunk] = []
        """Without digests."""
        end = 0
        for name, tensor in _named(state, slot):
            local = local_tensor(tensor)
            n_bytes = local.numel() * local.element_size()
            self.chunks.append(
                Chunk(
                    fqn=name,
                    shape=tuple(tensor.shape),
                    dtype=dtype_name(tensor.dtype),
                    offsets=_offsets(tensor),
                    sizes=tuple(local.shape),
                    file_offset=end,
                    n_bytes=n_bytes,
                    blocks=(),
                )
            )
            end += -(-n_bytes // ALIGN_BYTES) * ALIGN_BYTES
        self.n_bytes = end
        """Of the payload."""
        digest = xxhash.xxh3_128_hexdigest(b"")
        longest = tuple(replace(c, blocks=(digest,) * -(-c.n_bytes // BLOCK_BYTES)) for c in self.chunks)
        index = _index(slot, 2**63, 2**63, end, longest, node).to_json()
        self.room = end + -(-len(index) // ALIGN_BYTES) * ALIGN_BYTES
        """Of payload and index, whatever the step."""


def _index(slot: int, step: int, generation: int, n_bytes: int, chunks: tuple[Chunk, ...], node: str) -> Index:
    return Index(
        rank=slot,
        step=step,
        epoch=0,
        generation=generation,
        data=f"ram/{safe_name(node)}/slot-{slot:05d}/step-{step:08d}",
        data_bytes=n_bytes,
        chunks=chunks,
    )


def _offsets(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where this rank's part begins, as DCP's planners say it."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    (box,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return tuple(box.offsets)


def _named(state: TrainState, slot: int) -> list[tuple[str, torch.Tensor]]:
    """All tensors by name in the order of the payload: global ones first, then per-rank ones."""
    own = [(f"{RANK_PREFIX}{slot:05d}/{name}", tensor) for name, tensor in sorted(state.per_rank.items())]
    return [*sorted(state.tensors.items()), *own]


def _tensors(state: TrainState) -> list[torch.Tensor]:
    return [tensor for _, tensor in _named(state, 0)]


class _Device:
    """The copy from CUDA devices: into pinned memory, on a stream of its own. On CPU nothing."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        self._registered: list[int] = []

    def register(self, files: list[SnapshotFile], state: TrainState) -> None:
        """Pin the files' memory. What cannot be pinned is copied into all the same, while training waits.

        Linux pins files of a memory file system only.
        """
        devices = [t.device for t in _tensors(state) if t.device.type == "cuda"]
        if not devices:
            return
        self._stream = torch.cuda.Stream(devices[0])  # type: ignore[no-untyped-call]
        for file in files:
            memory = file.payload(file.room)
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            error = int(cudart.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
            if error:
                log.warning("%s is not pinned (CUDA error %d): snapshots block training for longer", file.path, error)
                _take_error(devices[0])
            else:
                self._registered.append(memory.ctypes.data)

    def forget(self) -> None:
        """Before the files' memory is let go of."""
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        self._registered = []

    @contextlib.contextmanager
    def beside_training(self) -> Iterator[None]:
        """Copies go to the stream of their own, after what training has ordered until now."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield
        self._copied = self._stream.record_event()

    def await_reads(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def synchronize(self) -> None:
        """Until the copy is complete. From any thread."""
        if self._copied is not None:
            self._copied.synchronize()


def _take_error(device: torch.device) -> None:
    """The error of a CUDA call that has failed is told once more, to whoever launches the next kernel: here, nobody."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


def _views(source: torch.Tensor, place: npt.NDArray[np.uint8]) -> _Views:
    if source.device.type == "cpu" and source.is_contiguous():
        return source.reshape(-1).view(torch.uint8).numpy(), place, False
    target = torch.from_numpy(place).view(source.dtype).view(source.shape)
    return source, target, target.is_pinned()


def _copy_in(source: npt.NDArray[np.uint8], target: torch.Tensor) -> None:
    if len(source):
        target.copy_(torch.from_numpy(source).view(target.dtype).view(target.shape))
