"""What `shepherd doctor` looks at on one machine: facts, no judgement. Runs in a Ray actor on each node.

Each method answers one question and may hang, as a lost mount makes it: the caller has the deadline, and the actor
answers other questions meanwhile.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from orchestrator.preflight import bind_problem
from orchestrator.runtime.controller import metadata_version
from orchestrator.runtime.preparation import worker_env
from orchestrator.spec import JobSpec, parse
from storage.redact import redacted
from storage.urls import probe, read_bytes, remove, write_exclusive

TOOL_DEADLINE_S = 180.0
"""For a process that imports torch: 3 s alone, 37 s for eight at once on two cores."""
CONNECT_DEADLINE_S = 5.0
"""For one connection between nodes; they are milliseconds apart."""
LISTEN_DEADLINE_S = 300.0
"""How long a node waits to be dialled before it gives up, should nobody tell it to."""
NONCE_BYTES = 16
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs")
CGROUPS = Path("/sys/fs/cgroup")
PACKAGES = ("orchestrator", "storage", "trainer")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder, or what there is of the path to it."""

    path: str
    type: str
    """Of the file system: tmpfs, ext4, nfs4 and the like."""
    size_bytes: int
    free_bytes: int
    writable: bool
    """For this user, as far as permissions tell."""
    device: str
    """Names the file system: equal on nodes that are one machine in truth."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    total_bytes: int
    available_bytes: int
    limit_bytes: int | None
    """Of the tightest cgroup around this process; None when none sets one."""
    limit_free_bytes: int | None
    """What that cgroup has left, when the kernel has dropped what it can of the cache."""
    pool: str
    """Names what the memory is taken from: equal on nodes that are one machine, or one container, in truth."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    files: int | None
    """Soft limit of open files in a process; None: unlimited."""
    files_hard: int | None
    processes: int | None
    """Limit of this user's threads; None: unlimited, or a user whom it does not bind."""
    threads: int
    """That this user has now."""
    cgroup_tasks: int | None
    """Limit of the tightest pids cgroup; None when none sets one."""
    cgroup_tasks_now: int


class NodeDoctor:
    """The actor: one on each node."""

    def __init__(self, spec_document: dict[str, Any]) -> None:
        self._spec: JobSpec = parse(spec_document)
        self._listener: socket.socket | None = None
        self._nonce = secrets.token_bytes(NONCE_BYTES)

    def hello(self) -> str:
        """The machine's name."""
        return platform.node()

    def place(self, path: str) -> Place:
        return place(path or f"/dev/shm/shepherd-{os.getuid()}")

    def temporary(self) -> Place:
        return place(tempfile.gettempdir())

    def memory(self) -> Memory:
        return memory()

    def limits(self) -> Limits:
        return limits()

    def clock(self) -> int:
        """Nanoseconds since 1970 by this node's clock."""
        return time.time_ns()

    def versions(self) -> dict[str, str]:
        return versions()

    def numeric(self) -> dict[str, Any]:
        """The numeric class of this node's workers and its CUDA devices, as trainer/numeric.py prints them."""
        return numeric(self._spec)

    def bind(self, host: str, port: int) -> str:
        """Whether a server can listen there: empty, or why not."""
        return bind_problem(host, port)

    def write(self, name: str, content: bytes) -> None:
        """Put a record under run.url."""
        _told(lambda: write_exclusive(self._spec.run.url, name, content))

    def sees(self, name: str, content: bytes) -> bool:
        """Whether this node finds that record, as it was written elsewhere."""
        try:
            return bool(_told(lambda: read_bytes(self._spec.run.url, name)) == content)
        except FileNotFoundError:
            return False

    def remove(self, name: str) -> None:
        _told(lambda: remove(self._spec.run.url, name))

    def probe(self) -> None:
        """Raises RuntimeError when run.url cannot be written here or does not honour exclusive creation."""
        _told(lambda: probe(self._spec.run.url))

    def listen(self, host: str) -> tuple[str, int, bytes]:
        """Answer on a free port of the node's Ray address with a nonce, until the actor ends; where, and the nonce."""
        if self._listener is None:
            self._listener = socket.create_server((host, 0), backlog=1024)
            self._listener.settimeout(LISTEN_DEADLINE_S)
            threading.Thread(target=_answer, args=(self._listener, self._nonce), daemon=True).start()
        return host, int(self._listener.getsockname()[1]), self._nonce

    def dial(self, peers: dict[str, tuple[str, int, bytes]]) -> dict[str, str]:
        """Of each peer, empty when it answers at its address, or why not."""
        return {name: dial(*peer) for name, peer in peers.items()}


def place(path: str) -> Place:
    """The file system on which `path` lies, or its nearest parent that exists."""
    folder = Path(path).expanduser()
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return Place(
        path=str(Path(path).expanduser()),
        type=_file_system(folder.resolve()),
        size_bytes=usage.total,
        free_bytes=usage.free,
        writable=os.access(folder, os.W_OK | os.X_OK),
        device=f"{_boot()}/{folder.stat().st_dev}",
    )


