"""The worker process: wait for an assignment, join its generation, restore, train, report; park, and wait again.

Made to run in a child forked from a single-threaded process that has imported this module: importing it imports
everything heavy and starts no thread, touches no device and opens no process group. Helper threads are started after
the fork: one listens to the agent (trainer/link.py), one is the pulse.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Literal

import psutil
import tokenizers  # noqa: F401  (imported before the fork, for the children)
import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, TCPStore

from storage.blocks import BadBlock
from storage.checkpointer import Checkpointer, Sound
from storage.durable import CheckpointFailed
from storage.manifest import ManifestError
from storage.redact import redacted
from storage.state import TrainState
from storage.transfer import PeerSource
from storage.urls import StoreError
from trainer import harm, pulse
from trainer.audit import PeerStateError, StateAudit, StateCorruptError, StateDivergedError, replica_group
from trainer.contract import (
    EXIT_CANNOT_PARK,
    EXIT_FAILED,
    EXIT_FINISHED,
    Assign,
    Damaged,
    Failed,
    Parked,
    Phase,
    Prepare,
    Process,
    Restored,
)
from trainer.data import open_dataset
from trainer.groups import (
    abort_device_groups,
    connect_device_groups,
    destroy_groups,
    forget_meshes,
    leave_a_group_open,
)
from trainer.link import Agent, Assignment
from trainer.loop import NonFiniteError, Parking, Session, train
from trainer.numeric import numeric_class, set_numerics
from trainer.optim import build_optimizer, set_completed_steps, set_random_state, train_state
from trainer.parallel import build_mesh, build_stage
from trainer.warm import prepare

# The network interface that gloo shall use, when people have said so; else each generation's own (see `join`).
USERS_INTERFACE = os.environ.get("GLOO_SOCKET_IFNAME", "")

# What torch's transports say when a peer is lost, for errors that have no class of their own: gloo raises RuntimeError.
COLLECTIVE_MESSAGES = (
    "gloo",
    "nccl",
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "ProcessGroup",
)
# A worker that parks lets the snapshot under way come to its end. Its agent is less patient.
CLOSE_DEADLINE_S = 60.0

# Of a worker's last words: the message begins with what is wrong, and a traceback ends with where; 100 lines of it. Ten
# thousand ranks may fail at once, and this is then 100 MB.
ERROR_CHARS = 2_000
TRACEBACK_CHARS = 8_000

# Damaged blocks of one copy: more of them say no more.
DAMAGED_TOLD = 4

STAGE_MESSAGES = ("failed to run forward:", "Failed to run stage backward")
"""Of torch.distributed.pipelining, around whatever a stage's own code has raised."""
MEMORY_MESSAGES = ("can't allocate memory", "out of memory")

FailureKind = Literal["exception", "collective", "memory", "state", "store", "audit", "corrupt", "diverged", "unclean"]
UNCLEAN = ("corrupt", "diverged", "unclean")
# After these a worker parks: the cause is another's, and this process is as good as before.
PARKED_AFTER = ("collective", "unclean")
# What an order to park itself makes fail: exchanges, and saves and restores, in which ranks wait for each other.
BROKEN_BY_PARKING = ("collective", "store")


def main(sock: socket.socket) -> int:
    """Serve the assignments that come over `sock`, one after the other.

    Between two of them the worker is parked: it has let go of its process groups, and keeps its process with imports,
    device and compile caches.

    Returns:
        EXIT_FINISHED. Failure ends the process by itself with EXIT_FAILED, the agent's death with EXIT_AGENT_GONE,
        both at once: a process group that a peer has broken can hang the interpreter's own shutdown.
    """
    agent = Agent(sock)
    place: tuple[object, ...] = ()
    process: Process = "forked"
    saving = threading.Thread()
    while True:
        work = agent.next_work()
        if isinstance(work, Prepare):
            place, process = (work.rank, work.config.parallel), "warm"
            prepare(work)
            agent.emit(Parked(generation=0, rank=work.rank, step=0))
            continue
        assign = work.order
        before, place = place, (assign.rank, assign.config.parallel)
        if before not in ((), place):
            forget_meshes()
        left = serve(work, agent, process, saving)
        if left is None:
            return EXIT_FINISHED
        agent.emit(Parked(generation=assign.generation, rank=assign.rank, step=left.step))
        process, saving = "parked", left.saving


