"""The agent: one Ray actor on each node. It prepares the node, runs its workers as told, and reports.

The agent decides nothing. Orders come from the controller with their epoch; an older epoch is refused. What happens on
the node goes into an outbox, in order, and is sent until the controller acknowledges it: a controller may die and come
back without a report being lost, and training goes on meanwhile.

The agent ends itself, and its workers with it, when its raylet is gone, or when the controller is gone for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util import get_placement_group, remove_placement_group

from orchestrator.chaos import late, net
from orchestrator.chaos import node as chaos
from orchestrator.core.actions import InjectFault, VerifyCheckpoint
from orchestrator.core.events import Snapshot
from orchestrator.runtime import bandwidth, copies, fanin, links, preparation
from orchestrator.runtime import code as codes
from orchestrator.runtime.assignment import NodeAssignment, WorkerExit
from orchestrator.runtime.fanin import FanIn
from orchestrator.runtime.hangs import ATTENTION_US, LOOK_US, FirstSteps, NodeWatch, is_momentary, suspects
from orchestrator.runtime.preparation import run_log_dir, worker_env
from orchestrator.runtime.reading import Reader, Reading
from orchestrator.runtime.reporting import Outbox, Reporter
from orchestrator.runtime.reports import (
    KEPT_STEPS,
    Exited,
    NodeFinished,
    NodeFold,
    NodeStep,
    Report,
    StartFailed,
    halted,
    still_true,
)
from orchestrator.runtime.stacks import DEADLINE_S as STACK_DEADLINE_S
from orchestrator.runtime.stacks import Stacks
from orchestrator.spec import JobSpec, parse
from storage import faults, peer, ram, ram_owners, transfer, wires
from storage.blocks import BadBlock
from storage.redact import redact_logging
from storage.urls import drop_scratch, scratch_folder
from trainer import contract

logger = logging.getLogger(__name__)

HEAD_LOST_S = 10.0
"""When this node's raylet is gone, and the controller was not heard for so long before, the whole cluster has lost its
head. A raylet gives a lost head a minute by default, and is missed by a controller that lives within seconds."""
SPARE_AFTER_S = 10.0
"""Without a worker of the mesh, before a node gets ready as a spare: longer than what stands between two generations of
a node that is wanted."""
SPARE_TRIES = 5
"""In a generation, or as a spare, and with growing waits: what is made ready and dies of it costs a processor's second
or a device's opening each time."""
LAST_WORDS_S = 2.0
"""For all ranks of a node to say what the audit found, when one has: milliseconds, unless their cores are taken."""
ABANDONED_S = 300.0
"""Longer than a controller is away, or a head that comes back with its GCS."""
PARENT_INTERVAL_S = 0.1
"""Ray looks for its raylet each second, and then ends the process: this agent must be first."""
DIE_DEADLINE_S = 60.0
"""For an agent that ends by itself to leave nothing behind: the kernel takes seconds for hundreds of gigabytes."""
ZYGOTE_DEADLINE_S = 240.0
"""Importing torch takes 3 s alone and 37 s for eight at once on two cores."""


class StaleOrder(RuntimeError):
    """An order of an older controller, or for a generation that is over."""


@dataclass(frozen=True, kw_only=True)
class NodeInfo:
    """What a prepared node says of itself."""

    ray_node: str
    address: str
    """Of its peer server, host:port."""
    host: str
    pid: int
    ram_dir: str
    data_digest: str
    """Names the token shards that it feeds; all nodes must feed the same."""
    snapshots: dict[int, tuple[Snapshot, ...]]


