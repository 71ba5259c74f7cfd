"""`shepherd doctor` on a real cluster: ready as it is, and with a node that has about everything wrong with it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from conftest import Cluster
from herd import command, job, spec_file, wait_for

from orchestrator.localcluster import node_arguments

pytestmark = pytest.mark.timeout(300)


def examine(cluster: Cluster, file: Path, *options: str) -> tuple[int, dict[str, Any]]:
    with command("doctor", str(file), "--json", *options, RAY_ADDRESS=cluster.ray.address) as process:
        out, _ = process.communicate(timeout=200)
    return process.returncode, json.loads(out)


def actors() -> list[str]:
    """Doctors' processes on this machine."""
    commands = (" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
    return [c for c in commands if c.startswith("ray::NodeDoctor")]


def test_a_healthy_cluster_is_ready_and_nothing_is_left_on_it(
    cluster: Cluster, tmp_path: Path, memory_dir: Path
) -> None:
    document = job("healthy", tmp_path, cluster={"ram_dir": str(memory_dir)})
    document["run"]["url"] = f"file://{tmp_path}/healthy"
    file = spec_file(document, tmp_path / "s.toml")
    code, told = examine(cluster, file)
    assert (code, told["verdict"]) == (0, "ok"), [f for f in told["findings"] if f["level"] != "ok"]
    by_check = {finding["check"]: finding for finding in told["findings"]}
    assert len(by_check["versions"]["nodes"]) >= 5, "the four nodes and the head"
    assert "cpu_capability" in by_check["versions"]["seen"]
    assert by_check["connections"]["seen"].startswith("12 of 12"), "each of four nodes reaches the three others"
    assert by_check["nodes"]["seen"].startswith("4 nodes fit, 4 of them are free")
    rooms = {finding["seen"].partition(":")[0] for finding in told["findings"] if finding["check"] == "disk"}
    assert rooms == {"run.url", "cluster.log_dir", "data.cache_dir"}, "a local URL needs no room for uploads"
    wait_for(lambda: not actors(), 20, "the doctors to be gone")
    assert list((tmp_path / "healthy").iterdir()) == [], "nothing stays under run.url"


SICK = """
mount -t tmpfs -o size=2m none {ram}
mount -t tmpfs none {url}
ulimit -n 280
export ATEN_CPU_CAPABILITY=default
exec {ray} start --address={address} --num-cpus=2 --object-store-memory=100000000 --block \
  --min-worker-port=0 --max-worker-port=0 --node-manager-port={port}
"""


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def sick_node(cluster: Cluster, tmp_path: Path, memory_dir: Path) -> Iterator[str]:
    """One more node, in a mount namespace of its own; Ray's id of it."""
    folders = {"ram": memory_dir, "url": tmp_path / "sick"}
    folders["url"].mkdir()
    before = {node["NodeID"] for node in ray.nodes()}
    port = node_arguments(cpus=2)["node_manager_port"]
    script = SICK.format(**folders, ray=Path(sys.executable).with_name("ray"), address=cluster.ray.address, port=port)
    log = (tmp_path / "ray.log").open("w")
    process = subprocess.Popen(["unshare", "-m", "bash", "-ec", script], stdout=log, stderr=log, env=os.environ)
    family = psutil.Process(process.pid)
    try:

        def joined() -> str:
            assert process.poll() is None, (tmp_path / "ray.log").read_text()
            return next((n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in before), "")

        yield wait_for(joined, 60, "the sick node to join")
    finally:
        members = [family, *family.children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(members, timeout=20)
        for member in alive:
            member.kill()
        process.wait(timeout=10)
        log.close()


@pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0,
    reason="a node with mounts of its own needs root and mount namespaces",
)
def test_a_sick_node_is_named_with_all_that_it_has(
    cluster: Cluster, tmp_path: Path, memory_dir: Path, sick_node: str
) -> None:
    file = spec_file(job("sick", tmp_path, cluster={"ram_dir": str(memory_dir)}), tmp_path / "s.toml")
    code, told = examine(cluster, file)
    assert (code, told["verdict"]) == (1, "problem")
    found = [f for f in told["findings"] if f["level"] != "ok"]
    assert {f["check"]: f["level"] for f in found} == {
        "shared memory": "problem",
        "open files": "problem",
        "versions": "problem",
        "shared run.url": "problem",
    }, found
    for finding in found:
        (node,) = finding["nodes"]
        assert node.startswith(sick_node[:8])
        assert finding["advice"]
    seen = {f["check"]: f["seen"] for f in found}
    assert "280 in a process" in seen["open files"]
    assert seen["versions"].startswith("cpu_capability ")
