"""The node's log of its workers: their output, line by line, each line with generation and rank."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import wait
from pathlib import Path

from storage.redact import redacted
from storage.threads import begun

# A line longer than this is cut in pieces: it bounds what is held in memory for a worker that never ends its line.
LINE_MAX_BYTES = 16 * 1024
# At this size the file becomes `<name>.log.1`, so a worker that warns in a loop costs a node at most twice as much.
FILE_MAX_BYTES = 64 * 1024 * 1024
# Held in memory while the disk does not take them.
WAITING_MAX_BYTES = 16 * 1024 * 1024


class LogFile:
    """Append-only and rotated once. A disk that is full or hangs costs lines, which are counted, never the writer: a
    thread of the file's own waits for the disk."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._changed = threading.Condition()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._dropped_lines = 0
        """After those that wait."""
        self._lost_lines = 0
        self._closing = False
        self._file = path.open("ab", buffering=0)
        self._written = begun(self._write_all, "worker-log")

    def write(self, lines: bytes) -> None:
        """Append whole lines, soon. From any thread."""
        with self._changed:
            if self._waiting_bytes + len(lines) > WAITING_MAX_BYTES:
                self._dropped_lines += lines.count(b"\n")
                return
            self._waiting.append(lines)
            self._waiting_bytes += len(lines)
            self._changed.notify()

    @property
    def lost_lines(self) -> int:
        """That are not told of in the file yet."""
        with self._changed:
            return self._lost_lines + self._dropped_lines

    def close(self, deadline_s: float) -> None:
        """Write what waits. Where the disk hangs for longer than `deadline_s`, it is left to do so."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        wait([self._written], deadline_s)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)  # as long as the node's agent lives
                waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
                dropped, self._dropped_lines = self._dropped_lines, 0
                lost = self._lost_lines
            if not waiting:
                self._write(b"", lost + dropped)
                self._file.close()
                return
            for lines in waiting:
                lost = self._write(lines, lost)
            with self._changed:
                self._lost_lines = lost + dropped

    def _write(self, lines: bytes, lost: int) -> int:
        """After a notice of `lost` lines, if there are any; how many are lost now."""
        # After a newline, because the last line before may have been written in part.
        notice = b"\n[log] %d lines lost: the log could not be written\n" % lost if lost else b""
        written = 0
        try:
            if self._file.tell() + len(lines) > FILE_MAX_BYTES:
                self._file.close()
                os.replace(self.path, self.path.with_name(self.path.name + ".1"))
                self._file = self.path.open("ab", buffering=0)
            if self._file.write(notice) == len(notice):
                lost = 0
                written = self._file.write(lines)
        except (OSError, ValueError):  # ValueError: closed, because a rotation failed half-way
            with contextlib.suppress(OSError):
                if self._file.closed:
                    self._file = self.path.open("ab", buffering=0)
        return lost + lines[written:].count(b"\n")


def _redacted(line: bytes) -> bytes:
    """Bytes that are no text come out as they went in."""
    return redacted(line.decode(errors="surrogateescape")).encode(errors="surrogateescape")


class LineBuffer:
    """Cuts one worker's output into lines with the worker's tag before each."""

    def __init__(self, tag: str) -> None:
        self._tag = f"[{tag}] ".encode()
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The lines that `data` completes, tagged; empty when it completes none."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        while len(self._rest) > LINE_MAX_BYTES:
            lines.append(self._rest[:LINE_MAX_BYTES])
            self._rest = self._rest[LINE_MAX_BYTES:]
        return b"".join(self._tag + _redacted(line) + b"\n" for line in lines)

    def end(self) -> bytes:
        """The unfinished last line, if there is one."""
        return self.feed(b"\n") if self._rest else b""
