"""How soon failures are detected, on a cluster as `ray start` makes it, with Ray's own settings untouched.

    python benchmarks/detection.py [--exits 20] [--losses 5] [--silences 3] [--stops 5] [--loops 5] [--json PATH]
    python benchmarks/detection.py --clean-minutes 60 --exits 0 --losses 0 --silences 0 --stops 0 --loops 0

A head and three raylets on one machine, a mesh of two nodes with two ranks each, the third a spare. Each fault is done
from outside to real processes; its time is this machine's monotonic clock just before. When it was noticed is the
incident's own time in the journal, on the controller's clock, which is read against this machine's with the least
round trip of some. What a rank does in a loop it begins by itself, and says when. A clean run has two more processes on
each CPU that do nothing but compute, and counts false alarms.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from orchestrator.chaos import node as chaos
from orchestrator.observe.status import IncidentStatus, Status
from orchestrator.runtime import driver
from orchestrator.runtime.controller import namespace_of
from orchestrator.runtime.nodes import agent_name
from orchestrator.spec import parse

NODES = 3
WAIT_S = 400.0
CLOCK_LOOKS = 20
HERE = Path(__file__).resolve().parent

# In each rank's training loop: while there is a file of its rank, say when, and loop.
LOOP = """
import pathlib, time
order = pathlib.Path({folder!r}, f"loop-{{session.rank}}")
if order.exists():
    order.unlink()
    pathlib.Path({folder!r}, "began").write_text(str(time.monotonic()))
    while True:
        time.sleep(0.01)
"""


def free_port() -> int:
    for port in random.sample(range(20_000, 30_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


class Cluster:
    """`ray start --head` and more nodes, each a process family of its own."""

    def __init__(self) -> None:
        self.port = free_port()
        self.families: list[subprocess.Popen[bytes]] = []
        ports = (f"--port={self.port}", f"--ray-client-server-port={free_port()}")
        self._start("--head", *ports, "--num-cpus=0", "--include-dashboard=false")
        host = str(ray.util.get_node_ip_address())
        self.address = f"{host}:{self.port}"
        deadline = time.monotonic() + WAIT_S
        while True:
            with suppress(OSError), socket.create_connection((host, self.port), timeout=1.0):
                return
            assert time.monotonic() < deadline, "Ray's head does not come up"
            time.sleep(0.2)

    def add_node(self) -> None:
        self._start(f"--address={self.address}", "--num-cpus=2")

    def _start(self, *options: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *options]
        command.append("--object-store-memory=100000000")
        quiet = subprocess.DEVNULL
        self.families.append(subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True))

    def close(self) -> None:
        members = []
        for family in self.families:
            with suppress(psutil.NoSuchProcess):
                members += [*psutil.Process(family.pid).children(recursive=True), psutil.Process(family.pid)]
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(members, timeout=20)


def await_nodes(count: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while sum(node["Alive"] for node in ray.nodes()) < count:
        assert time.monotonic() < deadline, f"Ray has no {count} nodes within {WAIT_S:g} s"
        time.sleep(0.2)


class Run:
    """A job that trains while it is hurt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        corpus = folder / "corpus"
        corpus.mkdir()
        for document in range(100):  # some of them make up the validation split
            text = " ".join(f"Sheep {n % 31} follows sheep {(n + document) % 31}." for n in range(100))
            (corpus / f"{document:02}.txt").write_text(text)
        self.spec = parse(
            {
                "run": {
                    "name": "detect",
                    "url": str(folder / "run"),
                    "steps": 10**6,
                    "validation_interval_steps": 10**6,
                },
                "model": {"preset": "tiny"},
                "data": {
                    "corpus": str(corpus),
                    "seq_len": 32,
                    "validation_batches": 1,
                    "cache_dir": str(folder / "data"),
                },
                "parallel": {"pp": 2, "dp_replicate": 2, "microbatches": 2},
                "checkpoint": {"interval_steps": 10**6},
                "recovery": {"strikes": 10**6, "recoveries_without_progress": 10**6},
                "cluster": {
                    "slots_per_node": 2,
                    "spares": NODES - 2,
                    "log_dir": str(folder / "logs"),
                    "ram_dir": str(folder / "ram"),
                },
            }
        )
        self.controller, self.token = driver.start(self.spec, detached=True)
        self.offset_s = 0.0

    def status(self) -> Status:
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                return driver.poll(self.controller)[0]
            except ray.exceptions.RayActorError:  # it comes back, and its journal tells what was
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def await_(self, condition: Callable[[Status], Any], what: str) -> Status:
        deadline = time.monotonic() + WAIT_S
        while True:
            status = self.status()
            assert not status.ended, f"the run has ended: {status.verdict}"
            if condition(status):
                return status
            assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for {what}; the run: {status.job}"
            time.sleep(0.05)

    def await_training(self) -> Status:
        """All closed, and some new steps done, so that the pace is known."""
        calm = self.await_(lambda s: s.job == "training" and all(i.total_s is not None for i in s.incidents), "calm")
        return self.await_(lambda s: s.job == "training" and s.step >= calm.step + 10, "steps")

    def read_clock(self) -> None:
        """The run's clock less this machine's."""
        looks = []
        for _ in range(CLOCK_LOOKS):
            began = time.monotonic()
            run_s = self.status().wall_clock_s
            ended = time.monotonic()
            looks.append((ended - began, run_s - (began + ended) / 2))
        self.offset_s = min(looks)[1]

    def agent(self, node: str) -> Any:
        return ray.get_actor(agent_name(node), namespace_of(self.spec.run.name))

    def hurt(self, harm: Callable[[Status], float]) -> tuple[float, IncidentStatus]:
        """Seconds from the harm, whose time on this machine's clock `harm` returns, to the incident."""
        calm = self.await_training()
        self.read_clock()
        began = harm(calm)
        seen = self.await_(lambda s: len(s.incidents) > len(calm.incidents), "the incident")
        incident = seen.incidents[len(calm.incidents)]
        return incident.at_s - self.offset_s - began, incident


