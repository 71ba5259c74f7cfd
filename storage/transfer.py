"""Snapshots from one node's memory to another's, and to whoever restores from them. No torch.

One-way: who wants a snapshot asks for it. On a connection on which both sides have proved the token (storage/wires.py)
the holder sends the snapshot's header and its index, and then, as often as it is asked, a range of the payload as raw
bytes and a closing frame, which says whether the snapshot still stands. Bytes go from the holder's file straight into
the receiver's mapping, on each side in a thread that talks over a blocking socket. The receiver trusts nothing but the
blocks' digests: it checks each block as soon as it is there, while the processor still has it in its cache, asks once
more for what is damaged, and then asks another holder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from storage import wires
from storage.blocks import BadBlock, Copy, Distance, SourceError, fetch_block
from storage.index import BLOCK_BYTES, Chunk, Index
from storage.manifest import ManifestError
from storage.ram import (
    FILES,
    FORMAT_VERSION,
    HEADER_BYTES,
    Header,
    SnapshotFile,
    checked_index,
    choose_file,
    file_paths,
    parse_header,
    read_header,
    safe_name,
    snapshot_path,
)
from storage.sockets import connected, in_thread, receive_frame, receive_into, send_range, shut
from storage.wires import PeerError, frame_of

# Asked for at a time: a round trip between is nothing beside it, and one that was overwritten is noticed so soon.
RANGE_BYTES = 256 * 1024 * 1024
# With a cap on the rate: small beside what a second brings, so that the link is not taken in bursts.
CAPPED_RANGE_BYTES = 8 * 1024 * 1024
# A reader that has not asked for so long is dropped; it connects again. Longer than a capped range takes at 100 kB/s.
IDLE_S = 120.0
# A holder that sends as many snapshots as it may is waited for: 64 of 13 GiB over 25 Gbit/s take 290 s.
PLACE_S = 300.0
# Of a snapshot of 10,000 tensors and 1 TB.
MAX_INDEX_BYTES = 64 * 1024 * 1024
# The next snapshot's index may be a few digits longer.
INDEX_SLACK_BYTES = 64 * 1024


class Rate:
    """A cap on the bytes a second of all transfers that share it: a bucket that holds nothing."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def wait(self, n_bytes: int, ended: threading.Event) -> None:
        """Until `n_bytes` may be taken, or the transfer has ended. Of two who wait, the first to come goes first."""
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._free_at)
            self._free_at = begin + n_bytes / self._bytes_per_s
        ended.wait(begin - now)


# --- the holder's side ------------------------------------------------------------------------------------------------


def serve_snapshot(sock: socket.socket, place: tuple[str, str, str], request: dict[str, Any]) -> None:
    """Send what is asked of a snapshot of `place` (ram_dir, run, node), until the other side ends. Blocks.

    Raises:
        PeerError, OSError: the other side broke off, took too long or does not speak the protocol.
    """
    slot, step, generation = int(request["slot"]), int(request["step"]), request.get("generation")
    sock.settimeout(wires.STALL_S)
    path = snapshot_path(*place, slot, step, generation) or snapshot_path(*place, slot, step)
    if path is None:
        return sock.sendall(frame_of({"error": f"no complete snapshot of slot {slot}, step {step}"}))
    with open(path, "rb") as file:
        before, header = parse_header(_header_page(file))
        if header is None or header.step != step:
            return sock.sendall(frame_of({"error": f"the snapshot of slot {slot}, step {step} was overwritten"}))
        if generation not in (None, header.generation):
            error = f"the snapshot of slot {slot}, step {step} is of generation {header.generation}, not {generation}"
            return sock.sendall(frame_of({"error": error}))
        sock.sendall(frame_of({"header": dataclasses.asdict(header)}))
        send_range(sock, file, HEADER_BYTES + header.payload_bytes, header.index_bytes)
        while (asked := _next_range(sock)) is not None:
            start, n_bytes = asked
            if not 0 <= start <= start + n_bytes <= header.payload_bytes:
                raise PeerError(f"asked for [{start}, {start} + {n_bytes}) of {header.payload_bytes} bytes")
            send_range(sock, file, HEADER_BYTES + start, n_bytes)
            unchanged = parse_header(_header_page(file))[0] == before
            sock.sendall(frame_of({"ok": True} if unchanged else {"error": "overwritten during the transfer"}))
            if not unchanged:
                return


def _header_page(file: BinaryIO) -> bytes:
    """As it is now, not as it was when the file was last read."""
    return os.pread(file.fileno(), HEADER_BYTES, 0)


def _next_range(sock: socket.socket) -> tuple[int, int] | None:
    """What is asked for next; None when the other side has ended."""
    sock.settimeout(IDLE_S)
    first = sock.recv(1)
    if not first:
        return None
    sock.settimeout(wires.STALL_S)
    request = receive_frame(sock, first)
    return int(request["start"]), int(request["n_bytes"])


