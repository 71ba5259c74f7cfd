"""The doctor's judgement of facts, and its facts about a machine whose limits the tests choose."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator import doctor, doctor_node
from orchestrator.doctor_judge import Facts, Finding, Silent, judge, merged
from orchestrator.doctor_node import Limits, Memory, Place
from orchestrator.need import need_of
from orchestrator.runtime import driver
from orchestrator.spec import JobSpec, parse

GIB = 1024**3


def spec(**sections: dict[str, Any]) -> JobSpec:
    """Two nodes of two slots."""
    document: dict[str, dict[str, Any]] = {
        "run": {"name": "r", "url": "/runs/r"},
        "model": {"preset": "llama2_7b"},
        "parallel": {"dp_shard": 4},
        "cluster": {"slots_per_node": 2},
    }
    for section, fields in sections.items():
        document.setdefault(section, {}).update(fields)
    return parse(document)


NEED = need_of(spec())
PLACE = Place(path="/p", type="tmpfs", size_bytes=4000 * GIB, free_bytes=3000 * GIB, writable=True, device="")
MEMORY = Memory(total_bytes=4000 * GIB, available_bytes=3000 * GIB, limit_bytes=None, limit_free_bytes=None, pool="")
LIMITS = Limits(files=65536, files_hard=65536, processes=None, threads=9, cgroup_tasks=None, cgroup_tasks_now=0)
VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "source": "abc"}
CLASS = {"torch": "2.13.0", "cpu_capability": "AVX512"}
NODES = ("a", "b", "c")


def healthy() -> dict[str, dict[str, Any]]:
    """Three nodes on machines of their own, of which nothing is to be said."""
    places = ({node: dataclasses.replace(PLACE, device=node) for node in NODES} for _ in range(4))
    return {
        "start": dict.fromkeys(NODES, "host"),
        "ram_dir": next(places),
        "log_dir": next(places),
        "cache_dir": next(places),
        "run_dir": next(places),
        "memory": {node: dataclasses.replace(MEMORY, pool=node) for node in NODES},
        "limits": dict.fromkeys(NODES, LIMITS),
        "metrics_port": {"a": ""},
        "dial": {node: {peer: "" for peer in NODES if peer != node} for node in NODES},
        "clock": dict.fromkeys(NODES, (0.01, 0.001)),
        "versions": dict.fromkeys(NODES, VERSIONS),
        "numeric": {node: {"numeric_class": CLASS, "devices": []} for node in NODES},
        "sees": dict.fromkeys(NODES, True),
        "probe": dict.fromkeys(NODES, None),
    }


def facts(answers: dict[str, dict[str, Any]], **changes: Any) -> Facts:
    whole: dict[str, Any] = {"here": "a", "head": "a", "candidates": NODES, "free": 3, "answers": answers}
    return Facts(**whole | changes)


def bad(job: JobSpec, answers: dict[str, dict[str, Any]], **changes: Any) -> list[Finding]:
    return [finding for finding in judge(job, facts(answers, **changes)) if finding.level != "ok"]


def sick(check: str, answer: Any, job: JobSpec | None = None) -> Finding:
    """The one finding when node b's answer to one question is this."""
    answers = healthy()
    answers[check] = answers[check] | {"b": answer}
    (finding,) = bad(job or spec(), answers)
    assert finding.nodes == ("b",)
    assert finding.advice, "every finding says what to do"
    return finding


def test_a_healthy_cluster_is_ready():
    found = judge(spec(), facts(healthy()))
    assert {f.level for f in found} == {"ok"}
    assert {f.check for f in found} == {
        "job", "nodes", "shared memory", "memory", "open files", "processes", "metrics port", "connections", "clock",
        "versions", "shared run.url", "run.url", "disk", "token",
    }  # fmt: skip
    assert doctor.verdict(found) == "ok"


