"""Another job for a run that is under way: what of the document may change, and the whole document after a change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orchestrator import spec as specs
from orchestrator.spec import JobSpec, SpecError

_RESUME = "stop the run, and resume it with the other value"

CHANGEABLE: dict[str, tuple[str, ...]] = {
    "run": ("steps", "validation_interval_steps"),
    "parallel": ("microbatches",),
    "optimizer": ("lr", "beta1", "beta2", "eps", "weight_decay", "warmup_steps", "final_lr_ratio", "clip_norm"),
    "checkpoint": (
        "interval",
        "interval_steps",
        "shortest_interval_steps",
        "longest_interval_steps",
        "snapshot_interval_steps",
        "copy_interval_steps",
        "copy_bytes_per_s",
        "keep",
        "keep_every_steps",
        "scrub_hours",
        "verify_mb_per_s",
    ),
    "recovery": tuple(
        name for name in specs.RecoverySection.model_fields if name not in ("min_replicas", "fallback_meshes")
    ),
}
"""Fields that an update may change. The mesh, the data and where state lies stay as they are."""

WHY_NOT: dict[str, str] = {
    "run.name": "names its actors and its snapshots",
    "run.url": "holds its journal and its checkpoints",
    "run.seed": "another value is another run",
    "run.dtype": "another value is another run",
    "model": "another value is another run",
    "data": "another value is another run",
    "data.cache_dir": f"is prepared when a node joins; {_RESUME}",
    "data.corpus": f"is prepared when a node joins; {_RESUME}",
    "run.deterministic": f"decides which bits a step has; {_RESUME}",
    "parallel": f"numbers the slots of snapshots; {_RESUME}",
    "cluster": f"decides which nodes the run holds; {_RESUME}",
    "checkpoint.copies": f"decides which memory the nodes have in use; {_RESUME}",
    "checkpoint.local_dir": f"holds parts of checkpoints; {_RESUME}",
    "recovery.min_replicas": f"decides which meshes can serve; {_RESUME}",
    "recovery.fallback_meshes": f"decides which meshes can serve; {_RESUME}",
    "audit": f"snapshots carry its marks; {_RESUME}",
    "script": f"is what runs; {_RESUME}",
    "metrics": f"is where people already look; {_RESUME}",
}
"""By field, or else by section: why a value is for the run's whole life."""

CHOOSES_INTERVAL = tuple(
    f"checkpoint.{name}" for name in ("interval", "interval_steps", "shortest_interval_steps", "longest_interval_steps")
)
"""What says how often to save: the interval that was chosen before counts no more."""


def updated(spec: JobSpec, overrides: list[str]) -> JobSpec:
    """The job with ``section.key=value`` overrides, checked as a whole.

    Raises:
        SpecError: it could not run, or an override changes what an active run cannot change.
    """
    document = spec.document()
    for override in overrides:
        specs.override(document, override)
    new = specs.parse(document)
    refused = [name for name in _differences(spec, new) if not _may_change(name)]
    if refused:
        raise SpecError("\n".join(f"{name}: cannot change while the run is active: {_why(name)}" for name in refused))
    return new


def changes(old: JobSpec, new: JobSpec) -> dict[str, str]:
    """``section.field`` to the new value as JSON, for each field that differs."""
    document = new.document()
    parts = {name: name.split(".", 1) for name in _differences(old, new)}
    return {name: json.dumps(document[section][field]) for name, (section, field) in parts.items()}


def applied(spec: JobSpec, made: Mapping[str, str]) -> JobSpec:
    """The job after changes that were checked when they were made.

    Raises:
        SpecError: this version does not take them.
    """
    document: dict[str, Any] = spec.document()
    for name, value in made.items():
        section, field = name.split(".", 1)
        document[section][field] = json.loads(value)
    return specs.parse(document)


def _differences(old: JobSpec, new: JobSpec) -> list[str]:
    before, after = old.document(), new.document()
    return [
        f"{section}.{field}"
        for section, fields in after.items()
        for field, value in fields.items()
        if before[section][field] != value
    ]


def _may_change(name: str) -> bool:
    section, field = name.split(".", 1)
    return field in CHANGEABLE.get(section, ())


def _why(name: str) -> str:
    return WHY_NOT.get(name) or WHY_NOT[name.split(".", 1)[0]]
