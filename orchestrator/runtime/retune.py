"""How often a run saves when its job asks for `checkpoint.interval = "auto"`: chosen from what the run has measured.

The controller feeds it every event. When a checkpoint is committed, when an incident is closed, and else each hour it
asks the planner's own formula. What is far enough from the interval in force becomes an event: so the choice and its
inputs stand in the journal, and it is the supervisor that has it carried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.core import events as ev
from orchestrator.core.actions import Action
from orchestrator.core.state import State
from orchestrator.simulate.figures import Figures
from orchestrator.simulate.formulas import interval_steps
from trainer.contract import CheckpointConfig

LOOK_US = 3600 * 1_000_000
"""Between two looks when nothing happens: without failures the wanted interval grows with the root of time."""
WORTH_A_CHANGE = 1.2
"""Smallest factor between the interval in force and the next. Stalls and lost work cost (x + 1/x) / 2 of their least
when the interval is x times the best one: 1.7% more at 1.2, and both are a few percent of a run."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a choice is made from: the fields of `IntervalChosen`."""

    step_us: int
    stall_us: int
    write_us: int
    restores: int
    exposed_us: int


@dataclass
class Retuner:
    """For one controller and one run."""

    checkpoint: CheckpointConfig
    _figures: Figures = field(default_factory=Figures)
    _incidents: int = 0
    """Closed ones, as of the event before."""
    _looked_at: int = 0
    _restores_before: int = 0
    """Of `Figures.steps_lost`, what came before this controller."""
    _exposed_before_us: int = 0
    """The same of `Figures.exposed_us`."""

    def recall(self, state: State) -> None:
        """What earlier controllers of the run have seen, as its state knows it. Steps and saves are measured anew."""
        ledger, lost = state.ledger, (i for i in state.incidents if "durable" in i.rungs and i.steps_lost)
        self._restores_before = sum(1 for _ in lost)
        if ledger.places:
            away = sum(ledger.totals[label] for label in ("provisioning", "paused", "waiting_for_nodes"))
            self._exposed_before_us = (ledger.owed - away) // ledger.places
        self._incidents = len(state.incidents)

    def note(self, event: ev.Event, actions: Sequence[Action], state: State) -> ev.IntervalChosen | None:
        """Take in an event that was answered with `actions` and has led to `state`; a choice when one is due."""
        self._figures.note(event, actions)
        closed, self._incidents = len(state.incidents) > self._incidents, len(state.incidents)
        due = isinstance(event, ev.CheckpointCommitted) or closed or event.at - self._looked_at >= LOOK_US
        if not due or state.job != "training":
            return None
        self._looked_at = event.at
        return choose(self.checkpoint, in_force(self.checkpoint, state), self._inputs())

    def _inputs(self) -> Inputs:
        figures, pace = self._figures, self._figures.pace
        return Inputs(
            step_us=pace.steps.us,
            stall_us=pace.save_stalls.us,
            write_us=pace.writes.us + pace.commits.us,
            restores=self._restores_before + figures.steps_lost,
            exposed_us=self._exposed_before_us + figures.exposed_us,
        )


def in_force(checkpoint: CheckpointConfig, state: State) -> int:
    """Steps between durable saves now."""
    return checkpoint.interval_steps if state.interval is None else state.interval.every_steps


def choose(checkpoint: CheckpointConfig, now_steps: int, inputs: Inputs) -> ev.IntervalChosen | None:
    """Another interval than `now_steps`, if it is worth the change; None before a step and a save are measured."""
    if not (inputs.step_us and inputs.stall_us):
        return None
    wanted = wanted_steps(checkpoint, inputs)
    steps = min(max(wanted, checkpoint.shortest_interval_steps), checkpoint.longest_interval_steps)
    if max(steps, now_steps) < WORTH_A_CHANGE * min(steps, now_steps):
        return None
    return ev.IntervalChosen(at=0, every_steps=steps, **vars(inputs), why=_why(now_steps, wanted, steps, inputs))


def wanted_steps(checkpoint: CheckpointConfig, inputs: Inputs) -> int:
    """By the planner's formula, whatever the job's bounds are."""
    rate = restores_per_us(checkpoint.interval_steps * inputs.step_us, inputs)
    return interval_steps(rate, inputs.stall_us, inputs.step_us, inputs.write_us)


def restores_per_us(first_us: int, inputs: Inputs) -> float:
    """The rate of failures that cost a restore from the store, by what was seen and what the job's first interval says.

    Few are ever seen, so the rate is a Gamma posterior (Gelman et al., Bayesian Data Analysis, section 2.6). The first
    interval T is a belief: that of a rate of 2 x stall / T^2, for which it is the best. It counts as one failure in
    the inverse of that time. So a run begins with what the job says, and what happens to it outweighs that in time.
    """
    believed_us = first_us * first_us / (2 * inputs.stall_us)
    return (1 + inputs.restores) / (believed_us + inputs.exposed_us)


def _why(now_steps: int, wanted: int, steps: int, inputs: Inputs) -> str:
    bounded = "" if steps == wanted else f", the job's bounds allow {steps}"
    return (
        f"{now_steps} steps were in force; a save stalls training for {inputs.stall_us / 1e6:.3g} s, and in "
        f"{inputs.exposed_us / 3.6e9:,.4g} h steps were lost {inputs.restores} times to a restore from the store: "
        f"Young and Daly want {wanted}{bounded}"
    )
