"""A script of the user's under fire: its example with a session, and scripts that know nothing of Shepherd."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cluster, train_losing_nodes
from herd import (
    await_nothing_left,
    command,
    kill_worker,
    look,
    train,
    wait_for,
    worker_pids,
)

from orchestrator.chaos import faults
from orchestrator.observe.status import Status
from orchestrator.runtime import driver, journal
from orchestrator.runtime.controller import namespace_of
from orchestrator.scripts import spec_of_command
from orchestrator.spec import JobSpec
from storage.commits import list_commits, read_commit, state_digest, verify

pytestmark = pytest.mark.timeout(300)
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_loop.py"
STEPS = 40
CALM = {"node_silence_s": 60, "rank_silence_s": 30, "driver_lease_s": 30}

DDP = """
import pathlib, sys, time, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(4, 1))
mark = pathlib.Path(sys.argv[1], f"rank{dist.get_rank()}")
for step in range(1, 41):
    model(torch.ones(2, 4)).sum().backward()
    time.sleep(0.05)
    MORE
mark.touch()
dist.destroy_process_group()
"""


def job(folder: Path, name: str, words: list[str], **fields: Any) -> JobSpec:
    """Of two nodes with a process each."""
    values = {f"recovery.{key}": value for key, value in CALM.items()}
    values |= {"run.url": str(folder / name), "cluster.log_dir": str(folder / "logs")}
    values |= {"cluster.ram_dir": str(folder / "ram"), "checkpoint.interval_steps": 15} | fields
    overrides = [f"{key}={value}" for key, value in values.items()]
    return spec_of_command(words, overrides=overrides, name=name, nodes=2, procs_per_node=1)


def example(folder: Path, name: str, pause: float, steps: int = STEPS, **fields: Any) -> JobSpec:
    words = ["python", str(EXAMPLE), "--steps", str(steps), "--pause", str(pause)]
    return job(folder, name, words, **fields)


def written(folder: Path, text: str) -> list[str]:
    (folder / "own.py").write_text(text)
    return ["python", str(folder / "own.py"), str(folder)]


def once(at_step: int, harm: Callable[[Status], object]) -> Callable[[Status], None]:
    done: list[int] = []

    def chaos(status: Status) -> None:
        if status.job == "training" and status.step >= at_step and not done:
            done.append(status.step)
            harm(status)

    return chaos


def bits(spec: JobSpec) -> str:
    commit = read_commit(spec.run.url, STEPS)
    assert verify(spec.run.url, commit) == []
    return state_digest(spec.run.url, commit)


def models(folder: Path, run: str) -> set[str]:
    """What the example has printed at its end, of all ranks."""
    text = "".join(path.read_text() for path in (folder / "logs" / run).glob("*.log"))
    return set(re.findall(r"rank \d: \d+ samples, model \w+, lr \S+", text))


def test_a_killed_worker_of_the_example_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    calm = example(tmp_path, "calm", 0)
    status, told = train(calm)
    assert (status.exit_code, status.step, status.total_steps) == (0, STEPS, 0), told
    hurt = example(tmp_path, "hurt", 0.15)
    status, told = train(hurt, once(4, lambda status: kill_worker(hurt, status, rank=1)))
    assert status.exit_code == 0, told
    (incident,) = status.incidents
    assert (incident.cause, incident.rung, incident.culprit) == ("signal", "replace", status.mesh[1])
    assert incident.steps_lost <= 1
    assert bits(hurt) == bits(calm)
    assert len(models(tmp_path, "calm")) == 2, "a line of each rank"
    assert models(tmp_path, "hurt") == models(tmp_path, "calm")
    assert list_commits(hurt.run.url) == [15, 30, STEPS]
    assert sum(status.ledger_us.values()) == status.owed_us
    assert status.ledger_us["productive"] > 0.15 * STEPS * 1_000_000, "the steps of two nodes"
    journal.replay(journal.read(hurt.run.url)).state.check()
    await_nothing_left(tmp_path / "ram")


@pytest.mark.long
def test_a_dead_node_of_the_example_is_replaced_from_its_copy(cluster: Cluster, tmp_path: Path) -> None:
    calm = example(tmp_path, "calm", 0)
    assert train(calm)[0].exit_code == 0
    hurt = example(tmp_path, "hurt", 0.2, **{"cluster.spares": 1})
    killed: list[str] = []

    def harm(status: Status) -> None:
        killed.append(status.mesh[1])
        faults.kill_node(namespace_of("hurt"), status.mesh[1], "hurt", status.step)

    def chaos(status: Status) -> None:
        if "spare" in status.nodes.values() and not killed and status.step >= 10:
            harm(status)

    status, told = train_losing_nodes(cluster, hurt, chaos)
    assert status.exit_code == 0, told
    (incident,) = status.incidents
    assert (incident.cause, incident.culprit, incident.rung) == ("node", killed[0], "spare")
    assert any("copied from elsewhere" in line for line in told)
    assert incident.steps_lost <= 5
    assert bits(hurt) == bits(calm)
    await_nothing_left(tmp_path / "ram")


@pytest.mark.long
def test_a_rank_that_hangs_is_found(cluster: Cluster, tmp_path: Path) -> None:
    """One is stopped; one loops while its peer waits in the backward pass of DistributedDataParallel."""
    patience = {"recovery.rank_silence_s": 5, "recovery.stall_floor_s": 6}
    spec = example(tmp_path, "stopped", 0.15, **patience)
    stop = once(10, lambda status: os.kill(worker_pids(spec, status)[1], signal.SIGSTOP))
    status, told = train(spec, stop)
    assert status.exit_code == 0, told
    assert [(i.cause, i.rung, i.culprit) for i in status.incidents] == [("hang", "replace", status.mesh[1])]

    loops = 'import shepherd; shepherd.session().step(step); first = pathlib.Path(sys.argv[1], "hung")\n'
    loops += "    if step == 20 and dist.get_rank() == 1 and not first.exists():\n"
    loops += "        first.touch()\n        while True: time.sleep(0.01)"
    spec = job(tmp_path, "loops", written(tmp_path, DDP.replace("MORE", loops)), **patience)
    status, told = train(spec)
    assert status.exit_code == 0, told
    assert [(i.cause, i.culprit) for i in status.incidents] == [("hang", status.mesh[1])]
    assert "rank 1 does not wait for anybody" in status.incidents[0].detail
    # It has kept no state: it begins again, and what it had done is done anew.
    assert status.ledger_us["recomputed"] > 0


@pytest.mark.long
def test_an_unmodified_script_is_started_again_as_a_whole(cluster: Cluster, tmp_path: Path) -> None:
    spec = job(tmp_path, "plain", written(tmp_path, DDP.replace("MORE", "")))
    status, told = train(spec, once(0, lambda status: kill_worker(spec, status, rank=0)))
    assert status.exit_code == 0, told
    assert [(i.cause, i.culprit) for i in status.incidents] == [("signal", status.mesh[0])]
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank0", "rank1"}
    assert status.generation == 2
    assert status.ledger_us["productive"] > 0 and status.ledger_us["detection"] > 0
    assert sum(status.ledger_us.values()) == status.owed_us
    await_nothing_left(tmp_path / "ram")


@pytest.mark.long
def test_the_command_ends_as_the_script_does(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("import sys\nif sys.argv[1] == 'raise': raise KeyError('lr')\nsys.exit(3)\n")
    common = ("--procs-per-node", "2", "--set", f"cluster.log_dir={tmp_path / 'logs'}")
    for how, said in (("raise", "KeyError: 'lr'"), ("exit", "the script has ended with exit code 3")):
        url = f"run.url={tmp_path / how}"
        words = (*common, "--set", url, "--", "python", str(tmp_path / "fails.py"), how)
        with command("run", *words, RAY_ADDRESS=cluster.ray.address) as process:
            out, _ = process.communicate(timeout=120)
        assert process.returncode == 93, out
        assert said in out
    nowhere = ("--set", f"run.url={tmp_path / 'nowhere'}", "--", "python", "nowhere.py")
    with command("run", *nowhere, RAY_ADDRESS=cluster.ray.address) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "nowhere.py is not there" in out


@pytest.mark.long
def test_a_run_is_stopped_with_a_checkpoint_and_resumed(cluster: Cluster, tmp_path: Path) -> None:
    calm = example(tmp_path, "calm", 0)
    assert train(calm)[0].exit_code == 0
    url = str(tmp_path / "parts")
    sets = [part for key in (f"cluster.log_dir={tmp_path / 'logs'}", f"run.url={url}") for part in ("--set", key)]
    tail = ("--", "python", str(EXAMPLE), "--steps", str(STEPS), "--pause", "0.2")
    words = ("run", "--name", "parts", "--nodes", "2", *sets)

    def reached() -> bool:
        try:
            status = look(driver.find("parts"))
        except driver.RunError:
            return False
        return status is not None and status.step >= 8

    with command(*words, *tail, RAY_ADDRESS=cluster.ray.address) as process:
        wait_for(reached, 120, "step 8")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 96, out
    (stopped_at,) = list_commits(url)
    assert 8 <= stopped_at < STEPS
    with command(*words, "--resume", *tail, RAY_ADDRESS=cluster.ray.address) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert f"opens at step {stopped_at} from the checkpoint" in out
    commit = read_commit(url, STEPS)
    assert state_digest(url, commit) == bits(calm)
