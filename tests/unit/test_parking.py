"""Workers that park: the same processes go on in the next generation, with the same numbers, and nothing piles up."""

from __future__ import annotations

import functools
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_sessions import DEVICE, config_of, order_of
from test_worker import DEADLINE_S, INIT, Process, assign, numbers, run_to_the_end, spawn, workers
from torch import distributed
from torch.distributed import distributed_c10d

from storage import checkpointer, ram
from storage.durable_write import Writer
from trainer import contract, link
from trainer.contract import ParallelConfig, Restore, WorkerConfig, send
from trainer.groups import GroupConnections, leave_a_group_open

# TP and replicas: DTensor's caches and groups of several dimensions stand between a parked worker and its next mesh.
STEPS = 16
SQUARE = config_of(ParallelConfig(dp_replicate=2, tp=2), n_layers=2, steps=STEPS, validation_interval_steps=STEPS)
RANKS = range(4)
TRIES = 3


def step_is(least: int) -> Callable[[Any], bool]:
    return lambda message: isinstance(message, contract.StepDone) and message.step >= least


def parked_in(generation: int) -> Callable[[Any], bool]:
    return lambda message: isinstance(message, contract.Parked) and message.generation == generation


def order_to_park(group: Sequence[Process], generation: int) -> None:
    for member in group:
        send(member.sock, contract.Park(generation=generation))
    await_parked(group, generation)


class ForgottenError(Exception):
    """gloo has lost track of an exchange, and the worker has ended, as it should then (trainer/link.py). Seldom; an
    agent has another worker take its place, and here there is no agent."""


def tried_again(test: Callable[[Path, dict[int, tuple[float, float]]], None]) -> Callable[..., None]:
    """For a test in which all ranks must park: with other processes, when one of them could not."""

    @functools.wraps(test)
    def tried(tmp_path: Path, untouched: dict[int, tuple[float, float]]) -> None:
        for number in range(TRIES):
            folder = tmp_path / f"try-{number}"
            (folder / "ram").mkdir(parents=True)
            try:
                return test(folder, untouched)
            except ForgottenError:
                if number == TRIES - 1:
                    raise

    del tried.__wrapped__  # pytest asks it for the fixtures
    return tried


def await_parked(group: Sequence[Process], generation: int) -> None:
    for member in group:
        member.read_until(parked_in(generation))
        if not parked_in(generation)(member.messages[-1]) and member.exit_code() == contract.EXIT_CANNOT_PARK:
            raise ForgottenError
        assert parked_in(generation)(member.messages[-1]), member.messages[-1]
        assert member.process.is_alive()


def newest_common(folder: Path) -> Restore:
    """The newest snapshot that every rank holds."""
    held = ram.held(str(folder / "ram"), SQUARE.run, "node-a")
    assert sorted(held) == list(RANKS)
    step, generation = max(set.intersection(*({(h.step, h.generation) for h in headers} for headers in held.values())))
    return Restore(source="ram", step=step, generation=generation)


def go_on(
    group: Sequence[Process], folder: Path, generation: int, restore: Restore, config: WorkerConfig = SQUARE
) -> Any:
    """The next generation in the processes of `group`, whose order is that of the ranks. Returns its store."""
    store = distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_S)
    )
    for rank, member in enumerate(group):
        assign(member, rank, config, folder, restore, store.port, generation)
    return store


