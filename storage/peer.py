"""The server of a node, to which other nodes connect: its snapshots, its lines, and its services. No torch."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from storage import wires
from storage.sockets import in_thread, shut
from storage.transfer import PLACE_S, serve_snapshot
from storage.wires import (
    READ_BYTES,
    PeerError,
    Wire,
    close,
    keep_alive,
    proof,
    receive_frame,
    refuse,
    send_frame,
)

log = logging.getLogger(__name__)

# An agent has one line to its controller and serves a few spares at a time; as a fan-in it hears 128 nodes, and each of
# them may come anew before its broken connection is seen as such.
MAX_CONNECTIONS = 320
# Of snapshots at once, each with a thread: to a buddy and to spares, for every slot of a node.
MAX_TRANSFERS = 64
# Who waits for one of those to end hears so often that he does; a fraction of wires.STALL_S.
BUSY_S = 2.0

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
        self._transfers = asyncio.Semaphore(MAX_TRANSFERS)

    async def start(self) -> str:
        """Listen on a free port of the host; the address as ``host:port``."""
        self._server = await asyncio.start_server(self._serve, self._host, 0, limit=READ_BYTES)
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
            async with asyncio.timeout(wires.HANDSHAKE_S):
                await self._challenge(reader, writer)
                request = await receive_frame(reader)
            await self._answer(request, reader, writer)
        except (PeerError, OSError, EOFError, TimeoutError, ValueError, KeyError, TypeError) as e:
            # Who leaves without a word has only looked whether this node can be reached.
            said = not (isinstance(e, asyncio.IncompleteReadError) and not e.partial)
            log.log(
                logging.WARNING if said else logging.DEBUG,
                "connection from %s ended: %s: %s",
                peer,
                type(e).__name__,
                e,
            )
        except asyncio.CancelledError:  # by close(); asyncio.streams would log it as an error
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            await close(writer)

    async def _challenge(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonce = secrets.token_hex(16)
        send_frame(writer, {"nonce": nonce})
        answer = await receive_frame(reader)
        theirs = str(answer["nonce"])
        if not hmac.compare_digest(str(answer["proof"]), proof(self._token, "client", nonce, theirs)):
            send_frame(writer, {"error": "wrong token"})
            raise PeerError("wrong token")
        send_frame(writer, {"proof": proof(self._token, "server", nonce, theirs)})

    async def _answer(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if request["op"] == "line":
            keep_alive(writer)
            send_frame(writer, {"ok": True})
            await reader.read(1)  # open until either side goes
        elif request["op"] == "snapshot":
            if (request["run"], request["node"]) != (self._run, self._node):
                return await refuse(writer, f"this is node {self._node} of run {self._run}")
            await self._send_snapshot(request, writer)
        elif request["op"] in self._services:
            keep_alive(writer)
            await self._services[request["op"]](request, Wire(reader, writer))
        else:
            await refuse(writer, "unknown request")

    async def _send_snapshot(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """In a thread, which talks over the connection until it ends; nothing is read from it here any more."""
        place = asyncio.ensure_future(self._transfers.acquire())
        try:
            await self._wait_for(place, writer)
            cast(asyncio.ReadTransport, writer.transport).pause_reading()
            with writer.get_extra_info("socket").dup() as sock:
                where = (self._ram_dir, self._run, self._node)
                await in_thread(lambda: serve_snapshot(sock, where, request), lambda: shut(sock))
        finally:
            if not place.cancel():  # it was had
                self._transfers.release()

    async def _wait_for(self, place: asyncio.Future[Any], writer: asyncio.StreamWriter) -> None:
        """Until a place is free; the other side is told meanwhile that it is waited for one.

        Raises:
            PeerError: none has become free in PLACE_S.
            OSError: the other side is gone.
        """
        deadline = time.monotonic() + PLACE_S
        await asyncio.sleep(0)  # most find one free
        while not place.done():
            if time.monotonic() > deadline:
                await refuse(writer, f"{MAX_TRANSFERS} transfers are under way")
                raise PeerError("no place for a transfer")
            send_frame(writer, {"busy": True})
            await asyncio.wait_for(writer.drain(), wires.STALL_S)
            await asyncio.wait({place}, timeout=BUSY_S)
