"""torch's own LocalElasticAgent with workers from a fork server that has imported everything: no line of it is ours.

python -m recoveries.forkserver_agent JOB.json RANKS
"""

from __future__ import annotations

import multiprocessing
import sys

from recoveries import rank


def main(job_file: str, ranks: int) -> None:
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    multiprocessing.get_context("forkserver").set_forkserver_preload(["recoveries.preload"])
    parameters = RendezvousParameters("c10d", "localhost:0", run_id="recovery", min_nodes=1, max_nodes=1)
    spec = WorkerSpec(
        role="trainer",
        local_world_size=ranks,
        entrypoint=rank.main,
        args=(job_file,),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=1000,
        monitor_interval=0.1,
    )
    LocalElasticAgent(spec, logs_specs=DefaultLogsSpecs(), start_method="forkserver").run()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
