"""SIMULATION of the 54 days of the Llama 3 paper: a baseline as of that paper, Shepherd's ladder, and what each brings.

The ladder is what runs today (profile "shepherd"); the whole ladder also has the rungs that the supervisor decides and
that only the simulated body carries out yet (profile "ladder").

    python benchmarks/llama3_54_days.py [--seeds 10] [--json PATH]

16,384 GPUs, failures by the counts of Table 5 and 47 planned interruptions (arXiv 2407.21783, section 3.3.4). The paper
reports "over 90%" effective training time. Every assumption stands with its source in orchestrator/simulate/profiles
and failures; below, each is varied by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator import spec as specs
from orchestrator.simulate.body import Scenario
from orchestrator.simulate.outcome import LABEL, Outcome, simulate
from orchestrator.simulate.plan import Change, each_cause, times
from orchestrator.simulate.profile import load_failures, load_profile
from orchestrator.simulate.scenario import of_spec

JOB = Path(__file__).resolve().parents[1] / "examples" / "llama3_405b.toml"
DAYS = 54
PAPER = "over 90%"
SENSITIVITY_SEEDS = 3


def interval(factor: float) -> Change:
    return lambda made: replace(
        made,
        checkpoint_interval_steps=round(made.checkpoint_interval_steps * factor),
        # What is kept spans the same time: corruption that is found late must have something to go back to.
        limits=replace(made.limits, keep_checkpoints=max(2, round(made.limits.keep_checkpoints / factor))),
    )


def repair(factor: float) -> Change:
    slower = each_cause(lambda cause: {"repair_s": cause.repair_s * factor})
    # And spares for as many machines as are away.
    return lambda made: replace(slower(made), layout=replace(made.layout, spares=round(made.layout.spares * factor)))


def memory(on: bool) -> Change:
    return lambda made: replace(made, profile=made.profile.model_copy(update={"memory": on}))


BASELINE_CHANGES: dict[str, Change] = {
    "restart and restore x 1/2": times(0.5, "restart", "restore_durable", "halt"),
    "restart and restore x 2": times(2, "restart", "restore_durable", "halt"),
    "detection x 1/2": times(0.5, "exit", "network", "hang", "corruption"),
    "detection x 2": times(2, "exit", "network", "hang", "corruption"),
    "checkpoint interval x 1/2": interval(0.5),
    "checkpoint interval x 2": interval(2),
    "save's stall x 2": times(2, "save_stall"),
    "repair and spares x 3": repair(3),
}
LADDER: dict[str, Change] = {
    "without memory tiers (every restore from the store)": memory(False),
    "restart as in the baseline (200 s)": times(200 / 60, "restart"),
    "snapshots each 10th step": lambda made: replace(made, snapshot_interval_steps=10),
    "durable saves half as often": interval(2),
}


def layout(**changes: Any) -> Change:
    return lambda made: replace(made, layout=replace(made.layout, **changes))


def costs(**changes: Any) -> Change:
    def change(made: Scenario) -> Scenario:
        profile = made.profile.model_copy(update={"costs": made.profile.costs.model_copy(update=changes)})
        return replace(made, profile=profile)

    return change


def announced(made: Scenario) -> Scenario:
    """Planned maintenance is known an hour before."""
    notice = {"effect": "leave", "notice_s": 3600.0}
    return each_cause(lambda cause: notice if cause.name == "planned maintenance" else {})(made)


WHOLE_LADDER: dict[str, Change] = {
    "without parked workers": costs(resume=None),
    "without a mesh that shrinks": layout(shrinks_to=()),
    "without spares, so that it shrinks": layout(spares=0),
    "with neither: it waits for nodes": layout(spares=0, shrinks_to=()),
    "with planned maintenance announced an hour before": announced,
}


def spread(made: Scenario, seeds: int) -> list[Outcome]:
    return [simulate(replace(made, seed=seed)) for seed in range(seeds)]


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    goodput = [o.goodput for o in outcomes]
    hours = [sum(o.ledger_node_hours.values()) for o in outcomes]
    labels = outcomes[0].ledger_node_hours
    return {
        "seeds": len(outcomes),
        "goodput_mean": statistics.fmean(goodput),
        "goodput_min": min(goodput),
        "goodput_max": max(goodput),
        "ended_early": [o.verdict for o in outcomes if o.verdict],
        "incidents_mean": statistics.fmean(sum(k.count for k in o.incidents) for o in outcomes),
        "shares": {
            label: statistics.fmean(o.ledger_node_hours[label] / h for o, h in zip(outcomes, hours, strict=True))
            for label in labels
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    spec, failures = specs.load(JOB), load_failures("llama3")
    made = {name: of_spec(spec, load_profile(name), failures, DAYS, 0) for name in ("restart", "shepherd", "ladder")}
    found: dict[str, dict[str, Any]] = {}
    few = min(SENSITIVITY_SEEDS, arguments.seeds)
    table = Table(title=f"{LABEL}: 16,384 GPUs, 54 days; the paper reports {PAPER}")
    for name in ("case", "seeds", "goodput", "least", "most", "incidents"):
        table.add_column(name, justify="left" if name == "case" else "right")

    def add(case: str, scenario: Scenario, seeds: int) -> None:
        found[case] = s = summary(spread(scenario, seeds))
        table.add_row(
            case + (f" (ended early: {s['ended_early'][0]})" if s["ended_early"] else ""),
            str(s["seeds"]),
            *(f"{s[f'goodput_{which}']:.2%}" for which in ("mean", "min", "max")),
            f"{s['incidents_mean']:.0f}",
        )

    add("baseline: whole-job restart", made["restart"], arguments.seeds)
    for name, change in BASELINE_CHANGES.items():
        add(f"  baseline, {name}", change(made["restart"]), few)
    add("Shepherd's ladder", made["shepherd"], arguments.seeds)
    for name, change in LADDER.items():
        add(f"  ladder, {name}", change(made["shepherd"]), few)
    add("the whole ladder", made["ladder"], arguments.seeds)
    for name, change in WHOLE_LADDER.items():
        add(f"  whole ladder, {name}", change(made["ladder"]), few)
    Console(width=130).print(table)
    shares = Table(title=f"{LABEL}: where the time goes, mean of all seeds")
    cases = ("baseline: whole-job restart", "Shepherd's ladder", "the whole ladder")
    for column in ("label", "baseline", "ladder", "whole ladder"):
        shares.add_column(column, justify="left" if column == "label" else "right")
    for label in found[cases[0]]["shares"]:
        row = [found[case]["shares"][label] for case in cases]
        if any(row):
            shares.add_row(label, *(f"{share:.3%}" for share in row))
    Console(width=130).print(shares)
    if arguments.json:
        arguments.json.write_text(json.dumps({"simulation": True, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
