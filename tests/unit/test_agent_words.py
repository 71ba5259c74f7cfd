"""Last words: a rank that found its own state corrupt is heard before it is ended, and before those it has stopped."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.runtime import agent as agent_module
from orchestrator.runtime.agent import Agent
from orchestrator.runtime.assignment import WorkerExit
from orchestrator.runtime.copies import Copies
from orchestrator.runtime.reporting import Outbox
from orchestrator.runtime.reports import Exited, HaltedAlike, NodeFinished, NodeFold, Report
from orchestrator.runtime.stacks import Stacks
from storage.urls import scratch_folder
from trainer import contract

DEADLINE_S = 30.0
GENERATION = 3


def word(rank: int, kind: str) -> contract.Failed:
    return contract.Failed(generation=GENERATION, rank=rank, step=5, kind=kind, error="e", traceback="")


def exit_of(rank: int, code: int | None = contract.EXIT_FAILED) -> WorkerExit:
    return WorkerExit(
        generation=GENERATION, rank=rank, pid=1, exit_code=code, signal=None if code is not None else signal.SIGKILL
    )


class Ranks:
    """Workers of the node that say what they are told to while they are heard out, and are ended by a halt."""

    def __init__(self) -> None:
        self.say: Callable[[], None] = lambda: None
        self.log: list[str] = []

    def hear_out(self, deadline_s: float) -> bool:
        assert 0 < deadline_s < 10 and threading.current_thread() is not threading.main_thread()
        self.log.append("heard")
        self.say()
        return True

    def stop_gracefully(self) -> None:
        self.log.append("asked")

    def halt(self, deadline_s: float, park_s: float) -> bool:
        assert 0 < deadline_s <= 10 and park_s in (0.0, 3.0)
        self.log.append("parked" if park_s else "ended")
        return park_s > 0


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


def agent(ranks: Ranks, tmp_path: Any) -> Agent:
    """As far as words need one; it takes a Ray worker to make a whole one."""
    made = Agent.__new__(Agent)
    spec = SimpleNamespace(
        recovery=SimpleNamespace(halt_deadline_s=10.0, park_deadline_s=3.0),
        run=SimpleNamespace(url=f"file://{tmp_path}/run"),
        is_script=False,
    )
    made.__dict__.update(
        _epoch=1, _ended_generation=0, _stopped_generation=0, _leaving=None, _copies={}, _node="a", _ray_node="x",
        _run="r", _asked=set(),
        _ram_dir=str(tmp_path / "ram"), _watch=None, _workers=ranks, _spec=spec,
        _fold=NodeFold(generation=GENERATION, ranks=(0, 1)), _facts=[],
        _kept=deque(), _held={}, _stacks=Stacks(), _records={}, _outbox=Outbox(), _loop=asyncio.get_running_loop(),
        _buddies=Copies(run="r", node="x", ram_dir=str(tmp_path / "ram"), token="t", bytes_per_s=0),
    )  # fmt: skip
    assert scratch_folder(spec.run.url, 0)
    return made


def told(by: Agent) -> list[Report]:
    return by._outbox.reports()


def test_a_rank_that_another_has_stopped_is_told_of_when_it_has_ended(ranks: Ranks, tmp_path: Any) -> None:
    async def work() -> None:
        a = agent(ranks, tmp_path)
        a._on_message(word(0, "unclean"))
        assert told(a) == []
        a._on_message(word(1, "corrupt"))
        assert told(a) == [word(1, "corrupt")]
        a._on_exit(exit_of(0))
        exited = Exited(generation=GENERATION, rank=0, exit_code=contract.EXIT_FAILED, signal=None)
        assert told(a)[1:] == [word(0, "unclean"), exited]

    asyncio.run(work())


def test_a_rank_that_another_has_stopped_is_told_of_though_it_parks_and_no_halt_comes(
    ranks: Ranks, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "LAST_WORDS_S", 0.01)

    async def work() -> None:
        a = agent(ranks, tmp_path)
        for rank in (0, 1):
            a._on_message(word(rank, "unclean"))
            a._on_message(contract.Parked(generation=GENERATION, rank=rank, step=5))
        assert told(a) == []
        deadline = a._loop.time() + DEADLINE_S
        while len(told(a)) < 2:
            assert a._loop.time() < deadline
            await asyncio.sleep(0.01)
        assert told(a) == [word(0, "unclean"), word(1, "unclean")]

    asyncio.run(work())


def test_a_halt_for_corrupt_state_hears_its_ranks_first(ranks: Ranks, tmp_path: Any) -> None:
    async def work() -> None:
        a = agent(ranks, tmp_path)
        a._on_message(word(0, "unclean"))
        ranks.say = lambda: a._call(a._on_message, word(1, "corrupt"))  # as the workers' thread does
        await asyncio.wait_for(a.halt(1, GENERATION, hear_out=True, park=False), DEADLINE_S)
        assert ranks.log == ["heard", "ended"]
        assert told(a) == [word(1, "corrupt"), HaltedAlike(generation=GENERATION, snapshots=())]

    asyncio.run(work())


def test_a_halt_for_another_cause_waits_for_nobody_and_tells_that_state_was_corrupt(
    ranks: Ranks, tmp_path: Any
) -> None:
    async def work() -> None:
        a = agent(ranks, tmp_path)
        a._on_message(word(0, "unclean"))
        a._on_message(word(1, "unclean"))
        await asyncio.wait_for(a.halt(1, GENERATION, hear_out=False, park=True), DEADLINE_S)
        assert ranks.log == ["parked"]
        assert told(a) == [word(0, "unclean"), HaltedAlike(generation=GENERATION, snapshots=(), parked=True)]

    asyncio.run(work())


# --- a script's processes, which may end past Python's own end --------------------------------------------------------


def scripted(ranks: Ranks, tmp_path: Any) -> Agent:
    made = agent(ranks, tmp_path)
    made._spec.is_script = True
    made._fold.reached = {0: 0, 1: 0}
    return made


@pytest.mark.parametrize(("stops", "reason"), [(False, "completed"), (True, "stopped")])
def test_a_script_that_ends_itself_with_0_has_finished(ranks: Ranks, tmp_path: Any, stops: bool, reason: str) -> None:
    async def work() -> None:
        a = scripted(ranks, tmp_path)
        if stops:
            await a.ask_stop(1, GENERATION)
        a._on_exit(exit_of(0, code=0))
        assert told(a) == []
        a._on_message(contract.Finished(generation=GENERATION, rank=1, step=1, reason=reason))
        assert told(a) == [NodeFinished(generation=GENERATION, step=1, reason=reason)]

    asyncio.run(work())


@pytest.mark.parametrize(("code", "kinds"), [(3, [contract.Failed, Exited]), (None, [Exited])])
def test_another_exit_code_is_the_scripts_own_failure_and_a_signal_is_not(
    ranks: Ranks, tmp_path: Any, code: int | None, kinds: list[type]
) -> None:
    async def work() -> None:
        a = scripted(ranks, tmp_path)
        a._on_exit(exit_of(0, code))
        assert [type(report) for report in told(a)] == kinds
        assert code is None or told(a)[0].error == "the script has ended with exit code 3"

    asyncio.run(work())


def test_what_ends_before_the_script_has_begun_is_no_fault_of_it(ranks: Ranks, tmp_path: Any) -> None:
    async def work() -> None:
        a = scripted(ranks, tmp_path)
        a._fold.reached.clear()
        a._on_exit(exit_of(0))
        assert [type(report) for report in told(a)] == [Exited]

    asyncio.run(work())


def test_the_first_to_end_of_sigterm_does_not_break_off_what_others_do_about_it(ranks: Ranks, tmp_path: Any) -> None:
    async def work() -> None:
        for stopped, log in ((False, ["ended"]), (True, ["asked", "heard", "ended"])):
            ranks.log.clear()
            a = scripted(ranks, tmp_path)
            if stopped:
                await a.ask_stop(1, GENERATION)
            await asyncio.wait_for(a.halt(1, GENERATION, hear_out=False, park=False), DEADLINE_S)
            assert ranks.log == log

    asyncio.run(work())
