"""Chaos inside a worker, as ordered: an exception in the training loop, a bad access to memory, a grip on the
interpreter, a loop without end, memory that runs out, a clock that leaps, changed bits in the live state.

Only the agent gives such orders, for somebody who has the run's token. What is done is told with its exact place, so
that what the detectors say can be compared with the truth.
"""

from __future__ import annotations

import ctypes
import random
import resource
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from storage import faults
from storage.state import local_tensor
from trainer import loop
from trainer.contract import Inject, Injected
from trainer.loop import Session

# For the loop to leave the part of a step in which the state legitimately changes: the optimizer's, at most seconds.
AT_REST_DEADLINE_S = 60.0
# Neighbours that one upset hits: vector registers and memory bursts hold up to 16 elements of 4 bytes.
MAX_NEIGHBOURS = 16
# Draws of elements for the pattern "zero" until one is not zero already; the moments of unused rows all are.
ZERO_DRAWS = 1000

# What "memory" may take beyond what the process has: enough that it is no chance, and harmless to who shares the node.
MEMORY_BYTES = 256 * 1024 * 1024
MEMORY_PIECE_BYTES = 4 * 1024 * 1024

_BITS_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class InjectedFault(RuntimeError):
    """Raised in the training loop because somebody ordered it."""


def obey(order: Inject, session: Session) -> None:
    """Do what `order` says to this worker, and tell what was done. Not for the thread that trains."""
    match order.fault:
        case "outage":  # of many processes at once: who has ordered it tells
            faults.refuse_store(session.config.url, order.seconds)
        case "flip":
            _flip_at_rest(order, session)
        case "clock":
            faults.leap_clock(order.seconds)
            _tell(session, order, f"time.time() of this worker leaps by {order.seconds:+g} s")
        case _:
            # Told first: once it is done, nothing may be told any more.
            _tell(session, order, f"{_DETAILS[order.fault]} after step {session.state.step}")
            _DEEDS[order.fault](order)


def _flip_at_rest(order: Inject, session: Session) -> None:
    if not session.at_rest.acquire(timeout=AT_REST_DEADLINE_S):
        _tell(session, order, f"not done: the state was not at rest within {AT_REST_DEADLINE_S:g} s")
        return
    try:
        _tell(session, order, f"{flip(session.state.tensors, order)}, after step {session.state.step}")
    except ValueError as error:
        _tell(session, order, f"not done: {error}")
    finally:
        session.at_rest.release()


def _tell(session: Session, order: Inject, detail: str) -> None:
    generation, rank, step = session.generation, session.rank, session.state.step
    session.emit(Injected(generation=generation, rank=rank, step=step, number=order.number, detail=detail))


def _in_next_batch(deed: Callable[[], None]) -> None:
    """Have the training thread do it, once, when it next reads a batch; every rank comes there in every step."""
    read = loop._batch

    def hurt(*args: object) -> object:
        loop._batch = read
        deed()
        return read(*args)  # type: ignore[arg-type]

    loop._batch = hurt  # type: ignore[assignment]


def _loop_for_ever() -> None:
    while True:
        time.sleep(0.001)


