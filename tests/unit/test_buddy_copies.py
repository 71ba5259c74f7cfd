"""Copies on other nodes: what ranks agree on and pin, and what agents make of it."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.runtime import copies as agents
from storage.peer import PeerServer
from storage.ram import COPY_FILES, HEADER_BYTES, inventory, snapshot_path
from storage.snapshots import RamTier
from storage.state import TrainState
from trainer.copies import Copies

TOKEN = "a-token"


class Rank:
    """One rank's copies, its tier as the steps that it must still hold, and a buddy that holds what has arrived."""

    def __init__(self) -> None:
        self.pinned: tuple[int, ...] = ()
        self.held: list[int] = []
        self.arrived: list[int] = []
        self.copies = Copies(on=True, every_steps=1, complete=0, pin=self.pin)

    def pin(self, *steps: int) -> None:
        self.pinned = steps

    def snapshot(self, step: int) -> None:
        """As `choose_file` does with four files: the pinned ones, the newest and the one that is written."""
        assert len(self.pinned) <= 2
        self.held = [s for s in self.held if s in self.pinned or s == max(self.held)] + [step]


@given(st.data())
def test_whoever_dies_all_others_hold_what_is_left_of_it(data: st.DataObject) -> None:
    """At any moment, also between the ranks' steps: a step that a dead rank's buddy has, all other ranks have."""
    ranks = [Rank() for _ in range(3)]

    def check() -> None:
        for dead in ranks:
            common = set(dead.arrived).intersection(*(r.held for r in ranks if r is not dead))
            if complete:
                assert common and max(common) >= complete

    complete = 0
    for step in range(1, 16):
        shares = [rank.copies.shares() for rank in ranks]
        busy, failed = sum(b for b, _ in shares), sum(f for _, f in shares)
        for rank in data.draw(st.permutations(ranks)):
            rank.copies.agree(step, busy, failed, taken=True)
            check()
            rank.snapshot(step)
            check()
        assert len({rank.copies.complete for rank in ranks}) == 1, "all agree"
        complete = ranks[0].copies.complete
        for rank in ranks:
            copied = rank.copies._copied
            if rank.copies.shares()[0] and data.draw(st.booleans()):
                error = data.draw(st.sampled_from(["", "", "", "refused"]))
                if not error:  # it takes the place of all but the copy of the newest complete step
                    rank.arrived = [s for s in rank.arrived if s == complete] + [copied]
                    assert len(rank.arrived) <= COPY_FILES
                rank.copies.ended(copied, error)
            check()


def test_the_next_copy_begins_when_the_last_has_ended_and_one_is_due() -> None:
    rank = Rank()
    copies = Copies(on=True, every_steps=3, complete=0, pin=rank.pin)
    wanted = []
    for step in range(1, 13):
        busy, failed = copies.shares()
        copies.agree(step, busy, failed, taken=step % 2 == 0)
        if copies.wants(step):
            wanted.append((step, copies.complete))
        if step in (6, 11):
            copies.ended(wanted[-1][0], "" if step == 11 else "no room")
    assert wanted == [(4, 0), (8, 0), (12, 8)], "due after 3, 6 and 12; the copy of step 4 has failed"
    assert rank.pinned == (8, 12)


def test_without_copies_nothing_is_wanted() -> None:
    rank = Rank()
    copies = Copies(on=False, every_steps=1, complete=0, pin=rank.pin)
    copies.agree(1, 0, 0, taken=True)
    assert not copies.wants(1) and rank.pinned == ()


# --- agents -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[str]:
    path = Path(f"/dev/shm/shepherd-test-{os.getpid()}-{random.randrange(1 << 32):x}")
    yield str(path)
    shutil.rmtree(path, ignore_errors=True)


def take(folder: str, step: int, slot: int = 3) -> None:
    tier = RamTier(folder, "run", "a", slot, generation=4)
    tier.snapshot(TrainState(step, {"w": torch.arange(500_000.0) * step}, {"rng": torch.tensor([step])}))
    tier.wait()


def between(folder: str, work, serves=lambda generation: generation == 4) -> None:
    """Run `work(send, keeper)` with two agents' copies: node a has its snapshots kept by node b."""

    async def main() -> None:
        made = {n: agents.Copies(run="run", node=n, ram_dir=folder, token=TOKEN, bytes_per_s=0) for n in "ab"}
        made["b"].serve(serves)
        servers = {n: PeerServer("127.0.0.1", TOKEN, folder, "run", n, {agents.KEEP: c.keep}) for n, c in made.items()}
        addresses = {n: await server.start() for n, server in servers.items()}

        async def send(step: int, complete: int, generation: int = 4) -> str:
            return await made["a"].send(addresses["b"], addresses["a"], generation, 3, step, complete)

        try:
            async with asyncio.timeout(60):
                await work(send, made["b"])
        finally:
            for server in servers.values():
                await server.close()

    asyncio.run(main())


