"""How each of the others is started: as its own documentation advises."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from recoveries.job import Job
from recoveries.nodes import Node, raylet_of
from recoveries.running import END_S, PATH, ContestantFailed, Running, end, free_port, process, titled

ANSWER_S = 120.0
"""For the Ray cluster to have a new node."""
SHARED_STORE_OFF = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it, gloo of torch 2.13 reads the addresses of the attempt before from the agent's store, and hangs."""


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

        def restart() -> None:
            started[:] = [start() for _ in range(job.nodes + job.spares)]

        running.node_of = node_of
        running.mend = lambda: started.append(start())
        running.ended = lambda: all(agent.poll() is not None for agent in started)
        running.restart = restart
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
    asking, answers = cluster.stdin, cluster.stdout
    assert asking is not None and answers is not None

    def mend() -> None:
        asking.write("mend\n")
        asking.flush()
        answer()

    def answer() -> str:
        """A line of the cluster; raises ContestantFailed when none comes."""
        if not select.select([answers], [], [], ANSWER_S)[0] or not (line := answers.readline()):
            raise ContestantFailed(f"the Ray cluster does not answer: {(job.folder / 'cluster.log').read_text()}")
        return line.strip()

    try:
        address = answer()
        with process(job, [python, "-m", "recoveries.ray_train", job_file(job), address]) as running:
            running.node_of, running.mend = raylet_of, mend
            running.controller = lambda: titled("ray::TrainController")
            yield running
        asking.close()
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
            }  # and the agent's store, which its Manager needs
            stack.enter_context(process(job, [*agent, "-m", "recoveries.torchft_rank", job_file(job)], **env))
        yield running


def job_file(job: Job) -> str:
    return str(job.folder / "job.json")
