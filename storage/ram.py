"""The RAM tier on a node: snapshots in memory-mapped files that outlive worker and agent. No torch.

Layout: ``<ram_dir>/<run>/<node>/slot-00003.<0|1|2|3>``, so that deleting a node's snapshots is deleting one folder.
Files, not multiprocessing.shared_memory, whose resource tracker unlinks what a dead process had open.

A file is a header page, a payload whose chunks lie as in a data file of a durable checkpoint, and the payload's index
(storage/index.py), whose digest the header holds. The header's sequence counter is odd while the file is written: a
writer that is killed leaves an odd counter behind, and the other files as they were. Nothing in a payload may be used
before its block was checked against the index.

How many files a slot has:

- three: the newest that is complete over the cluster, the newest, and the one in flight. With two, a survivor
  overwrites the step that another rank has completed last;
- four where copies are sent to other nodes (FILES_WITH_COPIES): a dead node's state is there only in the copies on its
  buddy, of the step P that was the last to be copied from every node. So survivors must still hold P when it dies: P
  stays pinned until all copies of a later step S have arrived, S stays pinned meanwhile, and the newest and the one in
  flight go on beside them;
- two of another node's slot (COPY_FILES): that of step P, and the one that is arriving.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import struct
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from storage.blocks import Copy, Distance, SourceError
from storage.index import ALIGN_BYTES, Index
from storage.manifest import ManifestError

FORMAT_VERSION = 2
HEADER_BYTES = ALIGN_BYTES
FILES = 3
FILES_WITH_COPIES = 4
COPY_FILES = 2

MAGIC = b"SHEPRAM1"
PREFIX = struct.Struct("<8sQI16s")  # magic, sequence counter, length of the JSON, xxh3_128 of the JSON
_SEQUENCE_OFFSET = 8
_MAX_NAME = 64
_FILE_NAME = re.compile(r"slot-(\d{5,})\.(\d)")

# Through ctypes, which lets other threads run meanwhile; mmap's own methods and flags do not.
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_POPULATE_WRITE = 23  # of Linux 5.14


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a complete snapshot says of itself."""

    run: str
    node: str
    slot: int
    origin_slot: int
    """The slot whose rank made the snapshot; another one than `slot` when a replica's shard was taken over."""
    step: int
    generation: int
    payload_bytes: int
    """A multiple of ALIGN_BYTES; the index begins behind them."""
    index_bytes: int
    index_digest: str
    """xxh3_128 of the index, which holds the payload's."""
    format_version: int = FORMAT_VERSION

    @property
    def n_bytes(self) -> int:
        """Of payload and index."""
        return self.payload_bytes + self.index_bytes