@dataclass(frozen=True)
class Left:
    """How an assignment was left."""

    step: int
    """How many its state had completed."""
    saving: threading.Thread
    """See `Checkpointer.hanging`."""


def serve(assignment: Assignment, agent: Agent, process: Process, saving: threading.Thread) -> Left | None:
    """Serve one assignment, until it is left, or None, because the run is over.

    A failure that is not another rank's ends the process.

    Args:
        process: what this one is.
        saving: as the assignment before was left.
    """
    assign = assignment.order
    session: Session | None = None

    def step() -> int:
        return assign.restore.step if session is None else session.state.step

    pulse_ended = pulse.start(assign.generation, assign.rank, step, agent.emit)
    try:
        session = start(assignment, agent, process, saving)
        assignment.on_copied = session.copies.ended
        assignment.on_inject = partial(harm.obey, victim=_victim(assign, step, agent, session))
        train(session, saved_step=assign.restore.step if assign.restore.source == "durable" else -1)
        # Together: a peer that leaves early resets connections on which the others may still be reading.
        distributed.barrier()
        distributed.destroy_process_group()
        return None
    except Exception as error:
        kind = failure_kind(error)
        if kind == "exception" and assignment.parking.is_set() and assign.config.device == "cuda":
            kind = "collective"  # groups that another thread has aborted are missed in many words
        if not (assignment.parking.is_set() and kind in BROKEN_BY_PARKING):
            tell_failure(agent, assign, step(), error, kind)
        if kind not in PARKED_AFTER and not assignment.parking.is_set():
            os._exit(EXIT_FAILED)
        if assign.config.device == "cuda" and leave_a_group_open(_chain(error)):
            sys.stderr.write("exchanges were broken off between their begin and their end: this worker cannot park\n")
            os._exit(EXIT_CANNOT_PARK)
    # Past the except clause, which drops the error: its traceback holds all that the groups were made with.
    assignment.unwound.set()
    pulse_ended.set()
    reached, checkpointer = step(), session.checkpointer if session is not None else None
    assignment.on_copied = assignment.on_inject = session = None
    _let_go(assignment, checkpointer)
    return Left(reached, saving if checkpointer is None else checkpointer.hanging)


def _victim(assign: Assign, step: Callable[[], int], agent: Agent, session: Session) -> harm.Victim:
    return harm.Victim(
        generation=assign.generation,
        rank=assign.rank,
        step=step,
        url=assign.config.url,
        emit=agent.emit,
        session=session,
    )


def _let_go(assignment: Assignment, checkpointer: Checkpointer | None) -> None:
    """Leave the process groups and the files of an assignment; a process that cannot is ended."""
    if assignment.order.config.device == "cuda":
        abort_device_groups(assignment.over)  # to destroy a group whose exchange never ends would never end
    assignment.connections.cut()  # peers that wait for this rank fail at once
    if checkpointer is not None and not checkpointer.close(CLOSE_DEADLINE_S):
        sys.stderr.write(
            "a snapshot has not ended, or the store still holds an earlier save: this worker cannot park\n"
        )
        os._exit(EXIT_CANNOT_PARK)
    mesh, assignment.mesh = assignment.mesh, None
    destroy_groups(mesh)
    assignment.over.set()
    sys.stdout.flush()
    sys.stderr.flush()


