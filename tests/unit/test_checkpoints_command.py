"""`shepherd checkpoints` as people and scripts meet it: what it prints, its exit codes, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from click.testing import Result
from core_watch import LIMITS
from llama_checkpoints import CONFIG, make_state, save
from s3_server import s3_bucket
from test_cli import refused
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from orchestrator import checkpoints_removal, identity
from orchestrator.cli import app
from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core.events import Layout
from orchestrator.preflight import problems_here
from orchestrator.runtime import driver
from orchestrator.runtime.journal import Journal, claim_epoch
from orchestrator.spec import JobSpec, parse
from storage import pins, statements
from storage.commits import list_commits, read_commit
from storage.manifest import DATA_DIR, commit_name, generation_dir
from storage.statements import Statement
from storage.urls import list_folders, locate, write_exclusive
from storage.windows import open_checkpoint

FIELDS = {name: value for name, value in dataclasses.asdict(CONFIG).items() if name != "preset"}


def checkpoints(*arguments: Any, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, ["checkpoints", *map(str, arguments)], input=answer)


def printed(*arguments: Any, code: int = 0) -> str:
    result = checkpoints(*arguments)
    assert (result.exit_code, result.stderr) == (code, ""), result.output
    return result.stdout


def document(*arguments: Any, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(*arguments, "--json", code=code))
    return found


def job_of(url: Path, **model: Any) -> JobSpec:
    return parse({"run": {"name": "job", "url": str(url)}, "model": {**FIELDS, **model}, "data": {"seq_len": 96}})


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    """No cluster answers; `live` makes one of them have the run."""

    def no_cluster(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", no_cluster)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return SimpleNamespace(
        live=lambda: (
            monkeypatch.setattr(driver, "connect", lambda address: None),
            monkeypatch.setattr(driver, "find", lambda run: run),
        )
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, of which the second cannot be read, one uncommitted folder, and the job on record."""
    url = tmp_path_factory.mktemp("template") / "run"
    save(str(url), make_state(10))
    save(str(url), make_state(20, seed=1), 2)
    save(str(url), make_state(30, seed=1), 2)
    save(str(url), make_state(35, seed=2), 3, committed=False)
    (url / commit_name(20)).write_text("{}")
    identity.declare(job_of(url))
    return url


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


def began(url: Path, tmp_path: Path, *actions: ac.Action) -> None:
    """A run's journal: declared, and then these actions."""
    one = Layout(pp=1, dp_replicate=1, dp_shard=1, tp=1, slots_per_node=1, nodes=1, spares=0)
    journal = Journal(str(url), tmp_path / "tail", claim_epoch(str(url), "test").epoch)
    declared = ev.RunDeclared(at=0, run="job", layout=one, limits=LIMITS, total_steps=9, capabilities=())
    journal.append(declared, [])
    journal.append(ev.StopRequested(at=1, by="test", graceful=False), list(actions))
    journal.publish()


# --- ls, verify ---


def test_ls_lists_what_is_committed_and_what_is_not(run):
    pins.pin(str(run), 10, "for [the] paper")
    said = Statement(step=30, generation=2, epoch=1, trust="verified", at_unix_s=5, by="n0", detail="")
    statements.write(str(run), said)
    statements.write(str(run), dataclasses.replace(said, step=10, generation=9, trust="damaged"))
    found = document("ls", run)
    first, second, third = found["checkpoints"]
    assert first | {"age_s": 0, "n_bytes": 0} == {
        "step": 10, "problem": "", "generation": 1, "ranks": 1, "n_bytes": 0, "age_s": 0, "trust": "committed",
        "mesh": {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "tp": 1}, "pinned": "for [the] paper",
    }  # fmt: skip
    data = run / generation_dir(10, 1, 1) / "rank-00000.bin"
    assert first["n_bytes"] == data.stat().st_size and 0 <= first["age_s"] < 3600
    assert second["step"] == 20 and second["problem"].startswith("not a commit record")
    assert (third["trust"], third["pinned"]) == ("verified", None)
    (left,) = found["leftovers"]
    assert (left["folder"], left["step"]) == (generation_dir(35, 1, 3), 35)
    assert left["n_bytes"] == sum(path.stat().st_size for path in (run / left["folder"]).iterdir())
    text = printed("ls", run)
    assert "for [the] paper" in text and "unreadable: not a commit record" in text
    assert f"uncommitted: {left['folder']}, 1.1 MiB" in text


