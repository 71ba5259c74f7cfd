"""Who owns a node's snapshots: whoever lives; what a dead node has left is adopted once and whole, or swept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_storage_ram import blank, equal, state_of, take

from storage import ram, ram_owners
from storage.snapshots import RamTier

RUN, SLOT = "run", 3

HOLD = """
import sys
from storage import ram_owners
lock = ram_owners.own(*sys.argv[1:4], adopts=False)
print("held", flush=True)
sys.stdin.read()
"""


def leave(folder: Path, node: str, *steps: int) -> None:
    """Snapshots of a node that is dead."""
    tier = RamTier(str(folder), RUN, node, SLOT, generation=2)
    for step in steps:
        take(tier, state_of(step))


@contextmanager
def another_process_holds(folder: Path, node: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), RUN, node], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_what_a_dead_node_has_left_is_the_next_ones_and_restores_bit_for_bit(tmp_path: Path) -> None:
    leave(tmp_path, "old", 6, 7)
    ram_owners.own(str(tmp_path), RUN, "new", adopts=True)
    held = ram.held(str(tmp_path), RUN, "new")
    assert [(h.node, h.step, h.generation) for h in held[SLOT]] == [("new", 6, 2), ("new", 7, 2)]
    assert ram.held(str(tmp_path), RUN, "old") == {}
    restored = blank()
    RamTier(str(tmp_path), RUN, "new", SLOT, generation=3).restore(7, restored)
    assert equal(restored, state_of(7))


def test_the_newest_is_adopted_each_only_once_and_the_rest_is_swept(tmp_path: Path) -> None:
    leave(tmp_path, "a", 5)
    leave(tmp_path, "b", 9)
    leave(tmp_path, "c", 7)
    first = ram_owners.own(str(tmp_path), RUN, "x", adopts=True)
    second = ram_owners.own(str(tmp_path), RUN, "y", adopts=True)
    assert [ram.newest_step(str(tmp_path), RUN, node, SLOT) for node in ("x", "y")] == [9, 7]
    assert ram_owners.sweep(str(tmp_path), RUN, "x") == ["a"]
    assert sorted(path.name for path in (tmp_path / RUN).iterdir()) == ["x", "y"]
    os.close(second)
    assert ram_owners.sweep(str(tmp_path), RUN, "x") == ["y"]
    os.close(first)


def test_what_a_living_agent_holds_is_neither_adopted_nor_swept(tmp_path: Path) -> None:
    leave(tmp_path, "alive", 5)
    with another_process_holds(tmp_path, "alive") as holder:
        os.close(ram_owners.own(str(tmp_path), RUN, "new", adopts=True))
        assert ram.held(str(tmp_path), RUN, "new") == {}
        assert ram_owners.sweep(str(tmp_path), RUN, "new") == []
        with pytest.raises(OSError, match="is held by another agent"):
            ram_owners.own(str(tmp_path), RUN, "alive", adopts=False)
        holder.kill()
        holder.wait()
        os.close(ram_owners.own(str(tmp_path), RUN, "alive", adopts=False))


def test_an_agents_own_folder_comes_before_others_and_nothing_is_adopted_unasked(tmp_path: Path) -> None:
    leave(tmp_path, "own", 3)
    leave(tmp_path, "other", 9)
    os.close(ram_owners.own(str(tmp_path), RUN, "own", adopts=True))
    os.close(ram_owners.own(str(tmp_path), RUN, "third", adopts=False))
    assert ram.newest_step(str(tmp_path), RUN, "own", SLOT) == 3
    assert ram.held(str(tmp_path), RUN, "third") == {}
    assert ram.newest_step(str(tmp_path), RUN, "other", SLOT) == 9
