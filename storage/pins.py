"""Pins: records that keep a checkpoint from being deleted, ``checkpoints/pins/step-00000120.json``. No torch."""

from __future__ import annotations

import json
import re

from storage.urls import list_names, read_bytes, remove, write_exclusive

PIN_DIR = "checkpoints/pins"

_PIN_FILE = re.compile(r"step-(\d{8,})\.json")


def pin_name(step: int) -> str:
    """Path of the pin of `step`, relative to ``run.url``."""
    return f"{PIN_DIR}/step-{step:08d}.json"


def pin(url: str, step: int, why: str) -> bool:
    """Keep the checkpoint of `step` until it is unpinned. False when it was pinned for another reason: that one stands.

    Raises:
        StoreError: the store failed; it is not pinned.
    """
    record = {"step": step, "why": why}
    return write_exclusive(url, pin_name(step), json.dumps(record, sort_keys=True).encode() + b"\n")


def unpin(url: str, step: int) -> None:
    """Let the checkpoint of `step` be deleted again; nothing happens when it is not pinned."""
    remove(url, pin_name(step))


def pinned(url: str) -> set[int]:
    """Steps of all pins, whether or not there is a checkpoint of that step."""
    found = (_PIN_FILE.fullmatch(name) for name in list_names(url, PIN_DIR))
    return {int(match.group(1)) for match in found if match}


def why_pinned(url: str, step: int) -> str:
    """The reason that was given for a pin; empty when the record cannot be read: a damaged pin is a pin still.

    Raises:
        FileNotFoundError: `step` is not pinned.
    """
    try:
        return str(json.loads(read_bytes(url, pin_name(step)))["why"])
    except (ValueError, KeyError, TypeError):
        return ""