def test_verify_names_each_bad_block_and_its_code_tells(run):
    assert printed("verify", run) == "step 30: whole\n"
    assert document("verify", run, 10) == {"whole": True, "problems": {"10": []}}
    data = run / generation_dir(30, 1, 2) / "rank-00000.bin"
    raw = bytearray(data.read_bytes())
    tensors = open_checkpoint(str(run), read_commit(str(run), 30)).tensors
    for at in (tensors[fqn].parts[0][1].file_offset for fqn in ("model/tok_embeddings.weight", "rank/00000/rng")):
        raw[at] ^= 1
    data.write_bytes(raw)
    name = f"{generation_dir(30, 1, 2)}/rank-00000.bin"
    found = document("verify", run, "--all", code=1)
    assert (found["whole"], found["problems"]["10"]) == (False, [])
    assert len(found["problems"]["30"]) == 2, found
    assert all(p.startswith(name) and "block" in p and "is damaged" in p for p in found["problems"]["30"]), found
    assert [line.split(":")[0] for line in found["problems"]["20"]] == [commit_name(20)]
    assert [line.startswith(f"step 30: {name}: ") for line in printed("verify", run, code=1).splitlines()] == [True] * 2


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_stores_are_listed_verified_and_cleaned_up_like_folders(store, request, tmp_path, monkeypatch):
    url = f"memory://{tmp_path.name}" if store == "memory" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    save(url, make_state(10))
    save(url, make_state(20, seed=2), 2, committed=False)
    asked: list[str] = []
    fs = type(locate(url).fs)
    actual = fs.modified
    monkeypatch.setattr(fs, "modified", lambda self, path: asked.append(path) or actual(self, path))
    found = document("ls", url)
    assert not [path for path in asked if DATA_DIR in path], "a listing tells the age of its files"
    assert [(row["step"], row["age_s"] < 3600) for row in found["checkpoints"]] == [(10, True)]
    assert [(left["folder"], left["age_s"] < 3600) for left in found["leftovers"]] == [(generation_dir(20, 1, 2), True)]
    assert found["leftovers"][0]["n_bytes"] > found["checkpoints"][0]["n_bytes"] > 1_000_000
    assert printed("verify", url) == "step 10: whole\n"
    printed("pin", url, 10, "--why", "x"), printed("unpin", url, 10)
    assert printed("rm", url, 10, "--leftovers", "--yes", "--force").endswith("removed\n")
    assert list_commits(url) == [] and list_folders(url, DATA_DIR) == []


# --- diff, reshard-plan ---


def test_diff_says_what_differs_and_its_code_tells(run):
    assert printed("diff", run, f"{run}@30").endswith("steps 30 and 30: 91 of 91 tensors are equal, 0 are not\n")
    text = printed("diff", f"{run}@10", run, code=1)
    assert "model/norm.weight: 48 of 48 elements differ, max abs difference 0." in text
    found = document("diff", f"{run}@10", run, code=1)
    assert (found["equal"], found["steps"], len(found["tensors"])) == (False, [10, 30], 91)


def test_reshard_plan_adds_up_and_says_what_cannot_be(run):
    found = document("reshard-plan", run, "--mesh", "pp=3,dp_shard=2,tp=2")
    assert (found["possible"], len(found["ranks"])) == (True, 12)
    assert found["read_bytes"] == sum(rank["read_bytes"] for rank in found["ranks"])
    assert found["read_per_state_byte"] == found["read_bytes"] / found["state_bytes"] >= 1
    text = printed("reshard-plan", run, 10, "--mesh", "dp_shard=40")
    assert "... and 8 more ranks; --json has all" in text
    assert "dp_shard=40: 40 ranks read" in text and "random states are left as they are" in text
    text = printed("reshard-plan", run, "--mesh", "tp=3", code=1)
    assert "tp=3: not possible" in text and "model.n_kv_heads, which is 2" in text
    assert document("reshard-plan", run, "--mesh", "tp=3", code=1)["ranks"] == []


