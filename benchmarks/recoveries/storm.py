"""A kill each half minute, of workers, nodes and the controller in turn: what is left of the training."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from recoveries.kills import LOOK_S, START_S, until, worker_of
from recoveries.marks import Watch, last_of
from recoveries.running import Running

EVERY_S = 30.0
CALM_S = 60.0
"""Without kills, before them: how many steps an untouched run makes."""
ALIVE_S = 20.0
"""A victim may just be started anew: it is waited for so long."""
KINDS = ("worker", "node", "controller")


@dataclass
class Storm:
    nodes: int
    """That the mesh needs; a spare comes on top."""
    minutes: float
    calm_step_s: float
    first: int
    """Completed steps when the kills began."""
    last: int
    """Completed steps at the end."""
    share: float
    """New steps over those that the calm rate makes in the same time."""
    kills: list[str]
    restarts: int
    """How often the whole of it had ended and was started once more."""
    ledger: dict[str, float] = field(default_factory=dict)
    """Node-seconds by label, of the time with kills alone."""
    holds: dict[str, Any] = field(default_factory=dict)
    """What was compared with an untouched run."""


def storm(run: Running, minutes: float, seed: int) -> Storm:
    """One kill each EVERY_S for so long, once the run has trained for CALM_S.

    Where no process decides alone, or none is left to be killed, a worker dies in its stead.

    Raises:
        ContestantFailed: the run does not begin to train.
    """
    chance = random.Random(seed)
    watch = Watch(run.job.marks, run.job.world_size)
    restarts, kills = 0, []
    try:
        until(run, watch, lambda: watch.complete >= 2, START_S, "to train")
        calm_from, calm_until = watch.complete, time.monotonic() + CALM_S
        until(run, watch, lambda: time.monotonic() > calm_until, START_S, "to train on")
        first, began, before = watch.complete, time.monotonic(), run.ledger()
        calm_step_s = (_completed_at(watch, first) - _completed_at(watch, calm_from)) / (first - calm_from)
        for number in range(round(minutes * 60 / EVERY_S)):
            restarts += _follow(run, watch, began + (number + 0.5) * EVERY_S)
            kills.append(_kill(run, watch, KINDS[number % len(KINDS)], chance))
        restarts += _follow(run, watch, began + minutes * 60)
        last, took_s = watch.complete, time.monotonic() - began
    finally:
        watch.close()
    share = (last - first) * calm_step_s / took_s
    ledger = {label: seconds - before[label] for label, seconds in run.ledger().items()}
    return Storm(run.job.nodes, took_s / 60, calm_step_s, first, last, share, kills, restarts, ledger)


def _follow(run: Running, watch: Watch, end: float) -> int:
    """Read marks until then; how often the run had ended and was started anew."""
    restarts = 0
    while time.monotonic() < end:
        watch.read()
        if run.ended():
            run.restart()
            restarts += 1
        time.sleep(10 * LOOK_S)
    return restarts


def _kill(run: Running, watch: Watch, kind: str, chance: random.Random) -> str:
    """What was killed. Whoever is gone just now is waited for, not for ever."""
    if kind == "controller" and run.controller is not None:
        with suppress(LookupError, psutil.NoSuchProcess):
            run.controller().kill()
            return "controller"
    rank = chance.randrange(run.job.world_size)
    deadline = time.monotonic() + ALIVE_S
    while time.monotonic() < deadline:
        watch.read()
        with suppress(LookupError, StopIteration, psutil.NoSuchProcess):
            if kind == "node" and run.node_of is not None:
                run.node_of(worker_of(watch, rank).pid).kill()
                run.mend()
                return f"node of rank {rank}"
            worker_of(watch, rank).kill()
            return f"worker {rank}"
        time.sleep(10 * LOOK_S)
    return f"nobody: rank {rank} was not there"


def _completed_at(watch: Watch, step: int) -> float:
    at = last_of(watch.marks, "step", watch.world_size, step)
    assert at is not None, step
    return at


def untouched(run: Running, storm: Storm) -> float:
    """Let a run train as far as a storm's has come; the seconds that the storm's steps take it.

    Raises:
        ContestantFailed: it has ended, or does not come so far.
    """
    watch = Watch(run.job.marks, run.job.world_size)
    try:
        deadline_s = START_S + CALM_S + 180 * storm.minutes
        until(run, watch, lambda: watch.complete >= storm.last, deadline_s, f"to reach step {storm.last}")
        return _completed_at(watch, storm.last) - _completed_at(watch, storm.first)
    finally:
        watch.close()
