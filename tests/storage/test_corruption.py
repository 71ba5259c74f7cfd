"""Damage of every kind in every tier: all of it is found before a byte reaches a tensor, and never is a state wrong.

Where another copy exists, the restore succeeds from it, bit for bit, and says which one was bad. Otherwise it is
refused with no tensor changed or all of them useless, and the older checkpoint or snapshot serves.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from damage import Damage, Spans
from parallel_pool import run_ranks
from spoilt import spoilt
from states import SENTINEL, same
from tcp_proxy import Proxy, tcp_proxy, unchanged

from storage.blocks import BadBlock, Copy, Distance, SourceError, StoreSource
from storage.commits import create_commit, read_commit, read_index
from storage.durable import CheckpointFailed, load, write_part
from storage.index import Index
from storage.local import LocalTier
from storage.manifest import Commit, ManifestError, RankPart, commit_name
from storage.peer import PeerServer
from storage.ram import HEADER_BYTES, drop_newer, ram_copy, snapshot_path
from storage.restore import load_copies
from storage.snapshots import RamTier
from storage.state import TrainState
from storage.transfer import PeerSource, fetch_snapshot
from storage.urls import locate
from storage.wires import PeerError

pytestmark = pytest.mark.timeout(900)

OLD, NEW = 5, 6
RUN, TOKEN = "run", "a-token"
KINDS = ("bit", "page", "cut", "swap", "stale", "index", "record")
TRIALS = 5
# Of each kind, in each tier at least.
TRIALS_LONG = 300

REFUSALS = (ManifestError, PeerError, SourceError, CheckpointFailed)


@cache
def part_of(step: int, rank: int) -> TrainState:
    """Of two stages, which share an embedding."""
    g = torch.Generator().manual_seed(step)
    tensors = {"model/embed": torch.randn(400, 900, generator=g), "scalar": torch.randn((), generator=g)}
    tensors["model/half"] = torch.randn(33, 5, generator=g).bfloat16()
    own = torch.Generator().manual_seed(1000 * step + rank)
    tensors[f"model/stage{rank}"] = torch.randn(150, 2000, generator=own)
    return TrainState(step, tensors, {"rng": torch.randint(0, 256, (5056,), generator=own).to(torch.uint8)})


@cache
def whole(step: int) -> TrainState:
    return TrainState(step, {**part_of(step, 0).tensors, **part_of(step, 1).tensors}, {})


def blank(state: TrainState) -> TrainState:
    def like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(tensor, SENTINEL) for name, tensor in tensors.items()}

    return TrainState(0, like(state.tensors), like(state.per_rank))


def _save_on_two(url: str, step: int) -> RankPart:
    rank = torch.distributed.get_rank()
    return write_part(url, part_of(step, rank), step=step, epoch=1, generation=1, rank=rank)


@dataclass
class Tiers:
    """The same two states in every tier: on the store, in the memory of nodes a and c, the older one also on b."""

    store: Path
    local: LocalTier
    """A node's disk with all parts."""
    ram: str
    peers: dict[str, str]
    """Addresses by node."""
    proxy: Proxy
    """Before node a."""
    wire_bytes: int = 0
    """That pass it when a snapshot is fetched."""

    def commit(self, step: int) -> Commit:
        return read_commit(str(self.store), step)

    def data(self, step: int, rank: int) -> Path:
        return self.store / f"checkpoints/data/step-{step:08d}-e1-g1/rank-{rank:05d}.bin"

    def snapshot(self, step: int, slot: int, node: str = "a") -> Path:
        path = snapshot_path(self.ram, RUN, node, slot, step)
        assert path is not None
        return path

    def tier(self, slot: int, node: str = "a") -> RamTier:
        return RamTier(self.ram, RUN, node, slot, generation=2)

    def peer(self, node: str, slot: int, step: int = NEW) -> PeerSource:
        return PeerSource(self.peers[node], TOKEN, RUN, node, slot, step)

    def count(self, before: int, piece: bytes) -> bytes:
        self.wire_bytes = before + len(piece)
        return piece

    def fetch(self, node: str, bad: list[BadBlock], others: list[PeerSource], step: int = NEW, to: str = "b") -> None:
        asyncio.run(
            fetch_snapshot(
                self.peers[node], TOKEN, run=RUN, source_node=node, source_slot=0, step=step, ram_dir=self.ram,
                node=to, slot=0, others=others, bad=bad,
            )
        )  # fmt: skip


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiers]:
    store = tmp_path_factory.mktemp("store")
    for step in (OLD, NEW):
        parts = tuple(run_ranks(_save_on_two, 2, tmp_path_factory.mktemp("meet"), str(store), step))
        commit = Commit(run=RUN, step=step, epoch=1, generation=1, mesh={"pp": 2}, parts=parts, versions={})
        create_commit(str(store), commit)
    ram = f"/dev/shm/shepherd-test-{os.getpid()}-{random.randrange(1 << 32):x}"
    try:
        for slot in (0, 1):
            tier = RamTier(ram, RUN, "a", slot, generation=1)
            for step in (OLD, NEW):
                tier.snapshot(part_of(step, slot))
            tier.wait()
        with serving(ram, "a", "c") as peers, tcp_proxy(peers["a"]) as proxy:
            local = LocalTier(str(tmp_path_factory.mktemp("disk") / "run"), keep=2)
            shutil.copytree(store, local.root)
            tiers = Tiers(store, local, ram, {**peers, "a": proxy.address}, proxy)
            tiers.fetch("a", [], [], OLD)
            proxy.passing = tiers.count
            tiers.fetch("a", [], [], NEW, "c")
            proxy.passing = unchanged
            yield tiers
    finally:
        shutil.rmtree(ram, ignore_errors=True)


