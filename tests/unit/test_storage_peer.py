"""Transfers between agents: a verified snapshot or an error within the deadline, and lines that end with a process."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import random
import shutil
import signal
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
from parallel_pool import CONTEXT

from storage import peer
from storage.manifest import ManifestError
from storage.peer import PeerError, PeerServer, fetch_snapshot, hold_line
from storage.ram import HEADER_BYTES, SnapshotFile, inventory, snapshot_path
from storage.snapshots import RamTier
from storage.state import TrainState

TOKEN = "a-secret-token"
ELEMENTS = 3 << 20  # 12 MiB: more than the sockets buffer


def state_of(step: int) -> TrainState:
    return TrainState(step, {"w": torch.arange(ELEMENTS, dtype=torch.float32) * step}, {"rng": torch.tensor([step])})


@pytest.fixture
def folder():
    path = Path(f"/dev/shm/shepherd-test-{os.getpid()}-{random.randrange(1 << 32):x}")
    RamTier(str(path), "run", "a", 3, generation=4).snapshot(state_of(8))
    yield str(path)
    shutil.rmtree(path, ignore_errors=True)


def fetch(address: str, folder: str, token: str = TOKEN, **changes):
    request = {"run": "run", "source_node": "a", "source_slot": 3, "step": 8, "ram_dir": folder, "node": "b", "slot": 5}
    return fetch_snapshot(address, token, **{**request, **changes})


def serving(folder: str, client) -> None:
    """Run `client(address)` against a server in this process."""

    async def main() -> None:
        server = PeerServer("127.0.0.1", TOKEN, folder, "run", "a")
        address = await server.start()
        try:
            await asyncio.wait_for(client(address), 30)
        finally:
            await server.close()

    asyncio.run(main())


def test_a_spare_takes_over_a_replicas_shard(folder, caplog):
    serving(folder, lambda address: fetch(address, folder))
    assert inventory(folder, "run", "b") == {5: [8]}
    restored = state_of(0)
    restored.per_rank["rng"].fill_(77)
    RamTier(folder, "run", "b", 5, generation=5).restore(8, restored)
    assert torch.equal(restored.tensors["w"], state_of(8).tensors["w"])
    assert restored.per_rank["rng"].tolist() == [77], "the random state of slot 3 is not that of slot 5"
    assert "takes over the shard of slot 3" in caplog.text


def test_the_same_slot_on_another_node_takes_over_everything(folder):
    serving(folder, lambda address: fetch(address, folder, slot=3))
    restored = state_of(0)
    RamTier(folder, "run", "b", 3, generation=5).restore(8, restored)
    assert restored.per_rank["rng"].tolist() == [8]


def test_a_wrong_token_is_refused_and_not_logged(folder, caplog):
    async def client(address: str) -> None:
        with pytest.raises(PeerError, match="wrong token"):
            await fetch(address, folder, token="guess-of-an-intruder")
        with pytest.raises(PeerError, match="wrong token"):
            await hold_line(address, "guess-of-an-intruder")

    with caplog.at_level(logging.DEBUG):
        serving(folder, client)
    assert inventory(folder, "run", "b") == {}
    assert "wrong token" in caplog.text
    assert TOKEN not in caplog.text
    assert "guess-of" not in caplog.text


def test_a_server_that_does_not_know_the_token_is_refused(folder):
    """It cannot make the receiver take its state, even by answering with a proof of its own."""

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer._send(writer, {"nonce": "00" * 16})
        answer = await peer._receive(reader)
        peer._send(writer, {"proof": answer["proof"]})
        await reader.read()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(impostor, "127.0.0.1", 0)
        with pytest.raises(PeerError, match="does not know the token"):
            await fetch(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", folder)
        server.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 9}, "no complete snapshot of slot 3, step 9"),
        ({"source_slot": 4}, "no complete snapshot of slot 4"),
        ({"source_node": "c"}, "this is node a"),
        ({"run": "other"}, "this is node a of run run"),
    ],
)
def test_what_is_not_there_is_refused_with_its_reason(folder, change, message):
    async def client(address: str) -> None:
        with pytest.raises(PeerError, match=message):
            await fetch(address, folder, **change)

    serving(folder, client)


def test_a_corrupted_payload_is_not_taken(folder):
    path = snapshot_path(folder, "run", "a", 3, 8)
    with open(path, "r+b") as f:
        f.seek(HEADER_BYTES + 5_000_000)
        f.write(b"\xff")

    async def client(address: str) -> None:
        with pytest.raises(ManifestError, match=r"slot 3, step 8.*damaged"):
            await fetch(address, folder)

    serving(folder, client)
    assert inventory(folder, "run", "b") == {}


def on_allocation(monkeypatch, action) -> None:
    """Run `action` when the receiver has the header and asks for memory: the payload is still on its way."""
    actual = peer.SnapshotFile

    def allocate(path, payload_bytes):
        action()
        return actual(path, payload_bytes)

    monkeypatch.setattr(peer, "SnapshotFile", allocate)


def test_a_snapshot_that_is_overwritten_during_the_transfer_is_not_taken(folder, monkeypatch):
    path = snapshot_path(folder, "run", "a", 3, 8)

    def overwrite() -> None:
        file = SnapshotFile(path, path.stat().st_size - HEADER_BYTES)
        file.begin()

    on_allocation(monkeypatch, overwrite)

    async def client(address: str) -> None:
        with pytest.raises(PeerError, match="overwritten during the transfer"):
            await fetch(address, folder)

    serving(folder, client)
    assert inventory(folder, "run", "b") == {}


def _serve_forever(folder: str, pipe) -> None:
    async def main() -> None:
        pipe.send(await PeerServer("127.0.0.1", TOKEN, folder, "run", "a").start())
        await asyncio.Event().wait()

    asyncio.run(main())


@pytest.fixture
def other_process(folder):
    """A server in a process of its own: (its process, its address)."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_serve_forever, args=(folder, theirs), daemon=True)
    process.start()
    assert ours.poll(30)
    yield process, ours.recv()
    process.kill()
    process.join(10)


