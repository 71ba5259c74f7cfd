"""A pseudo-random permutation of ``range(n)`` that is computed index by index, in constant memory and time.

A Feistel network is a permutation of a power of four whatever its round function is (Luby and Rackoff 1988); walking
its cycle until it re-enters ``range(n)`` restricts it to that range (Black and Rogaway 2002, "cycle walking").
"""

from __future__ import annotations

import xxhash

# Luby and Rackoff need 4 for numbers of many bits; the small ranges of small corpora mix better with a few more.
ROUNDS = 6


def permute(index: int, n: int, key: str) -> int:
    """Where the permutation that `key` names sends `index`, with 0 <= index < n.

    The domain is less than 4 n, so the walk takes less than four steps on average, and it ends because `index` itself
    lies in the range.
    """
    assert 0 <= index < n, (index, n)
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    seed = xxhash.xxh3_64_intdigest(key.encode())
    value = index
    while True:
        value = _feistel(value, half_bits, seed)
        if value < n:
            return value


def _feistel(value: int, half_bits: int, seed: int) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for round_ in range(ROUNDS):
        mixed = xxhash.xxh3_64_intdigest(right.to_bytes(8, "little") + bytes([round_]), seed=seed)
        left, right = right, left ^ (mixed & mask)
    return left << half_bits | right
