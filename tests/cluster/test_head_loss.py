"""The head node dies: with Redis behind Ray the run goes on and is itself again; without, a resume loses little."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cluster
from heads import NODE, Herd, herd_of
from herd import final_digest, free_port, job, spec_file, spec_of, train, wait_for

from orchestrator.core import events as ev
from orchestrator.core.actions import OpenGeneration
from orchestrator.core.codec import action_from_json
from orchestrator.runtime import driver, journal
from orchestrator.spec import JobSpec
from storage import ram

pytestmark = pytest.mark.timeout(400)

STEPS = 30
RUN = {"steps": STEPS, "validation_interval_steps": STEPS}
# A mesh that stands still at a test's wish does not hang.
PATIENT = {"node_silence_s": 60, "rank_silence_s": 60, "stall_floor_s": 300, "collective_timeout_s": 300}


@pytest.fixture(scope="module")
def untouched(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = spec_of(job("calm-head", tmp_path_factory.mktemp("calm"), run=RUN))
    assert train(spec)[0].exit_code == 0
    return final_digest(spec)


@pytest.fixture
def with_redis(cluster: Cluster, tmp_path: Path) -> Iterator[Herd]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: `make setup` installs it as root on Debian")
    with herd_of(2, tmp_path, redis=True) as herd:
        yield herd


def newest_in_memory(spec: JobSpec) -> int:
    """The newest step of any snapshot, whoever wrote it."""
    headers = (ram.read_header(path) for path in Path(spec.cluster.ram_dir).rglob("slot-*"))
    return max((header.step for header in headers if header is not None), default=0)


class Gate:
    """Lets a run's steps up to some step be done, and no more before the next is opened."""

    def __init__(self, cluster: Cluster, run: str, until_step: int) -> None:
        self._limit = cluster.faults / f"{run}-until"
        self.open(until_step)
        held = f"while session.state.step >= int(pathlib.Path({str(self._limit)!r}).read_text() or 0):"
        (cluster.faults / f"{run}.py").write_text(f"import pathlib, time\n{held}\n    time.sleep(0.05)\n")

    def open(self, until_step: int = 10**9) -> None:
        self._limit.write_text(str(until_step))


def document_of(name: str, folder: Path) -> dict[str, Any]:
    return job(name, folder, run=RUN, recovery=PATIENT)


def begin(herd: Herd, cluster: Cluster, name: str, until_step: int) -> tuple[JobSpec, Path, Gate]:
    """A detached run that has snapshots of a step, and is held there; its file, and what holds it."""
    document = document_of(name, herd.folder)
    spec, file = spec_of(document), spec_file(document, herd.folder / f"{name}.toml")
    gate = Gate(cluster, name, until_step)
    herd.command("train", str(file), "--detach")
    wait_for(lambda: newest_in_memory(spec) >= until_step, 120, f"snapshots of step {until_step}")
    return spec, file, gate


def until_it_trains(herd: Herd, run: str, epoch: int) -> dict[str, Any]:
    def trains() -> dict[str, Any] | None:
        status = herd.status(run)
        return status if status and (status["epoch"], status["job"]) == (epoch, "training") else None

    found: dict[str, Any] = wait_for(trains, 120, f"training in epoch {epoch}")
    return found


def told(spec: JobSpec, kind: type) -> bool:
    """Whether the journal under run.url has such an event."""
    return any(isinstance(record.event, kind) for record in journal.read(spec.run.url))


def opened(spec: JobSpec) -> list[OpenGeneration]:
    actions = (action_from_json(action) for record in journal.read(spec.run.url) for action in record.actions)
    return [action for action in actions if isinstance(action, OpenGeneration)]


def await_end(herd: Herd, spec: JobSpec) -> None:
    """Until the run's controller has ended, with nothing left in memory."""
    wait_for(lambda: herd.try_command("status", spec.run.name).returncode == 2, 120, "the end of the run")
    assert [path for path in Path(spec.cluster.ram_dir).rglob("*") if path.is_file()] == []


def test_with_redis_the_run_outlives_its_head_node(
    cluster: Cluster, with_redis: Herd, untouched: str, tmp_path: Path
) -> None:
    herd = with_redis
    spec, _, gate = begin(herd, cluster, "headless", until_step=6)
    before = herd.status("headless")
    assert before["controller_pid"] in herd.kill_head()
    gate.open(12)
    wait_for(lambda: newest_in_memory(spec) >= 12, 60, "steps without a head")
    assert herd.raylets() == 2

    herd.start_head()
    after = until_it_trains(herd, "headless", epoch=2)
    assert (after["generation"], after["mesh"], after["incidents"]) == (1, before["mesh"], [])
    # It has its agents in hand again: a dead worker is replaced.
    with herd.started(
        "chaos", "worker-kill", "--run", "headless", "--rank", "1", "--log-dir", spec.cluster.log_dir
    ) as c:
        wait_for(lambda: told(spec, ev.FaultInjected), 60, "the worker's death")
        gate.open()
        assert c.wait(120) == 0
    await_end(herd, spec)
    assert final_digest(spec) == untouched
    first, second = opened(spec)
    assert (first.generation, second.generation, second.source) == (1, 2, "ram")


@pytest.mark.long
def test_a_driver_waits_for_a_head_that_comes_back(
    cluster: Cluster, with_redis: Herd, untouched: str, tmp_path: Path
) -> None:
    """Longer than a driver waits for a controller whose head lives, and than Ray's own minute."""
    herd, document = with_redis, document_of("followed", tmp_path)
    del document["recovery"]["driver_lease_s"]  # as users have it
    spec, gate = spec_of(document), Gate(cluster, "followed", until_step=5)
    file = spec_file(document, tmp_path / "followed.toml")
    with herd.started("train", str(file), SHEPHERD_TEST_NODE=NODE) as follower:
        wait_for(lambda: newest_in_memory(spec) >= 5, 120, "step 5")
        herd.kill_head()
        began = time.monotonic()
        wait_for(lambda: time.monotonic() - began > 1.2 * driver.GONE_AFTER_S, 100, "a while without a head")
        assert follower.poll() is None
        herd.start_head()
        until_it_trains(herd, "followed", epoch=2)
        gate.open()
        assert follower.wait(120) == 0
    assert final_digest(spec) == untouched


@pytest.mark.long
@pytest.mark.parametrize("memory", ["kept", "lost"])
def test_without_redis_a_resume_goes_on_and_says_what_was_lost(
    cluster: Cluster, untouched: str, tmp_path: Path, memory: str
) -> None:
    name = f"resumed-{memory}"
    with herd_of(2, tmp_path, redis=False) as herd:
        spec, file, gate = begin(herd, cluster, name, until_step=13)
        herd.kill_head()
        wait_for(lambda: herd.raylets() == 0, 60, "the end of all of Ray")
        if memory == "lost":
            shutil.rmtree(spec.cluster.ram_dir)
        herd.port = free_port()
        herd.start_head()
        herd.start_node()
        herd.start_node()
        said = herd.command("train", str(file), "--resume", "--detach")
        until_it_trains(herd, name, epoch=2)
        gate.open()
        await_end(herd, spec)
    assert "resume: the run has no end on record, so its head node or its whole cluster was lost" in said
    assert "it goes on from the checkpoint of step 10, or from a newer step if the nodes' shared memory" in said
    order = opened(spec)[-1]
    assert (order.source, order.step) == (("ram", 13) if memory == "kept" else ("durable", 10))
    assert final_digest(spec) == untouched
