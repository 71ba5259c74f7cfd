"""A node whose devices compute what is wrong does not join."""

from pathlib import Path

import pytest
from conftest import Cluster
from herd import await_nothing_left, job, spec_of, train


@pytest.mark.long  # tests/unit/test_admission.py has the check itself, in its own process
@pytest.mark.timeout(300)
def test_a_node_that_computes_what_is_wrong_is_left_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The mesh needs all four nodes: the run ends at once, and says which one is wrong, and how."""
    wrong = cluster.ray.list_all_nodes()[-1]
    (raylet,) = wrong.all_processes["raylet"]
    file = cluster.faults / "wrong-node"
    file.write_text(str(raylet.process.pid))
    mesh = {"pp": 1, "dp_replicate": 4, "microbatches": 1}
    cluster_section = {"slots_per_node": 1, "admission": "on"}
    spec = spec_of(job("wrong-node", tmp_path, parallel=mesh, cluster=cluster_section, recovery={"min_replicas": 4}))
    try:
        status, told = train(spec)
    finally:
        file.unlink()
    assert status.exit_code == 1, told
    name = wrong.node_id[:8]
    problem = f"{name} computes what is wrong: cpu: 512 of 512 rows of a product of whole numbers are wrong"
    assert problem in status.verdict, (status.verdict, told)
    assert len(status.nodes) == 3 and name not in status.nodes
    await_nothing_left(tmp_path / "ram")
