"""What the supervisor knows: plain data, integers and ordered containers only, so that a fold over it replays exactly.

Each field says what binds it. `check` asserts the invariants that hold between events; it stays on in production.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.core.actions import OpenGeneration
from orchestrator.core.events import OPEN_END, IntervalChosen, Layout, Limits, Snapshot, UpdateRequested
from orchestrator.core.goodput import Ledger
from storage.manifest import Certificate
from trainer.contract import Degrees

NodeState = Literal["spare", "active", "quarantined", "probed", "lost"]

NODE_STATES: dict[NodeState, str] = {
    "spare": "ready, holds no slot",
    "active": "fills a place of the mesh",
    "quarantined": "alive, but it failed too often or its state was corrupt: never given a slot",
    "probed": "quarantined, and at work whose result is known: if that comes out right, it returns on probation",
    "lost": "gone, or sent away; until the run is resumed, its name is not used again",
}

IN_QUARANTINE: tuple[NodeState, ...] = ("quarantined", "probed")

Standing = Literal["good", "suspect", "probation", "leaving"]

STANDINGS: dict[Standing, str] = {
    "good": "nothing is held against it",
    "suspect": "a strike that still counts, or an audit in which it and another disagreed: good spares are taken first",
    "probation": "back from quarantine: taken after those, and the next strike sends it there again, for good",
    "leaving": "it will be taken away: it gives its place up as soon as another can take it, and is let go",
}

JobState = Literal["waiting", "starting", "training", "halting", "committing", "ended"]

JOB_STATES: dict[JobState, str] = {
    "waiting": "too few usable nodes for the mesh",
    "starting": "a generation is ordered; not every rank stands before its first step yet",
    "training": "steps are being done",
    "halting": "something failed; the generation's workers are being ended and the nodes report what they hold",
    "committing": "every rank has left in good order; the last checkpoint is not committed yet",
    "ended": "over; nothing more is ordered",
}

Trust = Literal["written", "committed", "verified", "certified", "damaged", "revoked"]

TRUSTS: dict[Trust, str] = {
    "written": "every rank's part is on the store; it is no checkpoint yet",
    "committed": "its record stands: it can be restored from",
    "verified": "a node has read it back whole: every digest matched",
    "certified": "verified, and a certificate says what speaks for its state having been computed rightly",
    "damaged": "found damaged by whoever read it: not restored from, and kept for people to look at",
    "revoked": "its state of that step was proven corrupt, or may be: not restored from",
}

USABLE: tuple[Trust, ...] = ("committed", "verified", "certified")
"""Restored from."""
VERIFIED: tuple[Trust, ...] = ("verified", "certified")
DISTRUSTED: tuple[Trust, ...] = ("damaged", "revoked")

Outcome = Literal["whole", "damaged", "misread", "unread"]

VERIFICATIONS: dict[Outcome, str] = {
    "whole": "every digest matched",
    "damaged": "found damaged, and no other node found it whole",
    "misread": "found damaged, and another node found it whole: a strike for the first",
    "unread": "it came to nothing: the store or the node did not answer, or a generation started",
}

# Exit codes of a run; the table for people is docs/exit-codes.md.
EXIT_OK = 0
EXIT_FAILED = 1
EXIT_JOB_FAULT = 93
EXIT_CRASH_LOOP = 94
EXIT_NO_NODES = 95
EXIT_STOPPED = 96


@dataclass
class Node:
    state: NodeState
    domain: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One thing that was seen to go wrong in an incident."""

    at: int
    node: str
    slot: int | None
    """None when it concerns the whole node."""
    kind: str
    """"node", "signal", "exit", "hang", "start", "save", or the kind of the worker's last words."""
    detail: str
    step: int


@dataclass(kw_only=True)
class Disagreement:
    """An audit in which two nodes disagreed, and a third was asked."""

    number: int
    generation: int
    step: int
    auditor: str
    accused: str
    judge: str


OWN_PLACE = -1


@dataclass(frozen=True)
class Held:
    """A run of neighbouring slots of which a node's shared memory holds the same snapshots."""

    first: int
    """OWN_PLACE: all slots of the node's place in `State.mesh`, so that the nodes of a mesh can share one object."""
    slots: int
    snapshots: tuple[Snapshot, ...]


@dataclass(kw_only=True)
class Doubt:
    """Somebody has found a checkpoint damaged, and another node is to say whether it is."""

    node: str
    """Who said so."""
    problem: str
    by_itself: bool
    """It has read the damage itself: in a restore by several nodes, each says what any of them has found."""


