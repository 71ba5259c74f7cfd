"""What checkpoint_speed.py asks of Shepherd's storage, through its public functions."""

from __future__ import annotations

import asyncio
import ctypes
import resource
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import psutil
import xxhash
from torch import distributed

from checkpoints.rank import Rank, Timed, host_views
from storage.checkpointer import Checkpointer
from storage.commits import create_commit, delete_checkpoint, read_commit
from storage.direct import Buffers
from storage.durable import load as load_state
from storage.durable import save_part
from storage.durable_write import Writer
from storage.manifest import Commit, RankPart
from storage.peer import PeerServer
from storage.ram import COPY_FILES
from storage.save_plan import Planned
from storage.snapshots import RamTier
from storage.state import TrainState
from storage.transfer import fetch_snapshot

RUN, TOKEN = "speed", "benchmark"
SETTLE_S = 60.0


def state_of(rank: Rank, step: int = 0) -> TrainState:
    return TrainState(step, rank.tensors, rank.per_rank)


# --- snapshots -------------------------------------------------------------------------------------------------------


class Snapshots:
    def __init__(self, rank: Rank, folder: str) -> None:
        self._state = state_of(rank)
        self._checkpointer = Checkpointer(
            url=folder,
            run=RUN,
            rank=rank.rank,
            world_size=rank.world_size,
            epoch=1,
            generation=1,
            ram_dir=str(Path(folder, "ram")),
            node="node",
        )

    def take(self, step: int) -> Callable[[], object]:
        self._state.step = step
        self._checkpointer.snapshot(self._state)
        return self._checkpointer.await_reads

    def settle(self) -> None:
        _until(lambda: self._checkpointer.newest_snapshot == self._state.step, "the snapshot is complete")


def _until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SETTLE_S
    while not true():
        assert time.monotonic() < deadline, f"not within {SETTLE_S:g} s: {what}"
        time.sleep(0.001)


def allocated(rank: Rank, contestant: str, first_step: int, snapshots: int) -> dict[str, float]:
    """What so many snapshots, after the first ones, add to this process: in pages, in malloc's books, in Python's."""
    taker = rank.kept[contestant]

    def take() -> None:
        for step in range(first_step, first_step + snapshots):
            rank.touch()
            faults = _faults()
            taker.take(step)()
            taker.settle()
            counted.append(_faults() - faults)

    counted: list[int] = []
    rss, malloc = psutil.Process().memory_info().rss, _malloc_bytes()
    take()
    grown, malloc_grown = psutil.Process().memory_info().rss - rss, _malloc_bytes() - malloc
    faults = sum(counted) / snapshots
    first_step += snapshots
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    take()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "faults_a_snapshot": faults,
        "rss_grown_bytes": grown,
        "malloc_grown_bytes": malloc_grown,
        "python_grown_bytes": after - before,
        "python_peak_bytes": peak - before,
        "shard_bytes": rank.local_bytes,
    }


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def _malloc_bytes() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save(rank: Rank, url: str, step: int) -> Timed:
    """Durable when it returns, with its commit record. Buffers and plan are the saves' before, as a Checkpointer's."""
    buffers, planned = rank.kept.setdefault("buffers", Buffers()), rank.kept.setdefault("planned", Planned())

    def work() -> None:
        writer = Writer(url, step=step, epoch=1, generation=1, rank=rank.rank, buffers=buffers)
        part = save_part(writer, state_of(rank, step), rank.rank, planned=planned)
        parts: list[RankPart | None] = [None] * rank.world_size
        distributed.all_gather_object(parts, part)
        if rank.rank == 0:
            create_commit(url, _commit(step, [part for part in parts if part is not None]))

    return rank.timed(work)


def _commit(step: int, parts: list[RankPart]) -> Commit:
    mesh = {"pp": 1, "dp_replicate": 1, "dp_shard": len(parts), "tp": 1}
    return Commit(run=RUN, step=step, epoch=1, generation=1, mesh=mesh, parts=tuple(parts), versions={})


def delete(rank: Rank, url: str, step: int) -> None:
    """The run's folders stay, as they do between a run's saves."""
    if rank.rank == 0:
        delete_checkpoint(url, step)
    rank.barrier()


def load(rank: Rank, url: str, step: int) -> Timed:
    """Into the tensors that are there, verified."""
    rank.clear()
    return rank.timed(lambda: load_state(url, read_commit(url, step), state_of(rank)))


def data_file(rank: Rank, url: str, step: int) -> str:
    """This rank's of a local checkpoint."""
    return str(Path(url, read_commit(url, step).parts[rank.rank].data))


def content(rank: Rank) -> str:
    digest = xxhash.xxh3_128()
    for view in host_views(rank):
        digest.update(view)
    return digest.hexdigest()


# --- peers -----------------------------------------------------------------------------------------------------------


def serve_snapshot(rank: Rank, ram_dir: str) -> str:
    """Take a snapshot of this process's state, step 1, and serve it to peers; the address."""
    tier = RamTier(ram_dir, RUN, "source", 0, generation=1)
    tier.snapshot(state_of(rank, 1))
    _until(lambda: tier.newest == 1, "the snapshot is complete")
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    server = PeerServer("127.0.0.1", TOKEN, ram_dir, RUN, "source")
    rank.kept["server"] = server, tier, loop
    return asyncio.run_coroutine_threadsafe(server.start(), loop).result(SETTLE_S)


def fetch(rank: Rank, address: str, ram_dir: str) -> Timed:
    """A peer's snapshot, into this node's shared memory and verified. As an agent's, its files stay mapped."""
    copy = fetch_snapshot(
        address,
        TOKEN,
        run=RUN,
        source_node="source",
        source_slot=0,
        step=1,
        ram_dir=ram_dir,
        node="target",
        slot=0,
        files=COPY_FILES,
        mapped=rank.kept.setdefault("mapped", {}),
    )
    return rank.timed(lambda: asyncio.run(copy))
