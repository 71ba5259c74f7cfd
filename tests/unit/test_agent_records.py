"""Flight records on a node: its agent asks the ranks of a standstill for them, and keeps what they answer."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from test_agent_words import DEADLINE_S, GENERATION, Ranks, agent

from orchestrator.runtime.hangs import NodeWatch, Patience
from trainer import contract

S = 1_000_000
PATIENCE = Patience(rank_silence_us=8 * S, stall_floor_us=5 * S, start_us=9 * S, save_us=9 * S, collective_us=9 * S)


class Asked(Ranks):
    """Rank 0 does not take the order."""

    def __init__(self) -> None:
        super().__init__()
        self.orders: dict[int, object] = {}
        self.all_asked = threading.Event()

    def send(self, rank: int, order: object) -> None:
        self.orders[rank] = order
        if len(self.orders) == 2:
            self.all_asked.set()
        if rank == 0:
            raise TimeoutError("its buffer is full")


def answer(rank: int, generation: int, entries: str) -> contract.Recorded:
    return contract.Recorded(generation=generation, rank=rank, groups={}, entries=entries)


def test_ranks_are_asked_and_what_they_tell_is_kept_of_this_generation(tmp_path: Any) -> None:
    async def work() -> None:
        ranks = Asked()
        a = agent(ranks, tmp_path)
        watch = NodeWatch(GENERATION, (0, 1), PATIENCE, 0)
        for rank in (0, 1):
            watch.hear(0, contract.Phase(generation=GENERATION, rank=rank, step=1, phase="compute"))
        for second in range(1, 9):
            watch.tick(second * S, lambda rank: None)
        a._read_recorders(watch)
        assert await asyncio.to_thread(ranks.all_asked.wait, DEADLINE_S)
        assert ranks.orders == dict.fromkeys((0, 1), contract.ReadRecorder(generation=GENERATION))

        a._on_message(answer(1, GENERATION, '[{"op_id":1}]'))
        a._on_message(answer(0, GENERATION, ""))
        assert await a.flight_record(1, GENERATION, 1) == '[{"op_id":1}]'
        for rank, generation in ((0, GENERATION), (2, GENERATION), (1, GENERATION + 1)):
            with pytest.raises(LookupError, match=f"rank {rank} has told nothing .* generation {generation}"):
                await a.flight_record(1, generation, rank)

    asyncio.run(work())
