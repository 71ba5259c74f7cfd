"""A real run, read from its journal, as a scenario: its costs as they were, its failures as they came.

What the simulator then says can be compared with what happened: `benchmarks/predicted.py`.

Costs are the run's averages, but for two that are known one by one: what each save took, and the pace of each
generation. So a machine that was slow for a while is slow there again. What is predicted is what follows: which rungs
are taken, which steps are done again, and what all of it comes to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core import recovery
from orchestrator.core.codec import action_from_json
from orchestrator.core.state import Evidence, Incident, State
from orchestrator.core.supervisor import Supervisor
from orchestrator.runtime.journal import Record
from orchestrator.simulate.body import Scenario
from orchestrator.simulate.figures import Figures, Mean, Pace
from orchestrator.simulate.harm import DAY_US, Strike
from orchestrator.simulate.profile import (
    Costs,
    Detection,
    Effect,
    Exposure,
    Failures,
    Figure,
    Profile,
    Seconds,
)

LONGEST_DAYS = 10.0
NEVER_US = round(LONGEST_DAYS * DAY_US)
STEPS_THAT_TELL = 3
"""A generation with fewer, its first apart, has the run's pace: one step that was late by chance is none of its own."""
EFFECTS: dict[str, Effect] = {
    "node": "node",
    "hang": "hang",
    "slow": "slow",
    "corrupt": "corrupt",
    "collective": "collective",
    "leave": "leave",
}
"""Cause of an incident to what struck; every other is a worker's end."""


class NotMeasured(ValueError):
    """The journal does not hold what is wanted of it."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    scenario: Scenario
    """With the run's own failures and no others."""
    goodput: float
    """Real: productive over all node-time until the last step was done."""
    incidents: tuple[Incident, ...]


@dataclass
class _Generation:
    """What the journal says of one generation."""

    order: ac.OpenGeneration
    opened_at: int
    ready_at: int | None = None
    last_step_at: int = 0
    heard_at: int = 0
    """When the mesh was last known to be well: of its last step, or of a save that it has written."""
    strikes: list[Strike] = field(default_factory=list)


@dataclass
class _Notes:
    generations: list[_Generation] = field(default_factory=list)
    saves_us: dict[tuple[int, int], int] = field(default_factory=dict)
    """Generation and step to the time from the step's end until the save was whole."""
    saved: list[int] = field(default_factory=list)
    """Steps of checkpoints, but for the run's last, which is saved wherever it ends."""
    interrupted: tuple[int, str] | None = None
    """When the incident that is open was detected, while its causes are gathered."""


def measure(records: Sequence[Record], snapshot_interval_steps: int = 1) -> Measured:
    """The run that this journal tells, up to its last step.

    Raises:
        NotMeasured: the run was resumed, or no step of it is told by itself, so that it has no pace.
    """
    if sum(isinstance(record.event, ev.RunDeclared) for record in records) != 1:
        raise NotMeasured("the run was resumed, or never declared")
    notes, figures, core = _Notes(), Figures(), Supervisor()
    goodput = 0.0
    for record in records:
        before = core.state.job
        core.handle(record.event)
        actions = [action_from_json(action) for action in record.actions]
        _note(notes, core.state, before, record.event, actions)
        figures.note(record.event, actions)
        if isinstance(record.event, ev.StepsDone):
            ledger = core.state.ledger
            goodput = ledger.totals["productive"] / ledger.owed
    if not figures.pace.steps.n:
        raise NotMeasured("no step was told by itself")
    state = core.state
    assert state.layout is not None and state.limits is not None
    pace = _pace(figures.pace)
    assert figures.provision_us is not None
    repair_us = max(0, figures.repairs.us - figures.provision_us) if figures.repairs.n else NEVER_US
    return Measured(
        goodput=goodput,
        incidents=tuple(state.incidents),
        scenario=Scenario(
            layout=state.layout,
            limits=state.limits,
            step_us=pace.step_us,
            paces_us=pace.own_us,
            checkpoint_interval_steps=_interval(notes.saved) or state.high_water,
            snapshot_interval_steps=snapshot_interval_steps,
            profile=_profile(figures, state, pace.stall_us * snapshot_interval_steps, pace.warm_up_us),
            failures=Failures(title="the run's own", exposure=Exposure(node_days=1, source="not used"), causes=()),
            days=LONGEST_DAYS,
            seed=0,
            strikes={
                g.order.generation: tuple(replace(strike, repair_us=repair_us) for strike in g.strikes)
                for g in notes.generations
                if g.strikes
            },
            writes_us=notes.saves_us,
            total_steps=state.high_water,
        ),
    )


