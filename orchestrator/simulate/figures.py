"""What a run has measured of itself: sums and counts, from its events and the actions that answered them.

The controller feeds it as the run goes on, the planner from a journal. It grows with the incidents only, not with the
run. Durations are microseconds; what a controller that came back is told again counts once.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.core import actions as ac
from orchestrator.core import events as ev

Restore = Literal["ram", "peer", "durable", "init"]


@dataclass
class Mean:
    """Of durations."""

    n: int = 0
    total_us: int = 0

    def add(self, us: int, n: int = 1) -> None:
        """One more, or `us` as the sum of `n`."""
        self.n, self.total_us = self.n + n, self.total_us + us

    @property
    def us(self) -> int:
        """Rounded down; 0 of none."""
        return self.total_us // self.n if self.n else 0

    @property
    def s(self) -> float:
        return self.total_us / self.n / 1e6 if self.n else 0.0


@dataclass
class Steps:
    """What the steps of one generation took, stalls included."""

    first: Mean = field(default_factory=Mean)
    """Those of its first report of any."""
    rest: Mean = field(default_factory=Mean)


@dataclass
class Pace:
    """What steps and saves take on one mesh."""

    generations: dict[int, Steps] = field(default_factory=dict)
    """Those that have told a step."""
    stalls_us: int = 0
    """All that `StepsDone` tells of, over all steps."""
    snapshots_us: int = 0
    """The snapshots' part of it."""
    save_stalls: Mean = field(default_factory=Mean)
    """A report of steps holds one save at most: there is no other before it is written."""
    writes: Mean = field(default_factory=Mean)
    commits: Mean = field(default_factory=Mean)

    @property
    def steps(self) -> Mean:
        """Whole, stalls included, but for those of each generation's first report."""
        return _together(steps.rest for steps in self.generations.values())

    @property
    def first_steps(self) -> Mean:
        return _together(steps.first for steps in self.generations.values())

    @property
    def all_steps(self) -> int:
        return self.steps.n + self.first_steps.n


def _together(means: Iterable[Mean]) -> Mean:
    whole = Mean()
    for mean in means:
        whole.add(mean.total_us, mean.n)
    return whole


@dataclass
class Figures:
    pace: Pace = field(default_factory=Pace)
    """Of the mesh that the run was declared with last."""
    halts: Mean = field(default_factory=Mean)
    restarts: Mean = field(default_factory=Mean)
    """From the order to open a generation until it is ready, without the restore."""
    restores: dict[Restore, Mean] = field(default_factory=lambda: defaultdict(Mean))
    """By the source of the state; "peer" is "ram" with copies from other nodes."""
    silences_us: dict[int, int] = field(default_factory=dict)
    """When an incident was detected to the time since the last step that was told before."""
    repairs: Mean = field(default_factory=Mean)
    """From a node's loss until one joins for it."""
    provision_us: int | None = None
    """From the run's declaration to its first generation."""
    steps_lost: int = 0
    """How often steps were lost to a restore from the store, by a recovery or a resume."""
    exposed_us: int = 0
    """Wall-clock in which a mesh was there to fail: no pause, no wait for nodes."""
    _at: int = 0
    """Of the event before."""
    _declared_at: int = 0
    _layout: ev.Layout | None = None
    _phase: Literal["", "starting", "training", "halting"] = ""
    _order: ac.OpenGeneration | None = None
    _since: int = 0
    """When the phase began."""
    _told_at: int = 0
    """When the generation's last step was told, or it was ready."""
    _step: int = 0
    _high_water: int = 0
    _told: bool = False
    """Whether the generation has told a step."""
    _counted: bool = False
    """Whether this interruption has lost steps already."""
    _written_at: dict[int, int] = field(default_factory=dict)
    """Steps of checkpoints that are not committed yet."""
    _lost_at: deque[int] = field(default_factory=deque)

    def note(self, event: ev.Event, actions: Sequence[ac.Action]) -> None:
        """Take in an event and what it was answered with."""
        if self._phase and not isinstance(event, ev.RunDeclared):
            self.exposed_us += event.at - self._at
        self._at = event.at
        match event:
            case ev.RunDeclared():
                self._declared(event)
            case ev.GenerationReady() if self._phase == "starting" and self._is_of_now(event.generation):
                self._ready(event)
            case ev.StepsDone() if self._phase == "training" and self._is_of_now(event.generation):
                self._stepped(event)
            case ev.CheckpointWritten() if any(isinstance(action, ac.CommitCheckpoint) for action in actions):
                self.pace.writes.add(event.write_us)
                self._written_at[event.step] = event.at
            case ev.CheckpointCommitted() if event.step in self._written_at:
                self.pace.commits.add(event.at - self._written_at.pop(event.step))
            case ev.CheckpointFailed():
                self._written_at.pop(event.step, None)
            case ev.NodeLost():
                self._lost_at.append(event.at)
            case ev.NodeJoined() if self._lost_at:
                self.repairs.add(event.at - self._lost_at.popleft())
        for action in actions:
            self._ordered(event.at, action)

    def _declared(self, event: ev.RunDeclared) -> None:
        if self._order is None:
            self._declared_at = event.at
        if event.layout != self._layout:
            self._layout, self.pace = event.layout, Pace()
        self._phase, self._counted = "", False
        self._written_at.clear()
        self._lost_at.clear()

    def _is_of_now(self, generation: int) -> bool:
        return self._order is not None and generation == self._order.generation

    def _ready(self, event: ev.GenerationReady) -> None:
        assert self._order is not None
        source = self._order.source
        restore: Restore = "peer" if source == "ram" and self._order.transfers else source  # type: ignore[assignment]
        self.restores[restore].add(event.restore_us)
        self.restarts.add(max(0, event.at - self._since - event.restore_us))
        self._phase, self._told_at, self._told = "training", event.at, False

    def _stepped(self, event: ev.StepsDone) -> None:
        if event.last <= self._step:
            return
        pace, n = self.pace, event.last - self._step
        steps = pace.generations.setdefault(event.generation, Steps())
        (steps.rest if self._told else steps.first).add(event.at - self._told_at, n)
        pace.stalls_us += event.data_wait_us + event.checkpoint_us + event.validation_us
        pace.snapshots_us += event.checkpoint_us - event.save_us
        if event.save_us:
            pace.save_stalls.add(event.save_us)
        self._told_at, self._told, self._counted, self._step = event.at, True, False, event.last
        self._high_water = max(self._high_water, event.last)

    def _ordered(self, at: int, action: ac.Action) -> None:
        match action:
            case ac.HaltGeneration() if self._phase in ("starting", "training"):
                self._interrupted(at)
                self._phase, self._since = "halting", at
            case ac.EndRun():
                self._phase = ""
            case ac.SetTimer() if action.timer.startswith("wait/"):
                self._interrupted(at)
                self._phase = ""
            case ac.OpenGeneration() if self._order is None or action.generation > self._order.generation:
                self._interrupted(at)
                if self.provision_us is None:
                    self.provision_us = at - self._declared_at
                lost = action.source != "ram" and action.step < self._high_water
                self.steps_lost += lost and not self._counted
                self._counted |= lost
                self._phase, self._order, self._since, self._step = "starting", action, at, action.step

    def _interrupted(self, at: int) -> None:
        """What was under way is over."""
        if self._phase == "training":
            self.silences_us[at] = at - self._told_at
        elif self._phase == "halting":
            self.halts.add(at - self._since)
