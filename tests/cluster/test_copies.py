"""Without replicas: a node dies with its memory, and the copies that its buddy has kept let the run go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Cluster, train_losing_nodes
from herd import await_nothing_left, final_digest, job, spec_of, train

from orchestrator.chaos import faults
from orchestrator.core import events as ev
from orchestrator.observe.status import Status
from orchestrator.runtime import journal
from orchestrator.runtime.controller import namespace_of
from orchestrator.spec import JobSpec

pytestmark = pytest.mark.timeout(300)

MESH: dict[str, Any] = {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "microbatches": 2}


@pytest.fixture(scope="module")
def untouched(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the last state when nothing happens."""
    spec = spec_of(job("uncopied", tmp_path_factory.mktemp("uncopied"), parallel=MESH, checkpoint={"copies": "off"}))
    status, told = train(spec)
    assert status.exit_code == 0, told
    return final_digest(spec)


def lose_a_node(cluster: Cluster, spec: JobSpec) -> tuple[Status, list[str], dict[str, int]]:
    """Kill the node that holds the second stage, as soon as a spare is there and step 8 was copied, if it is to be."""
    slow = cluster.faults / f"{spec.run.name}.py"
    slow.write_text("import time; time.sleep(0.7 if session.state.step >= 7 else 0.0)")
    seen: dict[str, int] = {}

    def chaos(status: Status) -> None:
        spares = [node for node, state in status.nodes.items() if state == "spare"]
        ready = status.step >= 9 if spec.checkpoint.copies == "off" else (status.copied_step or 0) >= 8
        if status.job == "training" and spares and ready and not seen:
            seen["step"], seen["copied"] = status.step, status.copied_step or 0
            faults.kill_node(namespace_of(spec.run.name), status.mesh[1], spec.run.name, status.step)
            slow.unlink()

    return *train_losing_nodes(cluster, spec, chaos), seen


def test_a_spare_takes_the_state_of_the_copies_that_a_buddy_kept(
    cluster: Cluster, untouched: str, tmp_path: Path
) -> None:
    spec = spec_of(job("copied", tmp_path, parallel=MESH, checkpoint={"interval_steps": 100}, cluster={"spares": 1}))
    status, told, seen = lose_a_node(cluster, spec)
    assert status.exit_code == 0, told
    (incident,) = status.incidents
    assert (incident.cause, incident.rung) == ("node", "spare"), incident
    assert incident.step - incident.steps_lost >= seen["copied"]
    assert final_digest(spec) == untouched
    await_nothing_left(tmp_path / "ram")


@pytest.mark.long
def test_without_copies_the_last_checkpoint_is_all_there_is(cluster: Cluster, untouched: str, tmp_path: Path) -> None:
    saves = {"interval_steps": 5, "copies": "off"}
    spec = spec_of(job("not-copied", tmp_path, parallel=MESH, checkpoint=saves, cluster={"spares": 1}))
    status, told, _ = lose_a_node(cluster, spec)
    assert status.exit_code == 0, told
    (incident,) = status.incidents
    assert (incident.cause, incident.rung) == ("node", "durable"), incident
    assert final_digest(spec) == untouched


# What the faults below begin with.
FLIP = """
import os, signal, time
from torch import distributed
from storage.ram import HEADER_BYTES, snapshot_path

def flip_in_memory(step):
    with open(snapshot_path(*session.checkpointer._ram._place, step), "r+b") as file:
        file.seek(HEADER_BYTES + 100)
        byte = file.read(1)[0]
        file.seek(HEADER_BYTES + 100)
        file.write(bytes([byte ^ 1]))
"""

# After step 8 is in every rank's memory, a bit of rank 0's snapshot flips and rank 3 is killed.
FLIP_AND_KILL = """
if session.generation == 1 and session.state.step == 8:
    session.checkpointer.await_snapshot()
    if session.rank == 0:
        flip_in_memory(8)
    distributed.barrier()
    if session.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""

# The first step from 8 on that buddies are to copy has arrived there, a bit of rank 0's own snapshot of it flips, and
# rank 0 is killed.
FLIP_OWN_AND_KILL = """
step = session.state.step
if session.generation == 1 and step >= 8 and session.copies.wants(step):
    deadline = time.monotonic() + 60
    while session.copies.shares()[0]:
        assert time.monotonic() < deadline, f"step {step} is not copied"
        time.sleep(0.01)
    assert session.copies.shares() == (False, False), "the copy has failed"
    distributed.barrier()
    if session.rank == 0:
        flip_in_memory(step)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def damage_told(spec: JobSpec) -> list[ev.CopyDamaged]:
    return [r.event for r in journal.read(spec.run.url) if isinstance(r.event, ev.CopyDamaged)]


def test_a_block_that_is_damaged_in_memory_is_mended_from_a_buddys_copy(
    cluster: Cluster, untouched: str, tmp_path: Path
) -> None:
    """The only other place that has it: there is no replica, no checkpoint and no spare."""
    spec = spec_of(job("buddy-mends", tmp_path, parallel=MESH, checkpoint={"interval_steps": 100}))
    (cluster.faults / "buddy-mends.py").write_text(FLIP + FLIP_OWN_AND_KILL)
    status, told = train(spec)
    assert status.exit_code == 0, told
    (incident,) = status.incidents
    assert (incident.cause, incident.rung, incident.steps_lost) == ("signal", "replace", 0), incident
    (damaged,) = damage_told(spec)
    assert (damaged.node, damaged.slot, damaged.step) == (status.mesh[0], 0, incident.step)
    assert damaged.detail.count("is damaged") == 1 and "block 0 is damaged" in damaged.detail
    assert status.strikes == {status.mesh[0]: 2}, "one for its worker's death, one for its copy"
    assert final_digest(spec) == untouched


def test_a_block_that_is_damaged_in_memory_is_mended_from_a_replicas(cluster: Cluster, tmp_path: Path) -> None:
    mesh = {"parallel": {"pp": 1, "dp_replicate": 4, "microbatches": 1}, "checkpoint": {"interval_steps": 100}}
    calm, hurt = spec_of(job("calm-memory", tmp_path, **mesh)), spec_of(job("bad-memory", tmp_path, **mesh))
    assert train(calm)[0].exit_code == 0
    (cluster.faults / "bad-memory.py").write_text(FLIP + FLIP_AND_KILL)
    status, told = train(hurt)
    assert status.exit_code == 0, told
    (incident,) = status.incidents
    assert (incident.cause, incident.rung, incident.steps_lost) == ("signal", "replace", 0)
    damaged = damage_told(hurt)
    assert [(e.node, e.slot, e.step) for e in damaged] == [(status.mesh[0], 0, 8)]
    assert "block 0 is damaged" in damaged[0].detail
    assert status.strikes[status.mesh[0]] == 1
    assert final_digest(hurt) == final_digest(calm)
