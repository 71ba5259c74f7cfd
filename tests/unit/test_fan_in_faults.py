"""Faults around a fan-in: frames in a gap, one that is missing, who stands still, whom nobody reaches. Real sockets.

The rules: a number that is acknowledged stands for all reports before it, and a node is silent for at most
2 x PATIENCE_S, whatever fails.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from test_fan_in import DEADLINE_S, FAN_IN_PROCESS, TOKEN, alone, in_haste, info_of, until
from test_reports_mesh import node_step

from orchestrator.runtime import collect, fanin, reporting
from orchestrator.runtime.collect import FanIns
from orchestrator.runtime.fanin import FanIn
from orchestrator.runtime.groups import Told
from orchestrator.runtime.nodes import AgentHandle
from orchestrator.runtime.reporting import Outbox, Reporter
from storage import wires
from storage.peer import PeerServer
from storage.wires import MAX_WIRE_FRAME_BYTES, PeerError, Wire, open_wire
from trainer.contract import Failed, encode

__all__ = ["in_haste"]  # for every test here, too


def within_deadline(work: Awaitable[None]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await work

    asyncio.run(whole())


@asynccontextmanager
async def served(**services: Any) -> AsyncIterator[str]:
    """Address of a peer server with these services."""
    server = PeerServer("127.0.0.1", TOKEN, "/nowhere", "r", "n", services)
    try:
        yield await server.start()
    finally:
        await server.close()


def reporter_of(outbox: Outbox, node: str = "a") -> Reporter:
    async def die(why: str) -> None:
        raise AssertionError(why)

    return Reporter(node=node, namespace="", token=TOKEN, outbox=outbox, epoch=lambda: 1, die=die)


def controller_that_answers(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], str]) -> None:
    """What agents call through Ray. `answer` is given the node, and gives the address of its fan-in."""

    def report(node: str, batch: Any) -> Any:
        answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        answered.set_result(answer(node))
        return SimpleNamespace(future=lambda: answered)

    controller = SimpleNamespace(report=SimpleNamespace(remote=report))
    errors = SimpleNamespace(RayTaskError=RuntimeError)
    ray = SimpleNamespace(get_actor=lambda name, namespace: controller, exceptions=errors)
    monkeypatch.setattr(reporting, "ray", ray)
    monkeypatch.setattr(asyncio, "wrap_future", lambda future: future)  # the answer is there already


async def told_to(controller: Wire, reports: int, told: Sequence[Any] = ()) -> list[Any]:
    """So many reports that a fan-in tells its controller, which takes them; `told` are those that it has told."""
    told = list(told)
    while len(told) < reports:
        told += (await controller.receive(DEADLINE_S))["told"]
        await controller.send({"taken": len(told), "strangers": []})
    return told


# --- nothing is lost -------------------------------------------------------------------------------------------------


def test_a_report_that_comes_before_the_fan_in_listens_is_told():
    async def work() -> None:
        fan_in = FanIn()
        async with served(collect=fan_in.collect, report=fan_in.report) as address:
            async with open_wire(address, TOKEN, {"op": fanin.COLLECT, "epoch": 1}) as controller:
                await controller.receive(DEADLINE_S)
                async with open_wire(address, TOKEN, {"op": fanin.REPORT, "epoch": 1, "node": "a"}) as member:
                    await member.send({"after": 0, "told": [[1, encode(node_step(21))]]})
                    assert await told_to(controller, 1) == [[{"a": 1}, encode(node_step(21))]]

    within_deadline(work())


@pytest.mark.parametrize("frames", [[(1, 2)], [(0, 1), (2, 3)], [(0, 1), (0, 2)], [(0, 2), (2, 1)]])
def test_a_frame_that_leaves_a_gap_cuts_the_wire(frames):
    async def work(wire: Callable[..., Any]) -> None:
        async with wire(fanin.COLLECT, 1) as controller, wire(fanin.REPORT, 1) as member:
            for after, number in frames:
                await member.send({"after": after, "told": [[number, encode(node_step(number))]]})
            with pytest.raises(PeerError, match="gone"):
                await member.receive(fanin.PATIENCE_S / 2)
            async with wire(fanin.REPORT, 1, "b") as other:
                await other.send({"after": 0, "told": [[1, encode(node_step(99))]]})
                told = await told_to(controller, len(frames))
        assert [list(tellers) for tellers, _ in told] == [["a"]] * (len(frames) - 1) + [["b"]]

    alone(work)


def test_numbers_that_an_agent_tells_no_more_are_no_gap():
    async def work(wire: Callable[..., Any]) -> None:
        async with wire(fanin.COLLECT, 1) as controller, wire(fanin.REPORT, 1) as member:
            await member.send({"after": 0, "told": [[7, encode(node_step(1))]]})
            await member.send({"after": 7, "told": [[9, encode(node_step(2))], [12, encode(node_step(3))]]})
            told = await told_to(controller, 3)
        assert [tellers["a"] for tellers, _ in told] == [7, 9, 12]

    alone(work)


class Collecting:
    """The controller's side, of agents that are all there and in good standing."""

    def __init__(self, **addresses: str) -> None:
        self.told: list[Told] = []
        self.standings: dict[str, str] = dict.fromkeys(addresses, "good")
        self.agents = {
            node: AgentHandle(node=node, ray_node="", actor=None, group=None, info=info_of(address))
            for node, address in addresses.items()
        }
        for handle in self.agents.values():
            handle.line = asyncio.current_task()  # type: ignore[assignment]  # that there is one is enough
        self.fan_ins = FanIns(1, TOKEN, self.agents, self.hear, lambda: False, self.standings.__getitem__)

    def hear(self, heard: Any, told: Sequence[Told]) -> list[str]:
        self.told += told
        return []

    def serving(self) -> list[str]:
        return list(self.fan_ins._members)

    async def serve(self, *nodes: str) -> None:
        """Until just these are fan-ins."""
        while set(self.serving()) != set(nodes):
            self.fan_ins.keep()
            await asyncio.sleep(0.01)