def measure(cluster: Cluster, run: Run, arguments: argparse.Namespace) -> dict[str, list[float]]:
    def worker(signum: int) -> Callable[[Status], float]:
        def harm(status: Status) -> float:
            pid = ray.get(run.agent(status.mesh[1]).workers.remote(), timeout=10)[3]
            at = time.monotonic()
            os.kill(pid, signum)
            return at

        return harm

    def loop(status: Status) -> float:
        order, began = run.folder / "loop-2", run.folder / "began"
        began.unlink(missing_ok=True)
        order.touch()
        while not began.exists() or not began.read_text():
            time.sleep(0.01)
        return float(began.read_text())

    def node(signum: int) -> Callable[[Status], float]:
        def harm(status: Status) -> float:
            info = ray.get(run.agent(status.mesh[1]).describe.remote(), timeout=10)
            family = chaos.family_of(info.pid)
            at = time.monotonic()
            if signum == signal.SIGKILL:
                chaos.kill_node(info.pid, info.ram_dir, run.spec.run.name, info.ray_node)
            else:
                for process in family:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(signum)
                stopped.append(family)
            cluster.add_node()
            return at

        return harm

    stopped: list[list[psutil.Process]] = []
    kinds: list[tuple[str, int, Callable[[Status], float]]] = [
        ("worker exit (SIGKILL)", arguments.exits, worker(signal.SIGKILL)),
        ("worker stopped (SIGSTOP)", arguments.stops, worker(signal.SIGSTOP)),
        ("endless loop in one rank", arguments.loops, loop),
        ("node lost (SIGKILL of all its processes)", arguments.losses, node(signal.SIGKILL)),
        ("node silent (SIGSTOP of all its processes)", arguments.silences, node(signal.SIGSTOP)),
    ]
    found: dict[str, list[float]] = {}
    for name, times, harm in kinds:
        for _ in range(times):
            seconds, incident = run.hurt(harm)
            found.setdefault(name, []).append(round(seconds, 3))
            print(f"{name}: {seconds:.3f} s; {incident.cause}, {incident.detail[:90]}", flush=True)
            while stopped:
                for process in stopped.pop():
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
    return found


def train_cleanly(run: Run, minutes: float) -> dict[str, Any]:
    """Training beside other load: what is found, and ought not to be."""
    began = run.await_training()
    command = [sys.executable, "-c", "while True: pass"]
    load = [subprocess.Popen(command) for _ in range(2 * (os.cpu_count() or 1))]
    slow: set[str] = set()
    try:
        deadline = time.monotonic() + 60 * minutes
        while time.monotonic() < deadline:
            status = run.status()
            slow |= set(status.slow)
            time.sleep(1.0)
    finally:
        for process in load:
            process.kill()
            process.wait()
    alarms = [f"{i.cause}: {i.detail}" for i in status.incidents[len(began.incidents) :]]
    return {"minutes": minutes, "steps": status.step - began.step, "incidents": alarms, "slow_nodes": sorted(slow)}


@contextmanager
def looped(folder: Path) -> Iterator[None]:
    """Lets the workers of the run look for their order to loop; see tests/cluster/sitecustomize.py."""
    (folder / "detect.py").write_text(LOOP.format(folder=str(folder)))
    tests = HERE.parent / "tests" / "cluster"
    os.environ["SHEPHERD_TEST_FAULTS"] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tests), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("exits", 20), ("stops", 5), ("loops", 5), ("losses", 5), ("silences", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--clean-minutes", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the cluster goes, too
    with tempfile.TemporaryDirectory() as folder, looped(Path(folder)):
        cluster = Cluster()
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            for number in range(NODES):  # one after the other: they choose their ports by themselves
                cluster.add_node()
                await_nodes(number + 2)
            run = Run(Path(folder))
            found = measure(cluster, run, arguments)
            clean = train_cleanly(run, arguments.clean_minutes) if arguments.clean_minutes else None
            driver.stop(run.controller, run.token, by="the benchmark", graceful=False)
        finally:
            ray.shutdown()  # a driver that misses its cluster ends the process before it has told what went wrong
            cluster.close()
    rows = {}
    for name, seconds in found.items():
        ordered = sorted(seconds)
        p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
        rows[name] = {"n": len(seconds), "median_s": statistics.median(seconds), "p95_s": p95, "max_s": max(seconds)}
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in rows[name].items()))
    if clean is not None:
        print(f"clean training beside other load: {clean}")
    if arguments.json:
        recovery = run.spec.recovery
        told = {name: getattr(recovery, name) for name in ("node_silence_s", "rank_silence_s", "stall_floor_s")}
        machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
        document = {"machine": machine, "settings": told, "seconds": rows, "each_s": found, "clean": clean}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
