"""Closed forms of goodput, against which the simulator is measured. All times in one unit, rates in its inverse.

Both speak of the simplest machine: failures at a constant rate, each of which costs a restart and what was done since
the last checkpoint, and checkpoints that stop training while they are written.
"""

from __future__ import annotations

import math


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
