"""Under the sweep and the flips: a cluster that is mended after each run, runs with their truth, leaks counted."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bootstrap  # noqa: F401  (before Ray)
import psutil
import ray
import ray._private.state
from herd import LOSS_TOLERANCE, await_nothing_left, final_digest, job, leftovers, replace_dead_nodes, spec_of, train
from ray.util.placement_group import placement_group_table

from orchestrator.core import events as ev
from orchestrator.core.actions import OpenGeneration
from orchestrator.core.state import State
from orchestrator.localcluster import local_cluster
from orchestrator.observe.status import Status
from orchestrator.runtime import journal
from orchestrator.spec import JobSpec

HERE = Path(__file__).parent
NODES = 5
"""Two for the mesh, a spare, and two that come in when nodes die."""
CPUS = 2
MENDED_WITHIN_S = 60.0
SETTLED_WITHIN_S = 30.0
"""For connections of processes that have ended to be closed by those that live on."""
RAYS_OWN = 4
"""By so many descriptors or connections Ray's processes differ from one moment to the next: an idle worker of its pool
has two sockets and a pipe, a channel to a dead node lives for minutes. What each run left behind would be more."""
OTHER_AT_MOST = 0.01


@dataclass
class Rig:
    cluster: Any
    """Ray's own ray.cluster_utils.Cluster."""
    folder: Path
    truth: Path
    """Where workers write down what they do."""

    def spec(self, name: str, pause_s: float, **sections: dict[str, Any]) -> JobSpec:
        """A small job whose workers write down their steps and pause in each."""
        (self.truth / f"{name}.log").touch()
        self.pause(name, pause_s)
        return spec_of(job(name, self.folder, **sections))

    def pause(self, name: str, pause_s: float) -> None:
        """From its next step on, each step of this run waits for so long."""
        made = self.truth / f"{name}.pause.new"
        made.write_text(str(pause_s))
        made.replace(self.truth / f"{name}.pause")

    def log(self, name: str) -> Path:
        return self.truth / f"{name}.log"

    def mend(self) -> None:
        """Replace the nodes that have lost their raylet."""
        replace_dead_nodes(self.cluster, CPUS)
        deadline = time.monotonic() + MENDED_WITHIN_S
        while sum(node["Alive"] for node in ray.nodes()) != NODES + 1:
            assert time.monotonic() < deadline, "the cluster is not whole again"
            time.sleep(0.2)


@contextmanager
def rig(folder: Path) -> Iterator[Rig]:
    """A cluster of NODES nodes with this folder's sitecustomize; the environment is as before at the end."""
    truth = folder / "truth"
    truth.mkdir(parents=True)
    before = dict(os.environ)
    os.environ["SHEPHERD_TEST_TRUTH"] = str(truth)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]])
    try:
        with local_cluster(NODES, CPUS) as cluster:
            yield Rig(cluster=cluster, folder=folder, truth=truth)
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- what a run did ---


@dataclass(frozen=True)
class Truth:
    """What the workers of a run did, by their own words."""

    losses: dict[int, set[str]]
    """Step to the losses that any rank saw in any execution, as hex floats."""
    fed: dict[int, dict[int, dict[int, dict[str, str]]]]
    """Step to generation to rank to what it was fed: the place of each sample in the step's batch, and its digest."""
    executions: int
    """Steps that were begun, counted on rank 0."""


