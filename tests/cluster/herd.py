"""Runs on the test cluster: a small job, started as the command starts it, watched and hurt."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from orchestrator import localcluster, preflight
from orchestrator.chaos import faults
from orchestrator.observe.status import Status
from orchestrator.runtime import driver
from orchestrator.runtime.controller import namespace_of
from orchestrator.runtime.nodes import agent_name
from orchestrator.spec import JobSpec, parse
from storage.commits import read_commit, state_digest, verify

# The longest that a small run or a wait may take on a loaded machine before the test has failed.
RUN_S = 180.0
DEVICE = os.environ.get("SHEPHERD_TEST_DEVICE", "cpu")
"""On which these jobs train; on "cuda" all workers share one GPU, which each Ray node has as many times as CPUs."""
# The promise: after a stop no process of the run is left on any node.
GONE_WITHIN_S = 30.0
TIME_TO_PARK = {"halt_deadline_s": 20, "park_deadline_s": 10}
"""For tests of who keeps its process, on a machine that stands still for seconds."""
# Relative, of the losses of two meshes: float32 sums in another order, over 60 steps; measured is 3e-6.
LOSS_TOLERANCE = 3e-5


def job(name: str, folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A document: four ranks (pp 2 x dp_replicate 2) on two nodes, and a model of 0.3 M parameters."""
    document: dict[str, dict[str, Any]] = {
        "run": {"name": name, "url": str(folder / name), "steps": 24, "validation_interval_steps": 24},
        "model": {"preset": "tiny"},
        "data": {"seq_len": 32, "global_batch": 8, "validation_batches": 1, "cache_dir": str(cache_dir(folder))},
        "parallel": {"pp": 2, "dp_replicate": 2, "microbatches": 2},
        "optimizer": {"lr": 3e-3, "warmup_steps": 4},
        "checkpoint": {"interval_steps": 10},
        # Who is found by a closed connection or a dead process need not be found by silence, too: a machine that is
        # busy with other things is silent. Tests of silence set their own.
        "recovery": {"node_silence_s": 60, "rank_silence_s": 30, "stall_floor_s": 30, "driver_lease_s": 30},
        "cluster": {
            "slots_per_node": 2,
            "device": DEVICE,
            "log_dir": str(folder / "logs"),
            "ram_dir": str(folder / "ram"),
        },
    }
    for section, fields in sections.items():
        document.setdefault(section, {}).update(fields)
    corpus = folder / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    document["data"].setdefault("corpus", str(corpus))
    return document


def cache_dir(folder: Path) -> Path:
    """Shared by all tests of a session, so that data is prepared once."""
    return folder.parent / "data-cache"


def write_corpus(folder: Path) -> None:
    """Text that can be learned, the same for every test."""
    folder.mkdir()
    for document in range(40):
        pairs = (((document * 7 + n) % 31, (document * 7 + n + 1) % 31) for n in range(120))
        (folder / f"{document:02d}.txt").write_text(" ".join(f"Sheep {a} follows sheep {b}." for a, b in pairs))


def train(
    spec: JobSpec, on_status: Callable[[Status], None] = lambda status: None, resume: bool = False
) -> tuple[Status, list[str]]:
    """Run a job to its end as `shepherd train` does; its last status and everything that it told."""
    preflight.check_local(spec, resume)
    preflight.check_cluster(spec)
    controller, token = driver.start(spec, detached=False)
    told: list[str] = []
    deadline = time.monotonic() + RUN_S

    def news(status: Status, lines: list[str]) -> None:
        told.extend(lines)
        assert time.monotonic() < deadline, f"the run does not end: {status.job} at step {status.step}: {told}"
        on_status(status)

    status = driver.follow(spec.run.name, controller, token, news)
    await_gone(spec.run.name)
    return status, told


def final_digest(spec: JobSpec) -> str:
    """Names the final state of a run, after reading it back."""
    commit = read_commit(spec.run.url, spec.run.steps)
    assert verify(spec.run.url, commit) == []
    return state_digest(spec.run.url, commit)