def safe_name(name: str) -> str:
    """A run's or node's name as a folder's name: other characters than letters, digits, ``_``, ``.`` and ``-`` become
    ``_``; then, and when it is longer than 64, a digest of the true name is appended, so that names stay distinct."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".")
    if safe == name and 0 < len(name) <= _MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{safe[: _MAX_NAME - len(digest) - 1]}-{digest}"


def node_folder(ram_dir: str, run: str, node: str) -> Path:
    """The folder that holds all snapshots of a run on a node, and nothing else."""
    return Path(ram_dir, safe_name(run), safe_name(node))


def file_paths(ram_dir: str, run: str, node: str, slot: int) -> list[Path]:
    """The files that a slot can have; they need not exist."""
    folder = node_folder(ram_dir, run, node)
    return [folder / f"slot-{slot:05d}.{number}" for number in range(FILES_WITH_COPIES)]


def read_header(path: Path) -> Header | None:
    """The header of a complete snapshot; None when the file is missing, empty, torn, of another format or misplaced."""
    try:
        with open(path, "rb") as f:
            header = parse_header(f.read(HEADER_BYTES))[1]
    except OSError:
        return None
    if header is None or not path.name.startswith(f"slot-{header.slot:05d}."):
        return None
    return header if (header.run, header.node) == (path.parent.parent.name, path.parent.name) else None


def parse_header(page: bytes) -> tuple[int, Header | None]:
    """The sequence counter of a header page, and its header when that is complete and whole."""
    if len(page) < PREFIX.size:
        return 0, None
    magic, sequence, length, digest = PREFIX.unpack_from(page)
    if magic != MAGIC or sequence == 0:
        return 0, None
    text = page[PREFIX.size : PREFIX.size + length]
    if sequence % 2 or xxhash.xxh3_128_digest(text) != digest:
        return sequence, None
    document: dict[str, Any] = json.loads(text)
    if document.get("format_version") != FORMAT_VERSION:
        return sequence, None
    return sequence, Header(**document)


def inventory(ram_dir: str, run: str, node: str) -> dict[int, list[int]]:
    """Steps of the complete snapshots on a node, ascending, by slot. Reads headers only, not payloads."""
    return {slot: sorted({h.step for h in headers}) for slot, headers in held(ram_dir, run, node).items()}


def held(ram_dir: str, run: str, node: str) -> dict[int, list[Header]]:
    """Headers of the complete snapshots on a node by slot, the oldest step first. Reads no payloads."""
    found: dict[int, list[Header]] = {}
    for path in _files(ram_dir, run, node):
        header = read_header(path)
        if header is not None:
            found.setdefault(header.slot, []).append(header)
    return {slot: sorted(found[slot], key=lambda h: (h.step, h.generation)) for slot in sorted(found)}


def snapshot_path(
    ram_dir: str, run: str, node: str, slot: int, step: int, generation: int | None = None
) -> Path | None:
    """The file that holds a slot's complete snapshot of `step`, which `generation` wrote; for None, the newest has."""
    held = [(header, path) for path, header in _headers(ram_dir, run, node, slot) if header.step == step]
    found = [(header.generation, path) for header, path in held if generation in (None, header.generation)]
    return max(found)[1] if found else None


def newest_step(ram_dir: str, run: str, node: str, slot: int) -> int:
    """Step of a slot's newest complete snapshot; 0 when there is none."""
    return max((header.step for _, header in _headers(ram_dir, run, node, slot)), default=0)


def drop_newer(ram_dir: str, run: str, node: str, step: int, slot: int | None = None) -> None:
    """Forget the snapshots of steps after `step`, of one slot or of all that lie on the node.

    After a restore to `step` they belong to a history that is no longer the run's, and must not be elected later.
    """
    for path in _files(ram_dir, run, node):
        header = read_header(path)
        if header is not None and header.step > step and slot in (None, header.slot):
            with open(path, "r+b") as f:
                f.write(bytes(HEADER_BYTES))


def drop_slots(ram_dir: str, run: str, node: str, kept: Collection[int], but: tuple[int, int] | None = None) -> None:
    """Delete the snapshots of all slots but `kept` that lie on a node; not those of the (generation, step) `but`."""
    for path in _files(ram_dir, run, node):
        name = _FILE_NAME.fullmatch(path.name)
        assert name is not None, path
        if int(name[1]) in kept:
            continue
        header = read_header(path) if but is not None else None
        if header is None or (header.generation, header.step) != but:
            path.unlink(missing_ok=True)


def delete(ram_dir: str, run: str, node: str) -> None:
    """Delete all snapshots of a run on a node.

    Their names go first, in no time: whatever ends this process afterwards, the kernel takes their memory back.
    """
    folder = node_folder(ram_dir, run, node)
    with contextlib.ExitStack() as nameless:
        for path in _files(ram_dir, run, node):
            with contextlib.suppress(OSError):
                nameless.enter_context(open(path, "rb"))
        shutil.rmtree(folder, ignore_errors=True)
        for parent in folder.parents[:2]:
            with contextlib.suppress(OSError):  # other nodes' snapshots of the run may lie on the same machine
                parent.rmdir()


def _files(ram_dir: str, run: str, node: str) -> list[Path]:
    try:
        entries = sorted(node_folder(ram_dir, run, node).iterdir())
    except OSError:
        return []
    return [path for path in entries if _FILE_NAME.fullmatch(path.name)]


