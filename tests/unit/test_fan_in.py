"""Reports on their way through a fan-in: real sockets between real agents' ends, fan-ins and a body; only Ray is not.

Whatever breaks on the way, each report arrives once and in order, nobody looks dead for another's silence, and nothing
is forgotten that the controller has not taken.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from test_body_nodes import body_of
from test_reports_mesh import node_step

from orchestrator.core import events as ev
from orchestrator.runtime import collect, fanin, reporting
from orchestrator.runtime.fanin import FanIn
from orchestrator.runtime.nodes import AgentHandle, NodeInfo
from orchestrator.runtime.reporting import Outbox, Reporter
from orchestrator.runtime.reports import Exited, MeshFold
from storage.peer import PeerServer
from storage.wires import PeerError, PeerRefused, Wire, open_wire
from trainer.contract import encode

DEADLINE_S = 120.0
TOKEN = "token"
NODES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes have two fan-ins, and waits are short."""
    monkeypatch.setattr(fanin, "FAN_IN_FROM_NODES", 3)
    monkeypatch.setattr(fanin, "FAN_IN_NODES", 2)
    monkeypatch.setattr(collect, "REST_S", 0.2)
    monkeypatch.setattr(fanin, "BEAT_S", 0.05)
    monkeypatch.setattr(fanin, "GATHER_S", 0.01)
    monkeypatch.setattr(fanin, "ANSWER_S", 0.1)
    monkeypatch.setattr(fanin, "PATIENCE_S", 2.0)
    monkeypatch.setattr(fanin, "CONTROLLER_PATIENCE_S", 8.0)
    monkeypatch.setattr(fanin, "UNANSWERED_FRAMES", 640)
    monkeypatch.setattr(reporting, "SPREAD_S", 1.0)
    monkeypatch.setattr(reporting, "REPORT_INTERVAL_S", 0.1)
    monkeypatch.setattr(reporting, "REPORT_RETRY_S", 0.05)


class Agents:
    """Three nodes, each with a reporter and a peer server that can be a fan-in, and a controller's body."""

    def __init__(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[ev.Event] = []
        self.behind = False
        self.directly: list[str] = []
        """Who has called the controller itself."""
        self.body = body_of(tmp_path, self.events)
        self.body._fan_ins._behind = lambda: self.behind
        self.body.fold = MeshFold(generation=4, nodes=NODES, ranks=3, done=20)
        self.outboxes = {node: Outbox() for node in NODES}
        self.servers: dict[str, PeerServer] = {}
        self.tasks: list[asyncio.Task[None]] = []
        controller = SimpleNamespace(report=SimpleNamespace(remote=self.report))
        errors = SimpleNamespace(RayTaskError=RuntimeError)
        monkeypatch.setattr(
            reporting, "ray", SimpleNamespace(get_actor=lambda name, namespace: controller, exceptions=errors)
        )
        monkeypatch.setattr(asyncio, "wrap_future", lambda future: future)  # the answer is there already

    def report(self, node: str, batch: Any) -> Any:
        """As Controller.report, called through Ray."""
        self.directly.append(node)
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self.events += self.body.hear(node, [] if self.behind else batch)
        answer.set_result(None if self.behind else self.body.fan_in_for(node))
        return SimpleNamespace(future=lambda: answer)

    async def start(self) -> None:
        async def die(why: str) -> None:
            raise AssertionError(why)

        for node in NODES:
            address = await self.serve(node)
            handle = AgentHandle(node=node, ray_node="", actor=None, group=None, info=info_of(address))
            handle.line = asyncio.current_task()  # type: ignore[assignment]  # that there is one is enough
            self.body.agents[node] = handle
            outbox = self.outboxes[node]
            reporter = Reporter(node=node, namespace="", token=TOKEN, outbox=outbox, epoch=lambda: 1, die=die)
            self.tasks.append(asyncio.create_task(reporter.run()))
        self.tasks.append(asyncio.create_task(self.keep()))

    async def serve(self, node: str) -> str:
        fan_in = FanIn()
        services = {fanin.COLLECT: fan_in.collect, fanin.REPORT: fan_in.report}
        self.servers[node] = PeerServer("127.0.0.1", TOKEN, "/nowhere", "r", node, services)
        return await self.servers[node].start()

    async def keep(self) -> None:
        while True:
            self.body._fan_ins.keep()
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        self.body._fan_ins.end()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for server in self.servers.values():
            await server.close()

    def fan_ins(self) -> dict[str, dict[str, None]]:
        return self.body._fan_ins._members

    async def all_go_through(self) -> None:
        """Until every node has been sent to a fan-in, and none calls the controller any more."""
        await until(lambda: sum(map(len, self.fan_ins().values())) == len(NODES))
        while True:
            calls = len(self.directly)
            await asyncio.sleep(4 * reporting.REPORT_INTERVAL_S)
            if calls == len(self.directly):
                return

    def step(self, number: int) -> None:
        for node, outbox in self.outboxes.items():
            outbox.push(node_step(number, loss=number / 8 if node == "a" else None))

    async def all_is_taken(self) -> None:
        await until(lambda: not any(outbox.reports() for outbox in self.outboxes.values()))

    def steps(self) -> list[int]:
        done = [event for event in self.events if isinstance(event, ev.StepsDone)]
        assert all(len(event.loss_millionths) == event.last - event.first + 1 for event in done), "no loss is missing"
        return [step for event in done for step in range(event.first, event.last + 1)]


def info_of(address: str) -> NodeInfo:
    return NodeInfo(ray_node="", address=address, host="", pid=0, ram_dir="", data_digest="", snapshots={})


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, work: Callable[[Agents], Awaitable[None]]) -> None:
    async def whole() -> None:
        agents = Agents(tmp_path, monkeypatch)
        await agents.start()
        try:
            await work(agents)
        finally:
            await agents.stop()

    asyncio.run(asyncio.wait_for(whole(), DEADLINE_S))