class Agent:
    """The actor. Methods are coroutines on one loop; what blocks runs in threads."""

    def __init__(
        self,
        *,
        run: str,
        node: str,
        ray_node: str,
        namespace: str,
        token: str,
        instance: str,
        spec_document: dict[str, Any],
        adopts: bool,
    ) -> None:
        """Args:
        instance: tells this run from others of its name: their snapshots, should any have stayed, are not its.
        adopts: whether snapshots that a dead node of this machine has left may be taken for this node's.
        """
        redact_logging()
        self._spec: JobSpec = parse(spec_document)
        self._run, self._node, self._ray_node = run, node, ray_node
        self._namespace = namespace
        self._host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        ram_dir = os.path.expanduser(self._spec.cluster.ram_dir) or f"/dev/shm/shepherd-{os.getuid()}"
        self._ram_dir = f"{ram_dir}/{run}-{instance}"
        self._adopts = adopts
        self._memory: int | None = None
        """Descriptor of the lock on this node's folder of snapshots."""
        self._epoch = 0
        self._fold: NodeFold | None = None
        self._watch: NodeWatch | None = None
        """Of the generation that trains; none while nothing does."""
        self._first_steps = FirstSteps()
        self._stacks = Stacks()
        self._records: dict[int, contract.Recorded] = {}
        """What flight recorders have told, by rank; a new generation's take the place of an older one's."""
        self._store = (0, 0)
        self._ended_generation = self._stopped_generation = 0
        """The newest that was halted here, and the newest that was asked to stop."""
        self._leaving: asyncio.Task[None] | None = None
        """This agent ends: it takes no generation any more, and no copy."""
        self._outbox = Outbox()
        self._kept: deque[NodeStep] = deque(maxlen=KEPT_STEPS)
        self._held: dict[int, contract.Failed] = {}
        """Last words of ranks that another's state has stopped, by rank: that one's word goes first."""
        self._facts: list[Report] = []
        self._copies: dict[tuple[int, int], asyncio.Task[None]] = {}
        """Snapshots that are being fetched from peers, by generation and slot."""
        self._loop = asyncio.get_running_loop()
        self._parent = os.getppid()
        fan_in = FanIn()
        self._buddies = copies.Copies(
            run=run,
            node=ray_node,
            ram_dir=self._ram_dir,
            token=token,
            bytes_per_s=self._spec.checkpoint.copy_bytes_per_s,
        )
        self._buddies.serve(self._serves)
        self._keeper = ""
        """Who keeps copies of this node's snapshots, in the generation that trains."""
        self._drop_after = 0
        """Once this step is done, what lies here of slots that are not this node's is of no use; 0: copies are kept."""
        self._copied_step = self._restored_step = self._supposed_copied = 0
        """The newest step that was copied from every node; that of the restore; and of the newest restore to before
        what was copied: should copies of it have stayed, they are kept, and it is not told that there are any."""
        services = {
            fanin.COLLECT: fan_in.collect,
            fanin.REPORT: fan_in.report,
            copies.KEEP: self._buddies.keep,
            bandwidth.PROBE: bandwidth.serve,
        }
        self._peer = peer.PeerServer(self._host, token, self._ram_dir, run, ray_node, services)
        self._token = token
        self._address = self._data_digest = ""
        slots = self._spec.cluster.slots_per_node
        # Here, in the agent's own process: the controller and the command start seconds sooner without torch.
        from orchestrator.runtime.elastic import NodeWorkers

        self._workers = NodeWorkers(
            run=run,
            node=ray_node,
            host=self._host,
            slots=slots,
            log_dir=run_log_dir(self._spec),
            env=worker_env(self._spec),
            preload="trainer.script" if self._spec.is_script else "trainer.worker",
            on_message=lambda message: self._call(self._on_message, message),
            on_exit=lambda exit_: self._call(self._on_exit, exit_),
            warm_workers=self._spec.warm_workers,
        )
        self._reader = Reader(self._spec.run.url)
        self._reporter: Reporter | None = None
        self._moved_at = time.monotonic()
        """Monotonic second of the newest step here."""
        self._asked: set[int] = set()
        """Ranks that are being asked for what their flight recorders know."""
        self._taking_code = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._sending: set[asyncio.Task[None]] = set()
        """Copies that are being sent to the buddy, at most one a rank."""

    # --- orders ---------------------------------------------------------------------------------------------------

    async def prepare(self) -> NodeInfo:
        """Data on this node, devices checked, workers' zygote warm, peer server up.

        Raises:
            RuntimeError: the data cannot be prepared; the message is the tool's own. Or the script is not here.
            NotAdmitted: a device is wrong.
            OSError: its folder of snapshots is not to be had.
            ZygoteError: the worker's module cannot be imported.
        """
        self._reporter = reporter = Reporter(
            node=self._node,
            namespace=self._namespace,
            token=self._token,
            outbox=self._outbox,
            epoch=lambda: self._epoch,
            die=self._die,
        )
        self._memory = await asyncio.to_thread(ram_owners.own, self._ram_dir, self._run, self._ray_node, self._adopts)
        self._tasks = [
            asyncio.create_task(reporter.run()),
            asyncio.create_task(self._watch_parent()),
            asyncio.create_task(self._watch_ranks()),
            asyncio.create_task(self._stay_ready()),
        ]
        if self._spec.is_script:
            preparation.check_script(self._spec, self._node)
        else:
            self._data_digest = await preparation.prepare_data(self._spec, self._node)
        if self._spec.checks_admission:
            await preparation.check_devices(self._spec, self._node)
        await asyncio.to_thread(self._workers.start, ZYGOTE_DEADLINE_S)
        self._address = await self._peer.start()
        return await self.describe()

    async def update(self, epoch: int, spec_document: dict[str, Any], code: str) -> None:
        """The job is another from now on: what this agent itself goes by. Its workers hear it with their assignment.

        A spare takes the code, too: what it makes ready with another is of no use.
        """
        self._accept(epoch)
        self._spec = parse(spec_document)
        self._buddies.cap(self._spec.checkpoint.copy_bytes_per_s)
        if self._watch is not None:
            self._watch.patience = self._spec.patience
        if self._watch is None:
            await self._use_code(epoch, code)

    async def prepare_code(self, epoch: int, code: str) -> None:
        """Have a zygote ready that has imported this code, while workers go on as they are.

        Raises:
            CodeError, FileNotFoundError, StoreError: it cannot be fetched.
            ZygoteError: the worker's module cannot be imported from there.
        """
        self._accept(epoch)
        folder = run_log_dir(self._spec) / "code"
        packages = await asyncio.to_thread(codes.unpack, self._spec.run.url, code, folder) if code else codes.INSTALLED
        env = worker_env(self._spec, packages)
        await asyncio.to_thread(self._workers.prepare_code, code, env, ZYGOTE_DEADLINE_S)

    async def _use_code(self, epoch: int, code: str) -> None:
        async with self._taking_code:
            if code != self._workers.code:
                await self.prepare_code(epoch, code)
                await asyncio.to_thread(self._workers.use_code, code)

    async def probe(self, epoch: int) -> str:
        """Have each device of this node do work whose result is known; the devices and how fast they were.

        Raises:
            RuntimeError: the work cannot be done; the message is the tool's own.
            NotAdmitted: a device is wrong.
        """
        self._accept(epoch)
        return await preparation.check_devices(self._spec, self._node)

    async def describe(self) -> NodeInfo:
        """This node, prepared."""
        return NodeInfo(
            ray_node=self._ray_node,
            address=self._address,
            host=self._host,
            pid=os.getpid(),
            ram_dir=self._ram_dir,
            data_digest=self._data_digest,
            snapshots=self._inventory(),
        )

    async def link_rate(self, address: str) -> float:
        """MB/s that come from the node at `address`. Raises PeerError when it cannot be reached."""
        return await bandwidth.rate_mb_s(address, self._token)

    async def attach(self, epoch: int, done: int) -> None:
        """A controller of this epoch listens from now on; tell it again all that it may have missed since `done`."""
        self._accept(epoch)
        told = self._outbox.reports()
        known = [*self._kept, *(report for report in told if isinstance(report, NodeStep))]
        steps = {step.step: step for step in known if step.step > done}
        ends = [fact for fact in self._facts if isinstance(fact, NodeFinished)]
        # What it held is among the following, in the order that a fold wants.
        self._outbox.withdraw(lambda report: True)
        for report in (*(fact for fact in self._facts if fact not in ends), *(steps[n] for n in sorted(steps)), *ends):
            self._outbox.push(report)

    async def open_store(self, epoch: int, generation: int) -> int:
        """The port of the generation's fresh store on this node; the same one when asked again."""
        self._accept(epoch)
        self._refuse_ended(generation)
        if self._store[0] != generation:
            self._store = (generation, await asyncio.to_thread(self._workers.open_store, generation))
        return self._store[1]

    async def fetch(
        self,
        epoch: int,
        generation: int,
        slot: int,
        snapshot: Snapshot,
        source: contract.Holder,
        others: tuple[contract.Holder, ...],
    ) -> None:
        """Copy a snapshot from `source` into this node's shared memory as that of `slot`, before `generation` opens.

        Nothing is copied under the feet of a generation that has opened: then the order has come again.

        Args:
            others: who may have blocks that are damaged at `source`.

        Raises:
            ManifestError: a block is whole nowhere.
        """
        self._accept(epoch)
        self._refuse_ended(generation)
        if self._fold is not None and generation <= self._fold.generation:
            return
        copying = self._copies.get((generation, slot))
        if copying is None or (copying.done() and copying.exception() is not None):
            fetching = self._fetch(generation, slot, snapshot, source, others)
            copying = self._copies[generation, slot] = asyncio.create_task(fetching)
        # A controller that comes back orders it again: two must not write one file.
        await asyncio.shield(copying)

    async def _fetch(
        self,
        generation: int,
        slot: int,
        snapshot: Snapshot,
        source: contract.Holder,
        others: tuple[contract.Holder, ...],
    ) -> None:
        bad: list[BadBlock] = []
        try:
            await transfer.fetch_snapshot(
                source.address,
                self._token,
                run=self._run,
                source_node=source.ray_node,
                source_slot=source.slot,
                step=snapshot.step,
                generation=snapshot.generation,
                ram_dir=self._ram_dir,
                node=self._ray_node,
                slot=slot,
                others=[
                    transfer.PeerSource(
                        other.address,
                        self._token,
                        self._run,
                        other.ray_node,
                        other.slot,
                        snapshot.step,
                        snapshot.generation,
                    )
                    for other in others
                ],
                bad=bad,
            )
        finally:
            first = {block.source: block for block in reversed(bad)}
            for holder in (source, *others):
                if holder.ray_node in first:
                    detail = str(first.pop(holder.ray_node))
                    damaged = contract.Damaged(
                        generation=generation, rank=slot, step=snapshot.step, node=holder.node, detail=detail
                    )
                    self._outbox.push(damaged)

    async def _end_copies(self) -> None:
        """Nothing is written into the tier from outside any more."""
        fetched, self._copies = list(self._copies.values()), {}
        for copy in fetched:
            copy.cancel()
        await asyncio.gather(*fetched, return_exceptions=True)
        await self._buddies.end()

    async def open(self, epoch: int, plan: NodeAssignment) -> None:
        """Start this generation's workers; an order that comes again changes nothing."""
        self._accept(epoch)
        self._refuse_ended(plan.generation)
        if self._fold is not None and plan.generation == self._fold.generation:
            return
        if self._fold is not None and plan.generation < self._fold.generation:
            raise StaleOrder(f"{self._node} is in generation {self._fold.generation}, not before {plan.generation}")
        self._fold = NodeFold(generation=plan.generation, ranks=plan.ranks)
        first_us = self._first_steps.known_us((plan.config, plan.code))
        self._watch = NodeWatch(plan.generation, plan.ranks, self._spec.patience, _now_us(), first_us)
        self._facts.clear()
        self._kept.clear()
        self._held.clear()
        self._reader.interrupt(f"generation {plan.generation} starts")
        await self._end_copies()
        self._refuse_ended(plan.generation)  # it may have been halted meanwhile
        # Slots that moved elsewhere leave snapshots behind: those of a history that was given up must not be elected.
        ram.drop_newer(self._ram_dir, self._run, self._ray_node, plan.restore.step)
        if plan.snapshot_slots or plan.restore.reshard:
            # Room for the snapshots of this mesh: where slots have other numbers now, only what is restored stays.
            restored = (plan.restore.generation, plan.restore.step)
            await self._buddies.drop_others(plan.generation, plan.ranks, but=restored)
        await self._use_code(epoch, plan.code)
        self._keeper, self._restored_step = plan.keeper, plan.restore.step
        every = plan.config.checkpoint.snapshot_interval_steps
        self._drop_after = 0 if plan.keeper else (plan.restore.step // every + 1) * every
        # An agent that is new here knows of none, and its first copy would take the place of the only one.
        copied_step = max(self._copied_step, plan.copied_step)
        self._copied_step = min(copied_step, plan.restore.step)
        if copied_step > plan.restore.step:
            self._supposed_copied = plan.restore.step
        self._refuse_ended(plan.generation)  # again: other code may have been imported
        here = dataclasses.replace(
            plan, ram_dir=self._ram_dir, copied_step=self._copied_step, token=self._token if plan.holders else ""
        )
        await asyncio.to_thread(self._workers.assign, here)

    async def halt(self, epoch: int, generation: int, hear_out: bool, park: bool) -> None:
        """End this generation and report what shared memory holds. With `park` its workers keep their processes, if
        they leave their groups in time.

        With `hear_out` they may speak first: state was found corrupt, and each rank says whether it was its own.
        """
        self._accept(epoch)
        if self._fold is not None and self._fold.generation > generation:
            raise StaleOrder(f"{self._node} is in generation {self._fold.generation}, after {generation}")
        self._ended_generation = max(self._ended_generation, generation)
        if self._watch is not None:
            self._first_steps.learn(self._watch.first_us)
        self._watch = None
        await self._stacks.settle(min(STACK_DEADLINE_S, self._spec.recovery.halt_deadline_s / 4))
        # Side by side: a peer that has stopped must not keep the workers from their end.
        _, parked = await asyncio.gather(self._end_copies(), self._end_workers(generation, hear_out, park))
        # The controller may not know yet that state was found corrupt: one word says it as well as all.
        for word in () if hear_out else list(self._held.values())[:1]:
            self._fact(word)
        self._held.clear()
        await asyncio.to_thread(self._drop_scratch)
        slots = self._fold.ranks if self._fold is not None and self._fold.generation == generation else ()
        self._fact(halted(generation, slots, self._inventory(), parked))

    async def _end_workers(self, generation: int, hear_out: bool, park: bool) -> bool:
        """Whether all of the generation's workers live and are parked."""
        deadline_s = self._spec.recovery.halt_deadline_s
        park_s = min(self._spec.recovery.park_deadline_s, deadline_s / 2)
        words_s = min(LAST_WORDS_S, deadline_s / 4) if hear_out else 0.0
        if self._spec.is_script and generation == self._stopped_generation and not self._kept:
            # All have got SIGTERM, and the first to end is no reason to break off what others still do about it.
            words_s = deadline_s / 2
        if words_s > 0 and not await asyncio.to_thread(self._workers.hear_out, words_s):
            logger.warning("%s ends generation %d before all its ranks have spoken", self._node, generation)
        return await asyncio.to_thread(self._workers.halt, deadline_s - words_s, park_s if park else 0.0)

    async def ask_stop(self, epoch: int, generation: int) -> None:
        """Ask the workers to end at their next common step boundary."""
        self._accept(epoch)
        if self._fold is not None and self._fold.generation == generation:
            self._stopped_generation = generation
            await asyncio.to_thread(self._workers.stop_gracefully)

    async def save_every(self, epoch: int, generation: int, steps: int) -> None:
        """Tell rank 0, which is on this node, how often all ranks are to save.

        Raises:
            LookupError: its worker has ended.
            OSError: the worker does not take the order.
        """
        self._accept(epoch)
        if self._fold is not None and self._fold.generation == generation:
            await asyncio.to_thread(self._workers.send, 0, contract.SaveEvery(steps=steps))

    async def inject(self, epoch: int, order: InjectFault) -> str:
        """Chaos: do the harm that was ordered; what was done, or nothing when the worker itself will tell.

        Raises:
            StaleOrder: the generation whose worker is meant is not the one here.
            LookupError: there is no such worker here.
            OSError: the worker does not take the order, or this process may not change the node's network.
            ValueError: the order cannot be done on this node.
        """
        self._accept(epoch)
        match order.fault:
            case "node-kill":
                family = chaos.family_of(os.getpid())
                victim = (os.getpid(), self._ram_dir, self._run, self._ray_node)
                # On this loop, so that nothing more is reported: a dying node does not tell of its parts' deaths.
                self._loop.call_later(chaos.LAST_ANSWER_S, chaos.kill_node, *victim)
                return f"SIGKILL for raylet {family[0].pid} and {len(family) - 1} processes under it, memory deleted"
            case "net-cut":
                return await asyncio.to_thread(net.cut, order, self._host)
            case "net-delay":
                late_ms, seconds = int(order.parameters["delay_ms"]), float(order.parameters["seconds"])
                return await asyncio.to_thread(late.delay, self._host, late_ms, seconds)
            case "store-outage":
                return await chaos.refuse_store(self._workers, self._spec.run.url, order)
            case "clock-jump" if order.slot is None:
                faults.leap_clock(float(order.parameters["seconds"]))
                return f"time.time() of the agent leaps by {float(order.parameters['seconds']):+g} s"
        if self._fold is None or self._fold.generation != order.generation:
            raise StaleOrder(f"generation {order.generation} is not here any more, or not yet")
        return await chaos.harm_worker(self._workers, order)

    async def verify(self, epoch: int, order: VerifyCheckpoint) -> Reading:
        """Read a checkpoint back, however long that takes at the ordered pace."""
        self._accept(epoch)
        return await self._reader.read(order)

    async def unreached(self, addresses: dict[str, str]) -> frozenset[str]:
        """Of nodes and the addresses of their peer servers, those from which no packet comes back to this one."""
        return await links.unreached(addresses)

    async def hears_from(self, address: str) -> bool:
        """Whether the agent whose peer server has this address answers this one."""
        return await wires.answers(address, self._token, links.REACH_S)

    async def workers(self) -> dict[int, int]:
        """Process ids of the live workers by rank."""
        return self._workers.pids()

    async def stack(self, epoch: int, generation: int, rank: int) -> str:
        """Where a rank stood that was found to hang: its Python stacks, or why there are none."""
        self._accept(epoch)
        return await self._stacks.of(generation, rank)

    async def flight_record(self, epoch: int, generation: int, rank: int) -> str:
        """A rank's newest collectives, as its flight recorder told them last in this generation: a JSON array.

        Raises:
            LookupError: it has told nothing.
        """
        self._accept(epoch)
        told = self._records.get(rank)
        if told is None or told.generation != generation or not told.entries:
            raise LookupError(f"rank {rank} has told nothing of its collectives in generation {generation}")
        return told.entries

    async def shutdown(self, epoch: int) -> None:
        """End workers, delete this node's snapshots, stop serving. The actor's process is ended by the caller."""
        self._accept(epoch)
        try:
            await self._leave_nothing(self._spec.recovery.halt_deadline_s)
        finally:
            await self._peer.close()
            if self._memory is not None:
                os.close(self._memory)
                self._memory = None

    async def _leave_nothing(self, deadline_s: float) -> None:
        """End the workers, within `deadline_s`, and what else writes snapshots on this node; then delete them. Once:
        the controller may let go of an agent that is ending by itself.

        Raises:
            TimeoutError: a worker lives on; the snapshots are deleted nevertheless.
        """
        if self._leaving is None:  # other nodes may still train, and would have their copies kept here
            self._leaving = asyncio.create_task(self._leave(deadline_s))
        await asyncio.shield(self._leaving)

    async def _leave(self, deadline_s: float) -> None:
        for task in self._tasks:
            task.cancel()
        self._reader.interrupt("the agent ends")
        try:
            await self._end_copies()
            await asyncio.to_thread(self._buddies.unmap)
            await asyncio.to_thread(self._workers.shutdown, deadline_s)
        finally:
            # Hundreds of gigabytes take the kernel seconds to give back.
            await asyncio.to_thread(ram.delete, self._ram_dir, self._run, self._ray_node)
            await asyncio.to_thread(self._drop_scratch)

    def _drop_scratch(self) -> None:
        """What saves of workers that were killed have left in the temporary folder."""
        with contextlib.suppress(OSError):  # a disk so full that Python finds no such folder
            for rank in self._fold.ranks if self._fold is not None else ():
                drop_scratch(scratch_folder(self._spec.run.url, rank))

    def _refuse_ended(self, generation: int) -> None:
        if self._leaving is not None:
            raise StaleOrder(f"the agent of {self._node} ends")
        if generation <= self._ended_generation:
            raise StaleOrder(f"{self._node} has halted generation {self._ended_generation}, {generation} is over")

    def _accept(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise StaleOrder(f"{self._node} answers to epoch {self._epoch}, not to {epoch}")
        self._epoch = epoch

    # --- what happens on the node ---------------------------------------------------------------------------------

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        """From the workers' thread into the loop, in order."""
        self._loop.call_soon_threadsafe(function, argument)

    def _on_message(self, message: Any) -> None:
        if self._fold is None or message.generation != self._fold.generation:
            return
        if self._watch is not None:
            self._watch.hear(_now_us(), message)
        if isinstance(message, contract.Recorded):
            self._records = {r: told for r, told in self._records.items() if told.generation == message.generation}
            self._records[message.rank] = message
        for report in self._fold.feed(message):
            if isinstance(report, NodeStep):
                if not self._kept:
                    self._begins_to_train()
                if report.copied_step <= self._supposed_copied:
                    report = dataclasses.replace(report, copied_step=0)
                self._kept.append(report)
                self._moved_at = time.monotonic()
                self._outbox.push(report)
                self._drop_stale(report.step)
            elif isinstance(report, contract.Failed) and report.kind == "unclean":
                self._held[report.rank] = report
            else:
                self._fact(report)

        if isinstance(message, contract.Parked) and message.rank in self._held:
            self._loop.call_later(LAST_WORDS_S, self._release, message.generation, message.rank)
        if isinstance(message, contract.CopyStep):
            copying = asyncio.ensure_future(self._copy(message))
            self._sending.add(copying)
            copying.add_done_callback(self._sending.discard)

    def _drop_stale(self, step: int) -> None:
        """Where no copies are kept, snapshots of other slots are stale as soon as all ranks have one of this mesh.

        That is when the step after it is done: see trainer/loop.py.
        """
        if self._drop_after and step > self._drop_after and self._fold is not None:
            self._drop_after = 0
            dropping = asyncio.ensure_future(self._buddies.drop_others(self._fold.generation, self._fold.ranks))
            self._sending.add(dropping)
            dropping.add_done_callback(self._sending.discard)

    def _begins_to_train(self) -> None:
        """Now there is time to fill up what the recovery has taken, and what dead nodes have left is of no use."""
        self._loop.run_in_executor(None, self._workers.replenish)
        self._loop.run_in_executor(None, ram_owners.sweep, self._ram_dir, self._run, self._ray_node)

    async def _stay_ready(self) -> None:
        """Have other warm workers in the place of those that have died; and a node that has had no part in the mesh for
        a while is a spare, and gets ready to take any."""
        began_at, tries, before = time.monotonic(), 0, 0
        while True:
            await asyncio.sleep(SPARE_AFTER_S / 4)
            serving = self._fold.generation if self._fold is not None and self._workers.pids() else 0
            if serving != before:
                began_at, tries, before = time.monotonic(), 0, serving
            at_rest = bool(self._address) and (not serving or len(self._kept) > 0)
            if not at_rest or tries >= SPARE_TRIES or time.monotonic() - began_at <= SPARE_AFTER_S * 2**tries:
                continue
            try:
                if serving:
                    tries += await asyncio.to_thread(self._workers.replenish)
                else:
                    tries += await asyncio.to_thread(self._workers.prepare_all, self._spec.worker_config)
            except Exception:
                logger.exception("%s has no warm workers", self._node)
                tries += 1
            began_at = time.monotonic()

    def _release(self, generation: int, rank: int) -> None:
        """Tell what a rank has said that another's state has stopped, if it has not been told."""
        if self._fold is not None and self._fold.generation == generation and rank in self._held:
            self._fact(self._held.pop(rank))

    def _serves(self, generation: int) -> bool:
        fold = self._fold
        return self._leaving is None and fold is not None and fold.generation == generation > self._ended_generation

    async def _copy(self, order: contract.CopyStep) -> None:
        """Have a rank's snapshot copied to the buddy, and tell the rank what came of it: all ranks wait for that."""
        try:
            error = await self._copied(order)
        except Exception as e:
            logger.exception("slot %d, step %d is not copied", order.rank, order.step)
            error = f"{type(e).__name__}: {e}"
        if self._serves(order.generation):
            with contextlib.suppress(LookupError, OSError):  # it has ended, which is told otherwise
                copied = contract.Copied(step=order.step, error=error)
                await asyncio.to_thread(self._workers.send, order.rank, copied)

    async def _copied(self, order: contract.CopyStep) -> str:
        """Why a copy was not made, or nothing."""
        if order.complete > self._copied_step:
            self._copied_step = order.complete
            if order.complete > self._restored_step and self._fold is not None:
                await self._buddies.drop_others(order.generation, self._fold.ranks)
        wanted = (order.generation, order.rank, order.step, order.complete)
        return await self._buddies.send(self._keeper, self._address, *wanted)

    def _on_exit(self, exit_: WorkerExit) -> None:
        if self._fold is None or exit_.generation != self._fold.generation:
            return
        if self._spec.is_script:
            self._speak_for(exit_, self._fold)
        in_good_order = exit_.exit_code == contract.EXIT_FINISHED and exit_.rank in self._fold.finished
        if self._watch is not None:
            self._watch.exited(exit_.rank, in_good_order)
        self._release(exit_.generation, exit_.rank)
        if exit_.error:
            self._fact(StartFailed(generation=exit_.generation, error=exit_.error))
        elif not in_good_order:
            self._fact(
                Exited(generation=exit_.generation, rank=exit_.rank, exit_code=exit_.exit_code, signal=exit_.signal)
            )

    def _speak_for(self, exit_: WorkerExit, fold: NodeFold) -> None:
        """A script's process that has ended itself past Python's own end, as by os._exit, has told nothing of it."""
        generation, rank, code = exit_.generation, exit_.rank, exit_.exit_code
        if code is None or rank not in fold.reached or rank in fold.finished or rank in fold.failed:
            return
        step = fold.reached[rank]
        if code == contract.EXIT_FINISHED:
            stopped = self._stopped_generation == generation
            reason: Literal["completed", "stopped"] = "stopped" if stopped else "completed"
            self._on_message(contract.Finished(generation=generation, rank=rank, step=step or 1, reason=reason))
            return
        error = f"the script has ended with exit code {code}"
        self._on_message(
            contract.Failed(
                generation=generation, rank=rank, step=step, kind="exception", error=error, traceback=f"{error}\n"
            )
        )

    async def _watch_ranks(self) -> None:
        """Look for ranks that hang. What is found is told as long as it is true, and never when it is true no more."""
        while True:
            await asyncio.sleep((LOOK_US if self._watch is None else self._watch.pause_us) / 1_000_000)
            try:
                found = self._watch.tick(_now_us(), self._workers.look) if self._watch is not None else []
            except Exception:  # the watch must outlive whatever a look at a process may raise
                logger.exception("the watch over the ranks of %s failed", self._node)
                continue
            if self._watch is not None:
                pids = self._workers.pids()
                ranks = suspects(found)
                self._stacks.see(self._watch.generation, {rank: pids[rank] for rank in ranks if rank in pids})
                self._read_recorders(self._watch)
            self._outbox.withdraw(is_momentary)
            for report in found:
                self._outbox.push(report)

    def _read_recorders(self, watch: NodeWatch) -> None:
        """Ask ranks for what their flight recorders know, in other threads: one that is stopped may not take it."""
        order = contract.ReadRecorder(generation=watch.generation)
        for rank in set(watch.unread_recorders()) - self._asked:
            self._asked.add(rank)
            self._loop.run_in_executor(None, self._ask, rank, order)

    def _ask(self, rank: int, order: contract.ReadRecorder) -> None:
        try:
            with contextlib.suppress(LookupError, OSError):  # it has ended, or does not listen: it tells nothing
                self._workers.send(rank, order)
        finally:
            self._asked.discard(rank)

    def _fact(self, report: Report) -> None:
        """A report that a controller which comes back is told again."""
        self._facts = [*still_true(self._facts, report), report]
        self._outbox.push(report)

    def _inventory(self) -> dict[int, tuple[Snapshot, ...]]:
        held = ram.held(self._ram_dir, self._run, self._ray_node)
        return {
            slot: tuple(Snapshot(generation=header.generation, step=header.step) for header in headers)
            for slot, headers in held.items()
        }

    # --- its end ------------------------------------------------------------------------------------------------------

    async def _watch_parent(self) -> None:
        """A killed raylet leaves its actors behind: such a node must not go on by itself.

        Where all of Ray has died with its head, the snapshots are left to the run's resume.
        """
        while os.getppid() == self._parent:
            began = time.monotonic()
            await asyncio.sleep(PARENT_INTERVAL_S)
            stood_still_s = time.monotonic() - began - PARENT_INTERVAL_S
            if stood_still_s >= ATTENTION_US / 1e6:  # suspended: what the controller says waits to be read
                alive_at = self._moved_at if self._reporter is None else max(self._moved_at, self._reporter.answered_at)
                self._moved_at = min(time.monotonic(), alive_at + stood_still_s)
            if self._is_abandoned():
                why = f"nothing was heard of the controller, and no step was done, for {ABANDONED_S:g} s"
                # It may be the run that is lost, and not this node.
                await self._die(why, keep_snapshots=True, give_back=True)
        assert self._reporter is not None
        head_lost = time.monotonic() - self._reporter.answered_at > HEAD_LOST_S
        await self._die("the raylet of this node is gone", keep_snapshots=head_lost)

    def _is_abandoned(self) -> bool:
        """Cut off from all, this node has been replaced by now; while its mesh trains, nobody else can have."""
        if self._reporter is None or self._epoch == 0:
            return False
        return time.monotonic() - max(self._moved_at, self._reporter.answered_at) > ABANDONED_S

    async def _die(self, why: str, keep_snapshots: bool = False, give_back: bool = False) -> None:
        """End this process, of one of its own tasks: that one is not cancelled by the end.

        Args:
            give_back: the node, to Ray: there is no controller that would.
        """
        logger.error("agent %s ends: %s", self._node, why)
        self._loop.call_later(DIE_DEADLINE_S, os._exit, 1)
        self._tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        try:
            if not keep_snapshots:
                # At once, as Ray ends its processes within a second of a raylet; and again when nobody writes any more.
                at_once = asyncio.to_thread(ram.delete, self._ram_dir, self._run, self._ray_node)
                # With the server goes the line: to the controller this node is gone.
                await asyncio.gather(at_once, self._peer.close())
                await self._leave_nothing(DIE_DEADLINE_S / 2)
            if give_back:  # Ray ends this process with it
                group = await asyncio.to_thread(get_placement_group, f"{self._namespace}/{self._node}")
                await asyncio.to_thread(remove_placement_group, group)
        except Exception:
            logger.exception("agent %s may leave something behind", self._node)
        finally:
            os._exit(1)  # the zygote and its workers end with this process


def _now_us() -> int:
    return time.monotonic_ns() // 1000