def finish(group: Sequence[Process]) -> dict[int, tuple[float, float]]:
    for member in group:
        member.read_until()
    assert [member.exit_code() for member in group] == [contract.EXIT_FINISHED] * len(group)
    return numbers(group[0])


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, float]]:
    folder = tmp_path_factory.mktemp("untouched")
    (folder / "ram").mkdir()
    return numbers(run_to_the_end(SQUARE, folder, INIT)[0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ram").mkdir()
    return tmp_path


def held_by(group: Sequence[Process]) -> list[tuple[int, int]]:
    """Descriptors and threads of each process."""
    return [tuple(len(os.listdir(f"/proc/{m.process.pid}/{what}")) for what in ("fd", "task")) for m in group]


@tried_again
def test_parked_workers_go_on_in_their_processes_and_nothing_piles_up(
    folder: Path, untouched: dict[int, tuple[float, float]]
) -> None:
    training, held = [], []
    with workers(SQUARE, folder, INIT) as group:
        pids = [member.process.pid for member in group]
        for generation in (1, 2, 3):
            group[0].read_until(step_is(3 * generation))
            training.append(held_by(group))
            order_to_park(group, generation)
            held.append(held_by(group))
            store = go_on(group, folder, generation + 1, newest_common(folder))
        assert finish(group) == untouched
        del store
        assert [member.process.pid for member in group] == pids
    for member in group:
        assert [word.process for word in member.of_type(contract.Restored)] == ["forked", "parked", "parked", "parked"]
    words = [word.kind for member in group for word in member.of_type(contract.Failed)]
    assert set(words) <= {"collective"}, "parking is no failure, though a peer may see it before it is ordered"
    # A group may live until the next ones come, by a reference that torch keeps to its last error: one, and not one of
    # each generation.
    for fewest, trained, *last in zip(min(map(min, held)), min(training[0]), *held[-1], strict=True):
        assert 2 * (max(last) - fewest) <= trained - fewest, (held, training)
        assert fewest < trained, "parked workers hold no groups"


@pytest.mark.skipif(DEVICE == "cuda", reason="who waits on the device is woken by an order to park alone")
@tried_again
def test_survivors_of_a_kill_park_by_themselves_even_without_a_link_to_the_dead(
    folder: Path, untouched: dict[int, tuple[float, float]]
) -> None:
    with workers(SQUARE, folder, INIT) as group:
        group[0].read_until(step_is(3))
        os.kill(group[3].process.pid, signal.SIGKILL)
        survivors = group[:3]
        await_parked(survivors, 1)
        for member in survivors:
            assert [word.kind for word in member.of_type(contract.Failed)] == ["collective"]
        group[3] = spawn(SQUARE)
        store = go_on(group, folder, 2, newest_common(folder))
        assert finish(group) == untouched
        del store


@tried_again
def test_a_parked_worker_takes_another_place(folder: Path, untouched: dict[int, tuple[float, float]]) -> None:
    with workers(SQUARE, folder, INIT) as group:
        group[0].read_until(step_is(3))
        order_to_park(group, 1)
        shifted = [*group[1:], group[0]]
        store = go_on(shifted, folder, 2, newest_common(folder))
        told = {step: told for step, told in finish(shifted).items() if told != (None, None)}
        assert max(told) == STEPS and told.items() <= untouched.items()
        del store


def test_warm_workers_take_the_place_that_they_were_made_for_or_another(
    folder: Path, untouched: dict[int, tuple[float, float]]
) -> None:
    group = [spawn(SQUARE) for _ in RANKS]
    try:
        for rank, likely in ((3, 3), (2, 1)):
            order = contract.Prepare(rank=likely, local_rank=likely if DEVICE == "cpu" else 0, config=SQUARE)
            send(group[rank].sock, order)
        for rank in (3, 2):
            group[rank].read_until(parked_in(0))
        store = go_on(group, folder, 1, INIT)
        assert finish(group) == untouched
        del store
        processes = [word.process for member in group for word in member.of_type(contract.Restored)]
        assert processes == ["forked", "forked", "warm", "warm"]
    finally:
        for member in group:
            member.process.kill()


def hold_up_saves(folder: Path) -> None:
    """In this process the store hangs until `folder` has a file `open`; who has come to it leaves a file there.

    What an abandoned save is given to end is enough for a machine with less than a core for the four ranks.
    """
    checkpointer.ABANDONED_END_S = DEADLINE_S
    write_files = Writer._write_files

    def held_up(writer: Writer, path: Path, *rest: Any) -> None:
        Path(folder, f"step-{writer.step}-{os.getpid()}").touch()
        until(lambda: Path(folder, "open").exists(), "the store answers")
        write_files(writer, path, *rest)

    Writer._write_files = held_up  # type: ignore[method-assign]


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.01)


@tried_again
def test_a_store_that_hangs_keeps_nobody_from_parking_and_nothing_is_saved_until_it_answers(
    folder: Path, untouched: dict[int, tuple[float, float]]
) -> None:
    config = replace(SQUARE, checkpoint=contract.CheckpointConfig(interval_steps=2))
    store_folder = folder / "store"
    store_folder.mkdir()
    with workers(config, folder, INIT, prepare=partial(hold_up_saves, store_folder)) as group:
        until(lambda: len(list(store_folder.iterdir())) == len(RANKS), "every rank's save of step 2 hangs")
        order_to_park(group, 1)
        words = [word for member in group for word in member.of_type(contract.SaveFailed)]
        assert [word.step for word in words] == [2] * len(RANKS)
        held = newest_common(folder)
        store = go_on(group, folder, 2, held, config)
        group[0].read_until(step_is(held.step + 4))
        assert {path.name.split("-")[1] for path in store_folder.iterdir()} == {"2"}, "memory holds one copy"
        Path(store_folder, "open").touch()
        assert finish(group) == untouched
        del store
        assert {part.step for part in group[0].of_type(contract.ShardWritten)} >= {STEPS}
    assert not list((folder / "run").rglob("step-*-g1/*")), "what came too late is removed"


def test_a_worker_parks_out_of_a_rendezvous_that_never_ends(folder: Path) -> None:
    store = distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_S)
    )
    alone = spawn(SQUARE)
    assign(alone, 0, SQUARE, folder, INIT, store.port, 1)
    alone.read_until(lambda message: isinstance(message, contract.Pulse) and message.waiting)
    order_to_park([alone], 1)
    group = [alone, *(spawn(SQUARE) for _ in RANKS[1:])]
    store = go_on(group, folder, 2, INIT)
    group[0].read_until(step_is(1))
    for member in group:
        member.process.kill()
    del store


