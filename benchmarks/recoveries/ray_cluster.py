"""A local Ray cluster in a Python that has Ray Train: python -m recoveries.ray_cluster NODES CPUS

Prints the address once it stands. For each line on its standard input it replaces the nodes that have died, waits until
the new ones are there, and prints a line. It ends with its standard input.
"""

from __future__ import annotations

import sys

from orchestrator.localcluster import local_cluster, replace_dead_nodes


def main(nodes: int, cpus: int) -> None:
    with local_cluster(nodes, cpus) as cluster:
        print(cluster.address, flush=True)
        for _ in sys.stdin:
            replace_dead_nodes(cluster, cpus)
            print("mended", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