def test_a_controller_that_misses_a_frame_cuts_the_fan_in(monkeypatch):
    monkeypatch.setattr(fanin, "FAN_IN_FROM_NODES", 1)
    answers: list[Any] = []

    async def skips_one(request: dict[str, Any], wire: Wire) -> None:
        await wire.send({"ok": True})
        for after in (0, 2):
            await wire.send({"after": after, "heard": ["a"], "told": [[{"a": after + 1}, encode(node_step(21))]]})
        while True:
            answers.append(await wire.receive(DEADLINE_S))

    async def work() -> None:
        async with served(collect=skips_one) as address:
            collecting = Collecting(a=address)
            collecting.fan_ins.keep()
            await until(lambda: "a" in collecting.fan_ins._rests_until)
            assert [each.tellers for each in collecting.told] == [{"a": 1}]
            assert [answer["taken"] for answer in answers] == [1]

    within_deadline(work())


def test_a_mass_failure_takes_as_many_frames_as_it_needs():
    last = Failed(generation=1, rank=0, step=1, kind="collective", error="e", traceback="\N{SNOWMAN}" * 8_000)
    count = 400
    assert count * len(json.dumps(encode(last))) > MAX_WIRE_FRAME_BYTES

    async def work() -> None:
        fan_in = FanIn()
        async with served(collect=fan_in.collect, report=fan_in.report) as address:
            async with open_wire(address, TOKEN, {"op": fanin.COLLECT, "epoch": 1}) as controller:
                await controller.receive(DEADLINE_S)
                outbox = Outbox()
                for _ in range(count):
                    outbox.push(last)
                reports = asyncio.create_task(reporter_of(outbox)._report_through(address))
                while not (told := (await controller.receive(DEADLINE_S))["told"]):
                    await controller.send({"taken": 0, "strangers": []})
                group = fan_in._group
                assert group is not None
                await until(lambda: len(told) + len(group._fold) == count)
                await controller.send({"taken": len(told), "strangers": []})
                told = await told_to(controller, count, told)
                reports.cancel()
        assert [tellers["a"] for tellers, _ in told] == list(range(1, count + 1))

    within_deadline(work())


# --- nobody looks dead for another's standstill ----------------------------------------------------------------------


def test_a_controller_that_stands_still_keeps_its_fan_ins(monkeypatch):
    monkeypatch.setattr(fanin, "FAN_IN_FROM_NODES", 1)

    async def work() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FAN_IN_PROCESS, TOKEN, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            collecting = Collecting(a=(await process.stdout.readline()).decode().strip())
            await collecting.serve("a")
            time.sleep(1.5 * fanin.PATIENCE_S)  # the fault: nothing of this process runs
            await asyncio.sleep(1.5 * fanin.PATIENCE_S)
            assert collecting.serving() == ["a"]
            process.kill()
            await until(lambda: collecting.serving() == [])
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    within_deadline(work())