def _note(notes: _Notes, state: State, before: str, event: ev.Event, actions: Iterable[ac.Action]) -> None:
    newest = notes.generations[-1] if notes.generations else None
    match event:
        case ev.GenerationReady() if newest is not None and before == "starting" and state.job == "training":
            newest.ready_at = newest.last_step_at = newest.heard_at = event.at
        case ev.StepsDone() if newest is not None and before == "training" and newest.ready_at is not None:
            newest.last_step_at = newest.heard_at = event.at
        case ev.CheckpointWritten():
            if newest is not None and before == "training" and event.generation == newest.order.generation:
                newest.heard_at = event.at
                took = event.at - newest.last_step_at if state.step == event.step else event.write_us
                notes.saves_us[event.generation, event.step] = took
            notes.saved += [event.step] if event.step < state.total_steps else []
        case ev.NodeLost() if newest is not None and before in ("starting", "training"):
            if event.node not in newest.order.nodes:
                newest.strikes.append(_of_a_spare(newest, event.at, state.step))
    failed = state.job in ("halting", "waiting") or any(isinstance(action, ac.OpenGeneration) for action in actions)
    if newest is not None and before in ("starting", "training") and failed:
        notes.interrupted = (event.at, before)
    for action in actions:
        if isinstance(action, ac.OpenGeneration) and not isinstance(event, ev.EpochBegan):
            if newest is not None:
                _end(notes, newest, state)
            notes.generations.append(_Generation(order=action, opened_at=event.at))
    if newest is not None and state.job == "waiting":
        _end(notes, newest, state)


def _end(notes: _Notes, generation: _Generation, state: State) -> None:
    """Why the generation ended: the incident is charged by now, and still open."""
    incident = state.incident
    if notes.interrupted is None or incident is None:
        return
    (at, phase), notes.interrupted = notes.interrupted, None
    evidence = incident.evidence or incident.answered
    places = {name: place for place, name in enumerate(generation.order.nodes)}
    lost = [e for e in evidence if e.node in places and e.kind == "node"]
    # What nobody can be named for has ended it all the same: as if the first place's worker had.
    struck = [(places[e.node], "node") for e in lost] or [_culprit(recovery.root(incident), places)]
    # Nobody has seen the moment of the failure: the mesh did nothing useful from its last step on.
    training = phase == "training" and generation.ready_at is not None
    last = generation.heard_at if training else at
    # A generation that an incident has opened and that failed in turn has done no step of its own.
    done = incident.step if incident.generation == generation.order.generation else generation.order.step
    for place, kind in struck:
        effect = EFFECTS.get(kind, "worker")
        generation.strikes.append(
            Strike(
                step=done if training else None,
                after_us=last - (generation.last_step_at if training else generation.opened_at),
                detect_us=at - last,
                effect="worker" if effect == "corrupt" and not training else effect,
                place=place,
                repair_us=0,
            )
        )


def _of_a_spare(generation: _Generation, at: int, step: int) -> Strike:
    ready = generation.ready_at is not None
    since = generation.last_step_at if ready else generation.opened_at
    return Strike(
        step=step if ready else None, after_us=at - since, detect_us=0, effect="node", place=None, repair_us=0
    )


def _culprit(cause: Evidence, places: dict[str, int]) -> tuple[int, str]:
    return (places[cause.node], cause.kind) if cause.node in places else (0, "")


def _interval(saved: Sequence[int]) -> int:
    """The distance between saves that is most common; one that was late for the one before, or failed, shifts few."""
    gaps = Counter(after - before for before, after in pairwise([0, *sorted(set(saved))]))
    return max(gaps, key=lambda gap: (gaps[gap], -gap), default=0)


@dataclass(frozen=True, kw_only=True)
class _Pace:
    step_us: int
    """Without its stalls."""
    stall_us: int
    own_us: dict[int, int]
    """Generation to a step of it, with the run's stalls taken off, where it has enough of them to tell."""
    warm_up_us: int
    """What a generation's first step takes longer than its others."""


def _pace(pace: Pace) -> _Pace:
    stall, whole = pace.stalls_us // pace.all_steps, pace.steps.us
    own = {g: steps.rest.us for g, steps in pace.generations.items() if steps.rest.n >= STEPS_THAT_TELL}
    extra = sum(steps.first.total_us - steps.first.n * own.get(g, whole) for g, steps in pace.generations.items())
    return _Pace(
        step_us=max(1, whole - stall),
        stall_us=stall,
        own_us={g: max(1, us - stall) for g, us in own.items()},
        warm_up_us=max(0, extra // len(pace.generations)),
    )


def _profile(figures: Figures, state: State, snapshot_stall_us: int, warm_up_us: int) -> Profile:
    def seconds(mean: Mean) -> Seconds:
        return Seconds(value=mean.s, source="measured")

    def once(us: int) -> Seconds:
        return Seconds(value=us / 1e6, source="measured")

    restores = figures.restores
    copied = seconds(restores["peer"])
    own = seconds(restores["ram"]) if restores["ram"].n else copied
    zero = Seconds(value=0, source="not used")
    assert figures.provision_us is not None
    costs = Costs(
        snapshot_stall=once(snapshot_stall_us),
        save_stall=zero,  # measured with the other stalls
        save_write=seconds(figures.pace.writes),
        commit=zero,
        halt=seconds(figures.halts),
        restart=seconds(figures.restarts),
        warm_up=once(warm_up_us),
        restore_ram=own,
        restore_peer=Seconds(value=max(0.0, copied.value - own.value), source="measured"),
        restore_durable=seconds(restores["durable"]),
        provision=once(figures.provision_us),
    )
    return Profile(
        title="measured",
        memory="ram" in state.capabilities,
        tflops_per_gpu=Figure(value=1, source="not used"),
        costs=costs,
        detection=Detection(exit=zero, network=zero, hang=zero, corruption=zero, notice=zero),
    )
