"""The prepared corpus as samples: a pure function of the seed and the global index, whatever the number of ranks.

A prepared corpus is a folder that is never changed once it has its name (`trainer.data.prepare` makes it)::

    <cache_dir>/<key>/manifest.json              sizes and digests of the rest, and a digest of itself
    <cache_dir>/<key>/tokenizer.json
    <cache_dir>/<key>/train-00000.tokens         uint16 or uint32, little-endian; documents one after the other,
    <cache_dir>/<key>/validation-00000.tokens    each between <|begin_of_text|> and <|end_of_text|>
    <cache_dir>/<key>/train.starts               uint64: where each document begins in the stream
    <cache_dir>/<key>/validation.starts
    <cache_dir>/sources/<digest>.json            which key the corpus of this URL and vocabulary has on this node
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from trainer.contract import DataConfig, build
from trainer.data.corpora import source_name
from trainer.data.permutation import permute

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class DataError(ValueError):
    """The prepared data is damaged, or there is too little of it; the message names the remedy."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    name: str
    bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class SplitRecord:
    tokens: int
    documents: int
    shards: tuple[FileRecord, ...]
    """The token stream cut into files; all but the last have the same size."""
    starts: FileRecord


@dataclass(frozen=True, kw_only=True)
class DataManifest:
    """What a prepared corpus consists of."""

    format_version: int
    dtype: str
    tokenizer: FileRecord
    train: SplitRecord
    validation: SplitRecord

    def digest(self) -> str:
        """SHA-256 over every field, and so, through the files' digests, over every token."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def files(self) -> list[FileRecord]:
        splits = [file for split in (self.train, self.validation) for file in (*split.shards, split.starts)]
        return [self.tokenizer, *splits]

    def to_json(self) -> bytes:
        return json.dumps({**asdict(self), "digest": self.digest()}, indent=1).encode() + b"\n"

    @staticmethod
    def read(folder: Path) -> DataManifest:
        """Raises DataError when the manifest is damaged, or a file has not the size that it states."""
        try:
            document = json.loads((folder / MANIFEST).read_bytes())
            digest = document.pop("digest")
            manifest = build(DataManifest, document)
            wrong = [f.name for f in manifest.files() if (folder / f.name).stat().st_size != f.bytes]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"prepared data in {folder} is damaged: {error!r}; run {_command()}") from error
        if digest != manifest.digest() or wrong:
            raise DataError(f"prepared data in {folder} is damaged: {wrong or MANIFEST}; run {_command()}")
        return manifest


class TokenStream:
    """One split's tokens, memory-mapped and cut into windows of `seq_len` inputs and as many targets."""

    def __init__(self, folder: Path, record: SplitRecord, dtype: str, seq_len: int) -> None:
        self._shards = [np.memmap(folder / shard.name, dtype=dtype, mode="r") for shard in record.shards]
        self._shard_tokens = len(self._shards[0]) if self._shards else 1
        self._seq_len = seq_len
        # A window's targets end with the first token of the next.
        self.windows = max(0, (record.tokens - 1) // seq_len)

    def window(self, index: int) -> np.ndarray:
        """Tokens [seq_len + 1] of window `index`; the last of them is the first of the next window."""
        assert 0 <= index < self.windows, (index, self.windows)
        begin = index * self._seq_len
        end = begin + self._seq_len + 1
        parts = []
        while begin < end:
            shard, offset = divmod(begin, self._shard_tokens)
            part = self._shards[shard][offset : offset + end - begin]
            parts.append(part)
            begin += len(part)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


class Dataset:
    """Batches by number. `digest` identifies everything that they will hold, so that nodes can compare it."""

    def __init__(self, config: DataConfig, seed: int, folder: Path, manifest: DataManifest) -> None:
        self._config = config
        self._seed = seed
        self._folder = folder
        self._manifest = manifest
        self.digest = feed_digest(manifest, config, seed)
        self.train = TokenStream(folder, manifest.train, manifest.dtype, config.seq_len)
        self.validation = TokenStream(folder, manifest.validation, manifest.dtype, config.seq_len)

    def batch(self, step: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples `rows` of the global batch of `step` (the first is 1).

        The samples of the whole run are numbered; each epoch visits every window once, in an order of its own.

        Returns:
            inputs and targets, int64 [len(rows), seq_len]; the targets are the inputs shifted by one.
        """
        assert step >= 1 and rows.start >= 0 and rows.stop <= self._config.global_batch, (step, rows)
        first = (step - 1) * self._config.global_batch
        return self._rows(self.train, [self._train_window(first + row) for row in rows])

    def validation_batch(self, index: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples `rows` of validation batch `index` (the first is 0), in order; past the end it begins again.

        Returns:
            inputs and targets as `batch`.
        """
        assert index >= 0 and rows.start >= 0 and rows.stop <= self._config.global_batch, (index, rows)
        first = index * self._config.global_batch
        return self._rows(self.validation, [(first + row) % self.validation.windows for row in rows])

    def verify(self) -> None:
        """Read every file and compare its digest. Opening compares only sizes and the manifest's own digest.

        Raises:
            DataError: a file is not what was prepared.
        """
        for record in self._manifest.files():
            if digest_of_file(self._folder / record.name) != record.xxh3_128:
                raise DataError(f"prepared data in {self._folder} is damaged: {record.name}; run {_command()}")

    def _train_window(self, sample: int) -> int:
        epoch, index = divmod(sample, self.train.windows)
        return permute(index, self.train.windows, f"{self._seed}/{epoch}")

    def _rows(self, stream: TokenStream, windows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch  # here, because preparing and checking data needs no torch, and importing it takes seconds

        tokens = np.empty((len(windows), self._config.seq_len + 1), dtype=np.int64)
        for row, window in enumerate(windows):
            tokens[row] = stream.window(window)
        both = torch.from_numpy(tokens)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def open_dataset(config: DataConfig, vocab_size: int, seed: int) -> Dataset:
    """The prepared data of this configuration: maps files, reads none but the manifest, so it takes milliseconds.

    Raises:
        FileNotFoundError: it has not been prepared on this node.
        DataError: it is damaged, or too small for one sample of `data.seq_len`.
    """
    cache = cache_dir(config)
    try:
        key = json.loads(source_path(config, vocab_size).read_bytes())["key"]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data.corpus = {config.corpus!r} is not prepared in {cache} for vocab_size {vocab_size}; run {_command()}"
        ) from error
    manifest = DataManifest.read(cache / key)
    dataset = Dataset(config, seed, cache / key, manifest)
    validates = config.validation_batches > 0 and config.validation_fraction > 0
    for name, stream in (("train", dataset.train), ("validation", dataset.validation)):
        if stream.windows == 0 and (name == "train" or validates):
            raise DataError(
                f"data.corpus = {config.corpus!r}: its {name} split has no {config.seq_len + 1} tokens for one sample "
                "of data.seq_len; give a larger corpus or lower data.seq_len (or, for validation, raise "
                "data.validation_fraction, or set it to 0)"
            )
    return dataset


def cache_dir(config: DataConfig) -> Path:
    return Path(config.cache_dir).expanduser()


def source_path(config: DataConfig, vocab_size: int) -> Path:
    """The record of which key the corpus of this URL has; everything that decides the tokens is in its name."""
    what = [FORMAT_VERSION, source_name(config.corpus), config.validation_fraction, vocab_size]
    return cache_dir(config) / "sources" / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.json"


def feed_digest(manifest: DataManifest, config: DataConfig, seed: int) -> str:
    """Identifies every batch of a run: the tokens, and what decides which of them stand in which batch."""
    what = [manifest.digest(), config.seq_len, config.global_batch, seed]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """xxh3_128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _command() -> str:
    return "python -m trainer.data.prepare"
