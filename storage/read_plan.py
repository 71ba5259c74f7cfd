"""Who reads which bytes of a checkpoint, and who sends them to whom: each byte is read once over all ranks. No torch.

A chunk's blocks are cut into segments, runs of blocks that the same ranks want; small chunks that lie side by side
share one. A segment is read by one rank, which wants it if any does, and goes from there to the others that want it.
Only what lies on a rank's own node is read by each rank for itself: to send it would cost more.

Pure. Boxes are (offsets, sizes) in their chunk, in elements.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from storage.blocks import READ_BLOCKS, Distance
from storage.index import ALIGN_BYTES, ITEM_BYTES, Chunk

Box = tuple[tuple[int, ...], tuple[int, ...]]

# A request to a store far away costs as much as megabytes. What a disk gives in pieces of 4 MiB is still in the
# processor's cache when it is digested and copied, and each piece has a buffer whose memory is new to the process.
FAR_BLOCKS, NEAR_BLOCKS = READ_BLOCKS, 4
# What a rank sends, and what it receives, in one round of the exchange: bounds the memory for packing.
ROUND_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Place:
    """A chunk of the checkpoint: in which part's data file it lies, and where. Its number is its place in a list."""

    part: int
    chunk: Chunk
    block_bytes: int


@dataclass(frozen=True)
class Want:
    """A box of a chunk that a rank needs; `item` is its number among the rank's wants."""

    item: int
    chunk: int
    box: Box


@dataclass(frozen=True)
class Span:
    """Blocks [begin, end) of a chunk, `at` bytes from the start of a segment's buffer."""

    chunk: int
    begin: int
    end: int
    at: int


@dataclass(frozen=True)
class Segment:
    """What is read in one request: spans in the order, and at the distances, of a data file."""

    spans: tuple[Span, ...]
    n_bytes: int
    """Of its buffer, a multiple of ALIGN_BYTES."""


@dataclass(frozen=True)
class Transfer:
    """Of a segment what the receiver wants: for each span the pieces of each of `wants`, end to end in this order."""

    round: int
    sender: int
    receiver: int
    segment: Segment
    wants: tuple[Want, ...]
    n_bytes: int


@dataclass(frozen=True)
class Orders:
    """One rank's share."""

    reads: tuple[Segment, ...]
    transfers: tuple[Transfer, ...]
    """That it sends or receives, by round."""


def boxes_of_range(sizes: tuple[int, ...], begin: int, end: int) -> list[Box]:
    """The boxes that elements [begin, end) make, in row-major order, of an array of these sizes."""
    if begin >= end:
        return []
    if not sizes:
        return [((), ())]
    row, inner = math.prod(sizes[1:]), sizes[1:]
    (first, head), (last, tail) = divmod(begin, row), divmod(end, row)

    def within(index: int, start: int, stop: int) -> list[Box]:
        return [((index, *o), (1, *s)) for o, s in boxes_of_range(inner, start, stop)]

    if first == last:
        return within(first, head, tail)
    boxes = within(first, head, row) if head else []
    first += bool(head)
    if first < last:
        boxes.append(((first, *(0 for _ in inner)), (last - first, *inner)))
    return boxes + within(last, 0, tail)


