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

from orchestrator.runtime.links import unreached
from storage import peer, sockets, transfer, wires
from storage.blocks import SourceError, read_blocks
from storage.manifest import ManifestError
from storage.peer import PeerServer
from storage.ram import HEADER_BYTES, SnapshotFile, inventory, ram_copy, snapshot_path
from storage.snapshots import RamTier
from storage.state import TrainState
from storage.transfer import PeerSource, Rate, fetch_snapshot
from storage.wires import PeerError, answers, hold_line

TOKEN = "a-secret-token"
ELEMENTS = 3 << 20  # 12 MiB: more than the sockets buffer


def state_of(step: int) -> TrainState:
    return TrainState(step, {"w": torch.arange(ELEMENTS, dtype=torch.float32) * step}, {"rng": torch.tensor([step])})


def take(tier: RamTier, state: TrainState) -> None:
    """A complete snapshot."""
    tier.snapshot(state)
    tier.wait()


@pytest.fixture
def folder():
    path = Path(f"/dev/shm/shepherd-test-{os.getpid()}-{random.randrange(1 << 32):x}")
    take(RamTier(str(path), "run", "a", 3, generation=4), state_of(8))
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
        wires.send_frame(writer, {"nonce": "00" * 16})
        answer = await wires.receive_frame(reader)
        wires.send_frame(writer, {"proof": answer["proof"]})
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


def damage(folder: str) -> None:
    """One bit, in block 4 of the snapshot's only large tensor."""
    with open(snapshot_path(folder, "run", "a", 3, 8), "r+b") as f:
        f.seek(HEADER_BYTES + 5_000_000)
        byte = f.read(1)[0]
        f.seek(HEADER_BYTES + 5_000_000)
        f.write(bytes([byte ^ 1]))


def test_a_corrupted_payload_is_not_taken(folder):
    damage(folder)
    bad = []

    async def client(address: str) -> None:
        with pytest.raises(ManifestError, match=r"slot-00003/step-00000008: w at \(0,\), block 4 is damaged"):
            await fetch(address, folder, bad=bad)

    serving(folder, client)
    assert inventory(folder, "run", "b") == {}
    assert [(b.source, b.fqn, b.block) for b in bad] == [("a", "w", 4)]


def on_allocation(monkeypatch, action) -> None:
    """Run `action` when the receiver has the header and asks for memory: the payload is still on its way."""
    actual = transfer.SnapshotFile

    def allocate(path, room):
        action()
        return actual(path, room)

    monkeypatch.setattr(transfer, "SnapshotFile", allocate)


def test_a_snapshot_that_is_overwritten_during_the_transfer_is_not_taken(folder, monkeypatch):
    path = snapshot_path(folder, "run", "a", 3, 8)

    def overwrite() -> None:
        file = SnapshotFile.existing(path)
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
    take(RamTier(folder, "run", "b", 5), state_of(7))
    on_allocation(monkeypatch, process.kill)
    with pytest.raises(PeerError, match="broke off"):
        asyncio.run(asyncio.wait_for(fetch(address, folder), 30))
    assert inventory(folder, "run", "b") == {5: [7]}
    restored = state_of(0)
    RamTier(folder, "run", "b", 5).restore(7, restored)
    assert torch.equal(restored.tensors["w"], state_of(7).tensors["w"])


def test_a_peer_that_hangs_is_an_error_within_the_deadline(folder, monkeypatch, other_process):
    process, address = other_process
    monkeypatch.setattr(wires, "STALL_S", 0.3)
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


def test_a_process_that_has_stopped_answers_nobody_though_its_host_does(other_process):
    process, address = other_process
    links = {"a": address, "b": "127.0.0.1:1"}
    assert asyncio.run(answers(address, TOKEN, 20.0))
    assert not asyncio.run(answers("127.0.0.1:1", TOKEN, 2.0))
    assert not asyncio.run(answers(address, "another-token", 2.0))
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert asyncio.run(unreached(links)) == frozenset()
        assert not asyncio.run(answers(address, TOKEN, 2.0))
    finally:
        os.kill(process.pid, signal.SIGCONT)


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

    assert asyncio.run(main()) < 4.5, "it needs no keep-alive to tell, which takes five seconds"


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
    monkeypatch.setattr(wires, "HANDSHAKE_S", 0.2)

    async def client(address: str) -> None:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        await reader.read()
        writer.close()

    serving(folder, client)


