"""The worker process of a user's script: take one assignment, run the script as torchrun would, tell how it ended.

Made to run in a child forked from a single-threaded process that has imported this module, and with it torch. It never
parks: a script's frames and globals are its own, so each generation has processes of its own, and a fork of them costs
a tenth of a second.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import ctypes
import dataclasses
import gc
import io
import os
import runpy
import signal
import socket
import sys
import threading
from functools import partial
from types import ModuleType, TracebackType
from typing import Literal

import numpy.random
import torch.distributed.fsdp
import torch.nn.parallel  # imported before the fork, as the line above, for the scripts

from trainer import harm, pulse, session
from trainer.contract import EXIT_FAILED, EXIT_FINISHED, Finished, Phase, Restored, ScriptConfig
from trainer.link import Agent, Assignment
from trainer.managed import Managed
from trainer.numeric import numeric_class
from trainer.worker import USERS_INTERFACE, failure_kind, interface_towards, tell_failure


def main(sock: socket.socket) -> int:
    """Run the script of the one assignment that comes over `sock`.

    Returns:
        EXIT_FINISHED when the script has ended in good order on this rank. Any other end of it is told in last words
        and ends the process with EXIT_FAILED at once: a process group that a peer has broken can hang its shutdown.
    """
    agent = Agent(sock)
    work = agent.next_work()
    assert isinstance(work, Assignment), work  # there are no warm workers for scripts
    order = work.order
    managed = Managed(work, agent)
    session.install(managed)
    os.environ["GLOO_SOCKET_IFNAME"] = USERS_INTERFACE or interface_towards(order.store_host, order.store_port)
    pulse.start(order.generation, order.rank, lambda: managed.step, agent.emit, waits_in_backward=True)
    _announce(work, agent)
    victim = harm.Victim(
        generation=order.generation,
        rank=order.rank,
        step=lambda: managed.step,
        url=order.config.url,
        emit=agent.emit,
    )
    work.on_inject = partial(harm.obey, victim=victim)
    threading.Thread(target=_terminate_when_stopped, args=(work, managed), name="stop", daemon=True).start()
    own = os.getpid()
    try:
        run(order.config.script)
        if os.getpid() != own:
            sys.exit()
        managed.close()
        _shut_down()
    except BaseException as error:
        if os.getpid() != own:  # a child that the script has forked: it ends as Python would have it, and tells nothing
            _shut_down()
            raise
        if not isinstance(error, Exception):
            raise
        error.__traceback__ = _own_frames(error.__traceback__)
        tell_failure(agent, order, managed.step, error, failure_kind(error))
        _flush_files()
        os._exit(EXIT_FAILED)
    # One that has told no step is a step as a whole.
    step = managed.step or 1
    reason: Literal["completed", "stopped"] = "stopped" if work.stop.is_set() else "completed"
    agent.emit(Finished(generation=order.generation, rank=order.rank, step=step, reason=reason))
    return EXIT_FINISHED


def run(script: ScriptConfig) -> None:
    """Run the script in this process and thread as `python` would.

    Raises:
        ScriptExit: it has ended with another exit code than 0. (A child that it has forked: SystemExit, with any.)
        Exception: what it has raised.
    """
    target, own, folder = script.target, os.getpid(), os.path.expanduser(script.folder)
    os.chdir(folder)
    # As `random` does by itself after a fork: all ranks have their parent's state. (A device's generator begins later.)
    numpy.random.seed()
    torch.default_generator.seed()
    # It stays the script's to the end: its threads, and what it does at exit, may look their own classes up in it.
    main = sys.modules["__main__"] = ModuleType("__main__")
    try:
        if target[0] == "-m":
            sys.argv = list(target[1:])
            sys.path.insert(0, folder)
            runpy._run_module_as_main(target[1])  # type: ignore[attr-defined]
        else:
            path = os.path.abspath(target[0])
            sys.argv = [path, *target[1:]]
            sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
            main.__dict__.update(__file__=path, __builtins__=builtins, __cached__=None)
            with io.open_code(path) as file:
                code = compile(file.read(), path, "exec", dont_inherit=True)
            exec(code, main.__dict__)
    except SystemExit as end:
        if os.getpid() != own:
            raise
        if end.code not in (None, 0):
            said = f": {end.code}" if isinstance(end.code, str) else f" with exit code {end.code}"
            told = ScriptExit(f"the script has ended{said}")
            raise told.with_traceback(_own_frames(end.__traceback__)) from None


class ScriptExit(RuntimeError):
    """The script has ended itself, with another exit code than 0."""


def _announce(work: Assignment, agent: Agent) -> None:
    """This rank is up: what it does before its first step, only the script knows."""
    order = work.order
    where = {"generation": order.generation, "rank": order.rank, "step": order.restore.step}
    agent.emit(Phase(**where, phase="build"))
    # Asking a device for its name would open it before the script chooses one.
    facts = numeric_class(dataclasses.replace(order.config, device="cpu"))
    versions = {name: fact for name, fact in facts.items() if name not in ("dtype", "deterministic")}
    agent.emit(
        Restored(
            **where,
            source=order.restore.source,
            rendezvous_us=0,
            build_us=0,
            restore_us=0,
            versions=versions,
            process="forked",
        )
    )


def _terminate_when_stopped(work: Assignment, managed: Managed) -> None:
    """A script that keeps snapshots ends at its next one; another is asked as the system asks: by SIGTERM."""
    work.stop.wait()
    if not managed.saves:
        os.kill(os.getpid(), signal.SIGTERM)


def _shut_down() -> None:
    """What Python itself does at its end, which a forked worker does not come to."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _flush_files()
    ctypes.CDLL(None).fflush(None)  # what C code has printed


def _flush_files() -> None:
    """Python closes at its end what a script has left open."""
    for each in gc.get_objects():
        if issubclass(type(each), io.IOBase):
            with contextlib.suppress(Exception):  # closed, or its other end is
                each.flush()


def _own_frames(trace: TracebackType | None) -> TracebackType | None:
    """From the script's first frame on; None where it has not come to one."""
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    first = trace
    while first is not None and first.tb_frame.f_code.co_filename in ours:
        first = first.tb_next
    return first