@dataclass
class Checkpoint:
    trust: Trust
    """See TRUSTS."""
    generation: int
    """The generation that wrote it; 0 when it is not known."""
    committed_at: int = 0
    replaces: Literal["", "damaged", "revoked"] = ""
    """What a record of this step is that stands until this one is committed."""
    bytes: int = 0
    """0 when it is not known."""
    read_at: int = 0
    """When it was last found whole; 0: never."""
    doubt: Doubt | None = None
    """Of one that is usable or damaged."""
    tries: int = 0
    """Verifications in a row that came to nothing."""
    not_before: int = 0
    """When the next one may be ordered."""
    certificate: Certificate | None = None
    """It certifies a checkpoint that is verified."""
    by: str = ""
    """Who has read it, or proven something of it, so that its trust is what it is."""
    why: str = ""
    """What was read, or is wrong with it."""


@dataclass(kw_only=True)
class Verification:
    """A node has been asked to read a checkpoint back."""

    number: int
    step: int
    generation: int
    node: str


@dataclass
class Incident:
    """One interruption: from the first thing seen to go wrong until the mesh has completed a step again."""

    number: int
    detected_at: int
    generation: int
    """The generation that it interrupted."""
    step: int
    """Steps completed when it struck."""
    evidence: list[Evidence] = field(default_factory=list)
    """What the next rung must answer: the first failure, or that of the last recovery."""
    answered: list[Evidence] = field(default_factory=list)
    """What earlier rungs of this incident answered."""
    rungs: list[str] = field(default_factory=list)
    """Rungs tried, in order; the last is the one that worked once the incident is closed."""
    spent: list[str] = field(default_factory=list)
    """Those of them that failed by themselves: they are not taken again in this incident."""
    cause: str = ""
    culprit: str = ""
    """The node that it is charged to; empty when it is nobody's."""
    reason: str = ""
    halted_at: int | None = None
    ordered_at: int | None = None
    ready_at: int | None = None
    closed_at: int | None = None
    restored_step: int | None = None
    rendezvous_us: int = 0
    build_us: int = 0
    restore_us: int = 0
    processes: dict[str, int] = field(default_factory=dict)
    """With which the mesh went on; see contract.PROCESSES."""
    cost_us: int = 0
    """Node-microseconds of detection, recovery, waiting and recomputation that it caused."""
    ledger_before_us: int = 0
    """The ledger's recovery and waiting when it opened, to know its share."""

    @property
    def steps_lost(self) -> int:
        return max(0, self.step - (self.step if self.restored_step is None else self.restored_step))


@dataclass
class Fault:
    """Harm that was ordered by somebody who tests the run, and what is known to be true of it."""

    number: int
    fault: str
    node: str
    slot: int | None
    step: int
    """Steps completed when it was ordered."""
    ordered_at: int
    injected_at: int | None = None
    detail: str = ""


@dataclass(kw_only=True)
class Trial:
    """What the job was before an update, while that can be taken back (updates.py)."""

    generation: int
    """The first with the update."""
    step: int
    """The last that was done without the update, of those of which there may still be something."""
    limits: Limits
    total_steps: int
    code: str
    interval: IntervalChosen | None
    undo: dict[str, str]
    """See UpdateRequested.undo."""
    trained: bool = False
    """Whether a step was done since."""


