"""What a load that fails leaves behind."""

from __future__ import annotations

from storage.state import SPOILT_STEP, TrainState, local_tensor


def spoilt(state: TrainState) -> bool:
    """Whether a load into `state` has failed, and nobody can take it for a state."""
    numbers = [local_tensor(tensor) for tensor in state.tensors.values() if tensor.is_floating_point()]
    return state.step == SPOILT_STEP and bool(numbers) and all(bool(tensor.isnan().all()) for tensor in numbers)
