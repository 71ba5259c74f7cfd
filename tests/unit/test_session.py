"""A session in one process: without Shepherd it does nothing; with it, it keeps, tells, restores and stops."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_sessions import order_of

import shepherd
from orchestrator.spec import parse
from storage.commits import create_commit
from storage.manifest import Commit, ManifestError, RankPart, commit_name
from trainer import contract
from trainer.contract import Restore
from trainer.link import Assignment
from trainer.managed import Managed
from trainer.session import Session

ROOT = Path(__file__).resolve().parents[2]
INIT = Restore(source="init")


class Recorder:
    """In the place of the link to the agent."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def emit(self, message: object) -> None:
        self.messages.append(message)

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.messages if isinstance(message, kind)]


class Rank:
    """The only rank of a run, in one generation."""

    def __init__(self, folder: Path, restore: Restore = INIT, generation: int = 1, **checkpoint: Any) -> None:
        document = {
            "run": {"name": "own", "url": str(folder / "run")},
            "script": {"command": ["python", "train.py"]},
            "checkpoint": checkpoint,
        }
        config = parse(document).worker_config
        order = order_of(
            config,
            generation=generation,
            node="a",
            store_host="",
            store_port=0,
            restore=restore,
            ram_dir=str(folder / "ram"),
        )
        self.agent = Recorder()
        self.assignment = Assignment(order)
        self.managed = Managed(self.assignment, self.agent)  # type: ignore[arg-type]
        self.session = Session(self.managed)
        self.state: dict[str, Any] = {"weight": torch.zeros(4), "epoch": 0}

    def advance(self, step: int, **options: Any) -> None:
        self.state["weight"] += step
        self.state["epoch"] = step
        self.session.snapshot(step, self.state, **options)
        self.session.step(step, loss=0.5, tokens=7)


def committed(folder: Path, agent: Recorder, step: int) -> Restore:
    """What the controller does with a written checkpoint, and orders then."""
    (written,) = [message for message in agent.of(contract.ShardWritten) if message.step == step]
    commit = Commit(
        run="own", step=step, epoch=1, generation=1, mesh={}, parts=(RankPart(**written.part),), versions={}
    )
    create_commit(str(folder / "run"), commit)
    return Restore(source="durable", step=step, commit=commit_name(step))


def test_without_shepherd_the_calls_do_nothing() -> None:
    session = shepherd.session()
    state = {"weight": torch.ones(2)}
    assert not session.is_managed
    assert session.restore(state) is None
    session.snapshot(1, state, durable=True)
    session.step(1, loss=0.1)
    assert state["weight"].tolist() == [1.0, 1.0]


def test_importing_it_is_light() -> None:
    code = "import sys, shepherd; shepherd.session(); sys.exit(any(m in sys.modules for m in ('torch', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    assert shepherd.load is not None and shepherd.JobSpec.__name__ == "JobSpec"
    with pytest.raises(AttributeError, match="nonsense"):
        shepherd.nonsense  # noqa: B018


def test_a_snapshot_is_restored_by_the_next_generation(tmp_path: Path) -> None:
    first = Rank(tmp_path)
    assert first.session.restore(first.state) is None
    for step in (1, 2, 3):
        first.advance(step)
    first.managed.close()
    drawn = torch.randn(2)

    second = Rank(tmp_path, Restore(source="ram", step=2, generation=1), generation=2)
    assert second.session.restore(second.state) == 2
    assert (second.state["weight"].tolist(), second.state["epoch"]) == ([3.0] * 4, 2)
    second.advance(3)
    second.managed.close()
    assert second.state["weight"].tolist() == first.state["weight"].tolist()
    assert torch.equal(torch.randn(2), drawn)


def test_steps_are_told_with_their_parts(tmp_path: Path) -> None:
    rank = Rank(tmp_path, interval_steps=2)
    rank.session.restore(rank.state)
    for step in (1, 2, 3):
        rank.advance(step)
    rank.session.step(3)  # a sign of life
    rank.managed.close()
    done = rank.agent.of(contract.StepDone)
    assert [(d.step, d.loss, d.tokens, d.own_us) for d in done] == [(n, 0.5, 7, None) for n in (1, 2, 3)]
    assert all(0 < d.snapshot_us <= d.step_us for d in done)
    assert done[1].save_us > 0, "the save of step 2"
    assert [d.snapshot_step for d in done][-1] >= 2
    told = [(p.phase, p.step) for p in rank.agent.of(contract.Phase)]
    assert told == [("compute", 1), ("compute", 3), ("checkpoint", 3), ("compute", 3)], "what was begun may last"
    assert [w.step for w in rank.agent.of(contract.ShardWritten)] == [2]


def test_a_durable_checkpoint_is_restored(tmp_path: Path) -> None:
    first = Rank(tmp_path)
    first.session.restore(first.state)
    first.advance(1)
    first.advance(2, durable=True)
    first.session.snapshot(2, first.state, durable=True)  # it stands already
    first.managed.close()
    order = committed(tmp_path, first.agent, 2)

    second = Rank(tmp_path, order, generation=2)
    assert second.session.restore(second.state) == 2
    assert (second.state["weight"].tolist(), second.state["epoch"]) == ([3.0] * 4, 2)
    second.session.snapshot(2, second.state, durable=True)
    second.managed.close()
    assert second.agent.of(contract.ShardWritten) == [], "it is what was restored"


