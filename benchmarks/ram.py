"""The RAM tier against what the machine can do: a snapshot's stall against memcpy, a peer's copy against plain TCP.

    python benchmarks/ram.py [--mib 1024] [--tensors 300] [--rounds 9]

Both sides of each ratio are measured in turn in one run; their medians are compared, and the best of each, since other
work on the machine slows both. What plain TCP carries is measured between two processes over the same interface, one
`sendall` from memory and `recv_into` memory.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import shutil
import socket
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from storage.peer import PeerServer
from storage.ram import SnapshotFile
from storage.snapshots import RamTier
from storage.state import TrainState
from storage.transfer import fetch_snapshot

TOKEN = "benchmark"
STEP = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the shard")
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    folder = f"/dev/shm/shepherd-bench-{os.getpid()}"
    try:
        stalls(folder, options.mib, options.tensors, options.rounds)
        copies(folder, options.mib, options.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stalls(folder: str, mib: int, tensors: int, rounds: int) -> None:
    elements = mib * 1024 * 1024 // 4 // tensors
    state = TrainState(STEP, {f"w{n:04d}": torch.rand(elements) for n in range(tensors)}, {})
    tier = RamTier(folder, "run", "a", 0)
    for _ in range(4):
        tier.snapshot(state)
        tier.wait()
    sources = [tensor.numpy() for tensor in state.tensors.values()]
    targets = [np.ones_like(source) for source in sources]
    blocked, plain, digests = [], [], []
    for _ in range(rounds):
        began = time.perf_counter()
        tier.snapshot(state)
        blocked.append(time.perf_counter() - began)
        tier.wait()
        digests.append(time.perf_counter() - began - blocked[-1])
        began = time.perf_counter()
        for source, target in zip(sources, targets, strict=True):
            np.copyto(target, source)
        plain.append(time.perf_counter() - began)
    stall, copy = statistics.median(blocked), statistics.median(plain)
    print(f"snapshot of {mib} MiB in {tensors} tensors: training blocked {stall * 1e3:.0f} ms")
    best = min(blocked) / min(plain)
    print(f"memcpy of the same: {copy * 1e3:.0f} ms; ratio {stall / copy:.2f} (of the best: {best:.2f})")
    print(f"digests, while the next step computes: {statistics.median(digests) * 1e3:.0f} ms")


def copies(folder: str, mib: int, rounds: int) -> None:
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, theirs, mib), daemon=True)
    server.start()
    address, port = ours.recv()
    into = np.zeros(mib << 20, dtype=np.uint8)

    mapped: dict[Path, SnapshotFile] = {}

    async def fetch() -> None:
        place = {"run": "run", "source_node": "a", "source_slot": 0, "step": STEP}
        await fetch_snapshot(address, TOKEN, **place, ram_dir=folder, node="b", slot=0, files=2, mapped=mapped)

    fetched, plain = [], []
    for _ in range(rounds + 3):
        began = time.perf_counter()
        asyncio.run(fetch())
        fetched.append(time.perf_counter() - began)
        began = time.perf_counter()
        receive(port, into.data)
        plain.append(time.perf_counter() - began)
    copy, raw = statistics.median(fetched[3:]), statistics.median(plain[3:])
    print(f"copy to a peer's memory, checked: {mib / 1024 / copy:.2f} GiB/s")
    best = min(plain) / min(fetched)
    print(f"plain TCP: {mib / 1024 / raw:.2f} GiB/s; ratio {raw / copy:.2f} (of the best: {best:.2f})")
    server.kill()


def receive(port: int, into: memoryview) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        done = 0
        while done < len(into):
            done += sock.recv_into(into[done : done + (1 << 20)])


def serve(folder: str, pipe: Connection, mib: int) -> None:
    payload = np.ones(mib << 20, dtype=np.uint8)

    async def work() -> None:
        address = await PeerServer("127.0.0.1", TOKEN, folder, "run", "a").start()
        with socket.create_server(("127.0.0.1", 0)) as plain:
            pipe.send((address, plain.getsockname()[1]))
            await asyncio.to_thread(send_forever, plain, payload.data)

    asyncio.run(work())


def send_forever(plain: socket.socket, payload: memoryview) -> None:
    while True:
        sock, _ = plain.accept()
        with sock:
            sock.sendall(payload)


if __name__ == "__main__":
    main()
