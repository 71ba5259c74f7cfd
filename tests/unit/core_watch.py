"""The rules that the core must keep, checked after every event from what was told and ordered, not from its beliefs."""

from __future__ import annotations

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core import placement
from orchestrator.core.events import Limits, Snapshot
from orchestrator.core.goodput import LABELS
from orchestrator.core.recovery import EVIDENCE_KEPT
from orchestrator.core.supervisor import Supervisor

LIMITS = Limits(
    halt_deadline_us=10_000_000,
    start_deadline_us=100_000_000,
    wait_deadline_us=600_000_000,
    commit_deadline_us=120_000_000,
    same_error_tries=2,
    recoveries_without_progress=6,
    strikes=3,
)


class Watch:
    """Sees each event with the answer to it. Raises AssertionError when a rule is broken."""

    def __init__(self) -> None:
        self.log: list[tuple[ev.Event, list[ac.Action]]] = []
        self._owed = self._places = self._at = 0
        self._ended = False
        self._lows: dict[str, int] = {}
        self._lost: set[str] = set()
        self._joined: set[str] = set()
        self._opened: dict[int, ac.OpenGeneration] = {}
        self._inventory: dict[str, dict[int, tuple[Snapshot, ...]]] = {}
        self._committed: set[int] = set()
        self._refused: set[object] = set()
        self._first_generation = 1
        self._layout, self._capabilities, self._steps, self._stops = None, ("",), 0, 0
        self._errors: dict[tuple[str, int, str], int] = {}

    def see(self, supervisor: Supervisor, event: ev.Event, actions: list[ac.Action]) -> None:
        self.log.append((event, actions))
        self._owed += (event.at - self._at) * self._places
        self._at = event.at
        if not self._ended or isinstance(event, ev.RunDeclared):
            self._learn(supervisor, event)
        self._ended = supervisor.state.job == "ended"
        state = supervisor.state
        state.check()
        state.check_nodes()
        ledger = state.ledger
        assert sum(ledger.totals.values()) + ledger.pending_us == self._owed, "the ledger does not add up"
        self._never_falls("high_water", state.high_water)
        self._never_falls("generation", state.generation)
        for label in LABELS:
            self._never_falls(label, ledger.totals[label])
        incidents = state.incidents + ([state.incident] if state.incident else [])
        charged = sum(incident.cost_us for incident in incidents)
        lost = sum(ledger.totals[label] for label in ("detection", "recovery", "waiting_for_nodes", "recomputed"))
        assert charged <= lost, "incidents are charged more than was lost"
        assert all(len(incident.evidence) <= EVIDENCE_KEPT for incident in incidents)
        for action in actions:
            self._check_order(supervisor, event, action)

    def _never_falls(self, name: str, value: int) -> None:
        assert value >= self._lows.get(name, 0), f"{name} fell from {self._lows[name]} to {value}"
        self._lows[name] = value

    def _learn(self, supervisor: Supervisor, event: ev.Event) -> None:
        match event:
            case ev.RunDeclared():
                self._layout, self._capabilities, self._steps = event.layout, event.capabilities, event.total_steps
                self._places = event.layout.nodes + event.layout.spares
                self._first_generation = 1 + max(self._opened, default=0)
                self._lost, self._joined, self._inventory, self._errors, self._stops = set(), set(), {}, {}, 0
                # Whoever resumes has looked at the checkpoints: they are tried again.
                self._refused = {refused for refused in self._refused if isinstance(refused, Snapshot)}
            case ev.NodeJoined() if event.node not in self._joined:
                self._joined.add(event.node)
                self._inventory[event.node] = self._usable(event.snapshots)
            case ev.NodeHalted() if event.generation == max(self._opened) and event.node not in self._lost:
                self._inventory[event.node] = self._usable(event.snapshots)
            case ev.NodeLost():
                self._lost.add(event.node)
            case ev.CheckpointCommitted():
                self._committed.add(event.step)
                if supervisor.state.checkpoints[event.step].trust == "committed":
                    self._refused.discard(event.step)
            case ev.CheckpointsFound():
                self._committed = set(event.steps)
            case ev.WorkerFailed(kind="state") if event.generation == max(self._opened):
                order = self._opened[event.generation]
                ram = Snapshot(generation=order.snapshot_generation, step=order.step)
                self._refused.add(ram if order.source == "ram" else order.step)
            case ev.WorkerFailed(kind="exception" | "memory" | "audit"):
                key = (event.kind, event.step, event.error)
                self._errors[key] = self._errors.get(key, 0) + 1
            case ev.StopRequested():
                self._stops += 1

    def _usable(self, snapshots: dict[int, tuple[Snapshot, ...]]) -> dict[int, tuple[Snapshot, ...]]:
        return {k: tuple(s for s in held if s.generation >= self._first_generation) for k, held in snapshots.items()}

    def _check_order(self, supervisor: Supervisor, event: ev.Event, action: ac.Action) -> None:
        match action:
            case ac.ReleaseNode():
                self._lost.add(action.node)
            case ac.HaltGeneration():
                assert action.generation == max(self._opened)
                self._check_named(supervisor, action.nodes)
            case ac.OpenGeneration() if isinstance(event, ev.EpochBegan):
                assert action == self._opened[max(self._opened)], "another order than the one that is open"
            case ac.OpenGeneration():
                self._check_open(supervisor, action)
            case ac.CommitCheckpoint():
                assert action.epoch == supervisor.state.epoch
            case ac.EndRun() if not isinstance(event, ev.EpochBegan):
                self._check_verdict(supervisor, event, action)

    def _check_named(self, supervisor: Supervisor, nodes: tuple[str, ...]) -> None:
        assert set(nodes) <= self._joined, "an order names a node that never joined"
        assert not set(nodes) & self._lost, "an order names a lost node"
        assert all(supervisor.state.nodes[n].state != "quarantined" for n in nodes), "an order names a quarantined node"

    def _check_open(self, supervisor: Supervisor, order: ac.OpenGeneration) -> None:
        assert order.generation > max(self._opened, default=0), "generations do not grow"
        self._opened[order.generation] = order
        assert len(order.nodes) == len(set(order.nodes)) == self._layout.nodes, "a slot is filled twice, or not at all"
        self._check_named(supervisor, order.nodes)
        assert not {t.from_node for t in order.transfers} & self._lost, "a copy comes from a lost node"
        newest = max((s for s in self._committed if s not in self._refused and s <= self._steps), default=0)
        incident = supervisor.state.incident
        if order.source == "ram":
            chosen = Snapshot(generation=order.snapshot_generation, step=order.step)
            assert chosen == self._newest_in_ram(order.nodes), "not the newest snapshot that every slot can get"
            self._check_transfers(order, chosen)
            assert order.step >= newest, "a committed checkpoint is newer"
        else:
            assert order.step == newest and (order.source == "durable") == (newest > 0), "not the newest checkpoint"
            ram = None if incident is None or incident.spent else self._newest_in_ram(order.nodes)
            assert ram is None or ram.step < newest, "shared memory holds a newer step, and nothing spoke against it"

    def _newest_in_ram(self, nodes: tuple[str, ...]) -> Snapshot | None:
        if "ram" not in self._capabilities:
            return None
        held = {name: slots for name, slots in self._inventory.items() if name not in self._lost}
        known = {s for slots in held.values() for snapshots in slots.values() for s in snapshots} - self._refused
        good = [s for s in known if all(self._sources(held, nodes, slot, s) for slot in range(self._layout.slots))]
        return max(good, key=lambda s: (s.step, s.generation), default=None)

    def _sources(
        self, held: dict[str, dict[int, tuple[Snapshot, ...]]], nodes: tuple[str, ...], slot: int, snapshot: Snapshot
    ) -> bool:
        own = nodes[slot // self._layout.slots_per_node]
        if snapshot in held.get(own, {}).get(slot, ()):
            return True
        same = (slot, *placement.replicas(self._layout, slot))
        return "peer" in self._capabilities and any(snapshot in held[n].get(s, ()) for n in held for s in same)

    def _check_transfers(self, order: ac.OpenGeneration, chosen: Snapshot) -> None:
        copied = {(t.to_node, t.slot): t for t in order.transfers}
        assert not copied or "peer" in self._capabilities
        for slot in range(self._layout.slots):
            node = order.nodes[slot // self._layout.slots_per_node]
            transfer = copied.pop((node, slot), None)
            if transfer is None:
                assert chosen in self._inventory.get(node, {}).get(slot, ()), f"slot {slot} has no such snapshot"
            else:
                assert transfer.from_slot in (slot, *placement.replicas(self._layout, slot)), transfer
                assert chosen in self._inventory[transfer.from_node][transfer.from_slot], transfer
        assert not copied, "a copy for a slot that is not there"

    def _check_verdict(self, supervisor: Supervisor, event: ev.Event, end: ac.EndRun) -> None:
        """Each exit code only for what it says."""
        state = supervisor.state
        timer = event.timer.partition("/")[0] if isinstance(event, ev.TimerFired) else ""
        match end.exit_code:
            case 0:
                assert self._steps in self._committed and state.step == self._steps, "not everything is done and saved"
            case 1:
                trusts = [checkpoint.trust for checkpoint in state.checkpoints.values()]
                assert timer == "commit" or ("damaged" in trusts and state.newest_checkpoint() is None)
            case 93:
                assert max(self._errors.values()) >= LIMITS.same_error_tries
            case 94:
                assert state.recoveries_without_progress >= LIMITS.recoveries_without_progress
            case 95:
                assert timer == "wait"
            case 96:
                assert self._stops
            case code:
                raise AssertionError(f"exit code {code}")
