"""The worker's side of the contract: what a training script of the user's calls. `import shepherd` brings it.

    session = shepherd.session()
    done = session.restore(state) or 0
    for step in range(done + 1, steps + 1):
        ...
        session.snapshot(step, state)
        session.step(step, loss=loss)

One script serves everywhere: under torchrun, or by itself, there is nothing to restore, and the other calls do nothing.
Imports nothing heavy: the part that does the work (trainer/managed.py) is there in Shepherd's workers only.
"""

from __future__ import annotations

import operator
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.managed import Managed


class Session:
    """What a script tells Shepherd, and gets back from it.

    A state is a dict, nested as you like. Its leaves are tensors, objects with `state_dict` and `load_state_dict`
    (modules, optimizers, schedulers), and what JSON can hold, 256 KiB of it in all. DTensors are global: they may be
    restored on another mesh. Everything else, also a plain tensor, belongs to its rank.
    """

    def __init__(self, managed: Managed | None = None) -> None:
        self._managed = managed

    @property
    def is_managed(self) -> bool:
        """Whether Shepherd runs this script."""
        return self._managed is not None

    def restore(self, state: MutableMapping[str, Any]) -> int | None:
        """Fill `state` in place from the newest snapshot or checkpoint of the run. Collective.

        Also torch's random state of this rank. Call it once, after `init_process_group` and before the first step. An
        optimizer that has made no step yet is given its moments for this.

        Returns:
            How many steps the state has completed; None when there is none to restore: `state` is as it was.

        Raises:
            storage.manifest.StateMismatch: what was saved has other tensors or values than `state`.
            storage.manifest.ManifestError: what was saved is damaged; Shepherd then restores from another copy.
        """
        return None if self._managed is None else self._managed.restore(state)

    def step(self, step: int, *, loss: float | None = None, tokens: int = 0) -> None:
        """Step number `step` (the first is 1) is complete on this rank, with this `loss` and so many `tokens` in all.

        Every rank tells each of its steps. From the first call on the run's time is booked by steps, and a rank that
        hangs is found. Again with the same number it is a sign of life, for what takes long between two steps.

        Raises:
            TypeError: `step` or `tokens` is no whole number.
            ValueError: `step` is below the last one, or belongs to what `restore` would have restored.
        """
        step, tokens = operator.index(step), operator.index(tokens)
        if self._managed is not None:
            self._managed.step_done(step, None if loss is None else float(loss), tokens)

    def snapshot(self, step: int, state: MutableMapping[str, Any], *, durable: bool = False) -> None:
        """Keep the state of `step` completed steps in this node's shared memory, and its copy in another's. Collective.

        Blocks for the copy alone; the tensors may change as soon as it returns. When `step` is a multiple of
        checkpoint.interval_steps, a durable checkpoint is written too, while training goes on.

        Args:
            durable: write that checkpoint now and wait for it, as after the last step.

        Raises:
            TypeError: `step` is no whole number.
            ValueError: ranks give different steps, or a leaf is neither tensor nor JSON; the message names it.
            storage.durable.CheckpointFailed: with `durable`, the store failed.
            SystemExit: the run has been asked to stop, and the state is safe.
        """
        step = operator.index(step)
        if self._managed is not None:
            self._managed.snapshot(step, state, durable=durable)


_session = Session()


def session() -> Session:
    """This process's session."""
    return _session


def install(managed: Managed) -> None:
    """Make the session one that Shepherd runs. For trainer/script.py."""
    _session._managed = managed
