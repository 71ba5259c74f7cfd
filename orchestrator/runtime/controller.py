"""The controller: the named Ray actor in which the supervisor lives.

It does three things and nothing else: it turns what happens on the cluster into events, journals what the supervisor
decides, and has the decisions carried out (`body.py`). One loop, one brain:

    inbox -> handle -> journal -> (durable) -> perform

The actor is detached and restarts for ever: a controller that comes back takes the next epoch, folds the journal from
its newest snapshot, asks the agents for what it missed, and goes on. Training does not stop meanwhile. It ends itself
when the run has ended, or when its driver has not renewed its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import hmac
import ipaddress
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any, TypeVar

import ray

from orchestrator import identity, job_update
from orchestrator.chaos import ballast, head
from orchestrator.chaos.orders import ENDS_THE_CONTROLLER, OF_THE_TRAINER, TOLD_BY_THE_WORKER, Order, resolve
from orchestrator.core import events as ev
from orchestrator.core.actions import Action, EndRun, SetTimer, UpdateJob
from orchestrator.core.supervisor import Supervisor
from orchestrator.observe.exporter import serve_metrics
from orchestrator.observe.notices import notices
from orchestrator.observe.status import Status, status_of
from orchestrator.runtime import journal as journals
from orchestrator.runtime.body import NAME_LENGTH, Body
from orchestrator.runtime.groups import halts_joined
from orchestrator.runtime.nodes import sweep
from orchestrator.runtime.preparation import run_log_dir
from orchestrator.runtime.reports import Report
from orchestrator.runtime.retune import Retuner, in_force
from orchestrator.runtime.snapshot_writer import SnapshotWriter
from orchestrator.spec import JobSpec, parse
from storage import pins
from storage.commits import list_commits
from storage.redact import redact_logging, redacted

logger = logging.getLogger(__name__)
T = TypeVar("T")

INBOX_EVENTS = 100_000
"""Far more than a controller falls behind by; beyond it agents are refused and send again."""
RAY_ID_LENGTH = 56
"""Hex digits of a Ray node's id."""
NAMES_SHOWN = 5
"""Of a run's nodes, to somebody who has mistyped one."""
BATCH_EVENTS = 256
"""Events that share one journal write."""
HOLD_RETRY_S = 2.0
"""Between tries to write a journal whose store has failed; training goes on meanwhile."""
STORE_SILENCE_S = 15.0
"""A store that does not answer for so long is away, though it does not say so: a mount whose server has vanished."""
RELEASE_SLACK_S = 10.0
"""For the end of all agents, beyond recovery.halt_deadline_s for their workers; and for the journal's last segment."""
THREADS = 32
"""For what blocks: a failure of many ranks writes its evidence beside the journal."""
END_LINGER_S = 20.0
"""How long an ended controller waits for its driver to read the verdict."""
NOTICES = 500
"""Lines kept for the driver; it reads them each second."""


class EndedInHold(RuntimeError):
    """Somebody asked for an end at once while nothing could be decided."""


def namespace_of(run: str) -> str:
    """The Ray namespace in which a run's actors have their names."""
    return f"shepherd-{run}"