def test_a_fan_in_that_stands_still_takes_nobody_for_silent():
    """What they sent meanwhile lies unread."""

    async def work(wire: Callable[..., Any]) -> None:
        async with wire(fanin.COLLECT, 1) as controller, wire(fanin.REPORT, 1) as member:
            await member.send({"after": 0, "told": []})
            await controller.receive(DEADLINE_S)
            time.sleep(1.5 * fanin.PATIENCE_S)  # the fault: nothing of this process runs
            for _ in range(3):
                await controller.receive(DEADLINE_S)
            await member.send({"after": 0, "told": [[1, encode(node_step(21))]]})
            assert await told_to(controller, 1) == [[{"a": 1}, encode(node_step(21))]]

    alone(work)


def test_a_fan_in_outlasts_a_controllers_silence():
    """Else its agents would all come to the controller at once."""

    async def work(wire: Callable[..., Any]) -> None:
        async with wire(fanin.COLLECT, 1) as controller, wire(fanin.REPORT, 1) as member:
            silent_until, frames = time.monotonic() + 1.5 * fanin.PATIENCE_S, 0
            while time.monotonic() < silent_until:
                await member.send({"after": 0, "told": []})
                await controller.receive(DEADLINE_S)
                frames += 1
            for _ in range(frames):
                await controller.send({"taken": 0, "strangers": []})
            answering = asyncio.create_task(told_to(controller, 1))
            assert await member.receive(DEADLINE_S) == {"taken": 0}
            answering.cancel()

    alone(work)


class Way:
    """A fan-in for agents: answers `answers` frames of each, then falls silent or breaks off."""

    def __init__(self, answers: int, breaks: bool) -> None:
        self._answers, self._breaks = answers, breaks

    async def report(self, request: dict[str, Any], wire: Wire) -> None:
        await wire.send({"ok": True})
        for _ in range(self._answers):
            await wire.receive(DEADLINE_S)
            await wire.send({"taken": 0})
        while not self._breaks:
            await wire.receive(DEADLINE_S)


@asynccontextmanager
async def agents_come_back(monkeypatch: pytest.MonkeyPatch, address: str, count: int) -> AsyncIterator[list[float]]:
    """So many agents that the controller sends to `address`; monotonic seconds at which they call it a second time."""
    first: dict[str, float] = {}
    back: dict[str, float] = {}

    def answer(node: str) -> str:
        (back if node in first else first).setdefault(node, time.monotonic())
        return address

    controller_that_answers(monkeypatch, answer)
    agents = [asyncio.create_task(reporter_of(Outbox(), f"n{index}").run()) for index in range(count)]
    try:
        await until(lambda: len(back) == count)
        yield [back[node] - first[node] for node in first]
    finally:
        for agent in agents:
            agent.cancel()
        await asyncio.gather(*agents, return_exceptions=True)


def test_agents_whose_fan_ins_fall_silent_come_back_spread(monkeypatch, caplog):
    async def work() -> None:
        async with served(report=Way(answers=1, breaks=False).report) as address:
            async with agents_come_back(monkeypatch, address, 24) as after_s:
                assert min(after_s) > fanin.PATIENCE_S

    within_deadline(work())
    # What they say, as a busy machine may wake them together.
    silent_s = [float(found) for found in re.findall(r"silent for ([\d.]+) s", caplog.text)]
    assert len(silent_s) == 24
    assert min(silent_s) >= fanin.PATIENCE_S and max(silent_s) <= fanin.PATIENCE_S + reporting.SPREAD_S
    # Of 24 that are spread evenly, all lie within half of the time once in 700,000 tries.
    assert max(silent_s) - min(silent_s) > reporting.SPREAD_S / 2


def test_an_agent_whose_fan_in_never_answers_waits_no_longer_than_its_patience(monkeypatch, caplog):
    async def work() -> None:
        async with served(report=Way(answers=0, breaks=False).report) as address:
            async with agents_come_back(monkeypatch, address, 4):
                pass

    within_deadline(work())
    assert set(re.findall(r"silent for ([\d.]+) s", caplog.text)) == {f"{fanin.PATIENCE_S:.2f}"}