def test_two_files_serve_and_the_copy_of_the_complete_step_stays(folder: str) -> None:
    """Step 3 has arrived here and not from every node, so it is the one that the next takes the place of."""

    async def work(send, keeper) -> None:
        for step, complete, kept in ((1, 0, [1]), (2, 1, [1, 2]), (3, 2, [2, 3]), (4, 2, [2, 4]), (5, 4, [4, 5])):
            take(folder, step)
            assert await send(step, complete) == ""
            assert inventory(folder, "run", "b") == {3: kept}
        assert len(list(Path(folder, "run", "b").iterdir())) == COPY_FILES

    between(folder, work)
    restored = TrainState(0, {"w": torch.zeros(500_000)}, {"rng": torch.zeros(1, dtype=torch.int64)})
    RamTier(folder, "run", "b", 3, generation=5).restore(5, restored)
    assert torch.equal(restored.tensors["w"], torch.arange(500_000.0) * 5) and restored.per_rank["rng"].tolist() == [5]


def test_a_copy_that_cannot_be_made_is_told_after_a_few_tries_and_the_older_one_stays(folder: str, monkeypatch) -> None:
    monkeypatch.setattr(agents, "RETRY_S", (0.0, 0.0))

    async def work(send, keeper) -> None:
        take(folder, 1)
        assert await send(1, 0) == ""
        assert "no complete snapshot of slot 3, step 2" in await send(2, 1)
        assert "serves no generation 5" in await send(2, 1, generation=5)
        take(folder, 2)
        path = snapshot_path(folder, "run", "a", 3, 2)
        assert path is not None
        with open(path, "r+b") as file:
            file.seek(HEADER_BYTES + 1000)
            file.write(b"\xff\xfe")
        assert "block 0 is damaged" in await send(2, 1)
        assert inventory(folder, "run", "b") == {3: [1]}

    between(folder, work)


def test_nothing_is_kept_once_the_generation_is_over(folder: str, monkeypatch) -> None:
    monkeypatch.setattr(agents, "RETRY_S", (0.0, 0.0))
    over = []

    async def work(send, keeper) -> None:
        take(folder, 1)
        turn = keeper._turns.setdefault(3, asyncio.Lock())
        await turn.acquire()  # the copy is under way, and waits for one before it
        sending = asyncio.create_task(send(1, 0))
        while not keeper._tasks:
            await asyncio.sleep(0)
        over.append(True)
        await keeper.end()
        turn.release()
        assert await sending
        assert inventory(folder, "run", "b") == {}

    between(folder, work, serves=lambda generation: not over)


def test_what_is_neither_own_nor_kept_is_deleted(folder: str) -> None:
    for slot in (1, 2):  # of a place that this node had before
        tier = RamTier(folder, "run", "b", slot, generation=3)
        tier.snapshot(TrainState(1, {"w": torch.zeros(9)}, {}))
        tier.wait()

    async def work(send, keeper) -> None:
        take(folder, 7)
        assert await send(7, 0) == ""
        await keeper.drop_others(4, (1,))
        assert inventory(folder, "run", "b") == {1: [1], 3: [7]}

    between(folder, work)


def test_nothing_is_deleted_once_the_generation_is_over(folder: str) -> None:
    """What the next one restores may have come meanwhile."""
    over: list[bool] = []

    async def work(send, keeper) -> None:
        take(folder, 7)
        assert await send(7, 0) == ""
        deleting = asyncio.ensure_future(keeper.drop_others(4, (1,)))
        over.append(True)
        await keeper.end()
        await deleting
        assert inventory(folder, "run", "b") == {3: [7]}
        over.clear()
        await keeper.drop_others(4, (1,))
        assert inventory(folder, "run", "b") == {}

    between(folder, work, serves=lambda generation: not over)


def test_files_stay_mapped_over_generations_until_they_are_deleted(folder: str) -> None:
    async def work(send, keeper) -> None:
        for step in (1, 2):
            take(folder, step)
            assert await send(step, 1) == ""
        mapped = dict(keeper._files)
        assert len(mapped) == COPY_FILES
        await keeper.end()
        take(folder, 3)
        assert await send(3, 2) == ""
        assert all(keeper._files[path] is file for path, file in mapped.items()), "not mapped anew"
        await keeper.end()
        for path in mapped:
            path.unlink()
        await keeper.end()
        assert keeper._files == {}, "their memory is given back"
        take(folder, 4)
        assert await send(4, 3) == ""
        (path,) = keeper._files
        path.unlink()
        take(folder, 5)
        assert await send(5, 4) == ""
        assert inventory(folder, "run", "b") == {3: [5]}, "into a file that others can open"

    between(folder, work)
