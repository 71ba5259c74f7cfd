"""What the training loop sees of storage: snapshot every few steps, save now and then, restore once."""

from __future__ import annotations

from typing import Protocol

from storage.commits import read_commit
from storage.durable import load, write_part
from storage.manifest import ManifestError, RankPart
from storage.ram import drop_newer
from storage.snapshots import RamTier
from storage.state import TrainState


class Source(Protocol):
    """Where to restore from; trainer.contract.Restore is one."""

    @property
    def source(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def commit(self) -> str: ...


class Checkpointer:
    """Storage of one rank (its slot's number) in one generation, under the run's `url` and the node's `ram_dir`."""

    def __init__(
        self,
        *,
        url: str,
        run: str,
        rank: int,
        world_size: int,
        epoch: int,
        generation: int,
        ram_dir: str,
        node: str,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        self._url, self._run, self._rank = url, run, rank
        self._epoch, self._generation = epoch, generation
        self._ram_dir, self._node = ram_dir, node
        self._ram = RamTier(ram_dir, run, node, rank, generation=generation)

    @property
    def newest_snapshot(self) -> int:
        """Step of this rank's newest complete snapshot; 0 when there is none."""
        return self._ram.newest

    def snapshot(self, state: TrainState) -> None:
        """Copy this rank's state into the node's shared memory; blocks for one copy and one digest.

        Raises:
            OSError: the memory file system is full.
        """
        self._ram.snapshot(state)

    def save(self, state: TrainState) -> RankPart:
        """Write this rank's part of the durable checkpoint of ``state.step``. Collective; see durable.write_part.

        Raises:
            ManifestError, CheckpointFailed: nothing may be committed; training can go on.
        """
        return write_part(
            self._url, state, step=state.step, epoch=self._epoch, generation=self._generation, rank=self._rank
        )

    def restore(self, state: TrainState, restore: Source) -> None:
        """Fill `state` in place and set its step. Collective when the source is ``durable``.

        Afterwards the tier holds no snapshot of a later step: it would belong to a history that was given up.

        Raises:
            ManifestError: the source is missing, damaged or of another state. No tensor has changed.
            CheckpointFailed: a rank could not read the durable checkpoint. No tensor has changed.
        """
        if restore.source == "ram":
            self._ram.restore(restore.step, state)
        elif restore.source == "durable":
            commit = read_commit(self._url, restore.commit)
            if commit.step != restore.step:
                raise ManifestError(f"{restore.commit} holds step {commit.step}, step {restore.step} was assigned")
            load(self._url, commit, state)
        elif restore.source == "init":
            state.step = 0
        else:
            raise ValueError(f"restore.source {restore.source!r} is not one of init, ram, durable")
        drop_newer(self._ram_dir, self._run, self._node, state.step, slot=self._rank)
