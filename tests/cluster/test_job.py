"""The run as people start and end it: the command, `ray job submit`, Ctrl-C, a lost driver, and a job that is wrong."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from conftest import Cluster
from herd import (
    await_nothing_left,
    command,
    free_port,
    job,
    leftovers,
    look,
    ray_started,
    spec_file,
    spec_of,
    train,
    wait_for,
)
from ray.util.placement_group import placement_group_table

from orchestrator import preflight
from orchestrator.runtime import driver
from orchestrator.runtime.controller import namespace_of
from orchestrator.spec import JobSpec
from storage.commits import list_commits

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parent.parent.parent


def await_step(run: str, step: int) -> None:
    def reached() -> bool:
        try:
            status = look(driver.find(run))
        except driver.RunError:
            return False
        return status is not None and status.step >= step

    wait_for(reached, 120, f"step {step} of {run}")


def test_interrupt_checkpoints_and_resume_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    document = job("interrupted", tmp_path, run={"steps": 3000}, checkpoint={"interval_steps": 1000})
    file = str(spec_file(document, tmp_path / "spec.toml"))
    with command("train", file, RAY_ADDRESS=cluster.ray.address) as process:
        await_step("interrupted", 3)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 96, out
    await_nothing_left(tmp_path / "ram")
    (stopped_at,) = list_commits(document["run"]["url"])
    assert stopped_at >= 3

    with command("train", file, RAY_ADDRESS=cluster.ray.address) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--resume" in out

    more = ("--resume", "--set", f"run.steps={stopped_at + 5}")
    with command("train", file, *more, RAY_ADDRESS=cluster.ray.address) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert f"opens at step {stopped_at} from the checkpoint" in out
    assert list_commits(document["run"]["url"])[-1] == stopped_at + 5

    # What decides the numbers is compared with the run's first start before anything is taken.
    other = ("--resume", "--set", "model.ffn_dim=256", "--set", "run.seed=1", "--set", f"run.steps={stopped_at + 9}")
    with command("train", file, *other, RAY_ADDRESS=cluster.ray.address) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "run.seed = 1: the run was started with 0" in out
    assert "model.ffn_dim = 256: the run was started with 192" in out

    # Without that record another model is the job's fault, not the checkpoint's: nothing is called damaged, nothing
    # begins again.
    Path(document["run"]["url"], "run.json").unlink()
    other = ("--resume", "--set", "model.ffn_dim=256", "--set", f"run.steps={stopped_at + 9}")
    with command("train", file, *other, RAY_ADDRESS=cluster.ray.address) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 93, out
    assert "StateMismatch" in out
    assert list_commits(document["run"]["url"]) == [stopped_at, stopped_at + 5]


@pytest.mark.long
def test_a_resume_with_another_corpus_ends_before_it_trains(cluster: Cluster, tmp_path: Path) -> None:
    one_node = {"parallel": {"dp_replicate": 1}, "run": {"steps": 2, "validation_interval_steps": 2}}
    spec = spec_of(job("moved-text", tmp_path, **one_node))
    assert train(spec)[0].exit_code == 0
    (tmp_path / "corpus" / "40.txt").write_text("One sheep more. " * 40)
    longer = spec.model_copy(update={"run": spec.run.model_copy(update={"steps": 4})})
    status, told = train(longer, resume=True)
    assert status.exit_code == 1, told
    assert "the run's checkpoints were trained on" in status.verdict
    assert "data.corpus" in status.verdict
    assert status.generation == 1, "no second one was opened"
    assert list_commits(spec.run.url) == [2]
    await_nothing_left(tmp_path / "ram")


def test_a_lost_driver_leaves_nothing_behind(cluster: Cluster, tmp_path: Path) -> None:
    document = job("orphan", tmp_path, run={"steps": 3000}, recovery={"driver_lease_s": 8})
    with command("train", str(spec_file(document, tmp_path / "s.toml")), RAY_ADDRESS=cluster.ray.address) as process:
        await_step("orphan", 2)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    await_nothing_left(tmp_path / "ram")


def test_a_controller_that_is_gone_for_good_keeps_no_node(cluster: Cluster, tmp_path: Path) -> None:
    """Its agents end, and Ray has the nodes back. What they have kept in memory is the resume's."""
    spec = spec_of(job("forsaken", tmp_path))
    impatient, held = cluster.faults / "impatient", cluster.faults / "forsaken.py"
    impatient.touch()
    held.write_text("import time; time.sleep(600 if session.state.step == 20 else 0.1)")
    try:
        preflight.check_local(spec, resume=False)
        controller, _ = driver.start(spec, detached=True)
        wait_for(lambda: 10 in list_commits(spec.run.url), 120, "a checkpoint")
        assert len(reserved(spec)) == 2
        ray.kill(controller, no_restart=True)
        wait_for(lambda: not reserved(spec), 120, "Ray to have the nodes back")
    finally:
        impatient.unlink()
        held.unlink()
    wait_for(lambda: not leftovers(tmp_path / "nothing"), 30, "the agents to end")
    wait_for(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], 30, "Ray to say so")
    status, told = train(spec, resume=True)
    assert status.exit_code == 0, told
    assert any("opens at step 20 from shared memory" in line for line in told), told
    await_nothing_left(tmp_path / "ram")


