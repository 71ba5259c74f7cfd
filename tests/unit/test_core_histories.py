"""The supervisor under random hostile histories: its rules hold, every run can be finished, and every history replays.

The rules stand in core_watch.py, the world in core_body.py. Broken cores, below, prove that the rules can be broken.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import core_breakages
import pytest
from core_body import Body
from core_world import Tape
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core import events as ev
from orchestrator.core.codec import (
    action_from_json,
    action_to_json,
    digest,
    event_from_json,
    event_to_json,
    state_from_json,
    state_to_json,
)
from orchestrator.core.supervisor import Supervisor

SEEDS = 320
# A broken core must be found within so many histories; the slowest was by number 41.
SEEDS_TO_CATCH = 200


def history(choices: bytes) -> Body:
    body = Body(Tape(choices))
    body.run()
    return body


def tape_of(seed: int) -> bytes:
    rng = random.Random(seed)
    return rng.randbytes(rng.choice((100, 300, 900, 2000)))


def through_json(document: Any) -> Any:
    return json.loads(json.dumps(document))


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS // 4))
def test_rules_hold_and_runs_finish_in_random_histories(first: int) -> None:
    for seed in range(first, first + SEEDS // 4):
        try:
            history(tape_of(seed))
        except Exception as e:
            raise AssertionError(f"seed {seed}") from e


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=600))
def test_rules_hold_and_runs_finish_in_drawn_histories(choices: bytes) -> None:
    history(choices)


@pytest.mark.parametrize("seed", range(40))
def test_a_history_replays_from_its_journal_and_from_any_snapshot(seed: int) -> None:
    body = history(tape_of(seed))
    rng = random.Random(seed)
    cuts = {rng.randrange(len(body.watch.log)) for _ in range(20)}
    core = Supervisor()
    for index, (event, actions) in enumerate(body.watch.log):
        read = event_from_json(through_json(event_to_json(event)))
        assert read == event
        written = through_json([action_to_json(action) for action in core.handle(read)])
        assert written == [action_to_json(action) for action in actions]
        assert [action_from_json(action) for action in written] == actions
        if index in cuts:
            core.state.check()
            core.state.check_nodes()
            restored = state_from_json(through_json(state_to_json(core.state)))
            assert restored == core.state
            assert digest(restored) == digest(core.state)
            core = Supervisor(restored)
    assert digest(core.state) == digest(body.supervisor.state)


@given(
    st.dictionaries(
        st.integers(0, 100_000),
        st.lists(st.builds(ev.Snapshot, generation=st.integers(1), step=st.integers(0)), max_size=3).map(tuple),
        max_size=4,
    ),
    st.text(max_size=8),
)
def test_integer_keys_and_nested_tuples_survive_json(snapshots: dict[int, tuple[ev.Snapshot, ...]], node: str) -> None:
    event = ev.NodeHalted(at=1, node=node, generation=2, snapshots=snapshots)
    assert event_from_json(through_json(event_to_json(event))) == event


def test_json_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="NoSuchEvent"):
        event_from_json({"type": "NoSuchEvent", "at": 1})
    with pytest.raises(ValueError, match=r"TimerFired: unknown fields \['node'\], missing fields \['timer'\]"):
        event_from_json({"type": "TimerFired", "at": 1, "node": "a"})


# --- broken cores: each breaks one rule, and the checks must see it ---


def _all(check: Callable[[int], None], seeds: range) -> None:
    for seed in seeds:
        check(seed)


def _replays(seed: int) -> None:
    test_a_history_replays_from_its_journal_and_from_any_snapshot(seed)


def _holds(seed: int) -> None:
    history(tape_of(seed))


@pytest.mark.parametrize(
    ("breakage", "check"),
    [
        *((breakage, _holds) for breakage in core_breakages.SEEN_AT_ONCE),
        (core_breakages.decisions_depend_on_more_than_events, _replays),
    ],
)
def test_a_broken_core_is_caught(
    breakage: Callable[[pytest.MonkeyPatch], None], check: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breakage(monkeypatch)
    with pytest.raises((AssertionError, LookupError, ValueError)):
        _all(check, range(SEEDS_TO_CATCH))
