"""An S3 server (moto's) behind a wire that a test can cut and mend; its address is in the cluster's environment."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from herd import free_port

RECV_BYTES = 64 * 1024


def environment() -> dict[str, str]:
    """What leads every S3 client to the wire, on a free port; few tries, so that a cut is told soon."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",
    }


class Wire:
    """Forwards connections from `port` to `target`; a cut one refuses new connections and breaks those that stand."""

    def __init__(self, port: int, target: tuple[str, int]) -> None:
        self._port, self._target = port, target
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()

    def mend(self) -> None:
        self._listener = listener = socket.create_server(("127.0.0.1", self._port), backlog=256)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which close alone does not
            listener.close()
        with self._lock:
            standing, self._open = self._open, []
        for sock in standing:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            with self._lock:
                self._open += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(RECV_BYTES):
            sink.sendall(data)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def s3_behind_a_wire(port: int, bucket: str) -> Iterator[Wire]:
    """A running server with `bucket`, and the wire to it at `port`, mended."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    s3fs.S3FileSystem.clear_instance_cache()  # they are kept by their arguments, and the server is none of them
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    wire = Wire(port, server.get_host_and_port())
    try:
        wire.mend()
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield wire
    finally:
        wire.cut()
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
