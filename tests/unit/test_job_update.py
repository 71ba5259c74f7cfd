"""What of an active run's job may change, and by what name and reason all else is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from orchestrator import identity, job_update
from orchestrator.runtime import code as codes
from orchestrator.spec import JobSpec, SpecError, parse


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    document = {"run": {"name": "r", "url": str(tmp_path / "run"), "steps": 100}, "model": {"preset": "tiny"}}
    return parse(document)


def test_a_change_is_the_whole_document_and_comes_back_from_what_is_on_record(spec: JobSpec) -> None:
    overrides = ["optimizer.lr=0.001", "run.steps=200", "checkpoint.interval=auto", "recovery.node_silence_s=9"]
    new = job_update.updated(spec, overrides)
    assert (new.optimizer.lr, new.run.steps, new.checkpoint.interval) == (0.001, 200, "auto")
    made = job_update.changes(spec, new)
    assert made == {
        "run.steps": "200",
        "optimizer.lr": "0.001",
        "checkpoint.interval": '"auto"',
        "recovery.node_silence_s": "9.0",
    }
    assert job_update.applied(spec, made) == new
    assert job_update.applied(new, made) == new
    assert job_update.changes(new, job_update.updated(new, [])) == {}


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("run.name=other", "run.name: cannot change while the run is active: names its actors and its snapshots"),
        ("run.url=/elsewhere", "run.url: .* holds its journal and its checkpoints"),
        ("run.seed=1", "run.seed: .* another value is another run"),
        ("model.dim=128", "model.dim: .* another value is another run"),
        ("data.global_batch=16", "data.global_batch: .* another value is another run"),
        ("parallel.dp_replicate=2", "parallel.dp_replicate: .* stop the run, and resume it"),
        ("cluster.spares=1", "cluster.spares: .* decides which nodes the run holds"),
        ("audit.replicas=false", "audit.replicas: .* snapshots carry its marks"),
        ("optimizer.lr=-1", "optimizer.lr = -1.0: must be at least 0"),
        ("optimizer.speed=1", "optimizer.speed: there is no such field"),
        ("steps=5", "--set steps=5: write section.key=value"),
    ],
)
def test_what_cannot_change_is_refused_by_name_with_the_reason(spec: JobSpec, override: str, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        job_update.updated(spec, ["run.steps=200", override])


def test_every_field_may_change_or_has_a_reason(spec: JobSpec) -> None:
    for section, fields in spec.document().items():
        for field in fields:
            name = f"{section}.{field}"
            assert job_update._may_change(name) or job_update._why(name), name
    known = {f"{section}.{field}" for section, fields in spec.document().items() for field in fields}
    for section, fields in job_update.CHANGEABLE.items():
        assert {f"{section}.{field}" for field in fields} <= known


def test_a_resume_is_compared_with_the_updated_job(spec: JobSpec) -> None:
    Path(spec.run.url).mkdir(parents=True)
    identity.declare(spec)
    identity.declare_update(spec.run.url, 1, {"optimizer.lr": "0.001"})
    identity.declare_update(spec.run.url, 2, {"optimizer.lr": "0.001", "optimizer.clip_norm": "2.0", "run.steps": "7"})
    (line, second) = identity.changes(spec)
    assert line.startswith("optimizer.lr = 0.0003") or line.startswith("optimizer.lr = ")
    assert second.startswith("optimizer.clip_norm = 1.0: the run was started with 2.0")
    optimizer = dataclasses.replace(spec.optimizer, lr=0.001, clip_norm=2.0)
    assert identity.changes(spec.model_copy(update={"optimizer": optimizer})) == []


# --- code ---


def working_dir(folder: Path, text: str = "") -> Path:
    (folder / "trainer").mkdir(parents=True)
    (folder / "trainer" / "__init__.py").touch()
    (folder / "trainer" / "worker.py").write_text(text)
    (folder / "trainer" / "contract.py").write_bytes((codes.INSTALLED / "trainer" / "contract.py").read_bytes())
    return folder


def test_a_packet_is_known_by_its_content_and_unpacked_once(tmp_path: Path) -> None:
    packet = codes.pack(working_dir(tmp_path / "a", "x = 1\n"))
    assert packet == codes.pack(working_dir(tmp_path / "b", "x = 1\n"))
    url = str(tmp_path / "run")
    code = codes.publish(url, packet)
    assert codes.publish(url, packet) == code
    there = codes.unpack(url, code, tmp_path / "node")
    assert (there / "trainer" / "worker.py").read_text() == "x = 1\n"
    (tmp_path / "run" / "code" / f"{code}.zip").unlink()
    assert codes.unpack(url, code, tmp_path / "node") == there
    assert [path.name for path in (tmp_path / "node").iterdir()] == [code]


def test_a_packet_that_is_damaged_or_gone_is_not_run(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    code = codes.publish(url, codes.pack(working_dir(tmp_path / "a")))
    with pytest.raises(FileNotFoundError):
        codes.unpack(url, "0" * 64, tmp_path / "node")
    (tmp_path / "run" / "code" / f"{code}.zip").write_bytes(b"other")
    with pytest.raises(codes.CodeError, match="is damaged"):
        codes.unpack(url, code, tmp_path / "node")


def test_a_folder_from_which_no_worker_starts_or_that_speaks_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(codes.CodeError, match=r"trainer/worker.py is not in it"):
        codes.pack(tmp_path)
    folder = working_dir(tmp_path / "a")
    (folder / "trainer" / "contract.py").write_text("other = 1\n")
    with pytest.raises(codes.CodeError, match=r"trainer/contract.py is not the installed one.*stop the run"):
        codes.pack(folder)