def _file_system(folder: Path) -> str:
    parts = {p.mountpoint: p.fstype for p in psutil.disk_partitions(all=True)}
    return next((parts[str(parent)] for parent in (folder, *folder.parents) if str(parent) in parts), "")


def _boot() -> str:
    """Names this machine since it was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def memory(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Memory:
    """Of the machine, and of the cgroups (version 1 or 2) in which this process is."""
    virtual = psutil.virtual_memory()
    tightest: tuple[int, int, str] | None = None
    for folder, v2 in _cgroups(root, own, "memory"):
        limit = _number(folder / ("memory.max" if v2 else "memory.limit_in_bytes"))
        used = _number(folder / ("memory.current" if v2 else "memory.usage_in_bytes"))
        if limit is None or used is None or limit >= virtual.total:
            continue
        # As kubelet counts a container's working set: without the cache of files that are not in use.
        cache = _stat(folder / "memory.stat", "inactive_file" if v2 else "total_inactive_file")
        free = max(0, limit - max(0, used - cache))
        if tightest is None or free < tightest[1]:
            tightest = (limit, free, str(folder))
    limit_bytes, limit_free_bytes, pool = tightest or (None, None, "")
    return Memory(
        total_bytes=virtual.total,
        available_bytes=virtual.available,
        limit_bytes=limit_bytes,
        limit_free_bytes=limit_free_bytes,
        pool=f"{_boot()}{pool}",
    )


def limits(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Limits:
    """Of this process, which are those of the agents and workers: the raylet starts them all."""
    files, files_hard = (_finite(n) for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    processes = _finite(resource.getrlimit(resource.RLIMIT_NPROC)[0])
    tightest: tuple[int, int] | None = None
    for folder, _ in _cgroups(root, own, "pids"):
        limit, now = _number(folder / "pids.max"), _number(folder / "pids.current")
        if limit is not None and now is not None and (tightest is None or limit - now < tightest[0] - tightest[1]):
            tightest = (limit, now)
    return Limits(
        files=files,
        files_hard=files_hard,
        processes=None if os.geteuid() == 0 else processes,
        threads=_threads_of(os.getuid()),
        cgroup_tasks=tightest[0] if tightest else None,
        cgroup_tasks_now=tightest[1] if tightest else 0,
    )


def _cgroups(root: Path, own: Path, controller: str) -> list[tuple[Path, bool]]:
    """The folders of the cgroups around this process that have `controller`, the innermost first; True: version 2."""
    found: list[tuple[Path, bool]] = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        v2 = controllers == ""
        if not v2 and controller not in controllers.split(","):
            continue
        top = root if v2 else root / controller
        # In a container the path is the host's, and what is mounted is the container's own group.
        inner = top / path.lstrip("/")
        start = inner if inner.is_dir() else top
        for folder in (start, *start.parents):
            found.append((folder, v2))
            if folder == top:
                break
    return found


def _number(path: Path) -> int | None:
    """The number in a cgroup's file; None when there is none, or it is "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _stat(path: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _threads_of(uid: int) -> int:
    threads = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.uids().real == uid:
                threads += process.num_threads()
    return threads


def versions() -> dict[str, str]:
    """What must be equal on all nodes beside the numeric class: `source` names the content of Shepherd's own files."""
    found = {"python": platform.python_version(), "shepherd": metadata_version()}
    for name in ("ray", "numpy", "tokenizers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found | {"source": digest.hexdigest()[:12]}


def numeric(spec: JobSpec) -> dict[str, Any]:
    """What trainer/numeric.py prints in a process of its own, as workers are started.

    Raises:
        RuntimeError: it fails; the message is its last line.
    """
    env = {**os.environ, **worker_env(spec)}
    if not env.get("CUDA_VISIBLE_DEVICES"):
        env.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the devices from an actor that reserves none
    done = subprocess.run(
        [sys.executable, "-P", "-m", "trainer.numeric"],
        input=json.dumps(dataclasses.asdict(spec.worker_config)),
        env=env,
        capture_output=True,
        text=True,
        timeout=TOOL_DEADLINE_S,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(redacted(last))
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def dial(host: str, port: int, nonce: bytes) -> str:
    """Connect and read the nonce that only the right machine knows; empty, or what went wrong."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_DEADLINE_S) as connection:
            heard = b""
            while len(heard) < len(nonce) and (piece := connection.recv(len(nonce) - len(heard))):
                heard += piece
    except OSError as e:
        return f"{host}: {e.strerror or e}"
    return "" if heard == nonce else f"{host} is another machine, seen from there"


def _answer(listener: socket.socket, nonce: bytes) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(CONNECT_DEADLINE_S)
                with suppress(OSError):
                    connection.sendall(nonce)


def _told(work: Any) -> Any:
    """The result of `work`; a store's own exceptions may not be picklable, and their text may hold credentials."""
    try:
        return work()
    except FileNotFoundError:
        raise
    except Exception as e:
        raise RuntimeError(redacted(f"{type(e).__name__}: {e}" if str(e) else repr(e))) from None
