"""How fast snapshots, checkpoints and copies between nodes are: ours, others' and what the machine can do, in one run.

    python benchmarks/checkpoint_speed.py [--only snapshot,save,load,peer,s3,reshard] [--size BYTES] [--rounds N]
                                          [--folder PATH] [--s3 URL] [--peers-python PATH] [--json PATH]

Two gloo ranks, a process each, hold a state of 1 GB: 64 matrices sharded by FSDP over both, a replicated tensor and
each rank's own. Whatever is compared takes turns, round by round, so that noise hits all alike; what counts are ratios
of medians, and the spread is that of the ratios of single rounds. Of ceilings and of other libraries' settings the best
counts.

Blocked is what the training thread waits from the call until its tensors may change; libraries that copy in the
background could hide all but the call behind a forward and backward pass, so the call alone is shown too. Cold means
that no page of a file is in memory (checked by mincore). Bytes read are /proc/self/io's, of each rank.

moto is bound by the server, not by the client. Give another server by AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY and ``--s3 s3://BUCKET/PREFIX``, which must exist; it holds some 9 GB before they are removed.

Two other libraries take part in the snapshots when they are installed, in an environment of their own:

    python3.11 -m venv /tmp/peers
    /tmp/peers/bin/pip install -c constraints.txt torch==2.13.0 numpy torch_checkpointing==0.1.1 lm-resiliency==0.2.0
    python benchmarks/checkpoint_speed.py --peers-python /tmp/peers/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from checkpoints import raw_io
from checkpoints.ranks import RankFailed, Ranks, ranks
from checkpoints.ratios import Section, Verdict, in_turns, show
from rich.console import Console

SIZE_BYTES = 10**9
ROUNDS = 7
WARM_UP_ROUNDS = 3
"""Ours has three files of snapshots, whose memory the first three rounds allocate."""
STEADY_SNAPSHOTS = 20
DISK_THREADS, DISK_BLOCKS = (1, 2, 4), (4 << 20, 16 << 20)
TCP_PIECES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
DCP_THREADS = (1, 2)
WRITERS = ("boto3 upload_file", "s3fs put_file", "s3fs pipe_file")
READERS = ("boto3 download_file", "s3fs get_file", "s3fs cat_ranges")
S3_SHARE = 4
"""Of the state, this part is written, and read of moto: the servers of a test hold in memory all that was ever written,
and one in a single process is slow."""
LAYOUTS = {"fsdp2": 2, "tp2": 2, "fsdp4": 4, "tp4": 4, "fsdp2-tp2": 4, "hsdp2x2": 4}
STATES_NEEDED = 14
"""Memory for the snapshots of all libraries at once, in states."""

OURS, MEMCPY = "ours.Snapshots", "raw_io.Memcpy"
SNAPSHOTS = {
    OURS: "Checkpointer.snapshot, await_reads",
    MEMCPY: "numpy.copyto of each tensor into memory touched before",
    "peers.dcp_thread": "torch DCP's async_save: THREAD, a DefaultStager that blocks",
    "peers.dcp_stager": "torch DCP's async_save: THREAD, a DefaultStager in the background with shared memory",
    "peers.dcp_process": "torch DCP's async_save: PROCESS, a DefaultStager in the background with shared memory",
}
GUESTS = {
    "peers.TorchCheckpointing": "torch_checkpointing: CheckpointManager.Config.with_async_save(), prewarm_staging, "
    "use_direct_io=False, no resharder",
    "peers.LmResiliency": "lm-resiliency: InMemoryCheckpointManager.save_tensors, replication_jump=1, no disk flush",
}
"""What `peers_python` may have. All stagers and buffers without CUDA: no pinned memory, and copies that block."""


@dataclass(frozen=True)
class Plan:
    size_bytes: int
    rounds: int
    folder: Path
    """On the disk to be measured."""
    ram: Path
    """In shared memory."""
    peers_python: str
    s3: str


# --- the sections ----------------------------------------------------------------------------------------------------


def snapshot(plan: Plan) -> list[Section]:
    section = Section("snapshot", "seconds that the training thread is blocked")
    free = psutil.virtual_memory().available
    if free < STATES_NEEDED * plan.size_bytes:
        raise SystemExit(f"{free} bytes of memory are free, {STATES_NEEDED * plan.size_bytes} are needed: lower --size")
    with (
        ranks(2, plan.size_bytes, "fsdp2") as main,
        ranks(2, plan.size_bytes, "fsdp2", python=plan.peers_python) as guests,
    ):
        groups = dict.fromkeys(SNAPSHOTS, main) | dict.fromkeys(GUESTS, guests)
        folders = dict.fromkeys(groups, str(plan.folder)) | {OURS: str(plan.ram)}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
        absent: dict[str, str] = {}
        step = 0
        for number in range(WARM_UP_ROUNDS + plan.rounds):
            for name in [name for name in groups if name not in absent]:
                step += 1
                try:
                    answers = groups[name].ask("rank.snapshot", contestant=name, folder=folders[name], step=step)
                except RankFailed as error:
                    if name not in GUESTS:
                        raise
                    absent[name] = str(error)
                    continue
                if number >= WARM_UP_ROUNDS:
                    found[name].append({key: max(answer[key] for answer in answers) for key in answers[0]})
        steady = {
            name: main.ask("ours.allocated", contestant=name, first_step=step + 1, snapshots=STEADY_SNAPSHOTS)
            for name in (MEMCPY, OURS)
        }
    names = [name for name in groups if name not in absent]
    section.seconds = {name: [each["blocked_s"] for each in found[name]] for name in names}
    section.more = {"configurations": SNAPSHOTS | GUESTS, "absent": absent, "each": found, "steady": steady}
    section.judge("blocked / memcpy of the shard", OURS, MEMCPY, at_most=1.2)
    own = [statistics.median(each["blocked_cpu_s"] for each in found[name]) for name in (OURS, MEMCPY)]
    section.verdicts.append(
        Verdict("the same in processor time", own[0] / own[1], own[0] / own[1], own[0] / own[1], "", None)
    )
    for name in names[2:]:
        section.judge(f"blocked / {name.partition('.')[2]}'s", OURS, name, less=True)
    for name in names[2:]:
        call = [each["call_s"] for each in found[name]]
        if statistics.median(call) < 0.9 * statistics.median(section.seconds[name]):
            section.seconds[f"{name} (call)"] = call
            section.judge(f"blocked / {name.partition('.')[2]}'s call alone", OURS, f"{name} (call)")
    for key in ("faults_a_snapshot", "rss_grown_bytes", "malloc_grown_bytes", "python_grown_bytes"):
        unit = 4096 if key == "faults_a_snapshot" else 1 / STEADY_SNAPSHOTS
        shares = [answer[key] * unit / answer["shard_bytes"] for answer in steady[OURS]]
        what = f"allocated a snapshot / shard: {key.rpartition('_')[0].replace('_', ' ')}"
        section.verdicts.append(Verdict(what, max(shares), min(shares), max(shares), "<= 0.001", max(shares) <= 0.001))
    return [section]


def raw_disk(group: Ranks, do: str, **arguments: Any) -> dict[str, Callable[[], float]]:
    """A plain loop by the number of threads and the size of a block."""

    def one(threads: int, block_bytes: int) -> Callable[[], float]:
        return lambda: group.seconds(do, threads=threads, block_bytes=block_bytes, **arguments)

    return {
        f"O_DIRECT, {threads} threads, {block_bytes >> 20} MiB": one(threads, block_bytes)
        for threads in DISK_THREADS
        for block_bytes in DISK_BLOCKS
    }


def save(plan: Plan) -> list[Section]:
    section = Section(
        "save", "fsync, digests and commit record in ours; fsync in DCP's; O_DIRECT and fsync in the loops"
    )
    steps = iter(range(1, 10**6))
    with ranks(2, plan.size_bytes, "fsdp2") as group:
        ((local, whole),) = {(a["local_bytes"], a["state_bytes"]) for a in group.ask("rank.build", layout="fsdp2")}
        section.n_bytes = whole

        def ours() -> float:
            group.ask("rank.Rank.touch")
            url, step = str(plan.folder / "ours"), next(steps)
            spent = group.seconds("ours.save", url=url, step=step)
            group.ask("ours.delete", url=url, step=step)
            return spent

        def dcp(threads: int) -> float:
            group.ask("rank.Rank.touch")
            spent = group.seconds("peers.dcp_save", folder=str(plan.folder / "dcp"), threads=threads)
            shutil.rmtree(plan.folder / "dcp")
            return spent

        others = {f"DCP, {threads} threads": (lambda threads=threads: dcp(threads)) for threads in DCP_THREADS}
        loops = raw_disk(group, "raw_io.write", path=str(plan.folder / "raw-{rank}"), n_bytes=local)
        ours()
        in_turns(section, plan.rounds, {"ours": ours, **others, **loops})
    section.judge("rate / O_DIRECT writes", section.best(list(loops)), "ours", at_least=0.85)
    section.judge("rate / DCP's", section.best(list(others)), "ours", at_least=1.5)
    section.judge("rate / DCP's by its defaults, 1 thread", "DCP, 1 threads", "ours")
    section.judge(
        "O_DIRECT writes / DCP's: the most that is to be had", section.best(list(others)), section.best([*loops])
    )
    return [section]


def load(plan: Plan) -> list[Section]:
    section = Section("load", "cold; ours is verified")
    with ranks(2, plan.size_bytes, "fsdp2") as group:
        url, folder = str(plan.folder / "ours"), str(plan.folder / "dcp")
        section.n_bytes = group.ask("rank.build", layout="fsdp2")[0]["state_bytes"]
        group.ask("ours.save", url=url, step=1)
        group.ask("peers.dcp_save", folder=folder, threads=1)
        saved = group.ask("ours.content")
        files = group.ask("ours.data_file", url=url, step=1)

        def cold(work: Callable[[], float]) -> Callable[[], float]:
            def run() -> float:
                raw_io.drop_cache(plan.folder)
                spent = work()
                return spent

            return run

        def checked(work: Callable[[], float]) -> Callable[[], float]:
            def run() -> float:
                spent = work()
                assert group.ask("ours.content") == saved, "what was loaded is not what was saved"
                return spent

            return run

        contestants = {
            "ours": checked(lambda: group.seconds("ours.load", url=url, step=1)),
            "DCP": checked(lambda: group.seconds("peers.dcp_load", folder=folder, same_world=True)),
        }
        for name in files:
            os.link(name, plan.folder / f"raw-{files.index(name)}")
        path = str(plan.folder / "raw-{rank}")
        loops = raw_disk(group, "raw_io.read", path=path)
        checked_loops = {
            f"{name}, checked": work for name, work in raw_disk(group, "raw_io.read_checked", path=path).items()
        }
        everybody = {**contestants, **loops, **checked_loops}
        in_turns(section, plan.rounds, {name: cold(work) for name, work in everybody.items()})
    section.judge("rate / O_DIRECT reads", section.best(list(loops)), "ours", at_least=0.85)
    section.judge("rate / the same, digested and copied", section.best(list(checked_loops)), "ours")
    section.judge("rate / DCP's", "DCP", "ours", at_least=1.5)
    return [section]


def peer(plan: Plan) -> list[Section]:
    section = Section("peer", "one rank's shard over loopback, from process to process; ours is verified")
    with ranks(1, plan.size_bytes) as source, ranks(1, plan.size_bytes) as target:
        section.n_bytes = source.ask("rank.build", layout="")[0]["local_bytes"]
        (address,) = source.ask("ours.serve_snapshot", ram_dir=str(plan.ram))
        (raw_address,) = source.ask("raw_io.serve", n_bytes=section.n_bytes)

        def ours() -> float:
            return target.seconds("ours.fetch", address=address, ram_dir=str(plan.ram))

        def plain(piece_bytes: int) -> float:
            return target.seconds("raw_io.fetch", address=raw_address, n_bytes=section.n_bytes, piece_bytes=piece_bytes)

        section.more["first_fetches_s"] = [ours() for _ in range(WARM_UP_ROUNDS)]
        plain(TCP_PIECES[0])
        streams = {f"TCP, pieces of {size >> 10} KiB": (lambda size=size: plain(size)) for size in TCP_PIECES}
        in_turns(section, plan.rounds, {"ours": ours, **streams})
    section.judge("rate / a raw TCP stream", section.best(list(streams)), "ours", at_least=0.8)
    return [section]


def s3(plan: Plan) -> list[Section]:
    with ranks(1, 0) as server:
        (endpoint,) = server.ask("s3_clients.serve")
        env = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        part_bytes = plan.size_bytes // S3_SHARE
        sections = [s3_write(plan, "moto", "s3://bucket", env), s3_read(plan, "moto", "s3://bucket", env, part_bytes)]
    if plan.s3:
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "AWS")
        sections += [s3_write(plan, endpoint, plan.s3, {}), s3_read(plan, endpoint, plan.s3, {}, plan.size_bytes)]
    return sections


def plain_clients(group: Ranks, do: str, clients: Sequence[str], url: str) -> dict[str, Callable[[], float]]:
    def one(client: str) -> Callable[[], float]:
        return lambda: group.seconds(do, client=client, url=url)

    return {client: one(client) for client in clients}


def s3_write(plan: Plan, server: str, url: str, env: dict[str, str]) -> Section:
    section = Section(f"s3 write, {server}", "both ranks; bound by the server")
    steps = iter(range(1, 10**6))
    with ranks(2, plan.size_bytes // S3_SHARE, "fsdp2", TMPDIR=str(plan.folder), **env) as group:
        section.n_bytes = group.ask("rank.build", layout="fsdp2")[0]["state_bytes"]
        run_url, shards = f"{url}/run", f"{url}/shards"
        newest = 0

        def ours() -> float:
            nonlocal newest
            group.ask("rank.Rank.touch")
            before, newest = newest, next(steps)
            spent = group.seconds("ours.save", url=run_url, step=newest)
            if before:
                group.ask("ours.delete", url=run_url, step=before)
            return spent

        plain = plain_clients(group, "s3_clients.write", WRITERS, shards)
        group.ask("s3_clients.make_bucket", url=url)
        ours()
        for each in plain.values():
            each()
        in_turns(section, plan.rounds, {"ours": ours, **plain})
        group.ask("s3_clients.remove", urls=[run_url, shards])
    section.judge("rate / the best plain client", section.best(list(plain)), "ours", at_least=0.85)
    return section


def s3_read(plan: Plan, server: str, url: str, env: dict[str, str], size_bytes: int) -> Section:
    section = Section(f"s3 read, {server}", "both ranks; bound by the server; ours is verified")
    with ranks(2, size_bytes, "fsdp2", TMPDIR=str(plan.folder), **env) as group:
        section.n_bytes = group.ask("rank.build", layout="fsdp2")[0]["state_bytes"]
        run_url, shards = f"{url}/run", f"{url}/shards"
        group.ask("s3_clients.make_bucket", url=url)
        group.ask("ours.save", url=run_url, step=1)
        group.ask("s3_clients.write", client=WRITERS[-1], url=shards)
        saved = group.ask("ours.content")

        def ours() -> float:
            return group.seconds("ours.load", url=run_url, step=1)

        plain = plain_clients(group, "s3_clients.read", READERS, shards)
        in_turns(section, plan.rounds, {"ours": ours, **plain})
        ours()
        assert group.ask("ours.content") == saved, "what was loaded is not what was saved"
        group.ask("s3_clients.remove", urls=[run_url, shards])
    section.judge("rate / the best plain client", section.best(list(plain)), "ours", at_least=0.85)
    return section


def reshard(plan: Plan) -> list[Section]:
    section = Section("reshard", "bytes read by all ranks / bytes of the state", beside_of="DCP")
    with ranks(2, plan.size_bytes, "fsdp2") as two, ranks(4, plan.size_bytes, "fsdp4") as four:
        groups = {2: two, 4: four}
        warm: set[int] = set()
        for source, world_size in LAYOUTS.items():
            url, folder = str(plan.folder / "ours"), str(plan.folder / "dcp")
            writers = groups[world_size]
            writers.ask("rank.build", layout=source)
            writers.ask("ours.save", url=url, step=1)
            writers.ask("peers.dcp_save", folder=folder, threads=1)
            for target, readers in LAYOUTS.items():
                group, same_world = groups[readers], readers == world_size
                if readers not in warm:  # what libraries import and cache when they first load is not counted
                    one_reshard(group, target, url, folder, same_world)
                    warm.add(readers)
                found = one_reshard(group, target, url, folder, same_world)
                pair, ratio = f"{source} to {target}", found["ours"]
                section.verdicts.append(Verdict(pair, ratio, ratio, ratio, "<= 1.1", ratio <= 1.1))
                section.beside[pair] = f"{found['DCP']:.3f}"
            shutil.rmtree(url)
            shutil.rmtree(folder)
    return [section]


def one_reshard(group: Ranks, layout: str, url: str, folder: str, same_world: bool) -> dict[str, float]:
    sizes = group.ask("rank.build", layout=layout)[0]
    state_bytes = sizes["state_bytes" if same_world else "global_bytes"]
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "ours": ("ours.load", {"url": url, "step": 1}),
        "DCP": ("peers.dcp_load", {"folder": folder, "same_world": same_world}),
    }
    found = {}
    for library, (do, arguments) in calls.items():
        read_bytes = sum(n_bytes for _, n_bytes in group.ask(do, **arguments))
        group.ask("rank.Rank.check")
        assert read_bytes >= 0.99 * state_bytes, f"{library} reads in a way that is not counted"
        found[library] = read_bytes / state_bytes
    return found


SECTIONS: dict[str, Callable[[Plan], list[Section]]] = {
    "snapshot": snapshot,
    "save": save,
    "load": load,
    "peer": peer,
    "s3": s3,
    "reshard": reshard,
}


def machine(folder: Path) -> dict[str, Any]:
    mounts = [m for m in psutil.disk_partitions(all=True) if folder.is_relative_to(m.mountpoint)]
    info = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown"),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "file_system": max(mounts, key=lambda mount: len(mount.mountpoint)).fstype,
        "kernel": platform.release(),
        "torch": version("torch"),
        "load_average": psutil.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by commas (default all)")
    parser.add_argument("--size", type=int, default=SIZE_BYTES, help="bytes of the state over all ranks (default 10^9)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each comparison (default {ROUNDS})")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the one of temporary files)")
    parser.add_argument("--s3", default="", metavar="URL", help="a bucket on another server than moto's")
    parser.add_argument("--peers-python", default=sys.executable, metavar="PATH", help="has the other libraries")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ranks and folders go with it
    console, sections = Console(width=110), []
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as folder,
        tempfile.TemporaryDirectory(dir="/dev/shm") as ram,
    ):
        plan = Plan(
            size_bytes=arguments.size,
            rounds=arguments.rounds,
            folder=Path(folder).resolve(),
            ram=Path(ram),
            peers_python=arguments.peers_python,
            s3=arguments.s3,
        )
        found = {"machine": machine(plan.folder), "size_bytes": arguments.size, "rounds": arguments.rounds}
        console.print(found)
        for name in chosen:
            for section in SECTIONS[name](plan):
                show(section, console)
                sections.append(asdict(section))
            for left in (*plan.folder.iterdir(), *plan.ram.iterdir()):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    found |= {"sections": sections, "load_average_after": psutil.getloadavg()[0]}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
