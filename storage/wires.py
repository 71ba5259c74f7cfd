"""Wires between nodes over TCP: connections on which two of our processes talk, and lines whose end tells that a
process died. No torch.

Both sides prove the job's token by HMAC-SHA256 over both sides' nonces; the token itself is never sent. Frames are a
4-byte length and a JSON object.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import hmac
import json
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

# Connecting, proving the token and asking take a few round trips; a second is 10 times the longest one between sites.
HANDSHAKE_S = 5.0
# Between two pieces of a payload. A loaded host schedules within a second; TCP itself retries for longer.
STALL_S = 15.0
# Requests and headers are below 5 kB.
MAX_FRAME_BYTES = 64 * 1024
# On a wire. Senders end a frame at a sixteenth of it; what comes then is a single report that is very long.
MAX_WIRE_FRAME_BYTES = 16 * 1024 * 1024
# A process that has stood still finds its deadline over and what came meanwhile unread: it has so long to read it.
UNREAD_S = 0.5
READ_BYTES = 2 * 1024 * 1024
# A line whose host vanished without a word is over after 2 + 3 x 1 s.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))


class PeerError(RuntimeError):
    """A peer refused, broke off, or took too long."""


class PeerUnreachable(PeerError):
    """No packet comes back: the peer's host is gone, or the network between is."""


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
        frame = asyncio.ensure_future(receive_frame(self.reader, MAX_WIRE_FRAME_BYTES))
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
                check_length(length, MAX_WIRE_FRAME_BYTES)
                if len(self._buffer) < 4 + length:
                    return
                body = bytes(self._buffer[4 : 4 + length])
                del self._buffer[: 4 + length]
                self._take(document_of(body))
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


def is_swallowed(error: BaseException) -> bool:
    """Whether a connection failed because no packet came back. One that is refused was answered by the other host."""
    unreachable = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
    return isinstance(error, TimeoutError) or (isinstance(error, OSError) and error.errno in unreachable)


async def hold_line(address: str, token: str) -> None:
    """Return when the process that serves `address` is gone. Cancel to end the line from this side.

    Raises:
        PeerUnreachable: the line could not be opened, for nobody answers at all.
        PeerError: the line could not be opened otherwise; the process may be gone, and its host answers so.
    """
    try:
        async with _connection(address, token, {"op": "line"}) as (reader, writer):
            keep_alive(writer)
            async with asyncio.timeout(HANDSHAKE_S):
                await receive_frame(reader)
            with contextlib.suppress(OSError):
                await reader.read(1)
    except (OSError, EOFError, KeyError) as e:
        raise (PeerUnreachable if is_swallowed(e) else PeerError)(f"{address}: no line: {e!r}") from e


async def answers(address: str, token: str, within_s: float) -> bool:
    """Whether the process that serves `address` lives: its host answers also for one that has stopped."""
    try:
        async with asyncio.timeout(within_s), _connection(address, token, {"op": "line"}) as (reader, _):
            await receive_frame(reader)
            return True
    except (PeerError, OSError, EOFError, KeyError):
        return False


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
        keep_alive(writer)
        yield Wire(reader, writer)


@contextlib.asynccontextmanager
async def _connection(
    address: str, token: str, request: dict[str, Any]
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which both sides have proved the token and the request is sent."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(HANDSHAKE_S):
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), limit=READ_BYTES)
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            theirs, nonce = str((await receive_frame(reader))["nonce"]), secrets.token_hex(16)
            send_frame(writer, {"nonce": nonce, "proof": proof(token.encode(), "client", theirs, nonce)})
            answer = await receive_frame(reader)
            if not hmac.compare_digest(str(answer.get("proof")), proof(token.encode(), "server", theirs, nonce)):
                raise PeerError(f"{address}: the peer does not know the token")
            send_frame(writer, request)
        yield reader, writer
    finally:
        writer.transport.abort()


def proof(token: bytes, side: str, server_nonce: str, client_nonce: str) -> str:
    """What only who knows the token can say: `side` is "client" or "server"."""
    return hmac.digest(token, f"shepherd-peer-1|{side}|{server_nonce}|{client_nonce}".encode(), "sha256").hex()


def keep_alive(writer: asyncio.StreamWriter) -> None:
    """Have the kernel find out when the other side's host has vanished."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def send_frame(writer: asyncio.StreamWriter, document: dict[str, Any]) -> None:
    """Write one short frame; the writer must be drained."""
    writer.write(frame_of(document))


def frame_of(document: dict[str, Any]) -> bytes:
    """A short frame's bytes."""
    body = json.dumps(document).encode()
    assert len(body) <= MAX_FRAME_BYTES, len(body)
    return struct.pack("<I", len(body)) + body


async def close(writer: asyncio.StreamWriter) -> None:
    """Send what is buffered and end the connection; cut it when the other side does not take the rest."""
    writer.close()
    try:
        await asyncio.wait_for(writer.wait_closed(), STALL_S)
    except OSError:
        writer.transport.abort()


async def refuse(writer: asyncio.StreamWriter, reason: str) -> None:
    """Say no, and why."""
    send_frame(writer, {"error": reason})
    await asyncio.wait_for(writer.drain(), STALL_S)


async def receive_frame(reader: asyncio.StreamReader, max_bytes: int = MAX_FRAME_BYTES) -> dict[str, Any]:
    """One frame.

    Raises:
        PeerError: the frame is too long, is no JSON object, or says that the other side refuses.
        EOFError: the connection ended.
    """
    (length,) = struct.unpack("<I", await reader.readexactly(4))
    check_length(length, max_bytes)
    return document_of(await reader.readexactly(length))


def check_length(length: int, max_bytes: int) -> None:
    """Raises PeerError when a frame is too long."""
    if length > max_bytes:
        raise PeerError(f"frame of {length} bytes, at most {max_bytes}")


def document_of(body: bytes) -> dict[str, Any]:
    """The object in a frame. Raises PeerError when there is none, PeerRefused when it is a refusal."""
    try:
        document = json.loads(body)
    except ValueError as e:
        raise PeerError("frame is no JSON") from e
    if not isinstance(document, dict):
        raise PeerError("frame is no JSON object")
    if "error" in document:
        raise PeerRefused(f"the peer says: {document['error']}")
    return document
