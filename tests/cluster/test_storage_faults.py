"""A store that fails under a run: training goes on, people see it, the last checkpoint serves, and saving resumes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from conftest import Cluster
from flaky_s3 import s3_behind_a_wire
from herd import await_nothing_left, final_digest, job, kill_worker, spec_of, train, wait_for
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.core.checkpoints import UNREAD_KEPT
from orchestrator.observe.status import Status
from orchestrator.spec import JobSpec
from storage.commits import list_commits, read_commit, read_indices, verify
from storage.durable import load
from storage.manifest import DATA_DIR
from storage.state import RANK_PREFIX, TrainState
from storage.urls import list_folders

pytestmark = pytest.mark.timeout(300)

# Of the tiny model a checkpoint has 4 MB. Three are kept, one is written.
STORE_BYTES = 40 * 1024 * 1024
STEPS = 140
INTERVAL_STEPS = 8
# Steps that must pass while the store fails: more than three intervals, which is what ShepherdCheckpointOld waits for.
STEPS_MEANWHILE = 3 * INTERVAL_STEPS + 2


@dataclass
class Story:
    """What is done to a run, told by its status: each chapter waits for its condition and then acts, once."""

    spec: JobSpec
    chapters: list[tuple[Callable[[Status], Any], Callable[[Status], Any]]]
    seen: list[Status] = field(default_factory=list)
    """The status at which each chapter came true."""

    def __call__(self, status: Status) -> None:
        while self.chapters and not status.ended:
            condition, act = self.chapters[0]
            if not condition(status):
                return
            self.seen.append(status)
            act(status)
            self.chapters.pop(0)

    def tell(self) -> tuple[Status, list[str]]:
        status, told = train(self.spec, self)
        assert not self.chapters, f"chapter {len(self.seen)} never came: step {status.step}, {told}"
        assert status.exit_code == 0, told
        return status, told


def document(name: str, folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Two ranks on one node."""
    run = {"steps": STEPS, "validation_interval_steps": STEPS, **sections.pop("run", {})}
    mesh = {"pp": 1, "dp_replicate": 2, "microbatches": 1}
    checkpoint = {"interval_steps": INTERVAL_STEPS, **sections.pop("checkpoint", {})}
    return job(name, folder, run=run, parallel=mesh, checkpoint=checkpoint, **sections)


def slow_down(cluster: Cluster, run: str, pause_s: float = 0.05) -> Path:
    """Steps that leave time for a fault, the last ones much of it, and saves that are tried again soon.

    Until the file is removed.
    """
    file = cluster.faults / f"{run}.py"
    pause = f"time.sleep({pause_s} if session.state.step < {STEPS - STEPS_MEANWHILE} else 2.0)"
    file.write_text(f"import time, trainer.saves; trainer.saves.RETRY_S = 0.3; {pause}\n")
    return file


# Each rank's write stands still, all bytes written and nothing told, for as long as a file exists.
HELD_UP = """
import pathlib, storage.durable_write as w
if "write_files" not in vars(w):
    w.write_files = w.Writer._write_files
    def held_up(*arguments):
        part = w.write_files(*arguments)
        while pathlib.Path({gate!r}).exists():
            time.sleep(0.02)
        return part
    w.Writer._write_files = held_up
"""