def test_a_block_that_is_damaged_at_one_holder_is_fetched_from_another(folder):
    take(RamTier(folder, "run", "c", 2, generation=4), state_of(8))  # a replica's: the same shard, another random state
    damage(folder)

    async def client(address: str) -> None:
        second = PeerServer("127.0.0.1", TOKEN, folder, "run", "c")
        gone = PeerSource("127.0.0.1:1", TOKEN, "run", "d", 3, 8)
        replica = PeerSource(await second.start(), TOKEN, "run", "c", 2, 8)
        bad = []
        await fetch(address, folder, slot=3, others=(gone, replica), bad=bad)
        replica.close()
        await second.close()
        assert [(b.source, b.fqn, b.block) for b in bad] == [("a", "w", 4)]

    serving(folder, client)
    restored = state_of(0)
    RamTier(folder, "run", "b", 3, generation=5).restore(8, restored)
    assert torch.equal(restored.tensors["w"], state_of(8).tensors["w"])
    assert restored.per_rank["rng"].tolist() == [8]


def test_a_block_that_was_damaged_on_its_way_is_asked_for_again(folder, monkeypatch):
    actual, flipped = PeerSource.receive, []

    def receive(self, start, into, arrived):
        def flip(done: int) -> None:
            if done == len(into) and not flipped:
                flipped.append(done)
                into[1_500_000] ^= 1
                arrived(done)

        # Told of late, so that the first look at the block sees the damage.
        return actual(self, start, into, flip if len(into) > 2 << 20 else arrived)

    monkeypatch.setattr(PeerSource, "receive", receive)
    bad = []
    serving(folder, lambda address: fetch(address, folder, slot=3, bad=bad))
    restored = state_of(0)
    RamTier(folder, "run", "b", 3, generation=5).restore(8, restored)
    assert torch.equal(restored.tensors["w"], state_of(8).tensors["w"])
    assert flipped and bad == [], "where it lies it is whole"


def test_a_copy_that_can_wait_asks_before_each_range(folder, monkeypatch):
    waits = []
    monkeypatch.setattr(transfer, "CAPPED_RANGE_BYTES", 1 << 20)
    rate = Rate(1 << 30)
    monkeypatch.setattr(rate, "wait", lambda n_bytes, ended: waits.append(n_bytes))
    serving(folder, lambda address: fetch(address, folder, rate=rate))
    assert len(waits) == 13 and sum(waits) == 12 * (1 << 20) + 4096
    assert inventory(folder, "run", "b") == {5: [8]}


def test_two_that_share_a_cap_wait_in_turn(monkeypatch):
    now, waited = [100.0], []
    monkeypatch.setattr(transfer.time, "monotonic", lambda: now[0])
    rate, ended = Rate(1000), threading.Event()
    monkeypatch.setattr(ended, "wait", waited.append)
    for _ in range(3):
        rate.wait(500, ended)
    now[0] += 10.0
    rate.wait(500, ended)
    assert waited == [0.0, 0.5, 1.0, 0.0]


def test_ranges_are_read_while_the_snapshot_stands(folder, other_process):
    _, address = other_process
    source = PeerSource(address, TOKEN, "run", "a", 3, 8, generation=4)
    copy = source.copy()
    assert copy.index == ram_copy(snapshot_path(folder, "run", "a", 3, 8)).index
    (chunk,) = (c for c in copy.index.chunks if c.fqn == "w")
    into = bytearray(chunk.n_bytes)
    assert read_blocks(copy, chunk, 0, len(chunk.blocks), memoryview(into)) == []
    assert bytes(into) == state_of(8).tensors["w"].numpy().tobytes()
    sockets.shut(source._sock)  # as the other side does to who is idle for too long
    assert read_blocks(copy, chunk, 3, 5, memoryview(into)[: 2 << 20]) == []
    SnapshotFile.existing(snapshot_path(folder, "run", "a", 3, 8)).begin()
    with pytest.raises(SourceError, match="overwritten"):
        read_blocks(copy, chunk, 3, 5, memoryview(into)[: 2 << 20])
    with pytest.raises(SourceError, match="no complete snapshot"):
        read_blocks(copy, chunk, 3, 5, memoryview(into)[: 2 << 20])


