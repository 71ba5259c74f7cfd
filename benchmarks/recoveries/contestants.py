"""Who takes part in recovery.py, and how each is started: as its own documentation advises."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from orchestrator.localcluster import local_cluster
from recoveries.job import Job
from recoveries.marks import Recovery
from recoveries.nodes import Node, raylet_of, replace_dead_nodes

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE.parent), str(ROOT)])
END_S, SPARE_S = 30.0, 120.0
CALL_S = 60.0
SHARED_STORE_OFF = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it, gloo of torch 2.13 reads the addresses of the attempt before from the agent's store, and hangs."""


@dataclass
class Running:
    """One contestant's run of a job."""

    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    explain: Callable[[list[Recovery]], None] = lambda recoveries: None
    """Adds to the stages of all recoveries of this run, in their order, what the contestant itself tells."""
    node_of: Callable[[int], Node] | None = None
    """The node of a worker's process; None where all ranks live on one."""
    mend: Callable[[], None] = lambda: None
    """Brings a new node for one that has died, and waits until it is a spare."""

    def check(self) -> None:
        """Raises ContestantFailed when it has ended."""
        if self.process.poll() is not None:
            raise ContestantFailed(f"it has ended with exit code {self.process.returncode}: {self.last_words()}")

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]


class ContestantFailed(RuntimeError):
    """It has ended, or has not recovered in time."""


@dataclass(frozen=True)
class Contestant:
    configuration: str
    start: Callable[[Job, str], AbstractContextManager[Running]]
    """With the Python of the peers' environment."""
    layouts: tuple[str, ...] = ("full", "small", "dp")
    guest: bool = False
    """Lives in the peers' environment."""
    has_nodes: bool = False
    """A whole node can be killed, with a spare at hand."""
    shrinks: bool = False
    """Goes on without those that were killed."""


@contextmanager
def process(job: Job, command: list[str], **env: str) -> Iterator[Running]:
    """A launcher and all that it starts; none of it is left at the end."""
    log = job.folder / "log"
    with open(log, "ab") as said:
        started = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH, **env},
            cwd=job.folder,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    try:
        yield Running(job=job, process=started, log=log)
    finally:
        end(started)


