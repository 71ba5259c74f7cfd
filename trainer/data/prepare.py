"""Prepare a corpus on this node: split, train the tokenizer, tokenize once, publish under the digest of the content.

``python -P -m trainer.data.prepare`` reads ``{"data": {...}, "vocab_size": 4096, "seed": 0}`` from its standard input,
because command lines are everybody's to see and URLs may hold credentials. It prints one line of JSON: the fields of
`Prepared`. Of several processes on one machine the first does the work, the others wait at a file lock.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import numpy as np
import tokenizers
import xxhash

from storage.redact import redacted
from trainer.contract import DataConfig, build
from trainer.data.corpora import Corpus, CorpusError, list_corpus
from trainer.data.dataset import (
    FORMAT_VERSION,
    MANIFEST,
    DataError,
    DataManifest,
    Dataset,
    FileRecord,
    SplitRecord,
    cache_dir,
    feed_digest,
    open_dataset,
    source_path,
)
from trainer.data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, VOCAB_SIZE_MIN, train_tokenizer

# How long one process waits for another that prepares the same corpus: some 10 GB of text on one core.
LOCK_DEADLINE_S = 3600.0
# 256 MiB of uint16: a file that any file system and memory map takes, and few of them for a corpus of billions.
SHARD_TOKENS = 128 * 1024 * 1024
# Text that is tokenized at once: the library's result takes about 30 times the memory, and more is no faster.
ENCODE_BATCH_CHARACTERS = 1024 * 1024
# Text that the tokenizer is trained on; merges hardly change beyond, and training holds all its words in memory.
TOKENIZER_SAMPLE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` found or made; `seconds` is what it took this time."""

    digest: str
    cache: str
    tokens: int
    validation_tokens: int
    documents: int
    seconds: float


@dataclass(frozen=True)
class Survey:
    """What a first reading of the corpus tells: its identity, and which side each document is on."""

    digest: str
    text_bytes: int
    held_out_below: int
    """A document is held out when its `_position` is below this."""

    def is_held_out(self, text: str) -> bool:
        return _position(text.encode()) < self.held_out_below


def prepare(config: DataConfig, vocab_size: int, seed: int) -> Prepared:
    """Make the prepared data of this configuration, or find it whole.

    Raises:
        CorpusError: the corpus cannot be found or read.
        ValueError: a setting is out of its range.
        DataError: the corpus is too small for one sample.
        TimeoutError: another process has been preparing for LOCK_DEADLINE_S.
    """
    started = time.monotonic()
    _check(config, vocab_size)
    corpus = list_corpus(config.corpus)
    source = source_path(config, vocab_size)
    source.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(source.with_suffix(".lock"), timeout=LOCK_DEADLINE_S):
        survey = _survey(corpus, config)
        folder = cache_dir(config) / _key(survey, vocab_size)
        if not _whole(folder, config, seed):
            partial = source.with_suffix(".partial")
            _build(corpus, survey, vocab_size, partial)
            _publish(partial, folder)
        _write(source.with_suffix(".new"), json.dumps({"key": folder.name, "corpus": redacted(config.corpus)}).encode())
        source.with_suffix(".new").replace(source)
    open_dataset(config, vocab_size, seed)  # raises when there is too little for one sample
    manifest = DataManifest.read(folder)
    return Prepared(
        digest=feed_digest(manifest, config, seed),
        cache=str(folder),
        tokens=manifest.train.tokens,
        validation_tokens=manifest.validation.tokens,
        documents=manifest.train.documents + manifest.validation.documents,
        seconds=round(time.monotonic() - started, 3),
    )


def _check(config: DataConfig, vocab_size: int) -> None:
    if vocab_size < VOCAB_SIZE_MIN:
        raise ValueError(f"model.vocab_size = {vocab_size} must be at least {VOCAB_SIZE_MIN}: 256 bytes and two marks")
    if not 0.0 <= config.validation_fraction < 1.0:
        raise ValueError(f"data.validation_fraction = {config.validation_fraction} must be at least 0 and below 1")
    for name in ("seq_len", "global_batch"):
        if getattr(config, name) < 1:
            raise ValueError(f"data.{name} = {getattr(config, name)} must be at least 1")


def _position(raw: bytes) -> int:
    """A document's place in 0 .. 2^64, uniform and decided by its text alone: copies of a text go together."""
    return xxhash.xxh3_64_intdigest(raw)


