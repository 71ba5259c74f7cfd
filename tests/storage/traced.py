"""Runs work in a forked child under ptrace, and kills it, or makes a system call fail, at a chosen change of a folder.

Enumerated: the first run counts the system calls that can change what lies under the folder, then each of them in turn
is the one at whose entry the child is killed, or which fails with an error number without being carried out. So every
prefix of a save's effects is seen. Threads are followed. ptrace is called through ctypes, and a seccomp filter of the
child's stops it at these calls alone: a process may do both to its own children without privileges, unless a container
forbids it, which `trace` says.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_TRACEME, _CONT, _POKEUSER, _SETOPTIONS, _SYSCALL_INFO = 0, 7, 6, 0x4200, 0x420E
_O_FORK, _O_VFORK, _O_CLONE, _O_SECCOMP, _O_EXITKILL = 0x2, 0x4, 0x8, 0x80, 0x100000
_EVENT_SECCOMP = 7
_WALL = 0x40000000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2
_RET_TRACE, _RET_ALLOW = 0x7FF00000, 0x7FFF0000
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
# Offsets in the traced process's registers as ptrace shows them.
_RAX, _ORIG_RAX = 10 * 8, 15 * 8
_NO_CALL = -1 & (1 << 64) - 1

# Of x86-64. By file descriptor: the number of the argument that is one. By path: of (folder's descriptor, path).
_BY_FD = {1: "write", 18: "pwrite64", 20: "writev", 74: "fsync", 75: "fdatasync", 77: "ftruncate", 285: "fallocate",
          296: "pwritev", 328: "pwritev2", 40: "sendfile", 277: "sync_file_range"}  # fmt: skip
_BY_PATH = {2: ("open", None, 0), 257: ("openat", 0, 1), 76: ("truncate", None, 0), 82: ("rename", None, 1),
            83: ("mkdir", None, 0), 84: ("rmdir", None, 0), 85: ("creat", None, 0), 86: ("link", None, 1),
            87: ("unlink", None, 0), 258: ("mkdirat", 0, 1), 263: ("unlinkat", 0, 1), 264: ("renameat", 2, 3),
            265: ("linkat", 2, 3), 316: ("renameat2", 2, 3)}  # fmt: skip
_FLAGS = {"open": 1, "openat": 2}
# They would change files without a system call that is seen here.
_UNSEEN = {425: "io_uring_setup", 326: "copy_file_range"}

DEADLINE_S = 60


class _Info(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint8), ("pad", ctypes.c_uint8 * 3), ("arch", ctypes.c_uint32), ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64), ("nr", ctypes.c_uint64), ("args", ctypes.c_uint64 * 6), ("rest", ctypes.c_uint64 * 2),
    )  # fmt: skip


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


@dataclass
class Traced:
    """How a traced run ended, and the calls that could change the folder up to then."""

    calls: list[str] = field(default_factory=list)
    returned: bool = False
    """The work returned: it has told success."""
    killed: bool = False
    error: str = ""
    """What the work raised, with its traceback."""


def trace(work: Callable[[], object], folder: Path, at: int | None = None, errno: int | None = None) -> Traced:
    """Run `work` in a child. At the entry of call number `at` (from 0) kill it, or make that call fail with `errno`.

    The caller must have no threads that hold locks: it is forked.

    Raises:
        RuntimeError: this machine does not allow tracing, or the child changes files in a way that is not seen.
        AssertionError: the child was not done in time.
    """
    if platform.machine() != "x86_64":
        raise RuntimeError(f"the crash points are enumerated by system calls of x86-64, this is {platform.machine()}")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _work(work, write)
    os.close(write)
    tracer = _Tracer(pid, folder, at, errno)
    try:
        tracer.run()
    finally:
        if not tracer.over:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, _WALL)
        with os.fdopen(read, "rb") as pipe:
            told = pipe.read().decode()
    if told.startswith("cannot be traced"):
        raise RuntimeError(told)
    return Traced(tracer.calls, returned=told == "returned", killed=not told, error=told.removeprefix("raised "))


def _work(work: Callable[[], object], pipe: int) -> None:
    try:
        signal.alarm(DEADLINE_S)
        if _libc.ptrace(_TRACEME, 0, None, None):
            told = f"cannot be traced: {os.strerror(ctypes.get_errno())}; allow ptrace (CAP_SYS_PTRACE, seccomp)"
        else:
            os.kill(os.getpid(), signal.SIGSTOP)
            _stop_at_changes()
            work()
            told = "returned"
    except BaseException:
        told = "raised " + traceback.format_exc()
    os.write(pipe, told.encode())
    os._exit(0)


def _stop_at_changes() -> None:
    """From here on this process stops for its tracer at each call that can change files."""
    numbers = [*_BY_FD, *_BY_PATH, *_UNSEEN]
    program = [_Instruction(_LOAD, 0, 0, 0)]
    program += [_Instruction(_JUMP_EQUAL, len(numbers) - n, 0, number) for n, number in enumerate(numbers)]
    program += [_Instruction(_RETURN, 0, 0, _RET_ALLOW), _Instruction(_RETURN, 0, 0, _RET_TRACE)]
    array = (_Instruction * len(program))(*program)
    filtering = _Program(len(program), array)
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or _libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(filtering)):
        raise OSError(ctypes.get_errno(), "the calls to stop at cannot be said (prctl PR_SET_SECCOMP)")


class _Tracer:
    def __init__(self, pid: int, folder: Path, at: int | None, errno: int | None) -> None:
        self.calls: list[str] = []
        self.over = False
        self._pid, self._folder, self._at, self._errno = pid, str(folder.resolve()), at, errno

    def run(self) -> None:
        if self._wait(self._pid) is None:
            return  # it could not be traced, and says so
        _ptrace(_SETOPTIONS, self._pid, _O_FORK | _O_VFORK | _O_CLONE | _O_SECCOMP | _O_EXITKILL)
        _ptrace(_CONT, self._pid, 0)
        while not self.over:
            stopped = self._wait(-1)
            if stopped is None:
                continue
            tid, stop, event = stopped
            if event == _EVENT_SECCOMP and self._at_call(tid):
                os.kill(self._pid, signal.SIGKILL)
                continue
            # Not delivered: events of ptrace, and a new thread's first stop.
            _ptrace(_CONT, tid, 0 if stop in (signal.SIGTRAP, signal.SIGSTOP) else stop)

    def _wait(self, pid: int) -> tuple[int, int, int] | None:
        """A thread that has stopped, its signal and ptrace's event; None when one has ended."""
        tid, status = os.waitpid(pid, _WALL)
        if os.WIFSTOPPED(status):
            return tid, os.WSTOPSIG(status), status >> 16
        if tid == self._pid:
            self.over = True
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status)
            assert killed in (False, signal.SIGKILL), f"the child ended by {signal.Signals(killed).name}"
        return None

    def _at_call(self, tid: int) -> bool:
        """Whether this is where the child is to be killed."""
        info = _Info()
        _ptrace(_SYSCALL_INFO, tid, ctypes.sizeof(info), ctypes.addressof(info))
        call = self._change(tid, info)
        if call is None:
            return False
        self.calls.append(call)
        if len(self.calls) - 1 != self._at:
            return False
        if self._errno is None:
            return True
        _ptrace(_POKEUSER, tid, _ORIG_RAX, _NO_CALL)
        _ptrace(_POKEUSER, tid, _RAX, -self._errno & (1 << 64) - 1)
        return False

    def _change(self, tid: int, info: _Info) -> str | None:
        """The call in words, when it can change what lies under the folder."""
        if info.nr in _UNSEEN:
            raise RuntimeError(f"the child uses {_UNSEEN[info.nr]}, whose changes of files are not seen")
        if info.nr in _BY_FD:
            name, path = _BY_FD[info.nr], _descriptor(tid, info.args[0])
        elif info.nr in _BY_PATH:
            name, dir_fd, at = _BY_PATH[info.nr]
            flags = os.O_RDONLY if name not in _FLAGS else info.args[_FLAGS[name]]
            if name in _FLAGS and not flags & (os.O_CREAT | os.O_TRUNC):
                return None
            base = _cwd(tid) if dir_fd is None else _descriptor(tid, info.args[dir_fd])
            path = os.path.normpath(os.path.join(base, _string(tid, info.args[at])))
        else:
            return None
        inside = path == self._folder or path.startswith(self._folder + "/")
        return f"{name} {os.path.relpath(path, self._folder)}" if inside else None


def _ptrace(request: int, tid: int, argument: int, data: int = 0) -> None:
    # SETOPTIONS and CONT take their argument as data.
    address, data = (argument, data) if request in (_POKEUSER, _SYSCALL_INFO) else (0, argument)
    if _libc.ptrace(request, tid, address, data) < 0 and ctypes.get_errno() != 3:  # ESRCH: it has just been killed
        raise OSError(ctypes.get_errno(), f"ptrace request {request}: {os.strerror(ctypes.get_errno())}")


def _cwd(tid: int) -> str:
    return os.readlink(f"/proc/{tid}/cwd")


def _descriptor(tid: int, fd: int) -> str:
    fd = ctypes.c_int32(fd & 0xFFFFFFFF).value
    if fd == -100:  # AT_FDCWD
        return _cwd(tid)
    try:
        return os.readlink(f"/proc/{tid}/fd/{fd}").removesuffix(" (deleted)")
    except OSError:
        return ""


def _string(tid: int, address: int) -> str:
    with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        raw = b""
        while b"\0" not in raw:
            page = 4096 - (address + len(raw)) % 4096
            raw += memory.read(page)
    return os.fsdecode(raw.partition(b"\0")[0])