def test_a_snapshot_of_another_generation_is_refused(folder, other_process):
    other = PeerSource(other_process[1], TOKEN, "run", "a", 3, 8, generation=5)
    with pytest.raises(SourceError, match="is of generation 4, not 5"):
        other.copy()


def test_a_fetch_that_is_cancelled_writes_nothing_any_more(folder, monkeypatch, other_process):
    monkeypatch.setattr(sockets, "END_S", 600.0)
    process, address = other_process
    stopped = threading.Event()
    on_allocation(monkeypatch, lambda: (os.kill(process.pid, signal.SIGSTOP), stopped.set()))
    threads = set(threading.enumerate())

    async def main() -> None:
        fetching = asyncio.create_task(fetch(address, folder))
        async with asyncio.timeout(60):
            await asyncio.to_thread(stopped.wait, 30)
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
        # Its result was waited for; what is left of the thread is its last instructions.
        for thread in set(threading.enumerate()) - threads:
            if thread.name == "transfer":
                thread.join(10)
                assert not thread.is_alive()

    asyncio.run(main())
    assert inventory(folder, "run", "b") == {}


def test_a_thread_that_does_not_end_is_left_to_itself(monkeypatch):
    """It may be allocating gigabytes, and nobody can wake it."""
    monkeypatch.setattr(sockets, "END_S", 0.01)
    free, asked_to_end = threading.Event(), threading.Event()

    async def main() -> None:
        waiting = asyncio.create_task(sockets.in_thread(lambda: free.wait(60), asked_to_end.set))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert asked_to_end.is_set()
        free.set()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_who_finds_all_places_taken_waits_for_one(folder, monkeypatch):
    monkeypatch.setattr(peer, "MAX_TRANSFERS", 1)
    monkeypatch.setattr(peer, "BUSY_S", 0.01)
    waits = asyncio.Event()
    actual = peer.send_frame

    def send_frame(writer, document) -> None:
        if "busy" in document:
            waits.set()
        actual(writer, document)

    monkeypatch.setattr(peer, "send_frame", send_frame)

    async def client(address: str) -> None:
        first = PeerSource(address, TOKEN, "run", "a", 3, 8)
        await asyncio.to_thread(first.copy)
        second = asyncio.create_task(fetch(address, folder))
        await waits.wait()
        assert not second.done()
        first.close()
        await second
        await fetch(address, folder)  # the place was given back

    serving(folder, client)
    assert inventory(folder, "run", "b") == {5: [8]}


def test_the_wait_for_a_place_ends(folder, monkeypatch):
    monkeypatch.setattr(peer, "MAX_TRANSFERS", 1)
    monkeypatch.setattr(peer, "BUSY_S", 0.01)
    monkeypatch.setattr(transfer, "PLACE_S", 0.1)

    async def client(address: str) -> None:
        first = PeerSource(address, TOKEN, "run", "a", 3, 8)
        await asyncio.to_thread(first.copy)
        with pytest.raises(PeerError, match="busy with other transfers"):
            await fetch(address, folder)
        monkeypatch.setattr(transfer, "PLACE_S", 300.0)
        monkeypatch.setattr(peer, "PLACE_S", 0.1)
        with pytest.raises(PeerError, match="1 transfers are under way"):
            await fetch(address, folder)
        first.close()
        await fetch(address, folder)

    serving(folder, client)


def test_of_two_generations_that_was_asked_for_is_sent(folder):
    newer = state_of(8)
    newer.tensors["w"].fill_(5.0)
    take(RamTier(folder, "run", "a", 3, generation=5), newer)
    serving(folder, lambda address: fetch(address, folder, slot=3, generation=4))
    restored = state_of(0)
    RamTier(folder, "run", "b", 3).restore(8, restored, generation=4)
    assert torch.equal(restored.tensors["w"], state_of(8).tensors["w"])