def start(assignment: Assignment, agent: Agent, process: Process, saving: threading.Thread) -> Session:
    """Join the generation and bring this rank to the assigned state, timing each part.

    Raises:
        ValueError: the configuration does not fit the world or cannot be divided over it.
        FileNotFoundError: the data is not prepared on this node.
        storage.manifest.ManifestError: the assigned state is damaged.
    """
    assign = assignment.order
    config, clock = assign.config, Stopwatch()

    def phase(name: Literal["rendezvous", "build", "restore"]) -> None:
        step = assign.restore.step
        agent.emit(Phase(generation=assign.generation, rank=assign.rank, step=step, phase=name))

    # Said of each pipeline stage's output, which nothing here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    phase("rendezvous")
    set_numerics(config)
    with assignment.connections.opening():
        join(assign)
        assignment.mesh = mesh = build_mesh(
            config.parallel, config.device, timedelta(seconds=config.collective_timeout_s)
        )
        if config.device == "cuda":
            connect_device_groups(mesh)
        rendezvous_us = clock.lap_us()

        phase("build")
        dataset = open_dataset(config.data, config.model.vocab_size, config.seed)
        if config.data_digest and dataset.digest != config.data_digest:
            raise ValueError(
                f"the prepared data of data.corpus = {config.data.corpus!r} has changed under the run: its digest is "
                f"{dataset.digest}, the run's {config.data_digest}. Restore the corpus, or start a run of its own"
            )
        stage = build_stage(config, mesh, initial=assign.restore.source == "init")
        optimizer = build_optimizer(stage.module, config.optimizer)
        state = train_state(stage.module, optimizer, step=0)
        checkpointer = checkpointer_of(assign, saving)
        build_us = clock.lap_us()

    phase("restore")
    audit = StateAudit(state.tensors, config.audit, replica_group(mesh))
    mark = audit.blank_mark() if assign.restore.source == "ram" and not assign.restore.reshard else {}
    copy = replace(state, per_rank=state.per_rank | mark)
    restore(checkpointer, copy, assign, agent, sound=audit.check_copy if config.audit.at_rest else None)
    state.step = copy.step
    assert state.step == assign.restore.step, (state.step, assign.restore)
    set_completed_steps(optimizer, state.step)
    set_random_state(state.per_rank)
    audit.record_restored(mark)
    agent.emit(
        Restored(
            generation=assign.generation,
            rank=assign.rank,
            step=state.step,
            source=assign.restore.source,
            rendezvous_us=rendezvous_us,
            build_us=build_us,
            restore_us=clock.lap_us(),
            versions=numeric_class(config),
            process=process,
        )
    )
    return Session(
        config=config,
        generation=assign.generation,
        rank=assign.rank,
        stage=stage,
        optimizer=optimizer,
        state=state,
        dataset=dataset,
        checkpointer=checkpointer,
        audit=audit,
        emit=agent.emit,
        stop=assignment.stop,
        interval=assignment.interval,
        parking=assignment.parking,
        sends_copies=assign.copies,
        copied_step=assign.copied_step,
    )


def checkpointer_of(assign: Assign, saving: threading.Thread | None = None) -> Checkpointer:
    """Storage of the assigned rank, after an assignment that was left with `saving`. Made by all ranks together."""
    config = assign.config
    return Checkpointer(
        url=config.url,
        run=config.run,
        rank=assign.rank,
        world_size=assign.world_size,
        epoch=assign.epoch,
        generation=assign.generation,
        ram_dir=assign.ram_dir,
        node=assign.node,
        copies=assign.copies,
        local_dir=config.checkpoint.local_dir,
        keep=config.checkpoint.keep,
        before=saving,
    )


def restore(
    checkpointer: Checkpointer, state: TrainState, assign: Assign, agent: Agent, sound: Sound | None = None
) -> None:
    """Fill `state` as assigned; what was damaged in shared memory is told, whether it could be mended or not.

    Raises:
        ValueError, storage.manifest.ManifestError, CheckpointFailed, StoreError: see Checkpointer.restore.
    """
    step = assign.restore.step
    holders = [
        PeerSource(h.address, assign.token, assign.config.run, h.ray_node, h.slot, step, assign.restore.generation)
        for h in assign.holders
    ]
    bad: list[BadBlock] = []
    try:
        checkpointer.restore(state, assign.restore, holders, bad, sound)
    finally:
        for holder in holders:
            holder.close()
        names = {holder.ray_node: holder.node for holder in assign.holders}
        for source in dict.fromkeys(block.source for block in bad):
            told = [str(block) for block in bad if block.source == source]
            more = f" and {len(told) - DAMAGED_TOLD} more" if len(told) > DAMAGED_TOLD else ""
            agent.emit(
                Damaged(
                    generation=assign.generation,
                    rank=assign.rank,
                    step=step,
                    node=names.get(source, ""),
                    detail="; ".join(told[:DAMAGED_TOLD]) + more,
                )
            )


