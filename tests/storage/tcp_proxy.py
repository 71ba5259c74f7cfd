"""A TCP proxy whose user sees, and may change, each piece on its way from the server to the client."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PIECE_BYTES = 64 * 1024

Passing = Callable[[int, bytes], bytes]
"""Given how many bytes came before on this connection, and a piece: what is passed on. Called from any thread."""


def unchanged(before: int, piece: bytes) -> bytes:
    return piece


class Proxy:
    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.passing: Passing = unchanged
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                threading.Thread(target=_pump, args=(client, server, unchanged), daemon=True).start()
                threading.Thread(target=_pump, args=(server, client, self.passing), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, passing: Passing) -> None:
    before = 0
    with contextlib.suppress(OSError):
        while piece := source.recv(PIECE_BYTES):
            sink.sendall(passing(before, piece))
            before += len(piece)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def tcp_proxy(target: str) -> Iterator[Proxy]:
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
