"""What it costs to hear 12,500 nodes at 1 Hz: through fan-ins, and each by itself.

    python benchmarks/fanin.py [--nodes N] [--json PATH]

Real fan-ins in a process each, a real controller's side (`FanIns`, `Body`, `MeshFold`, and `Supervisor.handle` behind
them) in one more, real messages over TCP on this machine. Each node reports one step a second, all at the same moment,
as nodes that train in step do; then only heartbeats, spread over the second, as between long steps. The nodes are
senders in processes of their own, whose processor time is not counted. A small machine cannot run all of that in real
time: a second of load is sent in PACE_S, the waits of the fan-ins are as much longer, and processor time is divided by
the seconds of load. Without fan-ins the same reports go as Ray calls to an actor with the same controller's side in it,
as fast as it answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import resource
import statistics
import struct
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import ray
from rich.console import Console
from rich.table import Table

from orchestrator.core import events as ev
from orchestrator.core.actions import OpenGeneration
from orchestrator.core.supervisor import Supervisor
from orchestrator.localcluster import OBJECT_STORE_BYTES
from orchestrator.runtime import fanin
from orchestrator.runtime.body import Body
from orchestrator.runtime.fanin import FAN_IN_NODES, FanIn
from orchestrator.runtime.nodes import AgentHandle, NodeInfo
from orchestrator.runtime.reports import MeshFold, NodeStep, Report
from orchestrator.spec import JobSpec, parse
from storage import peer
from storage import wires as links
from trainer.contract import encode

NODES = 12_500
SLOTS_PER_NODE = 8
SECONDS = 10
PACE_S = 2.0
"""Of this machine's time for one second of the load: senders, 98 fan-ins and the controller share its cores."""
SENDERS = 2
LOADS = ("steps", "heartbeats")
SLICES = 20
"""Moments of each second at which a part of the nodes sends its heartbeat."""
OPENING = 16
"""Connections that one process opens at once."""
SETTLE_S, LINES_IDLE_S = 5, 10
LEAD_S = 2.0
"""Before the first second begins, so that all senders stand ready."""
DEADLINE_S = 300.0
HOST, TOKEN, EPOCH = "127.0.0.1", "benchmark", 1

fanin.BEAT_S, fanin.ANSWER_S = PACE_S * fanin.BEAT_S, PACE_S * fanin.ANSWER_S
# They would run out here when other programs take the cores.
fanin.PATIENCE_S = fanin.CONTROLLER_PATIENCE_S = links.HANDSHAKE_S = 60.0

fork = multiprocessing.get_context("fork")


class Ingest:
    """The controller's side: the body that hears, and the supervisor that it tells."""

    def __init__(self, nodes: int) -> None:
        spec = spec_of(nodes)
        self.supervisor = Supervisor()
        self.done_at: dict[int, float] = {}
        """Monotonic seconds at which the supervisor had taken each step."""
        none, never, installed = (lambda: 0), (lambda: False), (lambda: "")
        self.body = Body(spec, "n", TOKEN, EPOCH, "i", "", none, self.tell, print, none, never, good, installed)
        layout, limits = spec.layout, spec.limits
        self.tell(ev.RunDeclared(at=0, run="r", layout=layout, limits=limits, total_steps=10**9, capabilities=()))
        self.tell(ev.EpochBegan(at=0, epoch=EPOCH, version="benchmark"))
        for index in range(nodes):
            handle = AgentHandle(node=name_of(index), ray_node="", actor=None, group=None)
            self.body.agents[handle.node] = handle
            self.tell(ev.NodeJoined(at=0, node=handle.node, domain="", snapshots={}))
        self.tell(ev.GenerationReady(at=0, generation=1, step=0, rendezvous_us=1, build_us=1, restore_us=1))
        assert self.supervisor.state.job == "training"

    def tell(self, event: ev.Event) -> None:
        for action in self.supervisor.handle(event):
            if isinstance(action, OpenGeneration):
                ranks = len(action.nodes) * SLOTS_PER_NODE
                self.body.fold = MeshFold(generation=1, nodes=action.nodes, ranks=ranks, done=0)
        if isinstance(event, ev.StepsDone):
            self.done_at |= dict.fromkeys(range(event.first, event.last + 1), time.monotonic())