def _exhaust_memory() -> None:
    """Take memory until the kernel gives no more, which a limit of this process's own sees to.

    Raises:
        MemoryError: there is no more. What was taken is given back first, for the last words.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, before[1]))
    taken: list[bytes] = []
    try:
        while True:
            taken.append(b"\1" * MEMORY_PIECE_BYTES)
    finally:
        taken.clear()
        resource.setrlimit(resource.RLIMIT_AS, before)


def raise_in_main_thread(number: int) -> None:
    """Raise InjectedFault between two bytecodes of the main thread, or as soon as it returns from a call into C.

    A program's exception can come from any line. So does this one, and the training loop needs no hook for it: the
    interpreter itself raises what PyThreadState_SetAsyncExc has set.
    """

    class Ordered(InjectedFault):
        def __str__(self) -> str:
            return f"fault {number}, as ordered"

    Ordered.__name__ = Ordered.__qualname__ = InjectedFault.__name__
    thread = threading.main_thread().ident
    assert thread is not None
    found = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Ordered))
    assert found == 1, found


_DETAILS = {
    "exception": "InjectedFault raised in the training loop",
    "segfault": "a read of address 0",
    "lock": "a thread holds the interpreter for ever",
    "loop": "the reading of data loops for ever",
    "memory": f"the reading of data takes memory, {MEMORY_BYTES >> 20} MiB until its limit (RLIMIT_AS),",
}
_DEEDS: dict[str, Callable[[Inject], object]] = {
    "exception": lambda order: raise_in_main_thread(order.number),
    "segfault": lambda order: ctypes.string_at(0),
    "lock": lambda order: ctypes.PyDLL(None).pause(),  # PyDLL calls without letting go of the interpreter
    "loop": lambda order: _in_next_batch(_loop_for_ever),
    "memory": lambda order: _in_next_batch(_exhaust_memory),
}


def flip(tensors: Mapping[str, Tensor], order: Inject) -> str:
    """Change bits of this rank's local part of one of `tensors`, in place; tells which, from what, to what.

    The first element is drawn uniformly over all elements whose tensor's name begins with `order.tensors`, so a tensor
    is hit in proportion to its size, as memory faults do; then its bit, uniformly. `order.seed` decides everything.

    - "bit": one bit of one element.
    - "run": one bit in each of 2 to 16 neighbours (in row-major order), the same in all or one drawn for each.
    - "zero": 1 to 16 neighbours become zero; elements are drawn again while all of them are zero already.

    Raises:
        ValueError: this rank holds no element of such a tensor.
    """
    local = {name: local_tensor(t) for name, t in tensors.items() if name.startswith(order.tensors)}
    local = {name: tensor for name, tensor in local.items() if tensor.numel()}
    if not local:
        raise ValueError(f"no tensor of this rank begins with {order.tensors!r}")
    chance = random.Random(order.seed)
    for _ in range(ZERO_DRAWS):
        name, first = _draw(local, chance)
        changes = _changes(local[name], first, order.pattern, chance)
        if changes:
            break
    else:
        return f"no effect: {ZERO_DRAWS} draws met zeros only"
    cells = _cells(local[name], [index for index, _ in changes])
    told = []
    for cell, (index, mask) in zip(cells, changes, strict=True):
        before = int(cell.item())
        cell.bitwise_xor_(mask)
        told.append(f"[{index}] {before & _all(cell):#x} to {int(cell.item()) & _all(cell):#x}")
    return f"{order.pattern} in {name} (row-major in this rank's part): {', '.join(told)}"


def _draw(local: Mapping[str, Tensor], chance: random.Random) -> tuple[str, int]:
    """A tensor and an index into it, each element of all tensors as likely as any other."""
    index = chance.randrange(sum(tensor.numel() for tensor in local.values()))
    for name, tensor in local.items():
        if index < tensor.numel():
            return name, index
        index -= tensor.numel()
    raise AssertionError("unreachable")


def _changes(tensor: Tensor, first: int, pattern: str, chance: random.Random) -> list[tuple[int, int]]:
    """Index and bits to change (as a signed integer of the element's width) for each element; none if all are zero."""
    width = 8 * tensor.element_size()
    least = {"bit": 1, "run": 2, "zero": 1}[pattern]
    count = 1 if pattern == "bit" else min(chance.randint(least, MAX_NEIGHBOURS), tensor.numel())
    first = min(first, tensor.numel() - count)
    indices = range(first, first + count)
    if pattern == "zero":
        now = [int(cell.item()) for cell in _cells(tensor, indices)]
        return [(index, value) for index, value in zip(indices, now, strict=True) if value]
    same = pattern == "run" and chance.random() < 0.5
    bits = [chance.randrange(width)] * count if same else [chance.randrange(width) for _ in indices]
    return [(index, _signed(1 << bit, width)) for index, bit in zip(indices, bits, strict=True)]


def _cells(tensor: Tensor, indices: list[int] | range) -> list[Tensor]:
    """The elements at these row-major indices as integers of their width, each a scalar that shares their memory.

    Through `.data`, which has a version counter of its own: autograd must not see that somebody wrote, as it would not
    see a bit that flips.
    """
    bits = tensor.data.view(_BITS_OF[tensor.element_size()])
    places = (torch.unravel_index(torch.tensor(index), bits.shape) for index in indices)
    return [bits[tuple(int(i) for i in place)] for place in places]


def _signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) else value


def _all(cell: Tensor) -> int:
    return (1 << (8 * cell.element_size())) - 1
