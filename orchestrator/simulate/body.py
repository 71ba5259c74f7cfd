"""The simulated body: the same supervisor as on a cluster, its events and orders in virtual time.

`Simulation` keeps the truth about machines, their memory, the store and the mesh's steps. It tells the supervisor
what a real body would tell, when it would know, and carries its orders out at the profile's cost. Time is whole
microseconds; one seed gives one history.

What is left out, so that a month takes seconds: agents' reports between two checkpoints come as one, and messages
arrive at once and in order (hostile delivery is what the histories of tests/unit/core_body.py are for).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core.events import Layout, Limits, Snapshot
from orchestrator.core.state import State
from orchestrator.core.supervisor import Supervisor
from orchestrator.simulate.chance import Chance
from orchestrator.simulate.profile import Effect, Failures, Profile

DAY_US = 86_400_000_000
ENDLESS_STEPS = 10**12
"""Without another number, a simulated run ends by the calendar."""
FAN_IN = 128
"""Nodes whose answers to a halt come as one."""
SAMPLES = 120
"""Points of the outcome's curve."""

Recorder = Callable[[ev.Event, list[ac.Action]], None]


@dataclass(frozen=True, kw_only=True)
class Strike:
    """A failure of a known generation, as a journal tells it."""

    step: int | None
    """It strikes in the step after this one; None: while the generation is starting."""
    after_us: int
    """How long after that step was complete, at most until the next is; else after the order to open."""
    detect_us: int
    effect: Effect
    place: int | None
    """In the mesh; None: on a spare."""
    repair_us: int
    """Until its machine is there again, when the node is gone."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    layout: Layout
    limits: Limits
    step_us: int
    """One training step, stalls apart."""
    checkpoint_interval_steps: int
    snapshot_interval_steps: int
    profile: Profile
    failures: Failures
    days: float
    seed: int
    strikes: Mapping[int, tuple[Strike, ...]] = field(default_factory=dict)
    """By generation, beside those that are drawn."""
    writes_us: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """Generation and step to what that save took, where it is known; else the profile's cost."""
    total_steps: int = ENDLESS_STEPS
    """The simulation ends with them, or with its days."""


@dataclass
class Machine:
    """A place for a node; nodes come and go."""

    node: Node | None = None
    repair_us: int = 0
    """What its last fault takes to mend."""


@dataclass(eq=False)
class Node:
    name: str
    machine: Machine
    alive: bool = True
    place: int = -1
    """In the mesh, the last that it had."""
    held: tuple[Snapshot, ...] = ()
    """The snapshots in its memory, the same for each slot of that place; the newest last."""
    leaving: bool = False
    """It is quarantined, and its machine will be mended."""


@dataclass
class Running:
    """The newest generation that was opened."""

    order: ac.OpenGeneration
    places: dict[str, int]
    """Node to its place in the mesh's order."""
    phase: str = "starting"
    """Then "training"; "stuck" when a failure has stopped it and nobody has ended it yet; "halted"."""
    step: int = 0
    """Steps completed and told."""
    since: int = 0
    """When `step` was complete."""
    saving_until: int = 0
    """When the store will have all parts of the save under way."""
    save_due: int = 0
    """The step after which the next one is wanted; it begins when the one before has ended."""


@dataclass(frozen=True)
class Sample:
    at: int
    productive_us: int
    owed_us: int


