"""Who reads and who sends: for any chunks, wants and copies, each wanted byte arrives once and is read once."""

from __future__ import annotations

import itertools
import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from storage import read_plan
from storage.blocks import Distance
from storage.index import ALIGN_BYTES, ITEM_BYTES, Chunk
from storage.read_plan import ROUND_BYTES, Place, Want, boxes_of_range, pieces_of, plan_reads, span_bytes

BLOCK = 64
"""So that small chunks have many blocks."""

sizes_of_boxes = st.lists(st.integers(1, 7), max_size=3).map(tuple)


def elements(sizes: tuple[int, ...], box: read_plan.Box) -> list[int]:
    """Numbers, in row-major order, of a box's elements: by enumeration."""
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    ranges = [range(o, o + n) for o, n in zip(*box, strict=True)]
    return [sum(i * s for i, s in zip(place, strides, strict=True)) for place in itertools.product(*ranges)]


@given(sizes=sizes_of_boxes, data=st.data())
def test_a_range_of_elements_is_cut_into_boxes_in_order(sizes, data):
    begin = data.draw(st.integers(0, math.prod(sizes)))
    end = data.draw(st.integers(begin, math.prod(sizes)))
    boxes = boxes_of_range(sizes, begin, end)
    assert [n for box in boxes for n in elements(sizes, box)] == list(range(begin, end))
    assert len(boxes) <= max(1, 2 * len(sizes) - 1)


