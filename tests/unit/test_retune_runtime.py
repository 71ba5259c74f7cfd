"""The interval on its way: what the controller measures becomes a journaled choice, an order, and rank 0's message."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from test_agent_words import GENERATION, Ranks, agent
from test_controller_hold import World, run, steps

from orchestrator.core import events as ev
from orchestrator.core.actions import SaveEvery
from orchestrator.observe.status import Status
from orchestrator.runtime import retune
from orchestrator.runtime.agent import StaleOrder
from orchestrator.runtime.controller import Controller
from orchestrator.runtime.journal import read, replay
from trainer import contract

SAVE_US = 50_000
AUTO = {"interval": "auto", "interval_steps": 10, "shortest_interval_steps": 2, "longest_interval_steps": 1000}


async def live_until_a_choice(world: World, tries: int) -> int | None:
    """Tell of steps and checkpoints as ranks and agents do; the interval that was ordered, if one was."""
    for checkpoint in range(tries):
        first = 3 + 10 * checkpoint
        for step in range(first + 1, first + 11):
            done = steps(step)
            cost = {"checkpoint_us": SAVE_US, "save_us": SAVE_US} if step == first + 1 else {}
            await world.tell(ev.StepsDone(**{**vars(done), **cost}))
            await world.until(lambda status, step=step: status.step == step)
        saved = ev.CheckpointWritten(at=0, generation=1, step=first + 10, bytes=1, write_us=1)
        await world.tell(saved, ev.CheckpointCommitted(at=0, step=first + 10, epoch=1, generation=1))
        await world.until(lambda status, step=first + 10: status.newest_checkpoint == step)
        if ordered := world.ordered(SaveEvery):
            return int(ordered[-1].steps)
    return None


@pytest.fixture
def world(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_a_choice_is_journaled_with_its_inputs_ordered_and_shown(world: World) -> None:
    world.checkpoint = AUTO

    async def work() -> None:
        chosen = await live_until_a_choice(world, tries=9)
        assert chosen is not None and chosen >= 12, "time goes by and nothing is lost"

        def shown(status: Status) -> bool:
            return status.save_every_steps == chosen and "Young and Daly" in status.save_every_why

        await world.until(shown)
        notices = [line for _, line in (await world.controller.poll(0, lease=False))[1]]
        assert any(line.startswith(f"a checkpoint each {chosen} steps") for line in notices)
        await asyncio.to_thread(world.controller._journal.publish)

    run(world, work)
    records = read(world.url)
    choice = next(record for record in records if isinstance(record.event, ev.IntervalChosen))
    assert choice.event.stall_us == SAVE_US and choice.event.exposed_us > 0  # type: ignore[union-attr]
    assert choice.actions[0]["type"] == "SaveEvery"
    state = replay(records).state
    assert state.interval is not None


def test_a_fixed_interval_is_never_changed(world: World) -> None:
    world.checkpoint = AUTO | {"interval": "fixed"}

    async def work() -> None:
        assert await live_until_a_choice(world, tries=9) is None
        status = await world.until(lambda status: True)
        assert (status.save_every_steps, status.save_every_why) == (10, "")

    run(world, work)


def test_a_controller_that_retunes_what_is_fixed_would_be_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.checkpoint = AUTO | {"interval": "fixed"}
    whole = Controller.__init__

    def broken(self: Controller, **options: Any) -> None:
        whole(self, **options)
        self._retuner = retune.Retuner(self._spec.checkpoint)

    monkeypatch.setattr(Controller, "__init__", broken)

    async def work() -> None:
        assert await live_until_a_choice(world, tries=9) is not None

    run(world, work)


class Worker(Ranks):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[int, object]] = []

    def send(self, rank: int, message: object) -> None:
        self.sent.append((rank, message))


def test_an_agent_tells_rank_0_of_the_generation_that_is_meant_and_of_no_other(tmp_path: Any) -> None:
    async def work() -> list[tuple[int, object]]:
        ranks = Worker()
        made = agent(ranks, tmp_path)
        await made.save_every(1, GENERATION, 37)
        await made.save_every(1, GENERATION - 1, 50)
        with pytest.raises(StaleOrder):
            await made.save_every(0, GENERATION, 60)
        return ranks.sent

    assert asyncio.run(work()) == [(0, contract.SaveEvery(steps=37))]
