"""The fingerprints of tensors: what they must see, and what they must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.audit import ROW_BYTES, device_fingerprint, fingerprint, host_fingerprint

FINGERPRINTS = [host_fingerprint, device_fingerprint]
both = pytest.mark.parametrize("take", FINGERPRINTS, ids=["host", "device"])

# Rows, columns and several chunks of the device's sums, and a tail that fills no word.
SIZES = st.one_of(st.integers(1, 40), st.integers(1, 3 * ROW_BYTES), st.integers(2**19 - 9, 2**19 + 9))


def contents(size: int, kind: str, seed: int) -> np.ndarray:
    """Bytes as a state may hold them: [size] uint8."""
    generator = np.random.default_rng(seed)
    if kind == "normal":
        return generator.standard_normal(size // 4 + 1, dtype=np.float32).view(np.uint8)[:size].copy()
    if kind == "positive":  # second moments: no sign bit is set
        return np.square(generator.standard_normal(size // 4 + 1, dtype=np.float32)).view(np.uint8)[:size].copy()
    value = {"zeros": 0.0, "ones": 1.0}[kind]
    return np.full(size // 4 + 1, value, dtype=np.float32).view(np.uint8)[:size].copy()


KINDS = st.sampled_from(["normal", "positive", "zeros", "ones"])


def differ(take: Callable[[Tensor], Tensor], data: np.ndarray, harm: Callable[[np.ndarray], None]) -> bool:
    """Whether the fingerprints before and after `harm` differ, which must be when the bytes do."""
    harmed = data.copy()
    harm(harmed)
    changed = take(torch.from_numpy(harmed)).tolist() != take(torch.from_numpy(data)).tolist()
    assert changed or np.array_equal(harmed, data)
    return changed


# --- what they must not depend on ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int16, torch.bool, torch.uint8]
)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 3), (1031, 67), (5, 0, 3)])
def test_the_bits_in_row_major_order_are_all_that_counts(
    take: Callable[[Tensor], Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    reference = take(tensor)
    assert reference.dtype == torch.int64
    assert reference.shape == (2,)
    raw = tensor.reshape(-1).view(torch.uint8).clone()
    assert torch.equal(take(raw), reference)
    assert torch.equal(take(tensor.requires_grad_(dtype.is_floating_point and tensor.element_size() > 1)), reference)


@both
def test_views_give_what_their_copies_give(take: Callable[[Tensor], Tensor]) -> None:
    base = torch.randn(130, 70).to(torch.bfloat16)
    views = [base.T, base[3:, 5:], base[::2], base[1], base.flatten()[1:], base.flatten()[3:10], base[:, :1]]
    for view in views:
        assert torch.equal(take(view), take(view.contiguous().clone()))


@both
def test_threads_change_nothing(take: Callable[[Tensor], Tensor]) -> None:
    tensor = torch.randn(1_000_003)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(take(tensor).tolist())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_the_device_decides_the_fingerprint() -> None:
    tensor = torch.randn(1000)
    assert torch.equal(fingerprint(tensor), host_fingerprint(tensor))
    assert not torch.equal(host_fingerprint(tensor), device_fingerprint(tensor))


def test_the_sums_equal_their_definition() -> None:
    """Against Python's own integers, which do not wrap around unless told to."""

    def splitmix64(position: int, stream: int) -> int:
        z = (position + 1 + (stream << 48)) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return (z ^ z >> 31) | 1

    data = np.random.default_rng(0).integers(0, 256, 2 * 4096 + 1001, dtype=np.uint8).tobytes()
    padded = data + bytes(-len(data) % 4096)
    row_word = column_word = 0
    for i in range(0, len(padded), 8):
        r, c = divmod(i // 8, 512)
        y = int.from_bytes(padded[i : i + 8], "little") * 0x9E3779B97F4A7C15 % 2**64
        y ^= y >> 32
        row_word += splitmix64(r, 0) * splitmix64(c, 1) * y
        column_word += splitmix64(c, 2) * splitmix64(c, 1) * y
    expected = [row_word % 2**64, column_word % 2**64]
    found = device_fingerprint(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    assert [int(word) % 2**64 for word in found] == expected


# --- what they must see ----------------------------------------------------------------------------------------------


@both
@given(
    size=SIZES, kind=KINDS, seed=st.integers(0, 2**32), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7)
)
@settings(max_examples=150, deadline=None)
def test_every_single_bit_is_seen(
    take: Callable[[Tensor], Tensor], size: int, kind: str, seed: int, where: float, bit: int
) -> None:
    def flip(data: np.ndarray) -> None:
        data[int(where * size)] ^= 1 << bit

    assert differ(take, contents(size, kind, seed), flip)


@both
def test_every_single_bit_of_a_tensor_is_seen(take: Callable[[Tensor], Tensor]) -> None:
    data = contents(150, "normal", 1)
    reference = take(torch.from_numpy(data)).tolist()
    seen = {tuple(reference)}
    for position in range(8 * 150):
        data[position // 8] ^= 1 << position % 8
        seen.add(tuple(take(torch.from_numpy(data)).tolist()))
        data[position // 8] ^= 1 << position % 8
    assert len(seen) == 1 + 8 * 150


def words(indices: range | list[int], mask: int) -> Callable[[np.ndarray], None]:
    """Flips the bits of `mask` in these elements of float32."""

    def flip(data: np.ndarray) -> None:
        data.view(np.uint32)[list(indices)] ^= np.uint32(mask)

    return flip


@both
@pytest.mark.parametrize("kind", ["normal", "positive", "zeros", "ones"])
def test_the_same_bit_in_two_elements(take: Callable[[Tensor], Tensor], kind: str) -> None:
    """The hole of odd weights without a premix: two sign bits cancel, the bits below them in half or a quarter."""
    data = contents(4 * 3000, kind, 2)
    chance = np.random.default_rng(3)
    for bit in (31, 30, 29, 23, 0):
        for first, second in combinations([0, 1, 2, 3, 1023, 1024, 1025, 2048, 2999], 2):
            assert differ(take, data, words([first, second], 1 << bit)), (bit, first, second)
    for _ in range(200):
        pair = chance.choice(3000, 2, replace=False).tolist()
        assert differ(take, data, words(pair, 1 << int(chance.integers(32))))


@both
@pytest.mark.parametrize("kind", ["normal", "positive", "zeros", "ones"])
def test_the_same_bit_in_a_run_of_neighbours(take: Callable[[Tensor], Tensor], kind: str) -> None:
    """Four neighbours' sign bits are those which a premix of ``x ^ (x >>> 32)`` alone would lose, every time."""
    data = contents(4 * 3000, kind, 4)
    for length in range(2, 17):
        for start in (0, 1, 2, 7, 1016, 1022, 2983):
            for bit in (31, 30, 23, 0):
                assert differ(take, data, words(range(start, start + length), 1 << bit)), (length, start, bit)


@both
@pytest.mark.parametrize("kind", ["normal", "positive", "zeros", "ones"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_strided_patterns(take: Callable[[Tensor], Tensor], kind: str, dtype: type) -> None:
    """Every 2nd to 4096th element of each width, and rectangles, which rows and columns of sums see balanced."""
    data = contents(2**16, kind, 5)
    width = 8 * np.dtype(dtype).itemsize
    for stride in (1, 2, 3, 4, 8, 16, 64, 512, 1024, 4096):
        for bit in (0, width // 2, width - 2, width - 1):

            def flip(raw: np.ndarray, stride: int = stride, bit: int = bit) -> None:
                raw.view(dtype)[::stride] ^= dtype(1 << bit)

            assert differ(take, data, flip), (stride, bit)
    for height, wide in ((2, 2), (2, 4), (4, 2), (8, 16)):

        def flip_rectangle(raw: np.ndarray, height: int = height, wide: int = wide) -> None:
            raw.view(np.uint64).reshape(-1, 512)[3 : 3 + height, 40 : 40 + wide] ^= np.uint64(1 << 63)

        assert differ(take, data, flip_rectangle), (height, wide)


@both
@pytest.mark.parametrize("kind", ["normal", "positive", "ones"])
def test_nullified_elements(take: Callable[[Tensor], Tensor], kind: str) -> None:
    """Half of real faults set elements to zero (gate-level study by NVIDIA, arXiv 2605.04213)."""
    data = contents(2**16, kind, 6)

    def zero(where: slice) -> Callable[[np.ndarray], None]:
        def harm(raw: np.ndarray) -> None:
            raw.view(np.float32)[where] = 0

        return harm

    for start in (0, 5, 1021, 16_383 - 16):
        for length in range(1, 17):
            assert differ(take, data, zero(slice(start, start + length)))
    for stride in (2, 4, 8, 16):
        assert differ(take, data, zero(slice(stride - 1, None, stride)))
    assert differ(take, data, zero(slice(None)))


@both
@given(seed=st.integers(0, 2**32), width=st.sampled_from([1, 2, 4, 8, 512, 4096]))
@settings(max_examples=40, deadline=None)
def test_what_is_moved_is_seen(take: Callable[[Tensor], Tensor], seed: int, width: int) -> None:
    """Swaps of two elements, words or rows, rotations, reversal and permutations: sums without weights see none."""
    data = contents(2**16, "normal", 7)
    chance = np.random.default_rng(seed)
    count = len(data) // width

    def move(order: np.ndarray) -> Callable[[np.ndarray], None]:
        def harm(raw: np.ndarray) -> None:
            raw[:] = raw.reshape(count, width)[order].reshape(-1)

        return harm

    first, second = chance.choice(count, 2, replace=False)
    swapped = np.arange(count)
    swapped[[first, second]] = swapped[[second, first]]
    differ(take, data, move(swapped))  # equal bytes can change places: `differ` knows
    assert differ(take, data, move(np.roll(np.arange(count), int(chance.integers(1, count)))))
    assert differ(take, data, move(np.arange(count)[::-1]))
    assert differ(take, data, move(chance.permutation(count)))


@both
def test_columns_and_checkerboards_that_are_swapped_are_seen(take: Callable[[Tensor], Tensor]) -> None:
    """Swaps that leave every row's and every column's sum as it was."""
    data = contents(2**16, "zeros", 0)
    board = data.view(np.uint64).reshape(-1, 512)
    board[2, 10] = board[5, 20] = 0x3F80_0000

    def swap(raw: np.ndarray) -> None:
        other = raw.view(np.uint64).reshape(-1, 512)
        other[2, 10], other[2, 20] = other[2, 20], other[2, 10]
        other[5, 10], other[5, 20] = other[5, 20], other[5, 10]

    assert differ(take, data, swap)


@both
@given(data=st.data(), kind=KINDS, size=st.integers(8, 5000))
@settings(max_examples=100, deadline=None)
def test_any_change_of_some_bytes_is_seen(
    take: Callable[[Tensor], Tensor], data: st.DataObject, kind: str, size: int
) -> None:
    changes = data.draw(st.dictionaries(st.integers(0, size - 1), st.integers(1, 255), min_size=1, max_size=40))

    def harm(raw: np.ndarray) -> None:
        for index, mask in changes.items():
            raw[index] ^= mask

    assert differ(take, contents(size, kind, 8), harm)


# --- the oracle of these tests ---------------------------------------------------------------------------------------


def naive(data: np.ndarray, premix: bool) -> list[int]:
    """Odd row and column weights, and at most ``x ^ (x >>> 32)`` before: the sums that have a hole."""
    x = data.view(np.uint64).reshape(-1, 512).copy()
    if premix:
        x ^= x >> np.uint64(32)
    weights = np.random.default_rng(9).integers(0, 2**64, 512, dtype=np.uint64) | np.uint64(1)
    row = (x.sum(1) * weights[: len(x)]).sum()
    return [int(row), int((x.sum(0) * weights).sum())]


@pytest.mark.parametrize(
    ("premix", "elements"), [(False, [1, 2001]), (True, [2, 3, 4, 5])], ids=["no premix", "shift alone"]
)
def test_these_patterns_find_the_holes_of_simpler_sums(premix: bool, elements: list[int]) -> None:
    data = contents(2**16, "normal", 4)
    harmed = data.copy()
    words(elements, 1 << 31)(harmed)
    assert naive(harmed, premix) == naive(data, premix)
