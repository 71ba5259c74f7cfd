"""Mesh slots to nodes.

Slots are numbered with tp fastest, and a node takes `slots_per_node` consecutive ones, so tensor-parallel groups stay
inside a node whenever tp divides slots_per_node (the spec demands it). What is left to decide is which node takes
which place in that order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from orchestrator.core.events import Layout


def place(
    layout: Layout, previous: Sequence[str], usable: Sequence[str], held: Mapping[str, Collection[int]]
) -> tuple[str, ...] | None:
    """The nodes in mesh order, or None when there are too few.

    A node that is still usable keeps its place, so as few slots as possible move. A hole goes to the node that `held`
    says has the hole's slots in its shared memory (an agent that came back); the others are filled from `usable` in
    the order in which it lists them.
    """
    alive, kept = set(usable), set(previous[: layout.nodes])
    places = [node if node in alive else None for node in previous[: layout.nodes]]
    places += [None] * (layout.nodes - len(places))
    free = dict.fromkeys(node for node in usable if node not in kept)
    holes = [index for index, node in enumerate(places) if node is None]
    if len(holes) > len(free):
        return None
    homes = {slot: node for node in reversed(free) for slot in held.get(node, ())}
    for index in holes:
        home = homes.get(slots_of(layout, index)[0])
        if home in free:
            places[index] = home
            del free[home]
    rest = iter(free)
    filled = tuple(node if node is not None else next(rest) for node in places)
    assert len(set(filled)) == layout.nodes, filled
    return filled


def slots_of(layout: Layout, place_index: int) -> range:
    """The slots that the node at this place of the mesh order fills."""
    return range(place_index * layout.slots_per_node, (place_index + 1) * layout.slots_per_node)


def replicas(layout: Layout, slot: int) -> tuple[int, ...]:
    """The other slots whose parameters and moments are bit-identical to this one's: same but for dp_replicate."""
    inner = layout.dp_shard * layout.tp
    stage, rest = divmod(slot, layout.dp_replicate * inner)
    own, shard = divmod(rest, inner)
    return tuple(
        stage * layout.dp_replicate * inner + replica * inner + shard
        for replica in range(layout.dp_replicate)
        if replica != own
    )
