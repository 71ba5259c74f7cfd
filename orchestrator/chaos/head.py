"""The death of the head node: its GCS, its raylet and all under it, where Ray can come back from Redis."""

from __future__ import annotations

import argparse
import os
import signal
import time
from contextlib import suppress

import psutil
import ray

from orchestrator.chaos import apart, net, node

_OF_THE_HEAD = ("dashboard/dashboard.py", "autoscaler/_private/monitor.py")
"""What Ray starts beside the GCS and the raylet of a head, and of no other node."""


def check() -> None:
    """Whether the head may be killed. From the controller's own process, which is on it.

    Raises:
        ValueError: nothing would bring the run back.
    """
    if not any(part.removeprefix("--redis_address=") not in ("", part) for part in _gcs().cmdline()):
        raise ValueError(
            "head-kill needs a GCS that keeps its state in Redis (RAY_REDIS_ADDRESS): without, the cluster and the run "
            "are over with their head. Kill it by hand and go on with `shepherd train --resume`"
        )


def kill() -> str:
    """SIGKILL for the head's processes, this one too, a moment after this returns; what will be done.

    Raises:
        ValueError: as `check`.
    """
    check()
    gcs, address = _gcs(), ray.get_runtime_context().gcs_address
    beside = [p for p in psutil.process_iter() if _is_beside(p, address)]
    victims = [gcs, *beside, *node.family_of(os.getpid())]
    apart.begin(__name__, *(str(victim.pid) for victim in victims))
    return f"SIGKILL for GCS {gcs.pid}, its raylet and {len(victims) - 2} other processes of the head"


def _gcs() -> psutil.Process:
    port = int(ray.get_runtime_context().gcs_address.rpartition(":")[2])
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "gcs_server" and port in net.listening_ports(process):
                return process
    raise ValueError("head-kill needs the controller on the head node, and the GCS is not on this one")


def _is_beside(process: psutil.Process, gcs_address: str) -> bool:
    with suppress(psutil.Error):
        command = " ".join(process.cmdline())
        return any(part in command for part in _OF_THE_HEAD) and f"--gcs-address={gcs_address}" in command
    return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kills processes a moment from now.")
    parser.add_argument("pids", type=int, nargs="+")
    given = parser.parse_args()
    apart.leave()
    apart.tell("about to kill")
    time.sleep(node.LAST_ANSWER_S)
    for pid in given.pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
