"""Who takes part in recovery.py, and how it is configured."""

from __future__ import annotations

from functools import partial

from recoveries.ours import shepherd
from recoveries.peers import forkserver, nvrx, ray_train, torchft, torchrun
from recoveries.running import Contestant

STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which gloo hangs or fails in the second attempt"
DCP = "DCP each --save-every steps, resumes from the newest"
NODES = "with --kill node an agent for each node and each spare, c10d store in a process of its own"
CONTESTANTS = {
    "shepherd": Contestant(
        "shepherd train with its defaults: a snapshot of each step in memory, durable checkpoints each --save-every "
        "steps; a Ray node for each node of the layout",
        shepherd,
        has_nodes=True,
    ),
    "torchrun": Contestant(
        f"torchrun --standalone --nproc-per-node RANKS --max-restarts 1000; {NODES}; {DCP}; {STORE}",
        torchrun,
        has_nodes=True,
    ),
    "fork server": Contestant(
        "torch's LocalElasticAgent, start_method='forkserver', all imports preloaded; c10d rendezvous, "
        f"max_restarts=1000, monitor_interval=0.1; {DCP}; {STORE}",
        forkserver,
    ),
    "Ray Train": Contestant(
        "Ray Train v2: TorchTrainer, FailureConfig(max_failures=-1), TorchConfig(backend='gloo'), DCP checkpoints that "
        "all workers report each --save-every steps, num_to_keep=2; a Ray node for each node of the layout",
        ray_train,
        has_nodes=True,
        guest=True,
    ),
    "NVRx": Contestant(
        "nvidia-resiliency-ext: ft_launcher --standalone --nproc-per-node RANKS --max-restarts 1000 "
        f"--ft-restart-policy any-failed; {NODES}; {DCP}; {STORE}",
        nvrx,
        has_nodes=True,
        guest=True,
    ),
    "torchft": Contestant(
        "torchft_lighthouse --min_replicas=1 --join_timeout_ms=10000 (heartbeats are missed after 5 s); "
        "DistributedDataParallel and Manager with min_replica_size=1, a torchrun --max-restarts 1000 for each replica; "
        "the figure is that of the survivors' first step without the dead replica",
        partial(torchft, join_timeout_ms=10_000),
        layouts=("dp",),
        guest=True,
        shrinks=True,
    ),
    "torchft eager": Contestant(
        "the same with --heartbeat_timeout_ms=1000 --join_timeout_ms=100 --quorum_tick_ms=50",
        partial(torchft, heartbeat_timeout_ms=1000, join_timeout_ms=100, quorum_tick_ms=50),
        layouts=("dp",),
        guest=True,
        shrinks=True,
    ),
}
