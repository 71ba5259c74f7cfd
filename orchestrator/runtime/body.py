"""The Ray body: carries the supervisor's actions out, and turns what it sees of the cluster into events.

It holds no judgement. Every action becomes a task with a deadline; what comes of it is an event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import ray
from ray.util import get_placement_group

from orchestrator import identity
from orchestrator.chaos import ordered
from orchestrator.chaos.orders import NOT_DONE
from orchestrator.core import events as ev
from orchestrator.core.actions import (
    Action,
    AskStop,
    AskThird,
    CommitCheckpoint,
    DeleteCheckpoint,
    EndRun,
    HaltGeneration,
    InjectFault,
    OpenGeneration,
    ProbeNode,
    PublishTrust,
    ReleaseNode,
    SaveEvery,
    SetTimer,
    Transfer,
    UpdateJob,
    VerifyCheckpoint,
)
from orchestrator.core.state import State
from orchestrator.runtime import links, nodes
from orchestrator.runtime.agent import ZYGOTE_DEADLINE_S, StaleOrder
from orchestrator.runtime.checkpoints import PUBLISH_DEADLINE_S, CheckpointOrders
from orchestrator.runtime.collect import FanIns
from orchestrator.runtime.evidence import Evidence
from orchestrator.runtime.groups import Told
from orchestrator.runtime.nodes import AgentHandle, RayNode, agent_name, call, last_line, release, start_agent
from orchestrator.runtime.plans import Plans
from orchestrator.runtime.preparation import ADMISSION_DEADLINE_S, NotAdmitted
from orchestrator.runtime.reporting import NodeGone
from orchestrator.runtime.reports import MeshFold, NodeStep, Report
from orchestrator.runtime.silence import SilenceWatch
from orchestrator.spec import JobSpec
from storage import wires
from storage.manifest import ManifestError
from trainer import contract

logger = logging.getLogger(__name__)

DISCOVER_INTERVAL_S = 1.0
ORDER_DEADLINE_S = 30.0
"""For an agent to take an order; the work that it starts is reported later."""
ORDER_RETRY_S = 0.5
CODE_DEADLINE_S = ZYGOTE_DEADLINE_S + ORDER_DEADLINE_S
"""For a node to fetch other code, and to import it."""
LEAVE_DEADLINE_S = 5.0
"""For an agent that is let go to end its workers and to give its memory back; most that are let go are dead."""
STORE_PORT_DEADLINE_S = 30.0
START_TRIES = 3
"""Agents that may fail on one Ray node before that node is left alone."""
REST_S = 30.0
"""A node that was lost is not tried again for so long: Ray itself takes 15 s to see that one is dead."""
NAME_LENGTH = 8
"""Of a Ray node's id (56 hex digits), in its agent's name: among 12,500 nodes, two alike once in 55 clusters."""
LINE_RETRIES = 2
"""A line that breaks is taken up again this often in a row before its node counts as lost."""
LINE_RETRY_S = 1.0
LINE_SOUND_S = 60.0
"""A line that has held for this long breaks anew, not again."""


class OtherData(RuntimeError):
    """A node would feed other tokens than the run has."""


class CutOff(RuntimeError):
    """A node that joins does not reach the others. It is tried again: networks come back."""


class NowhereWhole(RuntimeError):
    """No node has all of a snapshot whole that `node` was to have."""

    def __init__(self, node: str, error: str) -> None:
        super().__init__(error)
        self.node = node


class Body:
    def __init__(
        self,
        spec: JobSpec,
        namespace: str,
        token: str,
        epoch: int,
        instance: str,
        trained_on: str,
        now: Callable[[], int],
        post: Callable[[ev.Event], None],
        notice: Callable[[str], None],
        without_place: Callable[[], int],
        behind: Callable[[], bool],
        standing: Callable[[str], str],
        code: Callable[[], str],
    ) -> None:
        self._spec, self._namespace, self._token, self._epoch = spec, namespace, token, epoch
        self._instance = instance
        """Tells this run from others of its name; the same for all of its controllers."""
        self._now, self._post, self._notice = now, post, notice
        self._code = code
        """Of the workers of the next generation."""
        self.agents: dict[str, AgentHandle] = {}
        self.evidence = Evidence(spec.run.url, epoch, self._agent, self._spawn)
        self._plans = Plans(lambda: self._spec, epoch, self.agents, self._agent)
        self._silence = SilenceWatch(
            self.agents,
            lambda: (self._spec.recovery.node_silence_s, self.fold.nodes if self.fold is not None else ()),
            self._spawn,
            self._lost,
        )
        self._fan_ins = FanIns(epoch, token, self.agents, self._hear_group, behind, standing)
        self.fold: MeshFold | None = None
        self._slow_before: dict[int, dict[int, str]] = {}
        """By the number of slots, slot to the node on which it was found slow: one that is on another, too, has more to
        do than its peers."""
        self.rates: list[tuple[float, int, int]] = []
        """(monotonic seconds, step, tokens) of the newest steps, for the throughput that people see."""
        self._opening: asyncio.Task[Any] | None = None
        self._places = spec.layout.nodes + spec.layout.spares
        self._without_place = without_place
        """How many agents hold no place, being quarantined or about to leave: others may join for them."""
        self._leaving: set[str] = set()
        """Nodes of which it has been told that they leave."""
        self._drained: set[str] = set()
        """Begins of the ids of Ray nodes that are taken away."""
        self._starting: set[str] = set()
        self._failed_starts: dict[str, int] = {}
        self._given_up: dict[str, str] = {}
        """Ray nodes on which no agent comes up, and why."""
        self._refusal_told = False
        self._losses_told: set[str] = set()
        """Nodes whose loss has been posted. While nothing can be decided it would be seen again each second."""
        self._let_go: set[str] = set()
        """Nodes that are no part of the run any more; one that was cut off hears of it when it comes back."""
        self._used_names: set[str] = set()
        self._trained_on = self._data_digest = trained_on
        """Digest of the run's data, and what its checkpoints say of it; empty as long as nobody has told."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._rests_until: dict[str, float] = {}
        """Ray nodes that have just been lost, and when they may be tried again."""
        self._checkpoints = CheckpointOrders(
            spec.run.name,
            spec.run.url,
            epoch,
            lambda: (self.fold, self._plans.layout, self._data_digest),
            self._agent,
            self._spawn,
            post,
            notice,
        )
        self._imported: str | None = None
        """The code that every node of the last generation has taken; None if that is not known."""
        self._joins: set[asyncio.Task[Any]] = set()
        self._releases: set[asyncio.Task[Any]] = set()
        self._watching: asyncio.Task[Any] | None = None
        """Over silent nodes; agents that end are silent."""
        self._closing = False

    def start(self) -> None:
        """Begin to look for nodes and to watch those that are there."""
        self._spawn(self._discover_forever())
        self._watching = self._spawn(self._silence.watch())

    # --- what agents say ------------------------------------------------------------------------------------------

    def hear(self, node: str, batch: list[tuple[int, Report]]) -> list[ev.Event]:
        """Take in what an agent itself reports, each with its number; the events that it completes, without their time.

        Raises:
            NodeGone: the agent has been let go, and shall end.
            RuntimeError: the agent is not known (yet); it will send them again.
        """
        if node in self._let_go and node not in self.agents:
            raise NodeGone(f"node {node} was lost, or is wanted no more")
        self._agent(node)
        return self._take_in((node,), [Told({node: number}, report) for number, report in batch])

    def fan_in_for(self, node: str) -> str:
        """Address of the fan-in that this node shall report to; empty: to the controller."""
        return self._fan_ins.address_for(node)

    def _hear_group(self, heard: Iterable[str], told: Sequence[Told]) -> list[str]:
        """Take in what a fan-in says; the nodes among those it has heard that are not known."""
        for event in self._take_in(heard, told):
            self._post(event)
        return [node for node in heard if node not in self.agents]

    def _take_in(self, heard: Iterable[str], told: Sequence[Told]) -> list[ev.Event]:
        now = time.monotonic()
        for node in heard:
            if node in self.agents:
                self.agents[node].heard_at = now
        events: list[ev.Event] = []
        for each in told:
            events += self._take(each)
        return events

    def _take(self, told: Told) -> list[ev.Event]:
        """The events that a report completes, of those nodes from which it was not taken before, by another way."""
        report, tellers = told.report, []
        for node, number in told.tellers.items():
            handle = self.agents.get(node)
            if handle is not None and number > handle.taken:
                handle.taken = number
                tellers.append(node)
        if not tellers:
            return []
        if isinstance(report, contract.Failed):
            self.evidence.keep_traceback(tellers[0], report)
        if isinstance(report, NodeStep) and report.loss is not None:
            self.rates = [*self.rates[-63:], (time.monotonic(), report.step, report.tokens)]
        if isinstance(report, NodeStep) and self.fold is not None and report.generation == self.fold.generation:
            self._silence.moves(report)
        try:
            events = self.fold.feed(0, tellers, report) if self.fold is not None else []
            while self.fold is not None and self.fold.unseen:
                self._spawn(self.evidence.keep_stack(*self.fold.unseen.pop(), self.fold.generation))
            while self.fold is not None and self.fold.unrecorded:
                self._spawn(self.evidence.keep_record(*self.fold.unrecorded.pop(), self.fold.generation))
            return events
        except Exception:  # one report that contradicts others must not keep the agents from sending the rest
            logger.exception("%s sent what cannot be: %r", tellers, report)
            return []

    # --- what the supervisor orders -------------------------------------------------------------------------------

    def perform(self, action: Action) -> None:
        """Begin to carry an action out."""
        match action:
            case OpenGeneration():
                if self.fold is None or self.fold.generation != action.generation:
                    last = self.fold.last if self.fold is not None else None
                    self._plans.begin(action, last.copied_step if last is not None else 0)
                    self.fold = self._new_fold(action, action.step)
                self.rates = []
                self._silence.begin(action.step)
                self._stop_opening()
                self._opening = self._spawn(self._open(action))
                self._spawn(self._look_for_cuts())
            case HaltGeneration():
                self._stop_opening()
                hear_out = self.fold is not None and self.fold.unclean
                for node in action.nodes:
                    self._spawn(self._order(node, "halt", self._epoch, action.generation, hear_out, action.park))
            case AskStop():
                for node in self.fold.nodes if self.fold else ():
                    self._spawn(self._order(node, "ask_stop", self._epoch, action.generation))
            case SaveEvery():
                self._plans.save_every_steps = action.steps
                if self.fold is not None:  # rank 0 decides for all, and fills the first node's first slot
                    order = (self._epoch, action.generation, action.steps)
                    self._spawn(self._order(self.fold.nodes[0], "save_every", *order))
            case CommitCheckpoint():
                self._spawn(self._checkpoints.commit(action))
            case DeleteCheckpoint():
                self._spawn(self._checkpoints.delete(action.step))
            case VerifyCheckpoint():
                self._spawn(self._checkpoints.verify(action))
            case PublishTrust():
                self._checkpoints.publish(action)
            case InjectFault():
                self._spawn(self._inject(action))
            case ReleaseNode():
                releasing = self._spawn(self._release(action))
                self._releases.add(releasing)
                releasing.add_done_callback(self._releases.discard)
            case SetTimer():
                self._spawn(self._timer(action))
            case UpdateJob():
                raise AssertionError("the controller changes the job")
            case ProbeNode():
                self._spawn(self._probe(action))
            case AskThird():
                raise AssertionError(f"{action}: this body has not said that it can do that")
            case EndRun():
                raise AssertionError("the controller ends the run")

    def update(self, spec: JobSpec, action: UpdateJob, save_every_steps: int) -> None:
        """The job is another from now on; its workers hear it when they are assigned."""
        self._spec, self._plans.save_every_steps = spec, save_every_steps
        for node in self.agents:
            self._spawn(self._order(node, "update", self._epoch, spec.document(), self._code()))
        self._spawn(self._put_on_record(action))

    async def _put_on_record(self, action: UpdateJob) -> None:
        """What is not on record is put there by the next controller."""
        work = asyncio.to_thread(identity.declare_update, self._spec.run.url, action.number, action.changes)
        try:
            await asyncio.wait_for(work, PUBLISH_DEADLINE_S)
        except Exception as e:
            logger.warning("update %d is not on record: %r", action.number, e)

    async def prepare_code(self, code: str) -> None:
        """Have every node ready to fork workers with this code. Raises ValueError with the first node that is not."""

        async def prepare(handle: AgentHandle) -> None:
            try:
                await call(handle.actor.prepare_code.remote(self._epoch, code), CODE_DEADLINE_S)
            except ray.exceptions.RayActorError:
                pass  # its line tells that it is dead; who takes its place prepares by itself
            except Exception as e:
                cause = e.cause if isinstance(e, ray.exceptions.RayTaskError) else e
                raise ValueError(f"node {handle.node} cannot run code {code[:12]}: {cause or repr(cause)}") from e

        await asyncio.gather(*(prepare(handle) for handle in self.agents.values() if handle.line is not None))

    def _new_fold(self, order: OpenGeneration, done: int) -> MeshFold:
        """Of the generation that `order` opens, which the plans know already."""
        layout = self._plans.layout
        return MeshFold(
            generation=order.generation,
            nodes=order.nodes,
            ranks=layout.slots,
            done=done,
            stages=layout.pp,
            slow_before=self._slow_before.setdefault(layout.slots, {}),
            loads=self._plans.loads(),
        )

    def _stop_opening(self) -> None:
        if self._opening is not None:
            self._opening.cancel()

    async def _open(self, action: OpenGeneration) -> None:
        """Copies first, then the store, then every node's assignment."""
        try:
            await asyncio.gather(*(self._transfer(action, *copy) for copy in self._plans.copies(action)))
            lead = self._agent(action.nodes[0])
            port = await call(lead.actor.open_store.remote(self._epoch, action.generation), STORE_PORT_DEADLINE_S)
            assert lead.info is not None
            parts = self._plans.assignments(action, lead.info.host, port, self._data_digest)
            self._plans.opened(action)
            # Code that was in use before, or is new to a node, may have to be imported first.
            deadline_s = ORDER_DEADLINE_S if action.code == self._imported else CODE_DEADLINE_S
            orders = (call(self._agent(n).actor.open.remote(self._epoch, p), deadline_s) for n, p in parts)
            self._imported = None
            await asyncio.gather(*orders)
            self._imported = action.code
        except NowhereWhole as e:
            logger.warning("generation %d does not open: %s", action.generation, e)
            self._post(ev.GenerationFailed(at=0, generation=action.generation, node=e.node, error=str(e), kind="state"))
        except Exception as e:
            logger.warning("generation %d does not open: %r", action.generation, e)
            error = f"{type(e).__name__}: {e}".splitlines()[0]
            # Whose fault it is cannot be told from here; a node that is dead is reported by its line.
            self._post(ev.GenerationFailed(at=0, generation=action.generation, node="", error=error))

    async def _transfer(
        self, action: OpenGeneration, transfer: Transfer, source: contract.Holder, others: tuple[contract.Holder, ...]
    ) -> None:
        """Raises NowhereWhole when no node that may hold the snapshot has all of it whole."""
        snapshot = ev.Snapshot(generation=action.snapshot_generation, step=action.step)
        order = (self._epoch, action.generation, transfer.slot, snapshot, source, others)
        try:
            # The copy itself is bounded by its size (storage/transfer.py), and the whole start by its timer.
            fetched = self._agent(transfer.to_node).actor.fetch.remote(*order)
            await call(fetched, self._spec.recovery.start_deadline_s)
        except ManifestError as e:
            cause = e.cause if isinstance(e, ray.exceptions.RayTaskError) else e  # its own text is a whole traceback
            raise NowhereWhole(transfer.to_node, f"slot {transfer.slot}: {cause}".splitlines()[0]) from e

    async def _order(self, node: str, method: str, *args: Any) -> None:
        """An order whose effect the agent reports; an agent that is dead answers with its loss."""
        deadline = time.monotonic() + ORDER_DEADLINE_S
        while True:
            try:
                await call(getattr(self._agent(node).actor, method).remote(*args), ORDER_DEADLINE_S)
            except ray.exceptions.ActorUnavailableError as e:  # a connection that broke is no death: its line tells
                if time.monotonic() < deadline:
                    await asyncio.sleep(ORDER_RETRY_S)
                    continue
                logger.warning("%s did not take %s: %r", node, method, e)
            except ray.exceptions.RayActorError as e:
                self._lost(node, f"its agent is dead ({type(e).__name__})")
            except Exception as e:
                logger.warning("%s did not take %s: %r", node, method, e)
            return

    async def _probe(self, action: ProbeNode) -> None:
        """A node that cannot even answer has not passed."""
        try:
            detail = await call(self._agent(action.node).actor.probe.remote(self._epoch), ADMISSION_DEADLINE_S)
            passed = True
        except Exception as e:
            detail, passed = last_line(e), False
        self._post(ev.NodeProbed(at=0, node=action.node, number=action.number, passed=passed, detail=detail))

    async def _inject(self, action: InjectFault) -> None:
        """The harm is done where it belongs; what was done comes back as FaultInjected."""
        try:
            detail = await ordered.harm(action, self._spec.run.url, self._epoch, self.agents, self._opened)
        except ray.exceptions.RayActorError:
            detail = "the agent died before it answered"
        except Exception as e:
            why = e.cause if isinstance(e, ray.exceptions.RayTaskError) else e  # an agent's, without Ray's frame
            detail = f"{NOT_DONE} {type(why).__name__}: {why}".splitlines()[0]
        if detail:  # else the worker tells itself
            self._post(ev.FaultInjected(at=0, number=action.number, detail=detail))

    def _opened(self) -> int:
        """The newest generation that was ordered; 0 before the first."""
        return self.fold.generation if self.fold is not None else 0

    async def _look_for_cuts(self) -> None:
        """Have the nodes try to reach each other; who is cut off is lost, though it can talk to the controller."""
        addresses = {node: handle.info.address for node, handle in self.agents.items() if handle.info is not None}
        tries = links.whom_to_try(sorted(addresses))

        async def ask(node: str, peers: tuple[str, ...]) -> tuple[str, links.Tried]:
            asked = self._agent(node).actor.unreached.remote({peer: addresses[peer] for peer in peers})
            failed = await call(asked, links.REACH_DEADLINE_S)
            return node, links.Tried(asked=frozenset(peers), failed=failed)

        answers = await asyncio.gather(*(ask(node, peers) for node, peers in tries.items()), return_exceptions=True)
        for node in links.cut_off(dict(answer for answer in answers if isinstance(answer, tuple))):
            self._lost(node, "its peers do not reach it, or it does not reach them")

    async def _release(self, action: ReleaseNode) -> None:
        self._let_go.add(action.node)
        handle = self.agents.pop(action.node, None)
        if action.for_good:
            self._drained.add(action.node[:NAME_LENGTH])
        self._fan_ins.forget(action.node)
        if handle is not None:
            self._rests_until[handle.ray_node] = time.monotonic() + REST_S
            await self._end_agent(handle, LEAVE_DEADLINE_S)

    async def _timer(self, action: SetTimer) -> None:
        await asyncio.sleep(max(0.0, (action.at - self._now()) / 1_000_000))
        self._post(ev.TimerFired(at=0, timer=action.timer))

    # --- nodes ----------------------------------------------------------------------------------------------------

    async def adopt(self, state: State) -> None:
        """After a restart: find the agents of every node that is not lost, and hear what was missed."""
        self._used_names = set(state.nodes)
        self._let_go = {name for name, node in state.nodes.items() if node.state == "lost"}
        self._leaving = set(state.leaving)
        self._drained = {name[:NAME_LENGTH] for name in state.drained}
        if state.interval is not None:
            self._plans.save_every_steps = state.interval.every_steps
        if state.order is not None:
            self._plans.adopt(state.order)
            self.fold = self._new_fold(state.order, state.step)
            self.fold.unclean = state.generation in state.unclean
        alive = [name for name, node in state.nodes.items() if node.state != "lost"]
        await asyncio.gather(*(self._adopt(node, state.step) for node in alive))

    async def _adopt(self, node: str, done: int) -> None:
        try:
            group = await asyncio.to_thread(get_placement_group, f"{self._namespace}/{node}")
            handle = AgentHandle(node=node, ray_node="", actor=None, group=group, heard_at=time.monotonic())
            self.agents[node] = handle  # so that it is released, should it be lost
            handle.actor = actor = await asyncio.to_thread(ray.get_actor, agent_name(node), self._namespace)
            handle.info = await call(actor.describe.remote(), ORDER_DEADLINE_S)
            handle.ray_node = handle.info.ray_node
            self._data_digest = self._data_digest or handle.info.data_digest
            await call(actor.attach.remote(self._epoch, done), ORDER_DEADLINE_S)
        except Exception as e:
            self._lost(node, f"not found after the controller's restart ({type(e).__name__})")
            return
        handle.line = self._spawn(self._hold_line(handle))

    async def _discover_forever(self) -> None:
        """Keep an agent on as many nodes as the run has places, and notice those that leave."""
        while not self._closing:
            found: list[RayNode] = []
            try:
                found = await asyncio.to_thread(nodes.eligible, self._spec)
            except Exception as e:  # Ray's head may be away for a while
                logger.warning("Ray does not list its nodes: %r", e)
            taken = {handle.ray_node for handle in self.agents.values()} | self._starting
            now = time.monotonic()
            free = [
                n
                for n in found
                if n.free and n.id not in taken and self._may_serve(n) and self._rests_until.get(n.id, 0.0) <= now
            ]
            for node in free[: max(0, self._places + self._without_place() - len(taken))]:
                self._starting.add(node.id)
                join = self._spawn(self._join(node))
                self._joins.add(join)
                join.add_done_callback(self._joins.discard)
            self._fan_ins.keep()
            self._check_leaving(found)
            self._check_hope(found)
            await asyncio.sleep(DISCOVER_INTERVAL_S)

    def _check_hope(self, found: list[RayNode]) -> None:
        """Whether the cluster has nodes enough, and agents have failed on too many of them for the mesh to be filled.

        Nodes that are not there may still come: for them the wait's deadline decides.
        """
        wanted = self._spec.layout.smallest.nodes
        refused = [self._given_up[node.id] for node in found if node.id in self._given_up]
        hopeless = len(found) >= wanted and len(found) - len(refused) < wanted and not self._starting
        if hopeless and not self._refusal_told:
            self._post(ev.NodesRefused(at=0, error=refused[0]))
        self._refusal_told = hopeless

    def _check_leaving(self, found: list[RayNode]) -> None:
        """Ray drains a node: its agent goes on until another has its place."""
        leaving = {node.id for node in found if node.leaving}
        for handle in list(self.agents.values()):
            if handle.ray_node in leaving and handle.node not in self._leaving and handle.line is not None:
                self._leaving.add(handle.node)
                self._post(ev.NodeLeaving(at=0, node=handle.node, by="Ray drains it"))

    def _may_serve(self, node: RayNode) -> bool:
        return not node.leaving and node.id[:NAME_LENGTH] not in self._drained and self._tries_left(node.id)

    def _tries_left(self, ray_node: str) -> bool:
        return self._failed_starts.get(ray_node, 0) < START_TRIES

    async def _join(self, node: RayNode) -> None:
        name, spec = self._fresh_name(node.id), self._spec
        handle: AgentHandle | None = None
        try:
            # Before anything trains, what is left in memory is of the run's last life; afterwards, of nodes that died.
            adopts = self.fold is None
            handle, info = await start_agent(spec, self._namespace, name, node, self._token, self._instance, adopts)
            self._data_digest = self._data_digest or info.data_digest
            if info.data_digest != self._data_digest:
                raise OtherData(
                    f"its data has digest {info.data_digest}, "
                    + (
                        f"the run's checkpoints were trained on {self._trained_on}: data.corpus or the tokenizers "
                        "library has changed since the run was started; restore it, or start a run of its own"
                        if self._trained_on
                        else f"the others' {self._data_digest}: give every node the same corpus (data.corpus) and the "
                        "same versions"
                    )
                )
            await self._check_reach(handle)
            await nodes.check_links(handle, list(self.agents.values()), self._spec.cluster.least_bandwidth_mb_s)
            self.agents[name] = handle
            await call(handle.actor.attach.remote(self._epoch, 0), ORDER_DEADLINE_S)
            code = self._code()
            if self._spec is not spec or code:  # it has been updated meanwhile, or before
                await call(handle.actor.update.remote(self._epoch, self._spec.document(), code), CODE_DEADLINE_S)
        except BaseException as e:
            self.agents.pop(name, None)
            if handle is not None:
                await release(handle)
            if not isinstance(e, Exception):
                raise
            # Data that is another stays so, and a device that was wrong once is not to be trusted; all else is tried
            # again.
            tries = START_TRIES if isinstance(e, (OtherData, NotAdmitted)) else 0 if isinstance(e, CutOff) else 1
            if isinstance(e, CutOff):
                self._rests_until[node.id] = time.monotonic() + REST_S
            self._failed_starts[node.id] = self._failed_starts.get(node.id, 0) + tries
            reason = f"node {name} did not come up: {type(e).__name__}: {last_line(e)}"
            self._notice(reason)
            if not self._tries_left(node.id):
                self._notice(f"Ray node {node.id[:8]} is left alone")
                self._given_up[node.id] = reason
            return
        finally:
            self._starting.discard(node.id)
        self._failed_starts.pop(node.id, None)
        handle.line = self._spawn(self._hold_line(handle))
        self._post(ev.NodeJoined(at=0, node=name, domain=node.domain, snapshots=info.snapshots))

    async def _check_reach(self, handle: AgentHandle) -> None:
        """Raises CutOff when a new node does not reach most of those who are here; one alone may be cut off itself."""
        here = {node: known.info.address for node, known in self.agents.items() if known.info is not None}
        asked = links.whom_to_try([handle.node, *sorted(here)])[handle.node]
        addresses = {node: here[node] for node in asked}
        failed = await call(handle.actor.unreached.remote(addresses), links.REACH_DEADLINE_S)
        if len(addresses) > 1 and len(failed) > len(addresses) / 2:
            raise CutOff(f"it does not reach {', '.join(sorted(failed))}: is its network whole?")

    def _fresh_name(self, ray_node: str) -> str:
        """A name that no agent of this run has had: those of lost nodes are never used again."""
        tries = 1
        while (
            name := ray_node[:NAME_LENGTH] if tries == 1 else f"{ray_node[:NAME_LENGTH]}-{tries}"
        ) in self._used_names:
            tries += 1
        self._used_names.add(name)
        return name

    async def _hold_line(self, handle: AgentHandle) -> None:
        """A connection that nobody uses: its end tells within milliseconds that the agent's process is gone."""
        assert handle.info is not None
        broken = 0
        while broken <= LINE_RETRIES:
            began = time.monotonic()
            try:
                await wires.hold_line(handle.info.address, self._token)
            except wires.PeerUnreachable:  # the network between may be cut: how long it is silent decides
                if handle.node not in self.agents:
                    return
                await asyncio.sleep(LINE_RETRY_S)
                continue
            except wires.PeerError:
                break
            broken = 1 if time.monotonic() - began > LINE_SOUND_S else broken + 1
        if not self._closing and handle.node in self.agents:
            self._lost(handle.node, "its connection closed")

    def _lost(self, node: str, cause: str) -> None:
        if node not in self._losses_told:
            self._losses_told.add(node)
            self._post(ev.NodeLost(at=0, node=node, cause=cause))

    def _agent(self, node: str) -> AgentHandle:
        if node not in self.agents:
            raise RuntimeError(f"node {node} has no agent any more")
        return self.agents[node]

    # --- the end --------------------------------------------------------------------------------------------------

    async def end(self) -> None:
        """Release every node: workers ended, snapshots deleted, actors killed, reservations given back."""
        self._closing = True
        self._fan_ins.end()
        joins = list(self._joins)
        for task in (*joins, self._opening, self._watching):
            if task is not None:
                task.cancel()  # an agent that is coming up is released on the way out
        deadline_s = self._spec.recovery.halt_deadline_s + 5
        ends = (self._end_agent(handle, deadline_s) for handle in self.agents.values())
        await asyncio.gather(*ends, *joins, *self._releases, return_exceptions=True)
        self.agents.clear()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _end_agent(self, handle: AgentHandle, deadline_s: float) -> None:
        """End an agent: by itself, so that its workers and its memory go with it, else by force."""
        try:
            if handle.actor is not None:
                await call(handle.actor.shutdown.remote(self._epoch), deadline_s)
        except Exception as e:
            if isinstance(e, ray.exceptions.RayTaskError) and isinstance(e.cause, StaleOrder):
                logger.warning("agent %s belongs to a newer controller: %s", handle.node, e.cause)
                return
            logger.warning("agent %s did not shut down by itself: %r", handle.node, e)
        try:
            await release(handle)
        except Exception as e:
            logger.warning("agent %s could not be released: %r", handle.node, e)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a task of the controller failed", exc_info=task.exception())
