"""The node's torch elastic agent: starts the workers of each generation as the controller assigned it, decides nothing.

`NodeWorkers` is what the node's agent actor holds. Inside, one `SimpleElasticAgent` lives as long as the node and goes
from generation to generation: torch elastic's rendezvous and rank assignment through the generation's store, then a
worker for each slot: one that has parked, else a fork from the zygote. A worker's death is reported and touches nobody
else: the controller orders the halt.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.api import Worker as ElasticWorker
from torch.distributed.elastic.multiprocessing import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousGracefulExitError,
    RendezvousParameters,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)

from orchestrator.runtime.assignment import NodeAssignment, WorkerExit
from orchestrator.runtime.hangs import Sighting
from orchestrator.runtime.rendezvous import BACKEND, ControllerRendezvous
from orchestrator.runtime.worker_log import LogFile
from orchestrator.runtime.worker_process import ExitStatus, Worker
from orchestrator.runtime.workers import Workers, ZygoteError
from trainer import contract

logger = logging.getLogger(__name__)

ROLE = "trainer"
# A fork takes milliseconds; while a zygote that died is replaced, its preload (3 s alone, 37 s for eight at once on two
# cores) is waited for.
FORK_DEADLINE_S = 60.0
# A killed process is gone in milliseconds, unless a driver holds it; used where torch elastic gives no deadline.
KILL_DEADLINE_S = 30.0
# Zygotes with code that was prepared and not taken yet: an update that waits for its step boundary, and the next one.
CODES_READY = 2
# Of a sound disk; one that hangs is left.
LOG_CLOSE_S = 0.5


class NodeWorkers:
    """The workers of one node. Methods may be called from any thread but the callbacks' own.

    `on_message` gets the contract messages of the running generation's workers, each worker's in order; `on_exit` every
    exit that we did not cause. They run in the threads that listen and that start workers: they must be quick, and may
    not call back.
    """

    def __init__(
        self,
        *,
        run: str,
        node: str,
        host: str,
        slots: int,
        log_dir: Path,
        env: dict[str, str],
        preload: str = "trainer.worker",
        on_message: Callable[[object], None],
        on_exit: Callable[[WorkerExit], None],
        warm_workers: int = 0,
    ) -> None:
        self._slots, self._warm_workers = slots, min(warm_workers, slots)
        self._warming = threading.Lock()
        self._on_message = on_message
        self._on_exit = on_exit
        self._preload = preload
        self.code = ""
        """Names the code that workers are forked with; empty: the installed one."""
        self._ready: dict[str, Workers] = {}
        """Those that have imported other code, by its name, and have forked nobody yet."""
        parameters = RendezvousParameters(BACKEND, host, run, min_nodes=1, max_nodes=1, local_addr=host)
        handler = rendezvous_handler_registry.create_handler(parameters)
        assert isinstance(handler, ControllerRendezvous)
        self._rendezvous = handler
        self._log = LogFile(log_dir / f"{node}.log")
        self._workers = self._zygote_with(env)
        spec = WorkerSpec(
            role=ROLE, local_world_size=slots, entrypoint=preload, rdzv_handler=handler, max_restarts=0, local_addr=host
        )
        self._agent = _ElasticAgent(spec, node=node, rendezvous=handler, workers=self._workers, on_exit=self._exited)
        self._said = threading.Condition()
        self._spoken: set[tuple[int, int]] = set()
        """Generation and rank of those whose last words (Failed) have come, or whose process has ended."""
        self._thread = threading.Thread(target=self._agent.run_generations, name="elastic-agent", daemon=True)

    def start(self, deadline_s: float) -> None:
        """Warm the zygote, and begin to wait for assignments.

        Raises:
            ZygoteError: the worker's module cannot be imported, or not within `deadline_s`.
        """
        self._workers.start(deadline_s)
        self._thread.start()

    def _zygote_with(self, env: dict[str, str]) -> Workers:
        return Workers(
            preload=self._preload, env=env, log=self._log, on_message=self._message, on_exit=self._worker_exited
        )

    def prepare_code(self, code: str, env: dict[str, str], deadline_s: float) -> None:
        """Warm a zygote with other code beside the one in use, which goes on as it is; `use_code` takes it.

        Raises:
            ZygoteError: the worker's module cannot be imported from there, or not within `deadline_s`.
        """
        if code == self.code or code in self._ready:
            return
        while len(self._ready) >= CODES_READY:
            try:
                self._ready.pop(next(iter(self._ready))).close(KILL_DEADLINE_S)
            except TimeoutError:
                logger.exception("a zygote with code that nobody wants any more does not end")
        workers = self._zygote_with(env)
        try:
            workers.start(deadline_s)
        except ZygoteError:
            workers.close(KILL_DEADLINE_S)
            raise
        self._ready[code] = workers

    def use_code(self, code: str) -> None:
        """From here on fork from the zygote that was prepared with this code; all workers of before are ended.

        Between two generations. Raises TimeoutError when one of them is still there.
        """
        if code == self.code:
            return
        with self._warming:
            before, self._workers, self.code = self._workers, self._ready.pop(code), code
            self._agent.fork_from(self._workers)
        unused, self._ready = list(self._ready.values()), {}
        for workers in (before, *unused):
            workers.close(KILL_DEADLINE_S)

    def open_store(self, generation: int) -> int:
        """On the lead node, before the generation is assigned: its fresh TCPStore, bound to `host`; returns the port.

        Raises:
            ValueError: the generation is not newer than the last one.
        """
        return self._rendezvous.open_store(generation)

    def assign(self, plan: NodeAssignment) -> None:
        """Start this generation's workers, soon and in another thread; what of those before has not parked is killed.

        A worker that cannot be started is reported to `on_exit` with its error.

        Raises:
            ValueError: the plan is older than what was assigned or halted before, or does not fit this node.
        """
        plan.check(self._slots)
        self._rendezvous.assign(plan)

    def pids(self) -> dict[int, int]:
        """Process ids of the live workers by rank."""
        return {worker.rank: worker.pid for worker in sorted(self._assigned(), key=lambda w: w.generation)}

    def signal(self, rank: int, signum: int) -> int:
        """Send a signal to the worker of this rank; its process id.

        Raises:
            LookupError: it has no live one, or one that is parked: whose death would be nobody's.
        """
        worker = self._worker(rank)
        if worker.parked:
            raise LookupError(f"rank {rank} has not got its assignment yet")
        worker.signal(signum)
        return worker.pid

    def send(self, rank: int, message: object) -> None:
        """Tell the worker of this rank. Raises LookupError when it has no live one, OSError when it does not listen."""
        self._worker(rank).send(message)

    def look(self, rank: int) -> Sighting | None:
        """The process of this rank as it is now; None when it has ended."""
        try:
            worker = self._worker(rank)
            return Sighting(status=psutil.Process(worker.pid).status(), unread=worker.has_unread())
        except (LookupError, psutil.NoSuchProcess):
            return None

    def _worker(self, rank: int) -> Worker:
        live = [worker for worker in self._assigned() if worker.rank == rank]
        if not live:
            raise LookupError(f"rank {rank} has no live worker on this node")
        return max(live, key=lambda worker: worker.generation)

    def _assigned(self) -> list[Worker]:
        """The live workers that have, or had, an assignment: all but the warm ones."""
        return [worker for worker in self._workers.live() if worker.generation > 0]

    def _unassigned(self) -> list[Worker]:
        return [worker for worker in self._workers.live() if worker.generation == 0]

    def replenish(self) -> bool:
        """Have as many warm workers as there shall be, each for one of the ranks of the newest generation. Whether
        there was one to be made.
        """
        plan = self._rendezvous.newest()
        if plan is None:
            return False
        with self._warming:
            warm = self._unassigned()
            # What a spare had more of, and did not need when it got its place.
            self._workers.end(warm[self._warm_workers :], deadline_s=KILL_DEADLINE_S)
            ranks = [worker.rank for worker in warm]
            missing = [rank for rank in plan.ranks if rank not in ranks][: max(0, self._warm_workers - len(warm))]
            for rank in missing:
                self._warm(rank, plan.ranks.index(rank), plan.config)
        return bool(missing)

    def prepare_all(self, config: contract.WorkerConfig) -> bool:
        """On a node that serves nobody: have a warm worker for each slot, as all will be wanted at once. Whether there
        was one to be made.

        For which ranks is not known before, so what their first steps cost is saved only in part.
        """
        if not self._warm_workers:
            return False
        with self._warming:
            warm = {worker.rank % self._slots for worker in self._unassigned()}
            missing = sorted(set(range(self._slots)) - warm)
            for slot in missing:
                self._warm(slot, slot, config)
        return bool(missing)

    def _warm(self, rank: int, local_rank: int, config: contract.WorkerConfig) -> None:
        try:
            worker = self._workers.fork(generation=0, rank=rank, env={}, deadline_s=FORK_DEADLINE_S)
            worker.send(contract.Prepare(rank=rank, local_rank=local_rank, config=config))
        except (ZygoteError, OSError) as error:
            logger.warning("no warm worker for rank %d: %s", rank, error)

    def stop_gracefully(self) -> None:
        """Ask every worker of the newest assigned generation to end at the next step boundary on which all agree.

        A generation that is just being started is asked as soon as it is.
        """
        self._agent.request_stop()

    def hear_out(self, deadline_s: float) -> bool:
        """Wait until every live worker has said its last words (Failed); whether all had within `deadline_s`.

        For workers that are known to have failed all at once, such as by the audit, before `halt` ends them.
        """
        live = {(worker.generation, worker.rank) for worker in self._assigned() if not worker.parked}
        with self._said:
            return self._said.wait_for(lambda: live <= self._spoken, deadline_s)

    def halt(self, deadline_s: float, park_s: float = 0.0) -> bool:
        """End the current generation: its workers park within `park_s`, or else are killed.

        Of its messages only last words (Failed), and of its exits those that we did not cause, are reported from now
        on, before this returns.

        Returns:
            Whether every worker of it lives and is parked. Without `park_s` none does.

        Raises:
            TimeoutError: a process is still there, or a start still under way, after `deadline_s`.
        """
        began = time.monotonic()
        generation = self._rendezvous.end()
        if park_s > 0 and self._rendezvous.await_idle(park_s):
            self._workers.park(self._assigned(), deadline_s=max(0.0, began + park_s - time.monotonic()))

        def end() -> None:
            ended = [worker for worker in self._assigned() if not (worker.parked and park_s > 0)]
            self._workers.end(ended, deadline_s=max(0.0, began + deadline_s - time.monotonic()))

        end()
        if not self._rendezvous.await_idle(max(0.0, began + deadline_s - time.monotonic())):
            raise TimeoutError(f"the start of generation {generation} was still under way after {deadline_s:g} s")
        end()
        return self._agent.has_parked(generation)

    def shutdown(self, deadline_s: float) -> None:
        """End the workers (SIGTERM, then SIGKILL), the zygote and both threads. Raises TimeoutError as `halt` does."""
        deadline = time.monotonic() + deadline_s
        try:
            self._rendezvous.end()
            self._rendezvous.shutdown()
            self._agent._shutdown(timeout=deadline_s)
            for workers in (self._workers, *self._ready.values()):
                workers.close(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                raise TimeoutError(f"the elastic agent's thread did not end within {deadline_s:g} s")
        finally:
            self._log.close(max(LOG_CLOSE_S, deadline - time.monotonic()))

    def _message(self, worker: Worker, message: Any) -> None:
        # The last words of a generation that is being ended count: they may say which state must not be restored.
        if not (self._rendezvous.is_current(worker.generation) or isinstance(message, contract.Failed)):
            return
        if (message.generation, message.rank) != (worker.generation, worker.rank):
            logger.error("g%d r%d sent a message of another: %r", worker.generation, worker.rank, message)
            return
        self._on_message(message)
        if isinstance(message, contract.Failed):
            self._has_spoken(worker)

    def _has_spoken(self, worker: Worker) -> None:
        with self._said:
            self._spoken = {told for told in self._spoken if told[0] == worker.generation}
            self._spoken.add((worker.generation, worker.rank))
            self._said.notify_all()

    def _worker_exited(self, worker: Worker, status: ExitStatus) -> None:
        self._has_spoken(worker)
        if status.exit_code == contract.EXIT_CANNOT_PARK and self._preload != "trainer.script":
            return  # as if its agent had ended it: why the generation ends is told by others, or was by its last words
        exit_ = WorkerExit(
            generation=worker.generation,
            rank=worker.rank,
            pid=worker.pid,
            exit_code=status.exit_code,
            signal=status.signal,
        )
        # The order to halt that follows a worker's death may be here before the death is known.
        newest = self._rendezvous.newest_generation()
        if worker.generation == newest > 0 and not worker.doomed and not worker.parked:
            self._agent.record_exit(exit_)
            self._on_exit(exit_)
        else:
            self._exited(exit_)

    def _exited(self, exit_: WorkerExit) -> None:
        if self._rendezvous.is_current(exit_.generation):
            self._agent.record_exit(exit_)
            self._on_exit(exit_)


class _ElasticAgent(SimpleElasticAgent):
    """torch elastic's part: one generation is one rendezvous of the worker group."""

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        node: str,
        rendezvous: ControllerRendezvous,
        workers: Workers,
        on_exit: Callable[[WorkerExit], None],
    ) -> None:
        super().__init__(spec)
        self._node = node
        self._controller = rendezvous
        self._forks = workers
        self._on_exit = on_exit
        # Guarded by the lock: the generation that was begun, and what became of its ranks.
        self._lock = threading.Lock()
        self._generation = 0
        self._started: dict[int, Worker] = {}
        self._exits: dict[int, WorkerExit] = {}
        self._stop_generation = 0

    def run_generations(self) -> None:
        """Start one assigned generation after the other, until the rendezvous is closed."""
        while True:
            try:
                self._initialize_workers(self._worker_group)
                self._update_state()  # a worker may have ended before its group was called healthy
            except RendezvousClosedError:
                self._store = self._worker_group.store = None  # closes the last generation's
                return
            except (RendezvousTimeoutError, RendezvousGracefulExitError):
                continue  # nothing came; or the generation was ended before it had begun
            except Exception as error:
                logger.exception("generation %d was not started", self._controller.plan.generation)
                self._report_missing(error)

    def fork_from(self, workers: Workers) -> None:
        """Start the workers of the generations that follow there."""
        self._forks = workers

    def record_exit(self, exit_: WorkerExit) -> None:
        """Keep the worker group's state true; nobody polls it."""
        with self._lock:
            if exit_.generation == self._generation:
                self._exits[exit_.rank] = exit_
        self._update_state()

    def has_parked(self, generation: int) -> bool:
        """Whether every worker of this generation, if it is the last that was begun, lives and is parked."""
        with self._lock:
            ranks = self._controller.plan.ranks if generation == self._generation > 0 else ()
            workers = [self._started.get(rank) for rank in ranks]
            return bool(workers) and all(w is not None and w.parked and w.status is None for w in workers)

    def request_stop(self) -> None:
        """Send Stop to each worker that has its assignment, and to the others once they have it."""
        generation = self._controller.newest_generation()
        with self._lock:
            self._stop_generation = generation
            workers = list(self._started.values()) if self._generation == generation else []
        for worker in workers:
            self._send(worker, contract.Stop())

    def _send(self, worker: Worker, message: object) -> bool:
        try:
            worker.send(message)
        except OSError as error:  # it is dead, which its exit tells, or hangs, which its silence tells
            logger.warning("rank %d did not take %s: %r", worker.rank, type(message).__name__, error)
            return False
        return True

    def _update_state(self) -> None:
        self._worker_group.state = self._monitor_workers(self._worker_group).state

    def _report_missing(self, error: Exception) -> None:
        plan = self._controller.plan
        text = f"{type(error).__name__}: {error}"
        for rank in plan.ranks:
            if plan.generation != self._generation or rank not in self._started:
                self._on_exit(
                    WorkerExit(generation=plan.generation, rank=rank, pid=0, exit_code=None, signal=None, error=text)
                )

    # --- torch elastic's extension points -----------------------------------------------------------------------------

    def _assign_worker_ranks(
        self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[ElasticWorker]:
        plan = self._controller.plan
        spec.local_world_size = len(plan.ranks)
        workers: list[ElasticWorker] = super()._assign_worker_ranks(store, group_rank, group_world_size, spec)
        ranks = tuple(worker.global_rank for worker in workers)
        worlds = {worker.world_size for worker in workers}
        assert ranks == plan.ranks and worlds == {plan.world_size}, (
            f"torch elastic gave ranks {ranks} of {worlds}, the controller planned {plan.ranks} of {plan.world_size}"
        )
        return workers

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        plan = self._controller.plan
        self._stop_workers(worker_group)
        with self._lock:
            self._generation, self._started, self._exits = plan.generation, {}, {}
        parked = [worker for worker in self._forks.live() if worker.parked]
        pids = {}
        for worker in worker_group.workers:
            if not self._controller.is_current(plan.generation):
                raise RendezvousGracefulExitError(f"generation {plan.generation} was ended")
            taken = self._take(parked, plan, worker)
            pids[worker.local_rank] = taken.pid
            if not self._send(taken, self._assignment(plan, worker)):
                taken.signal(signal.SIGKILL)  # its exit is reported as any other
            with self._lock:
                self._started[taken.rank] = taken
                stop = self._stop_generation == plan.generation
            if stop:
                self._send(taken, contract.Stop())
        for left in parked:
            if left.generation > 0:
                left.signal(signal.SIGKILL)
        return pids

    def _take(self, parked: list[Worker], plan: NodeAssignment, worker: ElasticWorker) -> Worker:
        """A process for a slot: the one that has filled it before, or a warm one, or a fork.

        Never another's: on CUDA it would hold two devices.
        """
        slots = len(plan.ranks)
        fitting = [w for w in parked if w.rank % slots == worker.local_rank and w.status is None]
        if not fitting:
            return self._fork(plan, worker)
        taken = max(fitting, key=lambda w: (w.rank == worker.global_rank, w.generation))
        parked.remove(taken)
        taken.assign(plan.generation, worker.global_rank)
        return taken

    def _fork(self, plan: NodeAssignment, worker: ElasticWorker) -> Worker:
        def wanted() -> bool:
            return self._controller.is_current(plan.generation)

        try:
            return self._forks.fork(
                generation=plan.generation,
                rank=worker.global_rank,
                env=self._env(plan, worker),
                deadline_s=FORK_DEADLINE_S,
                wanted=wanted,
            )
        except ZygoteError as error:
            if wanted():
                raise
            raise RendezvousGracefulExitError(f"generation {plan.generation} was ended") from error

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        ended = [worker for worker in self._forks.live() if worker.generation > 0 and not worker.parked]
        self._forks.end(ended, deadline_s=KILL_DEADLINE_S)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        with self._lock:
            exits = list(self._exits.values())
        failures = {
            e.rank: ProcessFailure(
                local_rank=next((w.local_rank for w in worker_group.workers if w.global_rank == e.rank), -1),
                pid=e.pid,
                exitcode=-e.signal if e.signal is not None else e.exit_code or 0,
                error_file="",
            )
            for e in exits
            if e.exit_code != contract.EXIT_FINISHED
        }
        if failures:
            return RunResult(state=WorkerState.FAILED, failures=failures)
        if exits and len(exits) == len(worker_group.workers):
            return RunResult(state=WorkerState.SUCCEEDED, return_values={e.rank: e.exit_code for e in exits})
        return RunResult(state=WorkerState.HEALTHY)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: float = KILL_DEADLINE_S) -> None:
        self._forks.end(self._forks.live(), deadline_s=timeout, grace_s=timeout / 2)

    def _env(self, plan: NodeAssignment, worker: ElasticWorker) -> dict[str, str]:
        """What torchrun gives a script, and torch's ``env://`` initialisation reads.

        The store is the generation's own and fresh, so that nobody finds the addresses of an earlier one in it.
        """
        return {
            "RANK": str(worker.global_rank),
            "LOCAL_RANK": str(worker.local_rank),
            "GROUP_RANK": str(plan.group_rank),
            "ROLE_RANK": str(worker.role_rank),
            "ROLE_NAME": ROLE,
            "WORLD_SIZE": str(plan.world_size),
            "LOCAL_WORLD_SIZE": str(len(plan.ranks)),
            "GROUP_WORLD_SIZE": str(plan.group_world_size),
            "ROLE_WORLD_SIZE": str(worker.role_world_size),
            "MASTER_ADDR": plan.store_host,
            "MASTER_PORT": str(plan.store_port),
            "TORCHELASTIC_RUN_ID": self._controller.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": str(self._controller.use_agent_store),
            # Generations are this run's restarts; how many there may be, [recovery] says.
            "TORCHELASTIC_RESTART_COUNT": str(plan.generation - 1),
            "TORCHELASTIC_MAX_RESTARTS": "0",
        }

    def _assignment(self, plan: NodeAssignment, worker: ElasticWorker) -> contract.Assign:
        return contract.Assign(
            epoch=plan.epoch,
            generation=plan.generation,
            rank=worker.global_rank,
            world_size=plan.world_size,
            local_rank=worker.local_rank,
            node=self._node,
            store_host=plan.store_host,
            store_port=plan.store_port,
            restore=dataclasses.replace(plan.restore, slots=tuple(plan.snapshot_slots.get(worker.global_rank, ()))),
            config=plan.config,
            ram_dir=plan.ram_dir,
            copies=bool(plan.keeper),
            copied_step=plan.copied_step,
            holders=plan.holders.get(worker.global_rank, ()),
            token=plan.token,
        )
