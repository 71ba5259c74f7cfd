"""When rank 0 wants a durable save: when one is due, after waits that grow, a bounded number of times."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from trainer.saves import RETRY_S, TRIES, Interval, SavePolicy


def begin_when_wanted(policy: SavePolicy, steps: range, now_s: float = 0.0) -> list[int]:
    """The steps after which a save begins that succeeds at once."""
    begun = []
    for step in steps:
        if policy.wants(step, now_s):
            policy.began()
            begun.append(step)
    return begun


def test_saves_begin_when_they_are_due():
    assert begin_when_wanted(SavePolicy(Interval(4)), range(1, 14)) == [4, 8, 12]


def test_a_generation_that_begins_between_two_waits_for_the_next():
    assert begin_when_wanted(SavePolicy(Interval(4)), range(6, 14)) == [8, 12]


def test_a_new_interval_counts_from_the_next_step_on():
    interval = Interval(10)
    policy = SavePolicy(interval)
    assert begin_when_wanted(policy, range(1, 16)) == [10]
    interval.steps = 4
    assert begin_when_wanted(policy, range(16, 26)) == [16, 20, 24]
    interval.steps = 100
    assert begin_when_wanted(policy, range(26, 102)) == [100]


def test_what_could_not_begin_stays_due_once():
    policy = SavePolicy(Interval(4))
    assert [policy.wants(step, 0.0) for step in range(1, 11)] == [False] * 3 + [True] * 7  # somebody was busy
    assert begin_when_wanted(policy, range(11, 17)) == [11, 12, 16]


def test_a_failure_is_tried_again_after_growing_waits_and_then_left_to_the_next_interval():
    policy = SavePolicy(Interval(1000))
    tried_at = []
    for second in range(1000):
        if policy.wants(1000 + second, float(second)):
            policy.began()
            tried_at.append(second)
            policy.failed(float(second))
    waits = [later - earlier for earlier, later in itertools.pairwise(tried_at)]
    assert len(tried_at) == TRIES
    assert waits == [RETRY_S * 2**n for n in range(TRIES - 1)]
    assert policy.wants(2000, 1000.0)


def test_a_success_ends_the_tries():
    policy = SavePolicy(Interval(100))
    assert policy.wants(100, 0.0)
    policy.began()
    policy.failed(0.0)
    assert not policy.wants(101, RETRY_S / 2)
    assert policy.wants(102, RETRY_S)
    policy.began()
    assert not any(policy.wants(step, 1e6) for step in range(103, 200))


@given(interval=st.integers(1, 5), seconds_a_step=st.floats(0.01, 20), outcomes=st.lists(st.booleans(), max_size=60))
def test_however_short_the_interval_a_failing_store_is_not_hammered(interval, seconds_a_step, outcomes):
    policy = SavePolicy(Interval(interval))
    failed_at = None
    for number, works in enumerate(outcomes):
        now_s = number * seconds_a_step
        if policy.wants(number + 1, now_s):
            assert failed_at is None or now_s >= failed_at + RETRY_S
            policy.began()
            failed_at = None if works else now_s
            if not works:
                policy.failed(now_s)
