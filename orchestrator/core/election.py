"""The election of what to restore: the newest snapshot that shared memory can give to every slot of a mesh.

A snapshot is known by its step *and* the generation that wrote it: where collectives are not bitwise reproducible, the
same step of two generations is two states, and they must never be mixed.

Nodes of a mesh hold the same snapshots for all their slots, but for what a failure cut short. So an inventory is kept
as runs of slots (`Held`), and what is asked of it costs a look at each node, not at each slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from orchestrator.core import placement
from orchestrator.core.actions import Transfer
from orchestrator.core.events import Layout, Snapshot
from orchestrator.core.state import IN_QUARANTINE, OWN_PLACE, Held, State


def inventory_of(snapshots: dict[int, tuple[Snapshot, ...]], first_generation: int) -> tuple[Held, ...]:
    """What a node has reported, as runs of slots; snapshots of generations before `first_generation` do not count."""
    runs: list[Held] = []
    for slot in sorted(snapshots):
        kept = tuple(s for s in snapshots[slot] if s.generation >= first_generation)
        if not kept:
            continue
        last = runs[-1] if runs else None
        if last is not None and last.first + last.slots == slot and last.snapshots == kept:
            runs[-1] = Held(first=last.first, slots=last.slots + 1, snapshots=kept)
        else:
            runs.append(Held(first=slot, slots=1, snapshots=kept))
    return tuple(runs)


def placed(held: tuple[Held, ...], first: int) -> tuple[Held, ...]:
    """The same, said by its slots: the node leaves the place that begins with the slot `first`."""
    return tuple(replace(run, first=first) if run.first == OWN_PLACE else run for run in held)


def slots_held(held: tuple[Held, ...]) -> list[int]:
    """The slots of which something is held, by a node that has no place."""
    assert all(run.first != OWN_PLACE for run in held), held
    return [slot for run in held for slot in _slots(run, 0)]


def _slots(run: Held, place_first: int) -> range:
    first = place_first if run.first == OWN_PLACE else run.first
    return range(first, first + run.slots)


def newest_in_ram(state: State, mesh: tuple[str, ...], layout: Layout) -> tuple[Snapshot, tuple[Transfer, ...]] | None:
    """The newest snapshot that every slot of `mesh` can be given, with the copies that it takes; None without any."""
    if "ram" not in state.capabilities:
        return None
    # By identity first: thousands of nodes share a few objects, whose comparison would be most of the cost.
    kinds = {id(held): held for held in state.inventory.values()}
    known = {snapshot for held in kinds.values() for run in held for snapshot in run.snapshots}
    for snapshot in sorted(known, key=lambda s: (s.step, s.generation), reverse=True):
        if snapshot.name in state.bad_snapshots or state.is_unclean(snapshot.generation, snapshot.step):
            continue
        if snapshot.step > state.total_steps:  # of the time before a resume that made the run shorter
            continue
        transfers = _transfers(state, mesh, layout, snapshot)
        if transfers is not None:
            return snapshot, transfers
    return None


def _transfers(state: State, mesh: tuple[str, ...], layout: Layout, snapshot: Snapshot) -> tuple[Transfer, ...] | None:
    """The copies that give every slot of `mesh` this snapshot; None when some slot's cannot be had."""
    writers = state.layout_of(snapshot.generation)
    sources = _Sources(state, writers, snapshot)
    if layout == writers:
        missing = _missing(state, layout, mesh, snapshot)
    elif layout.has_shards_of(writers):
        missing = sources.missing_shards(layout, mesh)
    else:
        missing = sources.missing_anywhere(mesh)
    if missing and "peer" not in state.capabilities:
        return None
    numbered = layout if layout.has_shards_of(writers) else writers
    transfers = []
    for to_node, slot in missing:
        source = sources.best(placement.shard_of(numbered, slot), slot if layout == writers else None)
        if source is None:
            return None
        slot = slot if layout == writers else source[0]
        transfers.append(Transfer(slot=slot, to_node=to_node, from_slot=source[0], from_node=source[1]))
    return tuple(transfers)


class _Holds:
    """Whether a run of slots holds a snapshot. Remembers the answer by the identity of the run's tuple, which many
    nodes share and which outlives the question."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._known: dict[int, bool] = {}

    def __call__(self, run: Held) -> bool:
        answer = self._known.get(id(run.snapshots))
        if answer is None:
            answer = self._known[id(run.snapshots)] = self._snapshot in run.snapshots
        return answer


Missing = list[tuple[str, int]]
"""Nodes, and slots for which they lack a snapshot."""


def _missing(state: State, layout: Layout, mesh: tuple[str, ...], snapshot: Snapshot) -> Missing:
    """The slots whose node in `mesh` does not hold the snapshot, in order. For a mesh that is the writer's."""
    width, inventory = layout.slots_per_node, state.inventory
    # OWN_PLACE is one of the last mesh: where that was another one, nodes have other places now.
    before = {} if layout == state.mesh_layout else {node: place for place, node in enumerate(state.mesh)}
    missing: Missing = []
    holds = _Holds(snapshot)
    complete: dict[int, None] = {}  # identities of what holds all of its own place: thousands of nodes share one
    for index, node in enumerate(mesh):
        held = inventory.get(node, ())
        place = before.get(node, index)
        if place == index:
            if id(held) in complete:
                continue
            known = held[0].first in (OWN_PLACE, index * width) if len(held) == 1 else False
            if known and held[0].slots == width and holds(held[0]):
                if held[0].first == OWN_PLACE:
                    complete[id(held)] = None
                continue
        own = {slot for run in held if holds(run) for slot in _slots(run, place * width)}
        missing += [(node, slot) for slot in placement.slots_of(layout, index) if slot not in own]
    return missing