# --- export, import ---


def test_a_model_goes_out_and_in_and_a_job_of_another_shape_does_not_start_from_it(run, tmp_path):
    out, new = tmp_path / "out", tmp_path / "new"
    assert printed("export", run, "--to", out, "--dtype", "bfloat16").startswith(f"{out}: step 30, 30 tensors, 158,496")
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 96
    text = printed("import", out, "--to", new, "--step", 5)
    assert text.startswith(f"{new}: step 5 is committed.")
    assert tomllib.loads(text.partition("\n")[2]) == {"run": {"url": str(new)}, "model": FIELDS}
    assert [(row["step"], row["mesh"]) for row in document("ls", new)["checkpoints"]] == [(5, {})]
    assert "imported" in printed("ls", new)
    assert printed("verify", new) == "step 5: whole\n"
    again = tmp_path / "again"
    printed("export", new, 5, "--to", again, "--dtype", "bfloat16")  # import.json tells the model
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()
    assert problems_here(job_of(new), resume=False) == []
    (problem,) = problems_here(job_of(new, norm_eps=1e-5), resume=False)
    assert problem.startswith("model.norm_eps = 1e-05: the run was started with 3e-05")


def test_a_failed_import_leaves_a_folder_that_another_can_be_imported_to(tmp_path):
    config = LlamaConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80,
        vocab_size=270,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    index["metadata"]["sha256"] = {sorted(index["weight_map"].values())[-1]: "0" * 64}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    (line,) = refused(checkpoints("import", tmp_path / "hf", "--to", tmp_path / "new"))
    assert line.endswith("is damaged, its SHA-256 is not the one in model.safetensors.index.json")
    del index["metadata"]["sha256"]
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    printed("import", tmp_path / "hf", "--to", tmp_path / "new")
    assert list_commits(str(tmp_path / "new")) == [0]


def test_the_model_of_an_old_run_is_told_by_its_jobs_file(run, tmp_path):
    (run / "run.json").unlink()
    (line,) = refused(checkpoints("export", run, "--to", tmp_path / "out"))
    assert line == f"{run}: no record tells the model (run.json, import.json); give its job's file by --model FILE"
    file = tmp_path / "job.toml"
    file.write_text('[run]\nname = "x"\n[model]\n' + "\n".join(f"{k} = {v}" for k, v in FIELDS.items()))
    printed("export", run, "--to", tmp_path / "out", "--model", file)
    file.write_text(file.read_text().replace("n_layers = 3", "n_layers = 2"))
    (line,) = refused(checkpoints("export", run, "--to", tmp_path / "other", "--model", file))
    assert line.startswith("model/layers.2.") and line.endswith("no part of a Llama of 2 layers")


# --- rm, pin, unpin ---


def test_rm_asks_removes_record_and_data_and_keeps_what_is_pinned(run):
    assert printed("pin", run, 10, "--why", "for the paper") == "step 10 is pinned\n"
    (line,) = refused(checkpoints("pin", run, 10, "--why", "another reason"))
    assert line == "step 10 is pinned already (for the paper); unpin it first"
    (line,) = refused(checkpoints("rm", run, 30, 10, "--yes"))
    assert line.startswith("step 10 is pinned (for the paper): ")
    for answer in ("n\n", ""):
        result = checkpoints("rm", run, 30, answer=answer)
        assert result.exit_code == 2 and "not confirmed, nothing was removed" in result.stderr
    assert list_commits(str(run)) == [10, 20, 30]
    result = checkpoints("rm", run, 30, answer="y\n")
    assert result.exit_code == 0 and "step 30: 1.1 MiB, committed" in result.stdout
    assert list_commits(str(run)) == [10, 20] and not (run / generation_dir(30, 1, 2)).exists()
    assert printed("unpin", run, 10) == "step 10 is not pinned any more\n"
    (line,) = refused(checkpoints("unpin", run, 10))
    assert line == f"{run}: step 10 is not pinned; pinned are none"
    assert printed("rm", run, 10, 20, "--yes").endswith("removed\n")
    assert list_commits(str(run)) == [] and not (run / generation_dir(10, 1, 1)).exists()