def test_an_agent_whose_fan_in_breaks_off_comes_back_at_once_though_it_has_nothing_to_say(monkeypatch):
    monkeypatch.setattr(reporting, "REPORT_INTERVAL_S", 10.0)
    monkeypatch.setattr(fanin, "PATIENCE_S", DEADLINE_S)

    async def work() -> None:
        async with served(report=Way(answers=1, breaks=True).report) as address:
            async with agents_come_back(monkeypatch, address, 1) as (after_s,):
                # Its first call waits for nothing to say, too; all after that takes milliseconds.
                assert after_s < 5.0

    within_deadline(work())


def test_an_agent_gives_up_a_fan_in_that_does_not_open_within_its_patience(monkeypatch):
    async def listens(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def work() -> None:
        monkeypatch.setattr(wires, "HANDSHAKE_S", DEADLINE_S)
        server = await asyncio.start_server(listens, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, agents_come_back(monkeypatch, f"127.0.0.1:{port}", 1) as (after_s,):
            assert after_s < DEADLINE_S / 2

    within_deadline(work())


# --- whom nobody reaches, and who leaves -----------------------------------------------------------------------------


def test_a_node_that_cannot_reach_its_fan_in_is_given_another(monkeypatch):
    monkeypatch.setattr(collect, "REST_S", 30.0)

    async def work() -> None:
        async with served(collect=FanIn().collect) as a, served(collect=FanIn().collect) as b:
            collecting = Collecting(a=a, b=b, c="")
            collecting.agents["c"].line = None
            await collecting.serve("a", "b")
            address_for = collecting.fan_ins.address_for
            first = address_for("c")
            second = b if first == a else a
            assert address_for("c") == first, "the answer may have been lost"
            assert [address_for("c") for _ in range(2)] == [second] * 2
            assert address_for("c") == first, "and the other again, when it is no better"
            collecting.fan_ins.forget("c")
            assert all("c" not in members for members in collecting.fan_ins._members.values())

    within_deadline(work())


def test_a_node_that_cannot_reach_the_only_fan_in_reports_directly_and_tries_it_again_later(monkeypatch):
    monkeypatch.setattr(fanin, "FAN_IN_NODES", 3)

    async def work() -> None:
        async with served(collect=FanIn().collect) as a:
            collecting = Collecting(a=a, b="", c="")
            for node in "bc":
                collecting.agents[node].line = None
            await collecting.serve("a")
            assert [collecting.fan_ins.address_for("c") for _ in range(4)] == [a, a, "", ""]
            await until(lambda: collecting.fan_ins.address_for("c") == a)

    within_deadline(work())


def test_fan_ins_are_nodes_that_will_stay_and_move_off_one_that_leaves():
    async def work() -> None:
        async with served(collect=FanIn().collect) as a, served(collect=FanIn().collect) as b:
            collecting = Collecting(a=a, b=b, c="")
            collecting.agents["c"].line = None
            for standing in ("", "suspect", "probation", "leaving"):
                collecting.standings |= {"a": standing, "b": standing}
                collecting.fan_ins.keep()
                assert not collecting.fan_ins._tasks, standing
            collecting.standings["a"] = "good"
            await collecting.serve("a")
            collecting.standings |= {"a": "suspect", "b": "suspect"}
            collecting.fan_ins.keep()
            assert not collecting.fan_ins._tasks["a"].cancelling(), "one strike moves nothing"
            collecting.standings |= {"a": "leaving", "b": "good"}
            await collecting.serve("b")

    within_deadline(work())


def test_an_agent_that_is_let_go_before_it_collects_is_no_fan_in():
    async def work() -> None:
        collecting = Collecting(a="127.0.0.1:9", b="127.0.0.1:9", c="127.0.0.1:9")
        collecting.fan_ins.keep()
        (gone, *others) = collecting.fan_ins._tasks
        del collecting.agents[gone], collecting.standings[gone]
        collecting.fan_ins.forget(gone)
        await until(lambda: gone not in collecting.fan_ins._tasks)
        await until(lambda: not set(others) & set(collecting.fan_ins._tasks))

    within_deadline(work())


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(6))
def test_a_reporter_that_is_ended_while_it_is_woken_ends(monkeypatch, turns):
    """However many turns of the loop lie between the two."""
    controller_that_answers(monkeypatch, lambda node: "")

    async def work() -> None:
        outbox = Outbox()
        task = asyncio.create_task(reporter_of(outbox).run())
        await asyncio.to_thread(lambda: None)
        outbox.wake.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=5.0)
        assert done, "the cancellation was swallowed"

    within_deadline(work())