def pieces(chunk: Chunk, begin: int, end: int, box: Box) -> list[Box]:
    """The boxes of which `box` and bytes [begin, end) of a chunk have the elements in common."""
    item = ITEM_BYTES[chunk.dtype]
    assert begin % item == 0 and end % item == 0, (begin, end, chunk)
    found = []
    for offsets, sizes in boxes_of_range(chunk.sizes, begin // item, end // item):
        first = tuple(map(max, offsets, box[0]))
        last = (min(o + s, p + t) for o, s, p, t in zip(offsets, sizes, *box, strict=True))
        common = tuple(stop - start for start, stop in zip(first, last, strict=True))
        if all(n > 0 for n in common):
            found.append((first, common))
    return found


def span_bytes(place: Place, span: Span) -> tuple[int, int]:
    """The bytes [begin, end) of its chunk that a span holds."""
    return span.begin * place.block_bytes, min(span.end * place.block_bytes, place.chunk.n_bytes)


def pieces_of(places: Sequence[Place], segment: Segment, wants: Iterable[Want]) -> Iterator[tuple[Span, Want, Box]]:
    """What of a segment these wants need, in the order in which a transfer carries it."""
    by_chunk = wants_by_chunk(wants)
    for span in segment.spans:
        place = places[span.chunk]
        for want in by_chunk[span.chunk]:
            for box in pieces(place.chunk, *span_bytes(place, span), want.box):
                yield span, want, box


def carried_bytes(place: Place, box: Box) -> int:
    """What a piece takes up in a transfer: its elements, and room so that the next one's lie on their size."""
    n_bytes = math.prod(box[1]) * ITEM_BYTES[place.chunk.dtype]
    return -(-n_bytes // max(ITEM_BYTES.values())) * max(ITEM_BYTES.values())


def wants_by_chunk(wants: Iterable[Want]) -> dict[int, list[Want]]:
    by_chunk: dict[int, list[Want]] = defaultdict(list)
    for want in wants:
        by_chunk[want.chunk].append(want)
    return by_chunk


def wants_of(by_chunk: Mapping[int, Sequence[Want]], segment: Segment) -> tuple[Want, ...]:
    """Those of a rank's wants that concern a segment's chunks."""
    chunks = dict.fromkeys(span.chunk for span in segment.spans)
    return tuple(want for chunk in chunks for want in by_chunk.get(chunk, ()))


def plan_reads(
    places: Sequence[Place],
    wants: Sequence[Sequence[Want]],
    reach: Sequence[Mapping[int, Distance | None]],
    longest: int = FAR_BLOCKS,
) -> list[Orders]:
    """Each rank's orders. The same for the same arguments.

    Args:
        places: all chunks of the checkpoint.
        wants: of each rank.
        reach: for each rank, how far its nearest copy of a chunk is (None: it has none), where it is not the store.
        longest: blocks in a segment at most.
    """
    reads: list[list[Segment]] = [[] for _ in wants]
    load = [0] * len(wants)
    sent: list[tuple[Segment, list[tuple[int, int]]]] = []
    wanted = [wants_by_chunk(own) for own in wants]
    kinds = _kinds(wanted)
    # Those that fewest ranks want leave least choice.
    segments = _segments(places, _wanters(places, wanted, kinds), reach, longest)
    for segment, wanters, told in sorted(segments, key=lambda entry: len(entry[1])):
        readers = [rank for rank in wanters if told.get(rank) in (Distance.MEMORY, Distance.DISK)]
        far = [rank for rank in wanters if told.get(rank) not in (Distance.MEMORY, Distance.DISK)]
        if not readers:
            readers = [_reader(wanters, told, load)]
        for rank in readers:
            reads[rank].append(segment)
            load[rank] += segment.n_bytes
        pairs = [(readers[i % len(readers)], rank) for i, rank in enumerate(far)]
        sent.append((segment, [(sender, receiver) for sender, receiver in pairs if sender != receiver]))
    transfers = _rounds(places, wanted, kinds, sent)
    return [
        Orders(tuple(sorted(reads[rank], key=lambda s: _position(places, s))), tuple(transfers[rank]))
        for rank in range(len(wants))
    ]


def _position(places: Sequence[Place], segment: Segment) -> tuple[int, int]:
    place = places[segment.spans[0].chunk]
    return place.part, place.chunk.file_offset + segment.spans[0].begin * place.block_bytes


def _reader(wanters: Sequence[int], told: Mapping[int, Distance | None], load: Sequence[int]) -> int:
    """The rank that reads what nobody who wants it has on its own node."""
    for candidates in ({*wanters, *told}, range(len(load))):
        costs: list[tuple[float, int, int]] = []
        for rank in candidates:
            distance = told.get(rank, Distance.STORE)
            if distance is not None:
                # What another rank reads for it comes over the network, as from a peer, but that rank surely lives.
                cost = float(distance) if rank in wanters else max(distance, Distance.DISK) + 0.5
                costs.append((cost, load[rank], rank))
        if costs:
            return min(costs)[2]
    raise AssertionError("a chunk of which no rank has a copy")


def _segments(
    places: Sequence[Place],
    wanters: Mapping[int, Sequence[tuple[int, ...]]],
    reach: Sequence[Mapping[int, Distance | None]],
    longest: int,
) -> list[tuple[Segment, tuple[int, ...], dict[int, Distance | None]]]:
    """All that is wanted, cut into segments: with the ranks that want each, and what was told of its reach by rank."""
    told: dict[int, dict[int, Distance | None]] = defaultdict(dict)
    for rank, own in enumerate(reach):
        for number, distance in own.items():
            told[number][rank] = distance
    groups: list[tuple[list[Span], tuple[int, ...], dict[int, Distance | None]]] = []
    kind: object = None
    start = end = 0
    for number in sorted(wanters, key=lambda n: (places[n].part, places[n].chunk.file_offset)):
        place = places[number]
        for first, last, ranks in _runs(wanters[number], longest):
            begin, stop = (place.chunk.file_offset + n for n in span_bytes(place, Span(number, first, last, 0)))
            this = (place.part, ranks, told.get(number, {}), place.block_bytes)
            beside = groups and this == kind and 0 <= begin - end < ALIGN_BYTES
            if not beside or stop - start > longest * place.block_bytes:
                kind, start = this, begin
                groups.append(([], ranks, told.get(number, {})))
            groups[-1][0].append(Span(number, first, last, begin - start))
            end = stop
    return [(_segment(places, spans), ranks, distances) for spans, ranks, distances in groups]


def _segment(places: Sequence[Place], spans: list[Span]) -> Segment:
    begin, end = span_bytes(places[spans[-1].chunk], spans[-1])
    return Segment(tuple(spans), -(-(spans[-1].at + end - begin) // ALIGN_BYTES) * ALIGN_BYTES)


def _kinds(wanted: Sequence[Mapping[int, Sequence[Want]]]) -> list[dict[int, int]]:
    """By rank and chunk, a number for all that the rank wants of it: replicas have the same, and share what it costs.

    Not for a rank as a whole: some chunks, as those of its random state, no other rank wants.
    """
    numbers: dict[tuple[Want, ...], int] = {}
    return [
        {chunk: numbers.setdefault(tuple(wants), len(numbers)) for chunk, wants in by_chunk.items()}
        for by_chunk in wanted
    ]


def _wanters(
    places: Sequence[Place], wanted: Sequence[Mapping[int, Sequence[Want]]], kinds: Sequence[Mapping[int, int]]
) -> dict[int, list[tuple[int, ...]]]:
    """By chunk and block, the ranks that want some of it, ascending."""
    alike: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, own in enumerate(kinds):
        for chunk, kind in own.items():
            alike[chunk][kind].append(rank)
    return {
        chunk: _ranks_by_block(places[chunk], [(wanted[ranks[0]][chunk], ranks) for ranks in by_kind.values()])
        for chunk, by_kind in alike.items()
    }


def _ranks_by_block(place: Place, alike: Sequence[tuple[Sequence[Want], Sequence[int]]]) -> list[tuple[int, ...]]:
    """For each block of a chunk the ranks that want some of it, from different wants of it and the ranks with each."""
    blocks: list[list[int]] = [[] for _ in place.chunk.blocks]
    for number, (wants, _) in enumerate(alike):
        for want in wants:
            for first, last in _blocks_of(place, want.box):
                for block in range(first, last):
                    if number not in blocks[block][-1:]:
                        blocks[block].append(number)
    ranks = {numbers: tuple(sorted(r for n in numbers for r in alike[n][1])) for numbers in set(map(tuple, blocks))}
    return [ranks[tuple(numbers)] for numbers in blocks]


def _blocks_of(place: Place, box: Box) -> Iterator[tuple[int, int]]:
    """Ranges of the blocks that hold some of a box."""
    if math.prod(box[1]):
        for first, last in _extents(place, place.chunk.sizes, *box, 0):
            yield first // place.block_bytes, -(-last // place.block_bytes)


def _extents(
    place: Place, sizes: tuple[int, ...], offsets: tuple[int, ...], lengths: tuple[int, ...], base: int
) -> Iterator[tuple[int, int]]:
    """Ranges of bytes, from `base` on, that hold a box of an array of `sizes`; each block of a range holds some."""
    item = ITEM_BYTES[place.chunk.dtype]
    strides = [math.prod(sizes[dim + 1 :]) * item for dim in range(len(sizes))]
    # Where rows are no longer than a block, no block lies between two rows of a box.
    if not sizes or lengths[1:] == sizes[1:] or strides[0] <= place.block_bytes:
        first = base + sum(o * s for o, s in zip(offsets, strides, strict=True))
        last = base + sum((o + n - 1) * s for o, n, s in zip(offsets, lengths, strides, strict=True))
        yield first, last + item
        return
    for row in range(offsets[0], offsets[0] + lengths[0]):
        yield from _extents(place, sizes[1:], offsets[1:], lengths[1:], base + row * strides[0])


def _runs(blocks: Sequence[tuple[int, ...]], longest: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Runs [begin, end) of wanted blocks with one set of ranks, none longer than a segment may be."""
    begin = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or blocks[end] != blocks[begin] or end - begin == longest:
            if blocks[begin]:
                yield begin, end, blocks[begin]
            begin = end


def _rounds(
    places: Sequence[Place],
    wanted: Sequence[Mapping[int, Sequence[Want]]],
    kinds: Sequence[Mapping[int, int]],
    sent: Sequence[tuple[Segment, Sequence[tuple[int, int]]]],
) -> list[list[Transfer]]:
    """What each rank sends and receives, in rounds in which no rank has more than ROUND_BYTES either way.

    `sent` pairs each segment with senders and receivers.
    """
    # By rank: the last round in which it sends, or receives, so far, and its bytes in that.
    sends, receives = ([(0, 0)] * len(wanted) for _ in range(2))
    transfers: list[list[Transfer]] = [[] for _ in wanted]
    for segment, pairs in sent:
        chunks = list(dict.fromkeys(span.chunk for span in segment.spans))
        known: dict[tuple[int | None, ...], tuple[tuple[Want, ...], int]] = {}
        for sender, receiver in pairs:
            kind = tuple(map(kinds[receiver].get, chunks))
            if kind not in known:
                needs = wants_of(wanted[receiver], segment)
                known[kind] = needs, _carried_of(places, segment, needs)
            needs, n_bytes = known[kind]
            number = max(_fitting(sends[sender], n_bytes), _fitting(receives[receiver], n_bytes))
            for last, rank in ((sends, sender), (receives, receiver)):
                round_, held = last[rank]
                last[rank] = (number, n_bytes + (held if round_ == number else 0))
            transfer = Transfer(number, sender, receiver, segment, needs, n_bytes)
            transfers[sender].append(transfer)
            transfers[receiver].append(transfer)
    return [sorted(own, key=lambda t: (t.round, t.sender, t.receiver)) for own in transfers]


def _fitting(last: tuple[int, int], n_bytes: int) -> int:
    """The first round in which so many more bytes fit, after a last round with its bytes."""
    return last[0] if last[1] + n_bytes <= ROUND_BYTES else last[0] + 1


def _carried_of(places: Sequence[Place], segment: Segment, wants: Sequence[Want]) -> int:
    """The bytes of a transfer."""
    n_bytes = sum(carried_bytes(places[span.chunk], box) for span, _, box in pieces_of(places, segment, wants))
    assert 0 < n_bytes <= ROUND_BYTES, (n_bytes, segment)
    return n_bytes
