"""What a contestant is, and what can be done to a run of it."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from recoveries.job import Job
from recoveries.marks import Recovery
from recoveries.nodes import Node

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])
END_S = 30.0


class ContestantFailed(RuntimeError):
    """It has ended, or has not recovered in time."""


@dataclass
class Running:
    """One contestant's run of a job."""

    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    restart: Callable[[], None]
    """Starts what has ended once more, as whoever watches over jobs would."""
    explain: Callable[[list[Recovery]], None] = lambda recoveries: None
    """Adds to the stages of all recoveries of this run, in their order, what the contestant itself tells."""
    ledger: Callable[[], dict[str, float]] = dict
    """How the contestant itself accounts for its time: node-seconds so far by label."""
    node_of: Callable[[int], Node] | None = None
    """The node of a worker's process; None where all ranks live on one."""
    controller: Callable[[], psutil.Process] | None = None
    """What decides; None where no single process does."""
    mend: Callable[[], None] = lambda: None
    """Brings a new node for each that has died."""
    has_spare: Callable[[], bool] = lambda: True
    """Whether a new node is known and ready."""

    ended: Callable[[], bool] = field(init=False)
    """Whether all that can go on by itself has ended."""

    def __post_init__(self) -> None:
        self.ended = lambda: self.process.poll() is not None

    def check(self) -> None:
        """Raises ContestantFailed when it has ended."""
        if self.ended():
            raise ContestantFailed(f"it has ended (exit code {self.process.returncode}): {self.last_words()}")

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]


@dataclass(frozen=True)
class Contestant:
    configuration: str
    start: Callable[[Job, str], AbstractContextManager[Running]]
    """With the Python of the peers' environment."""
    layouts: tuple[str, ...] = ("full", "small", "dp")
    guest: bool = False
    """Lives in the peers' environment."""
    has_nodes: bool = False
    """A whole node can be killed, with a spare at hand."""
    shrinks: bool = False
    """Goes on without those that were killed."""


@contextmanager
def process(job: Job, command: list[str], **env: str) -> Iterator[Running]:
    """A launcher and all that it starts; none of it is left at the end."""
    log = job.folder / "log"

    def start() -> subprocess.Popen[bytes]:
        with open(log, "ab") as said:
            return subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH, **env},
                cwd=job.folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    def restart() -> None:
        running.process = start()

    running = Running(job=job, process=start(), log=log, restart=restart)
    try:
        yield running
    finally:
        end(running.process)


def end(started: subprocess.Popen[Any]) -> None:
    """SIGKILL for a process and all under it."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(started.pid)
        family = [parent, *parent.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    started.wait(END_S)
    psutil.wait_procs(family, END_S)


def titled(title: str) -> psutil.Process:
    """The process under this one whose title begins so. Raises LookupError when there is none."""
    for member in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(member.cmdline()).startswith(title):
                return member
    raise LookupError(f"no process {title}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
