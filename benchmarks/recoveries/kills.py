"""Kill workers or nodes of a run, one after the other, and take the time until it trains on."""

from __future__ import annotations

import itertools
import os
import random
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import psutil

from recoveries.marks import Mark, Recovery, Watch, recovery, shrunk
from recoveries.running import ContestantFailed, Running

LOOK_S = 0.005
START_S = 180.0
RECOVERED_S = 240.0
SETTLE_STEPS = (4, 9)
"""Steps from a recovery to the next kill, drawn: any distance to the newest checkpoint."""


def kill_in_turn(run: Running, kills: int, seed: int, what: str, shrinks: bool) -> tuple[list[Recovery], list[float]]:
    """SIGKILL for `kills` drawn workers, or each with its whole node.

    Args:
        what: "worker" or "node".
        shrinks: whether the others go on without the victims.

    Returns:
        What each kill has cost, and the seconds of each undisturbed step.

    Raises:
        ContestantFailed: the run has ended, or has not recovered in time.
    """
    chance = random.Random(seed)
    watch = Watch(run.job.marks, run.job.world_size)
    found: list[Recovery] = []
    try:
        until(run, watch, lambda: watch.complete >= 2, START_S, "to train")
        for _ in range(kills):
            victim = chance.randrange(run.job.world_size)
            due = watch.complete + chance.randint(*SETTLE_STEPS)
            until(run, watch, partial(_reached, watch, due), RECOVERED_S, f"to reach step {due}")
            time.sleep(chance.uniform(0, newest_step_s(watch)))
            watch.read()
            found.append(_kill(run, watch, victim, what, shrunk if shrinks else recovery))
            if what == "node":
                run.mend()
                until(run, watch, run.has_spare, START_S, "to have a spare", look_s=0.5)
        run.explain(found)
        return found, undisturbed(watch, found)
    finally:
        watch.close()


def _reached(watch: Watch, step: int) -> bool:
    return watch.complete >= step


def worker_of(watch: Watch, rank: int) -> psutil.Process:
    """The process that fills a rank. Its number may be another's by now: only what this run has started counts.

    Raises:
        LookupError: it is gone, or has not begun.
    """
    for process in psutil.Process().children(recursive=True):
        if process.pid == watch.pids.get(rank):
            return process
    raise LookupError(f"rank {rank} has no process")


def _kill(run: Running, watch: Watch, rank: int, what: str, judge: Callable[..., Recovery | None]) -> Recovery:
    victims: tuple[int, ...] = (rank,)
    worker = worker_of(watch, rank)
    if what == "node":
        assert run.node_of is not None
        node = run.node_of(worker.pid)
        theirs = {process.pid for process in node.processes}
        victims = tuple(sorted(rank for rank, pid in watch.pids.items() if pid in theirs))
    outcome: list[Recovery] = []
    with ends_of({rank: pid for rank, pid in watch.pids.items() if rank not in victims}) as ended:
        killed_at = time.time()
        if what == "node":
            node.kill()
        else:
            worker.kill()

        def recovered() -> bool:
            ended()
            done = judge(watch.marks, run.job.world_size, killed_at, victims)
            outcome.extend([done] if done else [])
            return done is not None

        until(run, watch, recovered, RECOVERED_S, f"to recover from the loss of ranks {victims}")
        gone = ended()
    if len(gone) == run.job.world_size - len(victims):
        outcome[0].stages["down"] = max(gone.values()) - killed_at
    return outcome[0]


@contextmanager
def ends_of(pids: dict[int, int]) -> Iterator[Callable[[], dict[int, float]]]:
    """Call what is yielded again and again: it tells when each of these processes was found to have ended."""
    ranks: dict[int, int] = {}
    ended: dict[int, float] = {}
    poll = select.poll()
    for rank, pid in pids.items():
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            ranks[descriptor] = rank
            poll.register(descriptor, select.POLLIN)

    def look() -> dict[int, float]:
        for descriptor, _ in poll.poll(0):
            ended[ranks[descriptor]] = time.time()
            poll.unregister(descriptor)
        return ended

    try:
        yield look
    finally:
        for descriptor in ranks:
            os.close(descriptor)


def until(
    run: Running,
    watch: Watch,
    condition: Callable[[], bool],
    deadline_s: float,
    what: str,
    look_s: float = LOOK_S,
) -> None:
    """Read marks until `condition` holds. Raises ContestantFailed when it does not in time."""
    deadline = time.monotonic() + deadline_s
    while True:
        watch.read()
        if condition():
            return
        run.check()
        if time.monotonic() > deadline:
            raise ContestantFailed(f"waited {deadline_s:g} s for it {what}: {run.last_words()}")
        time.sleep(look_s)


def newest_step_s(watch: Watch) -> float:
    """Of rank 0."""
    times = [mark.at for mark in _steps_of_rank_0(watch)][-2:]
    return times[-1] - times[0]


def undisturbed(watch: Watch, recoveries: list[Recovery]) -> list[float]:
    """Of rank 0, from each step to the next one, without those in which anything was killed."""
    marks = _steps_of_rank_0(watch)
    return [
        after.at - before.at
        for before, after in itertools.pairwise(marks)
        if not any(before.at <= r.killed_at + r.new_step_s and r.killed_at <= after.at for r in recoveries)
    ]


def _steps_of_rank_0(watch: Watch) -> list[Mark]:
    return [mark for mark in watch.marks if mark.what == "step" and mark.rank == 0]