@pytest.mark.parametrize("source", ["ram", "durable"])
def test_moments_that_were_not_kept_are_not_restored(tmp_path: Path, source: str) -> None:
    """Of a head that is not used yet."""

    def rank(restore: Restore = INIT, generation: int = 1) -> Rank:
        made = Rank(tmp_path, restore, generation)
        heads = torch.nn.ModuleList((torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))
        made.state |= {"heads": heads, "optimizer": torch.optim.AdamW(heads.parameters())}
        assert made.session.restore(made.state) == (None if restore is INIT else 1)
        return made

    first = rank()
    first.state["heads"][0](torch.ones(1, 2)).sum().backward()
    first.state["optimizer"].step()
    first.advance(1, durable=True)
    first.managed.close()
    durable = committed(tmp_path, first.agent, 1)
    order = durable if source == "durable" else Restore(source="ram", step=1, generation=1)
    second = rank(order, generation=2)
    mine, its = second.state["optimizer"].state_dict()["state"], first.state["optimizer"].state_dict()["state"]
    assert mine.keys() == its.keys() == {0, 1}
    assert all(torch.equal(mine[n]["exp_avg"], its[n]["exp_avg"]) for n in its)
    second.advance(2)
    second.managed.close()


def test_a_durable_save_between_steps_is_a_phase_of_its_own(tmp_path: Path) -> None:
    """So that nobody takes it for a hang of the script."""
    rank = Rank(tmp_path)
    rank.session.restore(rank.state)
    rank.advance(1, durable=True)
    assert rank.agent.of(contract.Phase)[:-1] == [], "before the first step nobody judges"
    rank.advance(2, durable=True)
    told = [type(m).__name__ if not isinstance(m, contract.Phase) else m.phase for m in rank.agent.messages]
    assert told[2:] == ["StepDone", "checkpoint", "checkpoint", "ShardWritten", "compute", "StepDone"]
    rank.managed.close()


def test_a_state_that_waits_to_be_restored_is_not_stopped_without_a_checkpoint(tmp_path: Path) -> None:
    """The script still imports, or builds its model; SIGTERM would end it, and what is in memory with it."""
    assert not Rank(tmp_path).managed.saves
    assert Rank(tmp_path, Restore(source="ram", step=2, generation=1), generation=2).managed.saves


def test_a_stop_saves_and_ends_the_script(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    rank.session.restore(rank.state)
    assert rank.managed.saves
    rank.advance(1)
    rank.assignment.stop.set()
    with pytest.raises(SystemExit) as end:
        rank.advance(2)
    assert end.value.code == 0
    assert rank.managed.step == 2
    assert [w.step for w in rank.agent.of(contract.ShardWritten)] == [2]


def test_copies_are_ordered_and_answered(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    rank.assignment.order = replace(rank.assignment.order, copies=True)
    rank.managed = Managed(rank.assignment, rank.agent)  # type: ignore[arg-type]
    rank.session = Session(rank.managed)
    rank.session.restore(rank.state)
    rank.advance(1)
    rank.managed._checkpointer.await_snapshot()  # type: ignore[union-attr]
    (order,) = rank.agent.of(contract.CopyStep)
    assert (order.step, order.complete) == (1, 0)
    assert rank.assignment.on_copied is not None
    rank.assignment.on_copied(1, "")
    rank.advance(2)
    rank.managed.close()
    assert [(o.step, o.complete) for o in rank.agent.of(contract.CopyStep)] == [(1, 0), (2, 1)]
    assert rank.agent.of(contract.StepDone)[-1].copied_step == 1


def test_wrong_calls_are_named(tmp_path: Path) -> None:
    first = Rank(tmp_path)
    first.session.restore(first.state)
    with pytest.raises(ValueError, match=r"session.step\(0\).* the first step is number 1"):
        first.session.step(0)
    for step in (1, 2):
        first.advance(step)
    with pytest.raises(ValueError, match="call it once, before the first step"):
        first.session.restore(first.state)
    with pytest.raises(ValueError, match=r"session.step\(1\): step 2 is done"):
        first.session.step(1)
    for call in (
        lambda: first.session.step(3.0),
        lambda: first.session.step(3, tokens=1e6),
        lambda: first.session.snapshot("3", {}),
    ):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            call()
    with pytest.raises(ValueError, match=r"session.snapshot\(1\): step 2 is done"):
        first.session.snapshot(1, first.state)
    first.managed.close()

    second = Rank(tmp_path, Restore(source="ram", step=2, generation=1), generation=2)
    for call in (lambda: second.session.step(1), lambda: second.session.snapshot(1, second.state)):
        with pytest.raises(ValueError, match=r"before session\.restore: this generation goes on from step 2"):
            call()
    other = {"weight": torch.zeros(5), "epoch": 0}
    with pytest.raises(ManifestError, match="other tensors"):
        second.session.restore(other)


def test_ranks_need_their_process_group_first(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    rank.assignment.order = replace(rank.assignment.order, world_size=2)
    managed = Managed(rank.assignment, rank.agent)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="after init_process_group"):
        managed.restore(rank.state)
