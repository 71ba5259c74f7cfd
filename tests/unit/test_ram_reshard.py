"""State that lies in the memory of two nodes is restored on another mesh, from own memory and from the peer's."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from parallel_pool import CONTEXT, run_ranks
from test_storage_ranks import check_against, ran, sharded_state, tmp_path_for

from storage import restore
from storage.peer import PeerServer
from storage.ram import HEADER_BYTES, ram_copy, snapshot_path
from storage.snapshots import RamTier
from storage.transfer import PeerSource

RANKS, STEP, TOKEN = 4, 12, "a-token"
Mesh = tuple[int, int, int]


def node_of(rank: int) -> str:
    return "a" if rank < RANKS // 2 else "b"


@pytest.fixture
def folder() -> Iterator[str]:
    path = Path(f"/dev/shm/shepherd-test-{os.getpid()}-{random.randrange(1 << 32):x}")
    yield str(path)
    shutil.rmtree(path, ignore_errors=True)


def _serve_forever(folder: str, node: str, pipe) -> None:
    async def main() -> None:
        pipe.send(await PeerServer("127.0.0.1", TOKEN, folder, "run", node).start())
        await asyncio.Event().wait()

    asyncio.run(main())


@pytest.fixture
def addresses(folder: str) -> Iterator[dict[str, str]]:
    """Of the servers of both nodes, each a process of its own."""
    servers, found = [], {}
    for node in "ab":
        ours, theirs = CONTEXT.Pipe(duplex=False)
        servers.append(CONTEXT.Process(target=_serve_forever, args=(folder, node, theirs), daemon=True))
        servers[-1].start()
        assert ours.poll(60)
        found[node] = ours.recv()
    yield found
    for server in servers:
        server.kill()
        server.join(10)


def _snapshot(folder: str, saved: Mesh) -> None:
    rank, state = dist.get_rank(), sharded_state(saved)
    state.step = STEP
    tier = RamTier(folder, "run", node_of(rank), rank, generation=3)
    tier.snapshot(state)
    tier.wait()


def _restore(folder: str, addresses: dict[str, str], shape: Mesh) -> tuple[list[str], int, list[str]]:
    own, parts, sources = node_of(dist.get_rank()), [], []
    for slot in range(RANKS):
        node = node_of(slot)
        if node == own:
            parts.append([ram_copy(snapshot_path(folder, "run", node, slot, STEP))])
        else:
            sources.append(PeerSource(addresses[node], TOKEN, "run", node, slot, STEP, 3))
            parts.append([sources[-1].copy()])
    state, oracle = sharded_state(shape, zero=True), sharded_state(shape)
    bad = restore.load_copies(parts, state)
    for source in sources:
        source.close()
    return check_against(state, oracle.tensors), state.step, [str(block) for block in bad]


@pytest.mark.parametrize(("saved", "shape"), [((1, 2, 2), (1, 4, 1)), ((2, 2, 1), (1, 1, 4))])
def test_a_state_in_the_memory_of_two_nodes_fills_any_mesh(tmp_path, folder, addresses, saved, shape):
    ran(run_ranks(_snapshot, RANKS, tmp_path_for(tmp_path, "s"), folder, saved))
    results = ran(run_ranks(_restore, RANKS, tmp_path_for(tmp_path, "l"), folder, addresses, shape))
    assert results == [([], STEP, [])] * RANKS


def test_what_is_damaged_in_a_replicas_memory_is_read_from_the_others(tmp_path, folder, addresses):
    saved = (2, 2, 1)
    ran(run_ranks(_snapshot, RANKS, tmp_path_for(tmp_path, "s"), folder, saved))
    path = snapshot_path(folder, "run", "a", 0, STEP)
    (chunk,) = (c for c in ram_copy(path).index.chunks if c.fqn == "large")
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + chunk.file_offset + chunk.n_bytes // 2)
        byte = file.read(1)[0]
        file.seek(HEADER_BYTES + chunk.file_offset + chunk.n_bytes // 2)
        file.write(bytes([byte ^ 4]))
    results = ran(run_ranks(_restore, RANKS, tmp_path_for(tmp_path, "l"), folder, addresses, saved))
    assert [(wrong, step) for wrong, step, _ in results] == [([], STEP)] * RANKS
    evidence = [problem for _, _, bad in results for problem in bad]
    assert evidence and all("slot-00000" in problem and "large" in problem for problem in evidence)
