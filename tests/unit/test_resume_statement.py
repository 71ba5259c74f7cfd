"""What a resume says before it starts: how the run ended, where it goes on, and what was lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator import resume
from orchestrator.core import events as ev
from orchestrator.core.supervisor import Supervisor
from orchestrator.runtime import journal
from orchestrator.spec import JobSpec, parse
from storage.commits import create_commit
from storage.manifest import Commit

VERSION = "test"


def spec_of(folder: Path, **parallel: int) -> JobSpec:
    document: dict[str, Any] = {
        "run": {"name": "r", "url": str(folder / "run"), "steps": 100},
        "model": {"preset": "tiny"},
        "data": {"corpus": "python-stdlib", "global_batch": 8},
        "parallel": {"dp_replicate": 2, **parallel},
        "cluster": {"log_dir": str(folder / "logs")},
    }
    return parse(document)


def record(spec: JobSpec, *then: ev.Event) -> None:
    """A journal of a run that has trained, as its controller leaves it."""
    claim = journal.claim_epoch(spec.run.url, VERSION)
    written, core = journal.Journal(spec.run.url, Path(spec.cluster.log_dir, "tail"), claim.epoch), Supervisor()
    declared = ev.RunDeclared(
        at=1, run="r", layout=spec.layout, limits=spec.limits, total_steps=100, capabilities=("ram", "peer")
    )
    began = ev.EpochBegan(at=2, epoch=1, version=VERSION)
    joined = (ev.NodeJoined(at=3 + n, node=f"n{n}", domain="", snapshots={}) for n in range(2))
    ready = ev.GenerationReady(at=5, generation=1, step=0, rendezvous_us=0, build_us=0, restore_us=0)
    for event in (declared, began, *joined, ready, *then):
        written.append(event, core.handle(event))
    written.close()


def steps(last: int) -> ev.Event:
    return ev.StepsDone(
        at=10 + last,
        generation=1,
        first=1,
        last=last,
        data_wait_us=0,
        checkpoint_us=0,
        validation_us=0,
        tokens=0,
        loss_millionths=0,
    )


def commit(spec: JobSpec, step: int) -> None:
    versions = {"torch": "2"}
    create_commit(spec.run.url, Commit(run="r", step=step, epoch=1, generation=1, mesh={}, parts=(), versions=versions))


def test_a_lost_head_is_named_with_the_steps_that_are_lost(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    record(spec, steps(27))
    commit(spec, 20)
    how, where = resume.statement(spec)
    assert how.startswith("the run has no end on record, so its head node or its whole cluster was lost, in generation")
    assert "1 after step 27; what was done in the last 30 s" in how
    assert where == (
        "lost: at most steps 21 to 27 and what is not on record; it goes on from the checkpoint of step 20, or from a "
        "newer step if the nodes' shared memory has kept one complete"
    )


def test_on_another_mesh_memory_is_of_no_use(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    record(spec, steps(21))
    commit(spec, 20)
    other = spec_of(tmp_path, dp_replicate=1, pp=2, microbatches=2)
    assert (
        resume.statement(other)[1]
        == "lost: step 21 and what is not on record; it goes on from the checkpoint of step 20"
    )


def test_without_a_checkpoint_all_is_lost(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    record(spec, steps(5))
    assert resume.statement(spec)[1] == (
        "lost: steps 1 to 5 and what is not on record; no checkpoint is committed, so it begins anew"
    )


def test_a_run_that_was_stopped_has_lost_nothing_with_its_last_checkpoint(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    record(spec, steps(20), ev.StopRequested(at=40, by="somebody", graceful=False))
    commit(spec, 20)
    assert resume.statement(spec) == [
        "the run had ended at step 20: stopped by somebody (exit code 96)",
        "lost: no step; it goes on from the checkpoint of step 20",
    ]


def test_a_damaged_journal_leaves_the_word_to_the_controller(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    record(spec, steps(5))
    (segment,) = Path(spec.run.url, "journal").iterdir()
    segment.write_bytes(segment.read_bytes()[:-20] + b"x" * 20)
    (line,) = resume.statement(spec)
    assert line.startswith("what was lost cannot be said before the controller has started")
