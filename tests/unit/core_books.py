"""The checkpoints as an onlooker knows them: from what the core was told of them, and what it has ordered."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.core import actions as ac
from orchestrator.core import events as ev


class Books:
    def __init__(self, keep: int) -> None:
        self._keep = keep
        self.committed: dict[int, int] = {}
        """Steps that may be restored from, to the generation that wrote them; 0 when that was not told."""
        self.deleted: set[int] = set()
        """Steps whose deletion was ordered, until they are committed anew or a controller finds their record again."""
        self.failed = 0
        self.failing = False
        """A save has failed, and none was committed since."""
        self._ordered: dict[int, ac.CommitCheckpoint] = {}
        """Commits that were ordered and not answered."""
        self.read: set[int] = set()
        """Steps that were found whole since they were committed: by a node that was asked."""
        self._certificates: set[int] = set()
        """Steps whose checkpoint as it stands has a certificate."""
        self.doubts: dict[int, tuple[str, bool]] = {}
        """Steps that one node has found damaged, and whether it has read that itself; another is to say."""
        self.pinned: set[int] = set()
        self._damaged: dict[int, int] = {}
        self._gone: dict[int, int] = {}
        """Steps whose deletion was ordered by this controller, to their generation: those that are pinned are there."""
        self._distrusted: dict[int, str] = {}
        """Steps whose record was refused by a worker ("damaged") or may hold corrupt state ("revoked")."""

    def good(self, last_step: int) -> list[int]:
        """What the run may restore from, ascending."""
        return sorted(step for step in self.committed if step <= last_step)

    def certified(self) -> list[int]:
        """Those that were found whole, ascending."""
        return sorted(self._certificates & self.read & set(self.committed))

    def learn(self, event: ev.Event) -> None:
        match event:
            case ev.RunDeclared():  # whoever resumes has looked at what is damaged: it is tried again
                kept = {s for s, why in self._distrusted.items() if why == "revoked" or s in self._ordered}
                self._certificates -= set(self._distrusted) - kept
                self._distrusted = {step: self._distrusted[step] for step in kept}
                self.read -= set(self.doubts)
                self.doubts = {}
            case ev.CheckpointCommitted() if event.step in self._ordered:
                order = self._ordered[event.step]
                if not order.replaces_damaged or order.generation == event.generation:
                    del self._ordered[event.step]
                    self._distrusted.pop(event.step, None)
                    self.deleted.discard(event.step)
                    self.read.discard(event.step)
                    self._certificates.discard(event.step)
                    self._gone.pop(event.step, None)
                    self.committed[event.step] = event.generation
                    self.failing = False
            case ev.CheckpointFailed():
                self._ordered.pop(event.step, None)
                self.failed, self.failing = self.failed + 1, True
            case ev.CheckpointsFound():
                self._find(event.steps)
            case ev.CheckpointCertified() if self.committed.get(event.step) == event.generation:
                self._certificates.add(event.step)
            case ev.CheckpointsPinned():
                self.pinned = set(event.steps)
                for step in self.pinned & set(self._gone):
                    self._come_back(step, self._gone.pop(step))

    def _come_back(self, step: int, generation: int) -> None:
        if step in self.committed or step in self._ordered or step in self._distrusted:
            return
        self.deleted.discard(step)
        if generation < 0:
            self._distrusted[step] = "revoked"
        else:
            self.committed[step] = generation

    def _find(self, steps: tuple[int, ...]) -> None:
        replacing = {step for step, order in self._ordered.items() if order.replaces_damaged}
        self._distrusted = {s: why for s, why in self._distrusted.items() if s in steps or s in replacing}
        known = self.committed | {step: order.generation for step, order in self._ordered.items()}
        self.committed = {step: known.get(step, 0) for step in steps if step not in self._distrusted}
        self._ordered = {step: order for step, order in self._ordered.items() if step not in self.committed}
        self.deleted -= set(steps)
        still = set(self.committed) & set(known)  # of others nobody knows who wrote them, or what was thought of them
        self._gone, self.read, self._certificates = {}, self.read & still, self._certificates & still

    def commit(self, order: ac.CommitCheckpoint) -> None:
        assert order.replaces_damaged == (order.step in self._distrusted), "what stands in its way is not told"
        assert order.step not in self.committed, "it is committed already"
        self.doubts.pop(order.step, None)
        self._ordered[order.step] = order

    def refuse(self, step: int) -> bool:
        """Whether it was trusted until now."""
        generation = self.committed.pop(step, None)
        if generation is not None:
            self._distrusted[step], self._damaged[step] = "damaged", generation
            self.read.discard(step)
        return generation is not None

    def find_whole(self, step: int) -> None:
        """Also one that was called damaged, if that was in doubt."""
        if step in self.doubts and self._distrusted.get(step) == "damaged":
            del self._distrusted[step]
            self.committed[step] = self._damaged[step]
        self.doubts.pop(step, None)
        if step in self.committed:
            self.read.add(step)

    def find_bad(self, step: int, node: str) -> None:
        """One node's word is a doubt, another's settles it."""
        if step not in self.doubts:
            if step in self.committed:
                self.doubts[step] = (node, True)
            return
        del self.doubts[step]
        self.refuse(step)

    def revoke(self, generation: int, first: int) -> None:
        """What `generation` has saved from step `first` on may hold corrupt state."""
        self.revoke_if(lambda writer, step: writer == generation and step >= first)

    def revoke_if(self, is_bad: Callable[[int, int], bool]) -> None:
        """By generation and step."""
        written = self.committed | {step: order.generation for step, order in self._ordered.items()}
        for step, writer in written.items():
            if is_bad(writer, step):
                self.committed.pop(step, None)
                self._ordered.pop(step, None)
                self._distrusted[step] = "revoked"
                self.doubts.pop(step, None)
        self._gone = {step: -1 if is_bad(writer, step) else writer for step, writer in self._gone.items()}

    def delete(self, step: int, last_step: int, verifies: bool) -> None:
        assert step in self.committed, "what is not there, or bad, is deleted"
        assert step not in self.pinned, "what is pinned is deleted"
        self._gone[step] = self.committed.pop(step)
        self.deleted.add(step)
        left = [kept for kept in self.good(last_step) if kept > step or verifies]
        assert len(left) >= self._keep, "too few checkpoints are kept"
