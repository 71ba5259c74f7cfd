"""Ceilings that checkpoint_speed.py holds us against: what plain loops get of a disk and of a TCP connection."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from checkpoints.rank import Rank, Timed, host_views

ALIGN_BYTES = 4096
DIGESTED_BYTES = 1 << 20
"""One digest each, as in our format."""
PEER_PATIENCE_S = 60.0


def aligned(rank: Rank, name: str, n_bytes: int) -> memoryview:
    """A buffer on a page's border whose memory is there and whose content does not compress; made once.

    In huge pages where there are any, as ours: the kernel then pins a piece for the disk in a fraction of the time.
    """
    key = f"raw {name} {n_bytes}"
    if key not in rank.kept:
        buffer = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, n_bytes, 1 << 24):
            buffer[start : start + (1 << 24)] = random.randbytes(min(1 << 24, n_bytes - start))
        rank.kept[key] = buffer
    return memoryview(rank.kept[key])


class Memcpy:
    """np.copyto of each of this rank's tensors into memory that is there: the least that a snapshot costs."""

    def __init__(self, rank: Rank, folder: str) -> None:
        self._pairs = []
        for view in host_views(rank):
            target = np.empty_like(view)
            target.fill(1)
            self._pairs.append((target, view))

    def take(self, step: int) -> Callable[[], object]:
        for target, view in self._pairs:
            np.copyto(target, view)
        return lambda: None

    def settle(self) -> None:
        pass


# --- disk ------------------------------------------------------------------------------------------------------------


def write(rank: Rank, path: str, n_bytes: int, threads: int, block_bytes: int) -> Timed:
    """Write a file of `n_bytes` (rounded up to whole pages) by O_DIRECT, allocated first, and sync it."""
    size = -(-n_bytes // ALIGN_BYTES) * ALIGN_BYTES
    buffers = [aligned(rank, f"block {thread}", block_bytes) for thread in range(threads)]

    def work() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)

            def put(thread: int, start: int) -> None:
                piece = buffers[thread][: min(block_bytes, size - start)]
                assert os.pwrite(fd, piece, start) == len(piece)

            _shared(put, size, threads, block_bytes)
            os.fsync(fd)
        finally:
            os.close(fd)

    timed = rank.timed(work)
    os.unlink(path)
    return timed


def read(rank: Rank, path: str, threads: int, block_bytes: int) -> Timed:
    """Read a file by O_DIRECT into buffers that are there."""
    size = os.path.getsize(path)
    buffers = [aligned(rank, f"block {thread}", block_bytes) for thread in range(threads)]

    def work() -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:

            def get(thread: int, start: int) -> None:
                assert os.preadv(fd, [buffers[thread]], start) == min(block_bytes, size - start)

            _shared(get, size, threads, block_bytes)
        finally:
            os.close(fd)

    return rank.timed(work)


def read_checked(rank: Rank, path: str, threads: int, block_bytes: int) -> Timed:
    """The same, each MiB digested and copied to where it belongs: the least that a verified load does."""
    size = os.path.getsize(path)
    buffers = [aligned(rank, f"block {thread}", block_bytes) for thread in range(threads)]
    if "loaded" not in rank.kept:
        rank.kept["loaded"] = np.zeros(size, dtype=np.uint8)
        rank.kept["loaded"].fill(1)  # so that its memory is there, as a tensor's
    loaded = rank.kept["loaded"]

    def work() -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:

            def get(thread: int, start: int) -> None:
                n_bytes = min(block_bytes, size - start)
                assert os.preadv(fd, [buffers[thread]], start) == n_bytes
                for at in range(0, n_bytes, DIGESTED_BYTES):
                    xxhash.xxh3_128_hexdigest(buffers[thread][at : min(at + DIGESTED_BYTES, n_bytes)])
                np.copyto(loaded[start : start + n_bytes], np.frombuffer(buffers[thread], np.uint8, n_bytes))

            _shared(get, size, threads, block_bytes)
        finally:
            os.close(fd)

    return rank.timed(work)


def _shared(work: Callable[[int, int], None], size: int, threads: int, block_bytes: int) -> None:
    """Call `work` with a thread's number and the start of a block, for each block of a file."""
    errors: list[Exception] = []

    def run(thread: int) -> None:
        try:
            for start in range(thread * block_bytes, size, threads * block_bytes):
                work(thread, start)
        except Exception as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(thread,)) for thread in range(1, threads)]
    for thread in running:
        thread.start()
    run(0)
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


def drop_cache(folder: Path) -> None:
    """Let no page of the files below `folder` be in memory; they are on the disk already, or get there first."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            cached = _cached_pages(fd)
        finally:
            os.close(fd)
        assert not cached, f"{cached} pages of {path} stay in memory: its file system cannot be made cold"


def _cached_pages(fd: int) -> int:
    size = os.fstat(fd).st_size
    if not size:
        return 0
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        assert not mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data))
        del view
    return int((pages & 1).sum())


# --- network ---------------------------------------------------------------------------------------------------------


def serve(rank: Rank, n_bytes: int) -> str:
    """Send so many bytes from memory to whoever connects and names the size of a piece; the address."""
    payload = aligned(rank, "payload", n_bytes)
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                piece_bytes = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
                for start in range(0, n_bytes, piece_bytes):
                    connection.sendall(payload[start : start + piece_bytes])

    threading.Thread(target=run, daemon=True).start()
    return "{}:{}".format(*listener.getsockname())


def fetch(rank: Rank, address: str, n_bytes: int, piece_bytes: int) -> Timed:
    """Receive what `serve` sends into memory that is there."""
    target = aligned(rank, "target", n_bytes)
    host, _, port = address.rpartition(":")

    def work() -> None:
        with socket.create_connection((host, int(port)), PEER_PATIENCE_S) as connection:
            connection.sendall(piece_bytes.to_bytes(8, "little"))
            done = 0
            while done < n_bytes:
                n_received = connection.recv_into(target[done : done + piece_bytes])
                assert n_received, f"{address} sent {done} of {n_bytes} bytes"
                done += n_received

    return rank.timed(work)