def stopped_peer(client) -> None:
    """Run `client(address, accepted)` with a peer that accepts and says nothing, as a stopped process does."""

    async def main() -> None:
        accepted = asyncio.Event()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set()
            await reader.read()
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        async with asyncio.timeout(60):
            await client(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", accepted)
        server.close()

    asyncio.run(main())


def test_a_fetch_from_a_peer_that_is_silent_is_cancelled_at_once(folder, monkeypatch):
    monkeypatch.setattr(sockets, "END_S", 600.0)
    monkeypatch.setattr(wires, "STALL_S", 600.0)
    monkeypatch.setattr(wires, "HANDSHAKE_S", 600.0)

    async def client(address: str, accepted: asyncio.Event) -> None:
        fetching = asyncio.create_task(fetch(address, folder))
        await accepted.wait()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching

    stopped_peer(client)


def test_a_fetch_is_cancelled_at_once_while_it_waits_for_another_holder(folder, monkeypatch):
    damage(folder)
    monkeypatch.setattr(sockets, "END_S", 600.0)
    monkeypatch.setattr(wires, "STALL_S", 600.0)
    monkeypatch.setattr(wires, "HANDSHAKE_S", 600.0)

    async def client(silent: str, accepted: asyncio.Event) -> None:
        server = PeerServer("127.0.0.1", TOKEN, folder, "run", "a")
        other = PeerSource(silent, TOKEN, "run", "c", 3, 8)
        fetching = asyncio.create_task(fetch(await server.start(), folder, others=(other,)))
        await accepted.wait()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        await server.close()

    stopped_peer(client)


def test_a_peer_that_is_silent_fails_the_handshake(folder, monkeypatch):
    monkeypatch.setattr(wires, "STALL_S", 600.0)
    monkeypatch.setattr(wires, "HANDSHAKE_S", 0.2)

    async def client(address: str, accepted: asyncio.Event) -> None:
        with pytest.raises(PeerError, match="stalled"):
            await fetch(address, folder)

    stopped_peer(client)


def test_a_fetch_that_ended_while_memory_was_allocated_leaves_the_file_as_it_is(folder, monkeypatch):
    take(RamTier(folder, "run", "b", 5), state_of(7))
    sources = []
    actual = PeerSource.copy
    monkeypatch.setattr(PeerSource, "copy", lambda self: (sources.append(self), actual(self))[1])
    on_allocation(monkeypatch, lambda: sources[0].close())

    async def client(address: str) -> None:
        with pytest.raises(PeerError, match="ended"):
            await fetch(address, folder, files=1, keep=99)

    serving(folder, client)
    assert inventory(folder, "run", "b") == {5: [7]}


# --- wires -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("received", [0, 1, 999])
def test_frames_that_came_before_they_are_delivered_are_delivered_first(received):
    """A thousand in one piece: who receives some of them has read the others."""

    async def main() -> None:
        got: list[int] = []
        ended = asyncio.Event()

        async def take(request, wire: wires.Wire) -> None:
            got.extend([(await wire.receive(30))["n"] for _ in range(received)])
            await wire.deliver(lambda frame: got.append(frame["n"]))
            ended.set()

        server = PeerServer("127.0.0.1", TOKEN, "/nowhere", "run", "a", {"take": take})
        async with asyncio.timeout(30):
            async with wires.open_wire(await server.start(), TOKEN, {"op": "take"}) as wire:
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

        async def take(request, wire: wires.Wire) -> None:
            with pytest.raises(PeerError, match="gone"):
                await wire.receive(30)
            await wire.deliver(lambda frame: None)
            ended.set()

        server = PeerServer("127.0.0.1", TOKEN, "/nowhere", "run", "a", {"take": take})
        async with asyncio.timeout(30):
            async with wires.open_wire(await server.start(), TOKEN, {"op": "take"}):
                pass
            await ended.wait()
        await server.close()

    asyncio.run(main())


def test_what_came_while_this_process_stood_still_is_received():
    sent, over = threading.Event(), threading.Event()
    address: queue.SimpleQueue[str] = queue.SimpleQueue()

    async def speak(request, wire: wires.Wire) -> None:
        await wire.receive(30)
        await wire.send({"n": 1})
        sent.set()

    async def serve() -> None:
        server = PeerServer("127.0.0.1", TOKEN, "/nowhere", "run", "a", {"speak": speak})
        address.put(await server.start())
        await asyncio.to_thread(over.wait, 60)
        await server.close()

    async def listen() -> None:
        async with wires.open_wire(address.get(timeout=30), TOKEN, {"op": "speak"}) as wire:
            receiving = asyncio.create_task(wire.receive(2 * wires.UNREAD_S))
            await asyncio.sleep(0)  # it waits
            wire.post({})
            assert sent.wait(30)
            time.sleep(3 * wires.UNREAD_S)  # the fault: its deadline passes unseen
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
