"""The training loop: what all ranks agree on, and what it does when."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
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

from storage import durable_write
from storage.checkpointer import Checkpointer
from storage.commits import create_commit, verify
from storage.manifest import Commit, RankPart, commit_name
from trainer import contract, loop, saves
from trainer.contract import WorkerConfig
from trainer.loop import NonFiniteError, Session, train, train_step

# --- agreements among ranks ------------------------------------------------------------------------------------------


def test_not_a_number_on_one_rank_is_refused_by_all_before_the_optimizer() -> None:
    # Without the audit of state, which finds this particular cause first.
    unaudited = contract.AuditConfig(at_rest=False, replicas=False)
    for error, before, after, step in on_ranks(poison_rank_3, config_of(HYBRID_3D, n_layers=2, audit=unaudited)):
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
    on_ranks(poison_without_check, config_of(audit=contract.AuditConfig(finite=False, at_rest=False)))


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
    ((messages, saved),) = on_ranks(train_with_full_disk, CALENDAR, {3})
    (failed,) = of_type(messages, contract.SaveFailed)
    assert failed.step == 3
    assert "No space left on device" in failed.error
    assert list(saved) == [4, 6, 7], "tried again at once, since there is no wait in this test"
    assert messages[-1].reason == "completed"


def test_the_last_state_is_tried_again_and_then_left_to_the_orchestrator() -> None:
    ((messages, saved),) = on_ranks(train_with_full_disk, CALENDAR, {7})
    assert [m.step for m in of_type(messages, contract.SaveFailed)] == [7] * saves.TRIES
    assert list(saved) == [3, 6]
    assert messages[-1] == contract.Finished(generation=1, rank=0, step=7, reason="completed")


def train_with_full_disk(config: WorkerConfig, steps: set[int]) -> tuple[list[Any], dict[int, dict[str, str]]]:
    saves.RETRY_S = 0.0
    messages: list[Any] = []
    session = make_session(config, messages)
    session.checkpointer = RecordingCheckpointer(failing_steps=steps)  # type: ignore[assignment]
    train(session, saved_step=-1)
    return messages, session.checkpointer.saved  # type: ignore[attr-defined]


def test_no_rank_begins_a_save_while_another_still_writes() -> None:
    quad = config_of(QUAD, n_layers=2, steps=8, checkpoint=contract.CheckpointConfig(interval_steps=2))
    for messages, saved in on_ranks(train_while_rank_1_is_busy_until_step_5, quad):
        assert list(saved) == [2, 6, 8], "due at 4, busy until 5, agreed on for 6"
        assert [m.step for m in of_type(messages, contract.ShardWritten)] == [2, 6, 8]


def train_while_rank_1_is_busy_until_step_5(config: WorkerConfig) -> tuple[list[Any], dict[int, dict[str, str]]]:
    messages: list[Any] = []
    session = make_session(config, messages)

    def emit(message: Any) -> None:
        messages.append(message)
        if isinstance(message, contract.StepDone) and session.rank == 1:
            session.checkpointer.busy = 3 <= message.step < 5  # type: ignore[misc]

    session.emit = emit
    train(session, saved_step=-1)
    return messages, session.checkpointer.saved  # type: ignore[attr-defined]


RETUNED = config_of(QUAD, n_layers=2, steps=14, checkpoint=contract.CheckpointConfig(interval_steps=5))


def test_an_interval_that_rank_0_is_told_is_every_ranks_and_changes_no_bit() -> None:
    untouched = on_ranks(train_and_retune, RETUNED, -1, False)
    retuned = on_ranks(train_and_retune, RETUNED, 0, False)
    assert [list(saved) for saved, _ in untouched] == [[5, 10, 14]] * 4
    assert [list(saved) for saved, _ in retuned] == [[5, 9, 12, 14]] * 4, "each 3 steps, once 7 are done"
    assert [states for _, states in retuned] == [states for _, states in untouched]


def test_only_rank_0_decides_and_ranks_that_decided_alone_would_differ() -> None:
    assert [list(saved) for saved, _ in on_ranks(train_and_retune, RETUNED, 2, False)] == [[5, 10, 14]] * 4
    alone = [list(saved) for saved, _ in on_ranks(train_and_retune, RETUNED, 2, True)]
    assert alone[0] != alone[2], "and this test would see it"


def train_and_retune(config: WorkerConfig, told: int, alone: bool) -> tuple[dict[int, Any], dict[int, dict[str, str]]]:
    """What was saved, and each step's state, when rank `told` is told another interval; or if each decides `alone`."""
    states: dict[int, dict[str, str]] = {}
    session = make_session(config, [])

    def emit(message: Any) -> None:
        if isinstance(message, contract.StepDone):
            states[message.step] = digests(session.state)
            if message.step == 7 and session.rank == told:
                session.interval.steps = 3

    def decide_alone(whole: Session) -> loop.StepResult:
        result = train_step(whole)
        return replace(result, save=whole.state.step % whole.interval.steps == 0)

    session.emit = emit
    with pytest.MonkeyPatch.context() as patch:
        if alone:
            patch.setattr(loop, "train_step", decide_alone)
        train(session, saved_step=-1)
    return session.checkpointer.saved, states  # type: ignore[attr-defined]


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


