"""Commit records: the only thing that makes a checkpoint exist. Created, read, listed, checked, deleted. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable

import xxhash

from storage import direct, s3
from storage.blocks import READ_BLOCKS, Copy, StoreSource, check_blocks
from storage.index import ALIGN_BYTES, Index, check_tensors
from storage.manifest import COMMIT_DIR, DATA_DIR, Commit, ManifestError, RankPart, commit_name
from storage.statements import forget
from storage.threads import in_threads
from storage.urls import Store, list_folders, list_names, locate, read_bytes, remove, write_exclusive

VERIFY_STREAMS = 8
"""Files of a store that are read at a time: a connection gives some 16 MB a second. Local files have threads of their
own, see direct.py."""
PROBLEMS_KEPT = 8
"""Of one data file: a store that lost its content has as many as blocks."""

log = logging.getLogger(__name__)

_COMMIT_FILE = re.compile(r"step-(\d{8,})\.json")
_DATA_FOLDER = re.compile(r"step-(\d{8,})-e\d+-g\d+")


class CommitConflict(RuntimeError):
    """Another checkpoint of the same step is committed already."""


def create_commit(url: str, commit: Commit) -> bool:
    """Make the checkpoint exist. Idempotent: committing the same record again is True too.

    Raises:
        CommitConflict: a different record of this step exists; it stays as it is.
        StoreError: the store failed; the record is not there.
    """
    name = commit_name(commit.step)
    if not write_exclusive(url, name, commit.to_json()):
        raise CommitConflict(f"{name} under {url} exists with other content: step {commit.step} was committed already")
    return True


def read_commit(url: str, name_or_step: str | int) -> Commit:
    """The commit record of a step, or of a name such as ``checkpoints/commits/step-00000120.json``.

    Raises:
        FileNotFoundError: there is none.
        ManifestError: it is damaged, of another format, or of another step than its name says.
    """
    name = commit_name(name_or_step) if isinstance(name_or_step, int) else name_or_step
    commit = Commit.from_json(read_bytes(url, name))
    if commit_name(commit.step) != name:
        raise ManifestError(f"{name} holds the record of step {commit.step}: the file was moved")
    return commit


def list_commits(url: str) -> list[int]:
    """Steps of all committed checkpoints, ascending."""
    found = (_COMMIT_FILE.fullmatch(name) for name in list_names(url, COMMIT_DIR))
    return sorted(int(match.group(1)) for match in found if match)


def delete_checkpoint(url: str, step: int) -> None:
    """Delete the checkpoint of `step`: first the commit record, so that no reader finds half of it, then what was said
    of it, and its data.

    Idempotent. What a deletion that was cut off has left, or one whose record could not be read, is `prune`'s.
    """
    folders = _data_of(url, step) or set()
    remove(url, commit_name(step))
    forget(url, step)
    for folder in sorted(folders):
        remove(url, folder)


def prune(url: str, last_step: int) -> list[str]:
    """Remove the data of attempts at steps up to `last_step` that no commit names; the folders' names.

    They are what saves that were cut off have left, and deletions that were. The caller knows that no save of those
    steps is under way. Data of a step whose record cannot be read stays. On S3, uploads that were cut off a day ago and
    more go, too.
    """
    found = [
        (int(match.group(1)), name) for name in list_folders(url, DATA_DIR) if (match := _DATA_FOLDER.fullmatch(name))
    ]
    named: dict[int, set[str] | None] = {}
    removed = []
    for step, name in found:
        if step > last_step:
            continue
        folder = f"{DATA_DIR}/{name}"
        if step not in named:
            named[step] = _data_of(url, step)
        kept = named[step]
        if kept is not None and folder not in kept:
            remove(url, folder)
            removed.append(folder)
    store = locate(url)
    if s3.is_s3(store.fs):
        try:
            s3.abort_stale_uploads(store.fs, store.path(DATA_DIR))
        except (
            Exception
        ) as e:  # it takes a right of its own (s3:ListBucketMultipartUploads), and not every store has it
            log.warning("uploads that were cut off are left under %s: %s: %s", url, type(e).__name__, e)
    return removed


def _data_of(url: str, step: int) -> set[str] | None:
    """The folders that the record of `step` names; none when there is no record, None when it cannot be read."""
    try:
        commit = read_commit(url, step)
    except FileNotFoundError:
        return set()
    except ManifestError:
        return None
    return {part.data.rpartition("/")[0] for part in commit.parts}


def read_index(store: Store, commit: Commit, part: RankPart) -> Index:
    """The index of one rank's part; see `read_index_bytes` and `index_of`."""
    return index_of(read_index_bytes(store, commit, part), commit, part)


def read_index_bytes(store: Store, commit: Commit, part: RankPart) -> bytes:
    """The index file of one rank's part.

    Raises:
        ManifestError: it is missing, or not the one that the commit names.
    """
    try:
        raw = store.read(part.index)
    except FileNotFoundError as e:
        raise ManifestError(f"{part.index}: missing, but the commit of step {commit.step} names it") from e
    if xxhash.xxh3_128_hexdigest(raw) != part.index_digest:
        raise ManifestError(f"{part.index}: damaged (its xxh3_128 is not the one in the commit of step {commit.step})")
    return raw


