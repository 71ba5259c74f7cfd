"""A few flips in each run of the tests: found in their step, at the right rank, and without a trace in the end."""

import pytest
from flips import Outcome, clean, flip_in_a_run
from rig import Rig

STEPS = 60
ROUNDS = 2


@pytest.mark.timeout(300)
def test_flips_are_found_in_their_step_and_leave_no_trace(on: Rig) -> None:
    outcome = Outcome()
    flip_in_a_run(on, "flips", ROUNDS, 1, clean(on, "clean", STEPS), outcome)
    assert outcome.wrong == []
    assert all(flip.held for flip in outcome.flips), outcome.flips
    assert sum(flip.effective for flip in outcome.flips) >= ROUNDS
