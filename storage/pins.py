"""Pins: checkpoints that somebody wants to keep, whatever their age. No torch.

Records ``checkpoints/pins/step-00000120.json``, created exclusively; a controller deletes no pinned checkpoint.
"""

from __future__ import annotations

import json
import re

from storage.urls import list_names, remove, write_exclusive

PIN_DIR = "checkpoints/pins"

_FILE = re.compile(r"step-(\d{8,})\.json")


def pin(url: str, step: int, why: str) -> bool:
    """Keep the checkpoint of `step`. False when it was pinned before, for another reason: that one stands.

    Raises:
        StoreError: the store failed; it is not pinned.
    """
    record = {"step": step, "why": why}
    return write_exclusive(url, _name(step), json.dumps(record, sort_keys=True).encode() + b"\n")


def unpin(url: str, step: int) -> None:
    """Let the checkpoint of `step` go; nothing happens when it was not pinned."""
    remove(url, _name(step))


def pinned(url: str) -> set[int]:
    """The steps whose checkpoints are pinned."""
    return {int(m.group(1)) for name in list_names(url, PIN_DIR) if (m := _FILE.fullmatch(name))}


def _name(step: int) -> str:
    return f"{PIN_DIR}/step-{step:08d}.json"
