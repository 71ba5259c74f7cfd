"""The rules that the core must keep, checked after every event from what was told and ordered, not from its beliefs."""

from __future__ import annotations

from typing import NamedTuple

from core_books import Books

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core import placement
from orchestrator.core.events import Limits, Snapshot
from orchestrator.core.goodput import LABELS
from orchestrator.core.recovery import EVIDENCE_KEPT
from orchestrator.core.state import Checkpoint
from orchestrator.core.supervisor import Supervisor

LIMITS = Limits(
    halt_deadline_us=10_000_000,
    start_deadline_us=100_000_000,
    wait_deadline_us=600_000_000,
    commit_deadline_us=120_000_000,
    same_error_tries=2,
    recoveries_without_progress=6,
    strikes=3,
    keep_checkpoints=2,
    strike_expiry_us=900_000_000,
    probation_us=100_000_000,
    grow_settle_us=10_000_000,
)


class Trial(NamedTuple):
    """What the job was before an update."""

    generation: int
    """The first with the update."""
    step: int
    """The last that was done without it."""
    code: str
    terms: tuple[Limits | None, int, ev.IntervalChosen | None]
    """Limits, steps, and how often a checkpoint is made."""
    undo: dict[str, str]
    trained: bool


Want = tuple[tuple[str, ...], list[int], list[int]]
"""Nodes, the slots of which a snapshot at one of them serves as it stands, and those that serve after a copy."""


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
        self._ready = 0
        """The newest generation that was ready."""
        self._inventory: dict[str, dict[int, tuple[Snapshot, ...]]] = {}
        self._refused: set[Snapshot] = set()
        self._corrupt: set[tuple[int, int]] = set()
        """Generation and step at which its state was found corrupt."""
        self._convicted: set[str] = set()
        self._replaced: set[str] = set()
        """Convicted nodes without which a generation was opened."""
        self.books = Books(LIMITS.keep_checkpoints)
        self._verifying: ac.VerifyCheckpoint | None = None
        self._job = ""
        """As of the event before."""
        self._able: set[str] = set()
        """Nodes whose word on a checkpoint counts, as of the event before."""
        self._first_generation = self._first_of_mesh = 1
        """Since the run was declared; and of those whose slots are numbered as now."""
        self._layout, self._capabilities, self._steps, self._stops = None, ("",), 0, 0
        self._errors: dict[tuple[str, int, str], int] = {}
        self._struck: dict[tuple[int, int], set[str]] = {}
        """Step and slot to the nodes whose state was found corrupt there."""
        self._named: set[str] = set()
        """Nodes on which something has failed, by its own word, its agent's or the controller's."""
        self._parents: dict[int, tuple[int, int]] = {}
        """Generation to the one whose state it was opened with, and the step."""
        self._asked: dict[int, ac.AskThird] = {}
        """Disagreements that a third is to settle."""
        self._leaving: set[str] = set()
        self._parked: set[str] = set()
        """Nodes that have said so since the newest generation was opened."""
        self._limits, self._interval = LIMITS, None
        self._update: ev.UpdateRequested | None = None
        """What somebody has asked for and is not carried out."""
        self._changes: dict[str, str] = {}
        self._code, self._updates = "", 0
        self._trials: list[Trial] = []
        """What the job was before each of the newest updates, while nothing was saved with it."""
        self._without_progress = self._step = 0
        self._faults = 0
        self._retired = False
        """Whether a checkpoint was ever deleted for its age."""

    def see(self, supervisor: Supervisor, event: ev.Event, actions: list[ac.Action]) -> None:
        self.log.append((event, actions))
        lives = not self._ended or isinstance(event, ev.RunDeclared)
        before = len(self.books.committed)
        if lives:  # the time since an end is owed when the run is resumed, and not before
            self._owed += (event.at - self._at) * self._places
            self._at = event.at
            self._learn_of_readings(supervisor, event)
            self._learn(supervisor, event)
        committed_one = isinstance(event, ev.CheckpointCommitted) and len(self.books.committed) > before
        if isinstance(event, ev.CheckpointCommitted):
            known = supervisor.state.checkpoints.get(event.step)
            if known is not None and known.generation == event.generation:
                made = (event.generation, event.step)
                self._trials = [t for t in self._trials if made[0] < t.generation or made[1] <= t.step]
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
        for process, slots in ledger.processes.items():
            self._never_falls(process, slots)
        incidents = state.incidents + ([state.incident] if state.incident else [])
        charged = sum(incident.cost_us for incident in incidents)
        lost = sum(ledger.totals[label] for label in ("detection", "recovery", "waiting_for_nodes", "recomputed"))
        assert charged <= lost, "incidents are charged more than was lost"
        assert all(len(incident.evidence) <= EVIDENCE_KEPT for incident in incidents)
        asked = lives and isinstance(event, ev.FaultRequested)
        assert sum(isinstance(action, ac.InjectFault) for action in actions) == asked, "harm that nobody asked for now"
        self._check_health(supervisor)
        given_up = self._verifying if isinstance(event, ev.EpochBegan) else None
        if given_up and (state.verification is None or state.verification.number != given_up.number):
            self._give_up(state.checkpoints.get(given_up.step), given_up)
        for action in actions:
            self._check_order(supervisor, event, action)
        if isinstance(event, ev.EpochBegan) and not self._ended and self._changes:
            assert any(isinstance(action, ac.UpdateJob) for action in actions), "a new controller has the old job"
        assert state.saves_failed == self.books.failed, "failed saves are miscounted"
        assert bool(state.save_error) == self.books.failing, "whether saves fail now is not known"
        if committed_one and state.incident is None and state.job != "starting":
            keep = LIMITS.keep_checkpoints + bool(self._asked) + 2 * ("verify" in self._capabilities)
            held_back = self.books.pinned | set(self.books.doubts) | set(self.books.certified()[-1:])
            assert len(set(self.books.good(self._steps)) - held_back) <= keep, "too many checkpoints are kept"
        self._check_trust(supervisor)
        self._without_progress, self._step = state.recoveries_without_progress, state.step

    def _learn_of_readings(self, supervisor: Supervisor, event: ev.Event) -> None:
        asked = self._verifying
        match event:
            case ev.CheckpointVerified() if asked is not None:
                if asked.number != event.number:
                    return
                self._verifying = None
                known = self.books.committed.get(event.step)
                if event.unread or event.node not in self._able:
                    return
                if known is not None and known != event.generation:
                    return  # it was committed anew meanwhile
                if event.problems:
                    return self.books.find_bad(event.step, event.node)
                first, by_itself = self.books.doubts.get(event.step, ("", False))
                if by_itself and first not in self._lost:
                    struck = supervisor.state.strikes.get(first, [])
                    assert event.at in struck, "who misreads a checkpoint is not struck"
                self.books.find_whole(event.step)
            case ev.TimerFired() if asked is not None and event.timer == f"verify/{asked.number}":
                self._verifying = None
            case ev.RunDeclared():
                self._verifying = None

    def _give_up(self, known: Checkpoint | None, asked: ac.VerifyCheckpoint) -> None:
        """A controller that comes back does not order again what nobody wants to know any more."""
        gone = known is None or known.generation != asked.generation
        assert gone or (known.trust in ("damaged", "revoked") and known.doubt is None), "a verification is forgotten"
        self._verifying = None

    def _check_trust(self, supervisor: Supervisor) -> None:
        """What is thought of checkpoints follows from what was read, and not from one node's word alone."""
        state = supervisor.state
        able = {n for n, node in state.nodes.items() if node.state in ("active", "spare")} - set(state.convicted)
        for step, (node, _) in list(self.books.doubts.items()):
            known = state.checkpoints.get(step)
            if known is None or known.doubt is None:  # settled with nobody else to ask
                del self.books.doubts[step]
                if known is not None and known.trust == "damaged":
                    assert not able - {node}, "one node's word counts though another could be asked"
                    self.books.refuse(step)
        whole = [step for step, c in state.checkpoints.items() if c.trust in ("verified", "certified")]
        certified = [step for step, c in state.checkpoints.items() if c.trust == "certified"]
        assert certified == self.books.certified(), "what is certified and what was read do not make it so"
        assert set(whole) <= self.books.read, "a checkpoint counts as verified that nobody has read"
        self._able, self._job = able, state.job

    def _never_falls(self, name: str, value: int) -> None:
        assert value >= self._lows.get(name, 0), f"{name} fell from {self._lows[name]} to {value}"
        self._lows[name] = value

    def _learn(self, supervisor: Supervisor, event: ev.Event) -> None:
        current = max(self._opened, default=0)
        self.books.learn(event)
        blames = (ev.WorkerFailed, ev.WorkerExited, ev.WorkerHung, ev.GenerationFailed, ev.NodeSlow)
        if isinstance(event, blames):
            self._named.add(event.node)
        match event:
            case ev.RunDeclared():
                if self._layout is None or not self._layout.is_same_mesh(event.layout):
                    self._first_of_mesh, self._parents = 1 + current, {}
                self._layout, self._capabilities, self._steps = event.layout, event.capabilities, event.total_steps
                self._places = event.layout.nodes + event.layout.spares
                self._first_generation = 1 + current
                self._lost, self._joined, self._inventory, self._errors, self._stops = set(), set(), {}, {}, 0
                self._convicted, self._replaced, self._struck = set(), set(), {}
                self._update, self._changes, self._code, self._trials = None, {}, "", []
                self._named, self._asked, self._leaving, self._limits = set(), {}, set(), event.limits
                self._interval = None
            case ev.UpdateRequested():
                self._update = self._update or event
            case ev.IntervalChosen():
                self._interval = event
            case ev.NodeJoined() if event.node not in self._joined:
                self._joined.add(event.node)
                self._inventory[event.node] = self._usable(event.snapshots)
            case ev.NodeHalted() if event.generation == current and event.node not in self._lost:
                self._inventory[event.node] = self._usable(event.snapshots)
                self._parked |= {event.node} if event.parked else set()
            case ev.NodesHalted() if event.generation == current:
                self._parked |= set(event.nodes) if event.parked else set()
                for name in set(event.nodes) - self._lost:
                    slots = placement.slots_of(self._mesh(current), self._opened[current].nodes.index(name))
                    self._inventory[name] = self._usable(dict.fromkeys(slots, event.snapshots))
            case ev.NodeLost():
                self._lose(event.node)
            case ev.NodeLeaving():
                self._leaving.add(event.node)
            case ev.AuditSettled() if event.number in self._asked:
                self._learn_of_verdict(supervisor, event, self._asked.pop(event.number))
            case ev.TimerFired() if event.timer.startswith("third/"):
                self._asked.pop(int(event.timer.removeprefix("third/")), None)
            case ev.StepsDone() if self._job == "training" and event.generation == current and event.last > self._step:
                self._trials = [t._replace(trained=True) for t in self._trials]
            case ev.GenerationReady():
                self._ready = max(self._ready, event.generation)
            case ev.WorkerFailed(kind="state") if event.generation == current:
                order = self._opened[event.generation]
                if order.source == "durable":
                    if self.books.refuse(order.step) and "verify" in self._capabilities:
                        self.books.doubts[order.step] = (event.node, len(order.nodes) == 1)
                elif order.source == "ram":
                    self._refused.add(Snapshot(generation=order.snapshot_generation, step=order.step))
            case ev.GenerationFailed(kind="state") if event.generation == current and self._job == "starting":
                order = self._opened[event.generation]
                self._refused.add(Snapshot(generation=order.snapshot_generation, step=order.step))
            case ev.WorkerFailed(kind="corrupt" | "diverged" | "unclean") if event.generation == current:
                self._learn_of_corruption(supervisor, event)
            case ev.WorkerFailed(kind="exception" | "memory" | "audit"):
                key = (event.kind, event.step, event.error)
                self._errors[key] = self._errors.get(key, 0) + 1
            case ev.StopRequested():
                self._stops += 1
            case ev.FaultRequested():
                self._faults += 1

    def _learn_of_corruption(self, supervisor: Supervisor, event: ev.WorkerFailed) -> None:
        self._corrupt.add((event.generation, event.step))
        order = self._opened[event.generation]
        if event.step > order.step:
            self.books.revoke(event.generation, event.step)
        elif order.source == "ram":
            self.books.revoke(order.snapshot_generation, event.step)
        if event.kind == "corrupt" and supervisor.state.incident is not None:
            self._convicted.add(event.node)
            self._struck.setdefault((event.step, event.slot), set()).add(event.node)

    def _learn_of_verdict(self, supervisor: Supervisor, event: ev.AuditSettled, asked: ac.AskThird) -> None:
        if event.wrong not in (asked.auditor, asked.accused):
            return
        self._convicted.add(event.wrong)
        state, current = supervisor.state, max(self._opened, default=0)
        others = [other for other in self._asked.values() if event.wrong in (other.auditor, other.accused)]
        for each in (asked, *others):
            self._asked.pop(each.number, None)
            generation, step = each.generation, each.step
            self.books.revoke_if(lambda *made, g=generation, k=step: self._came_of(g, k, *made))
            heirs = [g for g in self._parents if self._came_of(generation, step, g, 10**9)]
            self._corrupt |= {(g, step) for g in heirs}
        settled = [(a.generation, a.step) for a in (asked, *others)]
        here = [k for g, k in settled if self._came_of(g, k, current, max(state.step, k))]
        before = [step for step in self.books.certified() if here and step < min(here)]
        if before and self._job in ("starting", "training", "halting", "committing"):
            self.books.revoke_if(lambda writer, step: step > max(before))
            self._corrupt.add((current, max(before) + 1))

    def _came_of(self, generation: int, step: int, newest: int, last: int) -> bool:
        """Whether the state after step `last` of generation `newest` came of what `generation` computed in `step`."""
        if newest not in self._parents:
            return False
        parent, first = self._parents[newest]
        if newest == generation:
            return first < step <= last
        return self._came_of(generation, step, parent, first)

    def _lose(self, node: str) -> None:
        self._lost.add(node)
        if self._verifying is not None and self._verifying.node == node:
            self._verifying = None
        self._asked = {number: asked for number, asked in self._asked.items() if asked.judge != node}

    def _mesh(self, generation: int) -> ev.Layout:
        order = self._opened[generation]
        return self._layout.sized(order.dp_replicate, order.fallback)

    def _usable(self, snapshots: dict[int, tuple[Snapshot, ...]]) -> dict[int, tuple[Snapshot, ...]]:
        return {k: tuple(s for s in held if s.generation >= self._first_of_mesh) for k, held in snapshots.items()}

    def _check_order(self, supervisor: Supervisor, event: ev.Event, action: ac.Action) -> None:
        match action:
            case ac.ReleaseNode():
                self._lose(action.node)
            case ac.HaltGeneration():
                assert action.generation == max(self._opened)
                self._check_named(supervisor, action.nodes)
            case ac.OpenGeneration() if isinstance(event, ev.EpochBegan):
                assert action == self._opened[max(self._opened)], "another order than the one that is open"
                assert action.source != "durable" or action.step not in self.books.deleted, (
                    "what is deleted is restored"
                )
            case ac.OpenGeneration():
                self._check_open(supervisor, action)
            case ac.UpdateJob() if isinstance(event, ev.EpochBegan):
                assert (action.number, action.changes) == (self._updates, self._changes), "another job than it has"
            case ac.UpdateJob():
                self._check_update(supervisor, event, action)
            case ac.CommitCheckpoint():
                assert action.epoch == supervisor.state.epoch
                bad = [g for g, step in self._corrupt if action.generation == g and action.step >= step]
                assert not bad, "corrupt state is committed"
                self.books.commit(action)
            case ac.DeleteCheckpoint():
                doubted = min((asked.step for asked in self._asked.values()), default=0)
                before = [step for step in self.books.good(self._steps) if step < doubted]
                assert action.step != max(before, default=0), (
                    "what a verdict may leave as the only clean one is deleted"
                )
                own = [step for step in self.books.certified() if step <= self._steps]
                assert action.step not in own[-1:], "the newest certified checkpoint is deleted"
                if action.step in self.books.read and "verify" in self._capabilities:
                    known = supervisor.state.checkpoints.items()
                    newer = [s for s, c in known if s > action.step and s in self.books.read and c.doubt is None]
                    assert len(newer) >= LIMITS.keep_checkpoints, "a verified checkpoint is deleted for others"
                self.books.delete(action.step, self._steps, "verify" in self._capabilities)
                self._retired = True
                newest = self._opened.get(max(self._opened, default=0))
                if newest and newest.source == "durable" and newest.generation >= self._first_generation:
                    assert self._ready == newest.generation or newest.step != action.step, "it is being restored from"
            case ac.VerifyCheckpoint():
                again = isinstance(event, ev.EpochBegan)
                assert "verify" in self._capabilities, "a body is asked for what it cannot do"
                assert self._verifying is None or (again and self._verifying == action), "two verifications at once"
                assert action.step in self.books.committed or action.step in self.books.doubts, "nothing to verify"
                if not again:
                    self._check_named(supervisor, (action.node,))
                self._verifying = action
            case ac.AskThird():
                self._asked[action.number] = action
            case ac.InjectFault():
                assert action.number == self._faults, "faults are miscounted"
                if isinstance(event, ev.FaultRequested) and not event.node and event.slot is not None and self._opened:
                    opened = self._opened[max(self._opened)]
                    if opened.generation >= self._first_generation and event.slot < self._mesh(opened.generation).slots:
                        assert action.node == opened.nodes[event.slot // self._layout.slots_per_node]
            case ac.EndRun() if not isinstance(event, ev.EpochBegan):
                self._check_verdict(supervisor, event, action)

    def _check_update(self, supervisor: Supervisor, event: ev.Event, action: ac.UpdateJob) -> None:
        asked, self._update = self._update, None
        if not isinstance(event, ev.StepsDone):
            return self._check_taken_back(supervisor, action)
        assert asked is not None, "a job that nobody has asked for"
        assert self._job == "training", "a job is changed in the middle of a step"
        first = max(self._opened) + asked.restarts
        terms = (self._limits, self._steps, self._interval)
        self._trials.append(Trial(first, supervisor.state.step, self._code, terms, asked.undo, trained=False))
        self._limits, self._steps = asked.limits, asked.total_steps
        self._interval = None if asked.chooses_interval else self._interval
        self._updates, self._changes, self._code = self._updates + 1, self._changes | asked.changes, asked.code
        assert (action.number, action.changes) == (self._updates, self._changes), "another job than was asked for"
        assert (supervisor.state.job == "halting") == asked.restarts, "workers begin anew for nothing, or do not"

    def _check_taken_back(self, supervisor: Supervisor, action: ac.UpdateJob) -> None:
        assert self._trials, "an update is taken back that was saved from"
        before, state = self._trials.pop(), supervisor.state
        repeated = max(self._errors.values(), default=0) >= LIMITS.same_error_tries
        corrupt = max((len(nodes) for nodes in self._struck.values()), default=0) >= 2
        in_vain = self._without_progress >= LIMITS.recoveries_without_progress
        failed_start = not before.trained and state.incident is not None and bool(state.incident.rungs)
        assert repeated or corrupt or in_vain or failed_start, "an update is taken back for nothing"
        self._changes, self._code, self._updates = self._changes | before.undo, before.code, self._updates + 1
        self._limits, self._steps, self._interval = before.terms
        self._errors, self._struck = {}, {}
        self._corrupt.add((max(self._opened), before.step + 1))
        self.books.revoke_if(lambda writer, step: writer >= before.generation and step > before.step)
        assert (action.number, action.changes) == (self._updates, self._changes), "the job is not what it was before"
        now = (state.limits, state.total_steps, state.interval)
        assert now == before.terms, "limits, steps or interval are not what they were before"

    def _check_health(self, supervisor: Supervisor) -> None:
        """Nobody is kept away for nothing, or for another's word alone, and never too many are."""
        nodes = supervisor.state.nodes
        away = {name for name, node in nodes.items() if node.state in ("quarantined", "probed")}
        assert len(away) <= self._limits.quarantined_at_most, "too many nodes are quarantined"
        assert away <= self._named | self._convicted, "a node is quarantined on which nothing has failed"

    def _check_named(self, supervisor: Supervisor, nodes: tuple[str, ...]) -> None:
        assert set(nodes) <= self._joined, "an order names a node that never joined"
        assert not set(nodes) & self._lost, "an order names a lost node"
        away = ("quarantined", "probed")
        assert all(supervisor.state.nodes[n].state not in away for n in nodes), "an order names a quarantined node"

    def _check_open(self, supervisor: Supervisor, order: ac.OpenGeneration) -> None:
        assert order.generation > max(self._opened, default=0), "generations do not grow"
        self._opened[order.generation] = order
        writer = self.books.committed.get(order.step, 0) if order.source == "durable" else order.snapshot_generation
        self._parents[order.generation] = (writer, order.step)
        for n, trial in enumerate(self._trials):
            first = trial.generation == order.generation
            self._trials[n] = trial._replace(step=order.step if first else min(trial.step, order.step))
        mesh = self._mesh(order.generation)
        assert mesh in list(self._layout.meshes), "a mesh that nobody can train"
        assert len(order.nodes) == len(set(order.nodes)) == mesh.nodes, "a slot is filled twice, or not at all"
        self._check_named(supervisor, order.nodes)
        alone = self._replicas_share_a_domain(supervisor, order, mesh)
        wanted = sorted(range(mesh.nodes)) if "buddy" in self._capabilities and mesh.nodes > 1 and alone else []
        assert sorted(order.buddies) == wanted, "each node's snapshots are kept once by another"
        assert all(place != keeper for place, keeper in enumerate(order.buddies)), "a node is its own buddy"
        self._check_size(supervisor, order, mesh)
        self._check_convicts(supervisor, order)
        assert order.code == self._code, "workers import other code than was asked for"
        assert not {t.from_node for t in order.transfers} & self._lost, "a copy comes from a lost node"
        newest = max(self.books.good(self._steps), default=0)
        incident = supervisor.state.incident
        if incident is not None and incident.rungs[-1] == "resume":
            assert set(order.nodes) <= self._parked, "workers are resumed that have not parked"
        self._parked = set()
        if order.source == "ram":
            chosen = Snapshot(generation=order.snapshot_generation, step=order.step)
            assert not self._holds_corruption(chosen), "state that was proven corrupt is restored"
            writers = self._opened[chosen.generation]
            assert order.snapshot_dp_replicate == writers.dp_replicate, "snapshots are numbered by another mesh"
            assert order.snapshot_fallback == writers.fallback, "snapshots are numbered by another mesh"
            assert chosen == self._newest_in_ram(order), "not the newest snapshot that every slot can get"
            self._check_transfers(order, chosen)
            assert order.step >= newest, "a committed checkpoint is newer"
        else:
            assert order.source == "init" or order.step not in self.books.deleted, "what is deleted is restored"
            left = {checkpoint.trust for checkpoint in supervisor.state.checkpoints.values()} - {"written"}
            assert order.source != "init" or not (left and self._retired), "a run begins again by itself"
            assert order.step == newest and (order.source == "durable") == (newest > 0), "not the newest checkpoint"
            tried = incident.spent if incident is not None else newest == 0  # nobody knows then that data are the same
            ram = None if tried else self._newest_in_ram(order)
            assert ram is None or ram.step < newest, "shared memory holds a newer step, and nothing spoke against it"

    def _replicas_share_a_domain(self, supervisor: Supervisor, order: ac.OpenGeneration, mesh: ev.Layout) -> bool:
        """Whether some slot's state lies in one failure domain only."""
        found: dict[tuple[int, int], set[str]] = {}
        inner = mesh.dp_shard * mesh.tp
        for slot in range(mesh.slots):
            node = order.nodes[slot // mesh.slots_per_node]
            domain = supervisor.state.nodes[node].domain or f"node {node}"
            found.setdefault((slot // (mesh.dp_replicate * inner), slot % inner), set()).add(domain)
        return any(len(domains) == 1 for domains in found.values())

    def _check_size(self, supervisor: Supervisor, order: ac.OpenGeneration, mesh: ev.Layout) -> None:
        """No smaller than it must be, and no node that leaves where another is there."""
        incident = supervisor.state.incident
        if incident is not None and incident.spent:
            return
        states = {name: node.state for name, node in supervisor.state.nodes.items()}
        usable = {name for name, state in states.items() if state in ("active", "spare")} - self._leaving
        usable -= {name for name in self._convicted if states.get(name) == "spare"}
        larger = [other.nodes for other in self._layout.meshes if other.nodes > mesh.nodes]
        assert all(nodes > len(usable) for nodes in larger), "a mesh that could be larger"
        if self._leaving & set(order.nodes):
            assert len(usable) < mesh.nodes, "a node that leaves has a slot though others could fill it"

    def _check_convicts(self, supervisor: Supervisor, order: ac.OpenGeneration) -> None:
        assert not self._replaced & set(order.nodes), "a convicted node is given a slot again"
        nodes = supervisor.state.nodes
        spares = {name for name in self._joined - self._lost - self._convicted if nodes[name].state == "spare"}
        away = sum(node.state in ("quarantined", "probed") for node in nodes.values())
        spares = spares if away < self._limits.quarantined_at_most else set()
        assert not self._convicted & set(order.nodes) or not spares, "a convicted node is kept though there is a spare"
        self._replaced |= self._convicted - set(order.nodes)

    def _holds_corruption(self, snapshot: Snapshot) -> bool:
        return any(snapshot.generation <= generation and snapshot.step >= step for generation, step in self._corrupt)

    def _newest_in_ram(self, order: ac.OpenGeneration) -> Snapshot | None:
        if "ram" not in self._capabilities:
            return None
        held = {name: slots for name, slots in self._inventory.items() if name not in self._lost}
        known = {s for slots in held.values() for snapshots in slots.values() for s in snapshots} - self._refused
        known = {s for s in known if not self._holds_corruption(s) and s.step <= self._steps}
        good = [s for s in known if all(self._can_have(held, want, s) for want in self._wants(order, s))]
        return max(good, key=lambda s: (s.step, s.generation), default=None)

    def _wants(self, order: ac.OpenGeneration, snapshot: Snapshot) -> list[Want]:
        """What must be there to restore a snapshot: something for each slot at its node, or, where the snapshot's mesh
        cut the state otherwise, of each of that mesh's shards at any node."""
        mesh, writers = self._mesh(order.generation), self._mesh(snapshot.generation)

        def copies(shard: int) -> list[int]:
            return list(placement.slots_of_shard(writers, shard))

        if not mesh.has_shards_of(writers):
            shards = range(writers.slots // writers.dp_replicate)
            return [(order.nodes, copies(shard), copies(shard)) for shard in shards]
        wants: list[Want] = []
        for slot in range(mesh.slots):
            alike = copies(placement.shard_of(mesh, slot))
            node = order.nodes[slot // mesh.slots_per_node]
            wants.append(((node,), [slot] if mesh == writers else alike, alike))
        return wants

    def _can_have(self, held: dict[str, dict[int, tuple[Snapshot, ...]]], want: Want, snapshot: Snapshot) -> bool:
        nodes, own, copies = want
        if any(snapshot in held.get(node, {}).get(s, ()) for node in nodes for s in own):
            return True
        return "peer" in self._capabilities and any(snapshot in held[n].get(s, ()) for n in held for s in copies)

    def _check_transfers(self, order: ac.OpenGeneration, chosen: Snapshot) -> None:
        copied = {(t.to_node, t.slot): t for t in order.transfers}
        assert len(copied) == len(order.transfers), "a copy is made twice"
        assert not copied or "peer" in self._capabilities
        used: set[tuple[str, int]] = set()
        for nodes, own, copies in self._wants(order, chosen):
            place = next(((node, s) for node in nodes for s in own if (node, s) in copied), None)
            if place is None:
                here = [self._inventory.get(node, {}) for node in nodes]
                assert any(chosen in held.get(s, ()) for held in here for s in own), f"nobody has slots {own}"
            else:
                used.add(place)
                transfer = copied[place]
                assert transfer.from_slot in copies, transfer
                assert chosen in self._inventory[transfer.from_node][transfer.from_slot], transfer
        assert used == copied.keys(), "a copy that nobody needs"

    def _check_verdict(self, supervisor: Supervisor, event: ev.Event, end: ac.EndRun) -> None:
        """Each exit code only for what it says."""
        state = supervisor.state
        timer = event.timer.partition("/")[0] if isinstance(event, ev.TimerFired) else ""
        match end.exit_code:
            case 0:
                assert self._steps in self.books.committed and state.step == self._steps, (
                    "not everything is done and saved"
                )
            case 1:
                trusts = [checkpoint.trust for checkpoint in state.checkpoints.values()]
                lost = "damaged" in trusts or ("revoked" in trusts and self._retired)
                assert timer == "commit" or (lost and state.newest_checkpoint() is None)
            case 93:
                repeated = max(self._errors.values(), default=0) >= LIMITS.same_error_tries
                assert repeated or max(len(nodes) for nodes in self._struck.values()) >= 2
            case 94:
                assert state.recoveries_without_progress >= LIMITS.recoveries_without_progress
            case 95:
                assert timer == "wait"
            case 96:
                assert self._stops
            case code:
                raise AssertionError(f"exit code {code}")
