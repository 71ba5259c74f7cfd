"""Forty hangs of real runs, ten of each kind, on drawn ranks: the right rank is named, with the stack that shows it."""

import json
import random
import re
from pathlib import Path
from typing import Any

import herd
import pytest
from conftest import Cluster
from herd import job, spec_of, train

from orchestrator.observe.status import IncidentStatus

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]

RUNS, HANGS = 2, 5
"""Runs of each kind, and hangs in each."""
APART_STEPS = 8
PATIENCE = {"rank_silence_s": 5, "stall_floor_s": 5, "node_silence_s": 60, "strikes": 1000}

# Each order is done once: a rank that is started anew finds its mark.
FAULT = """
import json, pathlib, time
folder = pathlib.Path({folder!r})
for order in json.loads((folder / "orders.json").read_text()):
    mark = folder / str(order["step"])
    if (session.rank, session.state.step) == (order["rank"], order["step"]) and not mark.exists():
        mark.touch()
        {harm}
"""
HARMS = {
    "stop": """
        import os, signal, threading
        threading.Timer(order["after_s"], os.kill, (os.getpid(), signal.SIGSTOP)).start()
""",
    "loader": """
        def endless(step, rows):
            while True:
                time.sleep(0.001)
        session.dataset.batch = endless
""",
    "grip": """
        import ctypes
        ctypes.PyDLL(None).pause()
""",
    # The exchange that ends a step, so that the rank goes on to the next one and waits there: gloo ends a process in
    # which exchanges of different sizes meet. Half of the times also the one among replicas before it.
    "skip": """
        from trainer import loop
        real = loop.agree_on_state
        def skipping(session):
            loop.agree_on_state = real
            if order["nth"] == 1:
                session.audit.check()
        loop.agree_on_state = skipping
""",
}
# What the stack of the main thread shows; of a rank that was stopped from outside, anything.
SHOWS = {
    "stop": r".",
    "loader": r"\bendless \(hangs-loader",
    "grip": r"<module> \(hangs-grip",
    "skip": r"forward_backward",
}


def named(incident: IncidentStatus, rank: int, node: str, url: str, shows: str) -> str:
    """Empty when this rank is named and its stack is there; else what is wrong."""
    if (incident.cause, incident.culprit) != ("hang", node) or not incident.detail.startswith(f"rank {rank} "):
        return f"{incident.cause} of {incident.culprit}: {incident.detail}"
    file = re.search(r"; stack in (evidence/\S+)", incident.detail)
    stack = Path(url, file[1]).read_text() if file is not None else "none"
    main = re.search(r'"MainThread"(.*?)(\nThread|\Z)', stack, re.S)
    return "" if main is not None and re.search(shows, main[1]) else f"the stack shows nothing of it: {stack[:800]}"


@pytest.mark.parametrize("kind", HARMS)
def test_each_rank_that_hangs_is_named(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(herd, "RUN_S", 1200.0)
    drawn = random.Random(kind)
    wrong: list[str] = []
    for run in range(RUNS):
        name = f"hangs-{kind}-{run}"
        folder = tmp_path / f"orders-{name}"
        folder.mkdir()
        orders: list[dict[str, Any]] = [
            {
                "step": APART_STEPS * (number + 1),
                "rank": drawn.randrange(4),
                "after_s": drawn.uniform(0.0, 0.2),
                "nth": drawn.randrange(1, 3),
            }
            for number in range(HANGS)
        ]
        (folder / "orders.json").write_text(json.dumps(orders))
        (cluster.faults / f"{name}.py").write_text(FAULT.format(folder=str(folder), harm=HARMS[kind].strip()))
        steps = {"run": {"steps": APART_STEPS * (HANGS + 1), "validation_interval_steps": 1000}}
        spec = spec_of(job(name, tmp_path, recovery=PATIENCE, **steps))
        status, told = train(spec)
        assert status.exit_code == 0, told
        assert len(status.incidents) == HANGS, [i.detail for i in status.incidents]
        for incident, order in zip(status.incidents, orders, strict=True):
            rank = order["rank"]
            why = named(incident, rank, status.mesh[rank // 2], spec.run.url, SHOWS[kind])
            print(f"{kind}: rank {rank}: {why or 'named'}: {incident.detail}")
            wrong += [f"{name} step {order['step']} rank {rank}: {why}"] if why else []
    assert wrong == []
