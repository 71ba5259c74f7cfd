"""The scorecard: what became of each fault that was ordered, from the run's journal alone.

What was done is the ground truth that the injectors told; what was found is what the incidents say. Nothing of the
first went into the second: the detectors do not know of the orders.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.chaos.orders import ENDS_THE_CONTROLLER, LASTING, NOT_DONE, OF_A_NODE
from orchestrator.core import events as ev
from orchestrator.core import recovery
from orchestrator.core.actions import InjectFault
from orchestrator.core.state import Evidence, Fault, Incident
from orchestrator.core.supervisor import Supervisor
from orchestrator.runtime.journal import Record

NO_EFFECT = "no effect"
"""How the detail of a flip begins that changed no bit."""

_SHOWS_AFTER_S = 5.0
"""A clock that has leapt would have been seen by now: the shortest silence that counts."""

# What a detector that has understood the fault calls it.
_KINDS: dict[str, tuple[str, ...]] = {
    "worker-kill": ("signal",),
    "worker-stop": ("hang",),
    "worker-exception": ("exception",),
    "worker-segfault": ("signal",),
    "worker-lock": ("hang",),
    "worker-loop": ("hang",),
    "memory": ("memory",),
    "flip": ("corrupt",),
    "node-kill": ("node",),
    "net-cut": ("node",),
}

_HARMLESS = ("clock-jump", "net-delay", "net-cut")
"""What a run may go on through, with nothing to be found; of net-cut that is the controller alone, and short ones."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One fault and its outcome. Seconds; None is what has not come, or does not apply."""

    number: int
    fault: str
    by: str
    at_s: float
    """When it was ordered, on the run's clock; the journal held the order before anything was done."""
    node: str
    rank: int | None
    step: int
    """Steps that the run had completed then."""
    truth: str
    """What was done, in the injector's words; empty while it has not told."""
    incident: int | None = None
    """Number of the incident that it made."""
    found: str = ""
    """What was found: kind of the evidence and its words."""
    detected_after_s: float | None = None
    """From the order to the first evidence of it."""
    right_node: bool | None = None
    right_rank: bool | None = None
    rung: str = ""
    recovered: bool = False
    recovery_s: float | None = None
    """From that evidence to the next completed step."""
    steps_lost: int | None = None
    harmless: bool = False
    """Whether training went on through what it may go on through: then there is nothing to be found."""
    identical: bool | None = None
    """Whether the run ended with the untouched run's state; None: not compared."""

    @property
    def detected(self) -> bool:
        return self.detected_after_s is not None

    @property
    def settled(self) -> bool:
        """Whether nothing more is to be waited for."""
        return ((self.detected or self.harmless) and self.recovered) or self.truth.startswith((NOT_DONE, NO_EFFECT))

    @property
    def passed(self) -> bool:
        """Done, detected, charged to the right place, recovered, and of no consequence."""
        if self.truth.startswith(NO_EFFECT):
            return not self.detected and self.identical is not False
        done = bool(self.truth) and not self.truth.startswith(NOT_DONE)
        right = False not in (self.right_node, self.right_rank, self.identical)
        return done and (self.detected or self.harmless) and right and self.recovered

    def document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**dataclasses.asdict(self), "detected": self.detected, "passed": self.passed}


def score(records: Sequence[Record], identical: bool | None = None) -> list[Score]:
    """The faults that these records of a journal tell of, in order, and what became of each.

    Args:
        identical: whether the run's final state is the untouched run's, when they were compared.
    """
    supervisor = Supervisor()
    by: list[str] = []
    orders: list[InjectFault] = []
    for record in records:
        actions = supervisor.handle(record.event)
        if isinstance(record.event, ev.FaultRequested):
            orders += [action for action in actions if isinstance(action, InjectFault)]
            by += [record.event.by] * (len(orders) - len(by))
    state = supervisor.state
    faults = [_as_done(fault, order) for fault, order in zip(state.faults, orders, strict=True)]
    blanks = [
        Score(
            number=fault.number,
            fault=fault.fault,
            by=asker,
            at_s=fault.ordered_at / 1e6,
            node=fault.node,
            rank=fault.slot,
            step=fault.step,
            truth=fault.detail,
            identical=identical,
        )
        for fault, asker in zip(faults, by, strict=True)
    ]
    incidents = [*state.incidents, *([state.incident] if state.incident is not None else [])]
    found = _match(faults, orders, incidents)
    scores = []
    for fault, order, blank in zip(faults, orders, blanks, strict=True):
        events = [record.event for record in records if record.event.at >= fault.ordered_at]
        if fault.fault in ENDS_THE_CONTROLLER:
            scores.append(_of_the_controller(blank, fault, events))
        elif fault.fault in ("disk-full", "store-outage"):
            scores.append(_of_the_store(blank, fault, events))
        elif fault.fault == "worker-slow":
            scores.append(_of_a_straggler(blank, fault, events))
        elif fault.number in found:
            scores.append(_of_an_incident(blank, fault, *found[fault.number]))
        elif fault.fault in _HARMLESS:
            scores.append(_of_no_consequence(blank, fault, order, events))
        else:
            scores.append(_of_a_spare(blank, fault, events))
    return scores


