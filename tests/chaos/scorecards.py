"""The scorecard of every scenario of `shepherd chaos`, each in a run of its own that is compared with an untouched one.

    python tests/chaos/scorecards.py                       # all, as root: cuts and delays need network namespaces
    python tests/chaos/scorecards.py --only worker-kill    # some; the other rows stay as they are

Writes benchmarks/results/chaos.json, and from that the table in docs/chaos.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bootstrap  # noqa: F401  (before Ray)
import netns
from heads import herd_of
from herd import final_digest, job, spec_file, spec_of, train, wait_for
from rig import Rig, rig
from stage import Stage, stage

from orchestrator.chaos import command
from orchestrator.chaos.orders import NOT_DONE, SCENARIOS, Order
from orchestrator.chaos.scorecard import Score, score
from orchestrator.observe.status import Status
from orchestrator.runtime import driver, journal
from orchestrator.spec import JobSpec

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "chaos.json"
PAGE = ROOT / "docs" / "chaos.md"
BEGIN, END = "<!-- scorecards: tests/chaos/scorecards.py -->", "<!-- end of scorecards -->"
STEPS, PAUSE_S = 40, 0.3
HURT_AT_STEP = 4
SMALL_DISK = "size=96m"
LASTS_S = 12.0
"""Of what lasts: longer than a save interval."""


@dataclass(frozen=True)
class Card:
    """One row: how the scenario is ordered, and how long pauses in its steps keep the run slow for it to play."""

    order: Order
    hold_s: float = 8.0
    pause_s: float = PAUSE_S
    sections: dict[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """Equal for runs that end with the same state."""
        return json.dumps({name: s for name, s in self.sections.items() if name != "checkpoint"}, sort_keys=True)


CARDS: dict[str, Card] = {
    **{
        name: Card(Order(scenario=name, seed=seed))
        for seed, name in enumerate(
            (
                "worker-kill",
                "worker-exception",
                "worker-segfault",
                "memory",
                "flip",
                "two-kills",
                "recovery-kill",
                "node-kill",
                "controller-kill",
            )
        )
    },
    "worker-stop": Card(Order(scenario="worker-stop", seed=1), hold_s=25.0),
    "worker-lock": Card(Order(scenario="worker-lock", seed=2), hold_s=25.0),
    "worker-loop": Card(Order(scenario="worker-loop", seed=3), hold_s=25.0),
    # Two ranks that compute all the time, on two cores: with more, those that are not hurt share what is left.
    "worker-slow": Card(
        Order(scenario="worker-slow", seed=4, seconds=40.0),
        pause_s=0.0,
        sections={
            "run": {"steps": 100},
            "data": {"seq_len": 256, "global_batch": 32},
            "parallel": {"pp": 1, "dp_replicate": 2, "microbatches": 1},
            "cluster": {"slots_per_node": 1},
        },
    ),
    "clock-jump": Card(Order(scenario="clock-jump", seed=5, seconds=86_400.0)),
    "clock-jump of the controller": Card(Order(scenario="clock-jump", seconds=-86_400.0, process="controller")),
    "store-outage": Card(
        Order(scenario="store-outage", seconds=LASTS_S), hold_s=40.0, sections={"checkpoint": {"interval_steps": 5}}
    ),
    "disk-full": Card(
        Order(scenario="disk-full", seconds=LASTS_S), hold_s=40.0, sections={"checkpoint": {"interval_steps": 5}}
    ),
}


# On nodes with networks of their own: scenario, options and the pause in each step, in seconds.
NETS: dict[str, tuple[str, tuple[str, ...], float]] = {
    "net-cut from the controller": ("net-cut", ("--from", "controller", "--seconds", "9"), 0.6),
    "net-cut from peers": ("net-cut", ("--from", "peers", "--seconds", "20"), 0.6),
    "net-cut from peers, one-way": ("net-cut", ("--from", "peers", "--direction", "out", "--seconds", "20"), 0.6),
    "net-cut from all": ("net-cut", ("--from", "all", "--seconds", "20"), 0.6),
    "net-delay": ("net-delay", ("--delay-ms", "100", "--seconds", "9"), 0.6),
}


def play_on_net(on: Stage, name: str) -> list[dict[str, Any]]:
    """As `play`."""
    scenario, options, pause_s = NETS[name]
    run = "card-" + "-".join(name.replace(",", "").split())
    with on.run(run, pause_s) as spec:
        found = on.chaos(run, scenario, *options)
    return [found | {"identical": final_digest(spec) == on.untouched()}]


HEAD = "head-kill"
TRAINS_WITHIN_S = 120.0
ENDS_WITHIN_S = 180.0
HEADLESS_S = 5.0


def play_on_head(folder: Path) -> list[dict[str, Any]]:
    """As `play`, on a cluster with a GCS on Redis, whose head is started again HEADLESS_S later."""
    faults = folder / "faults"
    faults.mkdir(parents=True)
    (faults / "card-head-kill.py").write_text(f"import time\ntime.sleep({PAUSE_S})\n")
    path = os.pathsep.join([str(ROOT / "tests" / "cluster"), os.environ["PYTHONPATH"]])
    specs = {}
    with herd_of(2, folder, redis=True, SHEPHERD_TEST_FAULTS=str(faults), PYTHONPATH=path) as herd:
        for run in ("untouched-head", "card-head-kill"):
            document = job(run, folder, run={"steps": STEPS, "validation_interval_steps": 10_000})
            specs[run] = spec_of(document)
            herd.command("train", str(spec_file(document, folder / f"{run}.toml")), "--detach")
            wait_for(lambda run=run: herd.status(run).get("job") == "training", TRAINS_WITHIN_S, f"{run} to train")
            if run == "card-head-kill":
                given = ("--run", run, "--log-dir", specs[run].cluster.log_dir, "--wait", str(ENDS_WITHIN_S))
                with herd.started("chaos", HEAD, *given) as order:
                    herd.await_head_killed()
                    time.sleep(HEADLESS_S)
                    herd.start_head()
                    order.wait(2 * ENDS_WITHIN_S)
            wait_for(lambda run=run: herd.try_command("status", run).returncode == 2, ENDS_WITHIN_S, f"{run} to end")
    hurt, calm = specs["card-head-kill"], specs["untouched-head"]
    return document_of(score(journal.read(hurt.run.url), final_digest(hurt) == final_digest(calm)), folder)


def spec_for(on: Rig, name: str, card: Card, url: Path | None = None) -> JobSpec:
    sections: dict[str, dict[str, Any]] = {
        "run": {"steps": STEPS, "validation_interval_steps": 10_000},
        "recovery": {"rank_silence_s": 5, "stall_floor_s": 5, "node_silence_s": 30},
        "cluster": {"spares": 1},
    }
    for section, fields in card.sections.items():
        sections.setdefault(section, {}).update(fields)
    if url is not None:
        sections["run"]["url"] = str(url)
    return on.spec(name, 0.0, **sections)


def play(on: Rig, name: str, card: Card, reference: dict[str, str]) -> list[Score]:
    """Run, hurt at step HURT_AT_STEP, go on to the end; what became of it."""
    run = "card-" + name.replace(" ", "-")
    with _small_disk(on.folder / "small", card.order.scenario == "disk-full") as small:
        spec = spec_for(on, run, card, small and small / "run")
        on.pause(run, card.pause_s)
        given: list[float] = []

        def on_status(status: Status) -> None:
            if not given and status.job == "training" and status.step >= HURT_AT_STEP:
                command.give(driver.find(run), driver.read_token(spec.cluster.log_dir, run), card.order, by=name)
                given.append(time.monotonic())
            if given and time.monotonic() - given[0] > card.hold_s:
                on.pause(run, 0.0)

        status, told = train(spec, on_status)
        print("\n".join(told), file=sys.stderr)
        identical = status.exit_code == 0 and final_digest(spec) == reference[card.outcome]
        return score(journal.read(spec.run.url), identical)


@contextmanager
def _small_disk(folder: Path, wanted: bool) -> Iterator[Path | None]:
    """A file system that may be filled. Needs the right to mount one."""
    if not wanted:
        yield None
        return
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", SMALL_DISK, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def references(on: Rig, names: list[str]) -> dict[str, str]:
    """`Card.outcome` to the untouched run's final state."""
    found: dict[str, str] = {}
    for card in (CARDS[name] for name in names):
        if card.outcome not in found:
            spec = spec_for(on, f"untouched-{len(found)}", card)
            status, told = train(spec)
            assert status.exit_code == 0, told
            found[card.outcome] = final_digest(spec)
    return found


