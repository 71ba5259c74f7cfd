"""The node's log of its workers: their output, line by line, each line with generation and rank."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from storage.redact import redacted

# A line longer than this is cut in pieces: it bounds what is held in memory for a worker that never ends its line.
LINE_MAX_BYTES = 16 * 1024
# At this size the file becomes `<name>.log.1`, so a worker that warns in a loop costs a node at most twice as much.
FILE_MAX_BYTES = 64 * 1024 * 1024


class LogFile:
    """Append-only and rotated once. A full disk costs lines, which are counted, never the writer."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lost_lines = 0
        self._lock = threading.Lock()
        self._file = path.open("ab", buffering=0)

    def write(self, lines: bytes) -> None:
        """Append whole lines. From any thread."""
        with self._lock:
            self._write(lines)

    def _write(self, lines: bytes) -> None:
        notice = b""
        if self._lost_lines:
            # After a newline, because the last line before may have been written in part.
            notice = b"\n[log] %d lines lost: the log could not be written\n" % self._lost_lines
        written = 0
        try:
            if self._file.tell() + len(lines) > FILE_MAX_BYTES:
                self._file.close()
                os.replace(self.path, self.path.with_name(self.path.name + ".1"))
                self._file = self.path.open("ab", buffering=0)
            if self._file.write(notice) == len(notice):
                self._lost_lines = 0
                written = self._file.write(lines)
        except (OSError, ValueError):  # ValueError: closed, because a rotation failed half-way
            with contextlib.suppress(OSError):
                if self._file.closed:
                    self._file = self.path.open("ab", buffering=0)
        self._lost_lines += lines[written:].count(b"\n")

    def close(self) -> None:
        self._file.close()


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