@st.composite
def plans(draw):
    places, end = [], [0] * draw(st.integers(1, 3))
    for number in range(draw(st.integers(1, 6))):
        sizes, dtype = draw(sizes_of_boxes), draw(st.sampled_from(["uint8", "float32", "int64"]))
        part, n_bytes = draw(st.integers(0, len(end) - 1)), math.prod(sizes) * ITEM_BYTES[dtype]
        chunk = Chunk(
            fqn=str(number), shape=sizes, dtype=dtype, offsets=(0,) * len(sizes), sizes=sizes, file_offset=end[part],
            n_bytes=n_bytes, blocks=("",) * -(-n_bytes // BLOCK),
        )  # fmt: skip
        end[part] += -(-n_bytes // ALIGN_BYTES) * ALIGN_BYTES
        places.append(Place(part, chunk, BLOCK))
    world = draw(st.integers(1, 4))
    wants = []
    for _ in range(world):
        own = []
        for number in draw(st.lists(st.integers(0, len(places) - 1), max_size=len(places), unique=True)):
            first = [draw(st.integers(0, n - 1)) for n in places[number].chunk.sizes]
            size = [draw(st.integers(1, n - o)) for n, o in zip(places[number].chunk.sizes, first, strict=True)]
            own.append(Want(len(own), number, (tuple(first), tuple(size))))
        wants.append(own)
    distances = st.sampled_from([Distance.MEMORY, Distance.DISK, Distance.PEER, None])
    reach = [draw(st.dictionaries(st.integers(0, len(places) - 1), distances)) for _ in range(world)]
    for number in range(len(places)):  # somebody has each
        if all(own.get(number, Distance.STORE) is None for own in reach):
            del reach[0][number]
    return places, wants, reach


@given(plans())
def test_every_wanted_byte_arrives_once_and_is_read_once(plan):
    places, wants, reach = plan
    orders = plan_reads(places, wants, reach)
    reads: Counter = Counter()
    for rank, own in enumerate(orders):
        arrived: Counter = Counter()
        for segment in own.reads:
            assert segment.n_bytes % ALIGN_BYTES == 0
            for span in segment.spans:
                distance = reach[rank].get(span.chunk, Distance.STORE)
                assert distance is not None, "a rank reads what it cannot reach"
                begin, end = span_bytes(places[span.chunk], span)
                assert span.at + end - begin <= segment.n_bytes
                for block in range(span.begin, span.end):
                    reads[span.chunk, block] += 1
                    wanted = any(w.chunk == span.chunk for w in wants[rank])
                    local = wanted and distance in (Distance.MEMORY, Distance.DISK)
                    reads[span.chunk, block, "local"] += local
        sources = [(segment, wants[rank]) for segment in own.reads]
        for transfer in own.transfers:
            assert transfer in orders[transfer.sender].transfers
            assert transfer.segment in orders[transfer.sender].reads
            if transfer.receiver == rank:
                sources.append((transfer.segment, transfer.wants))
        for segment, needs in sources:
            for span, want, box in pieces_of(places, segment, needs):
                assert wants[rank][want.item] == want
                arrived.update((want.item, n) for n in elements(places[span.chunk].chunk.sizes, box))
        expected = {
            (want.item, n): 1 for want in wants[rank] for n in elements(places[want.chunk].chunk.sizes, want.box)
        }
        assert arrived == expected
    for key, times in reads.items():
        if len(key) == 2:
            assert times == 1 or times == reads[*key, "local"], "what is not on a rank's own node is read once"


@given(plans())
def test_what_lies_on_a_ranks_own_node_is_neither_sent_nor_read_from_afar(plan):
    places, wants, reach = plan
    for order in plan_reads(places, wants, reach):
        for transfer in order.transfers:
            for span in transfer.segment.spans:
                held = reach[transfer.receiver].get(span.chunk, Distance.STORE)
                assert held not in (Distance.MEMORY, Distance.DISK)


def large(n_chunks: int, rows: int) -> list[Place]:
    """Chunks of rows of 4 KiB, in blocks of 1 MiB."""
    return [
        Place(0, Chunk(
            fqn=f"{n:02}", shape=(rows, 1024), dtype="float32", offsets=(0, 0), sizes=(rows, 1024),
            file_offset=n * rows * 4096, n_bytes=rows * 4096, blocks=("",) * (rows * 4096 >> 20),
        ), 1 << 20)
        for n in range(n_chunks)
    ]  # fmt: skip


def test_replicas_share_the_reading_and_rounds_are_bounded():
    rows, n_chunks, world = 4096, 24, 4  # 16 MiB each
    places = large(n_chunks, rows)
    wants = [[Want(n, n, ((0, 0), (rows, 1024))) for n in range(n_chunks)] for _ in range(world)]
    orders = plan_reads(places, wants, [{}] * world)
    loads = [sum(segment.n_bytes for segment in order.reads) for order in orders]
    assert sum(loads) == n_chunks * rows * 4096
    assert max(loads) - min(loads) <= 16 << 20
    for rank, order in enumerate(orders):
        rounds: Counter = Counter()
        for transfer in order.transfers:
            rounds[transfer.round, transfer.sender == rank] += transfer.n_bytes
        assert max(rounds.values()) <= ROUND_BYTES
        assert len({number for number, _ in rounds}) < n_chunks, "rounds carry several segments"


def test_what_replicas_share_is_worked_out_once(monkeypatch):
    calls: Counter = Counter()

    def counted(name):
        actual = getattr(read_plan, name)

        def call(*args):
            calls[name] += 1
            return actual(*args)

        monkeypatch.setattr(read_plan, name, call)

    counted("pieces")
    counted("_extents")
    places, shared = large(7, 4096), 6
    worked = []
    for world in (2, 16):
        calls.clear()
        columns = [Want(n, n, ((0, 0), (4096, 1000))) for n in range(shared)]
        # A chunk that one rank alone wants, as its random state, makes its list differ from the others.
        wants = [columns + [Want(shared, shared, ((0, 0), (16, 16)))] * (rank == 0) for rank in range(world)]
        orders = plan_reads(places, wants, [{}] * world)
        assert sum(transfer.receiver == 1 for transfer in orders[1].transfers) + len(orders[1].reads) == shared
        worked.append(dict(calls))
    assert worked[0] == worked[1] and all(worked[0].values()), worked
