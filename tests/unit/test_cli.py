"""The command without a cluster: what it prints, and what it refuses, in a line for each thing to mend, before Ray."""

from __future__ import annotations

import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from click.testing import Result
from typer.testing import CliRunner

from orchestrator import demo, preflight
from orchestrator.cli import EXIT_REFUSED, app
from orchestrator.runtime import driver, journal
from orchestrator.runtime.nodes import HEAD_RESOURCE
from orchestrator.spec import load, parse

ROOT = Path(__file__).resolve().parents[2]


def shepherd(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(result: Result) -> list[str]:
    """The complaints of a command that was refused, without their common "error:"."""
    assert result.exit_code == EXIT_REFUSED, result
    assert isinstance(result.exception, SystemExit) and result.stdout == ""
    lines = str(result.stderr).splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), result.stderr
    return [line.removeprefix("error: ") for line in lines]


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    """Nothing of Ray answers, and a command that gets as far as Ray has gone too far."""

    def no_cluster(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    def too_far(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the command has touched Ray")

    monkeypatch.setattr(ray, "init", no_cluster)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for name in ("start", "find", "poll"):
        monkeypatch.setattr(driver, name, too_far)
    connect = driver.connect
    connections: list[str | None] = []
    monkeypatch.setattr(driver, "connect", lambda address: (connections.append(address), connect(address)))
    return connections


@pytest.fixture
def job(tmp_path) -> Callable[..., str]:
    """Writes a job's file, with the lines given added to it, and returns its path."""

    def write(*lines: str, url: str = "") -> str:
        path = tmp_path / "job.toml"
        run = ["[run]", 'name = "job"', f'url = "{url or tmp_path / "run"}"']
        path.write_text("\n".join([*run, "[model]", 'preset = "tiny"', *lines]))
        return str(path)

    return write


# --- spec ---


def test_spec_check_says_what_will_run(job, tmp_path):
    result = shepherd(
        "spec", "check", job("[parallel]", "dp_shard = 4", "[cluster]", "spares = 2"), "--set", "run.steps=7"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (f"{tmp_path}/job.toml: ok. 4 slots on 4 nodes of 1, 2 spares, 7 steps to {tmp_path}/run\n")
    shrinks = shepherd("spec", "check", job("[parallel]", "dp_replicate = 4", "pp = 2", "microbatches = 2"))
    assert "8 slots on 8 nodes of 1, 0 spares, at least 2 nodes when some are lost, 1000 steps" in shrinks.stdout
    fallback = ("--set", "recovery.fallback_meshes=[{pp = 2}, {}]")
    reshards = shepherd("spec", "check", job("[parallel]", "pp = 4", "microbatches = 4"), *fallback)
    assert "4 slots on 4 nodes of 1, 0 spares, at least 1 nodes when some are lost, 1000 steps" in reshards.stdout


def test_spec_show_prints_the_whole_document_which_is_the_same_job(job):
    file = job()
    result = shepherd("spec", "show", file, "--set", "optimizer.lr=0.125", "--set", "model.n_layers=3")
    assert (result.exit_code, result.stderr) == (0, "")
    shown = tomllib.loads(result.stdout)
    assert (shown["optimizer"]["lr"], shown["model"]["n_layers"], shown["model"]["dim"]) == (0.125, 3, 64)
    assert parse(shown) == load(file, ["optimizer.lr=0.125", "model.n_layers=3"])
    again = Path(file).with_name("again.toml")
    again.write_text(result.stdout)
    assert shepherd("spec", "show", str(again)).stdout == result.stdout


@pytest.mark.parametrize("command", [("spec", "check"), ("spec", "show"), ("train",), ("doctor",)])
@pytest.mark.parametrize(
    ("arguments", "complaints"),
    [
        ((), ["run.steps = 0: Input should be greater than or equal to 1"]),
        (
            ("--set", "run.steps=5", "--set", "run.stepz=1"),
            ["run.stepz: there is no such field; valid here: name, url"],
        ),
        (("--set", "steps"), ["--set steps: write section.key=value, as in --set run.steps=200"]),
        (("--set", "run.steps=5", "--set", "model.preset=[x]"), ["model.preset = '[x]': there is no such preset"]),
        (("--set", "run.seed=-1"), ["run.steps = 0: ", "run.seed = -1: "]),
    ],
)
def test_a_job_that_cannot_run_is_refused_in_a_line_for_each_reason(job, command, arguments, complaints):
    file = job()
    Path(file).write_text(Path(file).read_text().replace('name = "job"', 'name = "job"\nsteps = 0'))
    lines = refused(shepherd(*command, file, *arguments))
    assert len(lines) == len(complaints)
    assert all(line.startswith(start) for line, start in zip(lines, complaints, strict=True)), lines


@pytest.mark.parametrize("command", [("spec", "check"), ("spec", "show"), ("train",), ("doctor",)])
def test_a_file_that_is_not_there_is_refused(command, tmp_path):
    (line,) = refused(shepherd(*command, str(tmp_path / "none.toml")))
    assert line.startswith(f"{tmp_path}/none.toml: cannot be read: ")
    (line,) = refused(shepherd(*command, "nosuch://bucket/job.toml"))
    assert line.startswith("nosuch://bucket/job.toml: cannot be read: ")


def test_markup_in_a_complaint_is_printed_as_it_is(job):
    (line,) = refused(shepherd("spec", "check", job(), "--set", 'run.name="[red]x[/]"'))
    assert line.startswith("run.name = '[red]x[/]': use 1 to 40 of a-z")


# --- train: refused before Ray is touched ---


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (
            ["[data]", 'corpus = "/nowhere/*.txt"'],
            "data.corpus = '/nowhere/*.txt': nothing is there; give a folder, a glob",
        ),
        (["[data]", 'corpus = "/nowhere"'], "data.corpus = '/nowhere': nothing is there; give a folder, a glob"),
        (["[data]", 'corpus = "nosuch://texts"'], "data.corpus = 'nosuch://texts': cannot be read: "),
    ],
)
def test_train_without_what_it_needs_is_refused(job, lines, complaint, without_ray):
    (line,) = refused(shepherd("train", job(*lines)))
    assert line.startswith(complaint)
    assert without_ray == []


@pytest.fixture
def on_the_head(monkeypatch):
    """The command is connected, and runs where the controller and its metrics would be: on a node of that name."""
    monkeypatch.setattr(driver, "connect", lambda address: None)
    monkeypatch.setattr(preflight, "_end_leftovers", lambda spec: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "here", "Resources": {HEAD_RESOURCE: 1.0}, "Alive": True}])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))


