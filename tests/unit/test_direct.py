"""Files past the page cache: what is written is what is read, wherever it lies in memory, whatever the disk refuses."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections import Counter
from pathlib import Path

import pytest

from storage import direct

PAGE = direct.PAGE_BYTES


def pieces_of(sizes: list[int], shifts: list[int]) -> tuple[list[tuple[int, memoryview]], int]:
    """Pieces of random content, each so many bytes from a page in memory, one after another on pages of a file."""
    rng, pieces, end = random.Random(1), [], 0
    for size, shift in zip(sizes, shifts, strict=True):
        memory = direct.memory(size + shift + 1)[shift : shift + size]
        memory[:] = rng.randbytes(size)
        pieces.append((end, memory))
        end += -(-size // PAGE) * PAGE
    return pieces, end


def expected(pieces: list[tuple[int, memoryview]], size: int) -> bytes:
    whole = bytearray(size)
    for at, piece in pieces:
        whole[at : at + len(piece)] = piece
    return bytes(whole)


def write(path: Path, pieces: list[tuple[int, memoryview]], size: int, buffers: direct.Buffers | None = None) -> None:
    """Write, and check that each byte of each piece was looked at twice, as it is: unwritten, then written."""
    seen: Counter = Counter()
    lock = threading.Lock()

    def look(number: int, begin: int, memory: memoryview) -> None:
        assert begin % direct.UNIT_BYTES == 0
        at, piece = pieces[number]
        assert memory == piece[begin : begin + len(memory)]
        with open(path, "rb") as file:
            file.seek(at + begin)
            written = file.read(len(memory)) == memory
        with lock:
            seen[number, written] += len(memory)

    path.touch()
    direct.write(path, pieces, size, look, buffers or direct.Buffers())
    assert seen == Counter({(n, w): len(piece) for n, (_, piece) in enumerate(pieces) if piece for w in (False, True)})


MIXTURES = {
    "empty": ([], []),
    "small": ([1, 0, 4096, 5000, 100, 7], [0, 0, 0, 0, 64, 3]),
    "large": ([2 * direct.UNIT_BYTES + 3 * PAGE, 17, 2**20, 2**20 + 1, direct.UNIT_BYTES], [0, 0, 0, 0, 0]),
    "astray": ([direct.UNIT_BYTES + 5, 2**21, 9], [64, 64, 1]),
    "many": ([3000] * 3000, [0] * 3000),
}


@pytest.fixture
def refusals(monkeypatch) -> Counter:
    """Counts what was refused by a file system without O_DIRECT."""
    refused: Counter = Counter()
    actual = os.open

    def without(path, flags, *arguments, **options):
        if flags & os.O_DIRECT:
            refused["open"] += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return actual(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", without)
    return refused


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_file_is_its_pieces_and_zeros(tmp_path, mixture):
    pieces, size = pieces_of(*MIXTURES[mixture])
    write(tmp_path / "x", pieces, size)
    assert (tmp_path / "x").read_bytes() == expected(pieces, size)


@pytest.mark.parametrize("mixture", ["small", "large"])
def test_a_file_system_that_refuses_to_open_is_used_through_the_cache(tmp_path, refusals, mixture):
    pieces, size = pieces_of(*MIXTURES[mixture])
    write(tmp_path / "x", pieces, size)
    into = direct.memory(size)
    assert direct.read(tmp_path / "x", 0, into) == size
    assert bytes(into) == expected(pieces, size)
    assert refusals["open"] == 2


def test_a_file_system_that_refuses_to_write_is_used_through_the_cache(tmp_path, monkeypatch):
    direct_fds: set[int] = set()
    opened, written, refused = os.open, os.pwrite, []

    def open_(path, flags, *arguments, **options):
        fd = opened(path, flags, *arguments, **options)
        (direct_fds.add if flags & os.O_DIRECT else direct_fds.discard)(fd)
        return fd

    def pwrite(fd, content, at):
        if fd in direct_fds:
            refused.append(at)
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(fd, content, at)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    pieces, size = pieces_of(*MIXTURES["large"])
    write(tmp_path / "x", pieces, size)
    assert refused
    assert (tmp_path / "x").read_bytes() == expected(pieces, size)


@pytest.mark.parametrize(
    ("start", "length", "shift"),
    [
        (0, 10 * PAGE, 0),
        (PAGE, 3 * PAGE + 7, 0),
        (5, PAGE, 0),
        (PAGE, 2 * PAGE, 64),
        (8 * PAGE, 4 * PAGE, 0),
        (0, 0, 0),
    ],
)
def test_any_range_is_read_up_to_the_end_of_the_file(tmp_path, start, length, shift):
    content = random.Random(2).randbytes(10 * PAGE)
    (tmp_path / "x").write_bytes(content)
    into = direct.memory(length + shift + 1)[shift : shift + length]
    n_bytes = direct.read(tmp_path / "x", start, into)
    assert bytes(into[:n_bytes]) == content[start : start + length]
    assert n_bytes == max(0, min(length, len(content) - start))


def test_a_file_that_was_cut_off_within_a_page_is_read_to_its_end(tmp_path):
    content = random.Random(3).randbytes(3 * PAGE + 100)
    (tmp_path / "x").write_bytes(content)
    into = direct.memory(8 * PAGE)
    assert direct.read(tmp_path / "x", 0, into) == len(content)
    assert bytes(into[: len(content)]) == content


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error")])
def test_a_write_that_fails_is_told(tmp_path, monkeypatch, failure):
    def failing(*arguments):
        raise failure

    monkeypatch.setattr(os, "pwrite", failing)
    pieces, size = pieces_of(*MIXTURES["large"])
    with pytest.raises(OSError, match=failure.strerror):
        write(tmp_path / "x", pieces, size)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_look_that_fails_ends_the_write(tmp_path, failing):
    pieces, size = pieces_of([direct.UNIT_BYTES] * 16, [0] * 16)
    looks: Counter = Counter()

    def look(number: int, begin: int, memory: memoryview) -> None:
        looks[number] += 1
        if looks[number] == failing:
            raise ValueError("changed")

    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match="changed"):
        direct.write(tmp_path / "x", pieces, size, look, direct.Buffers())
    assert len(looks) <= direct.THREADS


def test_buffers_are_made_once(tmp_path, monkeypatch):
    pieces, size = pieces_of(*MIXTURES["small"])
    buffers, made = direct.Buffers(), []
    actual = direct.memory
    monkeypatch.setattr(direct, "memory", lambda n_bytes: (made.append(n_bytes), actual(n_bytes))[1])
    for name in "abc":
        write(tmp_path / name, pieces, size, buffers)
    assert len(made) <= direct.THREADS
