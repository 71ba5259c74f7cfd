"""What a restore on another mesh would read of a checkpoint: arithmetic on its indices, no data is read. No torch.

How a mesh cuts the state is assumed, for the names that Shepherd's trainer gives (trainer/parallel.py; a test holds
this against what its ranks save): `tp` cuts the rows of wq, wk, wv, w1, w3, the embedding and the output head, and the
columns of wo and w2; `dp_shard` cuts the rows of what is left of each tensor; `pp` cuts the layers, as evenly as
possible, the embedding goes with the first stage, the final norm and the head with the last; replicas hold the same.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from storage.index import ITEM_BYTES, Chunk
from storage.read_plan import Box, Place, Want, plan_reads, span_bytes
from storage.windows import PER_RANK, Saved, SavedTensor

_CUT_ROWS = re.compile(r"(attention\.w[qkv]|feed_forward\.w[13]|tok_embeddings|output)\.weight$")
_CUT_COLUMNS = re.compile(r"(attention\.wo|feed_forward\.w2)\.weight$")
_LAYER = re.compile(r"(?:^|/)layers\.(\d+)\.")
_FIRST_STAGE = re.compile(r"(?:^|/)tok_embeddings\.")
_LAST_STAGE = re.compile(r"(?:^|/)(norm|output)\.")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Degrees of a mesh; ranks are numbered row-major over them."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.tp


@dataclass(frozen=True, kw_only=True)
class RankReads:
    """What one rank of the new mesh would read."""

    rank: int
    state_bytes: int
    """Of the state that it holds afterwards."""
    files: dict[str, int]
    """Bytes that it reads by data file, relative to ``run.url``: of whole blocks, each of which one rank reads."""
    received_bytes: int
    """What other ranks read for it and send."""

    @property
    def read_bytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True, kw_only=True)
class ReshardPlan:
    mesh: Mesh
    state_bytes: int
    """Of the state without what is one rank's own."""
    problems: tuple[str, ...]
    """Why the mesh cannot hold the state; empty when it can."""
    ranks: tuple[RankReads, ...]
    per_rank_restored: bool
    """Whether the ranks' own tensors, as random states, are restored: only with as many ranks as have saved them."""

    @property
    def read_bytes(self) -> int:
        return sum(rank.read_bytes for rank in self.ranks)


def plan(saved: Saved, mesh: Mesh) -> ReshardPlan:
    """What each rank of `mesh` would read."""
    tensors = {fqn: tensor for fqn, tensor in saved.tensors.items() if not fqn.startswith(PER_RANK)}
    own = {fqn: tensor for fqn, tensor in saved.tensors.items() if fqn.startswith(PER_RANK)}
    problems = _problems(tensors, mesh)
    same_world = bool(own) and mesh.world_size == len(saved.commit.parts)
    return ReshardPlan(
        mesh=mesh,
        state_bytes=sum(tensor.n_bytes for tensor in tensors.values()),
        problems=problems,
        ranks=() if problems else tuple(_ranks(tensors, own if same_world else {}, mesh)),
        per_rank_restored=same_world,
    )


def boxes(tensors: dict[str, SavedTensor], mesh: Mesh, stage: int, shard: int, tp: int) -> dict[str, Box]:
    """What the rank at these coordinates holds, of every replica alike; boxes may be empty."""
    n_layers = _n_layers(tensors)
    return {
        fqn: _box(fqn, tensor.shape, mesh, shard, tp)
        for fqn, tensor in tensors.items()
        if stage in _stages(fqn, n_layers, mesh.pp)
    }


def _problems(tensors: dict[str, SavedTensor], mesh: Mesh) -> tuple[str, ...]:
    found = []
    n_layers = _n_layers(tensors)
    if mesh.pp > max(n_layers, 1):
        found.append(f"pp = {mesh.pp}: each stage needs a layer; at most {max(n_layers, 1)}")
    for fqn, tensor in tensors.items():
        dim = _tp_dim(fqn, tensor.shape)
        if dim is not None and tensor.shape[dim] % mesh.tp:
            found.append(f"tp = {mesh.tp}: must divide dimension {dim} of {fqn}, which is {tensor.shape[dim]}")
            break  # the moments and the other layers say the same
    return tuple(found)


