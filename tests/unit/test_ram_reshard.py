"""State that lies in the memory of two nodes is restored on another mesh, from own memory and from the peer's.

A run that goes on with another mesh restores as an assignment says: from what lies in the memory of its nodes.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from parallel_pool import CONTEXT, run_ranks
from test_storage_ranks import check_against, ran, sharded_state, tmp_path_for
from torch import Tensor

from storage import restore
from storage.blocks import BadBlock
from storage.checkpointer import Checkpointer
from storage.manifest import ManifestError
from storage.peer import PeerServer
from storage.ram import HEADER_BYTES, ram_copy, snapshot_path
from storage.snapshots import RamTier
from storage.state import SPOILT_STEP, local_tensor
from storage.transfer import PeerSource, fetch_snapshot
from trainer.contract import Restore

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
    """Of generation 3. The same step of generation 2 lies there, too, and is another state."""
    rank = dist.get_rank()
    for generation in (2, 3):
        state = sharded_state(saved, zero=generation == 2)
        state.step = STEP
        tier = RamTier(folder, "run", node_of(rank), rank, generation=generation)
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


def damage(folder: str, slot: int) -> None:
    """Flip a bit of what node a holds of a slot."""
    path = snapshot_path(folder, "run", "a", slot, STEP, 3)
    assert path is not None
    (chunk,) = (c for c in ram_copy(path).index.chunks if c.fqn == "large")
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + chunk.file_offset + chunk.n_bytes // 2)
        byte = file.read(1)[0]
        file.seek(HEADER_BYTES + chunk.file_offset + chunk.n_bytes // 2)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize(("saved", "shape"), [((1, 2, 2), (1, 4, 1)), ((2, 2, 1), (1, 1, 4))])
def test_a_state_in_the_memory_of_two_nodes_fills_any_mesh(tmp_path, folder, addresses, saved, shape):
    ran(run_ranks(_snapshot, RANKS, tmp_path_for(tmp_path, "s"), folder, saved))
    results = ran(run_ranks(_restore, RANKS, tmp_path_for(tmp_path, "l"), folder, addresses, shape))
    assert results == [([], STEP, [])] * RANKS


def test_what_is_damaged_in_a_replicas_memory_is_read_from_the_others(tmp_path, folder, addresses):
    saved = (2, 2, 1)
    ran(run_ranks(_snapshot, RANKS, tmp_path_for(tmp_path, "s"), folder, saved))
    damage(folder, slot=0)
    results = ran(run_ranks(_restore, RANKS, tmp_path_for(tmp_path, "l"), folder, addresses, saved))
    assert [(wrong, step) for wrong, step, _ in results] == [([], STEP)] * RANKS
    evidence = [problem for _, _, bad in results for problem in bad]
    assert evidence and all("slot-00000" in problem and "large" in problem for problem in evidence)


async def _copy_to_a(folder: str, address: str, *slots: int) -> None:
    for slot in slots:
        await fetch_snapshot(
            address, TOKEN, run="run", source_node="b", source_slot=slot, step=STEP, generation=3,
            ram_dir=folder, node="a", slot=slot,
        )  # fmt: skip


Case = tuple[Mesh, str, str]
"""The mesh to go on with, the nodes of its two ranks, and what is said against each snapshot, if anything is."""


def _go_on(folder: str, addresses: dict[str, str], cases: list[Case]) -> list[dict[str, Any]]:
    """As two ranks, in one case after the other; b is asked for what is damaged on a."""
    return [_go_on_in(folder, addresses, *case) for case in cases]


def _go_on_in(folder: str, addresses: dict[str, str], shape: Mesh, at: str, refusal: str) -> dict[str, Any]:
    rank, asked, bad = dist.get_rank(), list[str](), list[BadBlock]()

    def sound(tensors: Iterable[tuple[str, Tensor]]) -> None:
        asked.extend(f"{name} {tensor.sum().item():g}" for name, tensor in tensors if name.startswith("rank/"))
        if refusal:
            raise ManifestError(refusal)

    checkpointer = Checkpointer(
        url="", run="run", rank=rank, world_size=2, epoch=1, generation=4, ram_dir=folder, node=at[rank]
    )
    holders = [PeerSource(addresses["b"], TOKEN, "run", "b", slot, STEP, 3) for slot in (2, 3)]
    state, oracle, error = sharded_state(shape, zero=True), sharded_state(shape), ""
    order = Restore(source="ram", step=STEP, generation=3, reshard=True)
    try:
        checkpointer.restore(state, order, holders, bad, sound)
    except ManifestError as e:
        error = str(e)
    for holder in holders:
        holder.close()
    return {
        "error": error,
        "step": state.step,
        "wrong": [] if error else check_against(state, oracle.tensors),
        "finite": all(bool(local_tensor(tensor).isfinite().all()) for tensor in state.tensors.values()),
        "random": state.per_rank["rng"].tolist(),
        "asked": asked,
        "bad": sorted({block.source for block in bad}),
    }


def gone_on(tmp_path: Path, folder: str, addresses: dict[str, str], *cases: Case) -> list[list[dict[str, Any]]]:
    """By case, what came of it on each rank."""
    results = ran(run_ranks(_go_on, 2, tmp_path_for(tmp_path, "l"), folder, addresses, list(cases)))
    return [list(of_ranks) for of_ranks in zip(*results, strict=True)]


RANDOM = [f"rank/{slot:05d}/rng {3 * (slot + 1)}" for slot in range(RANKS)]


def test_a_run_goes_on_with_another_mesh(tmp_path, folder, addresses):
    """On the node that is left, with copies of what the other has held, of which one is damaged, and mended from there;
    and on both, each of which gives what it has. The random state of other ranks stays where it is."""
    ran(run_ranks(_snapshot, RANKS, tmp_path_for(tmp_path, "s"), folder, (1, 2, 2)))
    asyncio.run(_copy_to_a(folder, addresses["b"], 2, 3))
    damage(folder, slot=2)
    one, both = gone_on(tmp_path, folder, addresses, ((1, 1, 2), "aa", ""), ((2, 1, 1), "ab", ""))
    for result in (*one, *both):
        assert (result["error"], result["wrong"], result["step"], result["random"]) == ("", [], STEP, [0.0] * 3)
    assert {source for result in one for source in result["bad"]} == {"a"}
    assert [result["asked"] for result in one] == [[RANDOM[0], RANDOM[2]], [RANDOM[1], RANDOM[3]]], "each is once"
    assert [result["asked"] for result in both] == [RANDOM, RANDOM[2:]]


def test_what_cannot_be_restored_is_refused_on_every_rank(tmp_path, folder, addresses):
    """A shard that nobody has; a copy that is not what its writer recorded; nothing; and a block that is whole nowhere,
    which is found when tensors are half filled."""
    ran(run_ranks(_snapshot, RANKS, tmp_path_for(tmp_path, "s"), folder, (1, 2, 2)))
    asyncio.run(_copy_to_a(folder, addresses["b"], 2, 3))
    damage(folder, slot=0)
    shape = (1, 2, 1)
    cases = ((shape, "bb", ""), (shape, "aa", "not sound"), (shape, "cc", ""), (shape, "aa", ""))
    *early, late = gone_on(tmp_path, folder, addresses, *cases)
    for results, why in zip(early, ("", "rank 0: not sound", "no node holds step 12"), strict=True):
        for result in results:
            assert result["error"] and why in result["error"], result
            assert (result["step"], result["finite"]) == (0, True)
    assert all("damaged" in result["error"] and result["step"] == SPOILT_STEP for result in late), late
