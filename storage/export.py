"""A checkpoint's parameters as Hugging Face safetensors under any fsspec URL, streamed. No torch.

What is held is a window of one tensor, whatever the model's size. Local files are written beside their place and
linked to it when they are complete; for other stores each file is put together in TMPDIR first, which needs room for
one: a stream that fails half-way through fsspec would leave a truncated object under its final name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from storage.hugging_face import (
    CONFIG_FILE,
    INDEX_FILE,
    MODEL_PREFIX,
    Entry,
    FormatError,
    LlamaShape,
    config_json,
    make_header,
)
from storage.urls import Store, StoreError, locate, make_folder, sync_folder, upload
from storage.windows import Raw, Saved, windows

MAX_SHARD_BYTES = 5_000_000_000
"""Of one file, unless told otherwise: what Hugging Face's hub has long used, and what fits most scratch disks."""

DIGESTS = "sha256"
"""Where the index's metadata keeps each file's digest; other readers pass over it."""

Progress = Callable[[int], None]
"""Called with the bytes that are done since the call before."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    files: int
    tensors: int
    n_bytes: int
    """Of all tensors."""


def check_model(saved: Saved, shape: LlamaShape) -> None:
    """Whether the checkpoint holds exactly the parameters of a model of this shape.

    Raises:
        FormatError: it does not; the message names the tensor.
    """
    held = {fqn.removeprefix(MODEL_PREFIX): t for fqn, t in saved.tensors.items() if fqn.startswith(MODEL_PREFIX)}
    wanted = shape.tensors()
    for name in sorted({*held, *wanted}):
        if name not in wanted:
            raise FormatError(f"{MODEL_PREFIX}{name}: no part of a Llama of {shape.n_layers} layers")
        if name not in held:
            raise FormatError(f"{MODEL_PREFIX}{name}: the checkpoint does not hold it, a Llama of this shape needs it")
        if held[name].shape != wanted[name][1]:
            raise FormatError(
                f"{MODEL_PREFIX}{name}: the checkpoint holds shape {list(held[name].shape)}, the model "
                f"has {list(wanted[name][1])}"
            )


def export(
    saved: Saved,
    shape: LlamaShape,
    target: str,
    *,
    dtype: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    max_positions: int,
    progress: Progress = lambda n_bytes: None,
) -> Exported:
    """Write the parameters of a checkpoint under `target`, the index last. On failure what was written is removed.

    Args:
        dtype: ``bfloat16`` or ``float32``; empty: as the checkpoint holds them.
        max_shard_bytes: of the tensors of one file; a larger tensor has a file to itself.
        max_positions: config.json's max_position_embeddings.

    Raises:
        FormatError: the checkpoint does not hold a model of this shape.
        ManifestError: a block is damaged, cut off or missing.
        StoreError: there is something under `target` already.
    """
    check_model(saved, shape)
    store = locate(target)
    check_empty(store)
    plan = _plan(saved, shape, dtype, max_shard_bytes)
    dtypes = {kind for file in plan for _, _, kind, _ in file}
    digests, weights, written = dict[str, str](), dict[str, str](), list[str]()
    try:
        for number, file in enumerate(plan, start=1):
            name = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
            header, entries = make_header((theirs, kind, sizes) for _, theirs, kind, sizes in file)
            names = [ours for ours, *_ in file]
            with _new_file(store, name, written) as out:
                digests[name] = _write(out, header, saved, list(zip(names, entries, strict=True)), progress)
            weights |= {entry.name: name for entry in entries}
        total = sum(_n_bytes(file) for file in plan)
        index = {"metadata": {"total_size": total, DIGESTS: digests}, "weight_map": weights}
        for name, content in (
            (CONFIG_FILE, config_json(shape, min(dtypes) if len(dtypes) == 1 else "float32", max_positions)),
            (INDEX_FILE, json.dumps(index, indent=2).encode() + b"\n"),
        ):
            with _new_file(store, name, written) as out:
                out.write(content)
    except BaseException:
        for name in written:
            with contextlib.suppress(Exception):
                store.fs.rm_file(store.path(name))
        raise
    return Exported(files=len(plan), tensors=len(weights), n_bytes=total)


def check_empty(store: Store) -> None:
    """Raises StoreError when there is anything under the URL."""
    try:
        held = store.fs.ls(store.root, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        held = []
    names = sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in held if name.rstrip("/") != store.root.rstrip("/"))
    if names or (store.local and os.path.isfile(store.root)):
        first = ", ".join(names[:3])
        raise StoreError(f"{store.url}: is not empty ({first or 'a file'}): nothing is overwritten; name a new folder")


def cast(raw: Raw, dtype: str, wanted: str) -> Raw:
    """Raw elements of a floating type as raw elements of another; rounds to nearest, ties to even, as torch does."""
    if dtype == wanted:
        return raw
    if dtype == "float16":
        raw = raw.view(np.float16).astype(np.float32).view(np.uint32)
    elif dtype == "bfloat16":
        raw = raw.astype(np.uint32) << 16
    if wanted == "float32":
        return raw
    assert wanted == "bfloat16", (dtype, wanted)
    rounded: Raw = ((raw + (((raw >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    # Rounding would carry a NaN of many ones over into zero.
    rounded[(raw & 0x7FFFFFFF) > 0x7F800000] = 0x7FC0
    return rounded


def raw_bytes(raw: Raw) -> memoryview:
    """The bytes of raw elements, in row-major order; shares their memory."""
    return np.ascontiguousarray(raw).reshape(-1).view(np.uint8).data


_Planned = list[tuple[str, str, str, tuple[int, ...]]]
"""Of one file: our name of each tensor, theirs, its dtype and its shape."""


def _plan(saved: Saved, shape: LlamaShape, dtype: str, max_shard_bytes: int) -> list[_Planned]:
    plan: list[_Planned] = [[]]
    for name, (theirs, sizes) in shape.tensors().items():
        held = saved.tensors[MODEL_PREFIX + name].dtype
        if held not in ("float32", "bfloat16", "float16"):
            raise FormatError(f"{MODEL_PREFIX}{name}: is {held}, parameters are floating-point numbers")
        tensor = (MODEL_PREFIX + name, theirs, dtype or held, sizes)
        if plan[-1] and _n_bytes([*plan[-1], tensor]) > max_shard_bytes:
            plan.append([])
        plan[-1].append(tensor)
    return plan


def _n_bytes(file: _Planned) -> int:
    return sum(math.prod(sizes) * (4 if kind == "float32" else 2) for _, _, kind, sizes in file)


def _write(out: BinaryIO, header: bytes, saved: Saved, tensors: list[tuple[str, Entry]], progress: Progress) -> str:
    """Write a whole file; its SHA-256."""
    digest = hashlib.sha256(header)
    out.write(header)
    for fqn, entry in tensors:
        tensor, written = saved.tensors[fqn], 0
        for window in windows(saved, tensor):
            data = raw_bytes(cast(window, tensor.dtype, entry.dtype))
            digest.update(data)
            out.write(data)
            written += len(data)
            progress(len(data))
        assert written == entry.stop - entry.start, (fqn, written, entry)
    return digest.hexdigest()


@contextlib.contextmanager
def _new_file(store: Store, name: str, written: list[str]) -> Iterator[BinaryIO]:
    """A file that gets its name once it is complete; none stays when the block raises. Added to `written` before."""
    folder = store.root if store.local else None
    if folder is not None:
        make_folder(folder)
    with tempfile.TemporaryDirectory(prefix=".shepherd-export-", dir=folder) as scratch:
        path = Path(scratch, name)
        with open(path, "xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        if store.local:
            os.link(path, store.path(name))
            written.append(name)
            sync_folder(store.root)
        else:
            written.append(name)
            upload(store, str(path), name)
