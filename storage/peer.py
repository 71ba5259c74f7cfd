"""Connections between nodes over TCP: copies of snapshots, lines whose end tells that a process died, and wires, on
which two of our processes talk. No torch.

Both sides prove the job's token by HMAC-SHA256 over both sides' nonces; the token itself is never sent. Frames are a
4-byte length and a JSON object; a snapshot's payload follows its frame as raw bytes, then a closing frame. The receiver
trusts nothing but the payload's digest.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import hmac
import json
import logging
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, cast

import xxhash

from storage.manifest import ManifestError
from storage.ram import (
    FORMAT_VERSION,
    HEADER_BYTES,
    Header,
    SnapshotFile,
    choose_file,
    file_paths,
    parse_header,
    read_header,
    safe_name,
    snapshot_path,
)

log = logging.getLogger(__name__)

# Connecting, proving the token and asking take a few round trips; a second is 10 times the longest one between sites.
HANDSHAKE_S = 5.0
# Between two pieces of a payload. A loaded host schedules within a second; TCP itself retries for longer.
STALL_S = 15.0
# The slowest rate that a whole transfer may have, so that a trickle ends: a tenth of a 1 Gbit/s link.
MIN_BYTES_PER_S = 12_500_000
# Requests and headers are below 5 kB.
MAX_FRAME_BYTES = 64 * 1024
# On a wire. Senders end a frame at a sixteenth of it; what comes then is a single report that is very long.
MAX_WIRE_FRAME_BYTES = 16 * 1024 * 1024
# A process that has stood still finds its deadline over and what came meanwhile unread: it has so long to read it.
UNREAD_S = 0.5
PIECE_BYTES = 1024 * 1024
# An agent has one line to its controller and serves a few spares at a time; as a fan-in it hears 128 nodes, and each of
# them may come anew before its broken connection is seen as such.
MAX_CONNECTIONS = 320
# A line whose host vanished without a word is over after 2 + 3 x 1 s.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))


class PeerError(RuntimeError):
    """A peer refused, broke off, or took too long."""


class PeerRefused(PeerError):
    """A peer that is well says no."""


@dataclasses.dataclass(frozen=True)
class Wire:
    """A connection on which both sides have proved the token, and each sends JSON objects."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, document: dict[str, Any]) -> None:
        """Write one frame; returns when the other side keeps up.

        Raises:
            PeerError: it does not, or the frame is longer than it would take.
        """
        self._write(document)
        try:
            async with asyncio.timeout(STALL_S):
                await self.writer.drain()
        except OSError as e:
            raise PeerError(f"the peer does not take what it is sent: {e!r}") from e

    def post(self, document: dict[str, Any]) -> None:
        """Write one short frame without waiting. Raises PeerError when the other side has left too much unread."""
        if self.writer.transport.get_write_buffer_size() > MAX_FRAME_BYTES:
            self.cut()
            raise PeerError("the peer does not take what it is sent")
        self._write(document)

    def _write(self, document: dict[str, Any]) -> None:
        body = json.dumps(document, separators=(",", ":")).encode()
        if len(body) > MAX_WIRE_FRAME_BYTES:
            raise PeerError(f"frame of {len(body)} bytes, at most {MAX_WIRE_FRAME_BYTES}")
        self.writer.write(struct.pack("<I", len(body)) + body)

    async def receive(self, within_s: float) -> dict[str, Any]:
        """The next frame. After a deadline that is missed nothing more can be received.

        Raises:
            PeerRefused: it says that the other side refuses.
            PeerError: there is none within the time, the connection ended, or it is not as it should be.
        """
        frame = asyncio.ensure_future(_receive(self.reader, MAX_WIRE_FRAME_BYTES))
        try:
            unread_s = min(UNREAD_S, within_s)
            for wait_s in (within_s - unread_s, unread_s):
                await asyncio.wait({frame}, timeout=wait_s)
                if frame.done():
                    return frame.result()
        except (OSError, EOFError) as e:
            raise PeerError(f"the peer has gone: {e!r}") from e
        finally:
            frame.cancel()
        raise PeerError(f"the peer is silent for {within_s:.2f} s")

    async def deliver(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Call `take` with each frame, until the wire ends. Nothing can be received in another way from then on.

        For who hears many: without a task that wakes for each frame it costs half as much.

        Raises:
            Exception: what `take` raised, or what is wrong with the frame; the wire is cut.
        """
        transport = cast(asyncio.Transport, self.writer.transport)
        if transport.is_closing():
            return
        self.reader.feed_eof()  # so that it gives what it has, and waits for no more
        unread = await self.reader.read()
        frames = _Frames(take, transport)
        transport.set_protocol(frames)
        frames.data_received(unread)
        transport.pause_reading()
        transport.resume_reading()  # an end that the stream has been told is told again
        await frames.ended

    def cut(self) -> None:
        self.writer.transport.abort()


class _Frames(asyncio.Protocol):
    """Cuts what comes into frames, in place of the stream that the connection began with; writing stays with that."""

    def __init__(self, take: Callable[[dict[str, Any]], None], transport: asyncio.WriteTransport) -> None:
        self._take, self._transport = take, transport
        self._stream = transport.get_protocol()
        self._buffer = bytearray()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            while len(self._buffer) >= 4 and not self.ended.done():
                (length,) = struct.unpack_from("<I", self._buffer)
                _check_length(length, MAX_WIRE_FRAME_BYTES)
                if len(self._buffer) < 4 + length:
                    return
                body = bytes(self._buffer[4 : 4 + length])
                del self._buffer[: 4 + length]
                self._take(_document(body))
        except Exception as e:
            self._end(e)
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(None)
        self._stream.connection_lost(exc)

    def pause_writing(self) -> None:
        self._stream.pause_writing()

    def resume_writing(self) -> None:
        self._stream.resume_writing()

    def _end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


Service = Callable[[dict[str, Any], Wire], Awaitable[None]]
"""Serves one wire whose request is the first argument, until it returns."""


class PeerServer:
    """Serves a node's snapshots and lines to whoever proves the token, and what `services` has by the request's op."""

    def __init__(
        self, host: str, token: str, ram_dir: str, run: str, node: str, services: Mapping[str, Service] | None = None
    ) -> None:
        self._host, self._token, self._services = host, token.encode(), services or {}
        self._ram_dir, self._run, self._node = ram_dir, run, node
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Listen on a free port of the host; the address as ``host:port``."""
        self._server = await asyncio.start_server(self._serve, self._host, 0, limit=2 * PIECE_BYTES)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def close(self) -> None:
        """Stop listening and end all connections, lines included."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        peer = writer.get_extra_info("peername")
        try:
            if len(self._connections) > MAX_CONNECTIONS:
                raise PeerError(f"more than {MAX_CONNECTIONS} connections")
            async with asyncio.timeout(HANDSHAKE_S):
                await self._challenge(reader, writer)
                request = await _receive(reader)
            await self._answer(request, reader, writer)
        except (PeerError, OSError, EOFError, TimeoutError, ValueError, KeyError, TypeError) as e:
            log.warning("connection from %s ended: %s: %s", peer, type(e).__name__, e)
        except asyncio.CancelledError:  # by close(); asyncio.streams would log it as an error
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            await _close(writer)

    async def _challenge(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonce = secrets.token_hex(16)
        _send(writer, {"nonce": nonce})
        answer = await _receive(reader)
        theirs = str(answer["nonce"])
        if not hmac.compare_digest(str(answer["proof"]), _proof(self._token, "client", nonce, theirs)):
            _send(writer, {"error": "wrong token"})
            raise PeerError("wrong token")
        _send(writer, {"proof": _proof(self._token, "server", nonce, theirs)})

    async def _answer(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if request["op"] == "line":
            _keep_alive(writer)
            _send(writer, {"ok": True})
            await reader.read(1)  # open until either side goes
        elif request["op"] == "snapshot":
            if (request["run"], request["node"]) != (self._run, self._node):
                return await _refuse(writer, f"this is node {self._node} of run {self._run}")
            await self._send_snapshot(int(request["slot"]), int(request["step"]), writer)
        elif request["op"] in self._services:
            _keep_alive(writer)
            await self._services[request["op"]](request, Wire(reader, writer))
        else:
            await _refuse(writer, "unknown request")

    async def _send_snapshot(self, slot: int, step: int, writer: asyncio.StreamWriter) -> None:
        path = snapshot_path(self._ram_dir, self._run, self._node, slot, step)
        if path is None:
            return await _refuse(writer, f"no complete snapshot of slot {slot}, step {step}")
        with open(path, "rb") as file:
            before, header = parse_header(file.read(HEADER_BYTES))
            if header is None or header.step != step:
                return await _refuse(writer, f"the snapshot of slot {slot}, step {step} was overwritten")
            _send(writer, {"header": dataclasses.asdict(header)})
            left = header.payload_bytes
            async with asyncio.timeout(_transfer_s(left)):
                while left:
                    piece = file.read(min(PIECE_BYTES, left))
                    if not piece:
                        raise PeerError(f"snapshot of slot {slot}, step {step} is cut off")
                    left -= len(piece)
                    writer.write(piece)
                    await asyncio.wait_for(writer.drain(), STALL_S)
                file.seek(0)
                unchanged = parse_header(file.read(HEADER_BYTES))[0] == before
                _send(writer, {"ok": True} if unchanged else {"error": "overwritten during the transfer"})


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
) -> None:
    """Copy a peer's snapshot into this node's RAM tier as the snapshot of `slot`; complete and verified on return.

    Raises:
        PeerError: the peer cannot be reached, refuses, has no such snapshot, dies or stalls.
        ManifestError: what arrived does not have the header's digest; the receiver's file is left torn.
        OSError: this node's memory file system is full.
    """
    request = {"op": "snapshot", "run": run, "node": source_node, "slot": source_slot, "step": step}
    try:
        async with _connection(address, token, request) as (reader, _):
            async with asyncio.timeout(HANDSHAKE_S):
                source = Header(**(await _receive(reader))["header"])
            if (source.step, source.slot, source.format_version) != (step, source_slot, FORMAT_VERSION):
                raise PeerError(f"{address}: asked for slot {source_slot}, step {step}, got {source}")
            paths = file_paths(ram_dir, run, node, slot)
            path = paths[choose_file([read_header(p) for p in paths], None)]
            # Allocating takes seconds for a large shard: not on the event loop.
            file = await asyncio.to_thread(SnapshotFile, path, source.payload_bytes)
            file.begin()
            async with asyncio.timeout(_transfer_s(source.payload_bytes)):
                digest = await _receive_payload(reader, file, source.payload_bytes)
                await asyncio.wait_for(_receive(reader), STALL_S)
    except (OSError, EOFError, KeyError, TypeError) as e:
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            raise
        raise PeerError(f"{address}: the peer broke off, stalled or speaks another protocol: {e!r}") from e
    if digest != source.payload_digest:
        raise ManifestError(f"slot {source_slot}, step {step} from {address}: payload is damaged")
    file.finish(dataclasses.replace(source, run=safe_name(run), node=safe_name(node), slot=slot))


async def hold_line(address: str, token: str) -> None:
    """Return when the process that serves `address` is gone. Cancel to end the line from this side.

    Raises:
        PeerError: the line could not be opened.
    """
    try:
        async with _connection(address, token, {"op": "line"}) as (reader, writer):
            _keep_alive(writer)
            async with asyncio.timeout(HANDSHAKE_S):
                await _receive(reader)
            with contextlib.suppress(OSError):
                await reader.read(1)
    except (OSError, EOFError, KeyError) as e:
        raise PeerError(f"{address}: no line: {e!r}") from e


@contextlib.asynccontextmanager
async def open_wire(address: str, token: str, request: dict[str, Any]) -> AsyncIterator[Wire]:
    """A wire to the service that `request["op"]` names.

    Raises:
        PeerRefused: the service says no.
        PeerError: it cannot be reached.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            reader, writer = await stack.enter_async_context(_connection(address, token, request))
        except (OSError, EOFError, KeyError) as e:
            raise PeerError(f"{address}: no wire: {e!r}") from e
        _keep_alive(writer)
        yield Wire(reader, writer)


@contextlib.asynccontextmanager
async def _connection(
    address: str, token: str, request: dict[str, Any]
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which both sides have proved the token and the request is sent."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(HANDSHAKE_S):
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), limit=2 * PIECE_BYTES)
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            theirs, nonce = str((await _receive(reader))["nonce"]), secrets.token_hex(16)
            _send(writer, {"nonce": nonce, "proof": _proof(token.encode(), "client", theirs, nonce)})
            answer = await _receive(reader)
            if not hmac.compare_digest(str(answer.get("proof")), _proof(token.encode(), "server", theirs, nonce)):
                raise PeerError(f"{address}: the peer does not know the token")
            _send(writer, request)
        yield reader, writer
    finally:
        writer.transport.abort()