def _as_done(fault: Fault, order: InjectFault) -> Fault:
    """One that waits for a recovery counts from when it was done."""
    if order.parameters.get("during") == "recovery" and fault.injected_at is not None:
        return dataclasses.replace(fault, ordered_at=fault.injected_at)
    return fault


def _match(
    faults: list[Fault], orders: list[InjectFault], incidents: list[Incident]
) -> dict[int, tuple[Incident, Evidence]]:
    """By the number of the fault: what was found of it. One piece of evidence is of one fault, or of one worker.

    First come those that were found as what they were, where they were. A worker whose whole node died in the same
    incident was found with its node, and a worker dies once: what was found of it answers all that had been ordered for
    it by then. What is left is put down, as a wrong verdict, to the next incident that nothing else explains. Only what
    struck the generation that was hurt counts.
    """
    found: dict[int, tuple[Incident, Evidence]] = {}
    seen: dict[int, list[tuple[Incident, Evidence]]] = {}
    taken: set[int] = set()
    for fault, order in zip(faults, orders, strict=True):
        seen[fault.number] = [
            (i, e)
            for i in incidents
            if _can_be_of(i, fault, order)
            for e in (*i.answered, *i.evidence)
            if e.at >= fault.ordered_at
        ]
        for incident, e in seen[fault.number]:
            exact = e.kind in _KINDS.get(fault.fault, ()) and (e.node, e.slot) == (fault.node, fault.slot)
            if exact and id(e) not in taken:
                taken.add(id(e))
                found[fault.number] = (incident, e)
                break
    for fault in faults:
        if fault.number in found or fault.fault not in _KINDS:
            continue
        later = seen[fault.number]
        shared = [(i, e) for i, e in later if e.kind == "node" and e.node == fault.node]
        shared += [(i, e) for i, e in later if id(e) in taken and (e.node, e.slot) == (fault.node, fault.slot)]
        unexplained = [
            (i, recovery.root(i)) for i, e in later if not any(id(x) in taken for x in (*i.answered, *i.evidence))
        ]
        if shared or unexplained:
            found[fault.number] = min(shared or unexplained, key=lambda pair: pair[1].at)
    return found


def _can_be_of(incident: Incident, fault: Fault, order: InjectFault) -> bool:
    """Whether it struck the generation that the fault was for, or was open when that was ordered.

    A node whose loss is noticed once the next generation has opened interrupts that one.
    """
    if incident.detected_at < fault.ordered_at:
        return incident.closed_at is None or incident.closed_at >= fault.ordered_at
    later = fault.fault in OF_A_NODE or order.parameters.get("during") == "recovery"
    return incident.generation <= order.generation + later


def _of_an_incident(blank: Score, fault: Fault, incident: Incident, evidence: Evidence) -> Score:
    whole_node = evidence.kind == "node" and evidence.node == fault.node
    return dataclasses.replace(
        blank,
        incident=incident.number,
        found=f"{evidence.kind}: {evidence.detail}",
        detected_after_s=(evidence.at - fault.ordered_at) / 1e6,
        right_node=evidence.node == fault.node,
        right_rank=None if fault.slot is None or whole_node else evidence.slot == fault.slot,
        rung=incident.rungs[-1] if incident.rungs else "",
        recovered=incident.closed_at is not None,
        recovery_s=None if incident.closed_at is None else (incident.closed_at - evidence.at) / 1e6,
        steps_lost=incident.steps_lost,
    )


def _of_a_spare(blank: Score, fault: Fault, events: Sequence[ev.Event]) -> Score:
    """A node that held no slot makes no incident: that it is missed is all that there is to it."""
    lost = next((e for e in events if isinstance(e, ev.NodeLost) and e.node == fault.node), None)
    if fault.fault != "node-kill" or lost is None:
        return blank
    after_s = (lost.at - fault.ordered_at) / 1e6
    return dataclasses.replace(
        blank, found=f"node: {lost.cause}", detected_after_s=after_s, right_node=True, recovered=True
    )


