"""A mesh goes on with fewer replicas when a node is gone and no spare is left, and takes them back when one comes.

Where the job allows another mesh on fewer nodes, it becomes that one, and itself again.

The oracle is a run that nobody touches: each step has the same samples, and losses that differ by rounding only.
"""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import CPUS, Cluster, train_losing_nodes
from herd import LOSS_TOLERANCE, await_nothing_left, job, replace_dead_nodes, spec_of, train

from orchestrator.chaos import faults
from orchestrator.core import events as ev
from orchestrator.observe.status import Status
from orchestrator.runtime import driver, journal
from orchestrator.runtime.controller import namespace_of
from orchestrator.spec import JobSpec
from storage.commits import list_commits, read_commit, verify

pytestmark = pytest.mark.timeout(300)

# Each rank notes which samples it feeds. A shrunk mesh takes its time, so that a node can come meanwhile.
RECORD = """
import hashlib, json, time
step, rows = session.state.step + 1, session.stage.rows
if session.stage.is_first and session.stage.mesh.get_local_rank("tp") == 0:
    samples = {row: session.dataset.batch(step, range(row, row + 1))[0] for row in rows}
    fed = {row: hashlib.sha256(tokens.numpy().tobytes()).hexdigest() for row, tokens in samples.items()}
    with open(FED, "a") as file:
        file.write(json.dumps([session.generation, step, fed]) + "\\n")
shrunk = session.config.parallel.world_size < RANKS
time.sleep(2.0 if shrunk else 0.3 if session.generation == 1 and 5 < step < 30 else 0.0)
"""


STEPS = 60


def recorded(cluster: Cluster, folder: Path, name: str, slots: int = 1, fallback: str = "", **parallel: int) -> JobSpec:
    """A job of four ranks, on nodes of so many slots each."""
    script = f"FED, RANKS = {str(folder / f'{name}.fed')!r}, 4\n{RECORD}"
    (cluster.faults / f"{name}.py").write_text(script)
    sections: dict[str, Any] = {"parallel": parallel, "recovery": {"grow_settle_s": 1}}
    sections["run"] = {"steps": STEPS, "validation_interval_steps": 15}
    if fallback:
        sections["recovery"]["fallback_meshes"] = [dict.fromkeys([fallback], 2)]
        sections["checkpoint"] = {"interval_steps": STEPS}
    return spec_of(job(name, folder, cluster={"slots_per_node": slots}, **sections))


@dataclass(frozen=True)
class Untouched:
    fed: dict[int, dict[str, str]]
    losses: tuple[dict[int, float], dict[int, float]]