def good(node: str) -> str:
    return "good"


def spec_of(nodes: int) -> JobSpec:
    ranks = nodes * SLOTS_PER_NODE
    return parse(
        {
            "run": {"name": "fan-in", "steps": 10**9},
            "model": {"preset": "tiny"},
            "data": {"global_batch": ranks},
            "parallel": {"dp_replicate": ranks},
            "cluster": {"slots_per_node": SLOTS_PER_NODE},
        }
    )


def name_of(index: int) -> str:
    """As agents are named: eight digits of a Ray node's id."""
    return f"{index:08x}"


def node_step(step: int, tells_loss: bool) -> NodeStep:
    loss, grad_norm, lr = (2.5, 1.25, 1e-4) if tells_loss else (None, None, None)
    return NodeStep(
        generation=1,
        step=step,
        step_us=1_000_000,
        data_us=1_234,
        checkpoint_us=5_678,
        validation_us=0,
        tokens=16_777_216,
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
    )


def spent_s() -> float:
    """Processor time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# --- the processes: each answers what its pipe asks ------------------------------------------------------------------


class Process:
    def __init__(self, main: Callable[..., Any], *arguments: Any) -> None:
        self._pipe, theirs = fork.Pipe()
        self._process = fork.Process(target=_run, args=(main, theirs, *arguments), daemon=True)
        self._process.start()

    def ask(self, *question: Any) -> None:
        self._pipe.send(question)

    def answer(self) -> Any:
        assert self._pipe.poll(DEADLINE_S), "a process does not answer"
        return self._pipe.recv()

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _run(main: Callable[..., Any], pipe: Connection, *arguments: Any) -> None:
    asyncio.run(main(pipe, *arguments))


def together(processes: list[Process], *question: Any) -> list[Any]:
    for process in processes:
        process.ask(*question)
    return [process.answer() for process in processes]


async def serve_fan_in(pipe: Connection) -> None:
    fan_in = FanIn()
    services = {fanin.COLLECT: fan_in.collect, fanin.REPORT: fan_in.report}
    server = peer.PeerServer(HOST, TOKEN, "/nowhere", "r", "n", services)
    pipe.send(await server.start())
    while True:
        await asyncio.to_thread(pipe.recv)
        pipe.send(spent_s())


async def serve_controller(pipe: Connection, nodes: int, addresses: list[str]) -> None:
    ingest = Ingest(nodes)
    agents, fan_ins = ingest.body.agents, ingest.body._fan_ins
    for handle, address in zip(agents.values(), addresses, strict=False):
        handle.info = NodeInfo(ray_node="", address=address, host=HOST, pid=0, ram_dir="", data_digest="", snapshots={})
        handle.line = asyncio.create_task(asyncio.sleep(0))  # none: these are the agents that can be fan-ins
    fan_ins.keep()
    while len(fan_ins._members) < len(addresses):
        await asyncio.sleep(0.05)
    pipe.send([ingest.body.fan_in_for(node) for node in agents])
    while True:
        await asyncio.to_thread(pipe.recv)
        pipe.send((spent_s(), ingest.done_at))


async def send(pipe: Connection, nodes: list[int], addresses: list[str]) -> None:
    """Nodes that report steps when they are told to, and are alive in between."""
    async with AsyncExitStack() as stack:
        wires: dict[int, links.Wire] = {}
        told = 0
        beating = asyncio.create_task(beat(wires, told))
        for some in range(0, len(nodes), OPENING):
            opening = [open_one(stack, index, addresses[index]) for index in nodes[some : some + OPENING]]
            wires |= dict(zip(nodes[some:], await asyncio.gather(*opening), strict=False))
        pipe.send(len(wires))
        while True:
            load, began = await asyncio.to_thread(pipe.recv)
            await asyncio.sleep(began - time.monotonic())
            beating.cancel()
            if load == "steps":
                pipe.send(await report_steps(list(wires.items()), began))
                told = SECONDS
            else:
                pipe.send(await spread_heartbeats(list(wires.items()), told, began))
            beating = asyncio.create_task(beat(wires, told))
            for wire in wires.values() if load == "steps" else ():
                while (await wire.receive(DEADLINE_S))["taken"] < SECONDS:
                    pass
                await asyncio.sleep(0)
            pipe.send(len(wires))


async def open_one(stack: AsyncExitStack, index: int, address: str) -> links.Wire:
    request = {"op": fanin.REPORT, "node": name_of(index), "epoch": EPOCH}
    wire = await stack.enter_async_context(links.open_wire(address, TOKEN, request))
    await wire.receive(fanin.PATIENCE_S)
    return wire


async def beat(wires: dict[int, links.Wire], told: int) -> None:
    while True:
        for wire in list(wires.values()):
            wire.post({"after": told, "told": []})
        await asyncio.sleep(PACE_S)


async def report_steps(wires: list[tuple[int, links.Wire]], began: float) -> dict[int, float]:
    """One step a second from each; when the last of them was sent."""
    sent_at = {}
    for step in range(1, SECONDS + 1):
        frames = [report_frame(step, tells_loss) for tells_loss in (False, True)]
        await asyncio.sleep(max(0.0, began + PACE_S * (step - 1) - time.monotonic()))
        for index, wire in wires:
            wire.writer.write(frames[index == 0])
        sent_at[step] = time.monotonic()
    return sent_at


async def spread_heartbeats(wires: list[tuple[int, links.Wire]], told: int, began: float) -> dict[int, float]:
    """One a second from each; when the last of them was sent."""
    for part in range(SECONDS * SLICES):
        await asyncio.sleep(max(0.0, began + PACE_S * part / SLICES - time.monotonic()))
        for _, wire in wires[part % SLICES :: SLICES]:
            wire.post({"after": told, "told": []})
    return {SECONDS: time.monotonic()}


def report_frame(step: int, tells_loss: bool) -> bytes:
    document = {"after": step - 1, "told": [[step, encode(node_step(step, tells_loss))]]}
    body = json.dumps(document, separators=(",", ":")).encode()
    return struct.pack("<I", len(body)) + body


async def serve_lines(pipe: Connection, servers: int) -> None:
    """Agents that have nothing but lines."""
    started = [peer.PeerServer(HOST, TOKEN, "/nowhere", "r", "n") for _ in range(servers)]
    pipe.send([await server.start() for server in started])
    while True:
        await asyncio.to_thread(pipe.recv)
        pipe.send(sum(len(server._connections) for server in started))


async def hold_lines(pipe: Connection, nodes: int, addresses: list[str]) -> None:
    before = psutil.Process().memory_info().rss, spent_s()
    lines = []
    for index in range(nodes):
        lines.append(asyncio.create_task(links.hold_line(addresses[index % len(addresses)], TOKEN)))
        if index % OPENING == 0:
            await asyncio.sleep(0.02)
    await asyncio.sleep(SETTLE_S)
    opened = psutil.Process().memory_info().rss, spent_s()
    await asyncio.sleep(LINES_IDLE_S)
    idle_s = spent_s() - opened[1]
    pipe.send(
        {
            "bytes_a_line": (opened[0] - before[0]) / nodes,
            "open_us_a_line": (opened[1] - before[1]) / nodes * 1e6,
            "idle_s_a_second": idle_s / LINES_IDLE_S,
            "open": sum(not line.done() for line in lines),
        }
    )
    await asyncio.to_thread(pipe.recv)


# --- what is measured ------------------------------------------------------------------------------------------------


def through_fan_ins(nodes: int) -> dict[str, Any]:
    fan_ins = [Process(serve_fan_in) for _ in range(math.ceil(nodes / FAN_IN_NODES))]
    controller = Process(serve_controller, nodes, [fan_in.answer() for fan_in in fan_ins])
    addresses = controller.answer()
    assert all(addresses)
    # Nodes of one fan-in one after the other: they end a step within milliseconds, whatever the others' fan-ins do.
    by_fan_in = sorted(range(nodes), key=lambda index: addresses[index])
    senders = [Process(send, by_fan_in[which::SENDERS], addresses) for which in range(SENDERS)]
    assert sum(sender.answer() for sender in senders) == nodes
    found: dict[str, Any] = {"fan_ins": len(fan_ins)}
    for load in LOADS:
        before = sum(together(fan_ins, "spent")), together([controller], "spent")[0][0]
        began = time.monotonic() + LEAD_S
        sent_at = together(senders, load, began)
        assert sum(sender.answer() for sender in senders) == nodes, "not everything was taken"
        ((controller_s, done_at),) = together([controller], "spent")
        found[load] = {
            "fan_ins_s_a_second": (sum(together(fan_ins, "spent")) - before[0]) / SECONDS,
            "controller_s_a_second": (controller_s - before[1]) / SECONDS,
            "wall_s_a_second": (max(sent[SECONDS] for sent in sent_at) - began) / SECONDS,
        }
        if load == "steps":
            delays = [done_at[step] - max(sent[step] for sent in sent_at) for step in range(1, SECONDS + 1)]
            found[load]["step_to_event_s"] = {"median": statistics.median(delays), "max": max(delays)}
    for process in (*senders, controller, *fan_ins):
        process.end()
    return found


class Direct:
    """The actor that 12,500 agents would call: the controller's side, as `Controller.report` has it."""

    def __init__(self, nodes: int) -> None:
        self._ingest = Ingest(nodes)

    async def report(self, node: str, batch: list[tuple[int, Report]]) -> str:
        for event in self._ingest.body.hear(node, batch):
            self._ingest.tell(event)
        return self._ingest.body.fan_in_for(node)

    async def spent(self) -> float:
        return spent_s()


