"""A torch elastic rendezvous whose authority is the controller: nodes do not agree on a generation, they are told.

The handler hands to the torch elastic agent what `assign` was given, one generation after the other. Every generation
has a store of its own, on the node with group rank 0: torch elastic's shared store keeps the addresses of the dead.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)

from orchestrator.runtime.assignment import NodeAssignment
from storage.threads import begun

T = TypeVar("T")

BACKEND = "shepherd"

# How long `next_rendezvous` waits before it says that nothing came; the agent's loop then asks again. An idle spare may
# wait for days, so this is only there for that no wait is for ever.
ASSIGNMENT_WAIT_S = 600.0
# How long a generation may take to exchange its ranks through its store. The controller sends all assignments at once;
# a node may have to fetch and import other code first, for minutes. It ends a generation that does not come up by its
# own, shorter deadlines, so this is met only without a controller.
STORE_DEADLINE_S = 1800.0
# One attempt to connect to the store; between attempts it is seen that the generation was ended meanwhile.
STORE_CONNECT_S = 2.0
# How often the store is asked for a key that is not there yet, and how soon who waits for the store sees that its
# generation was ended: far below the cost of a generation's start (0.4 s).
STORE_POLL_S = 0.01


class ControllerRendezvous(RendezvousHandler):
    """Hands the controller's assignments to a torch elastic agent. Thread-safe; one agent thread asks."""

    def __init__(self, *, run: str, host: str) -> None:
        self._run = run
        self._host = host
        # Everything below is guarded by the condition, which is notified at each change.
        self._changed = threading.Condition()
        self._stores: dict[int, TCPStore] = {}
        self._newest: NodeAssignment | None = None
        self._taken: NodeAssignment | None = None
        self._ended_generation = 0
        self._idle = False
        self._closed = False

    def open_store(self, generation: int) -> int:
        """Make the store of this generation on the node's own address; returns its port. Drops older ones.

        Raises:
            ValueError: the generation is not newer than the newest assigned or ended one, or has its store already.
        """
        with self._changed:
            if generation <= self._generation() or generation in self._stores:
                raise ValueError(f"generation {generation} is not newer than generation {self._generation()}")
            # TCPStore itself would bind every address of the machine.
            listener = socket.create_server((self._host, 0), backlog=1024)
            port = int(listener.getsockname()[1])
            store = TCPStore(
                self._host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=STORE_DEADLINE_S),
                master_listen_fd=listener.detach(),
            )
            self._stores = {generation: store}
            return port

    def assign(self, plan: NodeAssignment) -> None:
        """Have the next rendezvous return this plan.

        Raises:
            ValueError: its epoch is older, or its generation not newer, than what was assigned or ended before.
        """
        with self._changed:
            epoch = self._newest.epoch if self._newest else 0
            if plan.epoch < epoch or plan.generation <= self._generation():
                raise ValueError(
                    f"assignment of epoch {plan.epoch}, generation {plan.generation} is stale: "
                    f"this node is at epoch {epoch}, generation {self._generation()}"
                )
            if plan.group_rank == 0 and plan.generation not in self._stores:
                raise ValueError(f"group_rank 0 in generation {plan.generation}, but its store was not opened here")
            self._newest = plan
            self._stores = {g: store for g, store in self._stores.items() if g >= plan.generation}
            self._changed.notify_all()

    def end(self) -> int:
        """End the newest generation: a rendezvous of it fails at once. Returns its number."""
        with self._changed:
            if self._newest is not None:
                self._ended_generation = self._newest.generation
            self._changed.notify_all()
            return self._ended_generation

    def is_current(self, generation: int) -> bool:
        """Whether this is the newest assigned generation, and it was not ended."""
        with self._changed:
            newest = self._newest
            return newest is not None and generation == newest.generation > self._ended_generation

    def newest_generation(self) -> int:
        """The newest assigned generation; 0 when there was none."""
        with self._changed:
            return self._newest.generation if self._newest else 0

    def newest(self) -> NodeAssignment | None:
        """The newest assignment."""
        with self._changed:
            return self._newest

    def await_idle(self, timeout_s: float) -> bool:
        """Whether within this time the agent's thread had nothing to do but to wait for an assignment (or had left)."""
        with self._changed:
            return self._changed.wait_for(lambda: self._idle, timeout_s)

    @property
    def plan(self) -> NodeAssignment:
        """What the last rendezvous returned."""
        assert self._taken is not None
        return self._taken

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for an assignment that is newer than the last one, and connect to its store.

        Raises:
            RendezvousClosedError: the node is shutting down.
            RendezvousTimeoutError: no assignment came within ASSIGNMENT_WAIT_S.
            RendezvousGracefulExitError: the generation was ended meanwhile.
            RendezvousConnectionError: its store could not be reached within STORE_DEADLINE_S.
        """
        with self._changed:
            self._idle = True
            self._changed.notify_all()
            came = self._changed.wait_for(lambda: self._closed or self._waiting(), ASSIGNMENT_WAIT_S)
            if self._closed:
                raise RendezvousClosedError("the node's workers are shutting down")
            if not came:
                raise RendezvousTimeoutError(f"no assignment within {ASSIGNMENT_WAIT_S:g} s")
            assert self._newest is not None
            plan = self._taken = self._newest
            self._idle = False
            store = self._stores.get(plan.generation) or None
        deadline = time.monotonic() + STORE_DEADLINE_S
        if plan.group_rank != 0:
            store = _left_behind(lambda: self._connect(plan, deadline), lambda: self._go_on(plan.generation, deadline))
        assert store is not None, "assign checks that the lead node has its store"
        return RendezvousInfo(
            _GenerationStore(f"g{plan.generation}", store, lambda: self._go_on(plan.generation, deadline)),
            plan.group_rank,
            plan.group_world_size,
            RendezvousStoreInfo(plan.store_host, plan.store_port),
        )

    def _connect(self, plan: NodeAssignment, deadline: float) -> TCPStore:
        while True:
            try:
                store = TCPStore(
                    plan.store_host, plan.store_port, is_master=False, timeout=timedelta(seconds=STORE_CONNECT_S)
                )
            except DistNetworkError as error:
                self._go_on(plan.generation, deadline, error)
                time.sleep(STORE_POLL_S)
            else:
                store.set_timeout(timedelta(seconds=STORE_DEADLINE_S))
                return store

    def _go_on(self, generation: int, deadline: float, cause: Exception | None = None) -> None:
        """Asked in each wait on a generation's store, which ends with the generation or the deadline."""
        if self.is_closed() or not self.is_current(generation):
            raise RendezvousGracefulExitError(f"generation {generation} was ended")
        if time.monotonic() > deadline:
            why = cause or "no answer, or nodes are missing"
            raise RendezvousConnectionError(f"store of generation {generation}: {why}")

    def _waiting(self) -> bool:
        newest = self._newest
        return newest is not None and newest is not self._taken and newest.generation > self._ended_generation

    def _generation(self) -> int:
        return max(self._ended_generation, self._newest.generation if self._newest else 0)

    # --- the rest of torch elastic's interface ------------------------------------------------------------------------

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def is_closed(self) -> bool:
        with self._changed:
            return self._closed

    def set_closed(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def num_nodes_waiting(self) -> int:
        """Always 0: who joins is the controller's decision."""
        return 0

    def get_run_id(self) -> str:
        return self._run

    def shutdown(self) -> bool:
        """Close, and drop the stores."""
        with self._changed:
            self._closed = True
            self._stores = {}
            self._changed.notify_all()
        return True


class _GenerationStore(PrefixStore):
    """A store of which nobody waits for an answer longer than its generation lasts; `go_on` raises when it is over."""

    def __init__(self, prefix: str, store: Store, go_on: Callable[[], None]) -> None:
        super().__init__(prefix, store)
        self._go_on = go_on

    def set(self, key: str, value: str) -> None:
        told = super().set
        _left_behind(lambda: told(key, value), self._go_on)

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        told = super().multi_set  # type: ignore[misc]  # torch's stubs lack it
        _left_behind(lambda: told(keys, values), self._go_on)

    def get(self, key: str) -> bytes:
        answer = super().get
        return _left_behind(lambda: self._once_there([key], lambda: answer(key)), self._go_on)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        answer = super().multi_get
        return _left_behind(lambda: self._once_there(keys, lambda: answer(keys)), self._go_on)

    def _once_there(self, keys: list[str], read: Callable[[], T]) -> T:
        while not self.check(keys):
            self._go_on()
            time.sleep(STORE_POLL_S)
        return read()


def _left_behind(call: Callable[[], T], go_on: Callable[[], None]) -> T:
    """The result of `call`, unless `go_on` raises first: then its thread is left behind. torch's TCPStore waits for the
    other side's words without any deadline, and a machine that has vanished says none; nor does a process that stands
    still, to which the kernel still connects.
    """
    answer = begun(call, "generation-store")
    while not wait([answer], STORE_POLL_S).done:
        go_on()
    return answer.result()


def create_handler(parameters: RendezvousParameters) -> RendezvousHandler:
    """The handler as torch elastic's registry makes it; ``local_addr`` is the node's own address."""
    return ControllerRendezvous(run=parameters.run_id, host=parameters.local_addr or parameters.endpoint)


def get_handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Entry point of the group ``torchrun.handlers``."""
    return create_handler


rendezvous_handler_registry.register(BACKEND, create_handler)