def test_nodes_are_sent_to_fan_ins_and_their_steps_come_as_one(tmp_path, monkeypatch):
    async def work(agents: Agents) -> None:
        await agents.all_go_through()
        assert len(agents.fan_ins()) == 2
        assert sorted(map(len, agents.fan_ins().values())) == [1, 2]
        calls = len(agents.directly)
        for number in range(21, 30):
            agents.step(number)
            await agents.all_is_taken()
        assert agents.steps() == list(range(21, 30))
        assert len(agents.directly) == calls, "nobody has called the controller"

    run(tmp_path, monkeypatch, work)


def test_heartbeats_arrive_and_those_of_a_node_that_is_gone_do_not(tmp_path, monkeypatch):
    async def work(agents: Agents) -> None:
        await agents.all_go_through()
        lost = next(node for node in NODES if node not in agents.fan_ins())
        agents.tasks[NODES.index(lost)].cancel()
        await asyncio.sleep(0.3)
        last = agents.body.agents[lost].heard_at
        others = [agents.body.agents[node] for node in NODES if node != lost]
        now = time.monotonic()
        await until(lambda: all(handle.heard_at > now + 0.5 for handle in others))
        assert agents.body.agents[lost].heard_at == last

    run(tmp_path, monkeypatch, work)


def test_when_a_fan_in_dies_its_nodes_report_by_another_way_and_nothing_is_lost(tmp_path, monkeypatch):
    async def work(agents: Agents) -> None:
        await agents.all_go_through()
        numbers = itertools.count(21)
        for _ in range(5):
            for node in list(agents.fan_ins()):
                agents.step(next(numbers))
                await agents.servers[node].close()
                agents.step(next(numbers))
                agents.body.agents[node].info = info_of(await agents.serve(node))
            await agents.all_is_taken()
        assert agents.steps() == list(range(21, next(numbers)))
        await agents.all_go_through()

    run(tmp_path, monkeypatch, work)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_fan_in_that_hangs_or_dies_makes_nobody_look_dead(tmp_path, monkeypatch, how):
    """It is a process of its own, the only one that can be a fan-in, and hears all three."""
    monkeypatch.setattr(fanin, "FAN_IN_NODES", 3)

    async def work(agents: Agents, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        address = (await process.stdout.readline()).decode().strip()
        agents.body.agents["a"].info = info_of(address)
        agents.body.agents["a"].line = asyncio.current_task()  # type: ignore[assignment]
        await agents.all_go_through()
        assert list(agents.fan_ins()) == ["a"]
        agents.step(21)
        await agents.all_is_taken()
        calls = len(agents.directly)
        process.send_signal(how)
        await until(lambda: is_out_of_work(process.pid))
        longest_s = 0.0
        agents.step(22)
        while any(outbox.reports() for outbox in agents.outboxes.values()):
            now = time.monotonic()
            longest_s = max(longest_s, *(now - handle.heard_at for handle in agents.body.agents.values()))
            await asyncio.sleep(0.01)
        assert agents.steps() == [21, 22]
        assert set(agents.directly[calls:]) == set(NODES), "each has gone the direct way"
        assert longest_s < fanin.PATIENCE_S + reporting.SPREAD_S + 5.0, "and a core may be taken for a while"

    async def with_process(agents: Agents) -> None:
        for handle in agents.body.agents.values():
            handle.line = None
        command = (sys.executable, "-c", FAN_IN_PROCESS, TOKEN)
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            await work(agents, process)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    run(tmp_path, monkeypatch, with_process)


def is_out_of_work(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


FAN_IN_PROCESS = """
import asyncio, sys
from orchestrator.runtime import fanin
from storage.peer import PeerServer

async def serve():
    fan_in = fanin.FanIn()
    services = {fanin.COLLECT: fan_in.collect, fanin.REPORT: fan_in.report}
    print(await PeerServer("127.0.0.1", sys.argv[1], "/nowhere", "r", "n", services).start(), flush=True)
    await asyncio.sleep(60)

asyncio.run(serve())
"""


def test_nothing_is_forgotten_while_the_controller_is_behind_and_nobody_is_silent(tmp_path, monkeypatch):
    async def work(agents: Agents) -> None:
        await agents.all_go_through()
        calls, agents.behind = len(agents.directly), True
        agents.step(21)
        began = time.monotonic()
        handles = agents.body.agents.values()
        await until(lambda: all(handle.heard_at > began + 2 * fanin.PATIENCE_S for handle in handles))
        assert agents.steps() == []
        assert all(len(outbox.reports()) == 1 for outbox in agents.outboxes.values())
        assert len(agents.directly) == calls, "who is answered stays"
        agents.behind = False
        await agents.all_is_taken()
        assert agents.steps() == [21]

    run(tmp_path, monkeypatch, work)


def test_what_only_one_node_can_tell_comes_in_its_place(tmp_path, monkeypatch):
    async def work(agents: Agents) -> None:
        await agents.all_go_through()
        agents.step(21)
        agents.outboxes["b"].push(Exited(generation=4, rank=1, exit_code=None, signal=9))
        agents.step(22)
        await agents.all_is_taken()
        kinds = [type(event) for event in agents.events]
        assert kinds.index(ev.WorkerExited) == 1, kinds
        assert agents.steps() == [21, 22]

    run(tmp_path, monkeypatch, work)


def test_a_node_that_the_controller_does_not_know_is_sent_away(tmp_path, monkeypatch):
    async def work(agents: Agents) -> None:
        await agents.all_go_through()
        stranger = next(node for node in NODES if node not in agents.fan_ins())
        calls = agents.directly.count(stranger)
        del agents.body.agents[stranger]
        await until(lambda: agents.directly.count(stranger) > calls)

    run(tmp_path, monkeypatch, work)


# --- the services alone ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def fan_in_served() -> AsyncIterator[Callable[..., Any]]:
    """A fan-in; what it gives opens a wire to it, and reads the first answer."""
    fan_in = FanIn()
    services = {fanin.COLLECT: fan_in.collect, fanin.REPORT: fan_in.report}
    server = PeerServer("127.0.0.1", TOKEN, "/nowhere", "r", "n", services)
    address = await server.start()

    @asynccontextmanager
    async def wire(op: str, epoch: int, node: str = "a") -> AsyncIterator[Wire]:
        async with open_wire(address, TOKEN, {"op": op, "epoch": epoch, "node": node}) as opened:
            await opened.receive(DEADLINE_S)
            yield opened

    try:
        yield wire
    finally:
        await server.close()


async def ends(wire: Wire) -> bool:
    try:
        while True:
            await wire.receive(DEADLINE_S)
    except PeerError:
        return True


def alone(work: Callable[[Callable[..., Any]], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with fan_in_served() as wire:
            await work(wire)

    asyncio.run(asyncio.wait_for(whole(), DEADLINE_S))


def test_reports_go_to_the_controller_that_the_agent_answers_to():
    async def work(wire: Callable[..., Any]) -> None:
        with pytest.raises(PeerRefused, match="no controller of epoch 1"):
            async with wire(fanin.REPORT, 1):
                pass
        async with wire(fanin.COLLECT, 1):
            async with wire(fanin.REPORT, 1):
                pass
            with pytest.raises(PeerRefused, match="no controller of epoch 2"):
                async with wire(fanin.REPORT, 2):
                    pass

    alone(work)


def test_a_newer_controller_takes_the_fan_in_over_and_an_older_does_not():
    async def work(wire: Callable[..., Any]) -> None:
        async with wire(fanin.COLLECT, 1) as first, wire(fanin.REPORT, 1) as member:
            async with wire(fanin.COLLECT, 2):
                with pytest.raises(PeerRefused, match="collects here no more"):
                    await member.receive(DEADLINE_S)
                assert await ends(first)
                with pytest.raises(PeerRefused, match="epoch 2 collects here"):
                    async with wire(fanin.COLLECT, 1):
                        pass

    alone(work)


def test_an_answer_to_an_agent_waits_for_the_controllers():
    async def work(wire: Callable[..., Any]) -> None:
        async with wire(fanin.COLLECT, 1) as controller, wire(fanin.REPORT, 1) as member:
            await member.send({"after": 0, "told": [[5, encode(node_step(21))]]})
            frame = await controller.receive(DEADLINE_S)
            while not frame["told"]:
                frame = await controller.receive(DEADLINE_S)
            with pytest.raises(PeerError, match="silent"):
                await member.receive(0.2)
            assert frame == {"after": 0, "heard": ["a"], "told": [[{"a": 5}, encode(node_step(21))]]}

    alone(work)


def test_what_is_said_while_reports_are_under_way_follows_when_they_are_taken():
    async def work(wire: Callable[..., Any]) -> None:
        async with wire(fanin.COLLECT, 1) as controller, wire(fanin.REPORT, 1) as member:

            async def frames(count: int, taken: int) -> list[Any]:
                """What so many frames tell, each answered with what is taken so far."""
                told: list[Any] = []
                for _ in range(count):
                    told += (await controller.receive(DEADLINE_S))["told"]
                    await controller.send({"taken": taken, "strangers": []})
                return told

            for number in (1, 2):
                await member.send({"after": number - 1, "told": [[number, encode(node_step(20 + number))]]})
                while not (told := await frames(1, taken=number - 1)):
                    pass
                assert told == [[{"a": number}, encode(node_step(20 + number))]]
                if number == 1:
                    await member.send({"after": 1, "told": [[2, encode(node_step(22))]]})
                    assert await frames(5, taken=0) == []
                    assert await frames(1, taken=1) == []

    alone(work)


@pytest.mark.parametrize("told", [[[1, {"type": "Unknown"}]], [["x", {}]], 7, [[1, {"type": "NodeStep"}]]])
def test_who_says_what_is_no_report_is_cut_off_alone(told):
    async def work(wire: Callable[..., Any]) -> None:
        async with wire(fanin.COLLECT, 1) as controller, wire(fanin.REPORT, 1) as member:
            async with wire(fanin.REPORT, 1, "b") as other:
                await member.send({"after": 0, "told": told})
                with pytest.raises(PeerError):
                    await member.receive(DEADLINE_S)
                await other.send({"after": 0, "told": []})
                while "b" not in (await controller.receive(DEADLINE_S))["heard"]:
                    pass

    alone(work)
