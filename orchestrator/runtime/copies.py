"""Copies of snapshots on other nodes, as agents make them: the owner's asks its buddy's, which fetches. No torch.

A copy lies in the buddy's shared memory under the owner's slot, in two files: the copy of the newest step that has
arrived from every node stands until that is true of a later one, and each arrives beside it. A copy that fails is tried
again within bounds, and then told to the worker; it never stops training.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage import ram, transfer
from storage.ram import SnapshotFile
from storage.wires import PeerError, Wire, open_wire, refuse

logger = logging.getLogger(__name__)

KEEP = "keep"
"""The op of a request to keep a copy."""
TRIES = 3
RETRY_S = (0.5, 2.0)
"""Between tries: a connection that broke is made anew at once; after that the next step's copy serves."""
BEAT_S = 2.0
"""The keeper says so often that it is at work."""
SILENCE_S = 15.0
"""Of a keeper at work; as storage.wires.STALL_S."""


class Copies:
    """The copies that this node's agent keeps for others, and those that it has others keep."""

    def __init__(self, *, run: str, node: str, ram_dir: str, token: str, bytes_per_s: int) -> None:
        """`node` is the name in shared memory: the Ray node's."""
        self._run, self._node, self._ram_dir, self._token = run, node, ram_dir, token
        self.cap(bytes_per_s)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._turns: dict[int, asyncio.Lock] = {}
        """By slot: two must not write one file."""
        self._files: dict[Path, SnapshotFile] = {}
        """Mapped once, and written again and again."""
        self._kept: set[int] = set()
        """Slots of others of which this node has kept a copy since `begin`."""
        self._dropping = asyncio.Lock()
        self._served: Callable[[int], bool] = lambda generation: False

    def cap(self, bytes_per_s: int) -> None:
        """Bound what is taken in a second from here on; 0: it is not."""
        self._rate = transfer.Rate(bytes_per_s) if bytes_per_s else None

    def serve(self, served: Callable[[int], bool]) -> None:
        """Keep copies in those generations only: an older one's would get between what was elected to restore."""
        self._served = served

    # --- the owner's side -----------------------------------------------------------------------------------------

    async def send(self, keeper: str, address: str, generation: int, slot: int, step: int, complete: int) -> str:
        """Have the agent that serves `keeper` copy a slot's snapshot from `address`; why it has not, or nothing.

        Args:
            complete: the newest step of which every rank's copy has arrived: that copy stays.
        """
        request = {
            "op": KEEP,
            "run": self._run,
            "node": self._node,
            "address": address,
            "generation": generation,
            "slot": slot,
            "step": step,
            "complete": complete,
        }
        error = ""
        for wait_s in (*RETRY_S, None):
            try:
                async with open_wire(keeper, self._token, request) as wire:
                    while "done" not in await wire.receive(SILENCE_S):
                        pass
                return ""
            except PeerError as e:
                error = str(e)
            if wait_s is not None:
                await asyncio.sleep(wait_s)
        logger.warning("slot %d, step %d is not copied to %s: %s", slot, step, keeper, error)
        return error

    # --- the keeper's side ----------------------------------------------------------------------------------------

    async def keep(self, request: dict[str, Any], wire: Wire) -> None:
        """The service: fetch a copy, and say when it is there."""
        generation, slot = int(request["generation"]), int(request["slot"])
        if request["run"] != self._run or not self._served(generation):
            return await refuse(wire.writer, f"this node serves no generation {generation} of run {request['run']}")
        work = asyncio.ensure_future(self._fetch(request, generation, slot))
        self._tasks.add(work)
        work.add_done_callback(self._tasks.discard)
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=BEAT_S)
                if not work.done():
                    await wire.send({"at work": True})
            if work.cancelled():
                return await refuse(wire.writer, f"generation {generation} is over")
            error = work.exception()
            if error is not None:
                return await refuse(wire.writer, " ".join(f"{type(error).__name__}: {error}".split())[:1000])
            await wire.send({"done": True})
        finally:
            work.cancel()
            await asyncio.wait({work})

    async def _fetch(self, request: dict[str, Any], generation: int, slot: int) -> None:
        async with self._turns.setdefault(slot, asyncio.Lock()):
            if not self._served(generation):
                raise PeerError(f"generation {generation} is over")
            self._kept.add(slot)
            await transfer.fetch_snapshot(
                str(request["address"]),
                self._token,
                run=self._run,
                source_node=str(request["node"]),
                source_slot=slot,
                step=int(request["step"]),
                generation=generation,
                ram_dir=self._ram_dir,
                node=self._node,
                slot=slot,
                files=ram.COPY_FILES,
                keep=int(request["complete"]),
                rate=self._rate,
                mapped=self._files,
            )

    # --- both -----------------------------------------------------------------------------------------------------

    async def end(self) -> None:
        """No copy is written any more. Files stay mapped for the next generation's, but for those that are deleted."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with self._dropping:  # what is copied here from now on must not be deleted
            await self._unmap_deleted()
        self._kept.clear()

    def unmap(self) -> None:
        """Let go of all files. After `end`."""
        self._files.clear()

    async def drop_others(self, generation: int, own: tuple[int, ...], but: tuple[int, int] | None = None) -> None:
        """Delete what lies here of slots that are neither `own` nor kept, but for snapshots of (generation, step)
        `but`: something newer is complete elsewhere. Not once `generation` is over: the next one's state comes then."""
        async with self._dropping:
            if not self._served(generation):
                return
            await asyncio.to_thread(ram.drop_slots, self._ram_dir, self._run, self._node, {*own, *self._kept}, but)
            await self._unmap_deleted()

    async def _unmap_deleted(self) -> None:
        """Their memory is free only then: the kernel takes seconds for hundreds of gigabytes."""
        deleted = [path for path, file in list(self._files.items()) if not file.stands]
        gone = [self._files.pop(path) for path in deleted]
        if gone:
            await asyncio.to_thread(gone.clear)
