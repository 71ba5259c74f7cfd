"""The side of checkpoint_speed.py that starts ranks and asks them."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ANSWER_S, END_S = 600.0, 30.0


class RankFailed(RuntimeError):
    """A rank answered with an error, or not in time."""


class Ranks:
    """Processes of checkpoints.rank that form one group."""

    def __init__(self, world_size: int, size_bytes: int, *, python: str = sys.executable, **env: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        here = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        shared = (
            os.environ
            | env
            | {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        )
        self._said = [tempfile.TemporaryFile() for _ in range(world_size)]  # noqa: SIM115 closed by `end`
        self._processes = [
            subprocess.Popen(
                [python, "-m", "checkpoints.rank", str(rank), str(world_size), str(size_bytes)],
                env=shared | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
            for rank, said in enumerate(self._said)
        ]

    def ask(self, do: str, **arguments: Any) -> list[Any]:
        """What ``module.function`` of each rank returns; ``{rank}`` in an argument stands for the rank's number."""
        for rank, process in enumerate(self._processes):
            own = {
                name: value.replace("{rank}", str(rank)) if isinstance(value, str) else value
                for name, value in arguments.items()
            }
            assert process.stdin is not None
            process.stdin.write(json.dumps({"do": do} | own) + "\n")
            process.stdin.flush()
        answers = [self._answer(do, rank) for rank in range(len(self._processes))]
        errors = [f"rank {n}: {a['error']}" for n, a in enumerate(answers) if isinstance(a, dict) and "error" in a]
        if errors:
            raise RankFailed(f"{do}: {'; '.join(errors)}")
        return answers

    def seconds(self, do: str, **arguments: Any) -> float:
        """Of the slowest rank."""
        return max(seconds for seconds, _ in self.ask(do, **arguments))

    def _answer(self, do: str, rank: int) -> Any:
        stdout = self._processes[rank].stdout
        assert stdout is not None
        if not select.select([stdout], [], [], ANSWER_S)[0]:
            raise RankFailed(f"{do}: rank {rank} has not answered for {ANSWER_S:g} s")
        line = stdout.readline()
        if not line:
            self._said[rank].seek(0)
            said = self._said[rank].read().decode(errors="replace")[-1000:]
            raise RankFailed(f"{do}: rank {rank} has died: {said}")
        return json.loads(line)

    def end(self) -> None:
        trees = [psutil.Process(p.pid).children(recursive=True) for p in self._processes if p.poll() is None]
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in (child for tree in trees for child in tree):
            if child.is_running():
                child.kill()
        for said in self._said:
            said.close()


@contextmanager
def ranks(world_size: int, size_bytes: int, layout: str = "", **options: str) -> Iterator[Ranks]:
    """Processes that hold a state; without a layout, one shard each, and no group. Of no bytes, none."""
    group = Ranks(world_size, size_bytes, **options)
    try:
        if size_bytes:
            group.ask("rank.build", layout=layout)
        yield group
    finally:
        group.end()
