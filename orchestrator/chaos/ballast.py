"""Disk full: a process of its own holds the free space of a file system, and gives it back however it ends.

The ballast is a file without a name, so the kernel frees it with the process. The process is detached from the one
that asked for it and has its own deadline: a controller that dies meanwhile leaves nothing full behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import subprocess
import sys
import tempfile
import threading
import time

from storage.urls import locate

FULL_DEADLINE_S = 60.0
"""Until the file system is full. Space is allocated, not written, where the file system can."""
TOP_UP_INTERVAL_S = 0.1
"""Space that others give back meanwhile, such as old checkpoints, is taken this soon."""
MIN_BLOCK_BYTES = 4096


def check(url: str, limit_bytes: int) -> None:
    """Whether the file system under `url` can be filled.

    Raises:
        ValueError: it is not local, or has more free space than `limit_bytes`.
    """
    store = locate(url)
    if not store.local:
        raise ValueError(f"disk-full needs a local run.url, and {url} is a store: it cannot be filled from here")
    free = _free_bytes(store.root)
    if free > limit_bytes:
        raise ValueError(
            f"{free / 2**30:.1f} GiB are free under {url}, more than the {limit_bytes / 2**30:g} GiB that may be "
            "filled: put the run on a smaller file system (a quota, a loop device), or raise --ballast-gib"
        )


async def fill(url: str, seconds: float, limit_bytes: int) -> str:
    """Fill the file system under `url` for `seconds` from now on; what was done, once it is full.

    Raises:
        ValueError: as `check`.
        RuntimeError: it could not be filled.
    """
    check(url, limit_bytes)
    arguments = ["--folder", locate(url).root, "--seconds", str(seconds), "--limit-bytes", str(limit_bytes)]
    # Not asyncio's own: that kills what still runs when its loop ends.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    loop = asyncio.get_running_loop()
    told: asyncio.Future[str] = loop.create_future()
    threading.Thread(target=_attend, args=(process, loop, told), name="ballast", daemon=True).start()
    line = await asyncio.wait_for(told, FULL_DEADLINE_S)
    if not line:
        raise RuntimeError("the ballast process ended before the file system was full; its words are in the log")
    return line.strip()


def _attend(process: subprocess.Popen[str], loop: asyncio.AbstractEventLoop, told: asyncio.Future[str]) -> None:
    """Pass on what the ballast process says, and reap it when it ends."""
    assert process.stdout is not None
    line = process.stdout.readline()
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(_tell, told, line)
    process.wait()
    process.stdout.close()


def _tell(told: asyncio.Future[str], line: str) -> None:
    if not told.done():
        told.set_result(line)


def hold(folder: str, seconds: float, limit_bytes: int) -> None:
    """Fill the file system of `folder`, say so on standard output, and hold it full for `seconds`."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryFile(dir=folder) as ballast:  # nameless: gone with this process
        size = _take(ballast.fileno(), 0, limit_bytes)
        print(f"{size} bytes of ballast fill the file system of {folder} for {seconds:g} s", flush=True)
        while time.monotonic() < deadline:
            time.sleep(min(TOP_UP_INTERVAL_S, max(0.0, deadline - time.monotonic())))
            size = _take(ballast.fileno(), size, limit_bytes)


def _take(fd: int, size: int, limit_bytes: int) -> int:
    """Let the file grow until nothing more fits, by blocks that halve; its new size."""
    block = 2**30
    while block >= MIN_BLOCK_BYTES and size < limit_bytes:
        try:
            os.posix_fallocate(fd, size, min(block, limit_bytes - size))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            block //= 2
            continue
        size = os.fstat(fd).st_size
    return size


def _free_bytes(folder: str) -> int:
    usage = os.statvfs(folder)
    # The superuser may take what is reserved for it, too.
    return usage.f_frsize * (usage.f_bfree if os.geteuid() == 0 else usage.f_bavail)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Holds a file system full for a while.")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--limit-bytes", type=int, required=True)
    given = parser.parse_args()
    hold(given.folder, given.seconds, given.limit_bytes)
