"""`shepherd chaos` as people type it: what it does to a run, what it says of it, and what it refuses."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from herd import command, train
from rig import Rig

from orchestrator.core import events as ev
from orchestrator.core.actions import InjectFault
from orchestrator.observe.status import Status
from orchestrator.runtime import journal

STEPS = 60
SLOW_S = 1.0
"""In each step until both faults have struck: five commands start meanwhile, each in seconds."""
pytestmark = pytest.mark.timeout(300)


def test_the_command_hurts_a_run_and_scores_it(on: Rig) -> None:
    calm = on.spec("calm", 0.0, run={"steps": STEPS, "validation_interval_steps": STEPS})
    hurt = on.spec("hurt", SLOW_S, run={"steps": STEPS, "validation_interval_steps": STEPS}, cluster={"spares": 1})
    assert train(calm)[0].exit_code == 0
    said: list[tuple[int, str]] = []

    def chaos(*arguments: str, token: str = "") -> None:
        environment = {"RAY_ADDRESS": on.cluster.address, **({"SHEPHERD_TOKEN": token} if token else {})}
        given = ("--run", "hurt", "--log-dir", hurt.cluster.log_dir, *arguments)
        with command("chaos", *given, **environment) as process:
            out, _ = process.communicate(timeout=120)
        said.append((process.returncode, out))

    def play() -> None:
        chaos("worker-hug")
        chaos("worker-kill", "--rank", "4")
        chaos("disk-full", "--ballast-gib", "0")
        chaos("worker-kill", token="not the token")
        more = ("--times", "2", "--every", "0.5", "--rank", "3", "--against", calm.run.url, "--json")
        chaos("worker-exception", *more)

    player = threading.Thread(target=play, daemon=True)

    def on_status(status: Status) -> None:
        if status.step >= 2 and not player.ident:
            player.start()
        if len(status.faults) == 2:
            on.pause("hurt", 0.0)

    status, told = train(hurt, on_status)
    player.join(60)
    assert status.exit_code == 0, told
    assert len(said) == 5, said
    for (code, out), words in zip(said, REFUSED, strict=False):
        assert code == 2 and words in out, (code, out)
    code, out = said[-1]
    scores: dict[str, Any] = json.loads(out[out.index("{") :])
    assert code == 0 and scores["passed"] and scores["note"] == "", out
    assert [(s["fault"], s["rank"], s["identical"]) for s in scores["faults"]] == [("worker-exception", 3, True)] * 2
    # The second may strike before the first is over: then it is the recovery that fails, and the next rung is taken.
    assert {s["rung"] for s in scores["faults"]} <= {"replace", "spare"}
    assert all(s["right_node"] and s["right_rank"] and "InjectedFault" in s["found"] for s in scores["faults"])
    assert not [path for path in Path(hurt.run.url).rglob("*") if path.is_file() and b"not the token" in _read(path)]

    records = journal.read(hurt.run.url)
    ordered = [r for r in records if isinstance(r.event, ev.FaultRequested)]
    assert [a["type"] for r in ordered for a in r.actions] == [InjectFault.__name__] * 2, "refused orders are no orders"


REFUSED = ("no scenario 'worker-hug'", "--rank 4: the run has ranks 0 to 3", "raise --ballast-gib", "needs its token")


def _read(path: Path) -> bytes:
    return path.read_bytes()


def test_there_must_be_a_run(on: Rig) -> None:
    with command("chaos", "worker-kill", "--run", "nobody", RAY_ADDRESS=on.cluster.address) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "no run 'nobody' is active" in out