def _survey(corpus: Corpus, config: DataConfig) -> Survey:
    digest = hashlib.sha256()
    text_bytes = 0
    lowest, highest = 1 << 64, 0
    for text in corpus.documents():
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
        text_bytes += len(raw)
        lowest, highest = min(lowest, _position(raw)), max(highest, _position(raw))
    if text_bytes == 0:
        raise CorpusError(f"data.corpus = {config.corpus!r} holds no text: its {len(corpus.paths)} files are empty")
    # However few the documents are, one at least is held out and one at least is not.
    held_out_below = min(max(round(config.validation_fraction * (1 << 64)), lowest + 1), highest)
    return Survey(digest.hexdigest(), text_bytes, held_out_below if config.validation_fraction > 0 else 0)


def _key(survey: Survey, vocab_size: int) -> str:
    """Name of the folder: everything that decides its bytes, the tokenizers library included."""
    what = [FORMAT_VERSION, survey.digest, survey.held_out_below, vocab_size, tokenizers.__version__]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _whole(folder: Path, config: DataConfig, seed: int) -> bool:
    if not folder.exists():
        return False
    try:
        Dataset(config, seed, folder, DataManifest.read(folder)).verify()
    except DataError as error:
        print(f"preparing again: {error}", file=sys.stderr)
        return False
    return True


def _build(corpus: Corpus, survey: Survey, vocab_size: int, partial: Path) -> None:
    """Write the folder's files; it is nobody else's yet, and what a killed process left in it is dropped."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    share = min(1.0, TOKENIZER_SAMPLE_BYTES / survey.text_bytes)
    training = (text for text in corpus.documents() if not survey.is_held_out(text))
    # The beginning of each document rather than the first documents, which may all be of one kind.
    tokenizer = train_tokenizer((text[: math.ceil(len(text) * share)] for text in training), vocab_size)
    raw_tokenizer = tokenizer.to_str().encode()
    _write(partial / "tokenizer.json", raw_tokenizer)
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    begin, end = tokenizer.token_to_id(BEGIN_OF_TEXT), tokenizer.token_to_id(END_OF_TEXT)
    assert begin is not None and end is not None
    train, validation = (_SplitWriter(partial, split, dtype) for split in ("train", "validation"))
    for texts in _batches(corpus.documents()):
        for text, encoding in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            split = validation if survey.is_held_out(text) else train
            split.add([begin, *encoding.ids, end])
    manifest = DataManifest(
        format_version=FORMAT_VERSION,
        dtype=dtype,
        tokenizer=_record("tokenizer.json", raw_tokenizer),
        train=train.end(),
        validation=validation.end(),
    )
    _write(partial / MANIFEST, manifest.to_json())


def _publish(partial: Path, folder: Path) -> None:
    """Give the finished folder its name. A damaged one of that name stays readable for who has it open."""
    if folder.exists():
        damaged = partial.with_suffix(".damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        folder.rename(damaged)
        shutil.rmtree(damaged)
    partial.rename(folder)
    _sync_folder(folder.parent)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= ENCODE_BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to one split, file after file."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self._folder, self._split, self._dtype = folder, split, dtype
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._tokens = 0
        self._starts: list[int] = []
        self._shards: list[FileRecord] = []

    def add(self, ids: list[int]) -> None:
        self._starts.append(self._tokens)
        self._pending.append(np.array(ids, dtype=self._dtype))
        self._pending_tokens += len(ids)
        self._tokens += len(ids)
        while self._pending_tokens >= SHARD_TOKENS:
            self._flush(SHARD_TOKENS)

    def end(self) -> SplitRecord:
        if self._pending_tokens:
            self._flush(self._pending_tokens)
        starts = np.array(self._starts, dtype="<u8").tobytes()
        name = f"{self._split}.starts"
        _write(self._folder / name, starts)
        return SplitRecord(
            tokens=self._tokens, documents=len(self._starts), shards=tuple(self._shards), starts=_record(name, starts)
        )

    def _flush(self, tokens: int) -> None:
        pending = np.concatenate(self._pending)
        name = f"{self._split}-{len(self._shards):05d}.tokens"
        raw = pending[:tokens].tobytes()
        _write(self._folder / name, raw)
        self._shards.append(_record(name, raw))
        self._pending = [pending[tokens:]]
        self._pending_tokens -= tokens


def _record(name: str, raw: bytes) -> FileRecord:
    return FileRecord(name=name, bytes=len(raw), xxh3_128=xxhash.xxh3_128_hexdigest(raw))


def _write(path: Path, raw: bytes) -> None:
    with path.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> int:
    document = json.load(sys.stdin)
    try:
        prepared = prepare(build(DataConfig, document["data"]), document["vocab_size"], document["seed"])
    except (ValueError, TimeoutError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(prepared)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