def truth_of(log: Path) -> Truth:
    losses: dict[int, set[str]] = {}
    fed: dict[int, dict[int, dict[int, dict[str, str]]]] = {}
    executions = 0
    for line in log.read_text().splitlines():
        if not line.endswith("}"):
            continue  # empty, or of a writer that was killed
        entry = json.loads(line)
        executions += entry["rank"] == 0 and "begins" in entry
        if "done" in entry:
            losses.setdefault(entry["done"], set()).add(entry["loss"])
        if "fed" in entry:
            fed.setdefault(entry["step"], {}).setdefault(entry["generation"], {})[entry["rank"]] = entry["fed"]
    return Truth(losses=losses, fed=fed, executions=executions)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run that has ended, with all that is compared."""

    status: Status
    told: list[str]
    digest: str
    truth: Truth
    records: list[journal.Record]
    state: State
    """What its journal replays to."""

    @property
    def resized(self) -> bool:
        """Whether some generation had another mesh than the first: then sums were made in another order."""
        opened = [a for r in self.records for a in r.actions if a["type"] == OpenGeneration.__name__]
        meshes = [(a["dp_replicate"], a["fallback"]) for a in opened]
        return any(mesh != meshes[0] for mesh in meshes)

    @property
    def validated(self) -> dict[int, float]:
        """Step to the loss of its validation."""
        events = (record.event for record in self.records)
        return {e.step: e.loss_millionths / 1e6 for e in events if isinstance(e, ev.Validated)}


def run(rig: Rig, spec: JobSpec, on_status: Callable[[Status], None] = lambda status: None) -> Result:
    """Run a job to its end (bounded), and read what it left behind.

    Raises:
        AssertionError: it did not end in good order, in time.
        JournalError: its journal does not replay.
    """
    status, told = train(spec, on_status)
    assert status.exit_code == 0, f"exit code {status.exit_code}, {status.verdict or status.failure}: {told}"
    records = journal.read(spec.run.url)
    return Result(
        status=status,
        told=told,
        digest=final_digest(spec),
        truth=truth_of(rig.log(spec.run.name)),
        records=records,
        state=journal.replay(records).state,
    )


def differences(result: Result, untouched: Result) -> list[str]:
    """How a run that was hurt differs from one that was not: nothing, if the promise holds.

    All bits are compared; of a run whose mesh had another size for a while the samples of each step, and the losses
    within LOSS_TOLERANCE.
    """
    found = []
    if not result.resized and result.digest != untouched.digest:
        found.append("final state")
    steps = untouched.state.total_steps
    if sorted(result.truth.losses) != list(range(1, steps + 1)):
        found.append(f"steps {sorted(set(range(1, steps + 1)) - set(result.truth.losses))} missing")
    same_losses, same_food = (_close, _same_samples) if result.resized else (set.__eq__, _same_food)
    if wrong := [s for s, seen in result.truth.losses.items() if not same_losses(seen, untouched.truth.losses[s])]:
        found.append(f"loss of steps {wrong}")
    if wrong := [s for s, fed in result.truth.fed.items() if not same_food(fed, untouched.truth.fed[s])]:
        found.append(f"tokens of steps {wrong}")
    if result.validated.keys() != untouched.validated.keys() or not all(
        math.isclose(loss, untouched.validated[s], rel_tol=LOSS_TOLERANCE) for s, loss in result.validated.items()
    ):
        found.append(f"validated {result.validated}, not {untouched.validated}")
    if result.state.high_water != steps or result.state.exit_code != 0:
        found.append(f"journal ends at step {result.state.high_water}, exit code {result.state.exit_code}")
    found += ledger_faults(result)
    return found


def _close(losses: set[str], untouched: set[str]) -> bool:
    (calm,) = map(float.fromhex, untouched)
    return all(math.isclose(float.fromhex(loss), calm, rel_tol=LOSS_TOLERANCE) for loss in losses)


Fed = dict[int, dict[int, dict[str, str]]]
"""Of one step, as in Truth."""


def _same_food(fed: Fed, untouched: Fed) -> bool:
    """Whether every rank was fed the same, in every execution of the step; all of them were fed."""
    (calm,) = untouched.values()
    executions = [(rank, samples) for ranks in fed.values() for rank, samples in ranks.items()]
    return {rank for rank, _ in executions} == calm.keys() and all(s == calm[rank] for rank, s in executions)


def _same_samples(fed: Fed, untouched: Fed) -> bool:
    """Whether the step had the same batch, however its samples were spread; in the end each was fed equally often."""
    (calm,) = untouched.values()
    batch = {place: digest for samples in calm.values() for place, digest in samples.items()}
    executions = [samples for ranks in fed.values() for samples in ranks.values()]
    times = Counter(place for samples in fed[max(fed)].values() for place in samples)
    return (
        times.keys() == batch.keys()
        and len(set(times.values())) == 1
        and all(batch[place] == digest for samples in executions for place, digest in samples.items())
    )


def ledger_faults(result: Result) -> list[str]:
    """In whole microseconds: nothing is in flight once a run has ended."""
    status, ledger = result.status, result.state.ledger
    owed = round(status.wall_clock_s * 1e6) * status.places
    found = []
    if not sum(status.ledger_us.values()) == status.owed_us == owed:
        found.append(f"ledger: {sum(status.ledger_us.values())} of {owed} us")
    if dict(ledger.totals) != status.ledger_us or ledger.owed != owed:
        found.append("the journal's ledger is not the controller's")
    if status.ledger_us["other"] > OTHER_AT_MOST * owed:
        found.append(f"other is {status.ledger_us['other'] / owed:.1%}")
    return found


# --- leaks ---


@dataclass
class Census:
    """What there is on this machine that a run could have left behind. Of long-lived processes, what they hold."""

    ours: list[str] = field(default_factory=list)
    """Agents, controllers, zygotes and workers that live, and files in the RAM tier."""
    zombies: list[str] = field(default_factory=list)
    shared_memory: list[str] = field(default_factory=list)
    """Files where libraries leave theirs and in the RAM tier's usual folder; other folders are other programs'."""
    actors: list[str] = field(default_factory=list)
    placement_groups: list[str] = field(default_factory=list)
    descriptors: dict[str, int] = field(default_factory=dict)
    """Open file descriptors of the driver, the GCS and the raylets; compared for those that live through the sweep.

    Of Ray's own processes without those of gRPC, which depend on its busiest moment and not on what a run leaves
    behind: an event queue for each thread of its pool, and sockets, whose connections are compared for themselves. (The
    GCS kept one socket without a connection more after 20 seeds with 43 kills, and one more after 60 with 133.)
    """
    event_queues: dict[str, int] = field(default_factory=dict)
    """Of Ray's own processes; shown, not compared. So are their sockets, connected or not."""
    socket_files: dict[str, int] = field(default_factory=dict)
    sockets: dict[str, int] = field(default_factory=dict)
    """Connections and listeners."""
    files: dict[str, Counter[str]] = field(default_factory=dict)
    """Process to what its descriptors are, without the kernel's numbers: to say what has grown."""

    def growth(self, before: Census) -> list[str]:
        """What has grown since `before`."""
        found = [
            f"{name}: {len(getattr(self, name))} after {len(getattr(before, name))}: {getattr(self, name)[:5]}"
            for name in ("ours", "zombies", "shared_memory", "actors", "placement_groups")
            if len(getattr(self, name)) > len(getattr(before, name))
        ]
        for name in ("descriptors", "sockets"):
            mine, theirs = getattr(self, name), getattr(before, name)
            found += [
                f"{name} of {who}: {mine[who]} after {theirs[who]}: {dict(self.files[who] - before.files[who])}"
                for who in mine
                if mine[who] > theirs.get(who, mine[who]) + (0 if who == "driver" else RAYS_OWN)
            ]
        return found


