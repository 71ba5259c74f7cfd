"""The zygote: a single-threaded process that has imported the worker's code and forks workers from itself.

Importing torch with FSDP, TP and PP costs seconds for each process; a fork of one that has done it costs milliseconds,
and its pages are shared. Fork is only safe while the forking process has one thread and no device context, so the
zygote imports, and then does nothing but fork and reap. It speaks with its agent (`orchestrator.runtime.workers`) in
JSON over one AF_UNIX SOCK_SEQPACKET socket, one message a packet:

    agent -> zygote   {"fork": id, "env": {name: value}}        with two descriptors: control socket, log
    zygote -> agent   {"ready": pid}  or  {"failed": text}      after the preload
                      {"forked": id, "pid": pid}                with one descriptor: the child's pidfd
                      {"failed": text, "fork": id}              that fork could not be done
                      {"exit": pid, "code": n or null, "signal": n or null}

The child calls ``main(control_socket)`` of the preloaded module and exits with its return. End of the agent's socket
ends the zygote, and the end of the zygote ends its children (PR_SET_PDEATHSIG), however it comes about.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import io
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from trainer.contract import EXIT_AGENT_GONE, EXIT_FAILED

# One packet. A request holds a few environment variables; the longest answer is the traceback of a failed preload, cut
# to TEXT_MAX_BYTES. The kernel takes packets up to its socket buffer, 208 KiB by default.
PACKET_MAX_BYTES = 64 * 1024
TEXT_MAX_BYTES = 16 * 1024

_PR_SET_PDEATHSIG = 1
_PR_SET_PTRACER = 0x59616D61
_libc = ctypes.CDLL(None, use_errno=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -P -m orchestrator.runtime.zygote", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited AF_UNIX SOCK_SEQPACKET socket of the agent")
    parser.add_argument("--agent-pid", type=int, required=True, help="process id of the agent, the parent")
    parser.add_argument("--preload", required=True, help="module to import; must have main(socket) -> int")
    arguments = parser.parse_args(argv)
    die_with_parent(arguments.agent_pid)
    # Ctrl-C in a terminal reaches the whole foreground group: what ends a run is the agent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    agent = socket.socket(fileno=arguments.fd)
    gc.disable()  # an import makes no garbage to speak of, and looking for it takes a seventh of the time
    try:
        module = importlib.import_module(arguments.preload)
        assert callable(getattr(module, "main", None)), f"{arguments.preload} has no main(socket)"
        assert_single_threaded()
        torch = sys.modules.get("torch")
        assert torch is None or not torch.cuda.is_initialized(), f"{arguments.preload} initialises CUDA at its import"
    except BaseException:
        sys.stdout.flush()  # the agent does not wait for this process's end
        _tell(agent, {"failed": traceback.format_exc()[-TEXT_MAX_BYTES:]})
        return EXIT_FAILED
    # The imported objects live for ever: kept out of the collector, their pages stay shared with the children.
    gc.freeze()
    gc.enable()
    return _serve(agent, module)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel send SIGKILL to this process when the thread that made it ends.

    Exits at once with EXIT_AGENT_GONE when the parent was gone before the request reached the kernel.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os._exit(EXIT_AGENT_GONE)


def assert_single_threaded() -> None:
    """A lock that another thread holds at the moment of a fork stays locked in the child for ever.

    Raises:
        RuntimeError: there is a second thread; the message names the threads.
    """
    tasks = os.listdir("/proc/self/task")
    if len(tasks) == 1 and threading.active_count() == 1:
        return
    names = [t.name for t in threading.enumerate()]
    native = {task: Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in tasks}
    raise RuntimeError(
        f"the zygote must have one thread to fork, but has Python threads {names} and kernel tasks {native}: "
        "a module of the preload started them when it was imported; start threads in main() instead "
        "(for a math library's pool set its environment variable to one thread, as OPENBLAS_NUM_THREADS=1)"
    )


def _serve(agent: socket.socket, module: ModuleType) -> int:
    """Fork on request and report exits until the agent's end of the socket is closed."""
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler must be there, for the wakeup descriptor to be written
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    children: set[int] = set()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the agent is gone
        _tell(agent, {"ready": os.getpid()})
        while True:
            readable, _, _ = select.select([agent.fileno(), wake_read], [], [])
            if wake_read in readable:
                os.read(wake_read, 4096)
                _reap(agent, children)
            if agent.fileno() in readable:
                packet, descriptors, flags, _ = socket.recv_fds(agent, PACKET_MAX_BYTES, 2)
                if not packet:
                    break
                assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), f"request was cut short: flags {flags}"
                _fork(agent, module, json.loads(packet), descriptors, children)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return 0


def _fork(
    agent: socket.socket, module: ModuleType, request: dict[str, Any], descriptors: list[int], children: set[int]
) -> None:
    control, log = descriptors
    try:
        assert_single_threaded()
        zygote, agent_pid = os.getpid(), os.getppid()
        pid = os.fork()
    except (OSError, RuntimeError) as error:
        _tell(agent, {"failed": f"{type(error).__name__}: {error}"[:TEXT_MAX_BYTES], "fork": request["fork"]})
    else:
        if pid == 0:
            _child(module, zygote, agent_pid, control, log, request["env"])
        children.add(pid)
        # The child is not reaped before this returns, so the pid still names it.
        pidfd = os.pidfd_open(pid)
        _tell(agent, {"forked": request["fork"], "pid": pid}, pidfd)
        os.close(pidfd)
    finally:
        os.close(control)
        os.close(log)


def _reap(agent: socket.socket, children: set[int]) -> None:
    while children:
        # WNOWAIT first: until the child is reaped its number names its process group, and nobody else's.
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(found.si_pid, signal.SIGKILL)  # what the worker itself started and left behind
        os.waitpid(found.si_pid, 0)
        children.discard(found.si_pid)
        exited = found.si_code == os.CLD_EXITED
        code, signum = (found.si_status, None) if exited else (None, found.si_status)
        _tell(agent, {"exit": found.si_pid, "code": code, "signal": signum})


def _tell(agent: socket.socket, message: dict[str, Any], *descriptors: int) -> None:
    socket.send_fds(agent, [json.dumps(message).encode()], descriptors)


def _child(module: ModuleType, zygote: int, agent_pid: int, control: int, log: int, env: dict[str, str]) -> None:
    """Become a worker; never returns."""
    code = EXIT_FAILED
    try:
        os.setsid()
        die_with_parent(zygote)
        # Where Yama lets none but ancestors look into a process, what the agent starts may, too: it reads the stacks of
        # workers that hang. Elsewhere this does nothing.
        _libc.prctl(_PR_SET_PTRACER, agent_pid, 0, 0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _close_descriptors_but({0, 1, 2, control})
        # Lines reach the log as they are printed: a worker that is killed flushes nothing.
        for stream in (sys.stdout, sys.stderr):
            assert isinstance(stream, io.TextIOWrapper)
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
        faulthandler.enable()
        os.environ.update(env)
        code = module.main(socket.socket(fileno=control)) or 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else EXIT_FAILED if exit_.code else 0
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        # Past Python's own exit, which would run the zygote's atexit handlers.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _close_descriptors_but(keep: set[int]) -> None:
    for fd in sorted({int(name) for name in os.listdir("/proc/self/fd")} - keep):
        with contextlib.suppress(OSError):  # the one that listed the folder
            os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