@pytest.fixture(scope="module")
def untouched(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The final state of the same run on a store that works."""
    spec = spec_of(document("sound-store", tmp_path_factory.mktemp("sound")))
    status, told = train(spec)
    assert status.exit_code == 0, told
    assert status.saves_failed == 0
    return final_digest(spec)


@dataclass(frozen=True)
class SmallDisk:
    """A file system of STORE_BYTES, seen at two places: only `run` can be made read-only while logs are open."""

    run: Path
    logs: Path

    @property
    def ballast(self) -> Path:
        return self.logs / "ballast"

    def fill(self) -> None:
        with open(self.ballast, "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(4096))

    def remount(self, how: str) -> None:
        """Read-only is refused while a file is open for writing: between two saves there is time for it."""
        options = f"remount,bind,{how}"
        wait_for(lambda: mount("-o", options, str(self.run)), 30, f"the kernel to {options}")


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(run=tmp_path / "run", logs=tmp_path / "logs")
    for place in (disk.run, disk.logs):
        place.mkdir()
    if not mount("-t", "tmpfs", "-o", f"size={STORE_BYTES}", "tmpfs", str(disk.logs)):
        pytest.skip("this user may not mount a file system of his own, which a full disk needs")
    try:
        assert mount("--bind", str(disk.logs), str(disk.run))
        yield disk
    finally:
        for place in (disk.run, disk.logs):
            subprocess.run(["umount", "-l", str(place)], check=False)


def metrics(status: Status) -> dict[str, float]:
    """The run's own metrics that have no label besides the run."""
    with urllib.request.urlopen(f"http://{status.metrics_address}/metrics", timeout=10) as page:
        families = text_string_to_metric_families(page.read().decode())
        return {s.name: s.value for family in families for s in family.samples if s.labels.keys() == {"run"}}


def check_newest_checkpoint_serves(url: str) -> int:
    """The newest checkpoint is whole and loads; its step."""
    commit = read_commit(url, list_commits(url)[-1])
    assert verify(url, commit) == []
    chunks = [c for index in read_indices(url, commit) for c in index.chunks if not c.fqn.startswith(RANK_PREFIX)]
    state = TrainState(0, {c.fqn: torch.full(c.shape, torch.nan, dtype=getattr(torch, c.dtype)) for c in chunks}, {})
    load(url, commit, state)
    assert state.step == commit.step
    assert not any(tensor.isnan().any() for tensor in state.tensors.values())
    return commit.step


def check_alerts(status: Status) -> None:
    """The conditions of ShepherdCheckpointFailing and ShepherdCheckpointOld (deploy/prometheus) are true."""
    page = metrics(status)
    assert page["shepherd_checkpoint_failures_total"] >= 1
    assert page["shepherd_checkpoint_failing"] == 1
    behind = page["shepherd_step"] - page["shepherd_checkpoint_step"]
    assert behind > 3 * page["shepherd_checkpoint_interval_steps"]


def trained_on(since: Status) -> Callable[[Status], bool]:
    """Whether a save has failed since then and steps enough have been done since the last that did not.

    Without anybody having been interrupted.
    """

    def condition(now: Status) -> bool:
        assert now.incidents == since.incidents
        return now.step >= now.checkpoints[-1] + STEPS_MEANWHILE and now.saves_failed > since.saves_failed

    return condition


def test_a_killed_save_a_full_disk_and_a_read_only_one(
    cluster: Cluster, untouched: str, small_disk: SmallDisk, tmp_path: Path
) -> None:
    # The node's logs and the journal's local tail are on the disk that fills up, too.
    own = {"run": {"url": str(small_disk.run / "run")}, "cluster": {"log_dir": str(small_disk.logs / "logs")}}
    spec = spec_of(document("bad-disk", tmp_path, **own))
    slow, url = slow_down(cluster, "bad-disk"), spec.run.url
    gate = tmp_path / "gate"
    gate.touch()
    slow.write_text(slow.read_text() + HELD_UP.format(gate=str(gate)))

    def worker_dies_in_the_middle_of_a_save(status: Status) -> None:
        assert status.step > INTERVAL_STEPS and not status.checkpoints, "training goes on"
        kill_worker(spec, status, rank=1)
        gate.unlink()

    def disk_is_full(status: Status) -> None:
        small_disk.fill()
        story.chapters[1:1] = [(trained_on(status), there_is_room_again)]

    def there_is_room_again(status: Status) -> None:
        assert "No space left on device" in status.save_error
        check_alerts(status)
        assert check_newest_checkpoint_serves(url) == status.checkpoints[-1]
        small_disk.ballast.unlink()

    def disk_is_read_only(status: Status) -> None:
        small_disk.remount("ro")
        story.chapters[1:1] = [(trained_on(status), worker_dies)]

    def worker_dies(status: Status) -> None:
        assert "Read-only file system" in status.save_error
        check_alerts(status)
        assert check_newest_checkpoint_serves(url) == status.checkpoints[-1]
        kill_worker(spec, status, rank=1)

    def disk_is_writable(status: Status) -> None:
        assert metrics(status)["shepherd_hold"] == 1
        small_disk.remount("rw")

    story = Story(
        spec,
        [
            (lambda s: s.step > INTERVAL_STEPS + 2, worker_dies_in_the_middle_of_a_save),
            (lambda s: s.checkpoints, disk_is_full),
            (lambda s: s.checkpoints[-1] > story.seen[-1].step and not s.save_error, disk_is_read_only),
            (lambda s: "Read-only file system" in s.hold, disk_is_writable),
            (lambda s: s.checkpoints[-1] > story.seen[-1].step and not s.hold, lambda s: slow.unlink()),
        ],
    )
    status, told = story.tell()
    assert [(i.cause, i.rung) for i in status.incidents] == [("signal", "replace")] * 2
    assert any("local tail cannot be written" in line for line in told)
    assert final_digest(spec) == untouched
    # What failed saves and a killed worker had begun is gone; three checkpoints are kept, and what nobody has read yet.
    kept = list(status.checkpoints)
    assert list_commits(url) == kept and 3 <= len(kept) <= 3 + UNREAD_KEPT
    wait_for(lambda: len(list_folders(url, DATA_DIR)) == len(kept), 30, "the old checkpoints' data to go")
    assert sum(status.ledger_us.values()) == status.owed_us
    await_nothing_left(tmp_path / "ram")


def test_an_object_store_that_cannot_be_reached(cluster: Cluster, untouched: str, tmp_path: Path) -> None:
    port = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert port is not None
    with s3_behind_a_wire(port, "herd") as wire:
        # All are kept: what is read when the store is back must not go meanwhile, since newer ones come.
        keep = {"keep": STEPS}
        spec = spec_of(document("far-store", tmp_path, run={"url": "s3://herd/far-store"}, checkpoint=keep))
        slow = slow_down(cluster, "far-store", pause_s=0.5)  # a checkpoint takes longer to come than to be read back

        def store_is_away(status: Status) -> None:
            wire.cut()
            slow_down(cluster, "far-store")
            story.chapters[1:1] = [(trained_on(status), store_is_back)]

        def store_is_back(status: Status) -> None:
            check_alerts(status)
            wire.mend()
            assert check_newest_checkpoint_serves(spec.run.url) == status.checkpoints[-1]

        story = Story(
            spec,
            [
                # Not while one is read back: that it could not be read would ask for a second decision, and during a
                # HOLD people see what comes before that.
                (lambda s: s.checkpoints and s.newest_verified == s.checkpoints[-1], store_is_away),
                (lambda s: s.checkpoints[-1] > story.seen[-1].step and not s.save_error, lambda s: slow.unlink()),
            ],
        )
        status, _ = story.tell()
        assert status.incidents == ()
        assert final_digest(spec) == untouched
