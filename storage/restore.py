"""Fill a state from copies of a checkpoint, wherever they lie: each byte read once over all ranks, and checked.

DCP's planner says which boxes of which chunks each rank needs; storage/read_plan.py shares out who reads them. Each
rank reads its share, every block from the nearest copy that holds it whole, and fills its tensors from what it has
checked. When all ranks have, they send each other what they need. So a load that fails leaves tensors of two states:
they are made useless, see `storage.state.spoil`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from storage import direct
from storage.blocks import BadBlock, Copy, Distance, SourceError, StoreSource, check_blocks, read_chunk, runs
from storage.durable_read import LoadPlanner, PlanReader
from storage.index import ITEM_BYTES, Chunk, ChunkKey, Index, check_tensors
from storage.manifest import ManifestError
from storage.ranks import agree, dcp_errors, gathered, rank_of, size_of
from storage.read_plan import (
    FAR_BLOCKS,
    NEAR_BLOCKS,
    Box,
    Place,
    Segment,
    Span,
    Transfer,
    Want,
    carried_bytes,
    pieces_of,
    span_bytes,
    wants_by_chunk,
    wants_of,
)
from storage.state import RANK_PREFIX, TrainState, copy_tensor, named_tensors, spoil
from storage.threads import in_threads
from storage.urls import portable_errors

# Segments read at once: while some are checked, others are on their way. Requests that wait for the network are more.
FAR_THREADS, NEAR_THREADS = 8, 4

Held = Sequence[tuple[Copy, Chunk]]
"""A chunk's copies within this rank's reach, the nearest first."""


def load_copies(
    parts: Sequence[Sequence[Copy]],
    state: TrainState,
    *,
    per_rank: bool = True,
    group: dist.ProcessGroup | None = None,
) -> list[BadBlock]:
    """Fill `state` in place from copies of what any number of ranks saved on any mesh. Collective.

    No byte reaches a tensor before it is checked. Per-rank tensors are restored when the number of ranks is that of
    parts, and left alone otherwise.

    A load that is refused before it reads leaves `state` as it was. One that fails later spoils it on every rank
    (`storage.state.spoil`): load into it again, or build it anew.

    Args:
        parts: for each rank that saved, the copies of its data file that this rank can read, the cheapest first. The
            last one's index says what the part is; another serves for those chunks in which it holds the same content.
            A part may have no copy here as long as another rank has one.
        per_rank: whether per-rank tensors were saved at all.
        group: of all ranks, able to send tensors of the CPU; its timeout bounds each wait. The default one if None.

    Returns:
        Damage that this rank found, and repaired from other copies.

    Raises:
        StateMismatch: the parts do not hold exactly the tensors that the ranks ask for, each in its shape and dtype.
            `state` is as it was.
        ManifestError: a block is whole in no copy, or the parts do not make one state (`state` is as it was).
        CheckpointFailed: a rank could not read.
    """
    same_world = per_rank and len(parts) == size_of(group)
    indices = _agreed_indices(parts, group)
    places = _places(indices, "" if same_world else RANK_PREFIX)
    held = _held(parts, places)
    far = any(_over_network(copies[0][0]) for copies in held if copies)
    # The first rank's view counts for all.
    reader = PlanReader(places, _reach(held), FAR_BLOCKS if far else NEAR_BLOCKS)
    with dcp_errors():
        rank = rank_of(group) if same_world else None
        part = state.without_missing({place.chunk.fqn for place in places}, rank)
        named = named_tensors(part, rank)
        dcp_load(dict(named), storage_reader=reader, planner=LoadPlanner(), process_group=group)
    # DCP's plan is every rank's; from here on, an error on one is met by all at the next agreement.
    load = _Load(places, held, reader, far, group)
    try:
        error: Exception | None = None
        try:
            with portable_errors():
                load.read()
        except Exception as e:
            error = e
        agree(error, group)
        load.exchange()
        agree(None, group)
    except BaseException:
        spoil(state, named.values())
        raise
    state.restored(part, indices[0].step)
    return load.bad


def _agreed_indices(parts: Sequence[Sequence[Copy]], group: dist.ProcessGroup | None) -> list[Index]:
    """What each part is, the same to all ranks."""
    known = {number: copies[-1].index for number, copies in enumerate(parts) if copies}
    own = {number: _content(index) for number, index in known.items()}
    # Of a checkpoint all ranks know all parts: one digest says so. Each part's would be ranks x parts on every rank.
    whole = xxhash.xxh3_128_hexdigest(json.dumps(sorted(own.items())).encode()) if len(own) == len(parts) else ""
    wholes = set(gathered(whole, group))
    if len(wholes) == 1 and whole:
        return _of_one_step([known[number] for number in range(len(parts))])
    told = gathered(own, group)
    holders: dict[int, int] = {}
    for number in range(len(parts)):
        contents = {entries[number] for entries in told if number in entries}
        if len(contents) != 1:
            raise ManifestError(f"part {number}: ranks know {len(contents)} contents of it, not one")
        holders[number] = min(rank for rank, entries in enumerate(told) if number in entries)
    if any(len(entries) != len(parts) for entries in told):
        mine = {n: index.to_json() for n, index in known.items() if holders[n] == rank_of(group)}
        error: Exception | None = None
        try:
            for entries in gathered(mine, group):
                known.update({n: Index.from_json(raw) for n, raw in entries.items() if n not in known})
        except ManifestError as e:
            error = e
        agree(error, group)
    return _of_one_step([known[number] for number in range(len(parts))])


def _of_one_step(indices: list[Index]) -> list[Index]:
    steps = {index.step for index in indices}
    if len(steps) != 1:
        raise ManifestError(f"the parts are of steps {sorted(steps)}")
    return indices


def _content(index: Index) -> str:
    """A digest of what a data file holds, wherever it lies and in whatever order."""
    chunks = sorted([[*c.key, c.shape, c.dtype, c.blocks] for c in index.chunks], key=lambda c: c[:3])
    return xxhash.xxh3_128_hexdigest(json.dumps([index.step, index.block_bytes, chunks]).encode())


def _places(indices: Sequence[Index], skip_prefix: str) -> list[Place]:
    """All chunks, the same on every rank; of one that several parts hold, the first part's.

    Raises:
        ManifestError: parts hold different content under one name, or not all of a tensor.
    """
    places: dict[ChunkKey, Place] = {}
    for part, index in enumerate(indices):
        for chunk in sorted(index.chunks, key=lambda c: c.key):
            if skip_prefix and chunk.fqn.startswith(skip_prefix):
                continue
            first = places.setdefault(chunk.key, Place(part, chunk, index.block_bytes))
            if (first.chunk.blocks, first.chunk.dtype) != (chunk.blocks, chunk.dtype):
                raise ManifestError(
                    f"{chunk.fqn} at {chunk.offsets}: parts {first.part} and {part} hold different content"
                )
    check_tensors(place.chunk for place in places.values())
    return list(places.values())


def _held(parts: Sequence[Sequence[Copy]], places: Sequence[Place]) -> list[Held]:
    """For each place what this rank can read of it."""
    numbers = {place.chunk.key: number for number, place in enumerate(places)}
    held: list[list[tuple[Copy, Chunk]]] = [[] for _ in places]
    for copies in parts:
        for copy in copies:
            for chunk in copy.index.chunks:
                number = numbers.get(chunk.key)
                if number is not None and _same(places[number], chunk, copy.index):
                    held[number].append((copy, chunk))
    return [sorted(copies, key=lambda pair: pair[0].distance) for copies in held]


def _same(place: Place, chunk: Chunk, index: Index) -> bool:
    known = place.chunk
    return (place.block_bytes, known.shape, known.dtype, known.blocks) == (
        index.block_bytes, chunk.shape, chunk.dtype, chunk.blocks,
    )  # fmt: skip


def _reach(held: Sequence[Held]) -> dict[int, Distance | None]:
    nearest = {number: copies[0][0].distance if copies else None for number, copies in enumerate(held)}
    return {number: distance for number, distance in nearest.items() if distance != Distance.STORE}


class _Load:
    """One rank's share of a load: what it reads and receives, and where that belongs."""

    def __init__(
        self,
        places: Sequence[Place],
        held: Sequence[Held],
        reader: PlanReader,
        far: bool,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.bad: list[BadBlock] = []
        self._threads, self._n_idle = (FAR_THREADS, 0) if far else (NEAR_THREADS, NEAR_THREADS)
        self._places, self._held, self._group = places, held, group
        self._orders, self._targets = reader.orders, reader.targets
        self._wants = wants_by_chunk(reader.wants)
        self._kept: dict[Segment, memoryview] = {}

    def read(self) -> None:
        """Read and check this rank's segments, and fill its tensors from each that is whole.

        What other ranks need is kept for the exchange; the rest passes through a few buffers.

        Raises:
            ManifestError, SourceError: see `read_chunk`.
            OSError: there is no memory.
        """
        rank = rank_of(self._group)
        sent = dict.fromkeys(transfer.segment for transfer in self._orders.transfers if transfer.sender == rank)
        kept = direct.memory(sum(segment.n_bytes for segment in sent))
        for segment in sent:
            self._kept[segment], kept = kept[: segment.n_bytes], kept[segment.n_bytes :]
        buffers = direct.Buffers(max((segment.n_bytes for segment in self._orders.reads), default=0), self._n_idle)

        def work(segment: Segment) -> list[BadBlock]:
            with contextlib.ExitStack() as stack:
                memory = self._kept.get(segment) or stack.enter_context(buffers.borrow())[: segment.n_bytes]
                bad = self._read_segment(segment, memory)
                self._fill_read(segment, memory)
            return bad

        for bad in in_threads(work, self._orders.reads, self._threads):
            self.bad += bad

    def _read_segment(self, segment: Segment, memory: memoryview) -> list[BadBlock]:
        bad: list[BadBlock] = []
        done = self._read_whole(segment, memory)
        for span in segment.spans:
            place, held = self._places[span.chunk], self._held[span.chunk]
            begin, end = span_bytes(place, span)
            into = memory[span.at : span.at + end - begin]
            again: Sequence[int] = range(span.begin, span.end)
            if done is not None:
                found = check_blocks(*held[0], span.begin, span.end, into, max(0, done - span.at))
                again = [damaged.block for damaged in found]
            for first, last in runs(again):
                at, to = (n * place.block_bytes - begin for n in (first, last))
                read_chunk(held, first, last, into[at : min(to, len(into))], bad)
        return bad

    def _read_whole(self, segment: Segment, memory: memoryview) -> int | None:
        """Fill a segment by one request; the bytes that came. None: it has to be asked for chunk by chunk."""
        first = segment.spans[0]
        copy, chunk = self._held[first.chunk][0]
        start = chunk.file_offset + first.begin * copy.index.block_bytes
        for span in segment.spans:
            other, chunk = self._held[span.chunk][0]
            if other is not copy or chunk.file_offset + span.begin * copy.index.block_bytes - start != span.at:
                return None
        # Up to the end of the last page, so that no part of one has to be asked for, unless the file ends before.
        n_bytes = min(segment.n_bytes, copy.index.data_bytes - start)
        try:
            return copy.source.read(copy.index, start, memory[:n_bytes])
        except SourceError:
            return None

    def exchange(self) -> None:
        """Send what other ranks need of this rank's segments, receive what it needs of theirs, and fill its tensors."""
        rank = rank_of(self._group)
        n_bytes_of_round = Counter[int]()
        for transfer in self._orders.transfers:
            n_bytes_of_round[transfer.round] += transfer.n_bytes if transfer.receiver == rank else 0
        room = direct.memory(max(n_bytes_of_round.values(), default=0))
        for _, transfers in groupby(self._orders.transfers, key=lambda transfer: transfer.round):
            works, inbox, arrived = [], room, list[tuple[Transfer, memoryview]]()
            # All that one rank sends another in a round lies side by side: it is one message.
            for (sender, receiver), each in groupby(transfers, key=lambda t: (t.sender, t.receiver)):
                message = list(each)
                if sender == rank:
                    works.append(dist.isend(self._packed(message), group=self._group, group_dst=receiver))
                else:
                    n_bytes = sum(transfer.n_bytes for transfer in message)
                    works.append(dist.irecv(_bytes(inbox[:n_bytes]), group=self._group, group_src=sender))
                    for transfer in message:
                        arrived.append((transfer, inbox[: transfer.n_bytes]))
                        inbox = inbox[transfer.n_bytes :]
            for work in works:
                assert work is not None, "a rank outside of the group"
                work.wait()
            in_threads(lambda entry: self._fill_received(*entry), arrived, self._threads)

    def _packed(self, transfers: Sequence[Transfer]) -> torch.Tensor:
        message = direct.memory(sum(transfer.n_bytes for transfer in transfers))
        at = 0
        for transfer in transfers:
            for span, _, box in pieces_of(self._places, transfer.segment, transfer.wants):
                copy_tensor(self._carried(message, at, span, box), self._piece(self._kept[transfer.segment], span, box))
                at += carried_bytes(self._places[span.chunk], box)
        return _bytes(message)

    def _fill_read(self, segment: Segment, memory: memoryview) -> None:
        for span, want, box in pieces_of(self._places, segment, wants_of(self._wants, segment)):
            copy_tensor(self._target(want, box), self._piece(memory, span, box))

    def _fill_received(self, transfer: Transfer, message: memoryview) -> None:
        at = 0
        for span, want, box in pieces_of(self._places, transfer.segment, transfer.wants):
            copy_tensor(self._target(want, box), self._carried(message, at, span, box))
            at += carried_bytes(self._places[span.chunk], box)

    def _target(self, want: Want, box: Box) -> torch.Tensor:
        """The part of a want's target where a piece belongs."""
        view = self._targets[want.item].view(want.box[1])
        for dim, (first, start, n) in enumerate(zip(box[0], want.box[0], box[1], strict=True)):
            view = view.narrow(dim, first - start, n)
        return view

    def _piece(self, memory: memoryview, span: Span, box: Box) -> torch.Tensor:
        """A piece where it lies in a segment's buffer."""
        place = self._places[span.chunk]
        item, sizes = ITEM_BYTES[place.chunk.dtype], place.chunk.sizes
        strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
        first = sum(o * s for o, s in zip(box[0], strides, strict=True))
        at = span.at + first * item - span.begin * place.block_bytes
        assert at % item == 0, (at, place)
        whole = _bytes(memory).view(getattr(torch, place.chunk.dtype))
        return whole.as_strided(box[1], strides, at // item)

    def _carried(self, message: memoryview, at: int, span: Span, box: Box) -> torch.Tensor:
        """A piece where it lies in a message."""
        chunk = self._places[span.chunk].chunk
        n_bytes = math.prod(box[1]) * ITEM_BYTES[chunk.dtype]
        return _bytes(message[at : at + n_bytes]).view(getattr(torch, chunk.dtype)).view(box[1])


def _over_network(copy: Copy) -> bool:
    return not (copy.distance < Distance.PEER or (isinstance(copy.source, StoreSource) and copy.source.store.local))


def _bytes(memory: memoryview) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)
