"""Process groups of one generation: whose connections they are, how to break them, and what they leave behind.

A worker that parks leaves its process groups while peers may hang in them. gloo has no abort: its ``abort()`` wakes
nobody, and a peer learns of our leaving only when the connection to it ends. So the connections are shut down below
gloo; its own thread then fails every exchange that uses them, here and on the peer, within milliseconds. NCCL is the
other way round: it has an abort, and nothing that a peer does wakes who waits on the device.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
import os
import re
import socket
import threading
import traceback
from collections.abc import Iterable, Iterator

import torch
from torch import distributed
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._collective_utils import MeshTopoInfo
from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

ABORT_DEADLINE_S = 30.0
"""A worker that takes so long to park was given up before."""
_aborting = threading.Lock()
_TOGETHER = inspect.unwrap(distributed.batch_isend_irecv).__code__
_SOCKET = re.compile(r"socket:\[(\d+)\]")


class GroupConnections:
    """The TCP connections of a generation's process groups and of its store: those that are opened in `opening`.

    Sockets are known by their inode, which the kernel gives once, so that a descriptor's next owner is never meant.
    """

    def __init__(self, store_port: int) -> None:
        self._store_port = store_port
        self._lock = threading.Lock()
        self._own: set[int] = set()
        self._before: set[int] | None = None
        """What there was when `opening` was entered; None outside it."""

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Groups are made in here, and nothing else is connected by any thread of this process."""
        with self._lock:
            self._before = set(_sockets())
        try:
            yield
        finally:
            with self._lock:
                self._own |= set(_sockets()) - self._before
                self._before = None

    def cut(self, both_ways: bool = False) -> int:
        """Shut down those that there are now; how many there are, without the store's. From any thread.

        Listening sockets stay: gloo ends the process when it cannot accept.

        Args:
            both_ways: not for reading alone. gloo ends a connection that has nothing more to read. But when it is about
                to send what a peer has just asked for, and cannot write any more, it forgets who waits for that.
        """
        how = socket.SHUT_RDWR if both_ways else socket.SHUT_RD
        with self._lock:
            found = _sockets()
            own = self._own if self._before is None else self._own | (set(found) - self._before)
            ports = [_shut(found[inode], inode, how) for inode in own & set(found)]
        return sum(port not in (None, self._store_port) for port in ports)


def _sockets() -> dict[int, int]:
    """Inode to descriptor of this process's sockets."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if match := _SOCKET.fullmatch(os.readlink(f"/proc/self/fd/{name}")):
                found[int(match[1])] = int(name)
    return found


def _shut(fd: int, inode: int, how: int) -> int | None:
    """Shut down a TCP connection, if the descriptor still is this socket's and it does not listen; its peer's port."""
    with contextlib.suppress(OSError):
        copy = os.dup(fd)
        if os.fstat(copy).st_ino != inode:
            os.close(copy)
            return None
        with socket.socket(fileno=copy) as held:
            tcp = held.family in (socket.AF_INET, socket.AF_INET6) and held.type == socket.SOCK_STREAM
            if tcp and not held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                port: int = held.getpeername()[1]
                held.shutdown(how)
                return port
    return None


def connect_device_groups(mesh: DeviceMesh) -> None:
    """Have NCCL make the communicators of all ranks and of each dimension now. By all ranks together.

    Else they are made by the first exchanges of a step, whose connections `GroupConnections` would not know. To bind
    the default group to its device would do the same, but groups that are split from it then end the process from the
    second generation on: ProcessGroupNCCL::split takes the process's first group for the default one
    (pytorch/pytorch#192109).

    A thread whose exchanges NCCL does not carry out (see `leave_a_group_open`) fails here.
    """
    token = torch.ones((), dtype=torch.int64, device=mesh.device_type)
    groups = (None, *(mesh.get_group(name) for name in mesh.mesh_dim_names or ()))
    for group in groups:
        distributed.all_reduce(token, group=group)
    members = math.prod(distributed.get_world_size(group) for group in groups)
    assert token.item() == members, "NCCL takes this thread's exchanges and does not carry them out"


def leave_a_group_open(errors: Iterable[BaseException]) -> bool:
    """Whether one of them broke off what this thread had begun to send and receive together, as pipeline stages do.

    torch then never ends the group of calls that it has begun with NCCL, and NCCL counts them by thread: what this one
    asks for later is put off until an end that never comes, in the communicators of later generations, too.
    """
    return any(frame.f_code is _TOGETHER for error in errors for frame, _ in traceback.walk_tb(error.__traceback__))


def abort_device_groups(over: threading.Event) -> None:
    """Abort NCCL's communicators and forget all groups, once; from any thread. Not once their generation is `over`.

    Who waits for an exchange on the device goes on as if it were complete, with whatever is in its buffers; the next
    one raises.
    """
    with _aborting:
        if not distributed.is_initialized() or over.is_set():
            return
        # Together: the abort of a communicator frees memory of the device, and so waits for all that runs there, for
        # exchanges of the other communicators, too.
        aborts = [threading.Thread(target=group.abort, daemon=True) for group in list(distributed_c10d._world.pg_names)]
        for abort in aborts:
            abort.start()
        for abort in aborts:
            abort.join(ABORT_DEADLINE_S)
        distributed_c10d._abort_process_group()


def destroy_groups(mesh: DeviceMesh | None) -> None:
    """Let go of all process groups, those of `mesh` too; nothing else may hold what was made with them any more."""
    if mesh is not None:
        mesh._pg_registry.clear()  # what DTensor keeps for the next steps holds the mesh, and so its groups
    gc.collect()  # tracebacks and hooks make cycles, and a group is closed with its last reference only
    if distributed.is_initialized():
        distributed.destroy_process_group()
    # A default group that failed to come up is counted, though there is nothing to destroy: names of later groups, by
    # which ranks find each other in the store, would differ from those of ranks that have counted from 0.
    distributed_c10d._world.group_count = 0


def forget_meshes() -> None:
    """Clear what DTensor keeps from one step to the next: it names the process groups of the mesh that it was made on.

    Needed before this process takes another place or mesh; for the same one the names are the same again.
    """
    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    clear_redistribute_planner_cache()
    DTensor._op_dispatcher.sharding_propagator._propagate_tensor_meta_cached.cache_clear()
    _gen_transform_infos.cache_clear()
    MeshTopoInfo.build_from_mesh.cache_clear()
