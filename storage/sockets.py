"""Blocking sockets, for threads that move many bytes: each wait has a deadline, and others can end it. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from storage import wires
from storage.index import BLOCK_BYTES
from storage.threads import begun
from storage.wires import MAX_FRAME_BYTES, PeerError, document_of, frame_of, proof

T = TypeVar("T")

END_S = 2.0
"""For a thread whose sockets were shut to end. One in an allocation of gigabytes takes longer, and writes nothing then:
nobody waits for it, least of all a halt."""

# The slowest rate that a range may have, so that a trickle ends: a tenth of a 1 Gbit/s link.
MIN_BYTES_PER_S = 12_500_000
# Of one call to the kernel, between looks at the clock.
_SEND_BYTES = 16 * 1024 * 1024
# A block: small enough to be in the processor's cache when it is checked.
_RECEIVE_BYTES = BLOCK_BYTES
# Who waits is woken when so much is there: woken for each packet, both sides take twice as long.
WAKE_BYTES = 256 * 1024


def connected(
    address: str, token: str, request: dict[str, Any], opened: Callable[[socket.socket], None]
) -> socket.socket:
    """A connection on which both sides have proved the token and the request is sent; `opened` has it before that.

    Raises:
        PeerError, OSError, EOFError: the other side cannot be reached, breaks off, or does not know the token.
    """
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host.strip("[]"), int(port)), timeout=wires.HANDSHAKE_S)
    try:
        opened(sock)
        theirs, nonce = str(receive_frame(sock)["nonce"]), secrets.token_hex(16)
        sock.sendall(frame_of({"nonce": nonce, "proof": proof(token.encode(), "client", theirs, nonce)}))
        answer = receive_frame(sock)
        if not hmac.compare_digest(str(answer.get("proof")), proof(token.encode(), "server", theirs, nonce)):
            raise PeerError("the peer does not know the token")
        sock.sendall(frame_of(request))
        sock.settimeout(wires.STALL_S)
    except BaseException:
        sock.close()
        raise
    return sock


def receive_frame(sock: socket.socket, begun: bytes = b"") -> dict[str, Any]:
    """One frame, of which `begun` has come already.

    Raises:
        PeerError: the frame is too long, is no JSON object, or says that the other side refuses.
        OSError, EOFError: see `receive_into`.
    """
    prefix = bytearray(4)
    prefix[: len(begun)] = begun
    receive_into(sock, memoryview(prefix)[len(begun) :], lambda done: None)
    (length,) = struct.unpack("<I", prefix)
    wires.check_length(length, MAX_FRAME_BYTES)
    body = bytearray(length)
    receive_into(sock, memoryview(body), lambda done: None)
    return document_of(bytes(body))


def receive_into(sock: socket.socket, into: memoryview, arrived: Callable[[int], None]) -> None:
    """Fill `into`; `arrived` is told, now and then, how many bytes are there.

    Raises:
        TimeoutError: nothing came for the socket's own timeout, or all of it comes too slowly.
        OSError, EOFError: the connection broke, or ended.
    """
    with _kernel_waits(sock, socket.SO_RCVTIMEO) as stall_s:
        deadline = time.monotonic() + stall_s + len(into) / MIN_BYTES_PER_S
        done = 0
        while done < len(into):
            # A call that has taken fewer than WAKE_BYTES is woken when so many more are there: they must be to come.
            many = len(into) - done >= 2 * WAKE_BYTES
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, WAKE_BYTES if many else 1)
            n_bytes = sock.recv_into(into[done : done + _RECEIVE_BYTES], 0, 0 if many else socket.MSG_WAITALL)
            if not n_bytes:
                raise EOFError(f"after {done} of {len(into)} bytes")
            done += n_bytes
            arrived(done)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{done} of {len(into)} bytes in time")


def send_range(sock: socket.socket, file: BinaryIO, start: int, n_bytes: int) -> None:
    """Send so many bytes of a file from `start` on.

    Raises:
        TimeoutError: nothing was taken for the socket's own timeout.
        PeerError: all of it is taken too slowly, or the file is cut off.
        OSError: the connection broke.
    """
    with _kernel_waits(sock, socket.SO_SNDTIMEO) as stall_s:
        deadline = time.monotonic() + stall_s + n_bytes / MIN_BYTES_PER_S
        done = 0
        while done < n_bytes:
            sent = os.sendfile(sock.fileno(), file.fileno(), start + done, min(_SEND_BYTES, n_bytes - done))
            if not sent:
                raise PeerError("the snapshot's file is cut off")
            done += sent
            if time.monotonic() > deadline:
                raise PeerError(f"{done} of {n_bytes} bytes were taken in time")


@contextlib.contextmanager
def _kernel_waits(sock: socket.socket, option: int) -> Iterator[float]:
    """Have the kernel do the waiting in the socket's calls, for at most its timeout in seconds, which is given.

    Python's own timeouts return to it with each packet's worth, and each return costs a turn at the interpreter.

    Raises:
        TimeoutError: a call has waited for so long.
    """
    timeout = sock.gettimeout()
    assert timeout, "every wait has a deadline"
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(timeout), int(timeout % 1 * 1_000_000)))
    try:
        yield timeout
    except BlockingIOError as e:
        raise TimeoutError(f"the peer stands still for {timeout:g} s") from e
    finally:
        sock.settimeout(timeout)


def shut(sock: socket.socket) -> None:
    """End a connection, so that a thread which waits for it goes on."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


async def in_thread(work: Callable[[], T], end: Callable[[], None]) -> T:
    """Do `work` in a thread of its own. When this is cancelled, `end` must end it, and its end is waited for."""
    done = asyncio.wrap_future(begun(work, "transfer"))
    done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # of one that nobody waits for
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        end()
        await asyncio.wait({done}, timeout=END_S)
        raise
