"""Loss over steps, from a run's journal."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core import events as ev
from orchestrator.runtime.journal import Record


def curves(records: Sequence[Record]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The loss of every step (the last execution's), and the validation losses, from a journal. Nats per token."""
    loss: dict[int, tuple[int, float]] = {}
    validation: dict[int, tuple[int, float]] = {}
    for record in records:
        match record.event:
            case ev.StepsDone() as done:
                for step, value in zip(range(done.first, done.last + 1), done.loss_millionths, strict=False):
                    _keep_last(loss, step, done.generation, value)
            case ev.Validated() as validated:
                _keep_last(validation, validated.step, validated.generation, validated.loss_millionths)
    return _in_order(loss), _in_order(validation)


def _keep_last(values: dict[int, tuple[int, float]], step: int, generation: int, millionths: int) -> None:
    """A report may come late: an older generation's does not replace a newer one's."""
    if step not in values or generation >= values[step][0]:
        values[step] = (generation, millionths / 1e6)


def _in_order(values: dict[int, tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, value) for step, (_, value) in sorted(values.items())]
