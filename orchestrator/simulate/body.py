"""The simulated body: the same supervisor as on a cluster, its events and orders in virtual time.

`Simulation` keeps the truth about machines, their memory, the store and the mesh's steps. It tells the supervisor
what a real body would tell, when it would know, and carries its orders out at the profile's cost. What goes wrong
stands in harm.py. Time is whole microseconds; one seed gives one history.

What is left out, so that a month takes seconds: agents' reports between two checkpoints come as one. Without a
`delivery` in the profile, messages arrive at once and in order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core import placement
from orchestrator.core.events import Layout, Limits, Snapshot
from orchestrator.core.state import State
from orchestrator.core.supervisor import Supervisor
from orchestrator.simulate import harm
from orchestrator.simulate.chance import Chance
from orchestrator.simulate.harm import DAY_US, Strike
from orchestrator.simulate.profile import Failures, Profile
from trainer.contract import Degrees

ENDLESS_STEPS = 10**12
"""Without another number, a simulated run ends by the calendar."""
FAN_IN = 128
"""Nodes whose answers to a halt come as one."""
SAMPLES = 120
"""Points of the outcome's curve."""

Recorder = Callable[[ev.Event, list[ac.Action]], None]


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
    paces_us: Mapping[int, int] = field(default_factory=dict)
    """Generation to one step of it on the mesh that it has, stalls apart, where that is known; else by `step_us`."""
    writes_us: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """Generation and step to what that save took, where it is known; else the profile's cost."""
    total_steps: int = ENDLESS_STEPS
    """The simulation ends with them, or with its days."""
    microbatches: int = 1
    """Of a replica in a step of the whole mesh; smaller meshes take longer for all."""
    rack_machines: int = 0
    """Neighbouring machines that are a failure domain; 0: nobody knows racks."""

    def slowdown(self, mesh: Layout) -> Fraction:
        """How many times as long a step of this mesh takes as one of the whole mesh. The global batch stays what it is:
        fewer replicas take more microbatches each; a mesh with other shards has as much less of everything as it has
        fewer nodes."""
        if not mesh.has_shards_of(self.layout):
            return Fraction(self.layout.nodes, mesh.nodes)
        each = -(-self.layout.dp_replicate * self.microbatches // mesh.dp_replicate)
        return Fraction(each, self.microbatches)


@dataclass
class Machine:
    """A place for a node; nodes come and go."""

    number: int
    """Neighbours have neighbouring ones."""
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
    layout: Layout | None = None
    """Of that mesh."""
    held: tuple[Snapshot, ...] = ()
    """The snapshots in its memory, the same for each slot that they are of; the newest last."""
    slots: tuple[int, ...] | None = None
    """Those slots, as the mesh that wrote them counts; None: those of its place."""
    copies: tuple[tuple[int, ...], tuple[Snapshot, ...]] = ((), ())
    """The slots of which it was last somebody's buddy, and the snapshots of them."""
    leaving: bool = False
    """It is quarantined, and its machine will be mended."""
    slowdown: int = 0
    """How much longer it takes for a step, in millionths of it."""
    noticed_after_us: int = 0
    """Time in which it is found to be slow."""

    def snapshots(self) -> dict[int, tuple[Snapshot, ...]]:
        """All in its memory, by slot."""
        slots, snapshots = self.copies
        return dict.fromkeys(slots, snapshots) | dict.fromkeys(self.slots_held(), self.held)

    def slots_held(self) -> tuple[int, ...]:
        if self.slots is None and self.layout is not None:
            return tuple(placement.slots_of(self.layout, self.place))
        return self.slots or ()


@dataclass
class Running:
    """The newest generation that was opened."""

    order: ac.OpenGeneration
    layout: Layout
    places: dict[str, int]
    """Node to its place in the mesh's order."""
    step_us: int
    """One step at its pace, with snapshots."""
    phase: str = "starting"
    """Then "training"; "stuck" when a failure has stopped it and nobody has ended it yet; "halted"."""
    step: int = 0
    """Steps completed and told."""
    since: int = 0
    """When `step` was complete."""
    due: int = 0
    """When the next boundary is reached at this pace."""
    saving_until: int = 0
    """When the store will have all parts of the save under way."""
    save_due: int = 0
    """The step after which the next one is wanted; it begins when the one before has ended."""
    lost: bool = False
    """One of its nodes is dead: it will not come up, and that will be told."""
    broken: dict[str, None] = field(default_factory=dict)
    """Nodes of which a worker cannot park."""


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
        self.chance = Chance(scenario.seed)
        self.machines = [Machine(number) for number in range(scenario.layout.nodes + scenario.layout.spares)]
        self.nodes: dict[str, Node] = {}
        self.running: Running | None = None
        self.slow: dict[str, Node] = {}
        self.dead: dict[str, None] = {}
        """Nodes that are dead and not let go yet."""
        self.store_away_until = 0
        self.rotten: dict[int, None] = {}
        """Steps whose checkpoints are damaged."""
        self.weights = [round(cause.count * 1_000_000) for cause in scenario.failures.causes]
        self._record = record
        self._end = round(scenario.days * DAY_US)
        self._agenda: list[tuple[int, int, Callable[[], None]]] = []
        self._entries = self._names = 0
        self._arrivals: dict[str, int] = {}
        """Sender to when the last message of it arrives, where messages take time."""
        self._layouts = {scenario.layout.degrees: scenario.layout}
        self._ended_generation = 0
        """Halted, so that an order to open it comes too late."""
        self._parked = False
        """Whether the workers of the last generation wait for the next."""
        stall_us = scenario.profile.costs.snapshot_stall.us // scenario.snapshot_interval_steps
        self._snapshot_stall_us = stall_us if scenario.profile.memory else 0

    @property
    def state(self) -> State:
        return self.supervisor.state

    def run(self) -> State:
        """Live through the scenario's days, or until the run ends by itself; the supervisor's last state."""
        s, profile = self.scenario, self.scenario.profile
        can = {
            "ram": profile.memory,
            "peer": profile.memory,
            "buddy": profile.buddies,
            "park": profile.costs.resume is not None,
            "probe": profile.probes is not None,
            "verify": profile.read_back is not None,
        }
        self._tell(
            ev.RunDeclared(
                at=0,
                run="simulated",
                layout=s.layout,
                limits=s.limits,
                total_steps=s.total_steps,
                capabilities=tuple(name for name, does in can.items() if does),
            )
        )
        self._tell(ev.EpochBegan(at=0, epoch=1, version="simulated"))
        self._tell(ev.CheckpointsFound(at=0, steps=()))
        for machine in self.machines:
            self.later(profile.costs.provision.us, lambda machine=machine: self._join(machine))  # type: ignore[misc]
        harm.await_failure(self)
        for index in range(1, SAMPLES + 1):
            self.at(self._end * index // SAMPLES, self._sample)
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

    def at(self, at: int, do: Callable[[], None]) -> None:
        """Do something at this time, after what is to be done then already."""
        self._entries += 1
        heapq.heappush(self._agenda, (at, self._entries, do))

    def later(self, us: int, do: Callable[[], None]) -> None:
        """Do something after so long."""
        self.at(self.now + us, do)

    def send(self, sender: str, event: ev.Event) -> None:
        """A message to the controller: told now, or when it arrives. Those of one sender arrive in order."""
        delivery = self.scenario.profile.delivery
        if delivery is None:
            return self._tell(replace(event, at=self.now))
        arrives = max(self.now + self._delay_us(), self._arrivals.get(sender, 0))
        self._arrivals[sender] = arrives
        self.at(arrives, lambda: self._tell(replace(event, at=self.now)))
        once = isinstance(event, ev.CheckpointFailed)  # the controller counts them, and has them told once
        if not once and self.happens(delivery.repeated):
            self.at(arrives + self._delay_us(), lambda: self._tell(replace(event, at=self.now)))

    def happens(self, share: float) -> bool:
        """A draw."""
        return self.chance.below(1_000_000) < round(share * 1_000_000)

    def _delay_us(self) -> int:
        delivery = self.scenario.profile.delivery
        if delivery is None:
            return 0
        delay_us = self.chance.exponential(delivery.mean_delay.us)
        while self.happens(delivery.lost):
            delay_us += delivery.retry.us + self.chance.exponential(delivery.mean_delay.us)
        return delay_us

    def _tell(self, event: ev.Event) -> None:
        planned = isinstance(event, (ev.NodeLeaving, ev.NodeSlow)) or self.state.leaving or self.state.growing
        if planned and not isinstance(event, ev.StepsDone):
            self._tell_steps()  # the supervisor may change the mesh now, and what was done until now is done
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
                self._once_delivered(0, lambda: self._open(action))
            case ac.HaltGeneration():
                self._once_delivered(costs.halt.us, lambda: self._halt(action))
            case ac.CommitCheckpoint():
                self.later(costs.commit.us, lambda: self._commit(action))
            case ac.SetTimer():
                self.at(action.at, lambda: self._tell(ev.TimerFired(at=self.now, timer=action.timer)))
            case ac.ReleaseNode():
                node = self.nodes.pop(action.node, None)
                self.slow.pop(action.node, None)
                self.dead.pop(action.node, None)
                if self.running is not None and action.node in self.running.places:
                    self.running.lost = True
                if node is not None and node.machine.node is node:
                    node.alive = False
                    self._free(node.machine)
            case ac.ProbeNode():
                self.later(costs.provision.us, lambda: self._probe(action))
            case ac.VerifyCheckpoint():
                harm.read_back(self, action)
            case ac.DeleteCheckpoint() | ac.PublishTrust() | ac.EndRun():
                pass
            case _:
                raise AssertionError(f"a simulated body was never asked for {action}")

    def _once_delivered(self, after_us: int, do: Callable[[], None]) -> None:
        """An order is carried out where it arrives; without delays, one to open begins at once."""
        after_us += self._delay_us()
        if after_us:
            self.later(after_us, do)
        else:
            do()

    def _sample(self) -> None:
        self._replace_quarantined()
        ledger = self.state.ledger
        done_us = ledger.totals["productive"] + ledger.pending_us  # else it would count when its steps are told
        self.samples.append(Sample(at=self.now, productive_us=done_us, owed_us=ledger.owed))

    # --- machines and nodes -------------------------------------------------------------------------------------------

    def _join(self, machine: Machine) -> None:
        machine.repair_us = 0
        self._names += 1
        node = machine.node = Node(name=f"n{self._names}", machine=machine)
        self.nodes[node.name] = node
        rack = self.scenario.rack_machines
        domain = f"rack {machine.number // rack}" if rack else ""
        self.send(node.name, ev.NodeJoined(at=self.now, node=node.name, domain=domain, snapshots={}))

    def _free(self, machine: Machine) -> None:
        """The machine is mended, and made a node again."""
        machine.node = None
        self.later(machine.repair_us + self.scenario.profile.costs.provision.us, lambda: self._join(machine))

    def _replace_quarantined(self) -> None:
        """Operators see who is quarantined, and mend the machine."""
        if not self.state.counts["quarantined"]:
            return
        for node in list(self.nodes.values()):
            known = self.state.nodes.get(node.name)
            if known is not None and known.state == "quarantined" and not node.leaving:
                node.leaving = True
                self._tell(ev.NodeLost(at=self.now, node=node.name, cause="taken out for repair"))

    def _probe(self, order: ac.ProbeNode) -> None:
        name, passes = order.node, self.scenario.profile.probes
        node = self.nodes.get(name)
        if node is not None and node.alive and passes is not None:
            passed = self.happens(passes)
            self.send(name, ev.NodeProbed(at=self.now, node=name, number=order.number, passed=passed, detail="drawn"))

    def a_spare(self) -> Node | None:
        """A live node that fills no slot, if there is one."""
        ready = (n for n in self.nodes.values() if n.alive and self.state.nodes[n.name].state == "spare")
        return next(ready, None)

    def fills_a_slot(self, node: Node) -> bool:
        """Whether a rank of the newest generation runs there."""
        running = self.running
        return running is not None and running.phase != "halted" and node.name in running.places

    def slot_of(self, node: Node) -> int:
        """The first slot that it fills."""
        assert self.running is not None
        return self.running.places[node.name] * self.scenario.layout.slots_per_node

    # --- the mesh -----------------------------------------------------------------------------------------------------

    def _layout(self, dp_replicate: int, fallback: Degrees | None) -> Layout:
        """One object for each mesh."""
        found = self.scenario.layout.sized(dp_replicate, fallback)
        return self._layouts.setdefault(found.degrees, found)

    def _open(self, order: ac.OpenGeneration) -> None:
        newest = max(self._ended_generation, self.running.order.generation if self.running else 0)
        if order.generation <= newest:
            return  # it has been halted before the order came
        costs, layout = self.scenario.profile.costs, self._layout(order.dp_replicate, order.fallback)
        places = {name: place for place, name in enumerate(order.nodes)}
        self.running = Running(
            order=order,
            layout=layout,
            places=places,
            step_us=self.scenario.step_us,
            step=order.step,
            save_due=self._next_due(order.step),
            lost=any(name in places for name in self.dead) or not places.keys() <= self.nodes.keys(),
        )
        self._place_state(order, layout)
        restore_us = costs.restore_durable.us if order.source == "durable" else 0
        if order.source == "ram":
            restore_us = costs.restore_ram.us + (costs.restore_peer.us if order.transfers else 0)
        start = costs.resume if self._parked and costs.resume is not None else costs.restart
        self.later(start.us + restore_us, lambda: self._ready(order, start.us, restore_us))
        harm.strike_while_starting(self, order)

    def _place_state(self, order: ac.OpenGeneration, layout: Layout) -> None:
        """What each node's memory holds once copies are made."""
        wanted = Snapshot(generation=order.snapshot_generation, step=order.step)
        fetched: dict[str, list[int]] = {}
        for transfer in order.transfers:
            source = self.nodes.get(transfer.from_node)
            assert source is None or wanted in source.snapshots()[transfer.from_slot], transfer
            fetched.setdefault(transfer.to_node, []).append(transfer.slot)
        renumbered = _is_renumbered(order)
        resharded = not layout.has_shards_of(self._layout(order.snapshot_dp_replicate, order.snapshot_fallback))
        for place, name in enumerate(order.nodes):
            node = self.nodes.get(name)
            if node is None:
                continue  # let go before the order came
            stays = node.place == place and node.layout is layout and node.slots is None
            if stays and name not in fetched and not renumbered:
                continue
            if name in fetched:
                here = node.slots_held() if resharded and wanted in node.held else ()
                node.held = (*node.held, wanted) if stays and not renumbered else (wanted,)
                node.slots = (*here, *fetched[name]) if renumbered else None
            elif renumbered and order.source == "ram":
                node.slots = node.slots_held()
            else:
                own, known = tuple(placement.slots_of(layout, place)), node.snapshots()
                node.held = known[own[0]] if order.source == "ram" and all(slot in known for slot in own) else ()
                assert order.source != "ram" or wanted in node.held, (node, wanted)
                node.slots = None
            node.place, node.layout = place, layout

    def _ready(self, order: ac.OpenGeneration, start_us: int, restore_us: int) -> None:
        running, costs = self.running, self.scenario.profile.costs
        assert running is not None
        if running.order is not order or running.phase != "starting":
            return
        if running.lost:
            return
        if order.source == "durable" and self.store_away_until > self.now:
            return self.later(harm.STORE_PATIENCE_US, lambda: harm.refuse_the_store(self, order))
        if order.source == "durable" and order.step in self.rotten:
            return harm.refuse_the_checkpoint(self, order)
        running.phase, running.since, running.step_us = "training", self.now, self._pace(running)
        ready = ev.GenerationReady(
            at=self.now,
            generation=order.generation,
            step=order.step,
            rendezvous_us=start_us,
            build_us=0,
            restore_us=restore_us,
        )
        self.send("mesh", ready)
        self._replace_quarantined()
        if self.running is not running:
            return
        harm.strike_at(self, order, order.step)
        for name, node in self.slow.items():
            if name in running.places:
                harm.notice_slowness(self, node)
        running.since += costs.warm_up.us
        self.later(costs.warm_up.us + running.step_us, lambda: self._first_step(running))
        self._go_on()

    def _pace(self, running: Running) -> int:
        """A step of this mesh: fewer replicas take more microbatches each, and all wait for the slowest node."""
        slowest = max((node.slowdown for name, node in self.slow.items() if name in running.places), default=0)
        return self._unhindered_us(running) * (1_000_000 + slowest) // 1_000_000 + self._snapshot_stall_us

    def _straggling_us(self, running: Running) -> int:
        """What each step takes longer for its slowest node."""
        return running.step_us - self._snapshot_stall_us - self._unhindered_us(running)

    def _unhindered_us(self, running: Running) -> int:
        s = self.scenario
        by_mesh = s.step_us * s.slowdown(running.layout)
        return s.paces_us.get(running.order.generation, int(by_mesh))

    def change_pace(self) -> None:
        """A node has become slower; the step under way is as slow as the next ones."""
        running = self.running
        assert running is not None and running.phase == "training"
        self._tell_steps()
        if self.running is running and running.phase == "training":
            running.step_us = self._pace(running)
            self._go_on()

    def _first_step(self, running: Running) -> None:
        """Told by itself: it is what ends an incident."""
        if self.running is running:
            self._tell_steps()

    def _boundary(self) -> int:
        """The step after which something is due: a durable save, a strike, or the run's end."""
        assert self.running is not None
        step, order = self.running.step, self.running.order
        strikes = [s.step for s in harm.known_strikes(self, order) if s.step is not None and s.step > step]
        return min(self._save_step(), self.scenario.total_steps, *strikes)

    def _next_due(self, step: int) -> int:
        interval = self.scenario.checkpoint_interval_steps
        return (step // interval + 1) * interval

    def _save_step(self) -> int:
        """The step after which a save can begin: when it is due, or the first by which the one before has ended."""
        running = self.running
        assert running is not None
        until_free = -(-max(0, running.saving_until - running.since) // running.step_us)
        return max(running.save_due, running.step + max(1, until_free))

    def _go_on(self) -> None:
        """Train on to the next boundary. A save waits for the one before."""
        running = self.running
        assert running is not None
        if running.phase != "training":
            return
        step = self._boundary()
        saves = step == self._save_step()
        stall_us = self.scenario.profile.costs.save_stall.us if saves else 0
        due = running.due = running.since + (step - running.step) * running.step_us + stall_us
        self.at(due, lambda: self._arrive(running, step, saves, due))

    def _arrive(self, running: Running, step: int, saves: bool, due: int) -> None:
        if self.running is not running or running.phase != "training" or running.due != due:
            return
        self._tell_steps(step)
        if self._is_over or self.running is not running or running.phase != "training":
            return
        if saves:
            running.save_due = self._next_due(step)
            own = (running.order.generation, step)
            write_us = self.scenario.writes_us.get(own, self.scenario.profile.costs.save_write.us)
            running.saving_until = self.now + write_us
            self.later(write_us, lambda: self._written(running, step, write_us))
        harm.strike_at(self, running.order, step)
        self._go_on()

    def _written(self, running: Running, step: int, write_us: int) -> None:
        """Every rank's part is on the store, unless the ranks were ended before, or the store was away."""
        if self.running is not running or running.phase != "training":
            return
        if self.store_away_until > self.now:
            return self.send("mesh", ev.CheckpointFailed(at=self.now, step=step, error="the store does not answer"))
        generation = running.order.generation
        back = self.scenario.profile.read_back
        n_bytes = back.read.us * self.scenario.limits.verify_bytes_per_s // 1_000_000 if back is not None else 0
        written = ev.CheckpointWritten(at=self.now, generation=generation, step=step, bytes=n_bytes, write_us=write_us)
        self.send("mesh", written)

    def _commit(self, order: ac.CommitCheckpoint) -> None:
        if self.store_away_until > self.now:
            return self._tell(ev.CheckpointFailed(at=self.now, step=order.step, error="the store does not answer"))
        self.rotten.pop(order.step, None)
        self._tell(ev.CheckpointCommitted(at=self.now, step=order.step, epoch=order.epoch, generation=order.generation))

    @property
    def step_us(self) -> int:
        """A step of the newest generation, at its pace."""
        assert self.running is not None
        return self.running.step_us

    def steps_done(self) -> int:
        """Steps that are complete by now; the one before a boundary is when it is told."""
        running = self.running
        assert running is not None and running.phase == "training"
        return min(running.step + max(0, self.now - running.since) // running.step_us, self._boundary() - 1)

    def _tell_steps(self, upto: int | None = None) -> None:
        running = self.running
        if running is None or running.phase != "training":
            return
        last = self.steps_done() if upto is None else upto
        steps = last - running.step
        if steps <= 0:
            return
        spent = self.now - running.since
        save = spent - steps * running.step_us if upto is not None else 0
        running.since = self.now if upto is not None else running.since + steps * running.step_us
        first, running.step = running.step + 1, last
        done = ev.StepsDone(
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
            straggling_us=steps * self._straggling_us(running),
        )
        if self.scenario.profile.delivery is None:
            self._tell(done)
        else:
            self.send("mesh", done)

    def stick(self) -> None:
        """A rank is gone or wrong: all others wait for it, in the step that was under way."""
        self._tell_steps()
        if self.running is not None:
            self.running.phase = "stuck"

    def _halt(self, order: ac.HaltGeneration) -> None:
        running = self.running
        if running is None or running.order.generation > order.generation:
            return
        self._ended_generation, self._parked = order.generation, order.park
        found = (self.nodes.get(name) for name in order.nodes)
        alive = [node for node in found if node is not None and node.alive]
        if running.order.generation < order.generation:  # the order to open it has not come yet, and never will
            return self._answer_each(order, alive)
        self._tell_steps()
        running.phase = "halted"
        kept = self._snapshots(running)
        if kept:
            for node in alive:
                node.held, node.slots = kept, None
            for place, keeper in enumerate(running.order.buddies):
                buddy = self.nodes.get(running.order.nodes[keeper])
                if buddy is not None:
                    buddy.copies = (tuple(placement.slots_of(running.layout, place)), kept)
        if self.scenario.profile.delivery is not None or self.scenario.profile.buddies:
            return self._answer_each(order, alive)
        if not kept:
            self._answer_each(order, [node for node in alive if node.slots is not None])
            alive = [node for node in alive if node.slots is None]
        answers: dict[tuple[int, bool], list[Node]] = {}
        if alive and kept and not running.broken:
            answers[id(kept), order.park] = alive
        else:
            for node in alive:  # by identity: thousands of nodes hold the same object
                parked = order.park and node.name not in running.broken
                answers.setdefault((id(node.held), parked), []).append(node)
        for (_, parked), alike in answers.items():
            names, snapshots = [node.name for node in alike], alike[0].held
            for first in range(0, len(names), FAN_IN):
                halted = ev.NodesHalted(
                    at=self.now,
                    nodes=tuple(names[first : first + FAN_IN]),
                    generation=order.generation,
                    snapshots=snapshots,
                    parked=parked,
                )
                self._tell(halted)

    def _answer_each(self, order: ac.HaltGeneration, nodes: list[Node]) -> None:
        assert self.running is not None
        for node in nodes:
            halted = ev.NodeHalted(
                at=self.now,
                node=node.name,
                generation=order.generation,
                snapshots=node.snapshots(),
                parked=order.park and node.name not in self.running.broken,
            )
            self.send(node.name, halted)

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
        if len(own) == 1 and order.source == "ram" and not _is_renumbered(order):
            return (Snapshot(generation=order.snapshot_generation, step=order.step), *own)
        return own


def _is_renumbered(order: ac.OpenGeneration) -> bool:
    """Whether the snapshots to restore from are of another mesh."""
    written_by = (order.snapshot_dp_replicate, order.snapshot_fallback)
    return written_by != (order.dp_replicate, order.fallback)
