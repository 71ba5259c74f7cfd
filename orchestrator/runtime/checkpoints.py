"""What the supervisor orders about checkpoints under run.url: commits, deletions, verification and statements.

It holds no judgement: every order becomes a task with a deadline, and what comes of it is an event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from orchestrator.core import events as ev
from orchestrator.core.actions import CommitCheckpoint, PublishTrust, VerifyCheckpoint
from orchestrator.core.events import Layout
from orchestrator.runtime.journal import JournalError, check_not_replaced
from orchestrator.runtime.nodes import AgentHandle, call
from orchestrator.runtime.reading import Reading
from orchestrator.runtime.reports import MeshFold
from storage import pins, statements
from storage.commits import CommitConflict, create_commit, delete_checkpoint, prune, read_commit
from storage.manifest import Commit, ManifestError, RankPart, writers_epoch
from storage.statements import Statement

logger = logging.getLogger(__name__)

COMMIT_DEADLINE_S = 60.0
COMMIT_RETRIES_S = (1.0, 5.0, 15.0)
"""Waits between tries of one commit. Its order was journaled under the same run.url a moment before, so a store that
fails now is likely to be back; beyond that, the next save serves."""
DELETE_DEADLINE_S = 600.0
"""For the files of one old checkpoint; a store deletes some thousand objects a minute."""
VERIFY_DEADLINE_S = 7 * 24 * 3600.0
"""For a node to read a checkpoint back. The supervisor's own patience, which goes by the checkpoint's size, is over
long before; this one ends what nobody waits for any more."""
PUBLISH_DEADLINE_S = 60.0
"""For one statement on a checkpoint; a record of a kilobyte."""
PARTS_DEADLINE_S = 30.0
"""For agents to tell a controller that came back which parts of a checkpoint they have written."""


class CheckpointOrders:
    """Of one controller, in its epoch."""

    def __init__(
        self,
        run: str,
        url: str,
        epoch: int,
        trained: Callable[[], tuple[MeshFold | None, Layout, str]],
        agent: Callable[[str], AgentHandle],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[Any]],
        post: Callable[[ev.Event], None],
        notice: Callable[[str], None],
    ) -> None:
        """
        Args:
            trained: the newest generation, which hears of each rank's part, its mesh, and the digest of the run's data.
            agent: of a node; raises when the node has none.
        """
        self._run, self._url, self._epoch = run, url, epoch
        self._trained, self._agent = trained, agent
        self._spawn, self._post, self._notice = spawn, post, notice
        self._retired: dict[int, None] = {}
        """Steps of checkpoints that are to be deleted, and are not yet."""
        self._unsaid: dict[tuple[int, int], Statement] = {}
        """By step and generation: what is to be said of checkpoints under run.url, and is not yet."""
        self._put_off: set[tuple[int, int]] = set()
        """Those of them that have been tried since the last was added."""
        self._saying: asyncio.Task[Any] | None = None

    async def commit(self, action: CommitCheckpoint) -> None:
        """The checkpoint exists when its record does; only the newest controller may make it."""
        step, generation = action.step, action.generation
        try:
            fold, parts = await self._parts(action)
            _, mesh, data_digest = self._trained()
            rank_parts = tuple(RankPart(**parts[rank]) for rank in sorted(parts))
            commit = Commit(
                run=self._run,
                step=step,
                epoch=writers_epoch(rank_parts),
                generation=generation,
                mesh={"pp": mesh.pp, "dp_replicate": mesh.dp_replicate, "dp_shard": mesh.dp_shard, "tp": mesh.tp},
                parts=rank_parts,
                versions=fold.versions | {"data": data_digest},
            )
            generation = await self._create(commit, action.replaces_damaged)
        except Exception as e:
            self._notice(f"checkpoint of step {step} was not committed: {e or repr(e)}")
            self._post(ev.CheckpointFailed(at=0, step=step, error=f"{type(e).__name__}: {e}"))
            return
        self._post(ev.CheckpointCommitted(at=0, step=step, epoch=action.epoch, generation=generation))

    async def _create(self, commit: Commit, replaces_damaged: bool) -> int:
        """The generation of the record that stands then. Idempotent, so it is tried again while the store fails."""
        for wait_s in (*COMMIT_RETRIES_S, None):
            work = asyncio.to_thread(_create, self._url, commit, self._epoch, replaces_damaged)
            try:
                return await asyncio.wait_for(work, COMMIT_DEADLINE_S)
            except (JournalError, TimeoutError):  # a thread that hangs may still come to it: not two at once
                raise
            except Exception as e:
                if wait_s is None:
                    raise
                logger.warning("checkpoint of step %d is not committed yet: %r", commit.step, e)
                await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

    async def _parts(self, action: CommitCheckpoint) -> tuple[MeshFold, dict[int, dict[str, Any]]]:
        """Every rank's part; after a controller's restart the agents tell them again, a moment later."""
        deadline = time.monotonic() + PARTS_DEADLINE_S
        while True:
            fold, _, _ = self._trained()
            if fold is None or fold.generation != action.generation:
                raise RuntimeError("its generation is over, and this controller came after its parts were told")
            parts = fold.parts.get(action.step, {})
            if len(parts) == fold.ranks:
                return fold, dict(parts)
            if time.monotonic() > deadline:
                raise RuntimeError(f"only {len(parts)} of its parts were told")
            await asyncio.sleep(0.2)

    async def delete(self, step: int) -> None:
        """One that cannot be deleted costs space, no more; the next order and the next controller try it again."""
        self._retired[step] = None
        steps = tuple(self._retired)
        for key in [key for key in self._unsaid if key[0] in steps]:
            del self._unsaid[key]
        try:
            work = asyncio.to_thread(_delete_all, self._url, steps)
            pinned = await asyncio.wait_for(work, DELETE_DEADLINE_S)
        except Exception as e:
            logger.warning("checkpoints of steps %s were not all deleted: %r", steps, e)
            return
        for step in steps:
            self._retired.pop(step, None)
        if not pinned.isdisjoint(steps):
            self._post(ev.CheckpointsPinned(at=0, steps=tuple(sorted(pinned))))

    async def verify(self, action: VerifyCheckpoint) -> None:
        """Have a node read a checkpoint back. A node that dies over it is told of by its line."""
        try:
            reading = await call(self._agent(action.node).actor.verify.remote(self._epoch, action), VERIFY_DEADLINE_S)
        except Exception as e:
            logger.warning("%s does not read the checkpoint of step %d: %r", action.node, action.step, e)
            reading = Reading(unread=type(e).__name__)
        self._post(
            ev.CheckpointVerified(
                at=0,
                number=action.number,
                step=action.step,
                generation=action.generation,
                node=action.node,
                bytes=reading.bytes,
                read_us=reading.read_us,
                problems=reading.problems,
                unread=reading.unread,
            )
        )

    def publish(self, action: PublishTrust) -> None:
        """Say under run.url what a checkpoint is worth, as soon as the store takes it."""
        self._unsaid[action.step, action.generation] = Statement(
            step=action.step,
            generation=action.generation,
            epoch=action.epoch,
            trust=action.trust,
            at_unix_s=int(time.time()),
            by=action.by,
            detail=action.detail,
            certificate=action.certificate,
        )
        self._put_off.clear()
        if self._saying is None or self._saying.done():
            self._saying = self._spawn(self._say())

    async def _say(self) -> None:
        """What cannot be written now is with the next, and keeps nothing else from being written."""
        while left := [key for key in self._unsaid if key not in self._put_off]:
            key, statement = left[0], self._unsaid[left[0]]
            self._put_off.add(key)
            try:
                work = asyncio.to_thread(statements.write, self._url, statement)
                await asyncio.wait_for(work, PUBLISH_DEADLINE_S)
            except Exception as e:
                logger.warning("%s is not published yet: %r", statement.name, e)
                if isinstance(e, TimeoutError):  # the store stands still, and so would a thread for each
                    return
                continue
            if self._unsaid.get(key) is statement:
                del self._unsaid[key]


def _create(url: str, commit: Commit, epoch: int, replaces_damaged: bool) -> int:
    """Create the record of `commit`; returns the generation of the record that stands then. Blocks."""
    check_not_replaced(url, epoch)
    if replaces_damaged:
        _remove_damaged(url, commit.step, commit.generation)
    try:
        create_commit(url, commit)
    except CommitConflict:
        # The step was committed before, by a generation whose answer was lost: that one stands.
        return read_commit(url, commit.step).generation
    return commit.generation


def _delete_all(url: str, steps: Sequence[int]) -> set[int]:
    """Delete checkpoints that are not pinned, and what saves up to their steps have left: those under way are of later
    steps. The steps that are pinned. Blocks."""
    pinned = pins.pinned(url)
    for step in steps:
        if step not in pinned:
            delete_checkpoint(url, step)
    prune(url, max(steps))
    return pinned


def _remove_damaged(url: str, step: int, generation: int) -> None:
    """Make room for the checkpoint of `step` by `generation`: remove an older generation's, which was found damaged."""
    try:
        if read_commit(url, step).generation == generation:
            return  # this order came before
    except FileNotFoundError:
        return
    except ManifestError as e:
        logger.warning("the damaged record of step %d is removed: %s", step, e)
    delete_checkpoint(url, step)