class serving:
    """Servers of nodes, in a thread; their addresses."""

    def __init__(self, ram: str, *nodes: str) -> None:
        self._servers = {node: PeerServer("127.0.0.1", TOKEN, ram, RUN, node) for node in nodes}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> dict[str, str]:
        self._thread.start()
        return {node: self._await(server.start()) for node, server in self._servers.items()}

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            self._await(server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _await(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


# --- damage -----------------------------------------------------------------------------------------------------------


def damage_store(tiers: Tiers, kind: str, damage: Damage) -> str:
    """What of the newer checkpoint is damaged: the name that the refusal must say."""
    return damage_files(tiers.store, tiers, kind, damage)


def damage_files(root: Path, tiers: Tiers, kind: str, damage: Damage) -> str:
    """The same of a folder with the store's files."""
    rank = damage.rng.randrange(2)
    data = root / tiers.data(NEW, rank).relative_to(tiers.store)
    index = data.with_suffix(".json")
    # Per-rank values are not asked for by another number of ranks.
    spans = spans_of(Index.from_json(index.read_bytes()), 0, per_rank=False)
    if kind == "record":
        record = tiers.store / commit_name(NEW)
        # The last byte is the line's end.
        damage.rng.choice([damage.flip, damage.cut])(record, [(0, record.stat().st_size - 1)])
        return ""
    if kind == "index":
        damage.rng.choice([damage.flip, damage.zero_page, damage.cut])(index, [(0, index.stat().st_size)])
        return index.name
    if kind == "swap":
        suffix = damage.rng.choice([".bin", ".json"])
        damage.swap(*(data.with_name(f"rank-{rank:05d}{suffix}") for rank in (0, 1)))
        return suffix
    if kind == "stale":
        suffixes = damage.rng.choice([[".bin"], [".json"], [".bin", ".json"]])
        for suffix in suffixes:
            damage.stale(data.with_suffix(suffix), tiers.data(OLD, rank).with_suffix(suffix))
        return data.stem
    injure(damage, kind, data, spans)
    return data.name


def damage_snapshot(tiers: Tiers, kind: str, damage: Damage, *, per_rank: bool) -> None:
    """Of slot 0 on node a, the newer one."""
    path, other = (tiers.snapshot(NEW, slot) for slot in (0, 1))
    copy = ram_copy(path)
    begin = HEADER_BYTES + copy.index.data_bytes
    if kind == "record":
        # Of the sequence's bytes, those that say nothing but how often the file was written are left out.
        length = int.from_bytes(path.read_bytes()[16:20], "little")
        damage.flip(path, [(0, 8), (16, 36 + length)])
    elif kind == "index":
        injure(
            damage, damage.rng.choice(["bit", "page", "cut"]), path, [(begin, begin + copy.source.header.index_bytes)]
        )
    elif kind == "swap":
        damage.swap(path, other, damage.rng.choice([0, HEADER_BYTES]))
    elif kind == "stale":
        damage.stale(path, tiers.snapshot(OLD, 0), damage.rng.choice([0, HEADER_BYTES]))
    else:
        injure(damage, kind, path, spans_of(copy.index, HEADER_BYTES, per_rank=per_rank))


def injure(damage: Damage, kind: str, path: Path, spans: Spans) -> None:
    {"bit": damage.flip, "page": damage.zero_page, "cut": damage.cut}[kind](path, spans)


def spans_of(index: Index, begin: int, *, per_rank: bool) -> Spans:
    chunks = [c for c in index.chunks if c.n_bytes and (per_rank or not c.fqn.startswith("rank/"))]
    return [(begin + c.file_offset, begin + c.file_offset + c.n_bytes) for c in chunks]


# --- restores ---------------------------------------------------------------------------------------------------------


def store_alone(tiers: Tiers, kind: str, damage: Damage) -> str:
    name = damage_store(tiers, kind, damage)
    state = blank(whole(NEW))

    def restore() -> list[BadBlock]:
        load(str(tiers.store), tiers.commit(NEW), state)
        return []

    outcome, told = judge(restore, state, whole(NEW))
    assert name in told, told
    return older_serves(outcome, lambda old: load(str(tiers.store), tiers.commit(OLD), old), whole(OLD))


def memory_alone(tiers: Tiers, kind: str, damage: Damage) -> str:
    damage_snapshot(tiers, kind, damage, per_rank=True)
    state = blank(part_of(NEW, 0))
    bad: list[BadBlock] = []

    def restore() -> list[BadBlock]:
        tiers.tier(0).restore(NEW, state, bad=bad)
        return bad

    outcome, _ = judge(restore, state, part_of(NEW, 0))
    return older_serves(outcome, lambda old: tiers.tier(0).restore(OLD, old), part_of(OLD, 0))


def memory_beside_a_peer(tiers: Tiers, kind: str, damage: Damage) -> str:
    """What has lost its header or index is not mended block by block: it is fetched as a whole."""
    damage_snapshot(tiers, kind, damage, per_rank=True)
    state = blank(part_of(NEW, 0))
    bad: list[BadBlock] = []
    peer = tiers.peer("c", 0)

    def restore() -> list[BadBlock]:
        try:
            tiers.tier(0).restore(NEW, state, holders=[peer], bad=bad)
        except ManifestError:
            assert same(state, blank(part_of(NEW, 0)))
            tiers.fetch("c", bad, [])
            tiers.tier(0, "b").restore(NEW, state)
            bad.append(told_of("a"))
        return bad

    try:
        outcome, _ = judge(restore, state, part_of(NEW, 0))
    finally:
        peer.close()
        drop_newer(tiers.ram, RUN, "b", OLD)
    assert outcome == "repaired"
    assert {block.source for block in bad} == {"a"}
    return outcome


def peer_alone(tiers: Tiers, kind: str, damage: Damage) -> str:
    damage_snapshot(tiers, kind, damage, per_rank=True)
    state = blank(part_of(NEW, 0))
    return taken_over(tiers, state, lambda: tiers.fetch("a", [], []))


def peer_beside_another(tiers: Tiers, kind: str, damage: Damage) -> str:
    damage_snapshot(tiers, kind, damage, per_rank=True)
    state = blank(part_of(NEW, 0))
    bad: list[BadBlock] = []
    other = tiers.peer("c", 0)

    def fetch() -> list[BadBlock]:
        try:
            tiers.fetch("a", bad, [other])
        except (PeerError, ManifestError):
            tiers.fetch("c", bad, [])
            bad.append(told_of("a"))
        return bad

    try:
        outcome = taken_over(tiers, state, fetch)
    finally:
        other.close()
    assert outcome == "repaired"
    assert {block.source for block in bad} == {"a"}
    return outcome


def wire_alone(tiers: Tiers, kind: str, damage: Damage) -> str:
    """What is damaged on its way is asked for once more; a connection that says nonsense is an error."""
    at, hits = damage.rng.randrange(tiers.wire_bytes), []

    def passing(before: int, piece: bytes) -> bytes:
        if hits or not before <= at < before + len(piece):
            return piece
        hits.append(at)
        if kind == "cut":
            raise ConnectionResetError
        raw = bytearray(piece)
        end = at - before + 1 if kind == "bit" else len(piece)
        for n in range(at - before, end):
            raw[n] = raw[n] ^ 1 << damage.rng.randrange(8) if kind == "bit" else 255 - raw[n]
        return bytes(raw)

    tiers.proxy.passing = passing
    state = blank(part_of(NEW, 0))

    def fetch() -> list[BadBlock]:
        tiers.fetch("a", [], [])
        return [told_of("a")]

    try:
        outcome = taken_over(tiers, state, fetch)
    finally:
        tiers.proxy.passing = unchanged
    assert hits, "nothing was damaged"
    return outcome


def taken_over(tiers: Tiers, state: TrainState, fetch: Callable[[], list[BadBlock] | None]) -> str:
    """Node b fetches the newer snapshot and restores it."""

    def restore() -> list[BadBlock]:
        bad = fetch()
        tiers.tier(0, "b").restore(NEW, state)
        return bad or []

    try:
        outcome, _ = judge(restore, state, part_of(NEW, 0))
        return older_serves(outcome, lambda old: tiers.tier(0, "b").restore(OLD, old), part_of(OLD, 0))
    finally:
        drop_newer(tiers.ram, RUN, "b", OLD)


def memory_beside_the_store(tiers: Tiers, kind: str, damage: Damage) -> str:
    damage_snapshot(tiers, kind, damage, per_rank=False)
    return from_both(tiers, nearest="a", named="a")


def store_beside_memory(tiers: Tiers, kind: str, damage: Damage) -> str:
    damage_store(tiers, kind, damage)
    return from_both(tiers, nearest="store", named=str(tiers.store))


def from_both(tiers: Tiers, nearest: str, named: str) -> str:
    """Load a state of one rank from what two ranks have left in memory and on the store."""
    left_out: list[BadBlock] = []

    def held(name: str, copy: Callable[[], Copy]) -> list[Copy]:
        try:
            distance = Distance.MEMORY if name == nearest else Distance.STORE
            return [dataclasses.replace(copy(), distance=distance)]
        except (ManifestError, AssertionError, OSError):
            left_out.append(told_of("a" if name == "a" else str(tiers.store)))
            return []

    def stored(rank: int) -> Copy:
        store, commit = locate(str(tiers.store)), tiers.commit(NEW)
        return Copy(read_index(store, commit, commit.parts[rank]), StoreSource(store))

    parts = []
    for rank in (0, 1):
        memory = held("a", lambda rank=rank: ram_copy(tiers.snapshot(NEW, rank)))
        parts.append([*memory, *held("store", lambda rank=rank: stored(rank))])
    state = blank(whole(NEW))
    bad: list[BadBlock] = []

    def restore() -> list[BadBlock]:
        bad.extend([*left_out, *load_copies(parts, state)])
        return bad

    outcome, _ = judge(restore, state, whole(NEW))
    assert outcome == "repaired"
    assert {block.source for block in bad} == {named}
    return outcome


def told_of(source: str) -> BadBlock:
    """Of a copy that is left out as a whole."""
    return BadBlock(source=source, data="", fqn="", offsets=(), block=0, problem="")


def judge(restore: Callable[[], list[BadBlock]], state: TrainState, expected: TrainState) -> tuple[str, str]:
    """What came of a restore: ``repaired`` or ``refused``, and what it said."""
    before = blank(expected)
    refusal = None
    try:
        bad = restore()
    except REFUSALS as error:
        refusal = error
    if refusal is not None:
        assert same(state, before) or spoilt(state), f"a tensor has changed: {refusal}"
        return "refused", str(refusal)
    assert same(state, expected), "WRONG: another state was restored, and nothing said so"
    assert bad, "the damage was not found"
    return "repaired", ""


def older_serves(outcome: str, restore: Callable[[TrainState], None], expected: TrainState) -> str:
    if outcome == "repaired":
        return outcome
    state = blank(expected)
    restore(state)
    assert same(state, expected), "WRONG: the older state"
    return "older served"


def disk_beside_the_store(tiers: Tiers, kind: str, damage: Damage) -> str:
    """A part on the node's disk whose index is not the store's is not used, which is no damage that load tells."""
    root = Path(tiers.local.root)
    commit = tiers.commit(NEW)
    whole_ones = [tiers.local.copy(part.index) for part in commit.parts]
    damage_files(root, tiers, kind, damage)
    unused = [tiers.local.copy(part.index) for part in commit.parts] != whole_ones
    state = blank(whole(NEW))

    def restore() -> list[BadBlock]:
        bad = load(str(tiers.store), commit, state, local=tiers.local)
        return bad or ([told_of(tiers.local.root)] if unused else [])

    outcome, _ = judge(restore, state, whole(NEW))
    assert outcome == "repaired"
    return outcome


# By tier, which is damaged, and what stands beside it.
PLACES: dict[tuple[str, str], Callable[[Tiers, str, Damage], str]] = {
    ("own memory", "alone"): memory_alone,
    ("own memory", "beside a peer's"): memory_beside_a_peer,
    ("own memory", "beside the store"): memory_beside_the_store,
    ("peer's memory", "alone"): peer_alone,
    ("peer's memory", "beside another's"): peer_beside_another,
    ("wire", "alone"): wire_alone,
    ("node's disk", "beside the store"): disk_beside_the_store,
    ("store", "alone"): store_alone,
    ("store", "beside memory"): store_beside_memory,
}
N_PLACES = Counter(tier for tier, _ in PLACES)
# A node's disk has no records; what passes a wire has no other file to be swapped with.
KINDS_OF = {"node's disk": KINDS[:-1], "wire": KINDS[:3]}
CASES = [(*place, kind) for place in PLACES for kind in KINDS_OF.get(place[0], KINDS)]


@pytest.mark.parametrize(("tier", "beside", "kind"), CASES)
def test_damage_is_found(tiers, tally, tier, beside, kind):
    trials(tiers, tally, tier, beside, kind, range(TRIALS))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("tier", "beside", "kind"), CASES)
def test_damage_is_found_in_many_trials(tiers, tally, tier, beside, kind):
    n_trials = math.ceil(TRIALS_LONG / N_PLACES[tier])
    trials(tiers, tally, tier, beside, kind, range(TRIALS, TRIALS + n_trials))


def trials(tiers: Tiers, tally: Callable[..., None], tier: str, beside: str, kind: str, seeds: range) -> None:
    """All of them, also after a wrong one, so that the table says how many are."""
    wrong = []
    for seed in seeds:
        damage = Damage(random.Random(f"{tier}/{beside}/{kind}/{seed}"))
        outcome = ""
        try:
            outcome = PLACES[tier, beside](tiers, kind, damage)
        except Exception as error:
            wrong.append(error)
            error.add_note(f"{tier} {beside}, {kind}, seed {seed}")
        finally:
            damage.undo()
        row = {name: int(outcome == name) for name in ("repaired", "older served")}
        row = {"trials": 1, "found": int(bool(outcome)), **row, "wrong": int(not outcome)}
        tally("damage", f"{tier} {beside}: {kind}", **row)
        tally("damage by tier", f"{tier}: {kind}", **row)
    if wrong:
        raise ExceptionGroup(f"{len(wrong)} of {len(seeds)} trials", wrong)
