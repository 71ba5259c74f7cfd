"""A Ray cluster whose nodes have addresses, and networks, of their own: a network namespace each, on one bridge.

Needs root. Everything in it is done by commands, as people do it: the test's own process is on another network.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from herd import wait_for

from orchestrator.localcluster import OBJECT_STORE_BYTES

PORT = 6379
BIN = Path(sys.executable).parent
STARTED_WITHIN_S = 120.0


def why_not() -> str:
    """Why there can be no such cluster here; empty when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "nsenter", "iptables") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"probe-{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
        try:
            subprocess.run(_in(name, "iptables", "-w", "-L", "-n"), check=True, capture_output=True)
        finally:
            _ip("netns", "del", name)
    except subprocess.CalledProcessError as e:
        return f"this kernel gives no network namespace with iptables: {e.stderr}"
    return ""


@dataclass
class Node:
    name: str
    address: str
    folder: str
    role: list[str]
    """What makes it a head, or a node of one, as options of `ray start`."""
    process: subprocess.Popen[bytes]


@dataclass(frozen=True)
class Herd:
    nodes: list[Node]
    """The first is the head, which has no CPU; the others have one each."""

    def mend(self) -> None:
        """Start Ray again on nodes whose raylet has ended: that is what a raylet does which Ray has given up."""
        for node in self.nodes:
            if node.process.poll() is not None:
                node.process = _ray_start(node.name, node.address, node.folder, node.role)
        wait_for(lambda: _alive(self) == len(self.nodes), STARTED_WITHIN_S, "all nodes")

    def command(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """`shepherd ...` on the head node, with its output in a file."""
        environment = {**os.environ, "RAY_ADDRESS": f"{self.nodes[0].address}:{PORT}"}
        with open(log, "wb") as out:
            return subprocess.Popen(
                _in(self.nodes[0].name, sys.executable, "-P", "-m", "orchestrator", *arguments),
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
            )


@contextmanager
def herd(count: int) -> Iterator[Herd]:
    """A head and `count` nodes with one CPU each, at addresses of their own. At the end all of it is gone."""
    tag = secrets.token_hex(3)
    subnet = f"10.{int(tag[:2], 16) % 100 + 100}.{int(tag[2:4], 16)}"
    bridge = f"sb{tag}"
    names = [f"s{tag}{n}" for n in range(count + 1)]
    nodes: list[Node] = []
    folders: list[str] = []
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for number, name in enumerate(names):
            _ip("netns", "add", name)
            _ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"v{name}", "master", bridge, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{subnet}.{number + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        for number, name in enumerate(names):
            address = f"{subnet}.{number + 1}"
            # Raylets with one temporary folder that start together take each other's sockets.
            folders.append(tempfile.mkdtemp(prefix="sh"))
            head = [f"--port={PORT}", "--head", "--num-cpus=0", "--include-dashboard=false"]
            role = head if number == 0 else ["--num-cpus=1", f"--address={subnet}.1:{PORT}"]
            process = _ray_start(name, address, folders[-1], role)
            nodes.append(Node(name, address, folders[-1], role, process))
            if number == 0:
                wait_for(lambda: _listens(names[0], PORT), STARTED_WITHIN_S, "the GCS")
        yield Herd(nodes=nodes)
    finally:
        for name in names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in listed.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for node in nodes:
            node.process.wait(30)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _ray_start(name: str, address: str, folder: str, role: list[str]) -> subprocess.Popen[bytes]:
    options = [
        "--block",
        f"--node-ip-address={address}",
        f"--temp-dir={folder}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
        *role,
    ]
    return subprocess.Popen(
        _in(name, str(BIN / "ray"), "start", *options),
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _listens(name: str, port: int) -> bool:
    done = subprocess.run(_in(name, "ss", "-ltnH", f"sport = :{port}"), capture_output=True, text=True, check=True)
    return bool(done.stdout.strip())


def _alive(made: Herd) -> int:
    """Nodes that Ray counts as alive."""
    program = (
        "import ray, logging; ray.init(log_to_driver=False, logging_level=logging.ERROR);"
        "print(sum(n['Alive'] for n in ray.nodes()))"
    )
    environment = {**os.environ, "RAY_ADDRESS": f"{made.nodes[0].address}:{PORT}"}
    done = subprocess.run(
        _in(made.nodes[0].name, sys.executable, "-c", program),
        capture_output=True,
        text=True,
        env=environment,
        timeout=STARTED_WITHIN_S,
    )
    return int(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else 0


def _in(name: str, *command: str) -> list[str]:
    """A command on a node's network; its file systems are those of all."""
    return ["nsenter", f"--net=/run/netns/{name}", *command]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