def _of_a_straggler(blank: Score, fault: Fault, events: Sequence[ev.Event]) -> Score:
    """Found when it is named, at once recovered: the run goes on, and by default nothing more is done.

    On a machine that many share others may be slow, too, and named before it.
    """
    named = [e for e in events if isinstance(e, ev.NodeSlow)]
    if not named:
        return blank
    right = [e for e in named if (e.node, e.slot) == (fault.node, fault.slot)]
    slow = (right or named)[0]
    before = named.index(slow)
    return dataclasses.replace(
        blank,
        found=f"slow{f', after {before} others' if before else ''}: {slow.detail}",
        detected_after_s=(slow.at - fault.ordered_at) / 1e6,
        right_node=slow.node == fault.node,
        right_rank=slow.slot == fault.slot,
        recovered=any(isinstance(e, ev.StepsDone) and e.at >= slow.at for e in events),
    )


def _of_no_consequence(blank: Score, fault: Fault, order: InjectFault, events: Sequence[ev.Event]) -> Score:
    """Steps that were done after it, and after its end if it has one, show that there was nothing to find."""
    lasts = float(order.parameters["seconds"]) if order.fault in LASTING else 0.0
    over_at = fault.ordered_at + round(max(lasts, _SHOWS_AFTER_S) * 1e6)
    went_on = any(isinstance(e, ev.StepsDone) and e.at >= over_at for e in events)
    return dataclasses.replace(blank, harmless=went_on, recovered=went_on)


def _of_the_controller(blank: Score, fault: Fault, events: Sequence[ev.Event]) -> Score:
    """Found when the next controller begins its epoch, recovered when it hears of the next step."""
    began = next((e for e in events if isinstance(e, ev.EpochBegan)), None)
    if began is None:
        return blank
    alive = (ev.StepsDone, ev.GenerationReady, ev.GenerationFinished)
    heard = next((e for e in events if isinstance(e, alive) and e.at >= began.at), None)
    return dataclasses.replace(
        blank,
        found=f"epoch {began.epoch} took over",
        detected_after_s=(began.at - fault.ordered_at) / 1e6,
        recovered=heard is not None,
        recovery_s=None if heard is None else (heard.at - began.at) / 1e6,
    )


def _of_the_store(blank: Score, fault: Fault, events: Sequence[ev.Event]) -> Score:
    """Found when a save fails, recovered when a later one is committed. Training goes on all the time."""
    failed = next((e for e in events if isinstance(e, ev.CheckpointFailed)), None)
    if failed is None:
        return blank
    saved = next((e for e in events if isinstance(e, ev.CheckpointCommitted) and e.at >= failed.at), None)
    return dataclasses.replace(
        blank,
        found=f"save of step {failed.step}: {failed.error}",
        detected_after_s=(failed.at - fault.ordered_at) / 1e6,
        recovered=saved is not None,
        recovery_s=None if saved is None else (saved.at - failed.at) / 1e6,
    )


def show(console: Console, scores: Sequence[Score], note: str = "") -> None:
    """Print the scorecard for people."""
    console.print(_table(scores))
    for s in scores:
        console.print(f"{s.number}. {s.truth or 'not told what was done'}", markup=False)
        console.print(f"   found: {textwrap.shorten(s.found, 240) or _nothing(s)}", markup=False)
    if note:
        console.print(note, style="red", markup=False)


def _table(scores: Sequence[Score]) -> Table:
    shown = Table("#", "fault", "at", "where", "found", "node", "rank", "rung", "recovered", "lost", "same state")
    for s in scores:
        where = s.node + ("" if s.rank is None else f" r{s.rank}")
        shown.add_row(
            str(s.number),
            s.fault,
            f"{s.at_s:.1f} s, step {s.step}",
            where or "-",
            f"in {s.detected_after_s:.2f} s" if s.detected_after_s is not None else "-" if s.harmless else "NO",
            _yes(s.right_node),
            _yes(s.right_rank),
            s.rung or "-",
            f"in {s.recovery_s:.2f} s" if s.recovered and s.recovery_s is not None else _yes(s.recovered),
            "-" if s.steps_lost is None else f"{s.steps_lost} steps",
            "not compared" if s.identical is None else _yes(s.identical),
        )
    return shown


def _nothing(s: Score) -> str:
    return "nothing, and training went on" if s.harmless else "nothing"


def _yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "NO"
