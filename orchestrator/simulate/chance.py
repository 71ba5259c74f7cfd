"""Random draws that are the same on every machine: whole numbers only, no logarithm of the machine's own library."""

from __future__ import annotations

import random
from collections.abc import Sequence

_BITS = 53


class Chance:
    """One stream of draws. The bits are the Mersenne Twister's, whose sequence for a seed Python guarantees."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, n: int) -> int:
        """A whole number in [0, n), each as likely."""
        return self._random.randrange(n)

    def pick(self, weights: Sequence[int]) -> int:
        """An index, as likely as its weight says."""
        at = self.below(sum(weights))
        for index, weight in enumerate(weights):
            if at < weight:
                return index
            at -= weight
        raise AssertionError(weights)

    def exponential(self, mean: int) -> int:
        """A waiting time of the exponential distribution, in the unit of `mean`.

        Von Neumann's comparison method ("Various techniques used in connection with random digits", 1951): a run of
        falling uniform numbers has odd length with probability exp(-first).
        """
        whole = 0
        while True:
            first = last = self._random.getrandbits(_BITS)
            length = 1
            while (number := self._random.getrandbits(_BITS)) < last:
                last = number
                length += 1
            if length % 2 == 1:
                return mean * ((whole << _BITS) + first) >> _BITS
            whole += 1