def test_leftovers_go_when_they_are_old_and_only_they(run):
    left = run / generation_dir(35, 1, 3)
    write_exclusive(str(run), f"{DATA_DIR}/notes/readme.txt", b"somebody's own")
    told = "1 uncommitted, of the last two hours, stay: a save may be under way\n"
    assert printed("rm", run, "--leftovers", "--yes") == told and left.exists()
    old = time.time() - checkpoints_removal.LEFTOVER_GRACE_S - 60
    for path in left.iterdir():
        os.utime(path, (old, old))
    assert printed("rm", run, "--leftovers", "--yes") == f"uncommitted {generation_dir(35, 1, 3)}: 1.1 MiB\nremoved\n"
    assert printed("rm", run, "--leftovers", "--yes") == "nothing to remove\n"
    # What the record of step 20 names cannot be known.
    kept = [generation_dir(10, 1, 1), generation_dir(20, 1, 2), generation_dir(30, 1, 2), f"{DATA_DIR}/notes"]
    assert [f"{DATA_DIR}/{name}" for name in list_folders(str(run), DATA_DIR)] == sorted(kept)


def test_nothing_is_removed_under_a_live_run(run, tmp_path, without_ray):
    began(run, tmp_path)
    (line,) = refused(checkpoints("rm", run, 10, "--yes"))
    assert line.startswith(
        "whether a run is live cannot be known: its journal tells no end, and no Ray cluster answers"
    )
    result = checkpoints("rm", run, 10, answer="n\n")
    assert "whether a run is live cannot be known" in result.stdout and "Remove all the same?" in result.stdout
    without_ray.live()
    (line,) = refused(checkpoints("rm", run, 10, "--yes"))
    assert line == f"{run}: run job is active: stop it first, or give --force"
    assert list_commits(str(run)) == [10, 20, 30]
    assert printed("rm", run, 10, "--yes", "--force").endswith("removed\n")


def test_nothing_is_removed_when_a_run_begins_while_somebody_is_asked(run, tmp_path):
    began(run, tmp_path, ac.EndRun(exit_code=96, reason="stopped"))
    planned = checkpoints_removal.plan_removal(str(run), [10], leftovers=False, force=False, asks=True, address=None)
    claim_epoch(str(run), "test")
    with pytest.raises(checkpoints_removal.CheckpointsError, match="meanwhile whether a run is live cannot be known"):
        checkpoints_removal.perform_removal(planned)
    assert list_commits(str(run)) == [10, 20, 30]