class _Sources:
    """Who can give a slot the snapshot: whoever holds it of that slot or of one of its replicas.

    A node that is quarantined, or should be, is read from, too, since what it holds carries digests; but only where
    nobody else holds the same.

    Replicas take turns: a node gives so many copies at once and no more, and a rack that is lost may want hundreds.
    """

    def __init__(self, state: State, writers: Layout, snapshot: Snapshot) -> None:
        self._state, self._writers = state, writers
        self._holds = _Holds(snapshot)
        self._elsewhere: dict[int, list[str]] | None = None
        mesh = set(state.mesh)
        self._strays = [node for node in state.inventory if node not in mesh]
        self._turns: dict[int, int] = {}
        """Shard to the replica that is asked first for it the next time, if not for the first."""

    def best(self, shard: int, slot: int | None) -> tuple[int, str] | None:
        """A slot and a node that holds the shard as this slot. `slot` comes first: others hold less of a rank's own."""
        of_shard = placement.slots_of_shard(self._writers, shard)
        turn = self._turns.get(shard, 0)
        own = () if slot is None else (slot,)
        found = self._first((own, of_shard[turn:], of_shard[:turn]))
        if found is not None:
            self._turns[shard] = (of_shard.index(found[0]) + 1) % len(of_shard)
        return found

    def _first(self, slots: tuple[Sequence[int], ...]) -> tuple[int, str] | None:
        """The first of `slots` that somebody holds. First asked are the nodes that have these places, and those that
        have none; then all, once."""
        width = self._writers.slots_per_node
        for copy in chain(*slots):
            at_home = self._state.mesh[copy // width : copy // width + 1]
            for node in (*at_home, *self._strays):
                if self._has(node, copy) and not self._is_suspect(node):
                    return copy, node
        if self._elsewhere is None:
            self._elsewhere = self._everywhere()
        found = [(copy, node) for copy in chain(*slots) for node in self._elsewhere.get(copy, ())]
        return min(found, key=lambda pair: self._is_suspect(pair[1]), default=None)

    def missing_shards(self, layout: Layout, mesh: tuple[str, ...]) -> Missing:
        """The same as `_missing` for a mesh of another size than the writer's: any replica of a shard is as good."""
        self._elsewhere = self._elsewhere or self._everywhere()
        held: dict[str, set[int]] = {}
        for slot, nodes in self._elsewhere.items():
            for node in nodes:
                held.setdefault(node, set()).add(placement.shard_of(self._writers, slot))
        missing: Missing = []
        for index, node in enumerate(mesh):
            here = held.setdefault(node, set())
            for slot in placement.slots_of(layout, index):
                shard = placement.shard_of(layout, slot)
                if shard not in here:  # one copy serves all of its replicas on a node
                    here.add(shard)
                    missing.append((node, slot))
        return missing

    def missing_anywhere(self, mesh: tuple[str, ...]) -> Missing:
        """For a mesh with other shards than the writer's, whose ranks share what their nodes hold: a slot of each shard
        that no node of the mesh has. The nodes take turns in having them copied."""
        self._elsewhere = self._elsewhere or self._everywhere()
        members = set(mesh)
        held = {
            placement.shard_of(self._writers, slot)
            for slot, nodes in self._elsewhere.items()
            if not members.isdisjoint(nodes)
        }
        shards = range(self._writers.slots // self._writers.dp_replicate)
        gone = [placement.slots_of_shard(self._writers, shard)[0] for shard in shards if shard not in held]
        return [(mesh[number % len(mesh)], slot) for number, slot in enumerate(gone)]

    def _has(self, node: str, slot: int) -> bool:
        width = self._writers.slots_per_node
        first = slot - slot % width  # of the place that is asked for, and this node's own if it has one
        runs = self._state.inventory.get(node, ())
        return any(slot in _slots(run, first) and self._holds(run) for run in runs)

    def _everywhere(self) -> dict[int, list[str]]:
        holders: dict[int, list[str]] = {}
        places = {node: index * self._writers.slots_per_node for index, node in enumerate(self._state.mesh)}
        for node, runs in self._state.inventory.items():
            for run in runs:
                if self._holds(run):
                    for slot in _slots(run, places.get(node, 0)):
                        holders.setdefault(slot, []).append(node)
        return holders

    def _is_suspect(self, name: str) -> bool:
        state = self._state
        return name in state.convicted or state.nodes[name].state in IN_QUARANTINE or name in state.disputes
