"""What a node is told to run, and what it tells of a worker's end. No torch: the controller starts without it."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer import contract


@dataclass(frozen=True, kw_only=True)
class NodeAssignment:
    """One node's part in a generation, as the controller planned it."""

    epoch: int
    generation: int
    group_rank: int
    """Number of this node among the nodes of the generation; 0 holds the store."""
    group_world_size: int
    ranks: tuple[int, ...]
    """The slots that this node fills: contiguous, ascending, none of them another node's."""
    world_size: int
    store_host: str
    store_port: int
    restore: contract.Restore
    config: contract.WorkerConfig
    ram_dir: str
    code: str = ""
    """Names the code that the workers import (code.py); empty: the installed one."""
    keeper: str = ""
    """Address of the agent that keeps copies of this node's snapshots; empty: nobody's are kept."""
    copied_step: int = 0
    """See contract.Assign, as the two that follow. From the controller: it may be after the step of the restore."""
    holders: dict[int, tuple[contract.Holder, ...]] = field(default_factory=dict)
    """By rank."""
    snapshot_slots: dict[int, range] = field(default_factory=dict)
    """By rank, see contract.Restore.slots; empty where the snapshots are of the same mesh, or of other shards."""
    token: str = field(default="", repr=False)

    def check(self, slots: int) -> None:
        """Raises ValueError when this cannot be an assignment of a node with so many slots."""
        if self.ranks != tuple(range(self.ranks[0], self.ranks[0] + len(self.ranks))) if self.ranks else True:
            raise ValueError(f"ranks {self.ranks} of generation {self.generation} must be contiguous and not empty")
        if len(self.ranks) > slots or self.ranks[-1] >= self.world_size or self.ranks[0] < 0:
            raise ValueError(f"ranks {self.ranks} do not fit {slots} slots and world_size {self.world_size}")
        if not 0 <= self.group_rank < self.group_world_size:
            raise ValueError(f"group_rank {self.group_rank} is not below group_world_size {self.group_world_size}")


@dataclass(frozen=True, kw_only=True)
class WorkerExit:
    """A worker ended by itself or was killed by somebody else, or (pid 0, `error` set) could not be started."""

    generation: int
    rank: int
    pid: int
    exit_code: int | None
    signal: int | None
    error: str = ""
