"""Jobs on one cluster: what strikes one, or ends it, is nothing to the others, and each ends as if it were alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from conftest import Cluster
from herd import (
    RUN_S,
    await_gone,
    await_nothing_left,
    final_digest,
    job,
    kill_worker,
    look,
    spec_of,
    train,
    wait_for,
)

from orchestrator import preflight
from orchestrator.need import need_of
from orchestrator.observe.status import Status
from orchestrator.runtime import driver
from orchestrator.runtime.controller import namespace_of
from orchestrator.spec import JobSpec

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


def one_node(name: str, folder: Path, seed: int, steps: int) -> JobSpec:
    """Two ranks on one node. Both kinds of run have the same steps: the learning rate depends on them."""
    run = {"seed": seed, "steps": steps, "validation_interval_steps": steps}
    return spec_of(job(name, folder, run=run, parallel={"dp_replicate": 1}))


def launch(spec: JobSpec) -> tuple[Any, str]:
    preflight.check_local(spec, resume=False)
    preflight.check_cluster(spec)
    return driver.start(spec, detached=True)


def until(controller: Any, condition: Callable[[Status], bool], what: str) -> Status:
    def met() -> Status | None:
        status = look(controller, lease=True)
        if status is None:
            return None
        assert not status.failure, status.failure
        return status if condition(status) else None

    found: Status = wait_for(met, RUN_S, what)
    return found


def test_three_jobs_on_one_cluster_do_not_touch_each_other(cluster: Cluster, tmp_path: Path) -> None:
    alone = {}
    for seed in (1, 2):
        spec = one_node(f"alone-{seed}", tmp_path, seed, 16)
        assert train(spec)[0].exit_code == 0
        alone[seed] = final_digest(spec)
    assert alone[1] != alone[2]

    # All three stay in their fifth step until everything has been done to them; stop-me has no end of its own.
    specs = {
        "hurt": one_node("hurt", tmp_path, 1, 16),
        "calm": one_node("calm", tmp_path, 2, 16),
        "stop-me": one_node("stop-me", tmp_path, 3, 100_000),
    }
    go = tmp_path / "go"
    held = f"import pathlib, time\nwhile session.state.step >= 4 and not pathlib.Path({str(go)!r}).exists():\n"
    for name in specs:
        (cluster.faults / f"{name}.py").write_text(f"{held}    time.sleep(0.05)\n")
    started = {name: launch(spec) for name, spec in specs.items()}
    controllers = {name: controller for name, (controller, _) in started.items()}
    seen = {name: until(c, lambda s: s.step >= 2, f"step 2 of {name}") for name, c in controllers.items()}

    apart(specs, seen, tmp_path)

    kill_worker(specs["hurt"], seen["hurt"], rank=1)
    driver.stop(controllers["stop-me"], started["stop-me"][1], by="the test", graceful=False)
    with pytest.raises(PermissionError):
        driver.stop(controllers["calm"], started["hurt"][1], by="another run's owner", graceful=False)
    go.touch()
    ended = {
        name: until(controller, lambda s: s.ended, f"the end of {name}") for name, controller in controllers.items()
    }

    assert [(i.cause, i.rung) for i in ended["hurt"].incidents] == [("signal", "replace")]
    assert ended["calm"].incidents == ended["stop-me"].incidents == ()
    assert (ended["calm"].generation, ended["calm"].epoch) == (1, 1)
    assert {name: status.exit_code for name, status in ended.items()} == {"hurt": 0, "calm": 0, "stop-me": 96}
    assert final_digest(specs["hurt"]) == alone[1]
    assert final_digest(specs["calm"]) == alone[2]
    for name in specs:
        await_gone(name)
    await_nothing_left(tmp_path / "ram")


def apart(specs: dict[str, JobSpec], seen: dict[str, Status], folder: Path) -> None:
    """Nodes, workers, placement groups, RAM, logs and tokens of the runs are their own."""
    names = list(specs)
    agents = {name: ray.get_actor(f"agent/{seen[name].mesh[0]}", namespace_of(name)) for name in names}
    infos = {name: ray.get(agent.describe.remote(), timeout=30) for name, agent in agents.items()}
    assert len({info.ray_node for info in infos.values()}) == len(names), "a node each"
    pids = {name: set(ray.get(agent.workers.remote(), timeout=30).values()) for name, agent in agents.items()}
    assert len(set().union(*pids.values())) == 2 * len(names)
    groups = [row["name"] for row in ray.util.placement_group_table().values() if row["state"] == "CREATED"]
    assert sorted(groups) == sorted(f"{namespace_of(name)}/{seen[name].mesh[0]}" for name in names)
    ram = {path.name.rpartition("-")[0]: path for path in (folder / "ram").iterdir()}
    assert sorted(ram) == sorted(names)
    for name, spec in specs.items():
        assert (folder / "logs" / name / f"{infos[name].ray_node}.log").exists()
        need = need_of(spec)
        held = sum(path.stat().st_blocks * 512 for path in ram[name].rglob("slot-*"))
        state = 3 * 12 * need.node_parameters
        assert state <= held <= need.ram_bytes, "what the doctor says that a node needs"
        for process in map(psutil.Process, [*pids[name], infos[name].pid, seen[name].controller_pid]):
            assert process.num_fds() <= need.files
        assert sum(psutil.Process(pid).num_threads() for pid in pids[name]) <= need.threads
    assert len({driver.read_token(spec.cluster.log_dir, name) for name, spec in specs.items()}) == len(names)