def _headers(ram_dir: str, run: str, node: str, slot: int) -> list[tuple[Path, Header]]:
    pairs = ((path, read_header(path)) for path in file_paths(ram_dir, run, node, slot))
    return [(path, header) for path, header in pairs if header is not None]


def choose_file(headers: Sequence[Header | None], pinned: Collection[int] = ()) -> int:
    """Which of a slot's files the next snapshot overwrites: an empty or torn one, else the oldest, but never the
    newest, and never the (newest generation's) snapshot of a pinned step. Two files more than pins are enough."""
    held = {number: header for number, header in enumerate(headers) if header is not None}
    if len(held) < len(headers):
        return min(set(range(len(headers))) - set(held))
    by_age = sorted(held, key=lambda number: (held[number].step, held[number].generation))
    kept = [by_age[-1]]
    for step in pinned:
        kept += [number for number in by_age if held[number].step == step][-1:]
    choice = next((number for number in by_age if number not in kept), None)
    assert choice is not None, (headers, pinned)
    return choice


class SnapshotFile:
    """One file of the tier, mapped for writing. One process writes a slot at a time: its worker, or else the agent."""

    def __init__(self, path: Path, room: int) -> None:
        """Open or create the file with `room` bytes for payload and index, its memory allocated and mapped.

        Raises:
            OSError: the memory file system is full (ENOSPC); the message says what is needed.
        """
        self.path = path
        self._size = HEADER_BYTES + room
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Allocated here, or a full file system would be a SIGBUS in the middle of a copy.
            os.posix_fallocate(fd, 0, self._size)
            self._map = mmap.mmap(fd, self._size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            found = os.fstat(fd)
            self._identity = (found.st_dev, found.st_ino)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            free = shutil.disk_usage(path.parent).free
            raise OSError(
                errno.ENOSPC,
                f"RAM tier {path.parent}: a snapshot needs {self._size} bytes, of {FILES} a slot (with copies on other "
                f"nodes {FILES_WITH_COPIES}, and {COPY_FILES} of each slot kept for another), and {free} are free; "
                "enlarge the memory file system (containers: --shm-size) or give another ram_dir",
            ) from e
        finally:
            os.close(fd)
        _map_pages(self._map)
        # One aligned 8-byte store, so that no reader sees half of the counter.
        self._sequence = np.frombuffer(self._map, dtype="<u8", count=1, offset=_SEQUENCE_OFFSET)

    @staticmethod
    def existing(path: Path) -> SnapshotFile:
        """The file as it is."""
        return SnapshotFile(path, path.stat().st_size - HEADER_BYTES)

    @property
    def room(self) -> int:
        return self._size - HEADER_BYTES

    @property
    def stands(self) -> bool:
        """Whether its path still leads to it: it may have been deleted, and another made in its place."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == self._identity and found.st_size >= self._size

    def header(self) -> Header | None:
        return parse_header(self._map[:HEADER_BYTES])[1]

    def payload(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """The first bytes behind the header page, shape [n_bytes], as a view of the shared memory."""
        assert n_bytes <= self.room, (n_bytes, self.room)
        return np.frombuffer(self._map, dtype=np.uint8, count=n_bytes, offset=HEADER_BYTES)

    def begin(self) -> None:
        """From here until `finish` the file holds no snapshot."""
        if self._map[: len(MAGIC)] != MAGIC:
            self._sequence[0] = 0
            self._map[: len(MAGIC)] = MAGIC
        self._sequence[0] += 1 + self._sequence[0] % 2

    def finish(self, header: Header, index: bytes) -> None:
        """The payload is in place and has the index's digests: from here on the file holds the snapshot."""
        assert self._sequence[0] % 2 == 1 and header.n_bytes <= self.room, header
        assert header.payload_bytes % ALIGN_BYTES == 0 and len(index) == header.index_bytes, header
        text = json.dumps(asdict(header), separators=(",", ":")).encode()
        assert PREFIX.size + len(text) <= HEADER_BYTES, len(text)
        self._map[HEADER_BYTES + header.payload_bytes : HEADER_BYTES + header.n_bytes] = index
        prefix = PREFIX.pack(MAGIC, 0, len(text), xxhash.xxh3_128_digest(text))
        after = _SEQUENCE_OFFSET + 8
        self._map[after : PREFIX.size] = prefix[after:]
        self._map[PREFIX.size : PREFIX.size + len(text)] = text
        self._sequence[0] += 1


def _map_pages(mapped: mmap.mmap) -> None:
    """Map all pages now, or each would be a fault in the middle of a copy; other threads run meanwhile.

    MAP_POPULATE would keep the interpreter for itself: a second a GiB, in which an agent and its node seem dead.
    """
    memory = np.frombuffer(mapped, dtype=np.uint8)
    if _madvise(memory.ctypes.data, memory.nbytes, _MADV_POPULATE_WRITE):  # an older kernel
        memory[:: mmap.PAGESIZE].max()


@dataclass(frozen=True)
class RamSource:
    """A snapshot in this node's memory, for `storage.blocks.read_chunk`."""

    path: Path
    header: Header
    sequence: int
    map: mmap.mmap

    @property
    def name(self) -> str:
        return self.header.node

    def read(self, index: Index, start: int, into: memoryview) -> int:
        """See storage.blocks.Source. Raises SourceError when the snapshot was overwritten."""
        n_bytes = max(0, min(len(into), self.header.payload_bytes - start))
        begin = HEADER_BYTES + start
        into[:n_bytes] = memoryview(self.map)[begin : begin + n_bytes]
        if parse_header(self.map[:HEADER_BYTES]) != (self.sequence, self.header):
            raise SourceError(f"{self.path}: the snapshot of step {self.header.step} was overwritten")
        return n_bytes


def ram_copy(path: Path) -> Copy:
    """The snapshot in this file, to restore from.

    Raises:
        ManifestError: the file holds no complete snapshot, or its index is damaged.
        SourceError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError) as e:  # what is empty cannot be mapped
        raise SourceError(f"{path}: {e}") from e
    sequence, header = parse_header(mapped[:HEADER_BYTES])
    if header is None:
        raise ManifestError(f"{path} holds no complete snapshot")
    index = checked_index(header, mapped[HEADER_BYTES + header.payload_bytes : HEADER_BYTES + header.n_bytes])
    return Copy(index, RamSource(path, header, sequence, mapped), Distance.MEMORY)


def copies_by_slot(ram_dir: str, run: str, node: str, generation: int, step: int) -> dict[int, Copy]:
    """The complete snapshots on a node that `generation` took of `step`, by slot.

    Raises:
        ManifestError, SourceError: see `ram_copy`.
    """
    found: dict[int, Copy] = {}
    for path in _files(ram_dir, run, node):
        header = read_header(path)
        if header is not None and (header.generation, header.step) == (generation, step):
            found[header.slot] = ram_copy(path)
    return found


def copies_of(ram_dir: str, run: str, node: str, step: int) -> list[Copy]:
    """All complete snapshots of `step` on a node, whichever generation wrote them."""
    copies = []
    for path in _files(ram_dir, run, node):
        header = read_header(path)
        if header is not None and header.step == step:
            with contextlib.suppress(ManifestError, SourceError):  # it is only the nearest of several
                copies.append(ram_copy(path))
    return copies


def checked_index(header: Header, raw: bytes) -> Index:
    """The index of the snapshot with this header.

    Raises:
        ManifestError: it is not what the header says, or not that of this snapshot.
    """
    name = f"snapshot of slot {header.slot}, step {header.step} on {header.node}"
    if xxhash.xxh3_128_hexdigest(raw) != header.index_digest:
        raise ManifestError(f"{name}: its index is damaged or cut off")
    index = Index.from_json(raw)
    said = (index.rank, index.step, index.generation, index.data_bytes)
    if said != (header.origin_slot, header.step, header.generation, header.payload_bytes):
        raise ManifestError(f"{name}: its index is another snapshot's: {said}")
    return index