def index_of(raw: bytes, commit: Commit, part: RankPart) -> Index:
    """The index of one rank's part from the bytes of its file, checked against the commit.

    Raises:
        ManifestError: they are no index, or belong to another part.
    """
    index = Index.from_json(raw)
    told = (part.rank, commit.step, commit.epoch, commit.generation, part.data, part.data_bytes)
    if told != (index.rank, index.step, index.epoch, index.generation, index.data, index.data_bytes):
        raise ManifestError(f"{part.index}: belongs to another part than the commit of step {commit.step} says")
    return index


def read_indices(url: str, commit: Commit) -> list[Index]:
    """The indices of all ranks, after checking that together they hold every tensor exactly once.

    Raises:
        ManifestError: one is missing or damaged, or the chunks do not tile the tensors.
    """
    store = locate(url)
    indices = [read_index(store, commit, part) for part in commit.parts]
    check_whole(commit, indices)
    return indices


def check_whole(commit: Commit, indices: list[Index]) -> None:
    """Check that these, of the commit's parts, are one of each rank, and hold every tensor exactly once.

    Raises:
        ManifestError: a rank is missing or named twice, or the chunks do not tile the tensors.
    """
    ranks = [part.rank for part in commit.parts]
    if sorted(ranks) != list(range(len(ranks))):
        raise ManifestError(f"the commit of step {commit.step} names ranks {sorted(ranks)}, not each rank once")
    check_tensors(chunk for index in indices for chunk in index.chunks)


def verify(url: str, commit: Commit, progress: Callable[[int], None] = lambda n_bytes: None) -> list[str]:
    """Read the whole checkpoint back; the problems found, each naming its file. Empty: all digests match.

    Of each file the first PROBLEMS_KEPT are told, and how many more there are. `progress` is called before an index is
    read and after blocks are, with the bytes since the call before, from several threads; what it raises ends the
    reading.

    Raises:
        SourceError: the store cannot be read.
    """
    store = locate(url)

    def check(part: RankPart) -> tuple[Index | None, list[str]]:
        progress(0)
        try:
            index = read_index(store, commit, part)
        except ManifestError as e:
            return None, [str(e)]
        return index, _check_data(store, index, progress)

    checked = in_threads(check, commit.parts, 1 if store.local else VERIFY_STREAMS)
    problems = [problem for _, found in checked for problem in found]
    indices = [index for index, _ in checked if index is not None]
    if len(indices) == len(commit.parts):
        try:
            check_tensors(chunk for index in indices for chunk in index.chunks)
        except ManifestError as e:
            problems.append(str(e))
    return problems


def _check_data(store: Store, index: Index, progress: Callable[[int], None]) -> list[str]:
    """One pass over a data file: its damaged blocks, and padding that is not zero."""
    copy, problems = Copy(index, StoreSource(store)), list[str]()
    buffer = direct.memory(READ_BLOCKS * index.block_bytes + ALIGN_BYTES)
    more = 0
    for chunk in sorted(index.chunks, key=lambda chunk: chunk.file_offset):
        for begin in range(0, len(chunk.blocks), READ_BLOCKS):
            last = min(begin + READ_BLOCKS, len(chunk.blocks))
            start = chunk.file_offset + begin * index.block_bytes
            n_bytes = min(last * index.block_bytes, chunk.n_bytes) - begin * index.block_bytes
            # With the padding, whole pages: a local disk is read past the cache, which may be better than the disk.
            whole = min(-(-n_bytes // ALIGN_BYTES) * ALIGN_BYTES, index.data_bytes - start)
            done = copy.source.read(index, start, buffer[:whole])
            problems += map(str, check_blocks(copy, chunk, begin, last, buffer[:n_bytes], done))
            if done >= n_bytes and (done < whole or any(buffer[n_bytes:whole])):
                beside = f"bytes {start + n_bytes} to {start + whole}"
                problems.append(f"{index.data}: {beside} belong to no tensor and are not zero")
            progress(n_bytes)
        more, problems = more + len(problems[PROBLEMS_KEPT:]), problems[:PROBLEMS_KEPT]
    return [*problems, f"{index.data}: and {more} more"] if more else problems


def state_digest(url: str, commit: Commit) -> str:
    """One SHA-256 over all content of a checkpoint: each chunk's name, box, shape, dtype and block digests, sorted.

    Equal for two checkpoints of the same state on the same mesh, whichever run, epoch, generation or rank wrote them.
    Reads the indices; `verify` is what ties them to the data.

    Raises:
        ManifestError: an index is missing or damaged.
    """
    chunks = sorted(
        [chunk.fqn, list(chunk.offsets), list(chunk.sizes), list(chunk.shape), chunk.dtype, list(chunk.blocks)]
        for index in read_indices(url, commit)
        for chunk in index.chunks
    )
    return hashlib.sha256(json.dumps(chunks, separators=(",", ":")).encode()).hexdigest()
