"""An active run goes on as another job, and with other code, between two steps; nothing is lost, and it stays so."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Cluster
from herd import TIME_TO_PARK, await_nothing_left, final_digest, job, kill_worker, spec_of, train, worker_pids

from orchestrator import identity, preflight
from orchestrator.observe.status import Status
from orchestrator.runtime import code as codes
from orchestrator.runtime import driver
from orchestrator.spec import JobSpec

pytestmark = pytest.mark.timeout(300)

RUN = {"steps": 30, "validation_interval_steps": 30}


def change(spec: JobSpec, *overrides: str, code: str | None = None) -> list[str]:
    token = driver.read_token(spec.cluster.log_dir, spec.run.name)
    return driver.update(driver.find(spec.run.name), token, list(overrides), code, by="the test")


def newer_code(folder: Path, spec: JobSpec, line: str) -> str:
    """Publishes a working directory whose workers run this line when they import the training loop; its name."""
    for package in ("trainer", "storage"):
        shutil.copytree(codes.INSTALLED / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    loop = folder / "trainer" / "loop.py"
    loop.write_text(f"{loop.read_text()}\n{line}\n")
    return codes.publish(spec.run.url, codes.pack(folder))


@pytest.fixture(scope="module")
def untouched(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Names the final state of the job that nobody changes."""
    spec = spec_of(job("not-updated", tmp_path_factory.mktemp("not-updated"), run=RUN))
    assert train(spec)[0].exit_code == 0
    return final_digest(spec)


def test_a_job_and_its_code_change_between_two_steps_and_stay_changed(
    cluster: Cluster, untouched: str, tmp_path: Path
) -> None:
    spec = spec_of(job("updated", tmp_path, run=RUN, recovery=TIME_TO_PARK))
    slow = cluster.faults / "updated.py"
    slow.write_text("import time; time.sleep(0.3)")
    pids: list[dict[int, int]] = []
    done: list[str] = []

    def chaos(status: Status) -> None:
        in_peace = status.job == "training" and all(i.total_s is not None for i in status.incidents)
        if not in_peace or status.step < 4 * len(done) + 4:
            return
        match len(done):
            case 0:
                refuse_what_cannot_be(spec)
                pids.append(worker_pids(spec, status))
                assert change(spec, "checkpoint.interval_steps=7") == ["checkpoint.interval_steps = 7"]
            case 1 if status.generation == 2:
                pids.append(worker_pids(spec, status))
                slow.write_text("import time; time.sleep(4)")  # new processes, then a new controller: the run must last
                code = newer_code(tmp_path / "new", spec, "print('this is the new loop', flush=True)")
                assert change(spec, "recovery.same_error_tries=3", code=code) == [
                    "recovery.same_error_tries = 3",
                    f"the workers' code = {code[:12]}",
                ]
            case 2 if status.generation == 3:
                pids.append(worker_pids(spec, status))
                assert (status.ledger_us["detection"], status.ledger_us["recomputed"]) == (0, 0)
                os.kill(status.controller_pid, signal.SIGKILL)
            case 3 if status.epoch == 2:
                kill_worker(spec, status, rank=1)
                slow.unlink()
            case _:
                return
        done.append(status.job)

    status, told = train(spec, chaos)
    assert status.exit_code == 0, told
    assert [(i.cause, i.rung) for i in status.incidents] == [
        ("update", "resume"),
        ("update", "replace"),
        ("signal", "replace"),
    ], told
    assert [i.steps_lost for i in status.incidents[:2]] == [0, 0]
    # Another job needs no other process, other code does.
    assert pids[0] == pids[1] and not set(pids[1].values()) & set(pids[2].values())
    log = "".join(path.read_text() for path in Path(spec.cluster.log_dir, "updated").glob("*.log"))
    assert "this is the new loop" in log
    # The controller that came back saves as the first had been told to.
    assert {14, 21, 28} & set(status.checkpoints) and 20 not in status.checkpoints, status.checkpoints
    assert final_digest(spec) == untouched
    await_nothing_left(tmp_path / "ram")