@dataclass
class State:
    run: str = ""
    began_at: int = 0
    """When the run was first declared: wall-clock counts from here."""
    layout: Layout | None = None
    limits: Limits | None = None
    capabilities: tuple[str, ...] = ()
    total_steps: int = 0
    """Or events.OPEN_END."""

    update: UpdateRequested | None = None
    """Another job that somebody has asked for, until it is the run's."""
    changes: dict[str, str] = field(default_factory=dict)
    """What the job has otherwise than when the run was declared: ``section.field`` to the value as JSON."""
    code: str = ""
    """Names the code that workers import from the next generation on; empty: the installed one."""
    n_updates: int = 0
    """That were ever carried out, those included that took one back."""
    trials: list[Trial] = field(default_factory=list)
    """Of the updates that have not proven themselves, the oldest first."""

    epoch: int = 0
    job: JobState = "waiting"
    nodes: dict[str, Node] = field(default_factory=dict)
    """Every node that joined since the run was declared, in the order in which they did."""
    strikes: dict[str, list[int]] = field(default_factory=dict)
    """Node to the times of the failures charged to it that still count; at limits.strikes it is quarantined."""
    convicted: dict[str, None] = field(default_factory=dict)
    """Nodes whose state was proven corrupt: quarantined as soon as a generation can be opened without them."""
    probation: dict[str, int] = field(default_factory=dict)
    """Nodes that are back from quarantine, and until when the next strike sends them there for good."""
    leaving: dict[str, str] = field(default_factory=dict)
    """Nodes that will be taken away, and who says so. Others may join for them: they count as no place of the run's."""
    drained: dict[str, None] = field(default_factory=dict)
    """Nodes that left, or that were convicted: their machines are not taken again, until the run is declared anew."""
    slow: dict[str, int] = field(default_factory=dict)
    """Node to the newest generation in which it was found to be slow: it counts once in each."""
    probes: dict[str, int] = field(default_factory=dict)
    """Nodes that are probed, and the number of the probe."""
    n_probes: int = 0
    disputes: dict[str, int] = field(default_factory=dict)
    """Node to the time of the last audit in which it disagreed with another, unless a third has cleared it."""
    disagreements: list[Disagreement] = field(default_factory=list)
    """Those on which a third node has been asked and has not answered."""
    n_disagreements: int = 0
    """That were ever put to a third."""
    counts: dict[NodeState, int] = field(default_factory=lambda: dict.fromkeys(NODE_STATES, 0))
    """Nodes in each state. Kept by `add_node` and `move_node`: an event costs the same at 5 nodes and at 12,500."""

    generation: int = 0
    first_generation: int = 1
    """The first one of the declared mesh. Snapshots of earlier ones are never used: their slots are numbered otherwise.
    """
    mesh: tuple[str, ...] = ()
    """Nodes of the current generation in mesh order; between generations, of the last one."""
    replicas: int = 0
    """dp_replicate of that mesh; below the layout's while it is shrunk."""
    fallback: Degrees | None = None
    """That mesh, while it is one of the layout's fallbacks."""
    shapes: dict[int, int] = field(default_factory=dict)
    """Generation to the number of replicas from it on: snapshots are numbered by the slots of their generation."""
    fallbacks: dict[int, Degrees] = field(default_factory=dict)
    """Of those generations, the meshes of those that had a fallback."""
    lineage: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Generation to the one whose state it was opened with, and at which step; 0: new weights, or not known whose."""
    growing: bool = False
    """The shrunk mesh can have more replicas, and a timer runs until it does."""
    grown_in_vain: int = 0
    """Meshes that grew and did not come up, since one did."""
    order: OpenGeneration | None = None
    """What opened the current generation; ordered again when a controller comes back before it was ready."""
    restored_step: int = 0
    step: int = 0
    """Steps completed in the current generation's history; at most one generation moves it forward."""
    high_water: int = 0
    """Most steps ever completed. Never falls: what lies below it is recomputed when done again."""
    floor: int = 0
    """The lowest step restored since the high-water mark last rose."""
    reached: int = 0
    """Most steps completed since the floor was last lowered: to pass it is progress, also when much is recomputed."""

    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    """By step, ascending. Those in USABLE are restored from."""
    verification: Verification | None = None
    """The one that is under way; of a node that is not lost."""
    n_verifications: int = 0
    """That were ever ordered."""
    readers: dict[str, int] = field(default_factory=dict)
    """Node to the number of the newest verification that it was asked for."""
    verifications: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(VERIFICATIONS, 0))
    """Outcome to how often it came out so; see VERIFICATIONS."""
    misread: dict[str, str] = field(default_factory=dict)
    """Node to what it has last misread, as evidence for its strike."""
    pinned: dict[int, None] = field(default_factory=dict)
    """Steps whose checkpoints somebody wants to keep."""
    retiring: dict[int, Checkpoint] = field(default_factory=dict)
    """The newest checkpoints whose deletion was ordered: one that turns out to be pinned is still there."""
    retired: int = 0
    """The newest step whose checkpoint was deleted for its age: older than what is kept there is only step 0."""
    interval: IntervalChosen | None = None
    """The newest choice of the steps between durable saves; None: as the job's document says."""
    saves_failed: int = 0
    """Durable saves and commits that failed since the run was first declared."""
    save_error: str = ""
    """The newest such failure; empty again once a checkpoint is committed."""
    bad_snapshots: dict[str, str] = field(default_factory=dict)
    """Names of snapshots that a worker refused, with its reason."""
    damaged_copies: dict[str, str] = field(default_factory=dict)
    """Copies of snapshots that were found damaged, and the evidence: each is one strike."""
    unclean: dict[int, int] = field(default_factory=dict)
    """Generation to the first step at which its state was found corrupt, or was made by an update that is taken back;
    outlives the incident, as snapshots do."""

    awaiting: dict[str, None] = field(default_factory=dict)
    """While halting: the nodes that have not reported yet."""
    parked: bool = False
    """Whether every worker of the mesh has parked, of those that were heard."""
    inventory: dict[str, tuple[Held, ...]] = field(default_factory=dict)
    """Node to the snapshots in its shared memory: of every node that fills no slot now and is not lost."""

    incident: Incident | None = None
    incidents: list[Incident] = field(default_factory=list)
    """Closed ones, in order."""
    errors: dict[str, list[str]] = field(default_factory=dict)
    """Signature of a failure that can be the job's to the nodes on which it struck, each time."""
    recoveries_without_progress: int = 0
    """Generations opened since `reached` last rose."""

    faults: list[Fault] = field(default_factory=list)
    """Chaos that was ordered, in order."""
    stopping: str = ""
    """Who asked for the graceful stop that is under way; empty when none is."""
    exit_code: int | None = None
    verdict: str = ""

    ledger: Ledger = field(default_factory=Ledger)

    @property
    def declared_limits(self) -> Limits:
        assert self.limits is not None, "no run is declared"
        return self.limits

    @property
    def declared_layout(self) -> Layout:
        """The whole mesh; while it is shrunk, `mesh_layout` is another."""
        assert self.layout is not None, "no run is declared"
        return self.layout

    def add_node(self, name: str, domain: str) -> None:
        assert name not in self.nodes, name
        self.nodes[name] = Node(state="spare", domain=domain)
        self.counts["spare"] += 1

    def move_node(self, name: str, to: NodeState) -> None:
        node = self.nodes[name]
        assert node.state != "lost", (name, to)
        self.counts[node.state] -= 1
        self.counts[to] += 1
        node.state = to
        if to == "lost":
            if name in self.leaving or name in self.convicted:
                self.drained[name] = None
            held_against: tuple[dict[str, Any], ...] = (self.strikes, self.convicted, self.disputes, self.slow)
            for known in (*held_against, self.probation, self.probes, self.leaving, self.readers, self.misread):
                known.pop(name, None)
            if self.verification is not None and self.verification.node == name:
                self.verification = None

    def standing(self, name: str) -> Standing:
        """What is to be thought of a usable node."""
        if name in self.leaving:
            return "leaving"
        if name in self.probation:
            return "probation"
        return "suspect" if name in self.strikes or name in self.disputes else "good"

    @property
    def n_usable(self) -> int:
        """How many `usable` has."""
        idle_convicts = sum(self.nodes[name].state == "spare" for name in self.convicted)
        return self.counts["active"] + self.counts["spare"] - idle_convicts

    @property
    def places_taken(self) -> int:
        """By nodes that are ready and will stay."""
        return self.counts["active"] + self.counts["spare"] - self.n_leaving

    @property
    def n_leaving(self) -> int:
        """Nodes that are ready and will not stay."""
        return sum(self.nodes[name].state in ("active", "spare") for name in self.leaving)

    @property
    def n_in_quarantine(self) -> int:
        return sum(self.counts[state] for state in IN_QUARANTINE)

    @property
    def spares_counted(self) -> int:
        """Spares in a place that the run pays for; a node that leaves and the one that came for it have only one."""
        return min(self.counts["spare"], self.ledger.places - self.counts["active"])

    def usable(self) -> tuple[str, ...]:
        """Nodes that may hold slots: those that do, then spares, each by standing and then in the order of joining.

        A convicted node may stay where it is for want of a spare, and is none itself where quarantine is full.
        """
        active = [name for name, node in self.nodes.items() if node.state == "active"]
        spares = [name for name, node in self.nodes.items() if node.state == "spare" and name not in self.convicted]
        order = list(STANDINGS)
        return (*active, *sorted(spares, key=lambda name: order.index(self.standing(name))))

    @property
    def mesh_layout(self) -> Layout:
        """How the mesh is laid out; while it is shrunk, not as declared."""
        return self.declared_layout.sized(self.replicas, self.fallback)

    def layout_of(self, generation: int) -> Layout:
        """How the mesh of `generation` was laid out, by which its snapshots' slots are numbered."""
        first = max(first for first in self.shapes if first <= generation)
        return self.declared_layout.sized(self.shapes[first], self.fallbacks.get(first))

    def is_made_of(self, generation: int, step: int, *, upto: tuple[int, int]) -> bool:
        """Whether the state of (generation, step) `upto` came of the computation of `step` in `generation`."""
        newest, last = upto
        while newest in self.lineage:
            parent, first = self.lineage[newest]
            if newest == generation:
                return first < step <= last
            newest, last = parent, first
        return False

    def is_unclean(self, generation: int, step: int) -> bool:
        """Whether a state that `generation` had in memory after `step` is not known to be clean.

        What earlier generations left of the same steps is not, either: the state in which corruption is found first
        may have been theirs.
        """
        return any(generation <= g and step >= first for g, first in self.unclean.items())

    def distrust(self, generation: int, step: int) -> None:
        """What `generation`, and those before it, had in memory from `step` on is not known to be clean."""
        self.unclean[generation] = min(step, self.unclean.get(generation, step))

    @property
    def is_open_ended(self) -> bool:
        """Whether the program decides by itself when it is done."""
        return self.total_steps == OPEN_END

    @property
    def begins_anew(self) -> bool:
        """Whether it is a script that has told no step: each new generation starts it from its beginning."""
        return self.is_open_ended and self.high_water == 0

    def newest_checkpoint(self) -> int | None:
        """Step of the newest checkpoint to restore from; one beyond the last step belongs to a longer run."""
        return max(
            (step for step, c in self.checkpoints.items() if c.trust in USABLE and step <= self.total_steps),
            default=None,
        )

    def check(self) -> None:
        """The invariants that hold after every event, at a cost that does not depend on the number of nodes.

        - while slots are held, as many nodes are active as the mesh has places, and the ledger counts the same nodes;
        - a halt awaits somebody and has an incident to answer;
        - who verifies a checkpoint is there, and no checkpoint is certified without a certificate;
        - steps completed never pass the high-water mark, and an ended run has a verdict;
        - the ledger adds up.
        """
        assert sum(self.counts.values()) == len(self.nodes) and min(self.counts.values()) >= 0, self.counts
        if self.job in ("starting", "training"):
            wanted = self.mesh_layout.nodes
            assert self.counts["active"] == len(self.mesh) == wanted, (self.counts, len(self.mesh), wanted)
        if self.job != "ended":
            held = (self.ledger.mesh_nodes, self.ledger.spare_nodes)
            assert held == (self.counts["active"], self.spares_counted), (held, self.counts)
        assert (self.job == "halting") == bool(self.awaiting), (self.job, self.awaiting)
        assert self.job != "halting" or self.incident is not None
        assert (self.job == "training") == (self.ledger.pending_since is not None), self.job
        assert self.restored_step <= self.step <= self.high_water, (self.restored_step, self.step, self.high_water)
        assert self.floor <= self.reached <= self.high_water, (self.floor, self.reached, self.high_water)
        assert (self.job == "ended") == (self.exit_code is not None)
        assert self.verification is None or self.nodes[self.verification.node].state != "lost", self.verification
        assert all(c.certificate for c in self.checkpoints.values() if c.trust == "certified"), self.checkpoints
        self.ledger.check()

    def check_nodes(self) -> None:
        """What `check` takes from counts, node by node; linear, so only when a generation fails or opens.

        - while slots are held, every place of the mesh is held by a different node, and by an active one;
        - nobody awaits the report of a node that is lost, and no lost node's memory is counted on;
        - no lost node is held to account any more;
        - the counts are true.

        (That few enough are in quarantine holds when one comes there, in health.py: an update may lower the limit.)
        """
        # One look at each node: most are active, and what is asked of the others costs little then.
        others: dict[str, NodeState] = {name: node.state for name, node in self.nodes.items() if node.state != "active"}
        counted = Counter(others.values())
        counted["active"] = len(self.nodes) - len(others)
        assert all(counted[state] == self.counts[state] for state in NODE_STATES), self.counts
        if self.job in ("starting", "training"):  # a mesh changes only when it is opened
            held = set(self.mesh)
            assert len(held) == len(self.mesh), self.mesh
            assert held <= self.nodes.keys() and held.isdisjoint(others), (self.job, self.mesh)
        lost = {name for name, state in others.items() if state == "lost"}
        of_the_living: tuple[dict[str, Any], ...] = (self.awaiting, self.inventory, self.strikes, self.convicted)
        for known in (*of_the_living, self.probation, self.leaving):
            assert known.keys().isdisjoint(lost), known.keys() & lost