# --- the reader's side ------------------------------------------------------------------------------------------------


class PeerSource:
    """A snapshot in another node's memory, to restore from. Blocking, each wait with a deadline; from any thread.

    It connects when it is first asked for something.
    """

    def __init__(
        self, address: str, token: str, run: str, node: str, slot: int, step: int, generation: int | None = None
    ) -> None:
        """`generation` is that which wrote the snapshot; None: the newest that has written this step there."""
        self._address, self._token, self._slot = address, token, slot
        self._request = {
            "op": "snapshot",
            "run": run,
            "node": node,
            "slot": slot,
            "step": step,
            "generation": generation,
        }
        self._turn = threading.Lock()
        self._sock: socket.socket | None = None
        self._header: Header | None = None
        self._raw = b""
        self._copy: Copy | None = None
        self.ended = threading.Event()

    @property
    def name(self) -> str:
        return str(self._request["node"])

    @property
    def slot(self) -> int:
        return self._slot

    def copy(self) -> Copy:
        """The snapshot with its index, as storage.blocks takes it.

        Raises:
            SourceError: it is not there, or cannot be had in time.
            ManifestError: its index is damaged.
        """
        with self._turn, self._failing():
            self._connect()
            if self._copy is None:
                assert self._header is not None
                self._copy = Copy(checked_index(self._header, self._raw), self, Distance.PEER)
            return self._copy

    def described(self) -> tuple[Header, bytes]:
        """The snapshot's header, and its index as bytes. After `copy`."""
        assert self._header is not None
        return self._header, self._raw

    def read(self, index: Index, start: int, into: memoryview) -> int:
        """See storage.blocks.Source."""
        return self.receive(start, into, lambda done: None)

    def receive(self, start: int, into: memoryview, arrived: Callable[[int], None]) -> int:
        """Fill `into` with the payload's bytes from `start` on; `arrived` is told how many are there.

        Raises:
            SourceError: the other side broke off, stalled, refuses, or the snapshot was overwritten meanwhile.
        """
        done = 0

        def ask() -> None:
            before = done
            self._ask(start + before, into[before:], lambda more: tell(before + more))

        def tell(n_bytes: int) -> None:
            nonlocal done
            done = n_bytes
            arrived(done)

        with self._turn, self._failing():
            fresh = self._connect()
            try:
                ask()
            except (ConnectionError, EOFError):
                if fresh or self.ended.is_set():
                    raise
                self._drop()  # it may have been idle for too long
                self._connect()
                ask()  # for the rest: what has arrived may have been checked, and must not change any more
            return len(into)

    def close(self) -> None:
        """End the connection, whoever waits for it; nothing can be read any more."""
        self.ended.set()
        sock = self._sock
        if sock is not None:
            shut(sock)

    def _ask(self, start: int, into: memoryview, arrived: Callable[[int], None]) -> None:
        assert self._sock is not None
        self._sock.sendall(frame_of({"start": start, "n_bytes": len(into)}))
        receive_into(self._sock, into, arrived)
        receive_frame(self._sock)

    def _connect(self) -> bool:
        """Whether there was no connection before."""
        if self.ended.is_set():
            raise PeerError("ended")
        if self._sock is not None:
            return False
        sock = connected(self._address, self._token, self._request, self._opened)
        header = Header(**_receive_admitted(sock)["header"])
        asked = self._request
        if (header.step, header.slot, header.format_version) != (asked["step"], asked["slot"], FORMAT_VERSION):
            raise PeerError(f"asked for slot {asked['slot']}, step {asked['step']}, got {header}")
        if not 0 < header.index_bytes <= MAX_INDEX_BYTES or header.payload_bytes < 0:
            raise PeerError(f"sizes that cannot be: {header}")
        raw = bytearray(header.index_bytes)
        receive_into(sock, memoryview(raw), lambda done: None)
        if self._header is not None and self._header != header:
            raise PeerError("the snapshot was overwritten")
        self._header, self._raw = header, bytes(raw)
        return True

    def _opened(self, sock: socket.socket) -> None:
        """From here on `close` ends the connection, whatever this thread waits for."""
        self._sock = sock
        if self.ended.is_set():
            raise PeerError("ended")

    def _drop(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """What a connection fails with, as the source's failure."""
        try:
            yield
        except (PeerError, OSError, EOFError, KeyError, TypeError, ValueError, struct.error) as e:
            self._drop()
            if isinstance(e, ManifestError):
                raise
            told = str(e) if isinstance(e, PeerError) else f"the peer broke off, stalled or speaks otherwise: {e!r}"
            raise PeerFailed(f"{self._address}: {told}") from e


def _receive_admitted(sock: socket.socket) -> dict[str, Any]:
    """The first frame of a holder that has a place for this transfer. Raises PeerError when that takes too long."""
    deadline = time.monotonic() + PLACE_S
    while "busy" in (frame := receive_frame(sock)):
        if time.monotonic() > deadline:
            raise PeerError(f"it has been busy with other transfers for {PLACE_S:g} s")
    return frame


class PeerFailed(PeerError, SourceError):
    """A peer's snapshot cannot be read."""


async def fetch_snapshot(
    address: str,
    token: str,
    *,
    run: str,
    source_node: str,
    source_slot: int,
    step: int,
    ram_dir: str,
    node: str,
    slot: int,
    files: int = FILES,
    keep: int | None = None,
    generation: int | None = None,
    others: Sequence[PeerSource] = (),
    rate: Rate | None = None,
    mapped: dict[Path, SnapshotFile] | None = None,
    bad: list[BadBlock] | None = None,
) -> None:
    """Copy a peer's snapshot into this node's RAM tier as the snapshot of `slot`; complete and verified on return.

    Args:
        files: of the slot, which this may use.
        keep: the one step that must stay, whatever else is overwritten; None: the newest.
        others: who is asked, in this order, for blocks that are damaged at the peer. They are closed at the end.
        rate: a cap for copies that can wait.
        mapped: files of before, to be used again: to allocate and map one takes as long as to fill it.
        bad: what is found damaged where it lies is added here.

    Raises:
        PeerError: the peer cannot be reached, refuses, has no such snapshot, dies or stalls.
        ManifestError: a block is damaged wherever it lies; the receiver's file is left torn.
        OSError: this node's memory file system is full.
    """
    source = PeerSource(address, token, run, source_node, source_slot, step, generation)
    places = file_paths(ram_dir, run, node, slot)[:files]

    def fetch() -> None:
        try:
            source.copy()
            header, raw = source.described()
            held = [read_header(p) for p in places]
            path = places[choose_file([h if h and keep in (None, h.step) else None for h in held])]
            file = None if mapped is None else mapped.get(path)
            if file is None or file.room < header.n_bytes or not file.stands:
                file = SnapshotFile(path, header.n_bytes + INDEX_SLACK_BYTES)
                if mapped is not None:
                    mapped[path] = file
            if source.ended.is_set():  # nobody waits for the end of an allocation that takes too long
                raise PeerFailed("ended")
            file.begin()
            payload = file.payload(header.payload_bytes).data
            for begin, end, chunk, block in _receive_payload(source, payload, rate):
                # Once more from the same: it may have been damaged on its way.
                fetch_block(chunk, block, payload[begin:end], [source, *others], [] if bad is None else bad)
            here = dataclasses.replace(header, run=safe_name(run), node=safe_name(node), slot=slot)
            file.finish(here, raw)
        finally:
            close()

    def close() -> None:
        for each in (source, *others):
            each.close()

    await in_thread(fetch, close)


def _receive_payload(source: PeerSource, payload: memoryview, rate: Rate | None) -> list[_Block]:
    """Fill `payload`, checking each block when it is there; those that are not what they must be."""
    check = _Check(source.copy().index, payload)
    at_once = RANGE_BYTES if rate is None else CAPPED_RANGE_BYTES
    for start in range(0, len(payload), at_once):
        into = payload[start : start + at_once]
        if rate is not None:
            rate.wait(len(into), source.ended)
        source.receive(start, into, lambda done, start=start: check.reach(start + done))  # type: ignore[misc]
    check.reach(len(payload))
    return check.damaged


_Block = tuple[int, int, Chunk, int]
"""Where it begins in the payload, where it ends, its chunk, its number there."""


class _Check:
    """The check of a payload's blocks, which follows its arrival."""

    def __init__(self, index: Index, payload: memoryview) -> None:
        self._payload = payload
        self._blocks = _blocks(index)
        self._next = next(self._blocks, None)
        self.damaged: list[_Block] = []

    def reach(self, n_bytes: int) -> None:
        """Check the blocks that lie in the first `n_bytes` and have not been checked."""
        while self._next is not None and self._next[1] <= n_bytes:
            begin, end, chunk, block = self._next
            if xxhash.xxh3_128_hexdigest(self._payload[begin:end]) != chunk.blocks[block]:
                self.damaged.append(self._next)
            self._next = next(self._blocks, None)


def _blocks(index: Index) -> Iterator[_Block]:
    """All blocks in the order of the data file."""
    for chunk in sorted(index.chunks, key=lambda chunk: chunk.file_offset):
        for block in range(len(chunk.blocks)):
            begin = chunk.file_offset + block * BLOCK_BYTES
            yield begin, min(begin + BLOCK_BYTES, chunk.file_offset + chunk.n_bytes), chunk, block