def test_a_peer_that_is_killed_during_the_transfer_is_an_error_and_leaves_the_older_snapshot(
    folder, monkeypatch, other_process
):
    process, address = other_process
    RamTier(folder, "run", "b", 5).snapshot(state_of(7))
    on_allocation(monkeypatch, process.kill)
    with pytest.raises(PeerError, match="broke off"):
        asyncio.run(asyncio.wait_for(fetch(address, folder), 30))
    assert inventory(folder, "run", "b") == {5: [7]}
    restored = state_of(0)
    RamTier(folder, "run", "b", 5).restore(7, restored)
    assert torch.equal(restored.tensors["w"], state_of(7).tensors["w"])


def test_a_peer_that_hangs_is_an_error_within_the_deadline(folder, monkeypatch, other_process):
    process, address = other_process
    monkeypatch.setattr(peer, "STALL_S", 0.3)
    on_allocation(monkeypatch, lambda: os.kill(process.pid, signal.SIGSTOP))
    started = time.monotonic()
    with pytest.raises(PeerError, match="stalled"):
        asyncio.run(fetch(address, folder))
    assert time.monotonic() - started < 10


def test_nobody_listens(folder):
    with pytest.raises(PeerError):
        asyncio.run(fetch("127.0.0.1:1", folder))
    with pytest.raises(PeerError):
        asyncio.run(hold_line("127.0.0.1:1", TOKEN))


def test_a_line_ends_when_the_process_is_killed(other_process):
    process, address = other_process

    async def main() -> float:
        line = asyncio.create_task(hold_line(address, TOKEN))
        done, _ = await asyncio.wait([line], timeout=0.3)
        assert not done, "the line ended while the process lived"
        killed = time.monotonic()
        process.kill()
        await asyncio.wait_for(line, 10)
        return time.monotonic() - killed

    assert asyncio.run(main()) < 2


