"""Shepherd as a contestant: by its commands, on a local Ray cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w

from orchestrator.localcluster import local_cluster, replace_dead_nodes
from recoveries.job import Job
from recoveries.marks import Recovery
from recoveries.nodes import Node, raylet_of
from recoveries.running import END_S, HERE, PATH, ContestantFailed, Running, process, titled

COMMAND = [sys.executable, "-P", "-m", "orchestrator"]
CALL_S = 60.0


@contextmanager
def shepherd(job: Job, python: str) -> Iterator[Running]:
    """`shepherd train` on a local Ray cluster of as many raylets as the layout has nodes."""
    del python
    spec = job.spec()
    file = job.folder / "job.toml"
    file.write_text(tomli_w.dumps(spec.document()))
    hook = os.pathsep.join([str(HERE / "hook"), PATH])
    try:
        with cluster_of(job, PYTHONPATH=hook, RECOVERY_MARKS=str(job.marks)) as cluster:
            address = ["--address", cluster.address]
            with process(job, [*COMMAND, "train", str(file), *address], PYTHONPATH=hook) as running:
                running.explain = lambda recoveries: explain_ours(spec.run.name, spec.run.url, recoveries)
                running.node_of = lambda pid: node_of_ours(cluster, pid, Path(spec.cluster.ram_dir))
                running.mend = lambda: replace_dead_nodes(cluster, job.slots_per_node)
                running.has_spare = lambda: has_spare(spec.run.name)
                running.controller = lambda: titled("ray::Controller")
                running.ledger = lambda: ledger_of(spec.run.name)
                yield running
                stop = [*COMMAND, "stop", spec.run.name, "--now", "--log-dir", spec.cluster.log_dir, *address]
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


def has_spare(run: str) -> bool:
    from orchestrator.runtime import driver

    return "spare" in driver.poll(driver.find(run))[0].nodes.values()


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


def ledger_of(run: str) -> dict[str, float]:
    """Node-seconds of each label, as `shepherd status` has them."""
    from orchestrator.runtime import driver

    return driver.poll(driver.find(run))[0].ledger_s


# --- after a storm ---------------------------------------------------------------------------------------------------


def committed(job: Job) -> set[int]:
    """Steps of the run's checkpoints."""
    listed = subprocess.run(
        [*COMMAND, "checkpoints", "ls", str(job.folder / "run"), "--json"],
        capture_output=True,
        timeout=CALL_S,
        check=True,
    )
    return {row["step"] for row in json.loads(listed.stdout)["checkpoints"]}


def compared(one: Job, other: Job) -> tuple[int, bool]:
    """The newest step that both runs have a checkpoint of, and whether both hold the same bits.

    Raises:
        ContestantFailed: there is none, or they cannot be compared.
    """
    found = [committed(job) for job in (one, other)]
    step = max(found[0] & found[1], default=0)
    if not step:
        raise ContestantFailed(f"no step has a checkpoint of both runs: {found}")
    urls = [f"{job.folder / 'run'}@{step}" for job in (one, other)]
    done = subprocess.run([*COMMAND, "checkpoints", "diff", *urls], capture_output=True, text=True, timeout=CALL_S)
    if done.returncode not in (0, 1):
        raise ContestantFailed(f"checkpoints diff {urls}: {done.stderr}")
    return step, done.returncode == 0


def left_behind(job: Job) -> list[str]:
    """Processes and snapshots of a run that has ended."""
    found = [str(path) for path in Path(f"/dev/shm/{job.folder.name}").rglob("*") if path.is_file()]
    for title in ("ray::Agent", "ray::Controller", f"{sys.executable} -P -m orchestrator.runtime.zygote"):
        with suppress(LookupError):
            found.append(f"{title} {titled(title).pid}")
    return found