@pytest.mark.parametrize("bind", ["192.0.2.1", "not an address"])
def test_train_with_metrics_that_cannot_be_there_is_refused(job, bind, on_the_head):
    (line,) = refused(shepherd("train", job("[metrics]", "port = 9", f'bind = "{bind}"')))
    assert line.startswith(f"metrics.port = 9: cannot be bound on {bind}: ")


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_train_on_a_port_that_is_taken_on_the_head_is_refused(job, family, on_the_head, monkeypatch):
    bind = "127.0.0.1" if family == socket.AF_INET else "::1"
    try:
        taken = socket.create_server((bind, 0), family=family)
    except OSError as e:
        pytest.skip(f"no {bind} here: {e}")
    monkeypatch.setattr(preflight, "eligible", lambda spec: [])
    monkeypatch.setattr(preflight, "RELEASE_DEADLINE_S", 0.0)
    with taken:
        port = taken.getsockname()[1]
        metrics = ["[metrics]", f"port = {port}", f'bind = "{bind}"']
        (line,) = refused(shepherd("train", job(*metrics)))
        assert line.startswith(f"metrics.port = {port}: cannot be bound on {bind}: Address already in use")
        assert line.endswith("; choose another, or 0 for any")
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "elsewhere"))
        (line,) = refused(shepherd("train", job(*metrics)))
        assert line.startswith("not enough nodes: "), "what is taken here says nothing about the head"


@pytest.mark.parametrize("url", ["/proc/run", "/dev/null/run"])
def test_train_to_a_folder_that_cannot_be_written_is_refused(job, url, without_ray):
    (line,) = refused(shepherd("train", job(url=url)))
    assert f"run.url = {url!r}" in line or f"run.url {url!r}" in line
    assert without_ray == []


def test_train_to_a_store_that_cannot_hold_a_run_is_refused(job, without_ray):
    (line,) = refused(shepherd("train", job(url="reference://run")))
    assert line.startswith("run.url 'reference://run' cannot hold a run: ")
    assert without_ray == []


def test_a_run_is_resumed_only_when_it_is_there_and_only_when_asked(job, tmp_path, without_ray):
    url = str(tmp_path / "run")
    (line,) = refused(shepherd("train", job(), "--resume"))
    assert line == f"run.url = {url!r}: there is no run to resume; start it without --resume"
    journal.claim_epoch(url, "test")
    (line,) = refused(shepherd("train", job()))
    assert line == f"run.url = {url!r}: a run was started there; go on with it by --resume, or choose another run.url"
    assert without_ray == []
    (line,) = refused(shepherd("train", job(), "--resume", "--address", "head:1"))
    assert line.startswith("no Ray cluster answers: ")
    assert without_ray == ["head:1"]