def document_of(scores: list[Score], folder: Path) -> list[dict[str, Any]]:
    """As JSON; where the folder of this try was says nothing."""
    text = json.dumps([s.document() for s in scores]).replace(str(folder), "out/scorecards")
    return list(json.loads(text))


def table(rows: dict[str, list[dict[str, Any]]], machine: str) -> str:
    lines = [
        f"On {machine}:",
        "",
        "| scenario | what was done | found | node, rank | rung | recovered | lost | same final state |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(_cells(name, s)) + " |" for name in sorted(rows, key=_place) for s in rows[name]]
    missing = [name for name in SCENARIOS if name not in {s["fault"] for found in rows.values() for s in found}]
    missing = [name for name in missing if name not in rows]
    names = ", ".join(f"`{name}`" for name in missing) or "none"
    return "\n".join([*lines, "", textwrap.fill(f"Not among them: {names}.", 120), ""])


def _place(name: str) -> tuple[int, str]:
    scenario = name.split()[0]
    return (list(SCENARIOS).index(scenario) if scenario in SCENARIOS else len(SCENARIOS), name)


def _cells(name: str, s: dict[str, Any]) -> list[str]:
    yes = {True: "yes", False: "NO", None: "-"}
    if s["truth"].startswith(NOT_DONE):
        return [f"`{name}`", s["truth"].replace("|", "/")[:160], *["-"] * 6]
    if s["harmless"]:
        found, recovered = "nothing to find, training went on", "-"
    else:
        found = (
            "NO" if s["detected_after_s"] is None else f"{s['detected_after_s']:.1f} s, {s['found'].partition(':')[0]}"
        )
        recovered = "NO" if not s["recovered"] else "yes" if s["recovery_s"] is None else f"{s['recovery_s']:.1f} s"
    lost = "-" if s["steps_lost"] is None else str(s["steps_lost"])
    where = f"{yes[s['right_node']]}, {yes[s['right_rank']]}"
    truth = s["truth"].replace("|", "/")
    truth = truth if len(truth) <= 90 else truth[:87] + "..."
    return [f"`{name}`", truth, found, where, s["rung"] or "-", recovered, lost, yes[s["identical"]]]


def write(rows: dict[str, Any]) -> None:
    machine = f"{os.cpu_count()} cores ({platform.machine()}) that did other work at the time; seconds say little"
    RESULTS.write_text(json.dumps({"machine": machine, "scenarios": rows}, indent=1) + "\n")
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows, machine)}{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*CARDS, *NETS, HEAD], help="these rows; default: all")
    parser.add_argument("--out", type=Path, default=Path("out/scorecards"), help="folder of the runs; made anew")
    given = parser.parse_args()
    names = given.only or [*CARDS, *NETS, HEAD]
    shutil.rmtree(given.out, ignore_errors=True)
    rows: dict[str, Any] = json.loads(RESULTS.read_text())["scenarios"] if given.only and RESULTS.exists() else {}

    def note(name: str, found: list[dict[str, Any]]) -> None:
        rows[name] = [each | {"by": "scorecards"} for each in found]
        print(json.dumps({name: found}), flush=True)
        write(rows)

    if plain := [name for name in names if name in CARDS]:
        with rig(given.out.absolute()) as on:
            reference = references(on, plain)
            for name in plain:
                note(name, document_of(play(on, name, CARDS[name], reference), on.folder))
                on.mend()
    if of_nets := [name for name in names if name in NETS]:
        if why := netns.why_not():
            parser.error(f"{', '.join(of_nets)}: {why}")
        with stage(given.out.absolute() / "nets") as apart:
            for name in of_nets:
                note(name, play_on_net(apart, name))
    if HEAD in names:
        note(HEAD, play_on_head(given.out.absolute() / "head"))
    failed = [name for name in names if not all(s["passed"] for s in rows[name])]
    print(f"{len(names)} scenarios, not passed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
