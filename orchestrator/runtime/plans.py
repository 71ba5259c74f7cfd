"""What the nodes of a generation are told: which ranks are theirs, and who else holds the state that they restore.

It keeps what has to be known of the generations before for that: who filled their meshes, who kept copies for whom.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

from orchestrator.core import placement
from orchestrator.core.actions import OpenGeneration, Transfer
from orchestrator.core.events import Layout
from orchestrator.runtime.assignment import NodeAssignment
from orchestrator.runtime.nodes import AgentHandle
from orchestrator.spec import JobSpec
from storage.manifest import commit_name
from trainer import contract

MESHES_KEPT = 8
"""Generations of which it is known who filled them: snapshots are of the last one that made steps."""


class Plans:
    """Of one controller, in its epoch.

    Args:
        spec: of the job as it is now.
        agents: those that there are, by node; the owner's own.
        agent: of a node; raises when the node has none.
    """

    def __init__(
        self,
        spec: Callable[[], JobSpec],
        epoch: int,
        agents: Mapping[str, AgentHandle],
        agent: Callable[[str], AgentHandle],
    ) -> None:
        self._spec, self._epoch = spec, epoch
        self.save_every_steps = spec().checkpoint.interval_steps
        """As the owner has last heard of it."""
        self._agents, self._agent = agents, agent
        self.layout = spec().layout
        """Of the generation that was opened last."""
        self._filled: dict[int, tuple[str, ...]] = {}
        """Generation to its nodes in mesh order, of the newest MESHES_KEPT."""
        self._keepers: dict[int, str] = {}
        """Slot to the node that keeps copies of its snapshots, in the generation that was opened last."""
        self._copied_step = self._restored_step = 0
        """The newest step that was copied from every node, and that of the restore, in the generation opened last."""

    def begin(self, action: OpenGeneration, copied_step: int) -> None:
        """A generation is to be opened. `copied_step`: the newest that the one before has copied from every node."""
        # What was copied before is known of the last one's steps only.
        before = min(self._copied_step, self._restored_step)
        self._copied_step, self._restored_step = max(before, copied_step), action.step
        self.layout = self._layout_of(action)
        self._note_filled(action)

    def adopt(self, order: OpenGeneration) -> None:
        """Another controller has opened this generation, the newest."""
        self.layout = self._layout_of(order)
        self._note_filled(order)
        self._keepers = self._kept_by(order)

    def opened(self, action: OpenGeneration) -> None:
        """Every node is told its part: from now on copies are kept as this generation has it."""
        self._keepers = self._kept_by(action)

    def loads(self) -> tuple[int, ...]:
        """Microbatches that each replica of the mesh takes in a step."""
        if self._spec().is_script:
            return (1,)
        config = self._spec().worker_config.on_mesh(self.layout.degrees)
        return tuple(len(config.microbatches_of(replica)) for replica in range(self.layout.dp_replicate))

    def assignments(
        self, action: OpenGeneration, host: str, port: int, data_digest: str
    ) -> list[tuple[str, NodeAssignment]]:
        """Each node's part of a generation whose ranks meet in the store at host:port."""
        layout, writers = self._layout_of(action), self._writers_of(action)
        config = self._spec().worker_config.on_mesh(layout.degrees)
        checkpoint = dataclasses.replace(config.checkpoint, interval_steps=self.save_every_steps)
        config = dataclasses.replace(config, checkpoint=checkpoint, data_digest=data_digest)
        restore = contract.Restore(
            source=action.source,  # type: ignore[arg-type]
            step=action.step,
            generation=action.snapshot_generation,
            commit=commit_name(action.step) if action.source == "durable" else "",
            reshard=action.source == "ram" and not layout.has_shards_of(writers),
        )
        renumbered = action.source == "ram" and layout != writers and not restore.reshard
        return [
            (
                node,
                NodeAssignment(
                    epoch=self._epoch,
                    generation=action.generation,
                    group_rank=index,
                    group_world_size=len(action.nodes),
                    ranks=tuple(placement.slots_of(layout, index)),
                    world_size=layout.slots,
                    store_host=host,
                    store_port=port,
                    restore=restore,
                    config=config,
                    ram_dir="",  # each agent knows its own
                    code=action.code,
                    keeper=self._address(action.nodes[action.buddies[index]]) if action.buddies else "",
                    copied_step=self._copied_step,
                    holders=self._holders_for(action, index),
                    snapshot_slots={
                        rank: self._snapshot_slots(action, rank)
                        for rank in (placement.slots_of(layout, index) if renumbered else ())
                    },
                ),
            )
            for index, node in enumerate(action.nodes)
        ]

    def copies(self, action: OpenGeneration) -> list[tuple[Transfer, contract.Holder, tuple[contract.Holder, ...]]]:
        """What is to be copied first, from whom, and who else may hold what is damaged there."""
        without = {transfer.to_node for transfer in action.transfers}
        return [
            (
                transfer,
                self._holder(transfer.from_node, transfer.from_slot),
                self._holders(action, transfer.slot, {*without, transfer.from_node}),
            )
            for transfer in action.transfers
        ]

    def _layout_of(self, action: OpenGeneration) -> Layout:
        return self._spec().layout.sized(action.dp_replicate, action.fallback)

    def _writers_of(self, action: OpenGeneration) -> Layout:
        """The mesh whose slots the snapshots are numbered by."""
        return self._spec().layout.sized(action.snapshot_dp_replicate, action.snapshot_fallback)

    def _note_filled(self, action: OpenGeneration) -> None:
        self._filled[action.generation] = action.nodes
        while len(self._filled) > MESHES_KEPT:
            del self._filled[min(self._filled)]

    def _snapshot_slots(self, action: OpenGeneration, rank: int) -> range:
        """The slots that held the rank's shard, as numbered by the generation that wrote the snapshots."""
        shard = placement.shard_of(self._layout_of(action), rank)
        return placement.slots_of_shard(self._writers_of(action), shard)

    def _address(self, node: str) -> str:
        info = self._agent(node).info
        assert info is not None
        return info.address

    def _holders_for(self, action: OpenGeneration, index: int) -> dict[int, tuple[contract.Holder, ...]]:
        """By rank of this place: who else may hold what it restores from shared memory."""
        if action.source != "ram":
            return {}
        layout, writers, node = self._layout_of(action), self._writers_of(action), action.nodes[index]
        ranks = placement.slots_of(layout, index)
        if not layout.has_shards_of(writers):
            here = self._offered_by(action, node)
            return dict.fromkeys(ranks, tuple(h for slot in here for h in self._holders(action, slot, {node})))
        same = layout == writers
        return {
            rank: self._holders(action, rank if same else self._snapshot_slots(action, rank)[0], {node})
            for rank in ranks
        }

    def _offered_by(self, action: OpenGeneration, node: str) -> list[int]:
        """The slots whose snapshots a node can be supposed to hold, as the generation that wrote them numbered them."""
        filled = self._filled.get(action.snapshot_generation, ())
        own = placement.slots_of(self._spec().layout, filled.index(node)) if node in filled else ()
        kept = (slot for slot, keeper in self._keepers.items() if keeper == node)
        fetched = (transfer.slot for transfer in action.transfers if transfer.to_node == node)
        return sorted({*own, *kept, *fetched})

    def _holders(self, action: OpenGeneration, slot: int, without: Collection[str]) -> tuple[contract.Holder, ...]:
        """Who else may hold the snapshot of `slot`, but for nodes `without` it: one of its replicas' nodes, and who
        kept copies of it until now. They are asked only for what is damaged, and may not have it.

        Slots are numbered as by the generation that wrote the snapshot; where this one has another mesh, the nodes are
        that one's, too, as far as it is known.
        """
        layout = self._writers_of(action)
        renumbered = layout != self._layout_of(action)
        nodes = self._filled.get(action.snapshot_generation, ()) if renumbered else action.nodes
        copies = placement.slots_of_shard(layout, placement.shard_of(layout, slot))
        at = ((copy, nodes[copy // layout.slots_per_node]) for copy in (copies if nodes else ()))
        replica = next((pair for pair in at if pair[1] not in without and (renumbered or pair[0] != slot)), None)
        keeper = self._keepers.get(slot)
        kept = (slot, keeper) if keeper is not None and keeper not in without else None
        asked = [pair for pair in (replica, kept) if pair is not None and pair[1] in self._agents]
        return tuple(self._holder(node, copy) for copy, node in asked)

    def _kept_by(self, action: OpenGeneration) -> dict[int, str]:
        """Slot to the node that keeps copies of its snapshots."""
        return {
            slot: action.nodes[keeper]
            for place, keeper in enumerate(action.buddies)
            for slot in placement.slots_of(self._spec().layout, place)
        }

    def _holder(self, node: str, slot: int) -> contract.Holder:
        return contract.Holder(node=node, address=self._address(node), ray_node=self._agent(node).ray_node, slot=slot)
