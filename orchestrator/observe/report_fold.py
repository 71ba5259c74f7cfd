"""What a run's journal tells: a fold of its records through the supervisor, kept as what a report shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core.actions import Action
from orchestrator.core.goodput import Label
from orchestrator.core.state import Incident, JobState, State
from orchestrator.core.supervisor import Supervisor
from orchestrator.observe.report_checkpoints import CheckpointLog
from orchestrator.runtime.journal import Record, ReplayMismatch, is_on_record

PHASES: dict[str, str] = {
    "teardown": "until every worker of the old generation had ended",
    "waiting": "for enough usable nodes",
    "restart": "copies between nodes, workers, rendezvous, model",
    "restore": "reading the state",
    "first_step": "from ready to the first completed step",
}
"""Of an incident, from the notice to its end, without a gap and without overlap."""

_PHASE_OF_JOB: dict[JobState, str] = {
    "halting": "teardown",
    "waiting": "waiting",
    "starting": "restart",
    "training": "first_step",
}

_BESIDE_THE_MESH: tuple[Label, ...] = ("idle_spare", "degraded_capacity", "provisioning", "paused")
"""Labels of other places while the mesh trains; any other settles the mesh's pending time, from where that began."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """One lane's bar: what a node was, or the mesh did. Times of a report are microseconds on the run's clock."""

    lane: str
    doing: str
    generation: int
    start: int
    end: int


@dataclass(kw_only=True)
class Generation:
    """One assignment of slots to workers, and what became of it."""

    order: ac.OpenGeneration
    opened_at: int
    rung: str
    """Empty when no incident was open."""
    ready: ev.GenerationReady | None = None
    last_step: int = 0
    ended_at: int | None = None
    end: str = ""


@dataclass(kw_only=True)
class Story:
    """One incident, with what its record in the state does not say."""

    incident: Incident
    detection_us: int
    """Wall-clock of the step in flight and until the failure was noticed."""
    phases_us: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    detection_cost_us: int = 0
    recomputed_cost_us: int = 0
    """Node-microseconds, part of incident.cost_us as the detection's."""
    tried: list[Generation] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    """Why nodes had to be waited for."""
    end: str = ""
    """Why it was never closed; empty when it was, and while it is open."""
    open_cost_us: int = 0
    """While it is open: what its recovery has cost so far, which the incident itself is charged with at its end."""

    @property
    def cost_us(self) -> int:
        """Node-microseconds of detection, recovery, waiting and recomputation."""
        return self.incident.cost_us + self.open_cost_us

    @property
    def total_us(self) -> int:
        return sum(self.phases_us.values())


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened at one time."""

    at: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tokens of steps that were completed between two times; `redone` are those of steps that had been done before."""

    start: int
    end: int
    tokens: int
    redone: int


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Node-microseconds that the ledger gave a label, and between which times they passed."""

    start: int
    end: int
    label: Label
    node_us: int


@dataclass(kw_only=True)
class History:
    """Everything that a report shows. `state` is where the journal ends."""

    state: State
    declared: list[ev.RunDeclared] = field(default_factory=list)
    pauses: list[tuple[int, int]] = field(default_factory=list)
    """Between an end and a resume, and after the last end."""
    epochs: list[tuple[ev.EpochBegan, bool]] = field(default_factory=list)
    """Each controller, and whether it took over a run under way."""
    node_spans: list[Span] = field(default_factory=list)
    mesh_spans: list[Span] = field(default_factory=list)
    departures: list[tuple[str, Mark]] = field(default_factory=list)
    """Nodes that were lost, and why."""
    stragglers: list[Mark] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    stories: list[Story] = field(default_factory=list)
    requests: dict[int, ev.FaultRequested] = field(default_factory=dict)
    """By the fault's number."""
    stops: list[Mark] = field(default_factory=list)
    checkpoints: CheckpointLog = field(default_factory=CheckpointLog)
    spent: list[Spent] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    steps_redone: int = 0
    productive_wall_us: int = 0
    """Time in which the mesh executed steps for the first time."""
    n_records: int = 0

    @property
    def wall_clock_us(self) -> int:
        return self.state.ledger.mark - self.state.began_at

    @property
    def active_us(self) -> int:
        """Wall-clock without pauses."""
        return self.clock(self.state.ledger.mark)

    def clock(self, at: int) -> int:
        """Microseconds since the run was declared, pauses cut out: the time axis of the charts."""
        paused = sum(min(at, end) - start for start, end in self.pauses if start < at)
        return at - self.state.began_at - paused


