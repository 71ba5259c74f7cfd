"""A mesh goes on with fewer replicas when a node is gone and no spare is left, and takes them back when one comes.

The oracle is a run that nobody touches: each step has the same samples, and losses that differ by rounding only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CPUS, Cluster
from herd import await_nothing_left, job, replace_dead_nodes, spec_of, train

from orchestrator.chaos import faults
from orchestrator.core import events as ev
from orchestrator.observe.status import Status
from orchestrator.runtime import journal
from orchestrator.runtime.controller import namespace_of
from orchestrator.spec import JobSpec
from storage.commits import read_commit, verify

pytestmark = pytest.mark.timeout(300)

# Of float32 sums in another order, over 40 steps: measured is 1e-5.
TOLERANCE = 1e-4

# Each rank notes which samples it feeds; a shrunk mesh takes its time, so that a node can come meanwhile.
RECORD = """
import hashlib, json, time
step, rows = session.state.step + 1, session.stage.rows
if session.stage.is_first:
    samples = {row: session.dataset.batch(step, range(row, row + 1))[0] for row in rows}
    fed = {row: hashlib.sha256(tokens.numpy().tobytes()).hexdigest() for row, tokens in samples.items()}
    with open(FED, "a") as file:
        file.write(json.dumps([session.generation, step, fed]) + "\\n")
parallel = session.config.parallel
time.sleep(1.0 if parallel.dp_replicate == 1 else 0.3 if session.generation == 1 and step > 5 and PATIENT else 0.0)
"""


def recorded(cluster: Cluster, folder: Path, name: str, patient: bool, **sections: dict[str, Any]) -> JobSpec:
    (cluster.faults / f"{name}.py").write_text(f"FED, PATIENT = {str(folder / f'{name}.fed')!r}, {patient}\n{RECORD}")
    sections["recovery"] = {"grow_settle_s": 1} | sections.get("recovery", {})
    return spec_of(job(name, folder, run={"steps": 40}, cluster={"slots_per_node": 1}, **sections))


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


def check_like_untouched(calm: JobSpec, hurt: JobSpec, folder: Path) -> None:
    samples = fed(hurt, folder)
    assert samples == fed(calm, folder)
    assert {len(rows) for rows in samples.values()} == {hurt.data.global_batch}
    for ours, theirs in zip(losses(hurt), losses(calm), strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=0)
    assert len(losses(hurt)[0]) == hurt.run.steps
    assert verify(hurt.run.url, read_commit(hurt.run.url, hurt.run.steps)) == []


def kill(spec: JobSpec, status: Status, node: str) -> None:
    faults.kill_node(namespace_of(spec.run.name), node, spec.run.name, status.step)


def settled(status: Status) -> bool:
    return status.job == "training" and all(i.total_s is not None for i in status.incidents)


def hurt_and_mend(cluster: Cluster, hurt: Callable[[Status], None]) -> tuple[Callable[[Status], None], list[str]]:
    """What to do at each look: `hurt` once at step 8, and a new node once the mesh has done steps without the other."""
    done: list[str] = []

    def look(status: Status) -> None:
        if settled(status) and status.step >= 8 and not done:
            done.append("hurt")
            hurt(status)
        elif (
            settled(status) and status.replicas == 1 and done == ["hurt"] and status.step > status.incidents[0].step + 1
        ):
            done.append("mended")
            replace_dead_nodes(cluster.ray, CPUS)

    return look, done


def test_a_mesh_shrinks_when_a_node_dies_and_grows_back(cluster: Cluster, tmp_path: Path) -> None:
    """The place of the dead node is taken by its stage's other replica: snapshots have other numbers from then on."""
    calm, spec = recorded(cluster, tmp_path, "calm", False), recorded(cluster, tmp_path, "shrinks", True)
    assert train(calm)[0].exit_code == 0
    killed: list[str] = []

    def hurt(status: Status) -> None:
        killed.append(status.mesh[0])
        kill(spec, status, status.mesh[0])

    look, done = hurt_and_mend(cluster, hurt)
    try:
        status, told = train(spec, look)
    finally:
        replace_dead_nodes(cluster.ray, CPUS)
    assert (status.exit_code, done) == (0, ["hurt", "mended"]), told
    assert [(i.cause, i.rung) for i in status.incidents] == [("node", "shrink"), ("grow", "grow")], told
    assert [i.steps_lost <= 1 for i in status.incidents] == [True, True], told
    assert status.incidents[0].culprit == killed[0] and killed[0] not in status.mesh
    assert (status.replicas, len(status.mesh)) == (2, 4)
    check_like_untouched(calm, spec, tmp_path)
    assert status.ledger_us["degraded_capacity"] > 0
    assert sum(status.ledger_us.values()) == status.owed_us == round(status.wall_clock_s * 1e6) * status.places
    await_nothing_left(tmp_path / "ram")