@pytest.fixture(scope="module")
def untouched(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Untouched:
    folder = tmp_path_factory.mktemp("untouched")
    spec = recorded(cluster, folder, "calm")
    status, told = train(spec)
    assert (status.exit_code, status.incidents) == (0, ()), told
    return Untouched(fed=fed(spec, folder), losses=losses(spec))


def fed(spec: JobSpec, folder: Path) -> dict[int, dict[str, str]]:
    """Step to the digest of each row of its batch, as its last execution had it; each row was fed once."""
    steps: dict[int, tuple[int, dict[str, str]]] = {}
    for line in (folder / f"{spec.run.name}.fed").read_text().splitlines():
        generation, step, rows = json.loads(line)
        before = steps.get(step, (0, {}))
        if generation > before[0]:
            before = (generation, {})
        if generation == before[0]:
            assert before[1].keys().isdisjoint(rows), (step, generation, rows)
            steps[step] = (generation, before[1] | rows)
    return {step: rows for step, (_, rows) in steps.items()}


def losses(spec: JobSpec) -> tuple[dict[int, float], dict[int, float]]:
    """By step, from the journal: training and validation losses; and no step has had other tokens than it should."""
    trained: dict[int, float] = {}
    validated: dict[int, float] = {}
    for record in journal.read(spec.run.url):
        event = record.event
        if isinstance(event, ev.StepsDone):
            tokens = spec.data.global_batch * spec.data.seq_len
            assert event.tokens == tokens * (event.last - event.first + 1)
            trained |= dict(zip(range(event.first, event.last + 1), event.loss_millionths, strict=True))
        elif isinstance(event, ev.Validated):
            validated[event.step] = event.loss_millionths
    return trained, validated


def check_like(untouched: Untouched, hurt: JobSpec, folder: Path) -> None:
    samples = fed(hurt, folder)
    assert samples == untouched.fed
    assert {len(rows) for rows in samples.values()} == {hurt.data.global_batch}
    for ours, theirs in zip(losses(hurt), untouched.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=LOSS_TOLERANCE, abs=0)
    assert len(losses(hurt)[0]) == hurt.run.steps
    for step in list_commits(hurt.run.url):
        commit = read_commit(hurt.run.url, step)
        assert math.prod(commit.mesh.values()) == len(commit.parts)
        assert verify(hurt.run.url, commit) == []


def settled(status: Status) -> bool:
    return status.job == "training" and all(i.total_s is not None for i in status.incidents)


def kill(spec: JobSpec, status: Status, node: str) -> None:
    faults.kill_node(namespace_of(spec.run.name), node, spec.run.name, status.step)


def check_story(status: Status, told: list[str], replicas: int) -> None:
    assert status.exit_code == 0, told
    assert [(i.cause, i.rung) for i in status.incidents] == [("node", "shrink"), ("grow", "grow")], told
    assert [i.steps_lost <= 1 for i in status.incidents] == [True, True], told
    assert (status.replicas, len(status.mesh)) == (replicas, 4)
    assert status.ledger_us["degraded_capacity"] > 0
    assert sum(status.ledger_us.values()) == status.owed_us == round(status.wall_clock_s * 1e6) * status.places


def test_a_mesh_shrinks_when_a_node_dies_and_grows_back(cluster: Cluster, untouched: Untouched, tmp_path: Path) -> None:
    """The dead node's place is taken by its stage's other replica, and the last stage gets another number."""
    spec = recorded(cluster, tmp_path, "shrinks")
    done: list[str] = []

    def look(status: Status) -> None:
        if settled(status) and status.step >= 8 and not done:
            done.append(status.mesh[0])
            kill(spec, status, status.mesh[0])
        elif settled(status) and status.replicas == 1 and len(done) == 1 and status.step > status.incidents[0].step + 1:
            done.append("mended")
            replace_dead_nodes(cluster.ray, CPUS)

    status, told = train_losing_nodes(cluster, spec, look)
    check_story(status, told, replicas=2)
    assert status.incidents[0].culprit == done[0] and done[0] not in status.mesh
    check_like(untouched, spec, tmp_path)
    await_nothing_left(tmp_path / "ram")


@pytest.mark.long
def test_an_uneven_mesh_outlives_its_controller_and_grows_back(
    cluster: Cluster, untouched: Untouched, tmp_path: Path
) -> None:
    """Four microbatches on three replicas; the node that goes was drained, and nobody has come for it."""
    spec = recorded(cluster, tmp_path, "uneven", pp=1, dp_replicate=4, microbatches=1)
    done: dict[str, Any] = {}

    def look(status: Status) -> None:
        if not settled(status) or status.step < 8:
            return
        if "drained" not in done:
            done["drained"] = status.mesh[1]
            driver.drain(
                driver.find("uneven"), driver.read_token(spec.cluster.log_dir, "uneven"), status.mesh[1], by="me"
            )
        elif "killed" not in done and status.standings.get(done["drained"]) == "leaving":
            done["killed"] = status.step
            assert done["drained"] in status.mesh, "it works on"
            kill(spec, status, done["drained"])
        elif status.replicas == 3 and "controller" not in done:
            done["controller"] = status.step
            os.kill(status.controller_pid, signal.SIGKILL)
        elif status.epoch == 2 and status.step > done["controller"] + 1 and "mended" not in done:
            done["mended"] = status.step
            replace_dead_nodes(cluster.ray, CPUS)

    status, told = train_losing_nodes(cluster, spec, look)
    check_story(status, told, replicas=4)
    assert status.epoch == 2
    check_like(untouched, spec, tmp_path)
    await_nothing_left(tmp_path / "ram")


@pytest.mark.long
@pytest.mark.parametrize("fallback", ["tp", "pp"])
def test_a_mesh_becomes_another_on_the_node_that_is_left_and_itself_again(
    cluster: Cluster, untouched: Untouched, tmp_path: Path, fallback: str
) -> None:
    """Pipeline 2 x tensor parallel 2 on two nodes; what is left has both stages, or all of each matrix. The state comes
    from memory, since there is no checkpoint. The controller dies meanwhile."""
    spec = recorded(cluster, tmp_path, f"reshards-{fallback}", 2, fallback, pp=2, dp_replicate=1, tp=2)
    others = ray.util.placement_group([{"CPU": CPUS}] * 2, strategy="STRICT_SPREAD")  # no other node is there
    ray.get(others.ready(), timeout=60)
    done: dict[str, Any] = {}

    def look(status: Status) -> None:
        if not settled(status) or status.step < 8:
            return
        if "killed" not in done:
            done["killed"] = status.mesh[0]
            kill(spec, status, status.mesh[0])
        elif len(status.mesh) == 1 and "controller" not in done:
            assert status.fallback == f"{fallback} 2"
            done["controller"] = status.step
            os.kill(status.controller_pid, signal.SIGKILL)
        elif status.epoch == 2 and status.step > done["controller"] + 1 and "mended" not in done:
            done["mended"] = status.step
            ray.util.remove_placement_group(others)

    try:
        status, told = train(spec, look)
    finally:
        ray.util.remove_placement_group(others)
        replace_dead_nodes(cluster.ray, CPUS)
    assert status.exit_code == 0, told
    assert [(i.cause, i.rung) for i in status.incidents] == [("node", "shrink"), ("grow", "grow")], told
    assert [i.steps_lost <= 1 for i in status.incidents] == [True, True], told
    assert (status.fallback, len(status.mesh), status.epoch) == ("", 2, 2)
    assert status.ledger_us["degraded_capacity"] > 0
    check_like(untouched, spec, tmp_path)
    await_nothing_left(tmp_path / "ram")


@pytest.mark.long
def test_a_second_death_before_the_first_new_snapshot(cluster: Cluster, untouched: Untouched, tmp_path: Path) -> None:
    """Snapshots are then still of the whole mesh, and so are their numbers."""
    spec = recorded(cluster, tmp_path, "twice", pp=1, dp_replicate=4, microbatches=1)
    killed: list[str] = []
    mended: list[int] = []

    def look(status: Status) -> None:
        first = not killed and settled(status) and status.step >= 8
        if first or (len(killed) == 1 and status.generation == 2 and status.job != "halting"):
            killed.append(status.mesh[1])
            kill(spec, status, status.mesh[1])
        elif len(killed) == 2 and settled(status) and status.replicas == 2 and not mended:
            mended.append(status.step)
            replace_dead_nodes(cluster.ray, CPUS)

    status, told = train_losing_nodes(cluster, spec, look)
    assert status.exit_code == 0, told
    tried = [rung for incident in status.incidents for rung in incident.rungs]
    assert tried[:2] == ["shrink", "shrink"] and set(tried[2:]) == {"grow"}, told
    assert all(incident.steps_lost <= 1 for incident in status.incidents), told
    assert (status.replicas, len(set(killed))) == (4, 2)
    check_like(untouched, spec, tmp_path)
    await_nothing_left(tmp_path / "ram")


@pytest.mark.long
def test_a_smaller_mesh_goes_on_from_a_larger_ones_checkpoint(
    cluster: Cluster, untouched: Untouched, tmp_path: Path
) -> None:
    """Both replicas of a stage die, and with them all copies of its state."""
    spec = recorded(cluster, tmp_path, "from-the-store")
    killed: list[str] = []
    mended: list[int] = []

    def look(status: Status) -> None:
        if not killed and settled(status) and status.step >= 12 and status.newest_checkpoint == 10:
            killed.extend(status.mesh[:2])
            for node in killed:
                kill(spec, status, node)
        elif killed and settled(status) and status.replicas == 1 and not mended and status.step > 11:
            mended.append(status.step)
            replace_dead_nodes(cluster.ray, CPUS)

    status, told = train_losing_nodes(cluster, spec, look)
    assert status.exit_code == 0, told
    first = status.incidents[0]
    assert (first.rung, first.step - first.steps_lost) == ("durable", 10), told
    assert {incident.rung for incident in status.incidents[1:]} == {"grow"} and status.replicas == 2, told
    check_like(untouched, spec, tmp_path)
    await_nothing_left(tmp_path / "ram")
