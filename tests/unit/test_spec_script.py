"""[script]: a job whose program is the user's own, and the command that builds one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator import cli, scripts
from orchestrator.core.events import OPEN_END
from orchestrator.preflight import problems_here
from orchestrator.runtime.nodes import bundle_of
from orchestrator.simulate import profile, scenario
from orchestrator.spec import JobSpec, SpecError, parse
from trainer.contract import ParallelConfig, ScriptConfig


def script(**sections: Any) -> dict[str, Any]:
    document = {"run": {"name": "own"}, "script": {"command": ["python", "train.py", "--lr", "1e-3"]}}
    return document | sections


def refused(document: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as error:
        parse(document)
    return str(error.value)


def test_a_script_fills_nodes_with_ranks_of_their_own() -> None:
    spec = parse(script(script={"command": ["train.py"], "nodes": 3}, cluster={"slots_per_node": 4, "spares": 1}))
    layout = spec.layout
    assert (layout.slots, layout.nodes, layout.spares, layout.shrinks_to) == (12, 3, 1, ())
    assert (layout.pp, layout.dp_replicate, layout.tp) == (1, 1, 1), "nobody's state is taken for another's"
    assert spec.total_steps == OPEN_END
    assert bundle_of(spec) == {"CPU": 4.0}
    assert parse(script()).layout.slots == 1


def test_the_effective_document_is_a_job_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = parse(script())
    assert spec.script.folder == str(tmp_path)
    assert (spec.recovery.stall_floor_s, spec.recovery.collective_timeout_s) == (60, 1800)
    monkeypatch.chdir("/")
    again = parse(json.loads(json.dumps(spec.document())))
    assert again == spec


def test_patience_that_is_set_stays() -> None:
    assert parse(script(recovery={"stall_floor_s": 7})).recovery.stall_floor_s == 7
    assert parse({"run": {"name": "llama"}}).recovery.stall_floor_s == 4.5


@pytest.mark.parametrize(
    ("command", "target"),
    [
        (["python", "a.py", "x"], ("a.py", "x")),
        (["/usr/bin/python3.11", "-m", "a.b"], ("-m", "a.b")),
        (["a.py"], ("a.py",)),
        (["python"], ()),
        (["pythonic.py"], ("pythonic.py",)),
    ],
)
def test_the_interpreter_is_left_out(command: list[str], target: tuple[str, ...]) -> None:
    assert ScriptConfig(command=tuple(command)).target == target


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"script": {"command": ["python"]}}, "names no script"),
        ({"script": {"command": ["python", "-m"]}}, "names no script"),
        ({"script": {"command": ["torchrun", "--nproc-per-node=2", "a.py"]}}, "takes torchrun's place"),
        ({"script": {"command": ["python", "-m", "torch.distributed.run", "a.py"]}}, "takes torchrun's place"),
        ({"script": {"command": ["python", "-u", "a.py"]}}, "options of the interpreter"),
        ({"script": {"command": ["bash", "run.sh"]}}, "bash must be a Python script"),
        ({"script": {"command": "python a.py"}}, "script.command"),
        ({"script": {"command": ["a.py"], "nodes": 0}}, "script.nodes = 0: must be at least 1"),
        ({"script": {"nodes": 2}}, "script.nodes: is for a script"),
        ({"script": {"command": ["a.py"], "args": []}}, "script.args: there is no such field"),
        ({"run": {"name": "own", "steps": 5}}, "run.steps = 5: is the Llama trainer's"),
        ({"model": {"dim": 128}}, r"[model]: is the Llama trainer's"),
        ({"parallel": {"tp": 2}}, r"[parallel]: is the Llama trainer's"),
        ({"audit": {"at_rest": False}}, r"[audit]: is the Llama trainer's"),
    ],
)
def test_what_cannot_be_is_named(sections: dict[str, Any], said: str) -> None:
    assert said in refused(script(**sections))


def test_a_command_is_a_job_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = scripts.spec_of_command(
        ["python", "My Train.py"], overrides=["checkpoint.keep=5"], nodes=2, procs_per_node=4
    )
    assert spec.run.name.startswith("my-train-")
    assert spec.parallel == ParallelConfig(dp_shard=8)
    assert spec.checkpoint.keep == 5
    assert spec.run.url == str(tmp_path / "runs" / spec.run.name)
    named = scripts.spec_of_command(["-m", "pkg.main"], overrides=[], name="mine")
    assert (named.run.name, named.layout.slots) == ("mine", 1)


def test_a_file_has_what_the_command_does_not_say(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('[run]\nname = "own"\n[script]\ncommand = ["a.py"]\nnodes = 3\n[cluster]\nspares = 1\n')
    spec = scripts.spec_of_command([], file=str(file), overrides=[])
    assert (spec.script.command, spec.layout.nodes, spec.cluster.spares) == (("a.py",), 3, 1)
    spec = scripts.spec_of_command(["b.py", "-x"], file=str(file), overrides=["script.nodes=4"], nodes=2)
    assert (spec.script.command, spec.layout.nodes, spec.run.name) == (("b.py", "-x"), 2, "own")
    with pytest.raises(SpecError, match="no script: give its command behind --"):
        scripts.spec_of_command([], overrides=[])


def local(folder: Path, command: list[str]) -> list[str]:
    sections = {
        "run": {"name": "own", "url": str(folder / "run")},
        "script": {"command": command, "folder": str(folder)},
        "cluster": {"log_dir": str(folder / "logs")},
    }
    return problems_here(parse(sections), resume=False)


def test_a_script_is_looked_for_before_anything_is_taken(tmp_path: Path) -> None:
    assert "code/train.py is not there" in local(tmp_path, ["python", "code/train.py"])[0]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").touch()
    assert local(tmp_path, ["python", "code/train.py"]) == []
    (tmp_path / "code" / "trainer.py").touch()
    (said,) = local(tmp_path, ["python", "code/train.py"])
    assert "would not be found by `import trainer`" in said
    assert local(tmp_path, ["python", "-m", "json"]) == []
    assert "script.folder" in local(tmp_path / "nowhere", ["a.py"])[-1]


def test_commands_tell_of_a_script(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('[run]\nname = "own"\n[script]\ncommand = ["python", "a.py"]\nnodes = 3\n')
    shown = CliRunner().invoke(cli.app, ["spec", "check", str(file)])
    assert "3 slots on 3 nodes of 1, 0 spares, python a.py to" in shown.output
    refused = CliRunner().invoke(cli.app, ["run", "--nodes", "2", "--", "bash", "x.sh"])
    assert refused.exit_code == 2
    assert "bash must be a Python script" in refused.output


def test_it_is_not_simulated() -> None:
    spec: JobSpec = parse(script())
    with pytest.raises(SpecError, match="not known here"):
        scenario.of_spec(spec, profile.load_profile("shepherd"), profile.load_failures("llama3"), days=1, seed=0)
