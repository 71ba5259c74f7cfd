"""Transfers whose bytes come in the pieces and at the moments that a real network may choose."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import shutil
import struct
import termios
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
import torch
from tcp_proxy import PIECE_BYTES, tcp_proxy

from storage import sockets, transfer, wires
from storage.peer import PeerServer
from storage.ram import HEADER_BYTES, snapshot_path
from storage.snapshots import RamTier
from storage.state import TrainState
from storage.transfer import PeerSource, fetch_snapshot
from storage.wires import frame_of

RUN, TOKEN, STEP = "run", "a-token", 8
ELEMENTS = 3 << 20
"""12 MiB: more than the sockets buffer."""
DEADLINE_S = 30.0


@pytest.fixture
def folder() -> Iterator[str]:
    path = f"/dev/shm/shepherd-test-{os.getpid()}-{random.randrange(1 << 32):x}"
    tier = RamTier(path, RUN, "a", 0)
    tier.snapshot(TrainState(STEP, {"w": torch.randn(ELEMENTS)}, {}))
    tier.wait()
    yield path
    shutil.rmtree(path, ignore_errors=True)


def payload(folder: str, node: str) -> bytes:
    path = snapshot_path(folder, RUN, node, 0, STEP)
    assert path is not None
    return path.read_bytes()[HEADER_BYTES : HEADER_BYTES + 4 * ELEMENTS]


def serving(folder: str, client: Callable[[str], Awaitable[None]]) -> None:
    """Run `client(address)` against a server in this process."""

    async def main() -> None:
        server = PeerServer("127.0.0.1", TOKEN, folder, RUN, "a")
        try:
            await asyncio.wait_for(client(await server.start()), DEADLINE_S)
        finally:
            await server.close()

    asyncio.run(main())


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def unread(source: PeerSource) -> int:
    """Bytes that have come and that nobody has taken."""
    assert source._sock is not None
    (n_bytes,) = struct.unpack("i", fcntl.ioctl(source._sock, termios.FIONREAD, bytes(4)))
    return int(n_bytes)


def test_a_receiver_that_has_taken_a_part_is_woken_for_a_small_rest(folder: str, monkeypatch) -> None:
    """It takes what is there and waits; what is to come then is less than what it is woken for in mid-transfer."""
    monkeypatch.setattr(wires, "STALL_S", 10 * DEADLINE_S)
    into = memoryview(bytearray(sockets.WAKE_BYTES + PIECE_BYTES - 4096))

    async def client(address: str) -> None:
        opened = begun = False

        def passing(before: int, piece: bytes) -> bytes:
            nonlocal begun
            if begun:
                until(lambda: unread(source) == 0, "the receiver takes what is there")
            begun = opened
            return piece

        with tcp_proxy(address) as proxy:
            proxy.passing = passing
            source = PeerSource(proxy.address, TOKEN, RUN, "a", 0, STEP)
            try:
                index = (await asyncio.to_thread(source.copy)).index
                opened = True
                await asyncio.wait_for(asyncio.to_thread(source.read, index, 0, into), DEADLINE_S / 2)
            finally:
                source.close()

    serving(folder, client)
    assert bytes(into) == payload(folder, "a")[: into.nbytes]


def test_what_had_arrived_when_a_connection_broke_stays_as_it_was_checked(folder: str, monkeypatch) -> None:
    """The second connection brings damage where the first had brought what was right."""
    monkeypatch.setattr(transfer, "RANGE_BYTES", 4 << 20)
    connections = begin = 0
    flipped: list[int] = []

    def passing(before: int, piece: bytes) -> bytes:
        nonlocal connections
        connections += before == 0
        if connections == 1 and before > begin + (6 << 20):
            raise ConnectionResetError
        if connections == 2 and before <= begin < before + len(piece):
            at = begin - before + (len(piece) - (begin - before)) // 2
            flipped.append(at)
            return piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
        return piece

    async def client(address: str) -> None:
        nonlocal begin
        counted: list[int] = []
        with tcp_proxy(address) as proxy:
            proxy.passing = lambda before, piece: (counted.append(len(piece)), piece)[1]
            source = PeerSource(proxy.address, TOKEN, RUN, "a", 0, STEP)
            await asyncio.to_thread(source.copy)
            source.close()
            begin = sum(counted)
            proxy.passing = passing
            place = {"ram_dir": folder, "node": "b", "slot": 0}
            await fetch_snapshot(proxy.address, TOKEN, run=RUN, source_node="a", source_slot=0, step=STEP, **place)

    serving(folder, client)
    assert connections == 2 and flipped
    assert payload(folder, "b") == payload(folder, "a")


def test_a_reader_that_takes_nothing_is_dropped_at_the_deadline(folder: str, monkeypatch, caplog) -> None:
    monkeypatch.setattr(wires, "STALL_S", 0.3)

    async def client(address: str) -> None:
        source = PeerSource(address, TOKEN, RUN, "a", 0, STEP)
        await asyncio.to_thread(source.copy)
        assert source._sock is not None
        source._sock.sendall(frame_of({"start": 0, "n_bytes": 4 * ELEMENTS}))
        await asyncio.to_thread(until, lambda: "stands still for 0.3 s" in caplog.text, "it is dropped")
        source.close()

    serving(folder, client)