def take_census(rig: Rig) -> Census:
    # Ray has no public call for this that needs no dashboard.
    table = ray._private.state.state.actor_table(None)
    census = Census(
        ours=leftovers(rig.folder / "ram"),
        zombies=[f"{p.pid} {p.name()}" for p in psutil.Process().children() if p.status() == psutil.STATUS_ZOMBIE],
        shared_memory=sorted(
            str(path)
            for pattern in ("*", f"shepherd-{os.getuid()}/**/*")
            for path in Path("/dev/shm").glob(pattern)
            if path.is_file() and "plasma" not in path.name
        ),
        actors=[f"{a['ActorClassName']} {a['State']}" for a in table.values() if a["State"] != "DEAD"],
        placement_groups=[row["name"] for row in placement_group_table().values() if row["state"] != "REMOVED"],
    )
    own = psutil.Process()
    for process in (own, *(p for p in own.children() if p.name() in ("gcs_server", "raylet"))):
        name = "driver" if process is own else f"{process.name()} {process.pid}"
        kinds = Counter(re.sub(r"\d+", "N", target) for target in _open_files(process.pid))
        census.files[name] = kinds
        if process is not own:
            census.event_queues[name] = sum(n for kind, n in kinds.items() if kind.startswith("anon_inode:"))
            census.socket_files[name] = kinds["socket:[N]"]
        grpc = census.event_queues.get(name, 0) + census.socket_files.get(name, 0)
        census.descriptors[name] = kinds.total() - grpc
        census.sockets[name] = len(process.net_connections("all"))
    return census


def _open_files(pid: int) -> Iterator[str]:
    """What each open descriptor of a process is, as the kernel names it."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was that of this very look
            yield os.readlink(entry)


def await_no_growth(rig: Rig, before: Census) -> tuple[Census, list[str]]:
    """The count once nothing has grown, or after SETTLED_WITHIN_S, and what has grown."""
    deadline = time.monotonic() + SETTLED_WITHIN_S
    while True:
        census = take_census(rig)
        grown = census.growth(before)
        if not grown or time.monotonic() > deadline:
            return census, grown
        time.sleep(1.0)


__all__ = ["await_nothing_left"]  # of herd, for those who import from here
