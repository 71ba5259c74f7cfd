"""One real Ray cluster for all tests of this folder: a head and four raylets, each its own processes."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flaky_s3
import pytest
from herd import gpus_of, replace_dead_nodes, train

from orchestrator.localcluster import local_cluster
from orchestrator.observe.status import Status
from orchestrator.spec import JobSpec

NODES = 4
CPUS = 2


@dataclass(frozen=True)
class Cluster:
    ray: Any
    """Ray's own ray.cluster_utils.Cluster."""
    faults: Path
    """Folder in which `<run>.py` is a fault for that run's workers."""


def train_losing_nodes(
    cluster: Cluster, spec: JobSpec, on_status: Callable[[Status], None]
) -> tuple[Status, list[str]]:
    """As herd's `train`; the cluster is whole again for the next test, however this ends."""
    try:
        return train(spec, on_status)
    finally:
        replace_dead_nodes(cluster.ray, CPUS)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    faults = tmp_path_factory.mktemp("faults")
    before = dict(os.environ)
    os.environ["SHEPHERD_TEST_FAULTS"] = str(faults)
    os.environ.update(flaky_s3.environment())
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    try:
        with local_cluster(NODES, CPUS, gpus_of(CPUS)) as ray_cluster:
            yield Cluster(ray=ray_cluster, faults=faults)
    finally:
        os.environ.clear()
        os.environ.update(before)
