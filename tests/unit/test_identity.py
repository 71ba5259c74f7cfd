"""A resume is compared with the run on record: what may change, what may not, and what a record must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import identity, preflight
from orchestrator.runtime import journal
from orchestrator.spec import JobSpec, parse
from storage.commits import create_commit
from storage.manifest import Commit

# Every field of a job that a resume may change; with `identity.FIXED` they are all, so a new field must be decided.
FREE = {
    "run": {"url", "steps", "deterministic", "validation_interval_steps"},
    "model": {"preset"},
    "data": {"corpus", "validation_batches", "cache_dir"},
}
FREE_SECTIONS = {"parallel", "script", "checkpoint", "recovery", "audit", "cluster", "metrics"}


def spec(tmp_path: Path, **sections: dict[str, Any]) -> JobSpec:
    document: dict[str, Any] = {"run": {"name": "r", "url": str(tmp_path / "run")}, "model": {"preset": "tiny"}}
    for section, fields in sections.items():
        document.setdefault(section, {}).update(fields)
    return parse(document)


def test_every_field_is_either_fixed_or_free(tmp_path):
    for section, fields in spec(tmp_path).document().items():
        fixed, free = set(identity.FIXED.get(section, ())), FREE.get(section, set())
        assert fixed.isdisjoint(free)
        assert set(fields) == fixed | free or (section in FREE_SECTIONS and not fixed), section


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"seed": 1}},
        {"run": {"dtype": "bfloat16"}},
        {"run": {"name": "other"}},
        {"model": {"ffn_dim": 256}},
        {"model": {"rope_theta": 10000.0}},
        {"data": {"seq_len": 64}},
        {"data": {"global_batch": 16}},
        {"optimizer": {"lr": 1e-3}},
        {"optimizer": {"warmup_steps": 1}},
    ],
)
def test_what_decides_the_numbers_is_refused_with_old_and_new(tmp_path, sections):
    before = spec(tmp_path)
    identity.declare(before)
    after = spec(tmp_path, **sections)
    ((section, fields),) = sections.items()
    ((field, new),) = fields.items()
    (line,) = identity.changes(after)
    assert line.startswith(f"{section}.{field} = {new!r}: the run was started with ")
    assert repr(before.document()[section][field]) in line
    identity.declare(after)
    assert identity.changes(before) == [], "the record is the first start's, for ever"


def test_what_may_change_is_accepted(tmp_path):
    identity.declare(spec(tmp_path))
    other = spec(
        tmp_path,
        run={"steps": 7, "deterministic": False},
        parallel={"pp": 2, "dp_shard": 2, "microbatches": 2},
        cluster={"spares": 3, "log_dir": "/elsewhere"},
        checkpoint={"interval_steps": 3},
        recovery={"strikes": 9},
        metrics={"port": 9999},
        data={"corpus": "/moved"},
    )
    assert identity.changes(other) == []


def test_a_preset_and_its_fields_are_the_same_model(tmp_path):
    identity.declare(spec(tmp_path))
    shape = spec(tmp_path).document()["model"] | {"preset": ""}
    assert identity.changes(parse({"run": {"name": "r", "url": str(tmp_path / "run")}, "model": shape})) == []


def test_a_run_without_a_record_is_not_compared(tmp_path):
    assert identity.changes(spec(tmp_path, run={"seed": 5})) == []


def test_a_field_that_is_younger_than_the_record_is_not_compared(tmp_path):
    job = spec(tmp_path)
    document = {"format_version": 1, "spec": job.document()}
    del document["spec"]["optimizer"]["eps"]
    document["digest"] = identity._digest(document)
    Path(job.run.url).mkdir()
    Path(job.run.url, "run.json").write_text(json.dumps(document))
    assert identity.changes(spec(tmp_path, optimizer={"eps": 1e-6})) == []
    (line,) = identity.changes(spec(tmp_path, optimizer={"eps": 1e-6}, run={"seed": 1}))
    assert line.startswith("run.seed = 1: ")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no record of a run"),
        ("[]", "is no record of a run"),
        ('{"format_version": 2, "spec": {}, "digest": ""}', "has format_version 2, this Shepherd reads 1"),
        ('{"format_version": 1, "spec": {}, "digest": "0"}', "is damaged"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, text, told):
    job = spec(tmp_path)
    Path(job.run.url).mkdir()
    Path(job.run.url, "run.json").write_text(text)
    with pytest.raises(identity.RecordError, match=told):
        identity.changes(job)
    journal.claim_epoch(job.run.url, "test")
    with pytest.raises(preflight.PreflightError, match=told):
        preflight.check_local(job, resume=True)


def test_any_flipped_character_of_the_record_is_noticed(tmp_path):
    job = spec(tmp_path)
    identity.declare(job)
    path = Path(job.run.url, "run.json")
    sound = path.read_text()
    for place in range(0, len(sound), 41):
        if sound[place].isalnum():
            path.write_text(sound[:place] + ("x" if sound[place] != "x" else "y") + sound[place + 1 :])
            with pytest.raises(identity.RecordError):
                identity.changes(job)


def test_preflight_refuses_a_resume_of_another_job_in_a_line_for_each_field(tmp_path):
    identity.declare(spec(tmp_path))
    journal.claim_epoch(str(tmp_path / "run"), "test")
    preflight.check_local(spec(tmp_path), resume=True)
    with pytest.raises(preflight.PreflightError) as refused:
        preflight.check_local(spec(tmp_path, run={"seed": 3}, data={"seq_len": 64}), resume=True)
    assert [line.split(" ")[0] for line in str(refused.value).splitlines()] == ["run.seed", "data.seq_len"]


def test_the_record_holds_no_credentials(tmp_path):
    job = spec(tmp_path, data={"corpus": "ftp://user:planted@host/texts"})
    identity.declare(job)
    text = Path(job.run.url, "run.json").read_text()
    assert "planted" not in text and "ftp://***@host/texts" in text
    assert identity.changes(job) == []


def test_the_data_of_a_run_is_what_its_newest_readable_commit_says(tmp_path):
    url = str(tmp_path)
    assert identity.data_digest(url, []) == ""
    for step in (10, 20, 30):
        versions = {"data": f"digest-{step}"}
        create_commit(url, Commit(run="r", step=step, epoch=1, generation=1, mesh={}, parts=(), versions=versions))
    assert identity.data_digest(url, [10, 20, 30]) == "digest-30"
    (tmp_path / "checkpoints/commits/step-00000030.json").write_text("{")
    assert identity.data_digest(url, [10, 20, 30]) == "digest-20"
