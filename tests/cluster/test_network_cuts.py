"""Nodes that are cut off: from the controller, from their peers, one-way; what they still believe harms nobody.

Each node has a network namespace of its own, and the cut is done by `shepherd chaos net-cut`, by iptables in it.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import netns
import psutil
import pytest
from herd import final_digest, wait_for
from stage import Stage, stage

from orchestrator.core import events as ev
from orchestrator.runtime import journal
from orchestrator.spec import JobSpec

REASON = netns.why_not()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("cuts")) as made:
        yield made


def events(spec: JobSpec, kind: type) -> list[Any]:
    return [record.event for record in journal.read(spec.run.url) if isinstance(record.event, kind)]


def test_cut_off_from_the_controller_alone_it_goes_on_training(on: Stage) -> None:
    with on.run("unled") as spec:
        began = time.monotonic()
        score = on.chaos("unled", "net-cut", "--from", "controller", "--seconds", "9")
        print(score)
    assert score["passed"] and score["harmless"] and "the controller's process" in score["truth"], score
    during = {step for _, _, step, at in on.steps("unled") if began + 6 < at < began + 9}
    assert len(during) > 3, "the node that is cut off trains, and so do its peers"
    assert {g for g, *_ in on.steps("unled")} == {1}, "nothing was recovered from"
    told_at = [e.at / 1e6 for e in events(spec, ev.StepsDone)]
    assert max(b - a for a, b in itertools.pairwise(told_at)) > 6, "what was done meanwhile was told afterwards"
    assert final_digest(spec)


@pytest.mark.long
@pytest.mark.parametrize(
    ("whom", "direction", "seconds", "pause_s"),
    [
        ("peers", "both", 40, 0.6),
        ("peers", "out", 40, 0.6),
        ("peers", "in", 40, 0.6),
        ("all", "both", 30, 0.6),
        ("head", "both", 75, 2.5),  # longer than Ray or Shepherd bear with it
        ("controller", "both", 75, 2.5),
    ],
)
def test_who_is_cut_off_is_replaced_and_harms_nobody_when_it_comes_back(
    on: Stage, whom: str, direction: str, seconds: int, pause_s: float
) -> None:
    name = f"cut-{whom}-{direction}"
    with on.run(name, pause_s) as spec:
        before = agents(on)
        score = on.chaos(name, "net-cut", "--from", whom, "--direction", direction, "--seconds", str(seconds))
        print(score)
        address = re.search(r"dropped at (\S+) for", score["truth"])
        assert address is not None, score
        left = before[address[1]]
        assert left
        wait_for(lambda: not left & agents(on)[address[1]], seconds + 60, "the agent that was cut off to leave")
    assert score["right_node"] and score["recovered"] and score["rung"] == "spare", score
    lost = events(spec, ev.NodeLost)
    assert [e.node for e in lost][:1] == [score["node"]]
    assert final_digest(spec) == on.untouched()


def agents(on: Stage) -> dict[str, set[int]]:
    """Process ids of the agents at each address."""
    found: dict[str, set[int]] = {}
    for node in on.herd.nodes:
        listed = subprocess.run(["ip", "netns", "pids", node.name], capture_output=True, text=True, check=True)
        found[node.address] = {int(pid) for pid in listed.stdout.split() if _is_agent(int(pid))}
    return found


def _is_agent(pid: int) -> bool:
    try:
        return " ".join(psutil.Process(pid).cmdline()).startswith("ray::Agent")
    except psutil.Error:
        return False


@pytest.mark.long
def test_late_packets_make_it_slower_and_no_more(on: Stage) -> None:
    with on.run("late") as spec:
        score = on.chaos("late", "net-delay", "--delay-ms", "100", "--seconds", "10")
        print(score)
    assert score["passed"] and score["harmless"] and "are 100 ms late" in score["truth"], score
    assert final_digest(spec) == on.untouched()