def test_a_run_that_has_ended_is_not_live_until_another_controller_begins(run, tmp_path):
    began(run, tmp_path, ac.EndRun(exit_code=96, reason="stopped"))
    assert printed("rm", run, 10, "--yes").endswith("removed\n")
    claim_epoch(str(run), "test")
    (line,) = refused(checkpoints("rm", run, 30, "--yes"))
    assert line.startswith("whether a run is live cannot be known")


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("ls", "nosuch://x"), "nosuch://x: no file system for nosuch://; use a path, s3:// or the like"),
        (("ls", "{tmp}/nothing"), "{tmp}/nothing: there is no run and no checkpoint; name a run directory (run.url)"),
        (("verify", "{run}", 11), "{run}: no checkpoint of step 11 is committed; there are 10, 20, 30"),
        (("verify", "{run}", 10, "--all"), "--all: verifies every step; leave out 10, or --all"),
        (("verify", "{run}", 20), "{run}: checkpoints/commits/step-00000020.json: not a commit record"),
        (("diff", "{run}@11", "{run}"), "{run}: no checkpoint of step 11 is committed; there are 10, 20, 30"),
        (("diff", "{run}", "{tmp}/nothing@3"), "{tmp}/nothing: there is no run and no checkpoint"),
        (("reshard-plan", "{run}", "--mesh", "tp=x"), "--mesh tp=x: write degrees of pp, dp_replicate, dp_shard, tp"),
        (("reshard-plan", "{run}", "--mesh", "tp=2,tp=2"), "--mesh tp=2,tp=2: write degrees of"),
        (("reshard-plan", "{run}", "--mesh", "ep=2"), "--mesh ep=2: write degrees of"),
        (("reshard-plan", "{run}", "--mesh", "pp=0"), "--mesh pp=0: pp must be 1 or more"),
        (("export", "{run}", "--to", "{run}"), "--to {run}: is not empty (checkpoints, run.json): nothing is"),
        (("export", "{run}", "--to", "no://x"), "no://x: no file system for no://"),
        (("export", "{run}", "--to", "{tmp}/o", "--dtype", "int8"), "--dtype int8: choose bfloat16 or float32"),
        (("export", "{run}", "--to", "{tmp}/o", "--model", "{tmp}/no.toml"), "{tmp}/no.toml: cannot be read"),
        (("import", "{tmp}/nothing", "--to", "{tmp}/new"), "{tmp}/nothing: there is no config.json; name the folder"),
        (("import", "{tmp}/nothing", "--to", "no://x"), "no://x: no file system for no://"),
        (("rm", "{run}"), "STEP: name the steps to remove, or give --leftovers"),
        (("rm", "{run}", 11), "{run}: no checkpoint of step 11 is committed; there are 10, 20, 30"),
        (("pin", "{run}", 11, "--why", "x"), "{run}: no checkpoint of step 11 is committed; there are 10, 20, 30"),
        (("pin", "{run}", 10, "--why", " "), "--why: is empty"),
        (("unpin", "{run}", 11), "{run}: step 11 is not pinned; pinned are none"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(run, tmp_path, arguments, complaint):
    def filled(text: Any) -> str:
        return str(text).replace("{tmp}", str(tmp_path)).replace("{run}", str(run))

    (line,) = refused(checkpoints(*map(filled, arguments)))
    assert line.startswith(filled(complaint)), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_model_is_not_imported_over_a_run_or_another_model(run, tmp_path):
    printed("export", run, "--to", tmp_path / "hf")
    (line,) = refused(checkpoints("import", tmp_path / "hf", "--to", run))
    assert line == f"--to {run}: there are checkpoints already; import into a run directory of its own"
    started = tmp_path / "started"
    began(started, tmp_path)
    (line,) = refused(checkpoints("import", tmp_path / "hf", "--to", started))
    assert line == f"--to {started}: a run was started there; import into a run directory of its own"
    new = tmp_path / "new"
    printed("import", tmp_path / "hf", "--to", new)
    (line,) = refused(checkpoints("import", tmp_path / "hf", "--to", new))
    assert line == f"--to {new}: there are checkpoints already; import into a run directory of its own"
    printed("export", new, "--to", tmp_path / "still-known")


@pytest.mark.parametrize("command", [("ls",), ("verify",), ("rm", "1"), ("pin", "1", "--why", "x")], ids=lambda c: c[0])
def test_credentials_in_a_url_are_not_printed(command):
    result = checkpoints(command[0], "ftp://user:sesame@localhost:1/run", *command[1:])
    assert result.exit_code == 2 and "sesame" not in result.output and "ftp://***@localhost:1/run" in result.stderr


def test_the_command_needs_no_torch(run: Path) -> None:
    code = (
        "import sys\nfrom orchestrator.cli import app\nimport orchestrator.checkpoints_content\n"
        f"try:\n    app(['checkpoints', 'ls', {str(run)!r}])\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
