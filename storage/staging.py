"""A copy of a rank's state in host memory, from which a save is written while training goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from storage import direct
from storage.state import TrainState, copy_tensor, local_tensor


class Staging:
    """Buffers in host memory for one copy of the state: allocated by the first copy, then reused.

    Fresh memory costs ten times the copy itself, in page faults. Beside CUDA tensors the buffers are pinned, and the
    copy runs on a stream of its own.
    """

    def __init__(self) -> None:
        self._key: list[Any] = []
        self._copy = TrainState(0, {}, {})
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def copy(self, state: TrainState) -> TrainState:
        """The state of now, the same to DCP's planner as the live one: meshes, placements, shapes. Not collective.

        Complete once `wait` has returned. The live tensors may change after `await_reads`. The next call overwrites it.

        Raises:
            RuntimeError: there is no memory for the buffers.
        """
        key = [(n, t.dtype, t.shape, getattr(t, "placements", None), t.device) for n, t in _named(state)]
        if key != self._key:
            self._allocate(state)
            self._key = key
        on_cuda = [t for _, t in _named(state) if t.device.type == "cuda"]
        if on_cuda:
            self._stream = self._stream or torch.cuda.Stream(on_cuda[0].device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(on_cuda[0].device))
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for (_, live), (_, copy) in zip(_named(state), _named(self._copy), strict=True):
                copy_tensor(local_tensor(copy), local_tensor(live), non_blocking=True)
        if on_cuda:
            assert self._stream is not None
            self._copied = self._stream.record_event()
        self._copy.step = state.step
        return self._copy

    def wait(self) -> None:
        """Until the last copy is complete. From any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def await_reads(self) -> None:
        """Let what this thread does next to the live tensors come after the copy has read them; blocks no CPU."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def forget(self) -> None:
        """Let go of the buffers: the next copy gets other memory."""
        self._copy, self._key = TrainState(0, {}, {}), []

    def _allocate(self, state: TrainState) -> None:
        self.forget()  # two copies need not fit
        try:
            memory = direct.memory(sum(_padded(local_tensor(tensor)) for _, tensor in _named(state)))
        except OSError as e:
            raise RuntimeError(f"no memory for a copy of the state: {e}") from e

        def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            nonlocal memory
            made = {}
            for name, tensor in tensors.items():
                local = local_tensor(tensor)
                made[name] = _like(tensor, _buffer(local, memory))
                memory = memory[_padded(local) :]
            return made

        self._copy = TrainState(step=0, tensors=copies(state.tensors), per_rank=copies(state.per_rank))


def _named(state: TrainState) -> list[tuple[str, torch.Tensor]]:
    return [*sorted(state.tensors.items()), *sorted(state.per_rank.items())]


def _padded(local: torch.Tensor) -> int:
    """Bytes of the buffer for a host tensor: whole pages, so that it is written to a disk from where it lies."""
    if local.device.type == "cuda":
        return 0  # pinned memory comes in pages by itself
    return -(-local.numel() * local.element_size() // direct.PAGE_BYTES) * direct.PAGE_BYTES


def _buffer(local: torch.Tensor, memory: memoryview) -> torch.Tensor:
    n_bytes = local.numel() * local.element_size()
    if local.device.type == "cuda" or not n_bytes:
        return torch.empty(local.shape, dtype=local.dtype, pin_memory=local.device.type == "cuda")
    return torch.frombuffer(memory[:n_bytes], dtype=torch.uint8).view(local.dtype).view(local.shape)


def _like(tensor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """A tensor of the same placement whose local part is `buffer`."""
    if not isinstance(tensor, DTensor):
        return buffer
    # Not from_local, which would move the buffer to the mesh's device.
    return DTensor(buffer, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]