def await_gone(run: str) -> None:
    """Until the run's controller has ended."""

    def gone() -> bool:
        try:
            driver.find(run)
        except driver.RunError:
            return True
        return False

    wait_for(gone, 40.0, f"the controller of {run} to end")


def wait_for(condition: Callable[[], Any], deadline_s: float, what: str) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {deadline_s:g} s for {what}"
        time.sleep(0.05)


def gpus_of(cpus: int) -> int:
    """What a Ray node with so many CPUs says of its GPUs."""
    return cpus if DEVICE == "cuda" else 0


def replace_dead_nodes(ray_cluster: Any, cpus: int) -> None:
    """With as many GPUs as the tests' nodes have."""
    localcluster.replace_dead_nodes(ray_cluster, cpus, gpus_of(cpus))


def look(controller: Any, lease: bool = False) -> Status | None:
    """One look at a run; None while its controller does not answer, as one that begins or comes back does not."""
    try:
        return driver.poll(controller, lease=lease)[0]
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return None


def kill_worker(spec: JobSpec, status: Status, rank: int) -> None:
    node = status.mesh[rank // spec.cluster.slots_per_node]
    faults.kill_worker(namespace_of(spec.run.name), node, rank, status.step)


def worker_pids(spec: JobSpec, status: Status) -> dict[int, int]:
    """Process ids of the mesh's workers by rank."""
    agents = [ray.get_actor(agent_name(node), namespace_of(spec.run.name)) for node in status.mesh]
    found: dict[int, int] = {}
    for pids in ray.get([agent.workers.remote() for agent in agents], timeout=30):
        found |= pids
    return found


@contextmanager
def command(*arguments: str, **environment: str) -> Any:
    """`python -m orchestrator ...` as a process of its own; killed at the end if it is still there."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "orchestrator", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


_PORTS = iter(random.sample(range(20_000, 30_000), 10_000))


def free_port() -> int:
    """One that stays free until it is bound: not of those that the kernel gives to whoever asks for any, and none that
    this process has been given before."""
    for port in _PORTS:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


@contextmanager
def ray_started(*options: str, environment: dict[str, str] | None = None) -> Iterator[str]:
    """A cluster of one node with two CPUs as `ray start --head` makes it, with `environment` added; its address."""
    port = free_port()
    # As from an activated environment: jobs find `python` there.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [
            Path(sys.executable).with_name("ray"),
            "start",
            "--head",
            "--block",
            "--num-cpus=2",
            f"--port={port}",
            f"--ray-client-server-port={free_port()}",
            *options,
        ],
        env={**os.environ, "PATH": path, **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    family = psutil.Process(process.pid)
    try:
        yield f"{_ray_address(family)}:{port}"
    finally:
        members = [family, *family.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(members, timeout=20)
        for member in alive:
            member.kill()


def _ray_address(family: psutil.Process) -> str:
    """The node's address, from the raylet's own command line."""

    def raylet() -> list[str]:
        for process in family.children(recursive=True):
            with suppress(psutil.Error):
                if "raylet" in process.name():
                    return process.cmdline()
        return []

    command: list[str] = wait_for(raylet, 60, "the raylet")
    return next(part.partition("=")[2] for part in command if part.startswith("--node_ip_address="))


def leftovers(ram_dir: Path) -> list[str]:
    """What a run has left behind on this machine: worker processes, actors and snapshots."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "orchestrator.runtime.zygote" in command or command.startswith(("ray::Agent", "ray::Controller")):
            found.append(f"{process.pid} {command}")
    # Unlike rglob this goes on when a folder goes meanwhile.
    return found + [os.path.join(folder, file) for folder, _, files in os.walk(ram_dir) for file in files]


def await_nothing_left(ram_dir: Path) -> None:
    deadline = time.monotonic() + GONE_WITHIN_S
    while left := leftovers(ram_dir):
        assert time.monotonic() < deadline, f"still there after {GONE_WITHIN_S:g} s: {left}"
        time.sleep(0.05)


def spec_file(document: dict[str, Any], path: Path) -> Path:
    import tomli_w

    path.write_text(tomli_w.dumps(document))
    return path


def spec_of(document: dict[str, Any]) -> JobSpec:
    return parse(document)
