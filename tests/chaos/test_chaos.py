"""A few seeds of the sweep, a few flips and the command, on one cluster; and the plans of the whole sweep."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from flips import Outcome, clean, flip_in_a_run
from herd import command, train
from rig import Result, Rig, await_no_growth, take_census
from scorecards import CARDS, play
from sweep import KILLS, MESHES, ORDERS, SAVE_EVERY, STEPS, plan, run_seed, untouched

from orchestrator.chaos.orders import SCENARIOS
from orchestrator.core import events as ev
from orchestrator.core.actions import InjectFault
from orchestrator.observe.status import Status
from orchestrator.runtime import journal

pytestmark = pytest.mark.timeout(600)

# --- the sweep ---

# Of one mesh: a node while a save is written, and a worker at once; two workers at once, a worker, and the controller.
SEEDS = (20, 2880)


def test_the_plans_reach_every_kind_of_strike_and_moment() -> None:
    plans = [plan(seed) for seed in range(200)]
    strikes = [strike for _, of_one in plans for strike in of_one]
    assert plans == [plan(seed) for seed in range(200)]
    assert {mesh for mesh, _ in plans} == set(MESHES)
    moments = ("step", "saving", "committed", "after")
    assert {(s.what, s.when) for s in strikes} >= {(w, m) for w in ("worker", "node", "controller") for m in moments}
    assert {s.what for s in strikes} == {*KILLS, *ORDERS} and ORDERS.keys() <= SCENARIOS.keys()
    assert {len(of_one) for _, of_one in plans} == {1, 2, 3}
    assert any(s.when == "after" and s.delay_s == 0 for s in strikes), "none at once"
    assert {s.at % SAVE_EVERY for s in strikes if s.when in ("saving", "committed")} == {0}
    assert all(0 < s.at < STEPS or s.when == "after" for s in strikes)


def test_strikes_change_nothing_and_leave_nothing(on: Rig) -> None:
    references = {mesh: untouched(on, mesh) for mesh in dict.fromkeys(plan(seed)[0] for seed in SEEDS)}
    before = take_census(on)
    for held in (before.descriptors, before.sockets):
        # Ray's own GCS keeps connections to nodes that died for minutes; the long sweep counts those, too.
        for who in [name for name in held if name != "driver"]:
            del held[who]
    for seed in SEEDS:
        outcome = run_seed(on, seed, references[plan(seed)[0]])
        assert outcome.wrong == [], outcome
        assert sorted(outcome.landed) == sorted(strike.what for strike in plan(seed)[1]), outcome
    _, grown = await_no_growth(on, before)
    assert grown == []


# --- flips ---

CALM_STEPS = 40
ROUNDS = 2


@pytest.fixture(scope="module")
def calm(on: Rig) -> Result:
    """A run in which nothing happens."""
    return clean(on, "calm", CALM_STEPS)


def test_flips_are_found_in_their_step_and_leave_no_trace(on: Rig, calm: Result) -> None:
    outcome = Outcome()
    flip_in_a_run(on, "flips", ROUNDS, 1, calm, outcome)
    assert outcome.wrong == []
    assert all(flip.held for flip in outcome.flips), outcome.flips
    assert sum(flip.effective for flip in outcome.flips) >= ROUNDS


# --- the command ---

SLOW_S = 3.0
"""In each step until both faults have struck: six commands start meanwhile, each in seconds."""


def test_the_command_hurts_a_run_and_scores_it(on: Rig, calm: Result) -> None:
    run = {"steps": CALM_STEPS, "validation_interval_steps": CALM_STEPS}
    hurt = on.spec("hurt", SLOW_S, run=run, cluster={"spares": 1})
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
        chaos("head-kill")
        # So far apart that the first one has been found when the second is ordered.
        more = ("--times", "2", "--every", "5", "--rank", "3", "--against", str(on.folder / "calm"), "--json")
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
    assert len(said) == 6, said
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


REFUSED = (
    "no scenario 'worker-hug'",
    "--rank 4: the run has ranks 0 to 3",
    "raise --ballast-gib",
    "needs its token",
    "keeps its state in Redis",
)


def _read(path: Path) -> bytes:
    return path.read_bytes()


# --- scorecards ---


@pytest.mark.long
def test_a_second_death_while_the_first_is_recovered_from(on: Rig, calm: Result) -> None:
    first, second = play(on, "recovery-kill", CARDS["recovery-kill"], {f"{CALM_STEPS} steps": calm.digest})
    assert first.passed and second.passed, (first, second)
    assert first.identical and first.incident == second.incident and first.node != second.node
    assert re.search(r"while generation \d+ began$", second.truth)


def test_there_must_be_a_run(on: Rig) -> None:
    with command("chaos", "worker-kill", "--run", "nobody", RAY_ADDRESS=on.cluster.address) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "no run 'nobody' is active" in out
