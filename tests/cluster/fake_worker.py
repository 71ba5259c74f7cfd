"""A worker without torch for the tests of the node's workers: ``config.url`` of its assignment tells what it does."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

from trainer import contract


def messages(sock: socket.socket) -> Iterator[object]:
    receiver = contract.Receiver(contract.ToWorker)
    while data := sock.recv(65536):
        yield from receiver.feed(data)


def main(sock: socket.socket) -> int:
    incoming = messages(sock)
    while True:
        assign = next(incoming)
        if isinstance(assign, contract.Prepare):
            contract.send(sock, contract.Parked(generation=0, rank=assign.rank, step=0))
            continue
        assert isinstance(assign, contract.Assign)
        code = serve(sock, incoming, assign)
        if code is not None:
            return code
        print(f"rank {assign.rank} parks", end="")
        contract.send(sock, contract.Parked(generation=assign.generation, rank=assign.rank, step=0))


def serve(sock: socket.socket, incoming: Iterator[object], assign: contract.Assign) -> int | None:
    """The exit code; None to park."""

    def say(phase: str, *, generation: int = assign.generation, pid: int | None = None) -> None:
        message = contract.Phase(generation=generation, rank=assign.rank, step=pid or os.getpid(), phase=phase)
        contract.send(sock, message)

    print(f"rank {assign.rank} of {assign.world_size} runs {assign.config.url}")
    match assign.config.url.split():
        case ["wait"] | ["fail-when-told"] | ["stuck"]:
            pass
        case ["park-itself"]:
            word = contract.Failed(
                generation=assign.generation, rank=assign.rank, step=7, kind="collective", error="", traceback=""
            )
            contract.send(sock, word)
            return None
        case ["exit", code]:
            return int(code)
        case ["raise"]:
            raise LookupError("the fake worker fails as told")
        case ["stale"]:
            say("build", generation=assign.generation - 1)
        case ["last-words", count]:
            for _ in range(int(count)):
                say("compute")
            print("unfinished line", end="")
            sys.stdout.flush()
            os.kill(os.getpid(), 9)
        case ["chatter", count]:
            for _ in range(int(count)):
                say("compute")
        case ["garbage"]:
            sock.sendall(b"\xff" * 64)
        case ["descendant", *then]:
            # It ignores SIGTERM and holds the worker's output open, as a forgotten data loader may.
            child = subprocess.Popen(["sh", "-c", "trap '' TERM; echo ready; sleep 100"], stdout=subprocess.PIPE)
            assert child.stdout is not None
            child.stdout.readline()
            say("build", pid=child.pid)
            if then:
                threading.Event().wait()
            return 0
        case ["shout", lines]:
            for number in range(int(lines)):
                print(f"line {number} " + "x" * 100)
        case ["inspect"]:
            listed = [int(fd) for fd in os.listdir("/proc/self/fd")]  # the listing's own is closed when it is done
            descriptors = [fd for fd in listed if os.path.exists(f"/proc/self/fd/{fd}")]
            print("descriptors", sorted(descriptors), "control", sock.fileno())
            print("session", os.getsid(0) == os.getpid(), "threads", threading.active_count())
            print("environment", {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "EXTRA")})
        case other:
            raise ValueError(other)
    say("rendezvous")
    for message in incoming:
        if isinstance(message, contract.Park) and assign.config.url != "stuck":
            return None
        if isinstance(message, contract.Stop):
            if assign.config.url == "fail-when-told":
                word = contract.Failed(
                    generation=assign.generation, rank=assign.rank, step=7, kind="corrupt", error="", traceback=""
                )
                contract.send(sock, word)
                continue
            contract.send(
                sock,
                contract.Finished(generation=assign.generation, rank=assign.rank, step=0, reason="stopped"),
            )
            return contract.EXIT_FINISHED
    return contract.EXIT_AGENT_GONE
