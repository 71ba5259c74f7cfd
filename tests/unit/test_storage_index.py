"""The index of a data file: exact tilings against a count of every element, and refusal of inconsistent indices."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from storage.blocks import block_digests
from storage.index import Chunk, Index, check_tiling
from storage.manifest import ManifestError


@st.composite
def boxes_in_shape(draw):
    """A tensor cut by a grid, then sometimes broken: boxes moved, resized, dropped or doubled."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=3)))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    cells = itertools.product(*[list(itertools.pairwise(c)) for c in cuts])
    boxes = [(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in cells]
    for _ in range(draw(st.integers(0, 2))):
        i = draw(st.integers(0, len(boxes) - 1))
        kind = draw(st.sampled_from(["drop", "double", "shift", "grow"]))
        if kind == "drop" and len(boxes) > 1:
            boxes.pop(i)
        elif kind == "double":
            boxes.append(boxes[i])
        elif shape:
            dim = draw(st.integers(0, len(shape) - 1))
            part = 0 if kind == "shift" else 1
            changed = [list(boxes[i][0]), list(boxes[i][1])]
            changed[part][dim] += draw(st.sampled_from([-1, 1]))
            if changed[1][dim] >= 0:
                boxes[i] = (tuple(changed[0]), tuple(changed[1]))
    return shape, draw(st.permutations(boxes))


@given(boxes_in_shape())
def test_a_tiling_is_accepted_exactly_when_every_element_is_covered_once(case):
    shape, boxes = case
    margin = 2
    counts = np.zeros([n + 2 * margin for n in shape], dtype=int)
    for offsets, sizes in boxes:
        counts[tuple(slice(o + margin, o + margin + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    inside = tuple(slice(margin, margin + n) for n in shape)
    exact = bool((counts[inside] == 1).all()) and counts.sum() == int(np.prod(shape))
    if exact:
        check_tiling("w", shape, boxes)
    else:
        with pytest.raises(ManifestError, match="w:"):
            check_tiling("w", shape, boxes)


@given(st.binary(max_size=100), st.integers(1, 16))
def test_block_digests_name_each_block(data, block_bytes):
    blocks = [data[i : i + block_bytes] for i in range(0, len(data), block_bytes)]
    assert block_digests(memoryview(data), block_bytes) == tuple(xxhash.xxh3_128_hexdigest(block) for block in blocks)


def make_index(**changes) -> Index:
    chunk = Chunk(
        fqn="w", shape=(4, 2), dtype="float32", offsets=(0, 0), sizes=(4, 2), file_offset=0, n_bytes=32, blocks=("b",)
    )
    fields = {"rank": 0, "step": 1, "epoch": 1, "generation": 1, "data": "a.bin", "data_bytes": 4096}
    return Index(**{**fields, "chunks": (chunk,), **changes})


def test_an_index_survives_json():
    assert Index.from_json(make_index().to_json()) == make_index()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "format_version 1.*use Shepherd 0.2"),
        ({"format_version": 3}, "format_version 3.*newer"),
        ({"data_bytes": 16}, "does not lie inside"),
    ],
)
def test_an_inconsistent_index_is_refused(change, message):
    with pytest.raises(ManifestError, match=message):
        Index.from_json(make_index(**change).to_json())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "complex1024", "unknown"),
        ("n_bytes", 31, "31 bytes"),
        ("file_offset", 64, "does not lie inside"),
        ("file_offset", 4096, "does not lie inside"),
        ("sizes", "ab", "not an index"),
        ("blocks", ["b", "c"], "2 digests"),
    ],
)
def test_an_index_with_a_wrong_chunk_is_refused(field, value, message):
    document = json.loads(make_index().to_json())
    document["chunks"][0][field] = value
    with pytest.raises(ManifestError, match=message):
        Index.from_json(json.dumps(document).encode())


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"{}", b"\xff", b'{"format_version": 1}'])
def test_what_is_no_index_is_refused(raw):
    with pytest.raises(ManifestError):
        Index.from_json(raw)
