"""Local data files past the page cache: O_DIRECT with several requests in flight. No torch.

Saves and restores move more bytes than a node can cache, once; buffered, each would be copied another time and would
push everything else out. Where a file system refuses O_DIRECT (some tmpfs and NFS), the same calls go through the
cache. Digests are taken by the same threads while the others wait for the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storage.threads import in_threads

# What O_DIRECT wants offsets, lengths and addresses to be multiples of: the page, which no disk's sector exceeds.
PAGE_BYTES = 4096
# Two requests keep a disk at work; with four it stays so while digests are taken. 8 MiB reach its rate.
THREADS = 4
UNIT_BYTES = 8 * 1024 * 1024
# A request costs the disk as much as some 100 KiB; to copy what is larger costs more than a request of its own.
GATHER_BELOW_BYTES = 1024 * 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def memory(n_bytes: int) -> memoryview:
    """Page-aligned memory of the process, zero; in huge pages where there are some, so that it is made faster."""
    if not n_bytes:
        return memoryview(b"")
    area = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        area.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(area)


def address(view: memoryview) -> int:
    """Where a non-empty view's first byte lies in memory."""
    return int(np.frombuffer(view, dtype=np.uint8, count=1).ctypes.data)


class Buffers:
    """Memory to pass data through, of `n_bytes` each, made when first needed and then reused, the longest idle first.

    A disk fills memory that lies in some core's cache at half its rate: so `n_idle` others are used before it again.
    """

    def __init__(self, n_bytes: int = UNIT_BYTES, n_idle: int = 0) -> None:
        self._n_bytes, self._n_idle = n_bytes, n_idle
        self._lock = threading.Lock()
        self._idle: deque[memoryview] = deque()

    @contextlib.contextmanager
    def borrow(self) -> Iterator[memoryview]:
        with self._lock:
            buffer = self._idle.popleft() if len(self._idle) > self._n_idle else memory(self._n_bytes)
        try:
            yield buffer
        finally:
            with self._lock:
                self._idle.append(buffer)


def read(path: Path, start: int, into: memoryview) -> int:
    """Fill `into` with the bytes of a file from `start` on; how many of them there were.

    Past the cache as far as `into` and `start` lie on pages.
    """
    done, whole = 0, len(into) - len(into) % PAGE_BYTES
    if whole and start % PAGE_BYTES == 0 and address(into) % PAGE_BYTES == 0:
        with contextlib.suppress(OSError):  # refused, or failed: then the cache may know, or say why
            with _opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
                done = _all(lambda at, view: os.preadv(fd, [view], at), start, into[:whole])
        if done == len(into):
            return done
    with _opened(path, os.O_RDONLY) as fd:
        return done + _all(lambda at, view: os.preadv(fd, [view], at), start + done, into[done:])


Look = Callable[[int, int, memoryview], None]
"""Number of a piece, a start in it, and the bytes from there on."""


def write(path: Path, pieces: Sequence[tuple[int, memoryview]], size: int, look: Look, buffers: Buffers) -> None:
    """Fill an empty file with `size` bytes, pieces and zeros between them, and sync it.

    Args:
        pieces: each one's place in the file and content, in order; places are on pages, as is `size`.
        look: called from any thread twice for each run of a piece, which starts on a multiple of UNIT_BYTES: with the
            piece's own bytes before they are written, and afterwards with the memory from which they were. What it
            raises fails the write.

    Raises:
        OSError: no room, or the disk failed; what was written is still there.
    """
    assert size % PAGE_BYTES == 0 and all(at % PAGE_BYTES == 0 for at, _ in pieces), size
    flags = os.O_WRONLY
    with _opened(path, flags) as fd, contextlib.ExitStack() as stack:
        if size and _libc.fallocate(fd, 0, 0, size):
            failure = ctypes.get_errno()
            if failure not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR):
                raise OSError(failure, os.strerror(failure), str(path))
        try:
            direct_fd = stack.enter_context(_opened(path, flags | os.O_DIRECT))
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            direct_fd = fd
        target = _Target(fd, direct_fd)

        def work(unit: list[_Run]) -> None:
            with buffers.borrow() as buffer:
                _write_unit(target, pieces, unit, look, buffer)

        in_threads(work, _units(pieces), THREADS)
        os.ftruncate(fd, size)
        os.fsync(fd)


@dataclass
class _Target:
    """A file opened twice; `direct_fd` is the other one, too, once the file system has refused O_DIRECT."""

    fd: int
    direct_fd: int

    def write(self, at: int, pages: memoryview) -> None:
        try:
            _write_all(self.direct_fd, at, pages)
        except OSError as e:
            if e.errno != errno.EINVAL or self.direct_fd == self.fd:
                raise
            self.direct_fd = self.fd
            _write_all(self.fd, at, pages)


@dataclass(frozen=True)
class _Run:
    """Bytes [begin, end) of a piece."""

    number: int
    begin: int
    end: int


def _units(pieces: Sequence[tuple[int, memoryview]]) -> Iterator[list[_Run]]:
    """Runs to write by one request: one that can go as it lies in memory, or several that are gathered first."""
    gathered: list[_Run] = []
    first = 0
    for number, (at, content) in enumerate(pieces):
        for begin in range(0, len(content), UNIT_BYTES):
            run = _Run(number, begin, min(begin + UNIT_BYTES, len(content)))
            alone = run.end - begin >= GATHER_BELOW_BYTES and _on_pages(content[begin : run.end])
            if gathered and (alone or at + run.end - first > UNIT_BYTES):
                yield gathered
                gathered = []
            if alone:
                yield [run]
                continue
            if not gathered:
                first = at + begin
            gathered.append(run)
    if gathered:
        yield gathered


def _on_pages(view: memoryview) -> bool:
    return len(view) % PAGE_BYTES == 0 and address(view) % PAGE_BYTES == 0


def _write_unit(
    target: _Target, pieces: Sequence[tuple[int, memoryview]], unit: list[_Run], look: Look, buffer: memoryview
) -> None:
    for run in unit:
        look(run.number, run.begin, pieces[run.number][1][run.begin : run.end])
    first = pieces[unit[0].number][0] + unit[0].begin
    if len(unit) == 1:
        run = unit[0]
        content = pieces[run.number][1][run.begin : run.end]
        if _on_pages(content):
            target.write(first, content)
            look(run.number, run.begin, content)
            return
    end = 0
    for run in unit:
        at, content = pieces[run.number]
        begin = at + run.begin - first
        buffer[end:begin] = bytes(begin - end)
        end = begin + run.end - run.begin
        buffer[begin:end] = content[run.begin : run.end]
    whole = -(-end // PAGE_BYTES) * PAGE_BYTES
    buffer[end:whole] = bytes(whole - end)
    target.write(first, buffer[:whole])
    for run in unit:
        begin = pieces[run.number][0] + run.begin - first
        look(run.number, run.begin, buffer[begin : begin + run.end - run.begin])


def _write_all(fd: int, at: int, content: memoryview) -> None:
    n_bytes = len(content)
    if _all(lambda at, view: os.pwrite(fd, view, at), at, content) != n_bytes:
        raise OSError(errno.EIO, "a write wrote nothing")


def _all(call: Callable[[int, memoryview], int], at: int, view: memoryview) -> int:
    """`call` on all of `view`, in as many requests as it takes; the bytes that came or went before one brought none."""
    done = 0
    while done < len(view):
        n_bytes = call(at + done, view[done:])
        if not n_bytes:
            break
        done += n_bytes
    return done


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