# --- with storage itself ---------------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_state_of_its_step_and_saving_changes_no_bit(tmp_path: Path) -> None:
    """The store is held up at each save until training is two steps further."""
    config = config_of(QUAD, n_layers=2, steps=9, checkpoint=contract.CheckpointConfig(interval_steps=3))
    results = on_ranks(train_beside_a_slow_store, config, str(tmp_path / "run"))
    quiet = replace(config, checkpoint=contract.CheckpointConfig(interval_steps=100))
    untouched = on_ranks(train_beside_a_slow_store, quiet, str(tmp_path / "quiet"))
    for step in (3, 6, 9):
        commits = [part for parts, _, _ in results for part in parts if f"step-{step:08d}" in part["data"]]
        parts = tuple(RankPart(**part) for part in commits)
        assert [part.rank for part in parts] == [0, 1, 2, 3]
        commit = Commit(run="test", step=step, epoch=1, generation=1, mesh={}, parts=parts, versions={})
        assert verify(str(tmp_path / "run"), commit) == []
        restored = on_ranks(restored_digests, config, str(tmp_path / "run"), commit)
        assert restored == [states[step] for _, states, _ in results]
    assert [states for _, states, _ in results] == [states for _, states, _ in untouched]
    for _, _, steps in results:
        assert [message.step for message in steps if message.save_us > 0] == [4, 7], "told with the step after"
        assert all(message.snapshot_us + message.save_us <= message.step_us for message in steps)


def train_beside_a_slow_store(config: WorkerConfig, url: str) -> tuple[list[Any], dict[int, dict[str, str]], list[Any]]:
    """The parts that were written, the digests of the state after each step, and the reports of steps."""
    messages: list[Any] = []
    states: dict[int, dict[str, str]] = {}
    session = make_session(config, messages)
    session.checkpointer = checkpointer(session, url)
    go_on = threading.Event()
    write_files = durable_write.Writer._write_files

    def held_up(writer: Any, *args: Any) -> RankPart:
        assert session.state.step == config.steps or go_on.wait(30)
        go_on.clear()
        return write_files(writer, *args)

    def emit(message: Any) -> None:
        messages.append(message)
        if isinstance(message, contract.StepDone):
            states[message.step] = digests(session.state)
            if message.step % 3 == 2 and session.checkpointer.busy:  # two steps after the one that is saved
                go_on.set()
                session.checkpointer._saving.join(30)

    durable_write.Writer._write_files = held_up  # type: ignore[method-assign]
    session.emit = emit
    train(session, saved_step=-1)
    parts = [message.part for message in of_type(messages, contract.ShardWritten)]
    return parts, states, of_type(messages, contract.StepDone)


def restored_digests(config: WorkerConfig, url: str, commit: Commit) -> dict[str, str]:
    session = make_session(config, [])
    if session.rank == 0:
        create_commit(url, commit)
    torch.distributed.barrier()
    source = contract.Restore(source="durable", step=commit.step, commit=commit_name(commit.step))
    checkpointer(session, url).restore(session.state, source)
    return digests(session.state)


def checkpointer(session: Session, url: str) -> Checkpointer:
    return Checkpointer(
        url=url,
        run="test",
        rank=session.rank,
        world_size=session.config.parallel.world_size,
        epoch=1,
        generation=1,
        ram_dir=f"{url}-ram",
        node="n",
    )
