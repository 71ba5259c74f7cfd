"""Mesh slots to nodes.

Slots are numbered with tp fastest, and a node takes `slots_per_node` consecutive ones, so tensor-parallel groups stay
inside a node whenever tp divides slots_per_node (the spec demands it). What is left to decide is which node takes
which place in that order:

- whoever can stay stays, so that as little state as possible moves;
- the replicas of a slot stand in different failure domains (racks), so that no rack takes all copies along;
- the stages of a pipeline stand in one, since neighbours talk all the time;
- who keeps a copy of a node's snapshots (its buddy) stands in another than that node.

A *shard* is a slot without its replica: what all replicas of it hold alike. It is numbered the same in meshes of any
number of replicas. In a mesh with other shards nobody's place is better than another's: all of the state moves.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from orchestrator.core.events import Layout

Places = list[str | None]
"""A node, or a hole, for each place of a mesh in its order."""


def place(
    layout: Layout,
    before: Layout,
    previous: Sequence[str],
    usable: Sequence[str],
    held: Mapping[str, Collection[int]],
    domain_of: Callable[[str], str],
) -> tuple[str, ...] | None:
    """The nodes in mesh order, or None when there are too few.

    `previous` is the mesh until now, laid out as `before` says; `usable` lists the nodes, the best first. A hole goes
    to the node that `held` says has the hole's slots in its shared memory (an agent that came back), else to one in a
    failure domain that suits it.
    """
    if len(usable) < layout.nodes:
        return None
    alive = set(usable)
    places = _kept(layout, before, [node if node in alive else None for node in previous])
    kept = set(places)
    free = dict.fromkeys(node for node in usable if node not in kept)
    if before == layout:
        _take_home(layout, places, free, held)
    domains = {node: domain_of(node) for node in free}
    if any(domains.values()) and any(places):
        _fit_in(layout, places, domains, domain_of)
    elif any(domains.values()):
        _spread(layout, places, domains)
    else:
        rest = iter(free)
        places = [node if node is not None else next(rest) for node in places]
    filled = tuple(node for node in places if node is not None)
    assert len(filled) == len(set(filled)) == layout.nodes, places
    return filled


def _kept(layout: Layout, before: Layout, previous: Places) -> Places:
    """Who stays where. Of a mesh of another size each keeps its shards, and its replica where there still is one; of
    one with other shards, or whose replicas share nodes, nobody has a place."""
    if previous and before == layout:
        return previous
    a_replica, shared = divmod(layout.dp_shard * layout.tp, layout.slots_per_node)
    if not previous or shared or not layout.has_shards_of(before):
        return [None] * layout.nodes
    places: Places = [None] * layout.nodes
    for stage in range(layout.pp):
        for part in range(a_replica):
            old = [previous[(stage * before.dp_replicate + r) * a_replica + part] for r in range(before.dp_replicate)]
            new = (old + [None] * layout.dp_replicate)[: layout.dp_replicate]
            others = iter([node for node in old[layout.dp_replicate :] if node is not None])
            new = [node if node is not None else next(others, None) for node in new]
            for replica, node in enumerate(new):
                places[(stage * layout.dp_replicate + replica) * a_replica + part] = node
    return places


def _take_home(layout: Layout, places: Places, free: dict[str, None], held: Mapping[str, Collection[int]]) -> None:
    homes = {slot: node for node in reversed(free) for slot in held.get(node, ())}
    for index in _holes(places):
        home = homes.get(slots_of(layout, index)[0])
        if home in free:
            places[index] = home
            del free[home]


def _fit_in(layout: Layout, places: Places, domains: dict[str, str], domain_of: Callable[[str], str]) -> None:
    """Each hole goes to a domain with the fewest of its replicas, and of those to one with most of its pipeline."""
    free: dict[str, deque[str]] = {}
    for node, domain in domains.items():
        free.setdefault(domain, deque()).append(node)

    def found(indices: Iterable[int]) -> Counter[str]:
        return Counter(domain_of(node) for node in (places[index] for index in indices) if node is not None)

    for index in _holes(places):
        replicated, near = found(_twins(layout, index)), found(_neighbours(layout, index))
        best = min((domain for domain, nodes in free.items() if nodes), key=lambda d: (replicated[d], -near[d]))
        places[index] = free[best].popleft()


def _spread(layout: Layout, places: Places, domains: dict[str, str]) -> None:
    """A whole mesh: replica after replica, stage beside stage, rack after rack.

    So copies of a shard stand as far apart as a replica is large, and all are in one rack only where it has more nodes
    than all replicas but one. Hence spares are left to the racks with most nodes.
    """
    free: dict[str, list[str]] = {}
    for node, domain in domains.items():
        free.setdefault(domain, []).append(node)
    largest = [(-len(nodes), number, nodes) for number, nodes in enumerate(free.values())]
    heapq.heapify(largest)
    for _ in range(len(domains) - layout.nodes):
        left, number, nodes = largest[0]
        nodes.pop()
        heapq.heapreplace(largest, (left + 1, number, nodes))
    taken = (node for nodes in free.values() for node in nodes)
    for index in sorted(range(layout.nodes), key=lambda index: _by_replica(layout, index)):
        places[index] = next(taken)


def _by_replica(layout: Layout, index: int) -> tuple[int, int, int]:
    """Replica, shard of its stage, stage, of a place's first slot."""
    inner = layout.dp_shard * layout.tp
    stage, rest = divmod(index * layout.slots_per_node, layout.dp_replicate * inner)
    return rest // inner, rest % inner, stage


