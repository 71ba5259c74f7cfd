"""Corpora: text documents from any fsspec URL, or from Python's own standard library, always in the same order."""

from __future__ import annotations

import json
import os
import posixpath
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import xxhash

STDLIB = "python-stdlib"
# Folders of the standard library that are no prose of programs: tests and their data, and what pip put there.
STDLIB_WITHOUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# What is taken of it: enough for the presets that run on a laptop, and prepared in seconds. The files are taken in the
# order of their digests, because in the order of names a bound would keep whole packages and leave out others.
STDLIB_MAX_BYTES = 16 * 1024 * 1024
# Files that are taken from a folder; a glob takes what it matches.
FOLDER_SUFFIXES = (".txt", ".jsonl")
# A document is held in memory at once, and so is its tokenization, at about 30 times its size.
DOCUMENT_MAX_BYTES = 64 * 1024 * 1024


class CorpusError(ValueError):
    """`data.corpus` does not name a corpus that can be read; the message says what to change."""


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus, sorted by path; nothing of them has been read."""

    fs: Any
    paths: tuple[str, ...]

    def documents(self) -> Iterator[str]:
        """The text of each document: a file, or a line's field "text" of a .jsonl file. Not UTF-8 becomes U+FFFD.

        Documents without a character are left out.

        Raises:
            CorpusError: a file cannot be read, is too long, or is no JSON lines file although its name says so.
        """
        for path in self.paths:
            try:
                yield from filter(None, self._json_lines(path) if path.endswith(".jsonl") else self._text(path))
            except CorpusError:
                raise
            except Exception as error:  # each file system has its own exceptions
                raise CorpusError(f"data.corpus: {path} cannot be read: {error!r}") from error

    def _text(self, path: str) -> Iterator[str]:
        if self.fs.size(path) > DOCUMENT_MAX_BYTES:
            raise CorpusError(
                f"data.corpus: {path} is longer than {DOCUMENT_MAX_BYTES} bytes, and a text file is one "
                'document: cut it into files, or make it a .jsonl file with one {"text": ...} object a line'
            )
        yield self.fs.cat_file(path).decode("utf-8", errors="replace")

    def _json_lines(self, path: str) -> Iterator[str]:
        with self.fs.open(path, "rt", encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise CorpusError(
                        f'data.corpus: {path} line {number} must be a JSON object with a field "text": {error!r}'
                    ) from error
                if not isinstance(text, str):
                    raise CorpusError(f'data.corpus: {path} line {number}: "text" must be a string')
                yield text


def list_corpus(url: str) -> Corpus:
    """Find the files of the corpus that `data.corpus` names, without reading them.

    Args:
        url: ``python-stdlib``, or an fsspec URL or local path of a file, of a folder (its .txt and .jsonl files, at any
            depth) or a glob.

    Raises:
        CorpusError: nothing matches, or the URL's file system is unknown, not installed or unreachable.
    """
    if url == STDLIB:
        return _stdlib()
    try:
        fs, path = fsspec.core.url_to_fs(url)
        if any(mark in path for mark in "*?["):
            found = [match for match in fs.glob(path) if not fs.isdir(match)]
        elif fs.isdir(path):
            found = [name for name in fs.find(path) if name.endswith(FOLDER_SUFFIXES)]
        else:
            found = [path] if fs.exists(path) else []
    except ImportError as error:
        raise CorpusError(
            f"data.corpus = {url!r}: {error} (for s3:// and gs:// install shepherd-train[s3] or shepherd-train[gcs])"
        ) from error
    except Exception as error:  # each file system has its own exceptions
        raise CorpusError(f"data.corpus = {url!r} cannot be listed: {error!r}; check the URL and its access") from error
    if not found:
        raise CorpusError(
            f"data.corpus = {url!r} matches no file: give a text file, a folder that holds some (named "
            f"*{' or *'.join(FOLDER_SUFFIXES)}), a glob such as s3://bucket/books/*.txt, or {STDLIB!r}"
        )
    return Corpus(fs, tuple(sorted(found)))


def source_name(url: str) -> str:
    """What the corpus is called in the cache: the URL, and for the standard library also which one."""
    return f"{url}-{sys.version.split()[0]}" if url == STDLIB else url


def _stdlib() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_WITHOUT]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise CorpusError(
            f"data.corpus = {STDLIB!r}: this Python's standard library has no source files under {root}; give a URL"
        )
    taken, total_bytes = [], 0
    for _, path in sorted((xxhash.xxh3_128_hexdigest(p.read_bytes()), p.relative_to(root).as_posix()) for p in files):
        size = (root / path).stat().st_size
        if total_bytes + size > STDLIB_MAX_BYTES:
            break
        taken.append(path)
        total_bytes += size
    return Corpus(fsspec.filesystem("file"), tuple(posixpath.join(root.as_posix(), path) for path in sorted(taken)))
