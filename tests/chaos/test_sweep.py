"""A few seeds of the sweep, in each run of the tests, and the plans of all."""

import pytest
from rig import Rig, await_no_growth, take_census
from sweep import MESHES, SAVE_EVERY, STEPS, plan, run_seed, untouched

# One each of: the controller dies twice and a node with it; a node while a save is written, then a worker; ...
SEEDS = (0, 1)


def test_the_plans_reach_every_kind_of_kill_and_moment() -> None:
    plans = [plan(seed) for seed in range(60)]
    kills = [kill for _, of_one in plans for kill in of_one]
    assert plans == [plan(seed) for seed in range(60)]
    assert {mesh for mesh, _ in plans} == set(MESHES)
    assert {(k.what, k.when) for k in kills} >= {
        (what, when) for what in ("worker", "node", "controller") for when in ("step", "saving", "committed", "after")
    }
    assert {len(of_one) for _, of_one in plans} == {1, 2, 3}
    assert any(k.when == "after" and k.delay_s == 0 for k in kills), "none at once"
    assert {k.at % SAVE_EVERY for k in kills if k.when in ("saving", "committed")} == {0}
    assert all(0 < k.at < STEPS or k.when == "after" for k in kills)


@pytest.mark.timeout(300)
def test_kills_change_nothing_and_leave_nothing(on: Rig) -> None:
    references = {mesh: untouched(on, mesh) for mesh in dict.fromkeys(plan(seed)[0] for seed in SEEDS)}
    before = take_census(on)
    for held in (before.descriptors, before.sockets):
        # Ray's own GCS keeps connections to nodes that died for minutes; the long sweep counts those, too.
        for who in [name for name in held if name != "driver"]:
            del held[who]
    for seed in SEEDS:
        outcome = run_seed(on, seed, references[plan(seed)[0]])
        assert outcome.wrong == [], outcome
        assert outcome.landed == len(plan(seed)[1]), outcome
    _, grown = await_no_growth(on, before)
    assert grown == []