@pytest.mark.parametrize(
    ("share", "level"), [(0.99, "problem"), (1.01, "warning"), (1.19, "warning"), (1.21, None)], ids=str
)
def test_shared_memory_is_held_against_the_snapshots(share, level):
    answers = healthy()
    answers["ram_dir"]["b"] = dataclasses.replace(PLACE, device="b", free_bytes=int(share * NEED.ram_bytes))
    found = bad(spec(), answers)
    assert [(f.check, f.level, f.nodes) for f in found] == ([("shared memory", level, ("b",))] if level else [])
    assert all("--shm-size" in f.advice and "cluster.ram_dir" in f.advice for f in found)


def test_nodes_on_one_machine_share_its_memory():
    answers = healthy()
    one = dataclasses.replace(PLACE, free_bytes=int(1.5 * NEED.ram_bytes))
    answers["ram_dir"] = dict.fromkeys(NODES, one)
    (finding,) = bad(spec(), answers)
    assert (finding.check, finding.level, finding.nodes) == ("shared memory", "problem", NODES)
    assert finding.need.endswith("for 2 nodes on one machine"), "two of the three would be taken"


def test_snapshots_on_a_disk_are_warned_of():
    finding = sick("ram_dir", dataclasses.replace(PLACE, device="b", type="ext4"))
    assert (finding.check, finding.level) == ("shared memory", "warning") and "tmpfs" in finding.advice


def test_a_folder_that_cannot_be_written_is_a_problem():
    finding = sick("ram_dir", dataclasses.replace(PLACE, device="b", writable=False))
    assert (finding.check, finding.level) == ("shared memory", "problem") and "not writable" in finding.seen
    for folder in ("log_dir", "cache_dir", "run_dir"):
        finding = sick(folder, dataclasses.replace(PLACE, device="b", writable=False))
        assert (finding.check, finding.level) == ("disk", "problem")


def test_the_tighter_of_machine_and_cgroup_counts():
    little = int(0.5 * NEED.memory_bytes)
    finding = sick("memory", dataclasses.replace(MEMORY, pool="b", available_bytes=little))
    assert (finding.check, finding.level) == ("memory", "problem") and finding.seen.endswith("available")
    boxed = dataclasses.replace(MEMORY, pool="b", limit_bytes=2 * little, limit_free_bytes=little)
    finding = sick("memory", boxed)
    assert (finding.check, finding.level) == ("memory", "problem") and "cgroup's limit" in finding.seen


def test_too_few_open_files():
    finding = sick("limits", dataclasses.replace(LIMITS, files=NEED.files - 1, files_hard=NEED.files - 1))
    assert (finding.check, finding.level) == ("open files", "problem")
    assert "ulimit -n" in finding.advice and "hard limit" in finding.advice
    soft = sick("limits", dataclasses.replace(LIMITS, files=NEED.files - 1))
    assert "hard limit" not in soft.advice


def test_too_few_processes():
    finding = sick("limits", dataclasses.replace(LIMITS, processes=NEED.threads + 8))
    assert (finding.check, finding.level) == ("processes", "problem") and "RLIMIT_NPROC" in finding.seen
    roomy = dataclasses.replace(LIMITS, processes=10**6, cgroup_tasks=NEED.threads + 99, cgroup_tasks_now=100)
    finding = sick("limits", roomy)
    assert "pids cgroup" in finding.seen and "pids.max" in finding.advice


def test_a_port_that_is_taken():
    finding = bad(spec(metrics={"port": 9464}), healthy() | {"metrics_port": {"a": "Address already in use"}})[0]
    assert (finding.check, finding.level, finding.nodes) == ("metrics port", "problem", ("a",))
    assert "127.0.0.1:9464: Address already in use" in finding.seen


def test_nodes_that_do_not_reach_each_other():
    finding = sick("dial", {"a": "", "c": "10.0.0.3: timed out"})
    assert (finding.check, finding.level) == ("connections", "problem")
    assert "cannot reach c (10.0.0.3: timed out)" in finding.seen


@pytest.mark.parametrize(
    ("offset_s", "error_s", "level"),
    [(0.9, 0.0, None), (1.5, 0.0, "warning"), (-1.5, 0.1, "warning"), (1.5, 0.6, None), (-400.0, 0.1, "problem")],
)
def test_a_clock_is_held_against_what_is_certain(offset_s, error_s, level):
    answers = healthy()
    answers["clock"] = answers["clock"] | {"b": (offset_s, error_s)}
    found = [(f.check, f.level, f.nodes) for f in bad(spec(), answers)]
    assert found == ([("clock", level, ("b",))] if level else [])


