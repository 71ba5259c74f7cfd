"""The pulse of a worker: each second a thread beside the training loop tells the agent where the loop stands.

A worker whose loop is stuck goes on sending pulses, which say where. One that is stopped, or whose loop never lets go
of the interpreter, falls silent. Both are findings for the agent's watch.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType

from torch import distributed

from trainer import loop
from trainer.contract import Pulse

INTERVAL_S = 1.0
"""Between pulses: short against the silence that means something, and too long to cost anything."""
IDLE_SHARE = 0.05
"""Of the time between two pulses: a thread that has computed for less has stood still."""
OWN_FRAMES = 3
INNERMOST_FRAMES = 2
"""Frames that are told: the innermost ones outside torch, then the innermost of all. They fit on one line."""

_DISTRIBUTED = os.path.dirname(distributed.__file__) + os.sep
_TORCH = os.path.dirname(os.path.dirname(distributed.__file__)) + os.sep
_AUTOGRAD = os.path.join(_TORCH, "autograd") + os.sep
# DTensor computes in its own files, and waits in those of the functional collectives.
_DTENSOR = os.path.join(_DISTRIBUTED, "tensor") + os.sep
# Through these torch calls an operator, whatever it does.
_PLUMBING = (os.path.join(_TORCH, "_ops.py"), os.path.join(_TORCH, "_library") + os.sep)


def start(
    generation: int,
    rank: int,
    step: Callable[[], int],
    emit: Callable[[object], None],
    waits_in_backward: bool = False,
) -> threading.Event:
    """From now on tell `emit`, from a daemon thread, where the calling thread stands; `step()` is what it has done.

    The pulse ends when the returned event is set.

    Args:
        waits_in_backward: whether exchanges may be waited for below the backward pass, where Python has no frames, as
            DistributedDataParallel does: a thread that stands there and computes nothing waits.
    """
    watched, ended = threading.get_ident(), threading.Event()
    cpu_clock = time.pthread_getcpuclockid(watched) if waits_in_backward else None

    def beat() -> None:
        computed_s = 0.0
        while not ended.is_set():
            idle = False
            if cpu_clock is not None:
                before_s, computed_s = computed_s, time.clock_gettime(cpu_clock)
                idle = computed_s - before_s < IDLE_SHARE * INTERVAL_S
            waiting, where = standing(watched, idle)
            emit(
                Pulse(
                    generation=generation,
                    rank=rank,
                    step=step(),
                    waiting=waiting,
                    where=where,
                    exchanges=exchanges_begun(),
                )
            )
            ended.wait(INTERVAL_S)

    threading.Thread(target=beat, name="pulse", daemon=True).start()
    return ended


def standing(thread: int, idle: bool = False) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and its telling frames, the innermost last.

    One that is `idle` waits in the backward pass, too.

    The innermost frame decides: a pipeline schedule and FSDP's hooks belong to torch.distributed, too, and whole layers
    are computed under them.
    """
    with _no_collection():
        frames = sys._current_frames()
        stack = _outwards(frames.get(thread))
        if stack and stack[0][0].co_filename.startswith(_AUTOGRAD):
            # On an accelerator the backward pass runs in autograd's own threads, which `threading` does not know.
            known = {each.ident for each in threading.enumerate()}
            native = [_outwards(frame) for ident, frame in frames.items() if ident not in known]
            stack = [entry for inner in native for entry in inner] + stack
    if not stack:
        return False, ""
    own = [entry for entry in stack[INNERMOST_FRAMES:] if not entry[0].co_filename.startswith(_TORCH)]
    told = [*own[:OWN_FRAMES][::-1], *stack[:INNERMOST_FRAMES][::-1]]
    where = " > ".join(f"{os.path.basename(code.co_filename)}:{line} {code.co_name}" for code, line in told)
    code = stack[0][0]
    return _is_exchange(code) or (idle and code.co_filename.startswith(_AUTOGRAD)), where


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected in here, where the frames of running threads are read.

    Python before 3.12 collects wherever it allocates, also within `f_back` and `sys._current_frames()`, which allocate
    frames. A finalizer that lets other threads run then lets the frame return that is being read, and the process reads
    freed memory; in `sys._current_frames()` it stops the whole process, if a thread ends (gh-106883). Not by
    `gc.disable()`: a training loop, and torch in its state dicts, enables it again.
    """
    if sys.version_info >= (3, 12):
        yield
        return
    with _reading:
        threshold, *_ = gc.get_threshold()
        gc.set_threshold(0)
        try:
            yield
        finally:
            gc.set_threshold(threshold)


_reading = threading.Lock()
"""One reader at a time; and a process that is forked meanwhile would never collect again."""
os.register_at_fork(before=_reading.acquire, after_in_parent=_reading.release, after_in_child=_reading.release)


def exchanges_begun() -> dict[str, int]:
    """How many exchanges this process has begun in each of its process groups; a transport that does not count them is
    left out."""
    begun: dict[str, int] = {}
    for group in list(distributed.distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):
            begun[group.group_name] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return begun


def _outwards(frame: FrameType | None) -> list[tuple[CodeType, int]]:
    """Code and line of a frame and of those that called it."""
    stack = []
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_PLUMBING):
            stack.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return stack


def _is_exchange(code: CodeType) -> bool:
    file = code.co_filename
    # On an accelerator the world's sum is waited for where its value is read.
    return code is loop._sum_over_ranks.__code__ or (file.startswith(_DISTRIBUTED) and not file.startswith(_DTENSOR))
