"""Real agents on Ray nodes report through fan-ins; one of those is killed, then the controller: nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from conftest import Cluster
from herd import await_nothing_left, job, spec_of, train

from orchestrator.core import events as ev
from orchestrator.observe.status import Status
from orchestrator.runtime import journal
from orchestrator.runtime.controller import namespace_of
from orchestrator.runtime.nodes import NodeInfo, agent_name

pytestmark = pytest.mark.timeout(180)
CALL_DEADLINE_S = 60.0


@pytest.fixture
def few_are_many(cluster: Cluster) -> Iterator[None]:
    """Three nodes have fan-ins of two each."""
    mark = cluster.faults / "fan-ins"
    mark.touch()
    yield
    mark.unlink()


def alive(status: Status) -> list[str]:
    return [node for node, state in status.nodes.items() if state != "lost"]


def infos(run: str, status: Status) -> dict[str, NodeInfo]:
    """What the agents say of themselves, by node."""
    actors = {node: ray.get_actor(agent_name(node), namespace_of(run)) for node in alive(status)}
    told: Any = ray.get([actor.describe.remote() for actor in actors.values()], timeout=CALL_DEADLINE_S)
    return dict(zip(actors, told, strict=True))


def ways(agents: dict[str, NodeInfo]) -> dict[str, str]:
    """Node to the node with whose peer server its agent's process has a connection, from the outside."""
    servers = {int(info.address.rpartition(":")[2]): node for node, info in agents.items()}
    return {
        node: servers[connection.raddr.port]
        for node, info in agents.items()
        for connection in psutil.Process(info.pid).net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED and connection.raddr and connection.raddr.port in servers
    }


@dataclass
class Plan:
    """What is done to the run, each when what comes before has had its effect."""

    run: str
    slow: Path
    killed: list[str] = field(default_factory=list)
    at: int = 0
    """The step at which the last thing was done."""

    def __call__(self, status: Status) -> None:
        if status.job != "training" or status.step < self.at + 2:
            return
        if not self.killed and len(status.nodes) == 4 and status.step >= 3:
            self.kill_a_fan_in(status)
        elif len(self.killed) == 1 and status.generation == 2 and self.all_go_through(status):
            os.kill(status.controller_pid, signal.SIGKILL)
            self.killed.append("the controller")
            self.at = status.step
        elif len(self.killed) == 2 and status.epoch == 2 and len(alive(status)) == 4 and self.all_go_through(status):
            self.killed.append("nobody more")
            self.slow.unlink()

    def kill_a_fan_in(self, status: Status) -> None:
        """One of the mesh, so that its node is lost with it."""
        agents = infos(self.run, status)
        through = ways(agents)
        if len(through) < 4:
            return
        fan_ins = set(through.values())
        assert len(fan_ins) == 2, through
        victim = next(node for node in status.mesh if node in fan_ins)
        os.kill(agents[victim].pid, signal.SIGKILL)
        self.killed.append(victim)
        self.at = status.step

    def all_go_through(self, status: Status) -> bool:
        agents = infos(self.run, status)
        return len(ways(agents)) == len(agents)


def test_a_run_through_fan_ins_loses_one_and_its_controller(
    cluster: Cluster, few_are_many: None, tmp_path: Path
) -> None:
    spec = spec_of(
        job(
            "fan-ins",
            tmp_path,
            run={"steps": 120, "validation_interval_steps": 120},  # a minute, for the lost node's agent to be back
            data={"global_batch": 6},
            parallel={"pp": 1, "dp_replicate": 6, "microbatches": 1},
            checkpoint={"interval_steps": 1000},
            cluster={"spares": 1},
        )
    )
    slow = cluster.faults / "fan-ins.py"
    slow.write_text("import time; time.sleep(0.5)")
    plan = Plan("fan-ins", slow)
    status, told = train(spec, plan)
    assert len(plan.killed) == 3, (plan.killed, told)
    assert (status.exit_code, status.epoch) == (0, 2), told
    (incident,) = status.incidents
    assert (incident.cause, incident.culprit, incident.rung) == ("node", plan.killed[0], "spare")
    assert incident.steps_lost <= 1
    events = [record.event for record in journal.read(spec.run.url)]
    done = [event for event in events if isinstance(event, ev.StepsDone)]
    for event in done:
        assert len(event.loss_millionths) == event.last - event.first + 1, f"of {event} details were lost"
    steps = {step for event in done for step in range(event.first, event.last + 1)}
    # What the node that was killed had done and kept, but not told: the generation after it begins with that step.
    steps |= {event.step for event in events if isinstance(event, ev.GenerationReady)}
    assert steps >= set(range(1, spec.run.steps + 1))
    await_nothing_left(tmp_path / "ram")
