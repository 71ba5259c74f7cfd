"""What makes a run the same run: the fields that decide its numbers, on record under run.url from its first start.

``run.json`` is created exclusively by the run's first controller and never changes. A resume is compared with it before
anything is taken. The corpus is known by its content, not by its name: the data digest in the commit records stands
for it. Where a model was imported, ``import.json`` is on record instead until then, with the model alone.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from orchestrator.spec import JobSpec
from storage.commits import read_commit
from storage.manifest import ManifestError
from storage.redact import redacted
from storage.urls import list_names, read_bytes, write_exclusive

RECORD = "run.json"
UPDATES = "updates"
IMPORT_RECORD = "import.json"
FORMAT_VERSION = 1

FIXED: dict[str, tuple[str, ...]] = {
    "run": ("name", "seed", "dtype"),
    "model": (
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "ffn_dim",
        "vocab_size",
        "rope_theta",
        "norm_eps",
    ),
    "data": ("seq_len", "global_batch", "validation_fraction"),
    "optimizer": ("lr", "beta1", "beta2", "eps", "weight_decay", "warmup_steps", "final_lr_ratio", "clip_norm"),
}
"""Fields of the job that a resume may not change: another value is another run. `run.steps` is not among them: a run
may be made longer, and its learning rate then ends its cosine at the new last step."""


class RecordError(RuntimeError):
    """run.json is not what it must be."""


def declare(spec: JobSpec) -> None:
    """Put the run on record under run.url, unless it is.

    Raises:
        storage.urls.StoreError: the store failed.
    """
    write_exclusive(spec.run.url, RECORD, _record(_without_secrets(spec.document())))


def declare_update(url: str, number: int, made: dict[str, str]) -> None:
    """Put on record what an active run's job has otherwise now, so that a resume is compared with that.

    Args:
        number: of the update; its changes are all since the run was started or resumed.
        made: ``section.field`` to the value as JSON.

    Raises:
        storage.urls.StoreError: the store failed.
    """
    changed: dict[str, dict[str, Any]] = {}
    for name, value in made.items():
        section, field = name.split(".", 1)
        changed.setdefault(section, {})[field] = json.loads(value)
    write_exclusive(url, f"{UPDATES}/{number:08d}.json", _record(changed))


def declare_import(url: str, model: dict[str, Any]) -> bool:
    """Put the fields of an imported model on record under `url`. False when another one's are.

    Raises:
        storage.urls.StoreError: the store failed.
    """
    return write_exclusive(url, IMPORT_RECORD, _record({"model": model}))


def recorded(url: str) -> dict[str, Any]:
    """The document of the run's first start with its updates, or an imported model alone; empty when nothing is on
    record.

    Raises:
        RecordError: the record is damaged or of another format.
    """
    for name in (RECORD, IMPORT_RECORD):
        try:
            document = _read(name, read_bytes(url, name))
        except FileNotFoundError:
            continue
        return _with_updates(url, document)
    return {}


def _with_updates(url: str, document: dict[str, Any]) -> dict[str, Any]:
    for name in sorted(list_names(url, UPDATES)):
        for section, fields in _read(name, read_bytes(url, f"{UPDATES}/{name}")).items():
            document[section] = document.get(section, {}) | fields
    return document


def changes(spec: JobSpec) -> list[str]:
    """A line for each fixed field in which `spec` differs from the run on record; none when nothing is on record.

    Raises:
        RecordError: the record is damaged or of another format.
    """
    before, now = recorded(spec.run.url), spec.document()
    return [
        f"{section}.{field} = {now[section][field]!r}: the run was started with {before[section][field]!r}; set "
        "that, or start a run of its own under another run.url"
        for section, fields in FIXED.items()
        for field in fields
        # A field that the record does not have is younger than the run, or an import has left it to the job.
        if field in before.get(section, {}) and before[section][field] != now[section][field]
    ]


def data_digest(url: str, steps: list[int]) -> str:
    """The digest of the data that the run has trained on: the newest of its committed `steps` that can be read has it.

    Empty when there is none.
    """
    for step in reversed(steps):
        try:
            return read_commit(url, step).versions.get("data", "")
        except (FileNotFoundError, ManifestError):
            continue
    return ""


def _record(spec: dict[str, Any]) -> bytes:
    document: dict[str, Any] = {"format_version": FORMAT_VERSION, "spec": spec}
    document["digest"] = _digest(document)
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def _read(name: str, raw: bytes) -> dict[str, Any]:
    """The document on record."""
    mend = "restore it, or remove it: then the job is not compared with the one that the run was started with"
    try:
        document: dict[str, Any] = json.loads(raw)
        version, digest, spec = document["format_version"], document.pop("digest"), document["spec"]
    except (ValueError, KeyError, TypeError) as e:
        raise RecordError(f"{name} under run.url is no record of a run ({e!r}): {mend}") from e
    if version != FORMAT_VERSION:
        raise RecordError(f"{name} under run.url has format_version {version}, this Shepherd reads {FORMAT_VERSION}")
    if digest != _digest(document):
        raise RecordError(f"{name} under run.url is damaged, its SHA-256 does not match its content: {mend}")
    assert isinstance(spec, dict)
    return spec


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    return redacted(value) if isinstance(value, str) else value
