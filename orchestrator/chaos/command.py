"""`shepherd chaos`: order faults in an active run, wait until it has recovered, and score it."""

from __future__ import annotations

import getpass
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from orchestrator.chaos.orders import ENDS_THE_CONTROLLER, PAIRS, Order
from orchestrator.chaos.scorecard import Score, score
from orchestrator.runtime import driver, journal
from storage.commits import list_commits, read_commit, state_digest
from storage.redact import redacted

POLL_INTERVAL_S = 0.5
TRAINING_DEADLINE_S = 300.0
"""For the run to train, before each fault: longer than a start or a recovery."""
READ_INTERVAL_S = 2.0
"""Between two looks at the journal, which has a recovery at once where its tail is, else within 30 s."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    scores: tuple[Score, ...]
    note: str = ""
    """Why the scorecard is not complete, when it is not."""

    @property
    def passed(self) -> bool:
        return not self.note and all(s.passed for s in self.scores)

    def document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"passed": self.passed, "note": self.note, "faults": [s.document() for s in self.scores]}


def run(
    name: str,
    order: Order,
    *,
    times: int,
    every_s: float,
    wait_s: float,
    against: str,
    log_dir: str,
    tell: Callable[[str], None],
) -> Outcome:
    """Order a fault `times` times, `every_s` apart and each while the run trains, and score what became of them.

    Args:
        wait_s: for the recovery from the last one, and with `against` for the end of the run.
        against: run.url of an untouched run of the same job, to compare the final states with; empty: none.

    Raises:
        RunError: there is no such run, it refuses the order, or there is nothing to compare with.
        PermissionError: the token here is not the run's.
    """
    controller, token = driver.find(name), driver.read_token(log_dir, name)
    untouched = final_digest(against) if against else ""
    by = f"{getpass.getuser()}@{socket.gethostname()}/{secrets.token_hex(4)}"
    url = note = ""
    for turn in range(times):
        if turn:
            time.sleep(every_s)
        try:
            step = await_training(controller)
            url = give(controller, token, replace(order, seed=order.seed + turn), by)
        except driver.RunError as e:
            if not url:
                raise
            times, note = turn, f"{turn} of {times} faults were ordered: {e}"
            break
        tell(f"{order.scenario} was ordered at step {step}")
    deadline = time.monotonic() + wait_s
    expected = times * (2 if order.scenario in PAIRS else 1)
    tail = journal.tail_path(Path(log_dir).expanduser() / name, url)

    def scores(identical: bool | None = None) -> tuple[Score, ...]:
        return tuple(s for s in score(journal.read(url, tail), identical) if s.by == by)

    def outcome(identical: bool | None = None, why: str = "") -> Outcome:
        found = scores(identical)
        missing = "" if found else f"the run's journal is not at {redacted(url)} as seen from this machine"
        return Outcome(scores=found, note="; ".join(filter(None, (note, why, missing))))

    ended = False
    while not (ended or (len(scores()) == expected and all(s.settled for s in scores()))):
        if time.monotonic() > deadline:
            return outcome(why=f"not recovered within {wait_s:g} s")
        time.sleep(READ_INTERVAL_S)
        ended = _has_ended(name)
    if not against:
        return outcome()
    tell("waiting for the end of the run, to compare its final state")
    while not _has_ended(name):
        if time.monotonic() > deadline:
            return outcome(why=f"not compared: the run had not ended after {wait_s:g} s")
        time.sleep(READ_INTERVAL_S)
    try:
        final = final_digest(url)
    except driver.RunError as e:
        return outcome(why=f"not compared: {e}")
    return outcome(final == untouched)


def give(controller: Any, token: str, order: Order, by: str) -> str:
    """Send one order to the controller; returns run.url.

    Raises:
        RunError: the run refuses the order; the message says why.
        PermissionError: the token is not the run's.
    """
    try:
        return str(ray.get(controller.inject.remote(token, order, by), timeout=driver.POLL_DEADLINE_S))
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, PermissionError):
            raise e.cause from e
        if isinstance(e.cause, ValueError):
            raise driver.RunError(f"the run refuses: {e.cause}") from e
        raise
    except ray.exceptions.RayActorError:
        if order.scenario not in ENDS_THE_CONTROLLER:
            raise
        return _where(controller, token)  # it was done before the answer was on its way


def _where(controller: Any, token: str) -> str:
    """run.url, from a controller that comes back."""
    deadline = time.monotonic() + TRAINING_DEADLINE_S
    while True:
        try:
            return str(ray.get(controller.where.remote(token), timeout=driver.POLL_DEADLINE_S))
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_INTERVAL_S)


def await_training(controller: Any) -> int:
    """The step at which the run trains, once it does.

    Raises:
        RunError: it has ended, or does not train in time.
    """
    deadline = time.monotonic() + TRAINING_DEADLINE_S
    why = "its controller does not answer"
    while time.monotonic() < deadline:
        try:
            status, _ = driver.poll(controller)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):  # it was killed, and comes back
            time.sleep(POLL_INTERVAL_S)
            continue
        if status.job == "training":
            return status.step
        if status.ended:
            raise driver.RunError(f"the run has ended: {status.verdict or status.failure}")
        why = f"it is {status.job}"
        time.sleep(POLL_INTERVAL_S)
    raise driver.RunError(f"the run does not train after {TRAINING_DEADLINE_S:g} s: {why}")


def final_digest(url: str) -> str:
    """Names the state in the newest checkpoint under `url`, and its step.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    try:
        steps = list_commits(url)
        if steps:
            return f"step {steps[-1]}: {state_digest(url, read_commit(url, steps[-1]))}"
    except Exception as e:  # every store has its own
        raise driver.RunError(f"what is to be compared cannot be read under {url}: {e!r}") from e
    raise driver.RunError(f"there is no checkpoint under {url} to compare with")


def _has_ended(name: str) -> bool:
    try:
        status, _ = driver.poll(driver.find(name))
    except driver.RunError:
        return True  # the controller has gone: the journal is closed
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return False
    return status.ended
