"""Runs on a cluster whose nodes have networks of their own, hurt by `shepherd chaos`: for tests and scorecards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import netns
import tomli_w
from herd import final_digest, job, spec_of, wait_for

from orchestrator.spec import JobSpec

STEPS = 40
PAUSE_S = 0.6
"""For as long as a test wants it: there must be steps to be done during a cut, and after it."""
HURT_AT_STEP = 4
TRAINS_WITHIN_S = 90.0
ENDS_WITHIN_S = 180.0
PATIENCE = {"node_silence_s": 4.5, "rank_silence_s": 5, "stall_floor_s": 5, "driver_lease_s": 60}
FAULT = """
import pathlib, time
folder = pathlib.Path({folder!r})
with open(folder / "steps", "a") as log:
    log.write(f"{{session.generation}} {{session.rank}} {{session.state.step}} {{time.monotonic()}}\\n")
try:
    pause = float((folder / "slow").read_text())
except (FileNotFoundError, ValueError):  # it is gone, or is just being written
    pause = 0
time.sleep(pause)
"""


@dataclass
class Stage:
    """A cluster, and what runs on it."""

    herd: netns.Herd
    folder: Path
    faults: Path
    digests: dict[str, str] = field(default_factory=dict)

    def spec(self, name: str, pause_s: float) -> JobSpec:
        document = job(
            name,
            self.folder,
            run={"steps": STEPS, "validation_interval_steps": 10_000},
            parallel={"pp": 1, "dp_replicate": 2, "microbatches": 1},
            recovery=PATIENCE,
            cluster={"slots_per_node": 1, "spares": 1},
        )
        (self.folder / f"{name}.toml").write_text(tomli_w.dumps(document))
        notes = self.folder / f"{name}-notes"
        notes.mkdir()
        (notes / "slow").write_text(str(pause_s))
        (self.faults / f"{name}.py").write_text(FAULT.format(folder=str(notes)))
        return spec_of(document)

    def steps(self, name: str) -> list[tuple[int, int, int, float]]:
        """Generation, rank, steps done and monotonic second of each step that was begun."""
        file = self.folder / f"{name}-notes" / "steps"
        rows = (line.split() for line in file.read_text().splitlines()) if file.exists() else ()
        return [(int(g), int(r), int(s), float(t)) for g, r, s, t in rows]

    def hurry(self, name: str) -> None:
        (self.folder / f"{name}-notes" / "slow").unlink(missing_ok=True)

    def chaos(self, name: str, scenario: str, *arguments: str) -> dict[str, Any]:
        """`shepherd chaos`; its only score."""
        log = self.folder / f"{name}-chaos.log"
        given = ("--run", name, "--log-dir", str(self.folder / "logs"), "--wait", "150", "--json")
        process = self.herd.command("chaos", scenario, *given, *arguments, log=log)
        process.wait(200)
        said = log.read_text()
        (score,) = json.loads(said[said.index("{\n") :])["faults"]
        return dict(score)

    @contextmanager
    def run(self, name: str, pause_s: float = PAUSE_S) -> Iterator[JobSpec]:
        """A run that trains, with a pause in each step; at the end of the block it is let go, and must end in good
        order."""
        self.herd.mend()
        spec = self.spec(name, pause_s)
        log = self.folder / f"{name}.log"
        process = self.herd.command("train", str(self.folder / f"{name}.toml"), log=log)
        try:
            wait_for(
                lambda: process.poll() is not None or any(s >= HURT_AT_STEP for _, _, s, _ in self.steps(name)),
                TRAINS_WITHIN_S,
                "the run to train",
            )
            yield spec
            self.hurry(name)
            assert process.wait(ENDS_WITHIN_S) == 0, log.read_text()
        finally:
            if process.poll() is None:
                print(log.read_text())
                process.send_signal(signal.SIGTERM)  # a graceful stop
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()

    def untouched(self) -> str:
        """The final state of a run that nobody touches."""
        if "untouched" not in self.digests:
            with self.run("untouched", pause_s=0.0) as spec:
                pass
            self.digests["untouched"] = final_digest(spec)
        return self.digests["untouched"]


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """A cluster of three nodes and a head; the environment is as before at the end."""
    faults = folder / "faults"
    faults.mkdir(parents=True)
    before = dict(os.environ)
    os.environ["SHEPHERD_TEST_FAULTS"] = str(faults)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    try:
        with netns.herd(3) as made:
            yield Stage(herd=made, folder=folder, faults=faults)
    finally:
        os.environ.clear()
        os.environ.update(before)
