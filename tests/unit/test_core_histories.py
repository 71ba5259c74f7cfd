"""The supervisor under random hostile histories: its rules hold after every event, and every run can be finished."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core_body import Body, Tape

SEEDS = 400


def history(choices: bytes) -> Body:
    body = Body(Tape(choices))
    body.run()
    return body


def tape_of(seed: int) -> bytes:
    rng = random.Random(seed)
    return rng.randbytes(rng.choice((50, 200, 600, 1500)))


@pytest.mark.parametrize("part", range(4))
def test_rules_hold_in_random_histories(part: int) -> None:
    for seed in range(part * SEEDS, (part + 1) * SEEDS):
        try:
            history(tape_of(seed))
        except Exception as e:
            raise AssertionError(f"seed {seed}") from e


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=600))
def test_rules_hold_in_drawn_histories(choices: bytes) -> None:
    history(choices)