def _holes(places: Places) -> list[int]:
    return [index for index, node in enumerate(places) if node is None]


def _twins(layout: Layout, index: int) -> list[int]:
    """The places that hold a replica of one of this place's slots."""
    copies = (copy for slot in slots_of(layout, index) for copy in replicas(layout, slot))
    return list(dict.fromkeys(copy // layout.slots_per_node for copy in copies))


def _neighbours(layout: Layout, index: int) -> list[int]:
    """The places of the stages before and after this place's slots, in the same replica."""
    a_stage = layout.dp_replicate * layout.dp_shard * layout.tp
    beside = (slot + step for slot in slots_of(layout, index) for step in (-a_stage, a_stage))
    return list(dict.fromkeys(slot // layout.slots_per_node for slot in beside if 0 <= slot < layout.slots))


def buddies(mesh: Sequence[str], domain_of: Callable[[str], str]) -> tuple[int, ...]:
    """For each place the place whose node keeps a copy of its snapshots; nobody's, where there is one node.

    Pairs half a round apart over the nodes sorted by rack, so in different racks unless one has more than half of them:
    a pair loses its state only when both of its nodes go, where in a ring any two neighbours take one along (GEMINI,
    SOSP 2023). An odd number leaves one triple.
    """
    racks: dict[str, list[int]] = {}
    for place, node in enumerate(mesh):
        racks.setdefault(domain_of(node), []).append(place)
    row = [place for places in racks.values() for place in places]
    half = len(row) // 2
    keeper = [0] * len(row)
    for one, other in zip(row[:half], row[half : 2 * half], strict=True):
        keeper[one], keeper[other] = other, one
    if len(row) % 2 and half:
        keeper[row[-1]], keeper[row[half]] = row[0], row[-1]
    return tuple(keeper) if half else ()


def replicas_apart(layout: Layout, mesh: Sequence[str], domain_of: Callable[[str], str]) -> bool:
    """Whether of every shard there are replicas in two failure domains; a node of no known domain is one by itself."""
    width = layout.slots_per_node
    domains = [domain_of(node) or node for node in mesh]
    # Where a replica fills whole nodes, all shards of a node have their replicas on the same nodes.
    inner = layout.dp_shard * layout.tp
    shards = range(0, layout.pp * inner, width if inner % width == 0 else 1)
    return all(len({domains[slot // width] for slot in slots_of_shard(layout, shard)}) > 1 for shard in shards)


def slots_of(layout: Layout, place_index: int) -> range:
    """The slots that the node at this place of the mesh order fills."""
    return range(place_index * layout.slots_per_node, (place_index + 1) * layout.slots_per_node)


def replicas(layout: Layout, slot: int) -> tuple[int, ...]:
    """The other slots whose parameters and moments are bit-identical to this one's: same but for dp_replicate."""
    return tuple(copy for copy in slots_of_shard(layout, shard_of(layout, slot)) if copy != slot)


def shard_of(layout: Layout, slot: int) -> int:
    """The shard that a slot holds, in [0, pp x dp_shard x tp)."""
    inner = layout.dp_shard * layout.tp
    return slot // (layout.dp_replicate * inner) * inner + slot % inner


def slots_of_shard(layout: Layout, shard: int) -> range:
    """The slots that hold a shard, one for each replica."""
    inner = layout.dp_shard * layout.tp
    stage, own = divmod(shard, inner)
    first = stage * layout.dp_replicate * inner + own
    return range(first, first + layout.dp_replicate * inner, inner)
