"""A Ray cluster of several raylets on this machine, for the demo and the tests: real processes, one for each node."""

from __future__ import annotations

import logging
import os
import random
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}
"""How soon Ray itself gives a node up: after 9 s where the raylet is gone, 19 where it stands still; by Ray's defaults
15 s and more than a minute. Shepherd's own connections find a lost node sooner (recovery.node_silence_s). See
docs/operations.md."""
OBJECT_STORE_BYTES = 100 * 1024 * 1024
"""Shepherd puts nothing into Ray's object store; this is near the smallest that Ray takes."""
NODES_WITHIN_S = 180.0
"""For all nodes to be there: on a machine of few cores they start one another late."""
_RAYLET_PORTS = iter(random.sample(range(30_000, 32_768), 2_768))
"""Below those that Linux gives to whoever asks for any; in no order, for other processes begin clusters, too."""


def isolate() -> None:
    """Prepare this process for a cluster of its own, whatever the user's environment points at, with its own token.

    Ray reads its authentication mode when it is imported, so this comes first.
    """
    assert "ray" not in sys.modules, "isolate() must come before Ray is imported"
    packages = str(Path(__file__).resolve().parent.parent)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.pop("SHEPHERD_TOKEN", None)
    os.environ.update(
        {
            "PYTHONPATH": os.pathsep.join([packages, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            **HEALTH_CHECKS,
        }
    )


def node_arguments(cpus: int, gpus: int = 0) -> dict[str, Any]:
    """What `Cluster.add_node` of Ray's own `Cluster` takes for a node of such a cluster.

    Its raylet listens on a port that no worker is ever given. Ray's head goes on knocking at a dead raylet's port, less
    and less often, and whatever comes to listen there is not reached until it knocks again: a controller that had taken
    such a port stood uncreated for 69 s (Ray 2.60). Where `ray start` makes the nodes, workers have ports of their own.
    """
    arguments = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": OBJECT_STORE_BYTES}
    return arguments | {"node_manager_port": _free_raylet_port()}


def replace_dead_nodes(cluster: Any, cpus: int, gpus: int = 0) -> None:
    """A new node for each of Ray's own `Cluster` that has lost its raylet; waits until it is there. The processes of
    the old ones are reaped."""
    for node in list(cluster.worker_nodes):
        if node.dead_processes():
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(**node_arguments(cpus, gpus))


def _free_raylet_port() -> int:
    for port in _RAYLET_PORTS:
        with suppress(OSError), socket.create_server(("", port)):
            return port
    raise AssertionError("this process has used up its ports for raylets")


@contextmanager
def local_cluster(nodes: int, cpus: int, gpus: int = 0) -> Iterator[Any]:
    """`nodes` raylets with `cpus` CPUs and `gpus` GPUs each and a head without any; this process is connected to them.

    Needs `isolate`. Yields Ray's own `Cluster`. At the end every process of it is gone.
    """
    assert os.environ.get("RAY_AUTH_TOKEN"), "call isolate() first"
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **node_arguments(cpus=0)})
    try:
        for _ in range(nodes):
            cluster.add_node(wait=False, **node_arguments(cpus, gpus))
        cluster.wait_for_nodes(timeout=NODES_WITHIN_S)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]
        sys.stdout.flush()
