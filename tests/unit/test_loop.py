"""The training loop: what all ranks agree on, and what it does when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_sessions import (
    HYBRID_3D,
    QUAD,
    RecordingCheckpointer,
    config_of,
    digests,
    local,
    make_session,
    of_type,
    on_ranks,
    train_and_record,
)

from trainer import contract
from trainer.contract import WorkerConfig
from trainer.loop import NonFiniteError, train, train_step

# --- agreements among ranks ------------------------------------------------------------------------------------------


def test_not_a_number_on_one_rank_is_refused_by_all_before_the_optimizer() -> None:
    for error, before, after, step in on_ranks(poison_rank_3, config_of(HYBRID_3D, n_layers=2)):
        assert error.startswith("step 3: loss nan")
        assert before == after
        assert step == 2


def poison_rank_3(config: WorkerConfig) -> tuple[str, dict[str, str], dict[str, str], int]:
    session = make_session(config, [])
    train_step(session)
    train_step(session)
    if session.rank == 3:
        with torch.no_grad():
            local(session.state.tensors["model/layers.0.attention.wo.weight"])[0, 0] = torch.nan
    before = digests(session.state)
    with pytest.raises(NonFiniteError) as caught:
        train_step(session)
    return str(caught.value), before, digests(session.state), session.state.step


def test_the_finite_check_can_be_turned_off() -> None:
    on_ranks(poison_without_check, config_of(audit=contract.AuditConfig(finite=False)))


def poison_without_check(config: WorkerConfig) -> None:
    session = make_session(config, [])
    with torch.no_grad():
        session.state.tensors["model/norm.weight"][0] = torch.nan
    train_step(session)
    assert session.state.step == 1


def test_all_ranks_stop_at_the_step_after_one_was_asked_to() -> None:
    for messages, saved in on_ranks(stop_rank_2_after_step_3, config_of(QUAD)):
        finished = messages[-1]
        assert (finished.step, finished.reason) == (4, "stopped")
        assert [message.step for message in of_type(messages, contract.ShardWritten)] == [4]
        assert list(saved) == [4]


def stop_rank_2_after_step_3(config: WorkerConfig) -> tuple[list[Any], dict[int, dict[str, str]]]:
    messages: list[Any] = []
    session = make_session(config, messages)

    def emit(message: Any) -> None:
        messages.append(message)
        if isinstance(message, contract.StepDone) and message.step == 3 and session.rank == 2:
            session.stop.set()

    session.emit = emit
    train(session, saved_step=-1)
    return messages, session.checkpointer.saved  # type: ignore[attr-defined]


# --- the loop's calendar ---------------------------------------------------------------------------------------------

CALENDAR = config_of(
    steps=7,
    validation_interval_steps=5,
    checkpoint=contract.CheckpointConfig(interval_steps=3, snapshot_interval_steps=2),
)


def test_saves_validations_and_snapshots_come_when_due() -> None:
    ((messages, saved),) = on_ranks(train_and_record, CALENDAR)
    assert list(saved) == [3, 6, 7]
    assert [message.step for message in of_type(messages, contract.ShardWritten)] == [3, 6, 7]
    assert [message.step for message in of_type(messages, contract.Validated)] == [0, 5, 7]
    steps = of_type(messages, contract.StepDone)
    assert [message.step for message in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [message.snapshot_step for message in steps] == [0, 2, 2, 4, 4, 6, 6]
    assert all(0 <= m.data_us + m.snapshot_us <= m.step_us and m.tokens == 8 * 32 for m in steps)
    assert messages[-1] == contract.Finished(generation=1, rank=0, step=7, reason="completed")


def test_a_failed_save_costs_the_checkpoint_and_not_the_run() -> None:
    ((messages, saved),) = on_ranks(train_with_full_disk_at_step_3, CALENDAR)
    (failed,) = of_type(messages, contract.SaveFailed)
    assert failed.step == 3
    assert "No space left on device" in failed.error
    assert list(saved) == [6, 7]
    assert messages[-1].reason == "completed"


def train_with_full_disk_at_step_3(config: WorkerConfig) -> tuple[list[Any], dict[int, dict[str, str]]]:
    messages: list[Any] = []
    session = make_session(config, messages)
    session.checkpointer = RecordingCheckpointer(failing_step=3)  # type: ignore[assignment]
    train(session, saved_step=-1)
    return messages, session.checkpointer.saved  # type: ignore[attr-defined]


@pytest.mark.parametrize("saved_step", [7, -1], ids=["durable", "snapshot"])
def test_a_finished_state_is_saved_only_if_it_is_not_yet(saved_step: int) -> None:
    ((messages, saved),) = on_ranks(train_from_the_end, CALENDAR, saved_step)
    assert list(saved) == ([] if saved_step == 7 else [7])
    assert of_type(messages, contract.StepDone) == []
    assert messages[-1] == contract.Finished(generation=1, rank=0, step=7, reason="completed")


def train_from_the_end(config: WorkerConfig, saved_step: int) -> tuple[list[Any], dict[int, dict[str, str]]]:
    messages: list[Any] = []
    session = make_session(config, messages)
    session.state.step = config.steps
    train(session, saved_step)
    return messages, session.checkpointer.saved  # type: ignore[attr-defined]