def fold(records: Iterable[Record]) -> History:
    """Replay the records, each decision checked against the one on record.

    Raises:
        ReplayMismatch: this code decides differently, or refuses the record.
    """
    folding = _Fold()
    for record in records:
        folding.take(record)
    return folding.end()


class _Fold:
    """One pass over the records. What an event changed is what differs between before and after it."""

    def __init__(self) -> None:
        self._supervisor = Supervisor()
        self._state = self._supervisor.state
        self._history = History(state=self._state)
        self._nodes: dict[str, tuple[str, int, int]] = {}
        """Node to its bar under way: what it is, in which generation, since when."""
        self._mesh: tuple[str, int, int] | None = None
        """The mesh's bar under way."""
        self._job_since = self._worked_until = 0
        self._ended_at: int | None = None
        self._declared_anew = False

    def take(self, record: Record) -> None:
        state, ledger, event = self._state, self._state.ledger, record.event
        self._history.n_records += 1
        mark, pending, totals, mesh_nodes = ledger.mark, ledger.pending_since, dict(ledger.totals), ledger.mesh_nodes
        job, generation, incident, counts = state.job, state.generation, state.incident, dict(state.counts)
        step, high_water, saves_failed = state.step, state.high_water, state.saves_failed
        actions = self._decide(record)
        self._spend(totals, mark, pending, mesh_nodes)
        if isinstance(event, ev.RunDeclared):
            self._declare(event, mark)
        elif job == "ended" and not isinstance(event, ev.EpochBegan):
            return
        elif incident is not None:
            self._phase(event, job, mark)
        if len(state.incidents) + (state.incident is not None) > len(self._history.stories):
            self._interrupted(pending)
        self._given_up()
        self._recomputed(totals["recomputed"])
        if (job, generation) != (state.job, state.generation):
            self._job_changed(event, generation)
        if isinstance(event, ev.NodeJoined) and generation == state.generation:
            self._node(event.node, event.at, actions)
        elif counts != state.counts or generation != state.generation:
            for name in state.nodes:
                self._node(name, event.at, actions)
        if state.generation == generation and state.step > step:
            self._stepped(event, state.step - step, state.high_water - high_water)
        self._note(event, actions)
        self._history.checkpoints.note(event, actions, state, failed=state.saves_failed > saves_failed)

    def end(self) -> History:
        """Close what is open where the journal ends."""
        history, at = self._history, self._state.ledger.mark
        self._close(at if self._ended_at is None else self._ended_at)
        if self._ended_at is not None and at > self._ended_at:
            history.pauses.append((self._ended_at, at))
        if self._state.incident is not None:
            totals = self._state.ledger.totals
            recovery_us = totals["recovery"] + totals["waiting_for_nodes"]
            history.stories[-1].open_cost_us = recovery_us - self._state.incident.ledger_before_us
        history.checkpoints.finish(self._state)
        return history

    def _decide(self, record: Record) -> list[Action]:
        name = f"record {record.seq} ({type(record.event).__name__})"
        try:
            actions = self._supervisor.handle(record.event)
        except Exception as e:
            raise ReplayMismatch(f"{name}: this version of Shepherd fails on it: {e!r}", record.epoch) from e
        if not is_on_record(actions, record):
            otherwise = f"{name}: this version of Shepherd decides otherwise than the one that wrote it"
            raise ReplayMismatch(otherwise, record.epoch)
        return actions

    # --- the run and its mesh ---

    def _declare(self, event: ev.RunDeclared, mark: int) -> None:
        history = self._history
        if history.declared:
            paused_since = mark if self._ended_at is None else self._ended_at
            self._close(paused_since)
            self._end_generation(paused_since, "the run was declared again")
            history.pauses.append((paused_since, event.at))
        history.declared.append(event)
        self._ended_at, self._job_since, self._declared_anew = None, event.at, True
        self._mesh = ("waiting", 0, event.at)

    def _job_changed(self, event: ev.Event, generation: int) -> None:
        """A new bar in the mesh's lane, and what it means for generations and the open incident."""
        state, history, at = self._state, self._history, event.at
        self._close_mesh(at)
        self._job_since = at
        if state.job == "ended":
            self._ended_at = at
            self._close(at)
            return
        doing = "recovering" if state.job == "starting" and state.incident is not None else state.job
        self._mesh = (doing, state.generation, at)
        story = history.stories[-1] if state.incident is not None else None
        if state.job == "waiting" and story is not None:
            story.waits.append(story.incident.reason)
        if state.job == "training" and isinstance(event, ev.GenerationReady):
            history.generations[-1].ready = event
            self._worked_until = at
        if state.generation != generation:
            assert state.order is not None
            rung = "" if story is None else story.incident.rungs[-1]
            opened = Generation(order=state.order, opened_at=at, rung=rung, last_step=state.step)
            history.generations.append(opened)
            if story is not None:
                story.tried.append(opened)

    def _close(self, at: int) -> None:
        """The end of every bar."""
        self._close_mesh(at)
        for name in list(self._nodes):
            self._close_node(name, at)

    def _close_mesh(self, at: int) -> None:
        if self._mesh is not None and at > self._mesh[2]:
            doing, generation, since = self._mesh
            self._history.mesh_spans.append(Span(lane="", doing=doing, generation=generation, start=since, end=at))
        self._mesh = None

    def _end_generation(self, at: int, why: str) -> None:
        last = self._history.generations[-1] if self._history.generations else None
        if last is not None and last.ended_at is None:
            last.ended_at, last.end = at, why

    def _stepped(self, event: ev.Event, steps: int, new_steps: int) -> None:
        history = self._history
        history.generations[-1].last_step = self._state.step
        history.steps_redone += steps - new_steps
        if isinstance(event, ev.StepsDone):
            redone = event.tokens * (steps - new_steps) // steps
            history.work.append(Work(start=self._worked_until, end=event.at, tokens=event.tokens, redone=redone))
        self._worked_until = event.at

    # --- nodes ---

    def _node(self, name: str, at: int, actions: list[Action]) -> None:
        doing = self._state.nodes[name].state
        generation = self._state.generation if doing == "active" else 0
        if self._state.job == "ended" or self._nodes.get(name, ("", 0, 0))[:2] == (doing, generation):
            return
        if doing == "lost":
            why = [a.reason for a in actions if isinstance(a, ac.ReleaseNode) and a.node == name]
            self._history.departures.append((name, Mark(at=at, text=" ".join(why))))
        self._close_node(name, at)
        self._nodes[name] = (doing, generation, at)

    def _close_node(self, name: str, at: int) -> None:
        doing, generation, since = self._nodes.pop(name, ("", 0, at))
        if at > since:
            self._history.node_spans.append(Span(lane=name, doing=doing, generation=generation, start=since, end=at))

    # --- time ---

    def _spend(self, before: dict[Label, int], mark: int, pending: int | None, mesh_nodes: int) -> None:
        ledger = self._state.ledger
        for label, total in ledger.totals.items():
            node_us = total - before[label]
            if node_us:
                start = mark if pending is None or label in _BESIDE_THE_MESH else pending
                self._history.spent.append(Spent(start=start, end=ledger.mark, label=label, node_us=node_us))
            if node_us and label == "productive":
                self._history.productive_wall_us += node_us // mesh_nodes

    def _interrupted(self, pending: int | None) -> None:
        incident = self._state.incident or self._state.incidents[-1]
        detection_us = 0 if pending is None else incident.detected_at - pending
        story = Story(incident=incident, detection_us=detection_us, detection_cost_us=incident.cost_us)
        self._history.stories.append(story)

    def _given_up(self) -> None:
        last = self._history.stories[-1] if self._history.stories else None
        if last is not None and self._state.incident is None and last.incident.closed_at is None and not last.end:
            last.end = self._state.verdict or "the run was declared again"

    def _phase(self, event: ev.Event, job: JobState, mark: int) -> None:
        """The time since the record before belongs to what the mesh did then; the end of a start was the restore."""
        phases = self._history.stories[-1].phases_us
        phases[_PHASE_OF_JOB[job]] += event.at - mark
        if isinstance(event, ev.GenerationReady) and job == "starting" and self._state.job == "training":
            restore_us = min(event.restore_us, event.at - self._job_since)
            phases["restart"] -= restore_us
            phases["restore"] += restore_us

    def _recomputed(self, before: int) -> None:
        more = self._state.ledger.totals["recomputed"] - before
        if more and self._state.incidents:
            self._history.stories[self._state.incidents[-1].number - 1].recomputed_cost_us += more

    # --- what is told ---

    def _note(self, event: ev.Event, actions: list[Action]) -> None:
        history = self._history
        match event:
            case ev.EpochBegan():
                history.epochs.append((event, not self._declared_anew))
                self._declared_anew = False
            case ev.StopRequested():
                how = "with a checkpoint" if event.graceful else "at once"
                history.stops.append(Mark(at=event.at, text=f"{event.by} asked for an end {how}"))
            case ev.NodeSlow():
                history.stragglers.append(Mark(at=event.at, text=f"node {event.node}: {event.detail}"))
            case ev.FaultRequested():
                history.requests[len(self._state.faults)] = event
        for action in actions:
            if isinstance(action, (ac.HaltGeneration, ac.EndRun)):
                self._end_generation(event.at, action.reason)
