"""Every kind of damage to files, chosen by a seed and undone afterwards."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PAGE_BYTES = 4096

Spans = Sequence[tuple[int, int]]
"""Ranges [begin, end) of a file's bytes that mean something."""


@dataclass
class Damage:
    rng: random.Random
    _whole: dict[Path, bytes] = field(default_factory=dict)

    def undo(self) -> None:
        for path, content in self._whole.items():
            _write(path, content)
        self._whole = {}

    def replace(self, path: Path, content: bytes) -> None:
        before = path.read_bytes()
        assert content != before, f"{path}: nothing was damaged"
        self._whole.setdefault(path, before)
        _write(path, content)

    def flip(self, path: Path, spans: Spans) -> None:
        raw = bytearray(path.read_bytes())
        raw[self._byte(spans)] ^= 1 << self.rng.randrange(8)
        self.replace(path, bytes(raw))

    def zero_page(self, path: Path, spans: Spans) -> None:
        """What of a page means something, and is not zero already."""
        raw = bytearray(path.read_bytes())
        while True:
            at = self._byte(spans)
            begin, end = next((b, e) for b, e in spans if b <= at < e)
            first = max(begin, at // PAGE_BYTES * PAGE_BYTES)
            last = min(end, (at // PAGE_BYTES + 1) * PAGE_BYTES)
            if any(raw[first:last]):
                break
        raw[first:last] = bytes(last - first)
        self.replace(path, bytes(raw))

    def cut(self, path: Path, spans: Spans) -> None:
        self.replace(path, path.read_bytes()[: self._byte(spans)])

    def swap(self, a: Path, b: Path, begin: int = 0) -> None:
        """All from `begin` on."""
        old_a, old_b = a.read_bytes(), b.read_bytes()
        self.replace(a, old_a[:begin] + old_b[begin:])
        self.replace(b, old_b[:begin] + old_a[begin:])

    def stale(self, path: Path, old: Path, begin: int = 0) -> None:
        """All from `begin` on is an older file's."""
        self.replace(path, path.read_bytes()[:begin] + old.read_bytes()[begin:])

    def _byte(self, spans: Spans) -> int:
        begin, end = self.rng.choices(spans, [end - begin for begin, end in spans])[0]
        return self.rng.randrange(begin, end)


def _write(path: Path, content: bytes) -> None:
    # In place: the file may be mapped.
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, content, 0)
        os.ftruncate(fd, len(content))
    finally:
        os.close(fd)
