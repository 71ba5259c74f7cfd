"""Statements on checkpoints: what a run's controller thinks of each, for whoever has only the URL. No torch.

Records ``checkpoints/trust/step-00000120-g3-verified.json``, created exclusively and never changed; one that is said
again after another was said in between has ``-2`` behind it, and so on. The newest counts. They say nothing that a
restore relies on: the controller decides from its journal.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from storage.manifest import TRUST_DIR, Certificate, ManifestError, sealed, unsealed
from storage.urls import StoreError, list_names, read_bytes, remove, write_exclusive

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

Trust = Literal["verified", "certified", "revoked", "damaged"]

SAID_AT_MOST = 100
"""How often one thing is said of one checkpoint; a checkpoint on which two nodes disagree so often is a case for
people."""

_FILE = re.compile(rf"step-(\d{{8,}})-g\d+-(?:{'|'.join(get_args(Trust))})(?:-\d+)?\.json")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a controller says of the checkpoint of `step` by `generation`."""

    step: int
    generation: int
    """That wrote the checkpoint; 0 when the controller does not know."""
    epoch: int
    """Of the controller that says so."""
    trust: Trust
    at_unix_s: int
    by: str
    """Who has read it, or proven something of it: a node, or several."""
    detail: str
    certificate: Certificate | None = None

    @property
    def name(self) -> str:
        """Path of its record, relative to ``run.url``, when it is said for the first time."""
        return f"{TRUST_DIR}/step-{self.step:08d}-g{self.generation}-{self.trust}.json"

    def to_json(self) -> bytes:
        """The record's bytes, with a SHA-256 over everything else under ``"digest"``."""
        return sealed({**asdict(self), "format_version": FORMAT_VERSION})

    @staticmethod
    def from_json(raw: bytes) -> Statement:
        """The statement of these bytes.

        Raises:
            ManifestError: not a statement, damaged, or of a format that this version cannot read.
        """
        document = unsealed(raw, "statement", FORMAT_VERSION)
        del document["format_version"]
        certificate = document.pop("certificate", None)
        try:
            if certificate is not None:
                certificate = Certificate(**{**certificate, "checks": tuple(certificate["checks"])})
            statement = Statement(certificate=certificate, **document)
        except (TypeError, KeyError) as e:
            raise ManifestError(f"not a statement: {e!r}") from e
        numbers = (statement.step, statement.generation, statement.epoch, statement.at_unix_s)
        if statement.trust not in get_args(Trust) or not all(isinstance(number, int) for number in numbers):
            raise ManifestError(f"not a statement: {statement}")
        return statement


def write(url: str, statement: Statement) -> None:
    """Say it, unless it is the last that was said of this checkpoint. Idempotent.

    Raises:
        StoreError: the store failed, or it was said SAID_AT_MOST times.
    """
    said = [s for s in _read(url, only=statement.step).get(statement.step, ()) if s.generation == statement.generation]
    if said and (said[-1].trust, said[-1].certificate) == (statement.trust, statement.certificate):
        return
    for number in range(1, SAID_AT_MOST + 1):
        name = statement.name if number == 1 else f"{statement.name.removesuffix('.json')}-{number}.json"
        if write_exclusive(url, name, statement.to_json()):
            return
    raise StoreError(f"{statement.name} under {url} was written {SAID_AT_MOST} times with other content")


def read(url: str) -> dict[int, tuple[Statement, ...]]:
    """Step to what was said of its checkpoints, the newest last. Records that cannot be read are left out."""
    return _read(url, only=None)


def forget(url: str, step: int) -> None:
    """Remove what was said of the checkpoints of `step`."""
    for name in _names(url, step):
        remove(url, name)


def _read(url: str, only: int | None) -> dict[int, tuple[Statement, ...]]:
    found: dict[int, list[Statement]] = {}
    for name in _names(url, only):
        try:
            statement = Statement.from_json(read_bytes(url, name))
            if not name.startswith(statement.name.removesuffix(".json")):
                raise ManifestError(f"it says what belongs into {statement.name}: the file was moved")
        except FileNotFoundError:
            continue  # its checkpoint is being deleted
        except ManifestError as e:
            logger.warning("%s under %s is passed over: %s", name, url, e)
            continue
        found.setdefault(statement.step, []).append(statement)
    # Of one second, by epoch; what one controller says of one checkpoint in one second is settled by the order of
    # distrust: who looks at it must not be told that it is whole when it may not be.
    order = get_args(Trust)
    return {
        step: tuple(sorted(said, key=lambda s: (s.at_unix_s, s.epoch, order.index(s.trust))))
        for step, said in sorted(found.items())
    }


def _names(url: str, only: int | None) -> list[str]:
    matches = (_FILE.fullmatch(name) for name in list_names(url, TRUST_DIR))
    return [f"{TRUST_DIR}/{m.group()}" for m in matches if m and only in (None, int(m.group(1)))]