def join(assign: Assign) -> None:
    """Enter the generation's default process group, through its own store under its own prefix.

    A fresh prefix for each generation, because gloo would else read the addresses of the one before.
    """
    config = assign.config
    if assign.world_size != config.parallel.world_size:
        raise ValueError(
            f"assigned world_size {assign.world_size} is not parallel.pp * dp_replicate * dp_shard * tp = "
            f"{config.parallel.world_size}"
        )
    os.environ["GLOO_SOCKET_IFNAME"] = USERS_INTERFACE or interface_towards(assign.store_host, assign.store_port)
    timeout = timedelta(seconds=config.collective_timeout_s)
    if config.device == "cuda":
        # Else NCCL's watchdog ends the process when a peer is lost: the agent finds that, and has this worker park.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        torch.cuda.set_device(assign.local_rank)
        torch.cuda.init()  # type: ignore[no-untyped-call]  # else a mesh looks for a device by itself
    store = TCPStore(assign.store_host, assign.store_port, is_master=False, wait_for_workers=False, timeout=timeout)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo",
        store=PrefixStore(f"workers/g{assign.generation}", store),
        rank=assign.rank,
        world_size=assign.world_size,
        timeout=timeout,
    )


def interface_towards(host: str, port: int) -> str:
    """Name of the network interface by which this node reaches `host`; the loopback device for 127.0.0.1.

    gloo would else bind what the node's own name resolves to, which need not be an address that peers can reach.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # a datagram socket sends nothing here: it only asks for the route
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return name
    raise ValueError(f"no network interface of this node has the address {own}, by which it reaches {host}")


class Stopwatch:
    """Laps in microseconds."""

    def __init__(self) -> None:
        self._last_ns = time.perf_counter_ns()

    def lap_us(self) -> int:
        last_ns, self._last_ns = self._last_ns, time.perf_counter_ns()
        return (self._last_ns - last_ns) // 1000


def failure_kind(error: BaseException) -> FailureKind:
    """What an exception says about its cause, from it and from those that it was raised from."""
    if isinstance(error, Parking):
        return "collective"
    chain = list(_chain(error))
    text = "\n".join(str(link) for link in chain if isinstance(link, RuntimeError))
    if any(isinstance(link, StateCorruptError) for link in chain):
        return "corrupt"
    if any(isinstance(link, StateDivergedError) for link in chain):
        return "diverged"
    if any(isinstance(link, PeerStateError) for link in chain):
        return "unclean"
    if any(isinstance(link, NonFiniteError) for link in chain):
        return "audit"
    if any(isinstance(link, ManifestError) for link in chain):
        return "state"
    if any(isinstance(link, CheckpointFailed | StoreError) for link in chain):
        return "store"
    if any(isinstance(link, MemoryError) for link in chain) or any(m in text for m in MEMORY_MESSAGES):
        return "memory"
    if any(isinstance(link, distributed.DistError) for link in chain) or any(m in text for m in COLLECTIVE_MESSAGES):
        return "collective"
    return "exception"


def _without_sources(error: BaseException) -> Iterator[str]:
    """A traceback of places alone: what the audit found, or a peer has done, is no line's fault, and every rank stands
    still until this one has left, so there is no time to read source files."""
    for link in reversed(list(_chain(error))):
        for frame, line in traceback.walk_tb(link.__traceback__):
            yield f'  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}\n'
        yield from traceback.format_exception_only(link)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause_in_stage(error: BaseException) -> BaseException:
    """What torch's pipelining tells of by the shapes of the stage's tensors, and not by what has failed."""
    while error.__cause__ is not None and any(message in str(error) for message in STAGE_MESSAGES):
        error = error.__cause__
    return error


def tell_failure(agent: Agent, assign: Assign, step: int, error: Exception, kind: FailureKind) -> None:
    """This rank's last words in a generation."""
    in_haste = kind in (*UNCLEAN, "collective")
    detail = "".join(_without_sources(error) if in_haste else traceback.format_exception(error))
    named = _cause_in_stage(error)
    sys.stderr.write(detail)
    sys.stdout.flush()
    sys.stderr.flush()
    agent.emit(
        Failed(
            generation=assign.generation,
            rank=assign.rank,
            step=step,
            kind=kind,
            # Redacted before they are cut: half a URL's credentials are not known as such.
            error=redacted(" ".join(f"{type(named).__name__}: {named}".split()))[:ERROR_CHARS],
            traceback=redacted(detail)[-TRACEBACK_CHARS:],
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Shepherd worker; started by its agent.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the agent")
    sys.exit(main(socket.socket(fileno=parser.parse_args().fd)))
