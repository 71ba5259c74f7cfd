"""Snapshots in memory, whose writer, sender or receiver is killed: the older ones stay, and what is whole is right.

Stores into mapped memory are no system calls, so the writer is killed before every instruction of Python's in the code
that makes them. What lies between two of them, the copy of a tensor, is cut at random moments in
tests/unit/test_storage_ram.py. Sender and receiver of a transfer are killed at each piece that passes between them.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parallel_pool import CONTEXT
from states import blank, in_clean_process, same, state_of
from tcp_proxy import PIECE_BYTES, tcp_proxy, unchanged

from storage import ram, snapshots
from storage.peer import PeerServer
from storage.ram import HEADER_BYTES, inventory, read_header, snapshot_path
from storage.snapshots import RamTier
from storage.transfer import fetch_snapshot

pytestmark = pytest.mark.timeout(900)

OLDEST, OLDER, OLD, NEW = 3, 4, 5, 6
RUN, NODE, TOKEN = "run", "a", "a-token"
CODE = {ram.__file__, snapshots.__file__}
ROWS = 40
# Of a transfer: several pieces.
MANY_ROWS = 240


@pytest.fixture
def folder() -> Iterator[str]:
    path = f"/dev/shm/shepherd-test-{os.getpid()}-{random.randrange(1 << 32):x}"
    yield path
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(path + ".before", ignore_errors=True)


def take(folder: str, *steps: int, node: str = NODE, rows: int = ROWS) -> None:
    tier = RamTier(folder, RUN, node, 0)
    for step in steps:
        tier.snapshot(state_of(step, rows))
    tier.wait()


def serves(folder: str, node: str = NODE, rows: int = ROWS) -> list[int]:
    """Steps of the snapshots that are offered, each of which returns bit for bit."""
    steps = inventory(folder, RUN, node).get(0, [])
    for step in steps:
        state = blank(rows)
        RamTier(folder, RUN, node, 0).restore(step, state)
        assert same(state, state_of(step, rows)), f"the snapshot of step {step} holds another state"
    return steps


# --- the writer -------------------------------------------------------------------------------------------------------


class Instructions:
    """Counts the instructions of this process in the code of the tier, and kills it before number `at`."""

    def __init__(self, at: int | None) -> None:
        self.count, self._at = 0, at

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        # The thread that trains waits while another completes the snapshot: how often it looks is not the same twice.
        if frame.f_code.co_filename not in CODE or frame.f_code.co_name == "wait":
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if self.count == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
        return self


def snapshot_in_a_child(folder: str, at: int | None) -> int | None:
    """Take the newest snapshot; the number of instructions, None when it was killed."""
    state = state_of(NEW)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            instructions = Instructions(at)
            threading.settrace(instructions)
            sys.settrace(instructions)
            tier = RamTier(folder, RUN, NODE, 0)
            tier.snapshot(state)
            tier.wait()
            sys.settrace(None)
            os.write(write, str(instructions.count).encode())
        except BaseException:
            os.write(write, traceback.format_exc().encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert told.isdigit(), told
    return int(told)


def sweep(folder: str, held: list[int], stride: int) -> tuple[int, int]:
    """Kills at every `stride`-th instruction; how many, and how many of them left the newest snapshot complete."""
    before = folder + ".before"
    shutil.rmtree(before, ignore_errors=True)
    os.mkdir(before)
    if held:
        take(before, *held)
    shutil.copytree(before, folder, dirs_exist_ok=True)
    n_instructions = snapshot_in_a_child(folder, None)
    assert n_instructions
    assert NEW in serves(folder)
    kills = complete = 0
    for at in range(0, n_instructions, stride):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        if snapshot_in_a_child(folder, at) is not None:
            continue
        kills += 1
        steps = serves(folder)
        where = f"instruction {at} of {n_instructions}: {steps}"
        # The oldest may be gone: it is what the newest overwrites.
        assert set(steps) - {NEW, OLDEST} == set(held) - {OLDEST}, where
        complete += NEW in steps
        take(folder, NEW + 1)
        assert {*held[-1:], NEW + 1} <= set(serves(folder)), where
    return kills, complete


@pytest.mark.parametrize("held", [[], [OLDEST, OLDER, OLD]], ids=["first", "fourth"])
def test_a_writer_that_is_killed_at_some_instructions(folder, held, tally):
    check_kills(folder, held, 97, tally)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("held", [[], [OLDEST, OLDER, OLD]], ids=["first", "fourth"])
def test_a_writer_that_is_killed_at_every_instruction(folder, held, tally):
    check_kills(folder, held, 1, tally)


def check_kills(folder: str, held: list[int], stride: int, tally: Any) -> None:
    kills, complete = in_clean_process(sweep, folder, held, stride)
    assert kills > 10
    assert complete < kills / 2, "it is complete at the very end"
    tally("snapshots", f"writer of the {'fourth' if held else 'first'}", kills=kills, complete=complete)


def test_a_header_that_is_torn_anywhere_offers_nothing_or_what_is_whole(folder, tally):
    """Between an older snapshot's header and a newer one's in the same file, with the counter of either or between."""
    take(folder, OLD)
    path = snapshot_path(folder, RUN, NODE, 0, OLD)
    assert path is not None
    old = path.read_bytes()
    take(folder, NEW, NEW + 1, NEW + 2)
    newest = next(p for p in path.parent.iterdir() if p.name == path.name)
    new, counter = newest.read_bytes(), slice(8, 16)
    assert read_header(path) is not None and old[counter] != new[counter]
    headers = {content: read_header_of(path, content) for content in (old[:HEADER_BYTES], new[:HEADER_BYTES])}
    torn = 0
    length = max(i for i in range(HEADER_BYTES) if old[i] or new[i]) + 1
    for at in range(length + 1):
        for count in (old[counter], new[counter], (int.from_bytes(new[counter], "little") - 1).to_bytes(8, "little")):
            page = bytearray(new[:at] + old[at:HEADER_BYTES])
            page[counter] = count
            found = read_header_of(path, bytes(page))
            odd = count[0] % 2
            assert found is None or (not odd and found in headers.values()), (at, count)
            torn += found is None
    assert torn > length
    tally("snapshots", "torn headers", kills=3 * (length + 1), complete=3 * (length + 1) - torn)


def read_header_of(path: Path, page: bytes) -> ram.Header | None:
    with open(path, "r+b") as file:
        file.write(page)
    return read_header(path)


# --- a transfer -------------------------------------------------------------------------------------------------------


def _send(folder: str, pipe: Any) -> None:
    async def serve() -> None:
        pipe.send(await PeerServer("127.0.0.1", TOKEN, folder, RUN, NODE).start())
        await asyncio.Event().wait()

    asyncio.run(serve())


def _receive(folder: str, pipe: Any) -> None:
    address = pipe.recv()
    place = {"ram_dir": folder, "node": "b", "slot": 0}
    work = fetch_snapshot(address, TOKEN, run=RUN, source_node=NODE, source_slot=0, step=NEW, **place)
    try:
        asyncio.run(work)
        pipe.send("done")
    except Exception as error:
        pipe.send(repr(error))


def start(function: Any, folder: str) -> tuple[Any, Any]:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=function, args=(folder, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def transfer(folder: str, victim: str, at: int | None) -> tuple[str, int]:
    """What the receiver told, and how many pieces passed; `victim` is killed before piece `at` passes."""
    sender, sends = start(_send, folder)
    receiver, receives = start(_receive, folder)
    passed = 0

    def passing(before: int, piece: bytes) -> bytes:
        nonlocal passed
        last = (before + len(piece)) // PIECE_BYTES
        if at is not None and last >= at:
            os.kill({"sender": sender.pid, "receiver": receiver.pid}[victim], signal.SIGKILL)
            raise ConnectionResetError
        passed = max(passed, last)
        return unchanged(before, piece)

    try:
        assert sends.poll(60)
        with tcp_proxy(sends.recv()) as proxy:
            proxy.passing = passing
            receives.send(proxy.address)
            assert receives.poll(60), "the receiver does not end"
            try:
                return receives.recv(), passed
            except EOFError:
                return "killed", passed
    finally:
        for process in (sender, receiver):
            process.kill()
            process.join(10)


def check_transfers(folder: str, victim: str, stride: int, tally: Any) -> None:
    take(folder, OLD, NEW, rows=MANY_ROWS)
    take(folder, OLD, node="b", rows=MANY_ROWS)
    told, pieces = transfer(folder, victim, None)
    assert told == "done"
    assert serves(folder, "b", MANY_ROWS) == [OLD, NEW]
    assert pieces > 8
    kills = complete = 0
    for at in range(0, pieces + 1, stride):
        ram.drop_newer(folder, RUN, "b", OLD)
        told, _ = transfer(folder, victim, at)
        assert told == "killed" if victim == "receiver" else "PeerFailed" in told, (at, told)
        kills += 1
        steps = serves(folder, "b", MANY_ROWS)
        assert steps in ([OLD], [OLD, NEW]), (at, steps)
        complete += NEW in steps
        assert serves(folder, NODE, MANY_ROWS) == [OLD, NEW], "the sender's stay as they were"
    told, _ = transfer(folder, victim, None)
    assert told == "done", "the transfer after that"
    assert serves(folder, "b", MANY_ROWS) == [OLD, NEW]
    tally("snapshots", f"{victim} in mid-transfer", kills=kills, complete=complete)


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_a_transfer_that_is_cut_by_a_kill(folder, victim, tally):
    check_transfers(folder, victim, 5, tally)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_a_transfer_that_is_cut_by_a_kill_at_every_piece(folder, victim, tally):
    check_transfers(folder, victim, 1, tally)
