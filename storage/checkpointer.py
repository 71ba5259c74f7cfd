"""What the training loop sees of storage: snapshot every few steps, save now and then, restore once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Protocol, TypeVar

from torch import Tensor, distributed

from storage.blocks import BadBlock, Copy, Distance, Holder, SourceError
from storage.commits import read_commit
from storage.direct import Buffers
from storage.durable import CheckpointFailed, load, save_part
from storage.durable_write import Writer
from storage.local import LocalTier
from storage.manifest import WRITE_DEADLINE_S, Commit, ManifestError, RankPart
from storage.ram import copies_by_slot, copies_of, drop_newer
from storage.ranks import agree, agreed
from storage.restore import load_copies
from storage.save_plan import Planned
from storage.snapshots import RamTier, tensors_of
from storage.staging import Staging
from storage.state import TrainState, local_tensor
from storage.urls import StoreError, portable_errors

log = logging.getLogger(__name__)
T = TypeVar("T")

# Longest that one rank waits for another in a save: for its write, and as long again for its checks and its planning.
GROUP_TIMEOUT_S = 2 * WRITE_DEADLINE_S
# Longest that a save takes to end one way or the other: planning and writing wait for the group twice each.
SAVE_DEADLINE_S = 4 * GROUP_TIMEOUT_S

# Longest from a save's being abandoned to its end: half a second each for the store to write and to remove, the rest
# for a busy machine. One that gloo has forgotten in an exchange (trainer/link.py) never ends.
ABANDONED_END_S = 1.5

# Waits between tries to read a checkpoint: a store that restarts or is overloaded by so many ranks is back in seconds.
LOAD_RETRIES_S = (2.0, 5.0, 10.0, 20.0)

Unchanged = Callable[[Mapping[str, Tensor]], list[str]]
"""Given this rank's local tensors by name, the names of those that are not what the last step has left."""

Sound = Callable[[Iterable[tuple[str, Tensor]]], None]
"""Given what a snapshot holds (`storage.snapshots.tensors_of`): raises ManifestError when it must not be restored."""