def end(started: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a process and all under it."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(started.pid)
        family = [parent, *parent.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    started.wait(END_S)
    psutil.wait_procs(family, END_S)


# --- ours ------------------------------------------------------------------------------------------------------------


@contextmanager
def shepherd(job: Job, python: str) -> Iterator[Running]:
    """`shepherd train` on a local Ray cluster of as many raylets as the layout has nodes."""
    del python
    import tomli_w

    spec = job.spec()
    file = job.folder / "job.toml"
    file.write_text(tomli_w.dumps(spec.document()))
    hook = os.pathsep.join([str(HERE / "hook"), PATH])
    command = [sys.executable, "-P", "-m", "orchestrator"]
    try:
        with cluster_of(job, PYTHONPATH=hook, RECOVERY_MARKS=str(job.marks)) as cluster:
            address = ["--address", cluster.address]
            with process(job, [*command, "train", str(file), *address], PYTHONPATH=hook) as running:
                running.explain = lambda recoveries: explain_ours(spec.run.name, spec.run.url, recoveries)
                running.node_of = lambda pid: node_of_ours(cluster, pid, Path(spec.cluster.ram_dir))
                running.mend = lambda: mend_ours(cluster, job, spec.run.name)
                yield running
                stop = [*command, "stop", spec.run.name, "--now", "--log-dir", spec.cluster.log_dir, *address]
                subprocess.run(stop, timeout=CALL_S, capture_output=True)
                with suppress(subprocess.TimeoutExpired):
                    running.process.wait(END_S)
    finally:
        shutil.rmtree(spec.cluster.ram_dir, ignore_errors=True)


@contextmanager
def cluster_of(job: Job, **env: str) -> Iterator[Any]:
    """A Ray cluster with a raylet for each node of the layout, and for each spare."""
    with environment(OMP_NUM_THREADS="1", **env), local_cluster(job.nodes + job.spares, job.slots_per_node) as cluster:
        yield cluster


def node_of_ours(cluster: Any, pid: int, ram_dir: Path) -> Node:
    """With its snapshots: a real node takes its memory with it."""
    node = raylet_of(pid)
    raylets = {member.all_processes["raylet"][0].process.pid: member.node_id for member in cluster.worker_nodes}
    name = raylets[node.processes[0].pid]

    def forget() -> None:
        for folder in ram_dir.rglob(f"*{name}*"):
            shutil.rmtree(folder, ignore_errors=True)

    return Node(node.processes, forget)


def mend_ours(cluster: Any, job: Job, run: str) -> None:
    from orchestrator.runtime import driver

    replace_dead_nodes(cluster, job.slots_per_node)
    deadline = time.monotonic() + SPARE_S
    while "spare" not in driver.poll(driver.find(run))[0].nodes.values():
        if time.monotonic() > deadline:
            raise ContestantFailed(f"waited {SPARE_S:g} s for a spare")
        time.sleep(0.2)


def explain_ours(run: str, url: str, recoveries: list[Recovery]) -> None:
    """From the incidents that `shepherd status --json` tells, on the run's clock."""
    from orchestrator.runtime import driver

    status, _ = driver.poll(driver.find(run))
    claims = sorted(Path(url, "epochs").glob("*.json"))
    began_s = json.loads(claims[0].read_text())["began_unix_us"] / 1e6
    incidents = [i for i in status.incidents if i.total_s is not None]
    for recovery in recoveries:
        end_at = recovery.killed_at + recovery.new_step_s
        mine = [i for i in incidents if recovery.killed_at <= began_s + i.at_s <= end_at]
        if len(mine) != 1:
            continue
        (incident,) = mine
        at_s = began_s + incident.at_s - recovery.killed_at
        recovery.stages["detected"] = at_s
        laps = {
            "down": incident.teardown_s,
            "built": incident.restart_s,
            "restored": incident.restore_s,
        }
        for name, lap_s in laps.items():
            at_s += lap_s or 0.0
            recovery.stages[name] = at_s


@contextmanager
def environment(**env: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- peers -----------------------------------------------------------------------------------------------------------


def torchrun(job: Job, python: str) -> AbstractContextManager[Running]:
    del python
    return elastic(job, [sys.executable, "-m", "torch.distributed.run"])


def nvrx(job: Job, python: str) -> AbstractContextManager[Running]:
    launcher = str(Path(python).with_name("ft_launcher"))
    return elastic(job, [launcher, "--ignore-missing-fault-tol-cfg", "--ft-restart-policy", "any-failed"])


def elastic(job: Job, launcher: list[str]) -> AbstractContextManager[Running]:
    """torchrun, or what takes its arguments: an agent for all ranks, or with spares one for each node."""
    script = ["--max-restarts", "1000", "-m", "recoveries.rank", job_file(job)]
    if not job.spares:
        standalone = [*launcher, "--standalone", "--nproc-per-node", str(job.world_size), *script]
        return process(job, standalone, **SHARED_STORE_OFF)
    port = free_port()
    rendezvous = ["--rdzv-id", "recovery", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    nodes = ["--nnodes", str(job.nodes), "--nproc-per-node", str(job.slots_per_node), "--local-addr", "127.0.0.1"]
    return agents(job, port, [*launcher, *rendezvous, "--rdzv-conf", "is_host=false", *nodes, *script])


@contextmanager
def agents(job: Job, port: int, command: list[str]) -> Iterator[Running]:
    """An agent for each node and each spare, and their rendezvous store in a process that no kill meets."""
    with ExitStack() as stack:
        running = stack.enter_context(process(job, [sys.executable, "-m", "recoveries.store", str(port)]))

        def start() -> subprocess.Popen[bytes]:
            return stack.enter_context(process(job, command, **SHARED_STORE_OFF)).process

        started = [start() for _ in range(job.nodes + job.spares)]

        def node_of(pid: int) -> Node:
            family = [psutil.Process(pid), *psutil.Process(pid).parents()]
            agent = next(member for member in family if member.pid in {agent.pid for agent in started})
            return Node([agent, *agent.children(recursive=True)])

        running.node_of = node_of
        running.mend = lambda: started.append(start())
        yield running


def forkserver(job: Job, python: str) -> AbstractContextManager[Running]:
    del python
    command = [sys.executable, "-m", "recoveries.forkserver_agent", job_file(job), str(job.world_size)]
    return process(job, command, **SHARED_STORE_OFF)


@contextmanager
def ray_train(job: Job, python: str) -> Iterator[Running]:
    nodes = [str(job.nodes + job.spares), str(job.slots_per_node)]
    cluster = subprocess.Popen(
        [python, "-m", "recoveries.ray_cluster", *nodes],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=open(job.folder / "cluster.log", "wb"),  # noqa: SIM115 the child's
        text=True,
    )
    assert cluster.stdin is not None and cluster.stdout is not None

    def mend() -> None:
        cluster.stdin.write("mend\n")
        cluster.stdin.flush()
        answer()

    def answer() -> str:
        """A line of the cluster; raises ContestantFailed when none comes."""
        if not select.select([cluster.stdout], [], [], SPARE_S)[0] or not (line := cluster.stdout.readline()):
            raise ContestantFailed(f"the Ray cluster does not answer: {(job.folder / 'cluster.log').read_text()}")
        return line.strip()

    try:
        address = answer()
        with process(job, [python, "-m", "recoveries.ray_train", job_file(job), address]) as running:
            running.node_of, running.mend = raylet_of, mend
            yield running
        cluster.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            cluster.wait(END_S)
    finally:
        end(cluster)


@contextmanager
def torchft(job: Job, python: str, **lighthouse_ms: int) -> Iterator[Running]:
    """A lighthouse, and a torchrun for each replica that starts its one worker again."""
    replicas = job.world_size
    port = free_port()
    options = [f"--{name}={value}" for name, value in lighthouse_ms.items()]
    with ExitStack() as stack:
        lighthouse = [str(Path(python).with_name("torchft_lighthouse")), "--min_replicas=1", *options]
        running = stack.enter_context(process(job, [*lighthouse, f"--bind=127.0.0.1:{port}"]))
        for number in range(replicas):
            agent = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--max-restarts=1000"]
            env = {
                "REPLICA_GROUP_ID": str(number),
                "NUM_REPLICA_GROUPS": str(replicas),
                "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}",
                **SHARED_STORE_OFF,
            }
            stack.enter_context(process(job, [*agent, "-m", "recoveries.torchft_rank", job_file(job)], **env))
        yield running


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def job_file(job: Job) -> str:
    return str(job.folder / "job.json")


STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which gloo hangs or fails in the second attempt"
DCP = "DCP each --save-every steps, resumes from the newest"
NODES = "with --kill node an agent for each node and each spare, c10d store in a process of its own"
CONTESTANTS = {
    "shepherd": Contestant(
        "shepherd train with its defaults: a snapshot of each step in memory, durable checkpoints each --save-every "
        "steps; a Ray node for each node of the layout",
        shepherd,
        has_nodes=True,
    ),
    "torchrun": Contestant(
        f"torchrun --standalone --nproc-per-node RANKS --max-restarts 1000; {NODES}; {DCP}; {STORE}",
        torchrun,
        has_nodes=True,
    ),
    "fork server": Contestant(
        "torch's LocalElasticAgent, start_method='forkserver', all imports preloaded; c10d rendezvous, "
        f"max_restarts=1000, monitor_interval=0.1; {DCP}; {STORE}",
        forkserver,
    ),
    "Ray Train": Contestant(
        "Ray Train v2: TorchTrainer, FailureConfig(max_failures=-1), TorchConfig(backend='gloo'), DCP checkpoints that "
        "all workers report each --save-every steps, num_to_keep=2; a Ray node for each node of the layout",
        ray_train,
        has_nodes=True,
        guest=True,
    ),
    "NVRx": Contestant(
        "nvidia-resiliency-ext: ft_launcher --standalone --nproc-per-node RANKS --max-restarts 1000 "
        f"--ft-restart-policy any-failed; {NODES}; {DCP}; {STORE}",
        nvrx,
        has_nodes=True,
        guest=True,
    ),
    "torchft": Contestant(
        "torchft_lighthouse --min_replicas=1 --join_timeout_ms=10000 (heartbeats are missed after 5 s); "
        "DistributedDataParallel and Manager with min_replica_size=1, a torchrun --max-restarts 1000 for each replica; "
        "the figure is that of the survivors' first step without the dead replica",
        partial(torchft, join_timeout_ms=10_000),
        layouts=("dp",),
        guest=True,
        shrinks=True,
    ),
    "torchft eager": Contestant(
        "the same with --heartbeat_timeout_ms=1000 --join_timeout_ms=100 --quorum_tick_ms=50",
        partial(torchft, heartbeat_timeout_ms=1000, join_timeout_ms=100, quorum_tick_ms=50),
        layouts=("dp",),
        guest=True,
        shrinks=True,
    ),
}
