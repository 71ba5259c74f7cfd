"""An HTTP proxy before an S3 server that does something to one request: the N-th that comes while it is armed."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What can be done to a request.
FAULTS = (
    "kill before",  # the client is killed; the server never hears of the request
    "kill after",  # the client is killed when the request has taken effect
    "slow down",  # 503
    "conflict",  # 409, as AWS answers to conditional writes that race
    "reset in body",  # of the request, when it has one, else of the answer
    "no answer",  # it has taken effect, and the client waits till its time is over
    "lost answer",  # it has taken effect, and the connection is reset
)
HOLD_S = 30.0


@dataclass
class Plan:
    """What is done, to which request, and to how many of those that follow."""

    fault: str = ""
    at: int = 0
    forever: bool = False
    victim: int = 0
    """The process to kill."""
    seen: list[str] = field(default_factory=list)
    """Method and key of each request since the proxy was armed."""
    done: int = 0

    def strikes(self, number: int) -> bool:
        return bool(self.fault) and (number == self.at or (self.forever and number > self.at))


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.plan, self.lock = target, Plan(), threading.Lock()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def arm(self, plan: Plan) -> None:
        with self.lock:
            self.plan = plan

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without a word, so that one that is to be reset is

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that were killed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        server, method = self.server, self.command
        with server.lock:
            plan, number = server.plan, len(server.plan.seen)
            plan.seen.append(f"{method} {self.path}")
            fault = plan.fault if plan.strikes(number) else ""
            plan.done += bool(fault)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "reset in body" and length:
            self.rfile.read(length // 2)
            return self._reset()
        body = self._body(length)
        if fault == "kill before":
            os.kill(plan.victim, signal.SIGKILL)
            return self._reset()
        if fault == "slow down":
            return self._error(503, "SlowDown")
        if fault == "conflict":
            return self._error(409, "ConditionalRequestConflict")
        status, reason, headers, answer = self._forward(body)
        if fault == "kill after":
            os.kill(plan.victim, signal.SIGKILL)
        if fault == "no answer":
            self._await_end()
        if fault in ("kill after", "no answer", "lost answer"):
            return self._reset()
        raw = f"HTTP/1.1 {status} {reason}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers) + "\r\n"
        if fault == "reset in body":
            self.wfile.write(raw.encode() + answer[: len(answer) // 2])
            return self._reset()
        self.wfile.write(raw.encode() + answer)

    def _body(self, length: int) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.target, timeout=30)
        with contextlib.closing(connection):
            hop = ("connection", "transfer-encoding", "expect", "content-length")
            headers = {k: v for k, v in self.headers.items() if k.lower() not in hop}
            headers["Content-Length"] = str(len(body))
            connection.request(self.command, self.path, body=body, headers=headers)
            response = connection.getresponse()
            answer = response.read()
            kept = [(k, v) for k, v in response.getheaders() if k.lower() not in hop]
            # Of HEAD: the length of what is not sent.
            told = response.getheader("Content-Length") if self.command == "HEAD" else None
            return response.status, response.reason, [*kept, ("Content-Length", told or str(len(answer)))], answer

    def _error(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        if self.command == "HEAD":
            body = b""
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        self.wfile.write(head.encode() + body)

    def _await_end(self) -> None:
        """Until the client gives up."""
        self.connection.settimeout(HOLD_S)
        with contextlib.suppress(OSError):
            self.connection.recv(1)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def s3_proxy(target: tuple[str, int]) -> Iterator[Proxy]:
    proxy = Proxy(target)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join(10)