class Controller:
    """The actor. Its coroutines share one loop, so nothing here needs a lock."""

    def __init__(self, *, spec_document: dict[str, Any], token: str, detached: bool) -> None:
        redact_logging()
        self._spec: JobSpec = parse(spec_document)
        self._token, self._detached = token, detached
        self._supervisor = Supervisor()
        self._retuner = self._new_retuner()
        self._inbox: asyncio.Queue[ev.Event] = asyncio.Queue(maxsize=INBOX_EVENTS)
        self._notices: deque[tuple[int, str]] = deque(maxlen=NOTICES)
        self._noticed = time.time_ns() // 1000  # rises also over a restart, so that the driver misses nothing
        self._leased_at = time.monotonic()
        self._hold = ""
        self._failure = ""
        self._poison = ""
        self._undone = False
        """Whether what the poison has half done has been."""
        self._over = False
        self._observes = False
        self._updating = False
        """Somebody's update is being made ready."""
        self._update_number = 0
        """The last update by which the job has become what it is here; the supervisor may be ahead of that."""
        self._orders: list[tuple[int, Action]] = []
        """What was decided and is not performed yet, each with the time of its event."""
        self._must_publish = False
        """Whether they have to be durable first."""
        self._tail_told = False
        self._snapshots = SnapshotWriter(self._spec.run.url, metadata_version(), self.notice)
        self._end_asked = asyncio.Event()
        """Somebody wants an end at once, also if nothing can be decided."""
        self._replaced = False
        """A newer controller has taken over: what is there is its own now."""
        self._ended = asyncio.Event()
        self._verdict_read = asyncio.Event()
        self._metrics_port = 0
        self._clock: tuple[float, int] | None = None
        self._last_at = 0
        self._body: Body | None = None
        self._epoch = 0
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self._task = asyncio.get_running_loop().create_task(self._live(restarted))

    # --- what drivers and agents call -----------------------------------------------------------------------------

    async def report(self, node: str, batch: list[tuple[int, Report]]) -> str | None:
        """An agent's outbox, with its numbers. None when it was not taken in: this controller still reads its journal,
        or is behind. Else the address of the fan-in that the agent shall report to from now on; empty: here.

        Raises:
            RuntimeError: it knows no such agent (yet).
        """
        if self._body is None:
            return None
        behind = self._is_behind()
        for event in self._body.hear(node, [] if behind else batch):  # who is not listened to is not silent
            self._post(event)
        return None if behind else self._body.fan_in_for(node)

    async def poll(self, noticed: int, lease: bool) -> tuple[Status, list[tuple[int, str]]]:
        """The run as it stands, and the notices after number `noticed`. With `lease`, the driver's sign of life."""
        if lease:
            self._leased_at = time.monotonic()
        status = self._status()
        if status.ended and lease:
            self._verdict_read.set()
        return status, [(number, line) for number, line in self._notices if number > noticed]

    async def renew(self) -> None:
        """The driver lives."""
        self._leased_at = time.monotonic()

    async def stop(self, token: str, by: str, graceful: bool) -> None:
        """End the run: gracefully with a checkpoint at the next step boundary, else at once.

        Raises:
            PermissionError: not the job's token.
        """
        if not hmac.compare_digest(token, self._token):
            raise PermissionError("stopping a run needs its token")
        if not graceful:
            self._end_asked.set()
        self._post(ev.StopRequested(at=0, by=by, graceful=graceful))

    async def drain(self, token: str, node: str, by: str) -> None:
        """A node will be taken away: another takes its place as soon as it can, and no agent is started there again.

        `node` is its name, or its whole id in Ray.

        Raises:
            PermissionError: not the job's token.
            ValueError: there is no such node, or now is no time for it.
        """
        if not hmac.compare_digest(token, self._token):
            raise PermissionError("draining a node of a run needs its token")
        if self._hold:
            raise ValueError(f"the run holds, nothing is decided now: {self._hold}")
        here = [name for name, known in self._supervisor.state.nodes.items() if known.state != "lost"]
        of_id = (name for name in here if len(node) == RAY_ID_LENGTH and name[:NAME_LENGTH] == node[:NAME_LENGTH])
        meant = node if node in here else next(of_id, None)
        if meant is None:
            near = difflib.get_close_matches(node, here, n=NAMES_SHOWN, cutoff=0)
            raise ValueError(f"{node}: is no node of this run; names like it are {', '.join(near) or 'none'}")
        if self._supervisor.state.begins_anew and self._supervisor.state.nodes[meant].state == "active":
            raise ValueError(
                f"{meant}: its script has told no step (session.step), so without this node it begins anew, which is "
                "waited for in vain: stop the run, or end the node"
            )
        self._post(ev.NodeLeaving(at=0, node=meant, by=by))

    async def update(self, token: str, overrides: list[str], code: str | None, by: str) -> list[str]:
        """Go on as another job from the next step boundary on.

        Args:
            overrides: each ``section.key=value``.
            code: names what workers shall import, which is under run.url; empty: the installed code, None: the same.

        Returns:
            What changes, a line each.

        Raises:
            PermissionError: not the job's token.
            ValueError: the job could not run so, or now is no time for it; nothing has changed.
        """
        if not hmac.compare_digest(token, self._token):
            raise PermissionError("updating a run needs its token")
        if self._hold:
            raise ValueError(f"the run holds, nothing is decided now: {self._hold}")
        state = self._supervisor.state
        if state.job == "ended" or state.stopping:
            raise ValueError("the run has ended, or has been asked to: resume it with the other job")
        if self._updating or state.update is not None or self._body is None:
            raise ValueError("another update is under way, or the controller has just begun: try again in a moment")
        self._updating = True
        try:
            return await self._update(self._body, overrides, code, by)
        finally:
            self._updating = False

    async def _update(self, body: Body, overrides: list[str], code: str | None, by: str) -> list[str]:
        new = job_update.updated(self._spec, overrides)
        changes, undo = job_update.changes(self._spec, new), job_update.changes(new, self._spec)
        before, number = self._supervisor.state.code, self._update_number + 1
        code = before if code is None else code
        if not changes and code == before:
            raise ValueError("nothing changes: the job has these values, and its workers this code")
        if code and new.is_script:
            raise ValueError("a script's own code is in script.folder: stop the run, and resume it with another folder")
        if self._supervisor.state.begins_anew:
            raise ValueError(
                "the script has told no step (session.step), so no change of it loses nothing: stop the run, and start "
                "it as the other job"
            )
        if new.total_steps <= self._supervisor.state.step:
            raise ValueError(f"run.steps = {new.run.steps}: so many are done; end the run by `shepherd stop`")
        if code != before:
            await body.prepare_code(code)
        # Before any change of the job: a controller that reads what follows need not read what came before with it.
        await self._snapshots.write(self._journal, self._supervisor.state)
        if number != self._update_number + 1:
            raise ValueError("the run has taken its last update back meanwhile: ask again, if it is still wanted")
        self._post(
            ev.UpdateRequested(
                at=0,
                by=by,
                changes=changes,
                code=code,
                limits=new.limits,
                total_steps=new.total_steps,
                restarts=code != before or new.worker_config != self._spec.worker_config,
                chooses_interval=any(name in job_update.CHOOSES_INTERVAL for name in changes),
                undo=undo,
                number=number,
            )
        )
        new_code = [f"the workers' code = {code[:12] or 'as installed'}"] if code != before else []
        return [f"{name} = {value}" for name, value in changes.items()] + new_code

    async def inject(self, token: str, order: Order, by: str) -> str:
        """Chaos: do harm, as somebody asks who has the job's token. Its truth comes into the journal under the answer.

        Returns:
            run.url.

        Raises:
            PermissionError: not the job's token.
            ValueError: there is no such scenario, rank or node, or now is no time for it.
        """
        if not hmac.compare_digest(token, self._token):
            raise PermissionError("chaos in a run needs its token")
        if self._hold:
            raise ValueError(f"the run holds, nothing is decided now: {self._hold}")
        spec = self._spec
        if order.scenario == "disk-full":
            await asyncio.to_thread(ballast.check, spec.run.url, order.ballast_bytes)
        if order.scenario == "head-kill":
            await asyncio.to_thread(head.check)
        if spec.is_script and order.scenario in OF_THE_TRAINER:
            raise ValueError(f"{order.scenario} is for the Llama trainer: where a script does that is not known")
        state = self._supervisor.state
        for asked in resolve(order, state, len(state.mesh) * spec.cluster.slots_per_node, by):
            pid = {"pid": str(os.getpid())} if order.scenario in ENDS_THE_CONTROLLER else {}
            self._post(dataclasses.replace(asked, parameters=asked.parameters | pid))
        return spec.run.url

    async def where(self, token: str) -> str:
        """run.url, which may hold credentials. Raises PermissionError when the token is not the job's."""
        if not hmac.compare_digest(token, self._token):
            raise PermissionError("where a run keeps its state is told for its token")
        return self._spec.run.url

    # --- the one loop ---------------------------------------------------------------------------------------------

    async def _live(self, restarted: bool) -> None:
        lease = asyncio.create_task(self._watch_lease())
        try:
            await self._begin(restarted)
            await self._decide_until_over()
        except Exception as e:
            logger.exception("the controller cannot go on")
            self._failure = f"{type(e).__name__}: {e}"
            self._replaced = isinstance(e, journals.Replaced)
            self.notice(f"the controller cannot go on: {self._failure}")
        lease.cancel()
        await self._release()
        self._ended.set()
        driver_lives = time.monotonic() - self._leased_at < self._spec.recovery.driver_lease_s
        try:
            await asyncio.wait_for(self._verdict_read.wait(), END_LINGER_S if self._detached or driver_lives else 0.0)
            await asyncio.sleep(1.0)  # the answer that carries the verdict is still on its way
        except TimeoutError:
            pass
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _begin(self, restarted: bool) -> None:
        """Take the epoch, fold the journal, and find or start the agents."""
        spec, url, namespace = self._spec, self._spec.run.url, namespace_of(self._spec.run.name)
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        version = metadata_version()
        claim = await self._until_stored(lambda: journals.claim_epoch(url, version))
        self._epoch = claim.epoch
        await self._until_stored(lambda: identity.declare(spec))
        tail = journals.tail_path(run_log_dir(spec), url)
        if claim.epoch == 1:
            tail.unlink(missing_ok=True)  # of a run whose directory has been deleted
        self._journal = await self._until_stored(lambda: journals.Journal(url, tail, claim.epoch))
        for line in self._journal.passed_over:
            self.notice(f"a snapshot of the core is passed over: {line}")
        self._supervisor = await asyncio.to_thread(self._journal.replay)
        if self._journal.records:
            await self._snapshots.write(self._journal, self._supervisor.state)
        if restarted:  # a resume's document says all of it anew
            self._go_by(self._supervisor.state.changes)
            spec = self._spec
        self._update_number = self._supervisor.state.n_updates
        if self._retuner is not None:
            self._retuner.recall(self._supervisor.state)
        self._last_at = self._supervisor.state.ledger.mark
        self._clock = (time.monotonic(), max(self._last_at, time.time_ns() // 1000 - claim.began_unix_us))
        self._metrics_port = self._serve_metrics(restarted)
        found = await self._until_stored(lambda: list_commits(url))
        pinned = await self._until_stored(lambda: sorted(pins.pinned(url)))
        data = await self._until_stored(lambda: identity.data_digest(url, found))
        self._body = Body(
            spec,
            namespace,
            self._token,
            claim.epoch,
            f"{claim.began_unix_us:x}",
            data,
            self._now,
            self._post,
            self.notice,
            self._without_place,
            self._is_behind,
            self._standing,
            lambda: self._supervisor.state.code,
        )
        began = ev.EpochBegan(at=0, epoch=claim.epoch, version=version)
        if restarted and self._supervisor.state.run:
            self.notice(f"controller back in epoch {claim.epoch}, {len(self._journal.records)} records replayed")
            again = await self._decide([began, *self._survived()])
            known = {name for name, node in self._supervisor.state.nodes.items() if node.state != "lost"}
            await self._sweep(known)
            await self._body.adopt(self._supervisor.state)
        else:
            await self._sweep(set())
            declared = ev.RunDeclared(
                at=0,
                run=spec.run.name,
                layout=spec.layout,
                limits=spec.limits,
                total_steps=spec.total_steps,
                capabilities=(
                    "ram",
                    "peer",
                    "verify",
                    "probe",
                    *([] if spec.is_script else ["park"]),  # frames and globals of a script are its own
                    *(["buddy"] if spec.checkpoint.copies == "auto" else []),
                ),
            )
            again = await self._decide([declared, began])
        pins_found = ev.CheckpointsPinned(at=0, steps=tuple(pinned))
        again += await self._decide([pins_found, ev.CheckpointsFound(at=0, steps=tuple(found))])
        for at, action in again:
            self._perform(at, action)
        self._body.start()

    def _survived(self) -> list[ev.Event]:
        """Ground truth that a controller which died could not tell; what a worker did, that tells itself."""
        killed = f"SIGKILL for the controller's process; epoch {self._epoch} took over"
        unknown = "not known whether it was done: the controller died meanwhile"
        return [
            ev.FaultInjected(at=0, number=f.number, detail=killed if f.fault in ENDS_THE_CONTROLLER else unknown)
            for f in self._supervisor.state.faults
            if f.injected_at is None and f.fault not in TOLD_BY_THE_WORKER
        ]

    def _serve_metrics(self, restarted: bool) -> int:
        loop = asyncio.get_running_loop()
        try:
            return serve_metrics(self._spec, self._status, loop)
        except OSError:
            if not restarted:
                raise
        self.notice(f"metrics.port = {self._spec.metrics.port} is taken, metrics move to another; see shepherd status")
        anywhere = self._spec.metrics.model_copy(update={"port": 0})
        return serve_metrics(self._spec.model_copy(update={"metrics": anywhere}), self._status, loop)

    async def _decide_until_over(self) -> None:
        keep_at = time.monotonic()
        self._observes = True
        while not self._over:
            events: list[ev.Event] = []
            if not self._orders:
                with contextlib.suppress(TimeoutError):
                    events.append(await asyncio.wait_for(self._inbox.get(), 0.5))
            while not self._inbox.empty() and len(events) < BATCH_EVENTS:
                events.append(self._inbox.get_nowait())
            for at, action in await self._decide(halts_joined(events)):
                self._perform(at, action)
            if not self._poison:
                self._snapshots.write_if_due(self._journal, self._supervisor.state)
            if time.monotonic() - keep_at > 0.5:
                keep_at = time.monotonic()
                await self._until_stored(self._journal.keep)
                self._tell_tail()

    async def _decide(self, events: list[ev.Event]) -> list[tuple[int, Action]]:
        """What is to be done about these events, with each one's time; durable, where it must be, when this returns."""
        for event in events:
            self._fold(event)
        orders, self._orders = self._orders, []
        if self._must_publish:
            self._must_publish = False
            await self._until_stored(self._journal.publish)
        if self._poison and not self._undone:
            await self._undo()
        return orders

    async def _undo(self) -> None:
        """What a poisonous event has half done is undone: the journal does not have it, and says what the state is."""
        self._undone = True
        try:
            self._supervisor = await self._until_stored(self._journal.read_again)
        except journals.JournalError as e:
            self.notice(f"what the event has half done could not be undone, so that this picture may be wrong: {e}")

    def _fold(self, event: ev.Event) -> None:
        if self._poison:
            self._check_end_in_hold(self._poison)
            return  # nothing is decided any more; the event is set aside
        event = _redacted(dataclasses.replace(event, at=self._now()))
        try:
            decided = self._supervisor.handle(event)
            must_publish = self._journal.append(event, decided)
        except Exception as e:
            logger.exception("poison: %r", event)
            self._poison = self._hold = f"the supervisor failed on {event!r}: {e!r}"
            self.notice(f"HOLD: nothing is decided from here on, training goes on: {self._poison}")
            return
        self._must_publish |= must_publish
        self._orders += [(event.at, action) for action in decided]
        for line in notices(event, decided, self._supervisor.state):
            self.notice(line)
        self._retune(event, decided)

    def _retune(self, event: ev.Event, decided: list[Action]) -> None:
        """What the run measures may ask for another interval. That it cannot be told must not end the run."""
        if self._retuner is None:
            return
        try:
            chosen = self._retuner.note(event, decided, self._supervisor.state)
        except Exception as e:
            logger.exception("the interval cannot be chosen after %r", event)
            self.notice(f"the interval between checkpoints stays as it is from here on: {e!r}")
            self._retuner = None
            return
        if chosen is not None:
            self._fold(chosen)

    async def _until_stored(self, work: Callable[[], T]) -> T:
        """The result of work on the store; while the store fails, hold: nothing is ordered, and training goes on.

        What happens meanwhile is still folded, so that people see it: steps, failed saves. Up to the first event that
        forces a decision, which waits like the one before it.

        Raises:
            JournalError: the journal is damaged, or a newer controller has taken over.
            EndedInHold: somebody asked for an end at once during the hold.
        """
        observing = asyncio.create_task(self._observe())
        try:
            return await self._hold_until(work)
        finally:
            observing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await observing

    async def _observe(self) -> None:
        while self._observes and not self._orders and not self._poison and self._journal.backlog < INBOX_EVENTS:
            self._fold(await self._inbox.get())

    async def _hold_until(self, work: Callable[[], T]) -> T:
        while True:
            try:
                result = await self._answer(work)
            except (journals.JournalError, EndedInHold):
                raise
            except Exception as e:  # every store has its own exceptions
                self._begin_hold(repr(e))
                await asyncio.sleep(HOLD_RETRY_S)
                continue
            if self._hold != self._poison:
                self.notice("the journal is written again" + ("" if self._poison else ", the hold is over"))
                self._hold = self._poison
            return result

    async def _answer(self, work: Callable[[], T]) -> T:
        """The result of work on the store. One that does not answer is held for, and asked no second time."""
        began = time.monotonic()
        asked = asyncio.ensure_future(asyncio.to_thread(work))
        while not (await asyncio.wait({asked}, timeout=HOLD_RETRY_S))[0]:
            silent_s = time.monotonic() - began
            if silent_s > STORE_SILENCE_S:
                self._begin_hold(f"the store has not answered for {silent_s:.0f} s")
        return asked.result()

    def _begin_hold(self, why: str) -> None:
        if not self._hold:
            self.notice(f"HOLD: the journal cannot be written, nothing is decided until it can: {why}")
        self._hold = why
        self._check_end_in_hold(why)

    def _tell_tail(self) -> None:
        error = self._journal.tail_error
        if error and not self._tail_told:
            self.notice(f"the journal's local tail cannot be written, run.url holds it alone: {error}")
        self._tail_told = bool(error)

    def _check_end_in_hold(self, why: str) -> None:
        if self._end_asked.is_set():
            raise EndedInHold(f"stopped while nothing could be decided: {why}")

    def _perform(self, at: int, action: Action) -> None:
        """Have an action carried out that the event at time `at` was answered with."""
        assert self._body is not None
        if isinstance(action, EndRun):
            self._over = True
        elif isinstance(action, UpdateJob):
            self._go_by(action.changes)
            self._update_number = action.number
            self._body.update(self._spec, action, in_force(self._spec.checkpoint, self._supervisor.state))
        elif isinstance(action, SetTimer):
            # It runs from when its order could be given: a hold must not use up somebody's deadline.
            self._body.perform(dataclasses.replace(action, at=action.at + self._now() - at))
        else:
            self._body.perform(action)

    def _go_by(self, changes: dict[str, str]) -> None:
        """The job is another; also a second time, as when a controller comes back."""
        before, self._spec = self._spec, job_update.applied(self._spec, changes)
        if self._spec.checkpoint != before.checkpoint:
            self._retuner = self._new_retuner()
            if self._retuner is not None:
                self._retuner.recall(self._supervisor.state)

    def _new_retuner(self) -> Retuner | None:
        checkpoint = self._spec.checkpoint
        return Retuner(checkpoint) if checkpoint.interval == "auto" else None

    async def _release(self) -> None:
        """Give everything back, whatever state the run is in. Bounded: an end must come."""
        if self._replaced:
            return
        deadline_s = self._spec.recovery.halt_deadline_s + RELEASE_SLACK_S
        steps: list[Callable[[], Awaitable[Any]]] = [lambda: sweep(namespace_of(self._spec.run.name), set())]
        if self._body is not None:
            steps.insert(0, self._body.end)
        if self._over:
            steps.append(lambda: asyncio.to_thread(self._journal.close))
        for step in steps:
            try:
                await asyncio.wait_for(step(), deadline_s)
            except Exception as e:
                logger.exception("not everything was released")
                self._failure = self._failure or f"at the end: {e!r}"
                self.notice(f"at the end: {e!r}")
        if self._over and not self._poison:
            await self._snapshots.write(self._journal, self._supervisor.state)

    async def _sweep(self, known: set[str]) -> None:
        """End agents that the journal does not know. What Ray does not do now, the run's end will."""
        try:
            await sweep(namespace_of(self._spec.run.name), known)
        except Exception as e:
            logger.warning("agents that are not known could not be ended: %r", e)

    async def _watch_lease(self) -> None:
        looked_at = time.monotonic()
        while not self._detached:
            await asyncio.sleep(1.0)
            lease_s = self._spec.recovery.driver_lease_s
            now = time.monotonic()
            if now - looked_at > 3.0:
                self._leased_at = now  # this process stood still: what the driver sent waits to be read
            looked_at = now
            if now - self._leased_at > lease_s:
                self._end_asked.set()
                self._post(ev.StopRequested(at=0, by=f"the driver's silence of {lease_s:g} s", graceful=False))
                return

    # --- small parts ----------------------------------------------------------------------------------------------

    def _post(self, event: ev.Event) -> None:
        """Queue an event; its time is set when it is taken. Raises asyncio.QueueFull when the bound is reached."""
        self._inbox.put_nowait(event)

    def _now(self) -> int:
        """Microseconds on the run's clock, monotone also across restarts; 0 before the journal is read."""
        if self._clock is None:
            return 0
        monotonic, at = self._clock
        self._last_at = max(self._last_at, at + round((time.monotonic() - monotonic) * 1_000_000))
        return self._last_at

    def _without_place(self) -> int:
        state = self._supervisor.state
        return state.n_in_quarantine + state.n_leaving

    def _is_behind(self) -> bool:
        """Agents must wait: it is not able to take in what they report."""
        return self._inbox.qsize() > INBOX_EVENTS // 2

    def _standing(self, node: str) -> str:
        """What is to be thought of a node; empty when it is not to be used."""
        state = self._supervisor.state
        usable = node in state.nodes and state.nodes[node].state in ("active", "spare")
        return state.standing(node) if usable else ""

    def notice(self, line: str) -> None:
        """A line for the people who watch."""
        self._noticed += 1
        self._notices.append((self._noticed, redacted(line)))
        logger.info("%s", line)

    def _status(self) -> Status:
        body = self._body
        return status_of(
            self._supervisor.state,
            at=self._now(),
            save_every_steps=in_force(self._spec.checkpoint, self._supervisor.state),
            hold=redacted(self._hold),
            failure=redacted(self._failure),
            ended=self._ended.is_set(),
            metrics_address=_reachable(self._spec.metrics.bind, self._metrics_port),
            newest=body.fold.last if body and body.fold else None,
            rates=body.rates if body else [],
            tracebacks=body.evidence.tracebacks if body else {},
        )


def _reachable(bind: str, port: int) -> str:
    """host:port by which a server that is bound to `bind` on this node can be reached."""
    with contextlib.suppress(ValueError):  # a name stays a name
        if ipaddress.ip_address(bind).is_unspecified:
            bind = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    return f"[{bind}]:{port}" if ":" in bind else f"{bind}:{port}"


def _redacted(event: ev.Event) -> ev.Event:
    """Errors name URLs, and URLs may hold credentials: they must not get into the journal."""
    texts: dict[str, Any] = {name: redacted(text) for name, text in vars(event).items() if isinstance(text, str)}
    return dataclasses.replace(event, **texts)


def metadata_version() -> str:
    """Shepherd's version; "source" when it runs from a source tree that is not installed."""
    try:
        return metadata.version("shepherd-train")
    except metadata.PackageNotFoundError:
        return "source"
