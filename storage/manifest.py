"""What a checkpoint is: rank parts with digests, and the commit record that makes them one checkpoint.

Pure: standard library only. Layout under ``run.url``::

    checkpoints/data/step-00000120-e1-g3/rank-00000.bin        raw tensor bytes, each chunk 4 KiB aligned
    checkpoints/data/step-00000120-e1-g3/rank-00000.json       index of that file: chunks, block digests
    checkpoints/commits/step-00000120.json                     the commit record, created last and exclusively
    checkpoints/trust/step-00000120-g3-verified.json           a statement on it: see statements.py

A checkpoint exists only when its commit record does. Nothing is ever overwritten: the folder's name carries epoch and
generation, so a writer that was cut off and comes back cannot touch what a newer generation writes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

FORMAT_VERSION = 2
"""1, of Shepherd 0.2 and before, kept digests of whole files; since 2 each chunk has its own, wherever it lies."""

DATA_DIR = "checkpoints/data"
COMMIT_DIR = "checkpoints/commits"
TRUST_DIR = "checkpoints/trust"
IMPORT_EPOCH = 0
"""Of checkpoints that no controller's ranks have written, but an import. Controllers count from 1."""
WRITE_DEADLINE_S = 600.0
"""For one rank's part on the store; then the save has failed. A part of 15 GB (70B with AdamW on 64 ranks) takes 150 s
at the 100 MB/s of a slow object store; a store that takes four times as long hangs."""
_GENERATION_DIR = re.compile(rf"{DATA_DIR}/step-\d+-e(\d+)-g\d+")


def generation_dir(step: int, epoch: int, generation: int) -> str:
    """Folder of one attempt to write the checkpoint of `step`, relative to ``run.url``."""
    return f"{DATA_DIR}/step-{step:08d}-e{epoch}-g{generation}"


def data_name(step: int, epoch: int, generation: int, rank: int) -> str:
    """Path of one rank's data file, relative to ``run.url``."""
    return f"{generation_dir(step, epoch, generation)}/rank-{rank:05d}.bin"


def index_name(step: int, epoch: int, generation: int, rank: int) -> str:
    """Path of the index of one rank's data file, relative to ``run.url``."""
    return f"{generation_dir(step, epoch, generation)}/rank-{rank:05d}.json"


def commit_name(step: int) -> str:
    """Path of the commit record of `step`, relative to ``run.url``."""
    return f"{COMMIT_DIR}/step-{step:08d}.json"


@dataclass(frozen=True, kw_only=True)
class RankPart:
    """One rank's share of a checkpoint, as the commit record names it."""

    rank: int
    data: str
    """Path of the data file, relative to ``run.url``."""
    index: str
    """Path of its index, relative to ``run.url``."""
    data_bytes: int
    index_digest: str
    """xxh3_128 of the index file; the index in turn holds the digests of each chunk's blocks."""


def writers_epoch(parts: Iterable[RankPart]) -> int:
    """The epoch in which these parts' writers were assigned, from the folder that they all lie in.

    Raises:
        ManifestError: they lie in different folders, or in none of ours.
    """
    folders = {part.data.rpartition("/")[0] for part in parts}
    match = _GENERATION_DIR.fullmatch(min(folders, default=""))
    if len(folders) != 1 or match is None:
        raise ManifestError(f"parts of one checkpoint lie in {sorted(folders)}, not in one folder of {DATA_DIR}")
    return int(match.group(1))


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The record whose existence makes a checkpoint. `step` counts the completed steps that its state contains."""

    run: str
    step: int
    epoch: int
    """Of the writers' assignment, which names their folder; a later controller may be the one that commits."""
    generation: int
    mesh: dict[str, int]
    """Degrees of (pp, dp_replicate, dp_shard, tp) at the time of writing; a restore may use any other. Empty for an
    import."""
    parts: tuple[RankPart, ...]
    versions: dict[str, str]
    """Library versions and the numeric class of the writers."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """The record's bytes, with a SHA-256 over everything else under ``"digest"``."""
        return sealed(asdict(self))

    @staticmethod
    def from_json(raw: bytes) -> Commit:
        """The record of these bytes.

        Raises:
            ManifestError: not a record, damaged, or of a format that this version cannot read.
        """
        document = unsealed(raw, "commit record", FORMAT_VERSION)
        parts = tuple(RankPart(**part) for part in document.pop("parts"))
        return Commit(parts=parts, **document)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What speaks for the state in a checkpoint having been computed rightly, from the audits that came after it.

    A statement, not a judgement: whoever rewinds holds the rate against that of the fault that was proven.
    """

    step: int
    generation: int
    """The generation that wrote the checkpoint."""
    checks: tuple[str, ...]
    """Names of the checks that were active from the checkpoint on until it was issued."""
    audits_passed: int
    """Since the checkpoint, by each rank that contributed to it; of the rank with the fewest."""
    fault_rate_per_billion: int
    """Wrong ones in 10^9 computations of a rank: a rank as bad as this, or worse, would have failed an audit..."""
    confidence_per_million: int
    """...with this probability, in millionths."""
    epoch: int
    """Of the controller that issued it."""


class StateMismatch(ValueError):
    """A checkpoint is sound, but holds other tensors than the run has: it is the run's configuration that is wrong."""


class ManifestError(ValueError):
    """A commit record, an index or a block is not what it must be."""


def sealed(document: dict[str, Any]) -> bytes:
    """A record's bytes: the document, with a SHA-256 over everything else under ``"digest"``."""
    return json.dumps({**document, "digest": _digest(document)}, indent=1, sort_keys=True).encode() + b"\n"


def unsealed(raw: bytes, what: str, format_version: int) -> dict[str, Any]:
    """The document of a record's bytes.

    Raises:
        ManifestError: not a `what`, damaged, or of a format that this version cannot read.
    """
    try:
        document: dict[str, Any] = json.loads(raw)
        version = document["format_version"]
        digest = document.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ManifestError(f"not a {what}: {e!r}") from e
    if version != format_version:
        raise ManifestError(f"{what} {wrong_version(version, format_version)}")
    if digest != _digest(document):
        raise ManifestError(f"{what} is damaged: its SHA-256 does not match its content")
    return document


def wrong_version(version: object, format_version: int) -> str:
    """What is wrong with a document of another format than this one, and what to do."""
    fix = "use the Shepherd version that wrote it, or a newer one"
    if (version, format_version) == (1, FORMAT_VERSION):
        fix = "use Shepherd 0.2, which wrote it"
    return f"has format_version {version}, this Shepherd reads {format_version}: {fix}"


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
