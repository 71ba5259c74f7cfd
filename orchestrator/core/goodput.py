"""The ledger: every microsecond of every node carries exactly one label.

A run pays for a fixed number of *places* (the mesh's nodes and the spares) from its declaration to its end, so the
labels add up to wall-clock x places exactly, in integers, whatever happened. Nodes of one kind share their label, so
the ledger keeps counts, not nodes: an event costs the same at 5 nodes and at 12,500.

While the mesh trains, its time is *pending* until it is known what came of it. Completed steps settle it: the first
execution of a step is productive, any later one recomputed, less the stalls that the slowest rank reported. A failure
settles it as detection: the step in flight and the time until the failure was noticed. A settled label never changes,
so every counter only grows.

    goodput = productive / all, spares and lost places included
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trainer.contract import PROCESSES

Label = Literal[
    "productive",
    "recomputed",
    "detection",
    "recovery",
    "provisioning",
    "start_up",
    "data_wait",
    "checkpoint_stall",
    "validation",
    "straggling",
    "waiting_for_nodes",
    "idle_spare",
    "degraded_capacity",
    "paused",
    "other",
]

LABELS: dict[Label, str] = {
    "productive": "first execution of a step that completed",
    "recomputed": "execution of a step that had been completed before and was lost",
    "detection": "the step in flight when something failed, and the time until that was noticed",
    "recovery": "from the notice of a failure, or of a planned change, until all ranks stand before a first step again",
    "provisioning": "places without a ready node before the first generation",
    "start_up": "the first generation: worker start, rendezvous, model, restore",
    "data_wait": "ranks waiting for their batch",
    "checkpoint_stall": "training blocked by snapshots and saves",
    "validation": "passes over the held-out documents",
    "straggling": "ranks waiting for one that computes more slowly",
    "waiting_for_nodes": "ready nodes that wait because the mesh cannot be filled",
    "idle_spare": "ready nodes kept as spares",
    "degraded_capacity": "places whose node is lost or quarantined, and nodes that a shrunk mesh has no use for",
    "paused": "between the end of a run and its resume",
    "other": "everything else",
}

# While the mesh's nodes do one of these, there are no spares: every ready node waits for the same thing.
_OF_EVERY_NODE: tuple[Label, ...] = ("provisioning", "paused", "waiting_for_nodes")


@dataclass
class Ledger:
    places: int = 0
    owed: int = 0
    """Wall-clock x places so far: what the labels must add up to."""
    mark: int = 0
    """Everything up to here is settled, but for the pending time of the mesh."""
    pending_since: int | None = None
    """Start of the mesh's unsettled training time; None when the mesh is not training."""
    mesh_nodes: int = 0
    spare_nodes: int = 0
    mesh_label: Label = "provisioning"
    """What the mesh's nodes are doing when they are not training."""
    idle_label: Label = "idle_spare"
    """What a ready node beyond those of the mesh counts as, unless all ready nodes wait for the same thing."""
    empty_label: Label = "provisioning"
    """What a place without a usable node counts as."""
    totals: dict[Label, int] = field(default_factory=lambda: dict.fromkeys(LABELS, 0))
    processes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PROCESSES, 0))
    """How many slots of all generations that came up were filled by which kind of process."""

    def advance(self, at: int) -> None:
        """Settle all that needs no further knowledge, up to `at`."""
        assert at >= self.mark, (at, self.mark)
        span, self.mark = at - self.mark, at
        self.owed += span * self.places
        spare_label: Label = self.mesh_label if self.mesh_label in _OF_EVERY_NODE else self.idle_label
        self.totals[spare_label] += span * self.spare_nodes
        self.totals[self.empty_label] += span * (self.places - self.mesh_nodes - self.spare_nodes)
        if self.pending_since is None:
            self.totals[self.mesh_label] += span * self.mesh_nodes

    def train(self) -> None:
        """From now on the mesh trains: its time is pending until `settle_steps` or `settle`."""
        assert self.pending_since is None
        self.pending_since = self.mark

    def settle_steps(self, steps: int, new_steps: int, stalls: dict[Label, int]) -> int:
        """Label the pending time: `steps` completed in it, `new_steps` of them for the first time.

        Stalls are microseconds of the slowest rank; what a clock could not have held is cut off. Returns the
        node-microseconds that went into recomputed steps.
        """
        assert self.pending_since is not None and 0 <= new_steps <= steps and steps > 0
        rest = self.mark - self.pending_since
        self.pending_since = self.mark
        for label, stall in stalls.items():
            stall = min(stall, rest)
            self.totals[label] += stall * self.mesh_nodes
            rest -= stall
        productive = rest * new_steps // steps
        self.totals["productive"] += productive * self.mesh_nodes
        self.totals["recomputed"] += (rest - productive) * self.mesh_nodes
        return (rest - productive) * self.mesh_nodes

    def settle(self, label: Label, then: Label) -> int:
        """The mesh stops training: its pending time gets `label`, its time from now on `then`. Returns node-µs."""
        span = 0 if self.pending_since is None else self.mark - self.pending_since
        self.totals[label] += span * self.mesh_nodes
        self.pending_since = None
        self.mesh_label = then
        return span * self.mesh_nodes

    def fill(self, processes: Mapping[str, int]) -> None:
        """A generation has come up with these."""
        for process, slots in processes.items():
            self.processes[process] = self.processes.get(process, 0) + slots

    def populate(self, mesh_nodes: int, spare_nodes: int) -> None:
        """From now on this many places hold nodes of the mesh, and this many hold spares."""
        assert self.pending_since is None or mesh_nodes == self.mesh_nodes, "settle before the mesh changes"
        assert mesh_nodes >= 0 and spare_nodes >= 0 and mesh_nodes + spare_nodes <= self.places
        self.mesh_nodes, self.spare_nodes = mesh_nodes, spare_nodes

    @property
    def pending_us(self) -> int:
        return 0 if self.pending_since is None else (self.mark - self.pending_since) * self.mesh_nodes

    def check(self) -> None:
        """The labels and the pending time add up to wall-clock x places."""
        total = sum(self.totals.values()) + self.pending_us
        assert total == self.owed, (total, self.owed)
