"""torch's flight recorder, read: which collectives this process has begun in its groups, and in which it waits.

The recorder is a ring of the process's last collectives (2,000; TORCH_FR_BUFFER_SIZE), one for gloo and one for NCCL.
Only its JSON form is read. It is no public interface of torch: where it is missing or looks otherwise, nothing is told.

Two things that it does not tell: gloo records no messages between two ranks; and its JSON names no members of a group.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch._C import _distributed_c10d

from trainer.contract import GroupRecord

# Of gloo (and of any transport before NCCL had one of its own), and of NCCL.
_READERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
GROUPS_MAX = 32
"""Groups that are told, those with the newest collectives first: a rank of a mesh has about six."""
ENTRIES_MAX = 128
"""Newest collectives of one recorder that are kept as evidence."""
ENTRIES_CHARS = 64_000
"""Their text: some 500 characters each, more where a collective has many tensors."""
WORDS_CHARS = 64
"""Of a group's description and of a collective's name."""


def newest_groups() -> dict[str, int]:
    """For each recorder, the number of the newest process group that it knows. `read` passes over it and those before.

    A process that parks keeps its recorders, and the groups of its next generation have the same names.
    """
    newest = {}
    for name in _READERS:
        known = _dumped(name, lambda reader: json.loads(reader(False, False))["pg_status"])
        newest[name] = max(map(int, known or ()), default=-1)
    return newest


def read(after: dict[str, int]) -> tuple[dict[str, GroupRecord], str]:
    """What the recorders know of the groups that were made since `after` was taken by `newest_groups`.

    From any thread; it takes tens of milliseconds, in part with the interpreter's lock.

    Returns:
        As `Recorded` tells them: the groups by transport and name, and the newest entries as a JSON array.
    """
    groups: dict[str, GroupRecord] = {}
    kept: list[str] = []
    for name in _READERS:
        found = _dumped(name, partial(_summary, after=after.get(name, -1)))
        if found is not None:
            groups |= found[0]
            kept += found[1]
    room, first = ENTRIES_CHARS - 2, len(kept)
    while first > 0 and len(kept[first - 1]) + 1 <= room:
        first -= 1
        room -= len(kept[first]) + 1
    return groups, f"[{','.join(kept[first:])}]" if groups else ""


def _summary(reader: Callable[..., bytes], after: int) -> tuple[dict[str, GroupRecord], list[str]]:
    return summarized(reader(True, False), after, time.time_ns())


def summarized(dump: bytes, after: int, now_ns: int) -> tuple[dict[str, GroupRecord], list[str]]:
    """The groups with numbers over `after` of one recorder's JSON text, and its newest entries, each as JSON.

    Args:
        now_ns: of the wall clock, by which torch dates its entries.

    Raises:
        KeyError, TypeError, ValueError: the text has not the form that is known.
    """
    entries = [entry for entry in json.loads(dump).get("entries", ()) if entry["pg_id"] > after]
    by_group: dict[str, list[dict[str, Any]]] = {}
    for entry in reversed(entries):
        transport, _, _ = entry["profiling_name"].partition(":")
        by_group.setdefault(f"{transport} {entry['process_group'][0]}", []).append(entry)
    groups = {}
    for key, newest_first in list(by_group.items())[:GROUPS_MAX]:
        under_way = _under_way(newest_first, exact=not key.startswith("nccl"))
        pending = [entry for entry in under_way if not entry["is_p2p"]]
        groups[key] = GroupRecord(
            about=_words(newest_first[0]["process_group"][1]),
            begun=max((entry["collective_seq_id"] for entry in newest_first if not entry["is_p2p"]), default=0),
            waits=pending[-1]["collective_seq_id"] if pending else 0,
            kind=_kind(pending[-1]) if pending else "",
            waited_us=max(1, (now_ns - under_way[-1]["time_created_ns"]) // 1000) if under_way else 0,
        )
    return groups, [json.dumps(entry, separators=(",", ":")) for entry in entries[-ENTRIES_MAX:]]


def _under_way(newest_first: list[dict[str, Any]], exact: bool) -> list[dict[str, Any]]:
    """Of a group's entries those that are not complete. Not `exact`: what NCCL does together with others, torch never
    marks as complete; but a group's exchanges are carried out in order, so what comes after such a one tells."""
    found = []
    for entry in newest_first:
        if not (entry["retired"] or entry["state"] == "completed"):
            found.append(entry)
        elif not exact:
            break
    return found


def _kind(entry: dict[str, Any]) -> str:
    name = _words(entry["profiling_name"].partition(":")[2])
    if "all_reduce" not in name:  # others may give and take different amounts on different ranks
        return name
    return f"{name} of {sum(math.prod(sizes) for sizes in entry['input_sizes'])} elements"


def _words(text: str) -> str:
    """A name on one line, cut to a bound."""
    return " ".join(text.split())[:WORDS_CHARS]


def _dumped(name: str, use: Callable[[Callable[..., bytes]], Any]) -> Any:
    """What `use` makes of a recorder; None where there is none that we can read."""
    reader = getattr(_distributed_c10d, name, None)
    if reader is None:
        return None
    try:
        return use(reader)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        sys.stderr.write(f"the flight recorder cannot be read ({name}): {type(error).__name__}: {error}\n")
        return None
