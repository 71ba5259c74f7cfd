"""Hugging Face safetensors from any fsspec URL as a checkpoint that a job can start from, streamed. No torch.

Each file is read once, front to back, and hashed on the way where its index tells a digest. Parameters become float32,
which the trainer's state is; the optimizer's moments are zero. The checkpoint is of epoch 0, which no controller has:
no rank has written it, so nobody's random state is in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from storage.blocks import block_digests
from storage.commits import CommitConflict, create_commit, list_commits
from storage.export import DIGESTS, Progress, cast, raw_bytes
from storage.hugging_face import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_HEADER_BYTES,
    MODEL_PREFIX,
    SINGLE_FILE,
    Entry,
    FormatError,
    LlamaShape,
    read_config,
    read_header,
)
from storage.index import ALIGN_BYTES, BLOCK_BYTES, ITEM_BYTES, Chunk, Index
from storage.manifest import (
    DATA_DIR,
    IMPORT_EPOCH,
    Commit,
    RankPart,
    commit_name,
    data_name,
    generation_dir,
    index_name,
)
from storage.redact import redacted
from storage.urls import Store, StoreError, list_folders, locate, make_folder, remove, sync_folder, upload
from storage.windows import WINDOW_BYTES

PART_BYTES = 4 * 1024**3
"""Of one data file: it is put together in TMPDIR when the target is no local path, and restores read files at once."""
MOMENTS = ("exp_avg/", "exp_avg_sq/")
GENERATION = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """A Hugging Face model whose headers have been read and checked."""

    store: Store
    shape: LlamaShape
    tied: bool
    """Whether the output head is the embedding."""
    files: tuple[tuple[str, tuple[Entry, ...]], ...]
    """Name of each file, and its tensors in the order of their bytes."""
    digests: dict[str, str]
    """SHA-256 of files, where the index tells it."""

    @property
    def n_bytes(self) -> int:
        return sum(entry.stop - entry.start for _, entries in self.files for entry in entries)


def open_source(url: str) -> Source:
    """Look at the model under `url`: its config.json, its index and the headers of its files.

    Raises:
        FormatError: something is missing or superfluous (named), or has another shape or type than it must.
    """
    store = locate(url)
    shape, tied = read_config(_record(store, CONFIG_FILE))
    weights, digests = _index(store)
    files = tuple((name, tuple(_header(store, name))) for name in sorted(set(weights.values()) or {SINGLE_FILE}))
    _check_names(files, weights, shape, tied)
    return Source(store=store, shape=shape, tied=tied, files=files, digests=digests)


def import_model(source: Source, url: str, step: int, run: str, progress: Progress = lambda n_bytes: None) -> Commit:
    """Commit the model as the checkpoint of `step` under `url`. On failure what was written is removed.

    Raises:
        FormatError: a file is not what its digest in the index says, or is cut off.
        StoreError: there are checkpoints under `url` already.
        CommitConflict: another writer was faster; what both have written stays.
    """
    check_unused(url)
    try:
        parts = tuple(_write_parts(url, step, _parameters(source, progress)))
        commit = Commit(
            run=run,
            step=step,
            epoch=IMPORT_EPOCH,
            generation=GENERATION,
            mesh={},
            parts=parts,
            versions={"imported": redacted(source.store.url)},
        )
        create_commit(url, commit)
    except CommitConflict:
        raise  # the record is somebody else's, and may name these files
    except BaseException:
        with contextlib.suppress(Exception):
            remove(url, commit_name(step))  # first, so that no reader finds half of it; there was none before
            remove(url, generation_dir(step, IMPORT_EPOCH, GENERATION))
        raise
    return commit


def check_unused(url: str) -> None:
    """Raises StoreError when there are checkpoints under `url`, or what an import that was killed has left."""
    if list_commits(url) or list_folders(url, DATA_DIR):
        raise StoreError(f"{url}: there are checkpoints already; import into a run directory of its own")


# --- reading ---------------------------------------------------------------------------------------------------------


def _record(store: Store, name: str) -> bytes:
    try:
        return bytes(store.fs.cat_file(store.path(name)))
    except FileNotFoundError as e:
        raise FormatError(f"{store.url}: there is no {name}; name the folder of a Hugging Face model") from e


def _index(store: Store) -> tuple[dict[str, str], dict[str, str]]:
    """File by tensor, and SHA-256 by file; both empty for a model in a single file."""
    if not store.fs.exists(store.path(INDEX_FILE)):
        if not store.fs.exists(store.path(SINGLE_FILE)):
            raise FormatError(f"{store.url}: there is neither {INDEX_FILE} nor {SINGLE_FILE}")
        return {}, {}
    try:
        document = json.loads(_record(store, INDEX_FILE))
        weights = {str(k): str(v) for k, v in document["weight_map"].items()}
        told = (document.get("metadata") or {}).get(DIGESTS) or {}
        digests = {str(k): str(v) for k, v in told.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise FormatError(f"{store.url}: {INDEX_FILE} is not an index: {e!r}") from e
    bad = sorted(name for name in set(weights.values()) if "/" in name or "\\" in name or name.startswith("."))
    if bad or not weights:
        raise FormatError(f"{store.url}: {INDEX_FILE} names {bad[0]!r}" if bad else f"{INDEX_FILE} names no tensors")
    return weights, digests


def _header(store: Store, name: str) -> list[Entry]:
    path = store.path(name)
    try:
        size = int(store.fs.size(path))
        begin = bytes(store.fs.cat_file(path, start=0, end=min(8, size)))
    except FileNotFoundError as e:
        raise FormatError(f"{name}: is not there, though the index names it") from e
    length = int.from_bytes(begin, "little")
    if len(begin) < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
        raise FormatError(f"{name}: is not a safetensors file, or is cut off")
    return read_header(name, bytes(store.fs.cat_file(path, start=0, end=8 + length)), size)


def _check_names(
    files: Iterable[tuple[str, tuple[Entry, ...]]], weights: dict[str, str], shape: LlamaShape, tied: bool
) -> None:
    wanted = dict(shape.tensors().values())
    if tied:
        del wanted["lm_head.weight"]
    held: dict[str, Entry] = {}
    for file, entries in files:
        for entry in entries:
            if entry.name in held:
                raise FormatError(f"{entry.name}: is in two files")
            if weights and weights.get(entry.name) != file:
                raise FormatError(f"{entry.name}: is in {file}, the index says {weights.get(entry.name, 'nothing')}")
            held[entry.name] = entry
    for what, names in (
        ("is not part of the", {*held, *weights} - {*wanted}),
        ("is missing of the", {*wanted} - {*held}),
    ):
        if names:
            shown = sorted(names)
            more = f" (and {len(shown) - 1} more)" if len(shown) > 1 else ""
            head = ", whose output head is its embedding" if tied else ""
            raise FormatError(f"{shown[0]}: {what} model that {CONFIG_FILE} describes{head}{more}")
    for name, entry in held.items():
        if entry.shape != wanted[name]:
            raise FormatError(f"{name}: has shape {list(entry.shape)}, {CONFIG_FILE} makes it {list(wanted[name])}")


_Tensor = tuple[str, tuple[int, ...], Iterator[bytes | memoryview]]
"""A name, the shape, and float32 bytes in row-major order, to be taken before the next tensor is asked for."""


def _parameters(source: Source, progress: Progress) -> Iterator[_Tensor]:
    ours = {theirs: (name, sizes) for name, (theirs, sizes) in source.shape.tensors().items()}
    for file, entries in source.files:
        digest = hashlib.sha256() if file in source.digests else None
        if digest is not None:
            digest.update(source.store.fs.cat_file(source.store.path(file), start=0, end=entries[0].start))
        for entry in entries:
            name, sizes = ours[entry.name]

            def told(raw: bytes, digest: hashlib._Hash | None = digest) -> None:
                if digest is not None:
                    digest.update(raw)
                progress(len(raw))

            yield name, sizes, _float32(source.store, file, entry, told)
            if source.tied and name == "tok_embeddings.weight":
                yield "output.weight", sizes, _float32(source.store, file, entry, lambda raw: None)
        if digest is not None and digest.hexdigest() != source.digests[file]:
            raise FormatError(f"{file}: is damaged, its SHA-256 is not the one in {INDEX_FILE}")


def _float32(store: Store, file: str, entry: Entry, told: Callable[[bytes], None]) -> Iterator[memoryview]:
    for start in range(entry.start, entry.stop, WINDOW_BYTES):
        stop = min(start + WINDOW_BYTES, entry.stop)
        raw = bytes(store.fs.cat_file(store.path(file), start=start, end=stop))
        if len(raw) != stop - start:
            raise FormatError(f"{file}: is cut off in {entry.name}")
        told(raw)
        elements = np.frombuffer(raw, np.uint32 if entry.dtype == "float32" else np.uint16)
        yield raw_bytes(cast(elements, entry.dtype, "float32"))


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_parts(url: str, step: int, parameters: Iterator[_Tensor]) -> Iterator[RankPart]:
    """Write parameters and zero moments as data files of some PART_BYTES, one after another."""
    store = locate(url)
    tensors = _with_moments(parameters)
    tensor, rank = next(tensors, None), 0
    while tensor is not None:
        with _part_file(store, step, rank) as part:
            while tensor is not None and part.n_bytes < PART_BYTES:
                part.add(*tensor)
                tensor = next(tensors, None)
        assert part.sealed is not None
        yield part.sealed
        rank += 1


def _with_moments(parameters: Iterator[_Tensor]) -> Iterator[_Tensor]:
    for name, sizes, content in parameters:
        yield MODEL_PREFIX + name, sizes, content
        for moment in MOMENTS:
            yield moment + name, sizes, _zeros(math.prod(sizes) * ITEM_BYTES["float32"])


def _zeros(n_bytes: int) -> Iterator[memoryview]:
    zeros = memoryview(bytes(min(n_bytes, WINDOW_BYTES)))
    for start in range(0, n_bytes, WINDOW_BYTES):
        yield zeros[: n_bytes - start]


class _Part:
    """A data file that grows chunk by chunk: whole tensors of float32."""

    def __init__(self, out: BinaryIO, step: int, rank: int) -> None:
        self.sealed: RankPart | None = None
        self.n_bytes = 0
        self._out = out
        self._identity = {"step": step, "epoch": IMPORT_EPOCH, "generation": GENERATION, "rank": rank}
        self._chunks: list[Chunk] = []

    def add(self, fqn: str, shape: tuple[int, ...], content: Iterable[bytes | memoryview]) -> None:
        """Write a tensor, in pieces of whole blocks but for the last."""
        begin, blocks = self.n_bytes, list[str]()
        for piece in content:
            assert not (self.n_bytes - begin) % BLOCK_BYTES, fqn
            blocks += block_digests(memoryview(piece))
            self._write(piece)
        n_bytes = self.n_bytes - begin
        assert n_bytes == math.prod(shape) * ITEM_BYTES["float32"], (fqn, shape, n_bytes)
        self._chunks.append(
            Chunk(
                fqn=fqn,
                shape=shape,
                dtype="float32",
                offsets=(0,) * len(shape),
                sizes=shape,
                file_offset=begin,
                n_bytes=n_bytes,
                blocks=tuple(blocks),
            )
        )
        self._write(bytes(-n_bytes % ALIGN_BYTES))

    def index(self) -> bytes:
        """The index of what was written; ends the file."""
        raw = Index(
            data=data_name(**self._identity),
            data_bytes=self.n_bytes,
            chunks=tuple(self._chunks),
            **self._identity,
        ).to_json()
        self.sealed = RankPart(
            rank=self._identity["rank"],
            data=data_name(**self._identity),
            index=index_name(**self._identity),
            data_bytes=self.n_bytes,
            index_digest=xxhash.xxh3_128_hexdigest(raw),
        )
        return raw

    def _write(self, piece: bytes | memoryview) -> None:
        self._out.write(piece)
        self.n_bytes += len(piece)


@contextlib.contextmanager
def _part_file(store: Store, step: int, rank: int) -> Iterator[_Part]:
    """A rank's data file and its index, durable when the block ends."""
    data = data_name(step, IMPORT_EPOCH, GENERATION, rank)
    index = index_name(step, IMPORT_EPOCH, GENERATION, rank)
    with tempfile.TemporaryDirectory(prefix="shepherd-import-") as scratch:
        path = Path(store.path(data)) if store.local else Path(scratch, "part.bin")
        if store.local:
            make_folder(str(path.parent))
        with open(path, "xb") as out:
            part = _Part(out, step, rank)
            yield part
            out.flush()
            os.fsync(out.fileno())
        with open(path.with_suffix(".json"), "xb") as out:
            out.write(part.index())
            out.flush()
            os.fsync(out.fileno())
        if store.local:
            sync_folder(str(path.parent))
        else:
            upload(store, str(path), data)
            upload(store, str(path.with_suffix(".json")), index)