def test_what_is_broken_off_between_begin_and_end_is_known_by_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a peer is gone")

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "isend", fails)
        monkeypatch.setattr(distributed_c10d, "isend", fails)
        with pytest.raises(RuntimeError, match="peer") as together:
            distributed.batch_isend_irecv([distributed.P2POp(fails, torch.zeros(()), 0)])
        with pytest.raises(RuntimeError, match="peer") as alone:
            distributed.isend(torch.zeros(()), 0)
    finally:
        distributed.destroy_process_group()
    assert leave_a_group_open([ValueError("no traceback"), together.value])
    assert not leave_a_group_open([alone.value])


@pytest.mark.parametrize(
    ("waits", "open_ones", "unwound", "ends"),
    [
        pytest.param(True, 0, False, True, id="gloo has forgotten it"),
        pytest.param(False, 0, False, False, id="it computes"),
        pytest.param(True, 1, False, False, id="a connection is left to be cut"),
        pytest.param(True, 0, True, False, id="it is out of its loop, and leaves its groups"),
    ],
)
def test_who_waits_on_in_an_exchange_without_any_connection_ends(
    monkeypatch: pytest.MonkeyPatch, waits: bool, open_ones: int, unwound: bool, ends: bool
) -> None:
    order = order_of(replace(SQUARE, device="cpu"))
    assignment, cuts, exits = link.Assignment(order), [], []

    def cut(both_ways: bool) -> int:
        cuts.append(both_ways)
        if len(cuts) == 10:
            assignment.over.set()
        return open_ones

    def leave(code: int) -> None:
        exits.append(code)
        assignment.over.set()

    monkeypatch.setattr(link, "FORGOTTEN_S", 0.1)
    monkeypatch.setattr(link, "BOTH_WAYS_AFTER_S", 0.2)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(link.pulse, "standing", lambda thread: (waits, "all_reduce"))
    monkeypatch.setattr(
        link.pulse, "IDLE_SHARE", 1e9
    )  # this thread's own, which waits for the verdict, is not at issue
    monkeypatch.setattr(assignment.connections, "cut", cut)
    if unwound:
        assignment.unwound.set()
    assignment.park()
    assert assignment.over.wait(DEADLINE_S)
    assert exits == [contract.EXIT_CANNOT_PARK] * ends
    assert not cuts[0]
    assert ends or cuts[-1], "what does not attend to its connections is cut off both ways, after a while"


def test_only_the_connections_of_the_groups_are_cut_and_no_listener() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    foreign, theirs = socket.create_connection(listener.getsockname()), listener.accept()[0]
    store = socket.create_server(("127.0.0.1", 0))
    connections = GroupConnections(store.getsockname()[1])
    with connections.opening():
        to_store, of_store = socket.create_connection(store.getsockname()), store.accept()[0]
        late_listener = socket.create_server(("127.0.0.1", 0))
        own, peer = socket.create_connection(late_listener.getsockname()), late_listener.accept()[0]
        pair = socket.socketpair()
        assert connections.cut() == 3, "also while groups are made; of the store's, its own end"
        assert own.recv(1) == peer.recv(1) == to_store.recv(1) == b""
        own.sendall(b"x")  # what is on its way may go
        assert connections.cut(both_ways=True) == 3
        with pytest.raises(BrokenPipeError):
            own.sendall(b"x")
    later = socket.create_connection(late_listener.getsockname())
    with connections.opening():
        second = socket.create_connection(late_listener.getsockname())
    connections.cut()
    assert second.recv(1) == b""
    for one, other in ((foreign, theirs), pair):
        one.sendall(b"x")
        assert other.recv(1) == b"x"
    later.sendall(b"x")
    number, _ = own.fileno(), own.close()
    os.dup2(foreign.fileno(), number)  # another's descriptor by now
    connections.cut()
    foreign.sendall(b"x")
    assert theirs.recv(1) == b"x"
    assert socket.create_connection(late_listener.getsockname()), "who listens still does"
    os.close(number)
    for each in (listener, late_listener, foreign, theirs, peer, second, later, store, to_store, of_store, *pair):
        each.close()