@pytest.mark.parametrize("name", sorted(VERSIONS))
def test_the_odd_version_is_named_with_the_usual_one(name):
    finding = sick("versions", VERSIONS | {name: "other"})
    assert (finding.check, finding.level) == ("versions", "problem")
    assert finding.seen == f"{name} other" and finding.need.startswith(f"{name} {VERSIONS[name]}")


def test_another_instruction_set_is_another_numeric_class():
    finding = sick("numeric", {"numeric_class": CLASS | {"cpu_capability": "AVX2"}, "devices": []})
    assert finding.seen == "cpu_capability AVX2"


def test_a_folder_that_is_not_shared():
    finding = sick("sees", False)
    assert (finding.check, finding.level) == ("shared run.url", "problem") and "local path" in finding.advice
    finding = sick("sees", False, spec(run={"name": "r", "url": "s3://bucket/r"}))
    assert "credentials" in finding.advice


def test_a_store_that_refuses_is_named_with_its_own_words():
    finding = sick("probe", Silent("StoreError: run.url cannot hold a run: no such bucket"))
    assert (finding.check, finding.level) == ("run.url", "problem") and "no such bucket" in finding.seen


def test_space_for_the_checkpoints():
    keep = spec().checkpoint.keep + 3
    place = dataclasses.replace(PLACE, device="b", free_bytes=keep * NEED.checkpoint_bytes - 1)
    finding = sick("run_dir", place)
    assert (finding.check, finding.level) == ("disk", "problem") and "checkpoint.keep" in finding.advice
    place = dataclasses.replace(PLACE, device="b", free_bytes=1)
    assert sick("log_dir", place).level == "warning", "a full log costs lines, not the run"


def test_a_remote_store_needs_room_for_a_part_beside_it():
    remote = spec(run={"name": "r", "url": "s3://bucket/r"})
    answers = healthy()
    answers["temporary"] = {"b": dataclasses.replace(PLACE, free_bytes=NEED.part_bytes - 1)}
    del answers["run_dir"]
    (finding,) = bad(remote, answers)
    assert (finding.check, finding.level, finding.nodes) == ("disk", "problem", ("b",))


@pytest.mark.parametrize(("n", "free", "said"), [(2, 80, None), (1, 80, "driver"), (2, 1, "holds the devices")])
def test_devices(n, free, said):
    job = spec(cluster={"slots_per_node": 2, "device": "cuda"})
    devices = [{"name": "H100", "total_bytes": 80 * GIB, "free_bytes": free * GIB}] * n
    answers = healthy()
    answers["numeric"] = {
        node: {
            "numeric_class": CLASS,
            "devices": devices if node == "b" else [{"name": "H100", "free_bytes": 80 * GIB}] * 2,
        }
        for node in NODES
    }
    found = bad(job, answers)
    assert len(found) == (said is not None)
    for finding in found:
        assert (finding.check, finding.level, finding.nodes) == ("cuda", "problem", ("b",)) and said in finding.advice


@pytest.mark.parametrize(
    ("free", "spares", "level"), [(2, 0, None), (1, 0, "problem"), (2, 1, "warning"), (3, 1, None)]
)
def test_enough_nodes(free, spares, level):
    job = spec(cluster={"slots_per_node": 2, "spares": spares})
    found = [(f.check, f.level) for f in bad(job, healthy(), free=free)]
    assert found == ([("nodes", level)] if level else [])


def test_silence_is_a_finding_and_hides_nothing():
    answers = healthy()
    answers["memory"]["b"] = answers["limits"]["b"] = Silent("no answer in time")
    answers["ram_dir"]["c"] = dataclasses.replace(PLACE, device="c", free_bytes=0)
    found = {f.check: f for f in bad(spec(), answers)}
    assert set(found) == {"answers", "shared memory"}
    assert found["answers"].nodes == ("b",)
    assert "memory: no answer in time" in found["answers"].seen and "limits: " in found["answers"].seen


