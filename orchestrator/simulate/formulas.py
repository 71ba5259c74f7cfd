"""Closed forms: goodput, against which the simulator is measured; intervals and rates, by which the planner goes.

All times in one unit, rates in its inverse. They speak of the simplest machine: failures at a constant rate, each of
which costs a restart and what was done since the last checkpoint, and checkpoints that stop training while they are
written.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def meta_ettr(failure_rate: float, restart: float, interval: float, save: float) -> float:
    """Effective training time ratio to first order (Kokolis et al., arXiv 2410.21680): useful where little is lost.

    `interval` is training time between two saves of length `save`.
    """
    return (1 - failure_rate * (restart + interval / 2)) / (1 + save / interval)


def daly_efficiency(failure_rate: float, restart: float, interval: float, save: float) -> float:
    """Useful time over all time, exact for exponential failures that also strike saves and restarts (Daly, "A higher
    order estimate of the optimum checkpoint interval for restart dumps", FGCS 22, 2006, equation 20)."""
    m = 1 / failure_rate
    return interval / (m * math.exp(restart / m) * math.expm1((interval + save) / m))


def young_daly_interval(failure_rate: float, save: float) -> float:
    """The interval at which saves and lost work cost the same, to first order: sqrt(2 save / rate)."""
    return math.sqrt(2 * save / failure_rate)


def interval_steps(failure_rate: float, stall: float, step: float, write: float) -> int:
    """Whole steps between two saves that stall training for `stall` and are written beside it: one at a time."""
    return max(1, math.ceil(write / step), round(young_daly_interval(failure_rate, stall) / step))


def poisson_interval(count: int, confidence: float) -> tuple[float, float]:
    """The expected counts between which the true one lies, after `count` were seen: exact, central.

    Garwood, "Fiducial limits for the Poisson distribution", Biometrika 28, 1936: the ends at which so many or more,
    and so many or fewer, have half of the remaining probability. They are quantiles of Gamma(count) and
    Gamma(count + 1), found here by halving.
    """
    tail = (1 - confidence) / 2
    low = _falls_to(1 - tail, lambda mean: poisson_at_most(count - 1, mean)) if count else 0.0
    return low, _falls_to(tail, lambda mean: poisson_at_most(count, mean))


def poisson_at_most(count: int, mean: float) -> float:
    """The probability of so many or fewer where `mean` are expected."""
    if mean == 0:
        return 1.0
    return sum(math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(count + 1))


def _falls_to(probability: float, at: Callable[[float], float]) -> float:
    """Where a function that falls from 1 to 0 has this value."""
    low, high = 0.0, 1.0
    while at(high) > probability:
        low, high = high, 2 * high
    for _ in range(60):  # to the last bit of a double
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) > probability else (low, middle)
    return high