def directly(nodes: int) -> dict[str, Any]:
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
    )
    actor = ray.remote(Direct).remote(nodes)
    found = {}
    for load in LOADS:
        before, began = ray.get(actor.spent.remote()), time.monotonic()
        batches: list[list[tuple[int, Report]]] = [
            [(1, node_step(1, n == 0))] if load == "steps" else [] for n in range(nodes)
        ]
        ray.get([actor.report.remote(name_of(n), batch) for n, batch in enumerate(batches)])
        spent = ray.get(actor.spent.remote()) - before
        found[load] = {
            "controller_s_a_second": spent,
            "us_a_report": spent / nodes * 1e6,
            "wall_s_a_second": time.monotonic() - began,
        }
    ray.shutdown()
    return found


def lines(nodes: int) -> dict[str, Any]:
    agents = Process(serve_lines, math.ceil(nodes / peer.MAX_CONNECTIONS))
    controller = Process(hold_lines, nodes, agents.answer())
    found: dict[str, Any] = controller.answer()
    assert together([agents], "count") == [nodes] == [found.pop("open")], "not every line stands"
    controller.end()
    agents.end()
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=NODES, help="how many report")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    nodes = arguments.nodes
    found = {
        "nodes": nodes,
        "through": through_fan_ins(nodes),
        "lines": lines(nodes),
        "direct": directly(nodes),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(),
        "load_average": psutil.getloadavg()[1],
    }
    table = Table(title=f"processor seconds a second: {nodes:,} nodes at 1 Hz, {found['through']['fan_ins']} fan-ins")
    for column in ("", "fan-ins", "controller", "together", "without fan-ins", "without / with"):
        table.add_column(column, justify="right" if column else "left")
    for load in LOADS:
        through, direct_s = found["through"][load], found["direct"][load]["controller_s_a_second"]
        controller_s = through["controller_s_a_second"]
        both_s = through["fan_ins_s_a_second"] + controller_s
        through["direct_over_through"] = {"together": direct_s / both_s, "controller": direct_s / controller_s}
        figures = (through["fan_ins_s_a_second"], controller_s, both_s, direct_s, direct_s / both_s)
        table.add_row(load, *(f"{figure:.2f}" for figure in figures))
    Console().print(table)
    line, delay = found["lines"], found["through"]["steps"]["step_to_event_s"]
    Console().print(
        f"from a step's last report to StepsDone: {delay['median']:.2f} s, at most {delay['max']:.2f}\n"
        f"and {nodes:,} idle lines: {line['bytes_a_line'] / 1e3:.1f} kB and {line['open_us_a_line']:.0f} us to open "
        f"each, {line['idle_s_a_second']:.4f} processor seconds a second"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
