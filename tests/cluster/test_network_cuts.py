"""Nodes that are cut off: from the controller, from their peers, one-way; what they still believe harms nobody.

Each node has a network namespace of its own, and the cut is done by `shepherd chaos net-cut`, by iptables in it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import netns
import psutil
import pytest
import tomli_w
from herd import final_digest, job, spec_of, wait_for

from orchestrator.core import events as ev
from orchestrator.runtime import journal
from orchestrator.spec import JobSpec

REASON = netns.why_not()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.timeout(600)]

STEPS = 40
PAUSE_S = 0.3
"""In each step, for as long as a test wants it: there must be steps to be done during a cut."""
HURT_AT_STEP = 4
TRAINS_WITHIN_S = 90.0
ENDS_WITHIN_S = 180.0
PATIENCE = {"node_silence_s": 4.5, "rank_silence_s": 5, "stall_floor_s": 5, "driver_lease_s": 60}
FAULT = """
import pathlib, time
folder = pathlib.Path({folder!r})
with open(folder / "steps", "a") as log:
    log.write(f"{{session.generation}} {{session.rank}} {{session.state.step}} {{time.monotonic()}}\\n")
time.sleep({pause_s} if (folder / "slow").exists() else 0)
"""


@dataclass
class Stage:
    """A cluster, and what runs on it."""

    herd: netns.Herd
    folder: Path
    faults: Path
    digests: dict[str, str] = field(default_factory=dict)

    def spec(self, name: str) -> JobSpec:
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
        (notes / "slow").touch()
        (self.faults / f"{name}.py").write_text(FAULT.format(folder=str(notes), pause_s=PAUSE_S))
        return spec_of(document)

    def steps(self, name: str) -> list[tuple[int, int, int, float]]:
        """Generation, rank, steps done and monotonic second of each step that was begun."""
        file = self.folder / f"{name}-notes" / "steps"
        rows = (line.split() for line in file.read_text().splitlines()) if file.exists() else ()
        return [(int(g), int(r), int(s), float(t)) for g, r, s, t in rows]

    def hurry(self, name: str) -> None:
        (self.folder / f"{name}-notes" / "slow").unlink()

    def chaos(self, name: str, *arguments: str) -> dict[str, Any]:
        """`shepherd chaos net-cut`; its only score."""
        log = self.folder / f"{name}-chaos.log"
        given = ("--run", name, "--log-dir", str(self.folder / "logs"), "--wait", "150", "--json")
        process = self.herd.command("chaos", "net-cut", *given, *arguments, log=log)
        process.wait(200)
        said = log.read_text()
        (score,) = json.loads(said[said.index("{\n") :])["faults"]
        return dict(score)

    @contextmanager
    def run(self, name: str) -> Iterator[JobSpec]:
        """A run that trains; at the end of the block it is let go, and must end in good order."""
        spec = self.spec(name)
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
            with self.run("untouched") as spec:
                self.hurry("untouched")
                (self.folder / "untouched-notes" / "slow").touch()
            self.digests["untouched"] = final_digest(spec)
        return self.digests["untouched"]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("cuts")
    faults = folder / "faults"
    faults.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHEPHERD_TEST_FAULTS", str(faults))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]]))
        with netns.herd(3) as made:
            yield Stage(herd=made, folder=folder, faults=faults)


def events(spec: JobSpec, kind: type) -> list[Any]:
    return [record.event for record in journal.read(spec.run.url) if isinstance(record.event, kind)]


def test_cut_off_from_the_controller_alone_it_goes_on_training(stage: Stage) -> None:
    with stage.run("unled") as spec:
        began = time.monotonic()
        score = stage.chaos("unled", "--from", "controller", "--seconds", "9")
        print(score)
    assert score["passed"] and score["harmless"] and "the controller's process" in score["truth"], score
    during = {step for _, _, step, at in stage.steps("unled") if began + 6 < at < began + 9}
    assert len(during) > 3, "the node that is cut off trains, and so do its peers"
    assert {g for g, *_ in stage.steps("unled")} == {1}, "nothing was recovered from"
    told_at = [e.at / 1e6 for e in events(spec, ev.StepsDone)]
    assert max(b - a for a, b in itertools.pairwise(told_at)) > 6, "what was done meanwhile was told afterwards"
    assert final_digest(spec)


@pytest.mark.long
@pytest.mark.parametrize(
    ("whom", "direction", "seconds"),
    [
        ("peers", "both", 40),
        ("peers", "out", 40),
        ("peers", "in", 40),
        ("all", "both", 30),
        ("head", "both", 30),
        ("controller", "both", 80),
    ],
)
def test_who_is_cut_off_is_replaced_and_harms_nobody_when_it_comes_back(
    stage: Stage, whom: str, direction: str, seconds: int
) -> None:
    name = f"cut-{whom}-{direction}"
    with stage.run(name) as spec:
        before = agents(stage)
        score = stage.chaos(name, "--from", whom, "--direction", direction, "--seconds", str(seconds))
        print(score)
        address = re.search(r"dropped at (\S+) for", score["truth"])
        assert address is not None, score
        left = before[address[1]]
        assert left
        wait_for(lambda: not left & agents(stage)[address[1]], seconds + 60, "the agent that was cut off to leave")
    assert score["right_node"] and score["recovered"] and score["rung"] == "spare", score
    lost = events(spec, ev.NodeLost)
    assert [e.node for e in lost][:1] == [score["node"]]
    assert final_digest(spec) == stage.untouched()


def agents(stage: Stage) -> dict[str, set[int]]:
    """Process ids of the agents at each address."""
    found: dict[str, set[int]] = {}
    for node in stage.herd.nodes:
        listed = subprocess.run(["ip", "netns", "pids", node.name], capture_output=True, text=True, check=True)
        found[node.address] = {int(pid) for pid in listed.stdout.split() if _is_agent(int(pid))}
    return found


def _is_agent(pid: int) -> bool:
    try:
        return " ".join(psutil.Process(pid).cmdline()).startswith("ray::Agent")
    except psutil.Error:
        return False