def test_an_update_that_fails_in_training_is_taken_back(cluster: Cluster, untouched: str, tmp_path: Path) -> None:
    """Its code can be imported, and its learning rate be one: only the first step tells."""
    spec = spec_of(job("misled", tmp_path, run=RUN))
    slow = cluster.faults / "misled.py"
    slow.write_text("import time; time.sleep(0.3)")
    asked: list[list[str]] = []

    def mislead(status: Status) -> None:
        if status.job == "training" and status.step >= 4 and not asked:
            broken = "def train_step(session):\n    raise RuntimeError('this loop is broken')"
            asked.append(change(spec, "optimizer.lr=0.5", code=newer_code(tmp_path / "new", spec, broken)))
            slow.unlink()

    status, told = train(spec, mislead)
    assert status.exit_code == 0, told
    assert asked and asked[0][0] == "optimizer.lr = 0.5"
    ((cause, lost, generations),) = [(i.cause, i.steps_lost, status.generation) for i in status.incidents]
    assert (cause, lost, generations) == ("update", 0, 3), told
    assert any("update 2: the newest one that is on trial is taken back" in line for line in told), told
    assert any("is taken back (not one step was done with it" in line for line in told), told
    assert identity.changes(spec) == []
    assert final_digest(spec) == untouched
    await_nothing_left(tmp_path / "ram")


def refuse_what_cannot_be(spec: JobSpec) -> None:
    """Nothing of this changes the run."""
    controller = driver.find(spec.run.name)
    with pytest.raises(PermissionError):
        driver.update(controller, "another's", ["run.steps=40"], None, by="the test")
    with pytest.raises(ValueError, match=r"run.seed: cannot change while the run is active: another value is another"):
        change(spec, "run.steps=40", "run.seed=2")
    with pytest.raises(ValueError, match="nothing changes"):
        change(spec)
    with pytest.raises(ValueError, match=r"run.steps = 1: so many are done"):
        change(spec, "run.steps=1")


@pytest.mark.long
def test_another_learning_rate_is_in_force_and_a_resume_must_have_it(cluster: Cluster, tmp_path: Path) -> None:
    document: dict[str, Any] = job("faster", tmp_path, run={"steps": 400, "validation_interval_steps": 400})
    spec = spec_of(document)
    slow = cluster.faults / "faster.py"
    slow.write_text("import time; time.sleep(0.3)")
    rates: dict[int, float] = {}
    stopped: list[int] = []

    def chaos(status: Status) -> None:
        if status.lr is not None and status.job == "training":
            rates[status.step] = status.lr
        if status.job == "training" and status.step >= 6 and status.generation == 1 and not stopped:
            broken = newer_code(tmp_path / "broken", spec, "raise RuntimeError('this loop is broken')")
            with pytest.raises(ValueError, match=r"(?s)node \w+ cannot run code .*this loop is broken"):
                change(spec, "optimizer.lr=0.5", code=broken)
            change(spec, "optimizer.lr=0.5", "run.steps=1000")
            stopped.append(0)
        if any(rate > 0.4 for rate in rates.values()) and len(stopped) == 1:
            token = driver.read_token(spec.cluster.log_dir, "faster")
            driver.stop(driver.find("faster"), token, by="the test", graceful=True)
            stopped.append(1)

    status, told = train(spec, chaos)
    assert status.exit_code == 96, told
    assert (status.total_steps, [i.cause for i in status.incidents]) == (1000, ["update"])
    assert all(rate < 0.01 for step, rate in rates.items() if step <= 6)
    assert len(stopped) == 2, rates
    with pytest.raises(preflight.PreflightError, match=r"optimizer.lr = 0.003: the run was started with 0.5"):
        preflight.check_local(spec, resume=True)
    document["optimizer"]["lr"] = 0.5
    assert identity.changes(spec_of(document)) == []
    slow.unlink()
    resumed, told = train(spec_of(document | {"run": document["run"] | {"steps": status.step + 4}}), resume=True)
    assert resumed.exit_code == 0, told