def reserved(spec: JobSpec) -> list[str]:
    """Ray's names of what it keeps for a run."""
    prefix = f"{namespace_of(spec.run.name)}/"
    rows = placement_group_table().values()
    return [row["name"] for row in rows if row["name"].startswith(prefix) and row["state"] != "REMOVED"]


@pytest.fixture
def plain_ray() -> Iterator[tuple[str, str]]:
    """A cluster as `ray start --head` makes it: its address, and its dashboard's."""
    dashboard = free_port()
    with ray_started(f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0") as address:
        wait_for(lambda: listens(dashboard), 60, "Ray's dashboard")
        yield address, f"http://127.0.0.1:{dashboard}"


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_ray_job_submit_and_ray_job_stop(plain_ray: tuple[str, str], tmp_path: Path) -> None:
    address, dashboard = plain_ray
    # What is submitted is the source tree alone, as from a fresh checkout.
    tree = tmp_path / "tree"
    for package in ("orchestrator", "trainer", "storage"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    one_node = {"parallel": {"dp_replicate": 1}, "checkpoint": {"interval_steps": 20}}
    lease = {"driver_lease_s": 10}  # should `ray job stop` lose patience with a driver that is stopping
    document = job("submitted", tmp_path, run={"steps": 3000}, recovery=lease, **one_node)
    file = spec_file(document, tmp_path / "spec.toml")

    def ray_job(*arguments: str) -> subprocess.CompletedProcess[str]:
        ray_command = [Path(sys.executable).with_name("ray"), "job", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(ray_command, text=True, capture_output=True, timeout=120, check=False, env=environment)

    def step() -> int:
        with command("status", "submitted", "--json", RAY_ADDRESS=address) as process:
            out, _ = process.communicate(timeout=60)
        return int(json.loads(out)["step"]) if process.returncode == 0 else 0

    entry = ("--", "python", "-m", "orchestrator", "train", str(file))
    start = ("submit", "--address", dashboard, "--working-dir", str(tree))
    submitted = ray_job(*start, "--no-wait", "--submission-id", "j", *entry)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_for(lambda: step() >= 25, 120, "step 25")
    stopped = ray_job("stop", "--address", dashboard, "j")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    await_nothing_left(tmp_path / "ram")
    newest = list_commits(document["run"]["url"])[-1]
    assert newest >= 20

    resumed = ray_job(*start, "--submission-id", "j2", *entry, "--resume", "--set", f"run.steps={newest + 3}")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"opens at step {newest} from the checkpoint" in resumed.stdout
    assert f"all {newest + 3} steps done" in resumed.stdout


def test_an_exception_of_the_program_ends_the_run_with_its_traceback(cluster: Cluster, tmp_path: Path) -> None:
    document = job("wrong-shape", tmp_path)
    fault = """
import torch
if session.rank == 1 and session.state.step == 2:
    torch.ones(4, 8) @ torch.ones(16, 4)
"""
    (cluster.faults / "wrong-shape.py").write_text(fault)
    with command("train", str(spec_file(document, tmp_path / "s.toml")), RAY_ADDRESS=cluster.ray.address) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 93, out
    assert "mat1 and mat2 shapes cannot be multiplied (4x8 and 16x4)" in out
    assert "Traceback (most recent call last)" in out
    ending = out.partition("the worker's own traceback")[2]
    assert "torch.ones(4, 8) @ torch.ones(16, 4)" in ending or "mat1 and mat2 shapes" in ending
    assert 'File "' in ending
    assert "Connection closed by peer" not in ending
    assert "requeueing will not help" in out
    assert (tmp_path / "wrong-shape" / "evidence").exists()
    await_nothing_left(tmp_path / "ram")


@pytest.mark.long
def test_a_controller_that_ray_makes_late_is_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    """Longer than for one that Ray knows no more: its head did not reach a new worker for 69 s, whose port was a dead
    raylet's before."""
    spec = job("made-late", tmp_path)
    late = cluster.faults / "late-controller"
    late.touch()
    try:
        with command("train", str(spec_file(spec, tmp_path / "s.toml")), RAY_ADDRESS=cluster.ray.address) as process:
            began = time.monotonic()
            wait_for(lambda: time.monotonic() - began > 1.2 * driver.GONE_AFTER_S, 100, "a while without a controller")
            assert process.poll() is None
            late.unlink()
            out, _ = process.communicate(timeout=120)
    finally:
        late.unlink(missing_ok=True)
    assert process.returncode == 0, out
    assert "and Ray has it: it is waited for" in out


@pytest.mark.long  # the command for chaos does the same in each run of the tests
def test_an_exception_that_does_not_come_back_is_survived(cluster: Cluster, tmp_path: Path) -> None:
    spec = spec_of(job("hiccup", tmp_path))
    once = tmp_path / "once"
    fault = f"""
import pathlib
if session.rank == 2 and session.state.step == 3 and not pathlib.Path({str(once)!r}).exists():
    pathlib.Path({str(once)!r}).touch()
    raise OSError("a hiccup")
"""
    (cluster.faults / "hiccup.py").write_text(fault)
    status, told = train(spec)
    assert status.exit_code == 0, told
    assert [(i.cause, i.rung, i.steps_lost) for i in status.incidents] == [("exception", "replace", 0)]
    assert "OSError: a hiccup" in next(iter(status.tracebacks.values()))


@pytest.mark.long
def test_out_of_memory_ends_with_the_workers_own_words(cluster: Cluster, tmp_path: Path) -> None:
    document = job("too-big", tmp_path, model={"ffn_dim": 2**40})
    with command("train", str(spec_file(document, tmp_path / "s.toml")), RAY_ADDRESS=cluster.ray.address) as process:
        out, _ = process.communicate(timeout=180)
    assert process.returncode == 93, out
    assert "memory" in out
    assert "Traceback (most recent call last)" in out
    await_nothing_left(tmp_path / "ram")


def test_too_few_nodes_are_refused_before_anything_starts(cluster: Cluster, tmp_path: Path) -> None:
    mesh = {"pp": 1, "dp_replicate": 16, "microbatches": 1}
    document = job("too-wide", tmp_path, parallel=mesh, data={"global_batch": 16})
    with command("train", str(spec_file(document, tmp_path / "s.toml")), RAY_ADDRESS=cluster.ray.address) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "not enough nodes" in out
    assert "needs 8 live Ray nodes" in out
    assert not list((tmp_path / "too-wide").glob("epochs/*"))
