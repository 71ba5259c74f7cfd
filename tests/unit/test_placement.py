"""Who takes which place of a mesh: stayers stay, replicas lie in different racks, pipelines in one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from core_world import layout
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from orchestrator.core import placement
from orchestrator.core.events import Layout


def racks(sizes: list[int]) -> dict[str, str]:
    """Nodes to racks; they joined in any order, the same in each run."""
    nodes = {f"n{rack}-{number}": f"rack {rack}" for rack, size in enumerate(sizes) for number in range(size)}
    names = sorted(nodes)
    random.Random(len(names)).shuffle(names)
    return {name: nodes[name] for name in names}


def first_mesh(mesh: Layout, domains: dict[str, str]) -> tuple[str, ...]:
    placed = placement.place(mesh, mesh, (), list(domains), {}, domains.__getitem__)
    assert placed is not None
    return placed


def of_shard(mesh: Layout, placed: tuple[str, ...], shard: int) -> list[str]:
    return [placed[slot // mesh.slots_per_node] for slot in placement.slots_of_shard(mesh, shard)]


def shards_in_one_rack(mesh: Layout, placed: tuple[str, ...], domains: dict[str, str]) -> list[int]:
    """Shards of which a rack that burns takes all copies."""
    shards = range(mesh.slots // mesh.dp_replicate)
    return [shard for shard in shards if len({domains[node] for node in of_shard(mesh, placed, shard)}) == 1]


MESHES = st.builds(
    layout,
    pp=st.integers(1, 4),
    dp_replicate=st.integers(2, 5),
    dp_shard=st.sampled_from((1, 2, 4)),
    tp=st.just(2),
    slots_per_node=st.just(2),
    spares=st.integers(0, 3),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(MESHES, st.integers(2, 6))
def test_no_rack_holds_all_copies_of_a_shard(mesh: Layout, number: int) -> None:
    size = -(-(mesh.nodes + mesh.spares) // number)
    domains = racks([size] * number)
    placed = first_mesh(mesh, domains)
    assert len(set(placed)) == mesh.nodes
    assert shards_in_one_rack(mesh, placed, domains) == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(MESHES, st.integers(2, 6), st.data())
def test_nor_after_a_node_has_been_replaced(mesh: Layout, number: int, data: st.DataObject) -> None:
    """Each rack has a spare."""
    size = -(-mesh.nodes // number) + 1
    domains = racks([size] * number)
    placed = first_mesh(mesh, domains)
    lost = data.draw(st.sampled_from(placed))
    left = [node for node in domains if node != lost]
    again = placement.place(mesh, mesh, placed, left, {}, domains.__getitem__)
    assert again is not None
    assert all(now == before for now, before in zip(again, placed, strict=True) if before != lost)
    assert shards_in_one_rack(mesh, again, domains) == []


def test_a_pipeline_lies_in_one_rack() -> None:
    mesh = layout(4, 3, 2, 2, 2, 0)
    domains = racks([8, 8, 8])
    placed = first_mesh(mesh, domains)
    for replica in range(3):
        for part in range(2):
            stages = [placed[(stage * 3 + replica) * 2 + part] for stage in range(4)]
            assert len({domains[node] for node in stages}) == 1


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=7))
def test_a_nodes_snapshots_are_kept_once_and_in_another_rack(sizes: list[int]) -> None:
    domains = racks(sizes)
    mesh, n = list(domains), sum(sizes)
    keepers = placement.buddies(mesh, domains.__getitem__)
    assert keepers == () if n == 1 else sorted(keepers) == list(range(n))
    assert all(place != keeper for place, keeper in enumerate(keepers))
    paired = sum(keepers[keeper] == place for place, keeper in enumerate(keepers))
    assert paired == (n if n % 2 == 0 else max(0, n - 3))
    if 2 * max(sizes) < n:
        assert all(domains[mesh[place]] != domains[mesh[keeper]] for place, keeper in enumerate(keepers))


def test_without_racks_nodes_come_in_the_order_in_which_they_are_listed() -> None:
    mesh = layout(1, 4, 1, 1, 1, 1)
    names = ["d", "c", "b", "a", "e"]
    assert placement.place(mesh, mesh, (), names, {}, lambda node: "") == ("d", "c", "b", "a")
    assert placement.place(mesh, mesh, (), names[:3], {}, lambda node: "") is None


@settings(max_examples=300, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(MESHES, st.integers(1, 5), st.data())
def test_a_mesh_of_another_size_moves_no_shard_that_can_stay(mesh: Layout, replicas: int, data: st.DataObject) -> None:
    """Of each shard's nodes as many stay with it as there is room for."""
    names = [f"n{number}" for number in range(mesh.nodes)]
    other = mesh.with_replicas(replicas)
    alive = [name for name in names if data.draw(st.integers(0, 9)) > 0]
    new = [f"new{number}" for number in range(other.nodes)]
    placed = placement.place(other, mesh, names, [*alive, *new], {}, lambda node: "")
    assert placed is not None and len(set(placed)) == other.nodes
    for shard in range(mesh.slots // mesh.dp_replicate):
        before = [node for node in of_shard(mesh, tuple(names), shard) if node in alive]
        stayed = set(before) & set(of_shard(other, placed, shard))
        assert len(stayed) == min(len(before), replicas)


def _ignores_racks(patch: pytest.MonkeyPatch) -> None:
    def broken(mesh: Layout, places: placement.Places, domains: dict[str, str]) -> None:
        places[:] = list(domains)[: len(places)]

    patch.setattr(placement, "_spread", broken)


def _fills_holes_anyhow(patch: pytest.MonkeyPatch) -> None:
    def broken(
        mesh: Layout, places: placement.Places, domains: dict[str, str], domain_of: Callable[[str], str]
    ) -> None:
        rest = iter(domains)
        places[:] = [node if node is not None else next(rest) for node in places]

    patch.setattr(placement, "_fit_in", broken)


def _forgets_who_was_where(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(placement, "_kept", lambda mesh, before, previous: [None] * mesh.nodes)


def _keeps_copies_next_door(patch: pytest.MonkeyPatch) -> None:
    def broken(mesh: list[str], domain_of: Callable[[str], str]) -> tuple[int, ...]:
        row = sorted(range(len(mesh)), key=lambda place: domain_of(mesh[place]))
        after = dict(zip(row, row[1:] + row[:1], strict=True))
        return tuple(after[place] for place in range(len(mesh))) if len(mesh) > 1 else ()

    patch.setattr(placement, "buddies", broken)


@pytest.mark.parametrize(
    ("breakage", "check"),
    [
        (_keeps_copies_next_door, test_a_nodes_snapshots_are_kept_once_and_in_another_rack),
        (_ignores_racks, test_no_rack_holds_all_copies_of_a_shard),
        (_fills_holes_anyhow, test_nor_after_a_node_has_been_replaced),
        (_forgets_who_was_where, test_a_mesh_of_another_size_moves_no_shard_that_can_stay),
    ],
)
def test_a_broken_placement_is_caught(
    breakage: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breakage(monkeypatch)
    with pytest.raises(AssertionError):
        check()
