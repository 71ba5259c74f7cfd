"""Workers of a real run stop or loop: each is found by our own deadlines, named, and recovered with equal bits."""

import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray
from conftest import Cluster
from herd import final_digest, job, spec_of, train, wait_for

from orchestrator.observe.status import Status
from orchestrator.runtime.controller import namespace_of
from orchestrator.runtime.nodes import agent_name
from orchestrator.spec import JobSpec

pytestmark = pytest.mark.timeout(300)

PATIENCE = {"rank_silence_s": 5, "stall_floor_s": 8, "node_silence_s": 60}
# Long after it is due, for a machine that does other work: tests/cluster/test_hang_sweep.py has the figures.
FOUND_WITHIN_S = 20.0

# Once each: an endless loop that lets others run, and a call that never lets go of the interpreter.
FAULTS = """
import ctypes, pathlib, time
while session.state.step >= 8 and not pathlib.Path({folder!r}, "stopped").exists():
    time.sleep(0.05)
time.sleep(0.1)
for rank, step, how in ((1, 10, "loop"), (2, 15, "grip")):
    mark = pathlib.Path({folder!r}, how)
    if (session.rank, session.state.step) == (rank, step) and not mark.exists():
        mark.touch()
        while how == "loop":
            time.sleep(0.01)
        ctypes.PyDLL(None).pause()
"""


@dataclass
class Stopped:
    """Stops a process of the run at a step, and notes when that was and when an incident was seen."""

    spec: JobSpec
    at: float = 0.0
    seen: float = 0.0
    told: list[Status] = field(default_factory=list)

    def worker(self, status: Status) -> None:
        if status.incidents and not self.seen:
            self.seen = time.monotonic()
        if status.job == "training" and status.step >= 4 and not self.at:
            agent = ray.get_actor(agent_name(status.mesh[1]), namespace_of(self.spec.run.name))
            os.kill(ray.get(agent.workers.remote(), timeout=60)[3], signal.SIGSTOP)
            self.at = time.monotonic()
            Path(self.spec.run.url).with_name("stopped").touch()

    def agent(self, status: Status) -> None:
        """For longer than a rank may be silent."""
        if status.job == "training" and status.step >= 4 and not self.at:
            agent = ray.get_actor(agent_name(status.mesh[0]), namespace_of(self.spec.run.name))
            pid = ray.get(agent.describe.remote(), timeout=60).pid
            self.at = time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            try:
                wait_for(lambda: time.monotonic() > self.at + 7.0, 60, "the deadlines to pass")
            finally:
                os.kill(pid, signal.SIGCONT)


def test_hangs_are_found_named_and_recovered(cluster: Cluster, tmp_path: Path) -> None:
    calm = spec_of(job("still", tmp_path, recovery=PATIENCE))
    (cluster.faults / "still.py").write_text("import time; time.sleep(0.3)")
    watcher = Stopped(calm)
    status, told = train(calm, watcher.agent)
    assert status.exit_code == 0, told
    assert watcher.at, "the agent was never stopped"
    assert status.incidents == (), "an agent that stood still accuses nobody"

    hurt = spec_of(job("hangs", tmp_path, recovery=PATIENCE))
    (cluster.faults / "hangs.py").write_text(FAULTS.format(folder=str(tmp_path)))
    stopped = Stopped(hurt)
    status, told = train(hurt, stopped.worker)
    assert status.exit_code == 0, told
    assert [(i.cause, i.culprit, i.rung) for i in status.incidents] == [
        ("hang", status.mesh[node], "replace") for node in (1, 0, 1)
    ]
    # Where a signal stops a process is chance; the others stand in the fault itself.
    stands = {3: r"\S+", 1: r"hangs.py", 2: r"hangs.py"}
    for incident, rank in zip(status.incidents, stands, strict=True):
        named = re.search(rf"; stack in (evidence/g\d+-r{rank}-stack\.txt)", incident.detail)
        assert named is not None, incident.detail
        stack = Path(hurt.run.url, named[1]).read_text()
        assert re.search(rf'"MainThread"\n +\S+ \({stands[rank]}:\d+\)', stack), stack
    stop, loop, grip = (incident.detail for incident in status.incidents)
    assert stop.startswith("rank 3 ") and "its process is stopped (SIGSTOP)" in stop
    assert loop.startswith("rank 1 does not wait for anybody while 3 others do") and "hangs.py:" in loop
    assert grip.startswith("rank 2 ") and "its process is sleeping" in grip
    assert stopped.seen - stopped.at <= FOUND_WITHIN_S
    assert final_digest(hurt) == final_digest(calm)