def _ranks(tensors: dict[str, SavedTensor], own: dict[str, SavedTensor], mesh: Mesh) -> Iterator[RankReads]:
    saved = _Places(tensors | own)
    wants: list[list[Want]] = []
    for stage in range(mesh.pp):
        replica = [
            saved.wants(boxes(tensors, mesh, stage, shard, tp))
            for shard in range(mesh.dp_shard)
            for tp in range(mesh.tp)
        ]
        for _ in range(mesh.dp_replicate):
            for shared in replica:
                prefix = f"{PER_RANK}{len(wants):05d}/"
                mine = {fqn: ((0,) * len(t.shape), t.shape) for fqn, t in own.items() if fqn.startswith(prefix)}
                wants.append(shared + saved.wants(mine))
    orders = plan_reads(saved.places, wants, [{} for _ in wants])
    for rank, (wanted, share) in enumerate(zip(wants, orders, strict=True)):
        files: dict[str, int] = {}
        for segment in share.reads:
            data = saved.files[saved.places[segment.spans[0].chunk].part]
            spans = (span_bytes(saved.places[span.chunk], span) for span in segment.spans)
            files[data] = files.get(data, 0) + sum(end - begin for begin, end in spans)
        yield RankReads(
            rank=rank,
            state_bytes=sum(math.prod(w.box[1]) * ITEM_BYTES[saved.places[w.chunk].chunk.dtype] for w in wanted),
            files=dict(sorted(files.items())),
            received_bytes=sum(transfer.n_bytes for transfer in share.transfers if transfer.receiver == rank),
        )


class _Places:
    """The chunks of a checkpoint, as storage/read_plan.py wants them, and by tensor and first row."""

    def __init__(self, tensors: dict[str, SavedTensor]) -> None:
        self.places: list[Place] = []
        self.files: dict[int, str] = {}
        self._first: dict[str, int] = {}
        self._rows: dict[str, tuple[list[int], int]] = {}
        """Of each chunk its first row; and the most rows of one, which is how far before a row one may begin."""
        for fqn, tensor in tensors.items():
            chunks = [chunk for _, chunk in tensor.parts]
            tallest = max(((chunk.sizes or (1,))[0] for chunk in chunks), default=0)
            self._first[fqn] = len(self.places)
            self._rows[fqn] = [(chunk.offsets or (0,))[0] for chunk in chunks], tallest
            for index, chunk in tensor.parts:
                self.files[index.rank] = index.data
                self.places.append(Place(index.rank, chunk, index.block_bytes))

    def wants(self, held: dict[str, Box]) -> list[Want]:
        """What a rank that is to hold these boxes needs of the chunks."""
        found: list[Want] = []
        for fqn, box in held.items():
            starts, tallest = self._rows[fqn]
            offsets, sizes = box[0] or (0,), box[1] or (1,)
            first = self._first[fqn] + bisect_left(starts, offsets[0] - tallest + 1)
            for number in range(first, self._first[fqn] + bisect_left(starts, offsets[0] + sizes[0])):
                common = _common(box, self.places[number].chunk)
                if common is not None:
                    found.append(Want(len(found), number, common))
        return found


def _common(box: Box, chunk: Chunk) -> Box | None:
    """What a box of a tensor and a chunk have in common, counted from the chunk's first element."""
    first = tuple(map(max, box[0], chunk.offsets))
    last = (min(o + s, p + t) for o, s, p, t in zip(*box, chunk.offsets, chunk.sizes, strict=True))
    sizes = tuple(stop - start for start, stop in zip(first, last, strict=True))
    if not all(n > 0 for n in sizes):
        return None
    return tuple(start - o for start, o in zip(first, chunk.offsets, strict=True)), sizes


def _box(fqn: str, shape: tuple[int, ...], mesh: Mesh, shard: int, tp: int) -> Box:
    offsets, sizes = [0] * len(shape), list(shape)
    dim = _tp_dim(fqn, shape)
    if dim is not None:
        offsets[dim], sizes[dim] = _piece(shape[dim], mesh.tp, tp)
    if shape:
        start, size = _piece(sizes[0], mesh.dp_shard, shard)
        offsets[0], sizes[0] = offsets[0] + start, size
    return tuple(offsets), tuple(sizes)


def _piece(n: int, pieces: int, number: int) -> tuple[int, int]:
    """Start and length of a piece as torch.chunk cuts: all alike but the last ones."""
    each = -(-n // pieces)
    start = min(number * each, n)
    return start, min(each, n - start)


def _tp_dim(fqn: str, shape: tuple[int, ...]) -> int | None:
    if len(shape) != 2:
        return None
    return 0 if _CUT_ROWS.search(fqn) else 1 if _CUT_COLUMNS.search(fqn) else None


def _n_layers(tensors: dict[str, SavedTensor]) -> int:
    return max((int(match.group(1)) + 1 for fqn in tensors if (match := _LAYER.search(fqn))), default=0)


def _stages(fqn: str, n_layers: int, pp: int) -> range:
    """The pipeline stages that hold a tensor: one, or all for a name that says nothing."""
    if match := _LAYER.search(fqn):
        each, over = divmod(n_layers, pp)
        number = int(match.group(1))
        stage = number // (each + 1) if number < over * (each + 1) else over + (number - over * (each + 1)) // each
        return range(stage, stage + 1)
    if _FIRST_STAGE.search(fqn):
        return range(1)
    if _LAST_STAGE.search(fqn):
        return range(pp - 1, pp)
    return range(pp)