async def _receive_payload(reader: asyncio.StreamReader, file: SnapshotFile, n_bytes: int) -> str:
    """Write the payload into the file; xxh3_128 of what then stands in memory."""
    target = file.payload(n_bytes).data
    digest = xxhash.xxh3_128()
    done = 0
    while done < n_bytes:
        piece = await asyncio.wait_for(reader.read(min(PIECE_BYTES, n_bytes - done)), STALL_S)
        if not piece:
            raise EOFError(f"after {done} of {n_bytes} bytes")
        target[done : done + len(piece)] = piece
        digest.update(target[done : done + len(piece)])
        done += len(piece)
    return digest.hexdigest()


def _proof(token: bytes, side: str, server_nonce: str, client_nonce: str) -> str:
    return hmac.digest(token, f"shepherd-peer-1|{side}|{server_nonce}|{client_nonce}".encode(), "sha256").hex()


def _transfer_s(n_bytes: int) -> float:
    return STALL_S + n_bytes / MIN_BYTES_PER_S


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _send(writer: asyncio.StreamWriter, document: dict[str, Any]) -> None:
    body = json.dumps(document).encode()
    assert len(body) <= MAX_FRAME_BYTES, len(body)
    writer.write(struct.pack("<I", len(body)) + body)


async def _close(writer: asyncio.StreamWriter) -> None:
    """Send what is buffered and end the connection; cut it when the other side does not take the rest."""
    writer.close()
    try:
        await asyncio.wait_for(writer.wait_closed(), STALL_S)
    except OSError:
        writer.transport.abort()


async def _refuse(writer: asyncio.StreamWriter, reason: str) -> None:
    _send(writer, {"error": reason})
    await asyncio.wait_for(writer.drain(), STALL_S)


async def _receive(reader: asyncio.StreamReader, max_bytes: int = MAX_FRAME_BYTES) -> dict[str, Any]:
    """One frame.

    Raises:
        PeerError: the frame is too long, is no JSON object, or says that the other side refuses.
        EOFError: the connection ended.
    """
    (length,) = struct.unpack("<I", await reader.readexactly(4))
    _check_length(length, max_bytes)
    return _document(await reader.readexactly(length))


def _check_length(length: int, max_bytes: int) -> None:
    if length > max_bytes:
        raise PeerError(f"frame of {length} bytes, at most {max_bytes}")


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError as e:
        raise PeerError("frame is no JSON") from e
    if not isinstance(document, dict):
        raise PeerError("frame is no JSON object")
    if "error" in document:
        raise PeerRefused(f"the peer says: {document['error']}")
    return document