def test_a_cluster_that_answers_nothing_is_judged():
    (finding, *_) = bad(spec(), {"start": dict.fromkeys(NODES, Silent("dead"))})
    assert finding.check == "answers"


def test_what_train_would_refuse_and_a_run_that_is_active():
    found = bad(spec(), healthy(), local=("run.seed = 1: the run was started with 0",), active=True, token="mode 644")
    assert [(f.check, f.level) for f in found] == [("job", "problem"), ("job", "problem"), ("token", "problem")]
    assert "run.seed = 1" in found[0].seen and "shepherd stop" in found[1].advice


def test_equal_findings_are_one():
    one = Finding(check="c", level="ok", nodes=("a",), seen="s")
    assert merged([one, dataclasses.replace(one, nodes=("b",)), dataclasses.replace(one, seen="t")]) == [
        dataclasses.replace(one, nodes=("a", "b")),
        dataclasses.replace(one, seen="t"),
    ]


def test_the_outcome_as_json_and_as_a_table(capsys):
    found = judge(spec(), facts(healthy(), token="[red]mode[/] 644"))
    told = json.loads(json.dumps(doctor.document(spec(), found)))
    assert told["verdict"] == "problem"
    assert {"check", "level", "nodes", "seen", "need", "advice"} == set(told["findings"][0])
    doctor.show(spec(), found)
    out = capsys.readouterr().out
    assert "[red]mode[/] 644" in out and "not ready: 1 problems, 0 warnings" in out
    assert need_of(spec()).arithmetic[1] in out


# --- facts ---


def in_a_process(code: str, prefix: list[str] | None = None) -> Any:
    """What `code` prints as JSON, in a process whose limits are its own."""
    command = [*(prefix or []), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def can_mount() -> bool:
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True, check=False).returncode == 0


def test_a_tmpfs_that_is_too_small_is_seen(tmp_path):
    if not can_mount():
        pytest.skip("mounting a tmpfs needs root and a mount namespace")
    code = f"""
import dataclasses, json, subprocess
from orchestrator.doctor_node import place
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", {str(tmp_path)!r}], check=True)
print(json.dumps(dataclasses.asdict(place({str(tmp_path / "not" / "yet" / "there")!r}))))
"""
    place = Place(**in_a_process(code, ["unshare", "-m"]))
    assert (place.type, place.size_bytes, place.writable) == ("tmpfs", 1024**2, True)
    outside = doctor_node.place(str(tmp_path))
    assert outside.size_bytes > place.size_bytes and outside.device != place.device
    small = dataclasses.replace(place, device="b")
    assert sick("ram_dir", small).level == "problem"


def test_a_low_limit_of_open_files_is_seen():
    code = """
import dataclasses, json, resource
from orchestrator.doctor_node import limits
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
print(json.dumps(dataclasses.asdict(limits())))
"""
    found = Limits(**in_a_process(code))
    assert (found.files, found.files_hard) == (200, 300) and found.threads >= 1
    assert sick("limits", found).check == "open files"