def test_a_line_ends_when_the_server_closes(folder):
    async def main() -> None:
        server = PeerServer("127.0.0.1", TOKEN, folder, "run", "a")
        line = asyncio.create_task(hold_line(await server.start(), TOKEN))
        done, _ = await asyncio.wait([line], timeout=0.3)
        assert not done
        await server.close()
        await asyncio.wait_for(line, 10)

    asyncio.run(main())


@pytest.mark.parametrize(
    "sent",
    [b"\xff\xff\xff\xff", struct.pack("<I", 3) + b"{}x", struct.pack("<I", 2) + b"[]", struct.pack("<I", 2) + b"{}"],
)
def test_garbage_ends_the_connection_and_not_the_server(folder, sent):
    async def client(address: str) -> None:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(sent)
        await reader.read()  # to the end
        writer.close()
        await fetch(address, folder)

    serving(folder, client)
    assert inventory(folder, "run", "b") == {5: [8]}


def test_a_silent_client_is_dropped_at_the_deadline(folder, monkeypatch):
    monkeypatch.setattr(peer, "HANDSHAKE_S", 0.2)

    async def client(address: str) -> None:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        await reader.read()
        writer.close()

    serving(folder, client)


# --- wires -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("received", [0, 1, 999])
def test_frames_that_came_before_they_are_delivered_are_delivered_first(received):
    """A thousand in one piece: who receives some of them has read the others."""

    async def main() -> None:
        got: list[int] = []
        ended = asyncio.Event()

        async def take(request, wire: peer.Wire) -> None:
            got.extend([(await wire.receive(30))["n"] for _ in range(received)])
            await wire.deliver(lambda frame: got.append(frame["n"]))
            ended.set()

        server = PeerServer("127.0.0.1", TOKEN, "/nowhere", "run", "a", {"take": take})
        async with asyncio.timeout(30):
            async with peer.open_wire(await server.start(), TOKEN, {"op": "take"}) as wire:
                for n in range(1000):
                    wire.post({"n": n})
                wire.writer.write_eof()
                await ended.wait()
        await server.close()
        assert got == list(range(1000))

    asyncio.run(main())


def test_a_wire_that_has_ended_before_it_is_delivered_is_over():
    async def main() -> None:
        ended = asyncio.Event()

        async def take(request, wire: peer.Wire) -> None:
            with pytest.raises(PeerError, match="gone"):
                await wire.receive(30)
            await wire.deliver(lambda frame: None)
            ended.set()

        server = PeerServer("127.0.0.1", TOKEN, "/nowhere", "run", "a", {"take": take})
        async with asyncio.timeout(30):
            async with peer.open_wire(await server.start(), TOKEN, {"op": "take"}):
                pass
            await ended.wait()
        await server.close()

    asyncio.run(main())


def test_what_came_while_this_process_stood_still_is_received():
    sent, over = threading.Event(), threading.Event()
    address: queue.SimpleQueue[str] = queue.SimpleQueue()

    async def speak(request, wire: peer.Wire) -> None:
        await wire.receive(30)
        await wire.send({"n": 1})
        sent.set()

    async def serve() -> None:
        server = PeerServer("127.0.0.1", TOKEN, "/nowhere", "run", "a", {"speak": speak})
        address.put(await server.start())
        await asyncio.to_thread(over.wait, 60)
        await server.close()

    async def listen() -> None:
        async with peer.open_wire(address.get(timeout=30), TOKEN, {"op": "speak"}) as wire:
            receiving = asyncio.create_task(wire.receive(2 * peer.UNREAD_S))
            await asyncio.sleep(0)  # it waits
            wire.post({})
            assert sent.wait(30)
            time.sleep(3 * peer.UNREAD_S)  # the fault: its deadline passes unseen
            assert await receiving == {"n": 1}
            with pytest.raises(PeerError, match="gone"):
                await wire.receive(30)

    serving = threading.Thread(target=asyncio.run, args=(serve(),))
    serving.start()
    try:
        asyncio.run(listen())
    finally:
        over.set()
        serving.join(60)
