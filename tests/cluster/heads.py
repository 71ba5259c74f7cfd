"""A Ray cluster as `ray start` makes it, whose head node can be killed and started again, with Redis or without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from herd import free_port, wait_for

from orchestrator.localcluster import OBJECT_STORE_BYTES

# The head has an address of its own, so that a command can join another node, as on another machine.
HEAD, NODE = "127.0.0.2", "127.0.0.1"
NODE_UP_S = 60.0
COMMAND_S = 180.0
# How long Ray's processes wait for a head that is away: as docs/operations.md says with Redis; else short, for a test.
RECONNECT_S = "600"


class Herd:
    """The processes of a cluster: a head without CPUs, and nodes of two CPUs, all on this machine."""

    def __init__(self, folder: Path, redis: bool, environment: dict[str, str]) -> None:
        self.folder = folder
        self.port = free_port()
        self._temp = tempfile.mkdtemp(prefix="ray-")  # short: paths of sockets are
        self._families: list[list[psutil.Process]] = []
        self._environment = {
            "RAY_external_storage_namespace": f"herd-{self.port}",
            "RAY_gcs_rpc_server_reconnect_timeout_s": RECONNECT_S if redis else "5",
            **environment,
        }
        self._redis: subprocess.Popen[bytes] | None = None
        self._head: subprocess.Popen[bytes] | None = None
        self._nodes: list[subprocess.Popen[bytes]] = []
        if redis:
            self._start_redis()

    @property
    def address(self) -> str:
        return f"{HEAD}:{self.port}"

    def _start_redis(self) -> None:
        port = free_port()
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        self._redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._environment["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{port}"

    def start_head(self) -> None:
        # By this file `ray start` takes this machine's other raylets for the head's own, and refuses to start another.
        Path(self._temp, "ray_current_cluster").unlink(missing_ok=True)
        self._head = self._ray_start(
            HEAD,
            "--head",
            "--num-cpus=0",
            f"--port={self.port}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self._temp}",
            "--include-dashboard=false",
            *(["--redis-password="] if self._redis is not None else []),
        )

    def start_node(self) -> None:
        self._nodes.append(self._ray_start(NODE, f"--address={self.address}", "--num-cpus=2"))

    def _ray_start(self, address: str, *options: str) -> subprocess.Popen[bytes]:
        """Until the node's raylet answers, or the next one on this machine may take its ports."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        log = self.folder / f"ray-start-{len(list(self.folder.glob('ray-start-*')))}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [
                    Path(sys.executable).with_name("ray"),
                    "start",
                    "--block",
                    f"--node-ip-address={address}",
                    "--dashboard-agent-listen-port=0",
                    f"--object-store-memory={OBJECT_STORE_BYTES}",
                    *options,
                ],
                env={**os.environ, "PATH": path, **self._environment},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        wait_for(lambda: b"Ray runtime started" in log.read_bytes(), NODE_UP_S, f"a Ray node: {log}")
        return process

    def kill_head(self) -> set[int]:
        """SIGKILL for every process of the head node: what runs under it, the controller too. Their process ids."""
        assert self._head is not None
        family = [psutil.Process(self._head.pid), *_children(self._head.pid)]
        _kill(family)
        self._head.wait()
        self._head = None
        return {member.pid for member in family}

    def await_head_killed(self) -> None:
        """Until somebody else has killed the head; the `ray start` that was above it goes, too."""
        assert self._head is not None
        pid = self._head.pid
        wait_for(lambda: not any("gcs_server" in child.name() for child in _children(pid)), COMMAND_S, "the head's end")
        self.kill_head()

    def command(self, *arguments: str) -> str:
        """What `python -m orchestrator ...` prints in this cluster."""
        done = self.try_command(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def try_command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "orchestrator", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )

    @contextmanager
    def started(self, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """The same as a process of its own, killed at the end if it is still there; it prints where the test does."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "orchestrator", *arguments], env=self.environment | environment
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    @property
    def environment(self) -> dict[str, str]:
        """Of commands that are meant for this cluster."""
        return {**os.environ, **self._environment, "RAY_ADDRESS": self.address}

    def status(self, run: str) -> dict[str, Any]:
        """The run as `shepherd status` shows it; empty while nobody answers."""
        done = self.try_command("status", run, "--json")
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def raylets(self) -> int:
        """How many nodes, but for the head, have a raylet that lives."""
        return sum(any("raylet" in child.name() for child in _children(node.pid)) for node in self._nodes)

    def end(self) -> None:
        roots = [process for process in (self._head, *self._nodes, self._redis) if process is not None]
        _kill([member for root in roots for member in (psutil.Process(root.pid), *_children(root.pid))])
        for root in roots:
            root.wait()
        shutil.rmtree(self._temp, ignore_errors=True)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _kill(family: list[psutil.Process]) -> None:
    for member in family:
        with suppress(psutil.Error):
            member.kill()
    psutil.wait_procs(family, timeout=20)


@contextmanager
def herd_of(nodes: int, folder: Path, redis: bool, **environment: str) -> Iterator[Herd]:
    """A head and `nodes` nodes, one started after the other."""
    herd = Herd(folder, redis, environment)
    try:
        herd.start_head()
        for _ in range(nodes):
            herd.start_node()
        yield herd
    finally:
        herd.end()
