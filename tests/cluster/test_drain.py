"""Nodes are taken out of a run while it trains: by its operator, and by Ray. Nothing is lost, and nothing changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ray
from conftest import CPUS, Cluster
from herd import await_nothing_left, final_digest, job, replace_dead_nodes, spec_of, train

from orchestrator.localcluster import node_arguments
from orchestrator.observe.status import Status
from orchestrator.runtime import driver

pytestmark = pytest.mark.timeout(300)


def drain_by_ray(ray_node: str) -> None:
    """As a cloud's notice that it takes the machine back in ten minutes reaches Ray."""
    ray_command = str(Path(sys.executable).with_name("ray"))
    address = ray.get_runtime_context().gcs_address
    words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "notice", "--deadline-remaining-seconds"]
    drain = [ray_command, "drain-node", "--address", address, "--node-id", ray_node, *words, "600"]
    subprocess.run(drain, check=True, capture_output=True, timeout=60)


def replace_node(cluster: Cluster, ray_node: str) -> None:
    """What Ray drains stays so."""
    for node in list(cluster.ray.worker_nodes):
        if node.node_id == ray_node:
            cluster.ray.remove_node(node)
            cluster.ray.add_node(**node_arguments(CPUS))
    replace_dead_nodes(cluster.ray, CPUS)


def test_drained_nodes_are_replaced_without_a_loss(cluster: Cluster, tmp_path: Path) -> None:
    """Each node holds one stage with both of its replicas, so a death would cost the steps since the checkpoint."""
    calm, spec = spec_of(job("calm", tmp_path)), spec_of(job("drained", tmp_path, cluster={"spares": 1}))
    assert train(calm)[0].exit_code == 0
    slow = cluster.faults / "drained.py"
    slow.write_text("import time; time.sleep(6.0 if session.state.step >= 4 else 0.0)")
    drained: list[str] = []
    by_ray: list[str] = []

    def drain(status: Status) -> None:
        spares = [name for name, state in status.nodes.items() if state == "spare"]
        in_peace = status.job == "training" and all(i.total_s is not None for i in status.incidents)
        if len(drained) == 2 and len(status.incidents) == 2 and slow.exists():
            slow.unlink()  # until Ray's notice was heard, the run must last
        if not in_peace or not spares or len(status.incidents) < len(drained):
            return
        if not drained and status.step >= 4:
            token = driver.read_token(spec.cluster.log_dir, "drained")
            with pytest.raises(ValueError, match="nobody: is no node of this run"):
                driver.drain(driver.find("drained"), token, "nobody", by="the test")
            driver.drain(driver.find("drained"), token, status.mesh[0], by="the test")
            drained.append(status.mesh[0])
        elif len(drained) == 1:
            name = status.mesh[1]
            ids = [str(n["NodeID"]) for n in ray.nodes() if n["Alive"] and n["NodeID"].startswith(name[:8])]
            by_ray.extend(ids)
            drain_by_ray(ids[0])
            drained.append(name)

    try:
        status, told = train(spec, drain)
    finally:
        for ray_node in by_ray:
            replace_node(cluster, ray_node)
    assert status.exit_code == 0, told
    assert [(i.cause, i.rung) for i in status.incidents] == [("leave", "spare")] * 2, told
    assert all(i.steps_lost <= 1 for i in status.incidents)
    assert all(status.nodes[name] == "lost" for name in drained)
    # A machine that was drained is not taken again, though it was free for the second change.
    assert {name[:8] for name in status.mesh}.isdisjoint({name[:8] for name in drained})
    assert f"node {drained[1]} will be taken away: Ray drains it" in told
    assert all(f"node {name} is let go: it is not needed any more" in told for name in drained)
    assert final_digest(spec) == final_digest(calm)
    await_nothing_left(tmp_path / "ram")
