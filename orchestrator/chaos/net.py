"""Network cuts of one node, in its own network namespace: iptables drops packets.

The rules stand in chains of their own, which a process apart puts into force and takes out again. Each rule also
carries the second from which on it matches nothing, so that the kernel ends a cut whose process was killed.
"""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
import socket
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import psutil

from orchestrator.chaos import apart
from orchestrator.core.actions import InjectFault

BEGINS_AFTER_S = 0.5
"""For the answer to the order to get through; within a cluster that takes milliseconds."""
TOOL_DEADLINE_S = 15.0
PORTS_OF_A_RULE = 15
"""As many as iptables takes."""
NEEDS = (
    "needs iptables or tc, and CAP_NET_ADMIN, on the node (in Kubernetes: securityContext.capabilities.add NET_ADMIN)"
)


def listening_ports(process: psutil.Process | None = None) -> tuple[int, ...]:
    """The TCP ports at which a process, by default this one, can be reached."""
    connections = (process or psutil.Process()).net_connections("tcp")
    listening = (c for c in connections if c.status == psutil.CONN_LISTEN)
    return tuple(sorted({c.laddr.port for c in listening}))


def cut(order: InjectFault, own: str) -> str:
    """Cut this node off as ordered, a moment from now and for `seconds`; what will be done.

    Args:
        own: this node's address.

    Raises:
        ValueError: nodes share an address, so that none can be cut off from another.
        PermissionError: this process may not change the node's network, or cannot.
    """
    given = order.parameters
    controller, _, ports = given["controller"].rpartition("|")
    peers = [] if not given["peers"] else given["peers"].split(",")
    whom = {"controller": [], "head": [controller], "peers": peers, "all": [controller, *peers]}[given["from"]]
    reached = [controller] if given["from"] == "controller" else whom
    if own in reached or not reached:
        raise ValueError(f"net-cut needs nodes with addresses of their own: {own} is not the only one at its address")
    if given["from"] == "peers" and controller in peers:
        raise ValueError("net-cut --from peers: a peer is on the head node, whose address the controller has; use all")
    seconds = float(given["seconds"])
    chain = f"shepherd-{os.getpid()}-{order.number}"
    until = datetime.now(UTC) + timedelta(seconds=math.ceil(BEGINS_AFTER_S + seconds + 1))
    expiry = ["-m", "time", "--datestop", until.strftime("%Y-%m-%dT%H:%M:%S")]
    hooks = [hook for hook in ("INPUT", "OUTPUT") if given["direction"] in ("both", {"INPUT": "in"}.get(hook, "out"))]
    table = _table_of(reached[0])
    for hook in hooks:
        _run(table, "-w", "-N", f"{chain}-{hook}")
        for match in _matches(hook, whom, controller, [int(port) for port in ports.split(",")]):
            _run(table, "-w", "-A", f"{chain}-{hook}", *match, *expiry, "-j", "DROP")
    apart.begin(__name__, "--table", table, "--chain", chain, "--seconds", str(seconds), *hooks)
    way = {"both": "from and to", "in": "from", "out": "to"}[given["direction"]]
    what = f"the controller's process at {controller}" if given["from"] == "controller" else ", ".join(reached)
    return f"packets {way} {what} are dropped at {own} for {seconds:g} s"


def _matches(hook: str, whom: Iterable[str], controller: str, ports: list[int]) -> list[list[str]]:
    """What the rules of a chain match: all packets of `whom`; of nobody: those between the controller and this agent.

    The controller's port is at the far end of what this agent has opened, and the agent's at the near end of what the
    controller has. Everything else on the two nodes, Ray's own processes too, can still be reached.
    """
    far, near = ("-s", "sports") if hook == "INPUT" else ("-d", "dports"), "dports" if hook == "INPUT" else "sports"
    if whom:
        return [[far[0], address] for address in whom]
    told = []
    for side, numbers in ((far[1], ports), (near, list(listening_ports()))):
        for start in range(0, len(numbers), PORTS_OF_A_RULE):
            part = ",".join(map(str, numbers[start : start + PORTS_OF_A_RULE]))
            told.append([far[0], controller, "-p", "tcp", "-m", "multiport", f"--{side}", part])
    return told


def _table_of(address: str) -> str:
    return "ip6tables" if ipaddress.ip_address(socket.gethostbyname(address)).version == 6 else "iptables"


def _run(*command: str) -> None:
    """Raises PermissionError when it fails, with its own words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_DEADLINE_S)
    except OSError as e:
        raise PermissionError(f"{NEEDS}: {e}") from e
    if done.returncode:
        raise PermissionError(f"{NEEDS}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")


def _keep_cut(table: str, chain: str, hooks: list[str], seconds: float) -> None:
    apart.tell("about to cut")
    time.sleep(BEGINS_AFTER_S)
    try:
        for hook in hooks:
            _run(table, "-w", "-I", hook, "-j", f"{chain}-{hook}")
        time.sleep(seconds)
    finally:
        for hook in hooks:
            for undo in (["-D", hook, "-j", f"{chain}-{hook}"], ["-F", f"{chain}-{hook}"], ["-X", f"{chain}-{hook}"]):
                with suppress(PermissionError):
                    _run(table, "-w", *undo)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Keeps this node cut off for a while.")
    parser.add_argument("--table", required=True)
    parser.add_argument("--chain", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("hooks", nargs="+")
    asked = parser.parse_args()
    apart.leave()
    _keep_cut(asked.table, asked.chain, asked.hooks, asked.seconds)