def test_train_says_all_that_is_missing_at_once(job, without_ray):
    lines = refused(shepherd("train", job("[data]", 'corpus = "/nowhere"'), "--resume"))
    assert [line.split(" ")[0] for line in lines] == ["run.url", "data.corpus"]
    assert without_ray == []


def test_a_job_that_lacks_nothing_comes_to_ray_and_leaves_no_run_behind(job, tmp_path, without_ray):
    (tmp_path / "text.txt").write_text("x")
    (line,) = refused(shepherd("train", job("[data]", f'corpus = "{tmp_path}/*.txt"')))
    assert line == (
        "no Ray cluster answers: start one with `ray start --head`, or name one by --address or RAY_ADDRESS "
        "(Could not find any running Ray instance.)"
    )
    assert without_ray == [None]
    assert list((tmp_path / "run").iterdir()) == [], "the probe is gone, and no epoch was taken"


def test_doctor_without_a_cluster_is_refused(job, without_ray):
    (line,) = refused(shepherd("doctor", job(), "--address", "head:1"))
    assert line.startswith("no Ray cluster answers: ")
    assert without_ray == ["head:1"]


@pytest.mark.parametrize("arguments", [("status", "job"), ("stop", "job"), ("stop", "job", "--now")])
def test_commands_for_an_active_run_say_that_there_is_no_cluster(arguments, without_ray):
    (line,) = refused(shepherd(*arguments))
    assert line.startswith("no Ray cluster answers: ")
    assert without_ray == [None]


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001", "local"])
@pytest.mark.parametrize("given", ["option", "environment"])
def test_what_is_no_address_of_a_cluster_is_refused(address, given, monkeypatch):
    if given == "environment":
        monkeypatch.setenv("RAY_ADDRESS", address)
    (line,) = refused(shepherd("status", "job", *(("--address", address) if given == "option" else ())))
    assert line.startswith(f"--address or RAY_ADDRESS is '{address}': give the HOST:PORT")


def test_whatever_ray_says_against_a_connection_is_a_refusal(monkeypatch):
    def other_version(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with Ray 1.0")

    monkeypatch.setattr(ray, "init", other_version)
    (line,) = refused(shepherd("status", "job", "--address", "head:6379"))
    assert "'head:6379'" in line and "RuntimeError: Version mismatch" in line


def test_a_controller_that_is_busy_is_no_other_refusal(monkeypatch):
    def busy(controller: Any) -> None:
        raise ray.exceptions.GetTimeoutError("Get timed out: some object(s) not ready.")

    monkeypatch.setattr(driver, "connect", lambda address: None)
    monkeypatch.setattr(driver, "find", lambda run: run)
    monkeypatch.setattr(driver, "poll", busy)
    (line,) = refused(shepherd("status", "job"))
    assert line.startswith("the run's controller does not answer: it is busy")


def test_an_outcome_that_cannot_be_written_is_refused(job, tmp_path):
    (tmp_path / "file").touch()
    result = shepherd("plan", job(), "--json", str(tmp_path / "file" / "plan.json"))
    assert result.exit_code == EXIT_REFUSED and "error: [Errno" in result.stderr


def test_a_script_is_resumed_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = refused(shepherd("run", "--resume", "--", "python", "train.py"))
    assert line.startswith("--resume: give the --name of the run")


# --- the process ---


def test_a_traceback_has_no_credentials():
    code = """
import sys
from orchestrator import cli
@cli.app.command()
def fail(): raise RuntimeError("no bucket at s3://key:planted@bucket/run")
sys.argv = ["shepherd", "fail"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert done.stderr.endswith("RuntimeError: no bucket at s3://***@bucket/run\n") and "planted" not in done.stderr


def test_the_module_is_the_command():
    """What `ray job submit` runs; a refusal has its exit code and no traceback."""
    command = [sys.executable, "-P", "-m", "orchestrator", "spec", "check", "none.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (EXIT_REFUSED, "")
    assert done.stderr.startswith("error: none.toml: cannot be read: ") and done.stderr.count("\n") == 1


def test_the_demo_removes_only_what_a_demo_has_made(tmp_path):
    (tmp_path / "logs").mkdir()
    with pytest.raises(driver.RunError, match=r"logs is there, and no demo has made it"):
        demo.make_anew(tmp_path)
    assert (tmp_path / "logs").is_dir()
    demo.make_anew(tmp_path / "new")
    (tmp_path / "new" / "untouched").mkdir()
    demo.make_anew(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [demo.MARKER]