class Source(Protocol):
    """Where to restore from; trainer.contract.Restore is one."""

    @property
    def source(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def generation(self) -> int:
        """That wrote the snapshot, for ``ram``."""
        ...

    @property
    def commit(self) -> str: ...
    @property
    def slots(self) -> tuple[int, ...]:
        """For ``ram``: see `RamTier.restore`."""
        ...

    @property
    def reshard(self) -> bool:
        """For ``ram``: the snapshots are of a mesh that cut the state otherwise; see `Checkpointer.restore`."""
        ...


class Checkpointer:
    """Storage of one rank (its slot's number) in one generation, under the run's `url` and the node's `ram_dir`.

    Made by all ranks together: saves talk over a process group of their own, because training uses the default one at
    the same time.
    """

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
        copies: bool = False,
        local_dir: str = "",
        keep: int = 3,
        before: threading.Thread | None = None,
    ) -> None:
        """With `copies`, snapshots are copied to other nodes. `local_dir` of this node keeps its parts of the `keep`
        newest checkpoints, too; empty: it does not. `before`: see `hanging`."""
        assert 0 <= rank < world_size, (rank, world_size)
        self._url, self._run, self._rank = url, run, rank
        self._epoch, self._generation = epoch, generation
        self._ram_dir, self._node = ram_dir, node
        self._ram = RamTier(ram_dir, run, node, rank, generation=generation, copies=copies)
        self._staging = Staging()
        self._buffers = Buffers()
        self._planned = Planned()
        self._local = LocalTier.of(local_dir, run, url, keep)
        self._saving = threading.Thread()
        self._before = before or threading.Thread()
        self._writer: Writer | None = None
        """Of the newest save that has got as far as the store."""
        self._told = threading.Event()
        self._told.set()
        self._abandoned = threading.Event()
        self._group: distributed.ProcessGroup | None = None
        if distributed.is_initialized():
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=GROUP_TIMEOUT_S))

    @property
    def newest_snapshot(self) -> int:
        """Step of this rank's newest complete snapshot; 0 when there is none."""
        return self._ram.newest

    def snapshot(self, state: TrainState, done: Callable[[Exception | None], None] = lambda error: None) -> None:
        """Copy this rank's state into the node's shared memory; blocks for the copy.

        The live tensors must not change before `await_reads`. Before another rank may count on this snapshot,
        `await_snapshot` must have returned.

        Args:
            done: see `RamTier.snapshot`.

        Raises:
            OSError: the memory file system is full.
        """
        self._ram.snapshot(state, done)

    def await_snapshot(self) -> None:
        """Until the last snapshot is complete, or has failed. Raises TimeoutError when it takes far too long."""
        self._ram.wait()

    def pin_snapshots(self, *steps: int) -> None:
        """Keep the snapshots of these steps until others are pinned."""
        self._ram.pin(*steps)

    @property
    def busy(self) -> bool:
        """Whether a save is under way, or one that has failed still hangs in the store: memory holds one copy."""
        return self._saving.is_alive() or self._before.is_alive()

    @property
    def hanging(self) -> threading.Thread:
        """Alive as long as the store has a save in its hands: once this is closed, what the next one has `before`."""
        return self._before if self._before.is_alive() else self._saving

    def begin_save(
        self, state: TrainState, unchanged: Unchanged | None, done: Callable[[RankPart | Exception], None]
    ) -> None:
        """Copy this rank's state, and write its part of the durable checkpoint from the copy while training goes on.

        Blocks for the copy. Every rank begins the save of the same step, and none while it is `busy`. The live tensors
        must not change before `await_reads`.

        Args:
            unchanged: asked about the copy once its digests are taken; when it names any, the save fails.
            done: called from the saving thread with the part, or with the reason why nothing may be committed.
        """
        assert not self.busy, "one save at a time"
        copy = TrainState(state.step, {}, {})
        failure: RuntimeError | MemoryError | None = None
        try:
            copy = self._staging.copy(state)
        except (RuntimeError, MemoryError) as error:
            failure = error  # told by the thread, which must meet the other ranks' in any case

        def check() -> None:
            try:
                _check_unchanged(copy, unchanged)
            except ManifestError:
                self._staging.forget()  # it may be the copy's memory that is bad: the next one gets another
                raise

        def save() -> None:
            nonlocal failure
            try:
                self._staging.wait()
            except RuntimeError as error:
                failure = error
            writer = self._writer = self._make_writer(copy.step)
            try:
                done(self._save_part_or_error(writer, copy, check, failure))
            finally:
                self._told.set()
            writer.linger()

        self._told.clear()
        self._saving = threading.Thread(target=save, name="save", daemon=True)
        self._saving.start()

    def _save_part_or_error(
        self, writer: Writer, state: TrainState, check: Callable[[], None], failure: Exception | None
    ) -> RankPart | Exception:
        """In a frame of its own: when it is told, nothing holds the process group any more."""
        try:
            return save_part(
                writer, state, self._rank, check=check, failure=failure, group=self._group, planned=self._planned
            )
        except Exception as error:
            return error

    def await_reads(self) -> None:
        """Before the live tensors change: let the copies that were begun read them first."""
        self._staging.await_reads()
        self._ram.await_reads()

    def wait(self) -> None:
        """Until the save that was begun last has called `done`.

        Raises:
            TimeoutError: it has not come to an end in SAVE_DEADLINE_S.
        """
        if not self._told.wait(SAVE_DEADLINE_S):
            raise TimeoutError(f"a save has not come to an end in {SAVE_DEADLINE_S:g} s")

    def save(self, state: TrainState, unchanged: Unchanged | None = None) -> RankPart:
        """Write this rank's part of the durable checkpoint of ``state.step``; durable when this returns. Collective.

        After `wait`, since two saves cannot use the process group at once.

        Raises:
            ManifestError, CheckpointFailed: nothing may be committed; training can go on.
        """
        assert self._told.is_set(), "one save at a time"
        before, writer, failure = self._writer, self._make_writer(state.step), None
        if before is not None and before.step == state.step and before.hangs:  # it would come back to the same names
            failure = StoreError("the save before still waits for the store")
        else:
            self._writer = writer
        return save_part(
            writer,
            state,
            self._rank,
            check=lambda: _check_unchanged(state, unchanged),
            failure=failure,
            group=self._group,
            planned=self._planned,
        )

    def close(self, deadline_s: float) -> bool:
        """Let the snapshot that is being taken be completed, and abandon the save; whether both have ended in time.

        Afterwards nothing here is used any more. A save that waits for other ranks ends when its process group breaks.
        One that waits for the store ends as well, and its request is left to itself, see `hanging`; once, so that a
        store which never answers does not keep a process from saving for good.
        """
        deadline = time.monotonic() + deadline_s
        self._abandoned.set()
        closed = self._ram.close(deadline_s)
        told = self._told.wait(min(ABANDONED_END_S, max(0.0, deadline - time.monotonic())))
        self._group = None
        return closed and told and not self._before.is_alive()

    def _make_writer(self, step: int) -> Writer:
        return Writer(
            self._url,
            step=step,
            epoch=self._epoch,
            generation=self._generation,
            rank=self._rank,
            buffers=self._buffers,
            local=self._local,
            abandoned=self._abandoned,
        )

    def restore(
        self,
        state: TrainState,
        restore: Source,
        holders: Sequence[Holder] = (),
        bad: list[BadBlock] | None = None,
        sound: Sound | None = None,
    ) -> None:
        """Fill `state` in place and set its step. Collective when the source is ``durable``, or ``ram`` to reshard:
        then each rank reads what its node holds of the snapshots, and sends the others what they need of it. Per-rank
        values stay.

        Afterwards the tier holds no snapshot of a later step: it would belong to a history that was given up.

        Args:
            holders: who may have blocks that are damaged in this node's memory.
            bad: what is found damaged there, and at them, is added here.
            sound: asked about each snapshot that is resharded.

        Raises:
            ManifestError: the source is missing, damaged or of another state.
            CheckpointFailed, StoreError: a rank could not read the durable checkpoint.

        After an error the state is as it was, or, where a restore that is collective turned out to be damaged or out of
        reach only while its data was read, spoilt (`storage.state.spoil`).
        """
        if restore.source == "ram" and restore.reshard:
            found = self._reshard(restore, state, holders, sound)
            if bad is not None:
                bad += found
        elif restore.source == "ram":
            self._ram.restore(restore.step, state, holders, bad, generation=restore.generation, slots=restore.slots)
        elif restore.source == "durable":
            commit = _asked_again(lambda: self._assigned(restore), StoreError)
            # A failure is every rank's, so all try again together.
            for damaged in _asked_again(lambda: self._load(commit, state), CheckpointFailed):
                log.warning("read from another copy: %s", damaged)
        elif restore.source == "init":
            state.step = 0
        else:
            raise ValueError(f"restore.source {restore.source!r} is not one of init, ram, durable")
        drop_newer(self._ram_dir, self._run, self._node, state.step, slot=self._rank)

    def _reshard(
        self, restore: Source, state: TrainState, holders: Sequence[Holder], sound: Sound | None
    ) -> list[BadBlock]:
        """Of the holders, those of a slot that this node has serve for what is damaged in it."""
        own: dict[int, Copy] = {}
        error: Exception | None = None
        try:
            own = copies_by_slot(self._ram_dir, self._run, self._node, restore.generation, restore.step)
        except (ManifestError, SourceError) as e:
            error = e
        try:
            told = agreed((self._node, list(own)), error, self._group)
            slots = sorted({slot for _, held in told for slot in held})
            if not slots:
                raise ManifestError(f"no node holds step {restore.step} that generation {restore.generation} wrote")
            if sound is not None:
                beside = [rank for rank, (node, _) in enumerate(told) if node == self._node]
                agree(_unsound(list(own.values())[beside.index(self._rank) :: len(beside)], sound), self._group)
            parts = [_with_others(own[slot], slot, holders) if slot in own else [] for slot in slots]
            return load_copies(parts, state, per_rank=False, group=self._group)
        except CheckpointFailed as e:  # what has gone from memory does not come back, as a store does
            raise ManifestError(f"the nodes' memory cannot be read: {e}") from e

    def _load(self, commit: Commit, state: TrainState) -> list[BadBlock]:
        near = copies_of(self._ram_dir, self._run, self._node, commit.step)
        return load(self._url, commit, state, group=self._group, local=self._local, near=near)

    def _assigned(self, restore: Source) -> Commit:
        with portable_errors():
            try:
                commit = read_commit(self._url, restore.commit)
            except FileNotFoundError as error:
                raise ManifestError(f"{restore.commit} is not there any more") from error
        if commit.step != restore.step:
            raise ManifestError(f"{restore.commit} holds step {commit.step}, step {restore.step} was assigned")
        return commit


def _unsound(copies: Sequence[Copy], sound: Sound) -> Exception | None:
    try:
        for copy in copies:
            sound(tensors_of(copy))
    except (ManifestError, SourceError) as error:
        return error
    return None


def _with_others(own: Copy, slot: int, holders: Sequence[Holder]) -> list[Copy]:
    """A node's own copy of a slot's snapshot, and, for what is damaged in it, the same files elsewhere."""
    return [own, *(Copy(own.index, holder, Distance.PEER) for holder in holders if holder.slot == slot)]


def _asked_again(read: Callable[[], T], failures: type[Exception]) -> T:
    """What `read` brings from the store; tried again, within bounds, after one of `failures`."""
    for wait_s in LOAD_RETRIES_S:
        try:
            return read()
        except failures as error:
            log.warning("the store failed, tried again in %g s: %s", wait_s, error)
            time.sleep(wait_s)
    return read()


def _check_unchanged(state: TrainState, unchanged: Unchanged | None) -> None:
    if unchanged is None:
        return
    names = unchanged({name: local_tensor(tensor) for name, tensor in state.tensors.items()})
    if names:
        raise ManifestError(f"state changed at rest: {', '.join(names[:4])} ({len(names)} of {len(state.tensors)})")