def groups(root: Path, own: str, files: dict[str, object]) -> tuple[Path, Path]:
    """A tree of cgroup files, and this process's place in it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    (root / "own").write_text(own)
    return root, root / "own"


def test_limits_of_version_2_are_those_of_the_tightest_group(tmp_path):
    files = {
        "job/memory.max": 8 * 1024**2,
        "job/memory.current": 5 * 1024**2,
        "job/memory.stat": f"anon 1\ninactive_file {2 * 1024**2}",
        "job/task/memory.max": "max",
        "job/task/memory.current": 4 * 1024**2,
        "job/pids.max": 1000,
        "job/pids.current": 100,
        "job/task/pids.max": 500,
        "job/task/pids.current": 90,
    }
    root, own = groups(tmp_path, "0::/job/task\n", files)
    memory, limits = doctor_node.memory(root, own), doctor_node.limits(root, own)
    assert (memory.limit_bytes, memory.limit_free_bytes) == (8 * 1024**2, 5 * 1024**2), "cache can be dropped"
    assert (limits.cgroup_tasks, limits.cgroup_tasks_now) == (500, 90)


def test_limits_of_version_1(tmp_path):
    files = {
        "memory/box/memory.limit_in_bytes": 6 * 1024**2,
        "memory/box/memory.usage_in_bytes": 6 * 1024**2,
        "memory/box/memory.stat": f"total_inactive_file {1024**2}",
        "memory/memory.limit_in_bytes": 9223372036854771712,
        "memory/memory.usage_in_bytes": 1,
        "pids/box/pids.max": "max",
        "pids/box/pids.current": 7,
    }
    root, own = groups(tmp_path, "9:name=systemd:/\n4:cpu,memory:/box\n3:pids:/box\n0::/\n", files)
    (root / "cpu,memory").mkdir()
    memory, limits = doctor_node.memory(root, own), doctor_node.limits(root, own)
    assert (memory.limit_bytes, memory.limit_free_bytes) == (6 * 1024**2, 1024**2)
    assert limits.cgroup_tasks is None


def test_in_a_container_the_groups_own_folder_is_the_root(tmp_path):
    files = {"memory.max": 4096, "memory.current": 96, "memory.stat": "inactive_file 0"}
    root, own = groups(tmp_path, "0::/kubepods/pod1/box\n", files)
    assert doctor_node.memory(root, own).limit_free_bytes == 4000


def test_a_machine_without_groups_has_its_own_memory(tmp_path):
    memory = doctor_node.memory(tmp_path, tmp_path / "none")
    assert memory.limit_bytes is None and 0 < memory.available_bytes <= memory.total_bytes


def test_dialling_the_wrong_machine_is_noticed():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        threading.Thread(target=doctor_node._answer, args=(listener, b"right"), daemon=True).start()
        assert doctor_node.dial("127.0.0.1", port, b"right") == ""
        assert "another machine" in doctor_node.dial("127.0.0.1", port, b"wrong")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        assert "refused" in doctor_node.dial("127.0.0.1", nobody.getsockname()[1], b"right")


def test_the_numeric_class_of_a_node_is_that_of_its_workers():
    job = parse({"run": {"name": "r", "url": "/r"}, "model": {"preset": "tiny"}, "cluster": {"cpus_per_slot": 2}})
    answer = doctor_node.numeric(job)
    assert answer["devices"] == []
    assert {"torch", "python", "machine", "cpu_capability", "threads"} <= set(answer["numeric_class"])
    assert answer["numeric_class"]["threads"] == "2"


def test_a_tool_that_fails_says_why(monkeypatch):
    job = parse({"run": {"name": "r", "url": "/r"}, "model": {"preset": "tiny"}})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        doctor_node.numeric(job)


def test_who_else_may_read_the_token(tmp_path):
    job = parse({"run": {"name": "r", "url": "/r"}, "cluster": {"log_dir": str(tmp_path / "logs")}})
    assert doctor.token_problem(job) == ""
    path = driver.token_path(str(tmp_path / "logs"), "r")
    driver.draft_token(job, "secret").rename(path)
    (tmp_path / "file").touch()
    nowhere = parse({"run": {"name": "r", "url": "/r"}, "cluster": {"log_dir": str(tmp_path / "file" / "logs")}})
    with pytest.raises(driver.RunError, match=r"cluster\.log_dir = .*: the run's token cannot be kept there"):
        driver.draft_token(nowhere, "secret")
    assert doctor.token_problem(job) == ""
    path.chmod(0o640)
    assert "has mode 640" in doctor.token_problem(job)
    path.chmod(0o600)
    path.parent.chmod(0o777)
    assert "everybody can put another token there" in doctor.token_problem(job)
    path.parent.chmod(0o1777)
    assert doctor.token_problem(job) == ""


def test_what_hangs_here_is_left_behind():
    never = threading.Event()
    assert doctor._within(0.05, lambda: never.wait(60)) == Silent("no answer within 0.05 s")
    assert isinstance(doctor._within(5, lambda: 1 / 0), Silent)
    assert doctor._within(5, lambda: 7) == 7
    never.set()