class Simulation:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario, record: Recorder | None = None) -> None:
        self.scenario = scenario
        self.supervisor = Supervisor()
        self.now = 0
        self.events = 0
        """Told to the supervisor so far."""
        self.strikes: dict[str, int] = {cause.name: 0 for cause in scenario.failures.causes}
        """Cause to the number of failures that hit something."""
        self.samples: list[Sample] = []
        self.ended_by_calendar = False
        self._record = record
        self._end = round(scenario.days * DAY_US)
        self._chance = Chance(scenario.seed)
        self._agenda: list[tuple[int, int, Callable[[], None]]] = []
        self._entries = 0
        places = scenario.layout.nodes + scenario.layout.spares
        self._machines = [Machine() for _ in range(places)]
        self._nodes: dict[str, Node] = {}
        self._running: Running | None = None
        costs = scenario.profile.costs
        snapshots = costs.snapshot_stall.us // scenario.snapshot_interval_steps if scenario.profile.memory else 0
        self._snapshot_stall_us = snapshots
        self._step_us = scenario.step_us + snapshots
        self._causes = scenario.failures.causes
        self._weights = [round(cause.count * 1_000_000) for cause in self._causes]

    @property
    def state(self) -> State:
        return self.supervisor.state

    def run(self) -> State:
        """Live through the scenario's days, or until the run ends by itself; the supervisor's last state."""
        s = self.scenario
        self._tell(
            ev.RunDeclared(
                at=0,
                run="simulated",
                layout=s.layout,
                limits=s.limits,
                total_steps=s.total_steps,
                capabilities=("ram", "peer") if s.profile.memory else (),
            )
        )
        self._tell(ev.EpochBegan(at=0, epoch=1, version="simulated"))
        self._tell(ev.CheckpointsFound(at=0, steps=()))
        for machine in self._machines:
            self._later(s.profile.costs.provision.us, lambda machine=machine: self._join(machine))  # type: ignore[misc]
        self._await_failure()
        for index in range(1, SAMPLES + 1):
            self._at(self._end * index // SAMPLES, self._sample)
        while self._agenda and self._agenda[0][0] <= self._end and not self._is_over:
            self.now, _, do = heapq.heappop(self._agenda)
            do()
        if not self._is_over:
            self.now, self.ended_by_calendar = self._end, True
            self._tell_steps()
            self._tell(ev.StopRequested(at=self.now, by="the calendar", graceful=False))
        return self.state

    @property
    def _is_over(self) -> bool:
        return self.state.job == "ended" or self.state.step == self.scenario.total_steps

    # --- time and messages --------------------------------------------------------------------------------------------

    def _at(self, at: int, do: Callable[[], None]) -> None:
        self._entries += 1
        heapq.heappush(self._agenda, (at, self._entries, do))

    def _later(self, us: int, do: Callable[[], None]) -> None:
        self._at(self.now + us, do)

    def _tell(self, event: ev.Event) -> None:
        actions = self.supervisor.handle(event)
        self.events += 1
        if self._record is not None:
            self._record(event, actions)
        for action in actions:
            self._perform(action)

    def _perform(self, action: ac.Action) -> None:
        costs = self.scenario.profile.costs
        match action:
            case ac.OpenGeneration():
                self._open(action)
            case ac.HaltGeneration():
                self._later(costs.halt.us, lambda: self._halt(action))
            case ac.CommitCheckpoint():
                self._later(costs.commit.us, lambda: self._commit(action))
            case ac.SetTimer():
                self._at(action.at, lambda: self._tell(ev.TimerFired(at=self.now, timer=action.timer)))
            case ac.ReleaseNode():
                node = self._nodes.pop(action.node, None)
                if node is not None and node.machine.node is node:
                    self._free(node.machine)
            case ac.DeleteCheckpoint() | ac.EndRun():
                pass
            case _:
                raise AssertionError(f"a simulated body was never asked for {action}")

    def _sample(self) -> None:
        self._replace_quarantined()
        ledger = self.state.ledger
        self.samples.append(Sample(at=self.now, productive_us=ledger.totals["productive"], owed_us=ledger.owed))

    # --- machines and nodes -------------------------------------------------------------------------------------------

    def _join(self, machine: Machine) -> None:
        machine.repair_us = 0
        name = f"n{len(self.state.nodes) + 1}"
        machine.node = self._nodes[name] = Node(name=name, machine=machine)
        self._tell(ev.NodeJoined(at=self.now, node=name, domain="", snapshots={}))

    def _free(self, machine: Machine) -> None:
        """The machine is mended, and made a node again."""
        machine.node = None
        self._later(machine.repair_us + self.scenario.profile.costs.provision.us, lambda: self._join(machine))

    def _replace_quarantined(self) -> None:
        """Operators see who is quarantined, and mend the machine."""
        if not self.state.counts["quarantined"]:
            return
        for node in list(self._nodes.values()):
            if self.state.nodes[node.name].state == "quarantined" and not node.leaving:
                node.leaving = True
                lost = ev.NodeLost(at=self.now, node=node.name, cause="taken out for repair")
                self._tell(lost)

    # --- failures -----------------------------------------------------------------------------------------------------

    def _await_failure(self) -> None:
        """Failures strike machines at a constant rate each; one that finds nothing to hit does nothing."""
        total = sum(self._weights)
        if total == 0:
            return
        node_days_us = round(self.scenario.failures.exposure.node_days * 1_000_000) * DAY_US
        self._later(self._chance.exponential(node_days_us // (total * len(self._machines))), self._fail)

    def _fail(self) -> None:
        cause = self._causes[self._chance.pick(self._weights)]
        node = self._machines[self._chance.below(len(self._machines))].node
        self._await_failure()
        if node is None or not node.alive:
            return
        if self._hit(node, cause.effect, getattr(self.scenario.profile.detection, cause.sign).us, cause.name):
            self.strikes[cause.name] += 1
            node.machine.repair_us = max(node.machine.repair_us, round(cause.repair_s * 1_000_000))

    def _strikes(self, order: ac.OpenGeneration) -> tuple[Strike, ...]:
        return self.scenario.strikes.get(order.generation, ())

    def _strike_at(self, order: ac.OpenGeneration, step: int) -> None:
        for strike in self._strikes(order):
            if strike.step is not None and (strike.step == step or strike.step < order.step == step):
                after_us = min(strike.after_us, self._step_us - 1)
                self._later(after_us, lambda s=strike: self._strike(order, s))  # type: ignore[misc]

    def _strike(self, order: ac.OpenGeneration, strike: Strike) -> None:
        node = self._spare() if strike.place is None else self._nodes.get(order.nodes[strike.place])
        if self._running is None or self._running.order is not order or node is None or not node.alive:
            return
        node.machine.repair_us = strike.repair_us
        self._hit(node, strike.effect, strike.detect_us, "told by the journal")

    def _spare(self) -> Node | None:
        ready = (n for n in self._nodes.values() if n.alive and self.state.nodes[n.name].state == "spare")
        return next(ready, None)

    def _hit(self, node: Node, effect: Effect, detect_us: int, name: str) -> bool:
        """Something fails on a live node now; whether there was anything to hit."""
        if effect == "node":
            node.alive = False
            if self._fills_a_slot(node):
                self._stick()
            lost = ev.NodeLost(at=self.now + detect_us, node=node.name, cause=name)
            self._at(lost.at, lambda: self._tell(lost))
            return True
        if not self._fills_a_slot(node):
            return False
        assert self._running is not None
        generation, slot = self._running.order.generation, self._slot(node)
        if effect == "corrupt":
            if self._running.phase != "training":
                return False
            step = self._steps_done()
            self._later(detect_us, lambda: self._await_audit(node, generation, slot, step, name))
            return True
        self._stick()
        step = self._running.step
        self._later(detect_us, lambda: self._tell(self._words(effect, name, node, generation, slot, step)))
        return True

    def _words(self, effect: Effect, name: str, node: Node, generation: int, slot: int, step: int) -> ev.Event:
        if effect == "hang":
            return ev.WorkerHung(at=self.now, node=node.name, generation=generation, slot=slot, step=step, detail=name)
        which = f"{name}, event {self.events}"  # no two are the same: else it were the program's
        return ev.WorkerFailed(
            at=self.now, node=node.name, generation=generation, slot=slot, step=step, kind="exception", error=which
        )

    def _await_audit(self, node: Node, generation: int, slot: int, step: int, name: str) -> None:
        """The audit comes before the optimizer, so at the end of the step under way, and that step is not taken."""
        running = self._running
        if running is None or running.order.generation != generation or running.phase != "training":
            return
        end = running.since + (self._steps_done() + 1 - running.step) * self._step_us - 1
        self._at(max(self.now, end), lambda: self._audit(node, generation, slot, step, name))

    def _audit(self, node: Node, generation: int, slot: int, step: int, name: str) -> None:
        """State has been wrong since `step`, and is found to be, if its generation has lived to see it."""
        running = self._running
        if running is None or running.order.generation != generation or running.phase != "training":
            return
        self._stick()
        found = ev.WorkerFailed(
            at=self.now, node=node.name, generation=generation, slot=slot, step=step, kind="corrupt", error=name
        )
        self._tell(found)

    def _fills_a_slot(self, node: Node) -> bool:
        running = self._running
        return running is not None and running.phase != "halted" and self.state.nodes[node.name].state == "active"

    def _slot(self, node: Node) -> int:
        assert self._running is not None
        return self._running.places[node.name] * self.scenario.layout.slots_per_node

    # --- the mesh -----------------------------------------------------------------------------------------------------

    def _open(self, order: ac.OpenGeneration) -> None:
        costs = self.scenario.profile.costs
        places = {name: place for place, name in enumerate(order.nodes)}
        self._running = Running(order=order, places=places, step=order.step, save_due=self._next_due(order.step))
        wanted = Snapshot(generation=order.snapshot_generation, step=order.step)
        for transfer in order.transfers:
            assert wanted in self._nodes[transfer.from_node].held, (wanted, transfer)
        for name, place in places.items():
            node = self._nodes[name]
            if node.place != place:
                node.place, node.held = place, ()
        for name in {transfer.to_node for transfer in order.transfers}:
            self._nodes[name].held += (wanted,)
        # If one of them is dead by now, it will not come up, and the loss will be told.
        restore_us = costs.restore_durable.us if order.source == "durable" else 0
        if order.source == "ram":
            restore_us = costs.restore_ram.us + (costs.restore_peer.us if order.transfers else 0)
        self._later(costs.restart.us + restore_us, lambda: self._ready(order, restore_us))
        for strike in self._strikes(order):
            if strike.step is None:
                self._later(strike.after_us, lambda s=strike: self._strike(order, s))  # type: ignore[misc]

    def _ready(self, order: ac.OpenGeneration, restore_us: int) -> None:
        running, costs = self._running, self.scenario.profile.costs
        assert running is not None
        if running.order is not order or running.phase != "starting" or self.state.job != "starting":
            return
        if not all(self._nodes[name].alive for name in order.nodes):
            return  # its loss will be told
        running.phase, running.since = "training", self.now
        self._tell(
            ev.GenerationReady(
                at=self.now,
                generation=order.generation,
                step=order.step,
                rendezvous_us=costs.restart.us,
                build_us=0,
                restore_us=restore_us,
            )
        )
        self._replace_quarantined()
        self._strike_at(order, order.step)
        running.since += costs.warm_up.us
        self._later(costs.warm_up.us + self._step_us, lambda: self._first_step(running))
        self._go_on()

    def _first_step(self, running: Running) -> None:
        """Told by itself: it is what ends an incident."""
        if self._running is running:
            self._tell_steps()

    def _boundary(self) -> int:
        """The step after which something is due: a durable save, a strike, or the run's end."""
        assert self._running is not None
        step = self._running.step
        strikes = [s.step for s in self._strikes(self._running.order) if s.step is not None and s.step > step]
        return min(self._save_step(), self.scenario.total_steps, *strikes)

    def _next_due(self, step: int) -> int:
        interval = self.scenario.checkpoint_interval_steps
        return (step // interval + 1) * interval

    def _save_step(self) -> int:
        """The step after which a save can begin: when it is due, or the first by which the one before has ended."""
        running = self._running
        assert running is not None
        until_free = -(-max(0, running.saving_until - running.since) // self._step_us)
        return max(running.save_due, running.step + max(1, until_free))

    def _go_on(self) -> None:
        """Train on to the next boundary. A save waits for the one before."""
        running = self._running
        assert running is not None
        if running.phase != "training":
            return
        step = self._boundary()
        saves = step == self._save_step()
        stall_us = self.scenario.profile.costs.save_stall.us if saves else 0
        due = running.since + (step - running.step) * self._step_us + stall_us
        self._at(due, lambda: self._arrive(running, step, saves))

    def _arrive(self, running: Running, step: int, saves: bool) -> None:
        if self._running is not running or running.phase != "training":
            return
        self._tell_steps(step)
        if self._is_over:
            return
        if saves:
            running.save_due = self._next_due(step)
            own = (running.order.generation, step)
            write_us = self.scenario.writes_us.get(own, self.scenario.profile.costs.save_write.us)
            running.saving_until = self.now + write_us
            self._later(write_us, lambda: self._written(running, step, write_us))
        self._strike_at(running.order, step)
        self._go_on()

    def _written(self, running: Running, step: int, write_us: int) -> None:
        """Every rank's part is on the store, unless the ranks were ended before."""
        if self._running is running and running.phase == "training":
            generation = running.order.generation
            self._tell(ev.CheckpointWritten(at=self.now, generation=generation, step=step, bytes=0, write_us=write_us))

    def _commit(self, order: ac.CommitCheckpoint) -> None:
        self._tell(ev.CheckpointCommitted(at=self.now, step=order.step, epoch=order.epoch, generation=order.generation))

    def _steps_done(self) -> int:
        """Steps that are complete by now; the one before a boundary is when it is told."""
        running = self._running
        assert running is not None and running.phase == "training"
        return min(running.step + max(0, self.now - running.since) // self._step_us, self._boundary() - 1)

    def _tell_steps(self, upto: int | None = None) -> None:
        running = self._running
        if running is None or running.phase != "training":
            return
        last = self._steps_done() if upto is None else upto
        steps = last - running.step
        if steps <= 0:
            return
        spent = self.now - running.since
        save = spent - steps * self._step_us if upto is not None else 0
        running.since = self.now if upto is not None else running.since + steps * self._step_us
        first, running.step = running.step + 1, last
        self._tell(
            ev.StepsDone(
                at=max(running.since, self.state.ledger.mark),  # the step that is under way is not theirs
                generation=running.order.generation,
                first=first,
                last=last,
                data_wait_us=0,
                checkpoint_us=steps * self._snapshot_stall_us + save,
                validation_us=0,
                tokens=0,
                loss_millionths=(),
                save_us=save,
            )
        )

    def _stick(self) -> None:
        """A rank is gone or wrong: all others wait for it, in the step that was under way."""
        self._tell_steps()
        if self._running is not None:
            self._running.phase = "stuck"

    def _halt(self, order: ac.HaltGeneration) -> None:
        running = self._running
        if running is None or running.order.generation != order.generation:
            return
        self._tell_steps()
        running.phase = "halted"
        kept = self._snapshots(running)
        found = (self._nodes.get(name) for name in order.nodes)
        alive = [node for node in found if node is not None and node.alive]
        answers: dict[tuple[Snapshot, ...], list[str]] = {}
        if kept:
            for node in alive:
                node.held = kept
            answers[kept] = [node.name for node in alive]
        else:
            for node in alive:
                answers.setdefault(node.held, []).append(node.name)
        for snapshots, names in answers.items():
            for first in range(0, len(names), FAN_IN):
                nodes = tuple(names[first : first + FAN_IN])
                self._tell(ev.NodesHalted(at=self.now, nodes=nodes, generation=order.generation, snapshots=snapshots))

    def _snapshots(self, running: Running) -> tuple[Snapshot, ...]:
        """What each node of the mesh holds once steps were done: the two newest, of which one may be the restored."""
        interval, order = self.scenario.snapshot_interval_steps, running.order
        newest = running.step - running.step % interval
        if not self.scenario.profile.memory or newest <= order.step:
            return ()
        own = tuple(
            Snapshot(generation=order.generation, step=step)
            for step in (newest - interval, newest)
            if step > order.step
        )
        if len(own) == 1 and order.source == "ram":
            return (Snapshot(generation=order.snapshot_generation, step=order.step), *own)
        return own
