"""What can happen: the facts that the supervisor is told, in the order in which the journal holds them.

`at` is microseconds on the run's clock: the controller's, starting at 0 when the run is declared, and monotone also
across restarts of the controller. Nodes report durations, never times. Losses and norms are integers in millionths,
so that the core and its journal hold no floats.

Reports may come twice (an agent repeats what was not acknowledged) and late (from an older generation). Both are
harmless: the supervisor ignores what it already knows and what does not belong to the current generation.

What a body owes: a controller tells EpochBegan, then CheckpointsPinned, then CheckpointsFound,
before anything else; a run that starts or resumes tells RunDeclared before them. Within a generation, GenerationReady
comes before its steps, GenerationFinished after what became of its last save, and what a node says when it has halted
after its workers' last words: what they know of corruption decides what may be restored. A lost node's name is not used
again, and when an agent comes back under a new name, the old one's NodeLost comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from storage.manifest import Certificate
from trainer.contract import Degrees

FOR_EVER_US = 2**62
"""Longer than any run."""


OPEN_END = 2**62
"""Of a run whose program decides by itself when it is done: more steps than it will make."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The mesh and the nodes that it wants. Slots are ranks, row-major over (pp, dp_replicate, dp_shard, tp)."""

    pp: int
    dp_replicate: int
    dp_shard: int
    tp: int
    slots_per_node: int
    nodes: int
    """Nodes that the mesh fills."""
    spares: int
    """Nodes beyond those that the run keeps and pays for."""
    shrinks_to: tuple[int, ...] = ()
    """Numbers of replicas below dp_replicate with which this body can train too, descending; empty: none. A replica
    must fill whole nodes: slots_per_node divides dp_shard x tp."""
    fallbacks: tuple[Degrees, ...] = ()
    """Other meshes with which this body can train, for when there are too few nodes for all of those: each fills whole
    nodes, and fewer of them than the one before. State is resharded from one to the other."""

    @property
    def slots(self) -> int:
        return self.degrees.world_size

    @property
    def degrees(self) -> Degrees:
        return Degrees(pp=self.pp, dp_replicate=self.dp_replicate, dp_shard=self.dp_shard, tp=self.tp)

    @property
    def meshes(self) -> Iterator[Layout]:
        """Of a declared layout: all meshes that the run can train with. Each has fewer nodes than the one before."""
        yield from (self.with_replicas(n) for n in (self.dp_replicate, *self.shrinks_to))
        yield from (self._of(fallback) for fallback in self.fallbacks)

    @property
    def smallest(self) -> Layout:
        """Of a declared layout: the last of `meshes`."""
        if self.fallbacks:
            return self._of(self.fallbacks[-1])
        return self.with_replicas(min((self.dp_replicate, *self.shrinks_to)))

    def largest_on(self, nodes: int) -> Layout | None:
        """Of a declared layout: the largest of `meshes` that so many nodes fill; None when none is filled."""
        return next((mesh for mesh in self.meshes if mesh.nodes <= nodes), None)

    def with_replicas(self, dp_replicate: int) -> Layout:
        """The same mesh with another number of replicas."""
        return self if dp_replicate == self.dp_replicate else self._of(replace(self.degrees, dp_replicate=dp_replicate))

    def sized(self, dp_replicate: int, fallback: Degrees | None) -> Layout:
        """Of a declared layout: that of `fallback`, or, where there is none, with so many replicas."""
        return self.with_replicas(dp_replicate) if fallback is None else self._of(fallback)

    def _of(self, degrees: Degrees) -> Layout:
        return replace(self, **vars(degrees), nodes=degrees.world_size // self.slots_per_node)

    def has_shards_of(self, other: Layout) -> bool:
        """Whether the state is cut alike in both: the meshes differ in their replicas at most."""
        return (self.pp, self.dp_shard, self.tp) == (other.pp, other.dp_shard, other.tp)

    def is_same_mesh(self, other: Layout) -> bool:
        """Whether slots have the same numbers, shards and places in a node."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("pp", "dp_replicate", "dp_shard", "tp", "slots_per_node")
        )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of the supervisor's patience; their defaults and reasons stand in orchestrator/spec.py."""

    halt_deadline_us: int
    start_deadline_us: int
    wait_deadline_us: int
    commit_deadline_us: int
    same_error_tries: int
    recoveries_without_progress: int
    strikes: int
    keep_checkpoints: int
    strike_expiry_us: int = FOR_EVER_US
    probation_us: int = 0
    quarantined_at_most: int = 2**31
    """Nodes that may be in quarantine at once; beyond that the fault is not one of nodes, and people must look."""
    grow_settle_us: int = 0
    keep_every_steps: int = 0
    """Checkpoints of multiples of these steps are kept for good; 0: none are."""
    scrub_us: int = 0
    """A kept checkpoint is read anew this long after it was last found whole; 0: never."""
    verify_bytes_per_s: int = 500_000_000
    swaps_slow: bool = True
    """Whether a node that is slow is swapped for a spare and gets a strike; else it is only told of."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One complete snapshot of a slot in shared memory: the step, and the generation that wrote it."""

    generation: int
    step: int

    @property
    def name(self) -> str:
        return f"step {self.step} of generation {self.generation}"


@dataclass(frozen=True, kw_only=True)
class RunDeclared:
    """The job as the core needs it. A second one in the same journal is a resume, perhaps with another mesh."""

    at: int
    run: str
    layout: Layout
    limits: Limits
    total_steps: int
    """After which the run is done; OPEN_END: when every rank has left in good order."""
    capabilities: tuple[str, ...]
    """What this body can do beyond the minimum:

    - "ram": keep snapshots in shared memory; "peer": copy them between nodes;
    - "buddy": copy each to one other node as soon as it is taken;
    - "park": keep the processes of live workers from one generation to the next;
    - "probe": check a node with work whose result is known; "third": repeat an audited computation on a third node;
    - "verify": have a node read a checkpoint back, and publish what is thought of checkpoints.

    Whether it can train on fewer nodes stands in `Layout.shrinks_to` and `Layout.fallbacks`.
    """


@dataclass(frozen=True, kw_only=True)
class EpochBegan:
    """A controller took over. It has replayed the journal; the agents answer to this epoch only."""

    at: int
    epoch: int
    version: str


@dataclass(frozen=True, kw_only=True)
class NodeJoined:
    """An agent is ready: its worker pool is warm and its data is prepared."""

    at: int
    node: str
    domain: str
    """Failure domain (rack label); empty when unknown."""
    snapshots: dict[int, tuple[Snapshot, ...]]
    """Slot to the complete snapshots that an agent before this one left in the node's shared memory."""


@dataclass(frozen=True, kw_only=True)
class NodeLost:
    """A node is gone, whoever noticed: connection closed, actor dead, silence past its bound."""

    at: int
    node: str
    cause: str


@dataclass(frozen=True, kw_only=True)
class NodeLeaving:
    """A node will be taken away: somebody drains it, or its cloud has given notice. It works until it is gone."""

    at: int
    node: str
    by: str


@dataclass(frozen=True, kw_only=True)
class NodeSlow:
    """A node computes more slowly than its peers do, by its own time and not by what it waits for."""

    at: int
    node: str
    generation: int
    detail: str
    """By how much, against whom."""
    slot: int | None = None
    workload: bool = False
    """Its slot was slow on another node, too: it is the slot's work, and not the node."""


@dataclass(frozen=True, kw_only=True)
class NodeProbed:
    """The answer to ProbeNode."""

    at: int
    node: str
    number: int
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class AuditDisagreed:
    """Two nodes computed the same thing from the same input, and their results differ: one of them is wrong."""

    at: int
    generation: int
    step: int
    """The step whose computation was audited."""
    auditor: str
    accused: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class AuditSettled:
    """The answer to AskThird: who was wrong."""

    at: int
    number: int
    wrong: str
    """Empty when the third agrees with neither, or could not do it."""
    detail: str


@dataclass(frozen=True, kw_only=True)
class WorkerFailed:
    """A worker's last words. `kind` is trainer.contract.Failed's."""

    at: int
    node: str
    generation: int
    slot: int
    step: int
    kind: str
    error: str


@dataclass(frozen=True, kw_only=True)
class WorkerExited:
    """A worker's process ended without having been told to."""

    at: int
    node: str
    generation: int
    slot: int
    exit_code: int | None
    signal: int | None


@dataclass(frozen=True, kw_only=True)
class WorkerHung:
    """A worker lives, but shows no sign of life or makes no progress: found by its agent's deadlines."""

    at: int
    node: str
    """Empty when no progress is made and nobody stands out."""
    generation: int
    slot: int | None
    step: int
    detail: str
    """How long, and where it stands."""


@dataclass(frozen=True, kw_only=True)
class NodeHalted:
    """A node's workers have ended or are parked, and this is what its shared memory holds."""

    at: int
    node: str
    generation: int
    snapshots: dict[int, tuple[Snapshot, ...]]
    """Slot to its complete snapshots; a slot is that of the generation that wrote them."""
    parked: bool = False
    """All of its workers live, and wait for their next assignment."""


@dataclass(frozen=True, kw_only=True)
class NodesHalted:
    """Several nodes' answers in one, as a fan-in tells them: each holds the same for the slots of its place in this
    generation, by their numbers in those that wrote it."""

    at: int
    nodes: tuple[str, ...]
    generation: int
    snapshots: tuple[Snapshot, ...]
    parked: bool = False


@dataclass(frozen=True, kw_only=True)
class CopyDamaged:
    """A snapshot that was to be restored was found damaged in a node's memory. Others may have mended it."""

    at: int
    node: str
    """That held it."""
    generation: int
    """That was being opened."""
    slot: int
    step: int
    detail: str
    """Which blocks."""


@dataclass(frozen=True, kw_only=True)
class GenerationFailed:
    """The body could not bring a generation up (an assignment was refused, a copy from a peer failed)."""

    at: int
    generation: int
    node: str
    """Where. With "start" it is to blame, and gets a strike. Empty when that is not known."""
    error: str
    kind: str = "start"
    """"start", or "state": of the state that was to be restored some part is whole nowhere. Then it is not offered
    again, an older snapshot is, and nobody is to blame: whose copy was damaged, CopyDamaged says."""


@dataclass(frozen=True, kw_only=True)
class GenerationReady:
    """Every rank stands before its first step. Durations are the slowest rank's."""

    at: int
    generation: int
    step: int
    rendezvous_us: int
    build_us: int
    restore_us: int
    processes: dict[str, int] = field(default_factory=dict)
    """How many slots are filled by which kind of process; see contract.PROCESSES."""


@dataclass(frozen=True, kw_only=True)
class StepsDone:
    """Steps `first` to `last` are complete on every rank; durations are sums over those steps of the slowest rank's."""

    at: int
    generation: int
    first: int
    last: int
    data_wait_us: int
    checkpoint_us: int
    """Snapshots and the starts of durable saves."""
    validation_us: int
    tokens: int
    loss_millionths: tuple[int, ...]
    """Of the steps in order, nats per token; what the report's curve is drawn from."""
    straggling_us: int = 0
    """What the slowest rank computed longer than the median one."""
    save_us: int = 0
    """The durable saves' part of `checkpoint_us`."""


@dataclass(frozen=True, kw_only=True)
class Validated:
    at: int
    generation: int
    step: int
    loss_millionths: int


@dataclass(frozen=True, kw_only=True)
class CheckpointWritten:
    """Every rank's part of the checkpoint of `step` is on the store, not yet committed."""

    at: int
    generation: int
    step: int
    bytes: int
    write_us: int


@dataclass(frozen=True, kw_only=True)
class CheckpointCommitted:
    at: int
    step: int
    epoch: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed:
    """A save or its commit failed; training goes on and older checkpoints serve."""

    at: int
    step: int
    error: str


@dataclass(frozen=True, kw_only=True)
class CheckpointsFound:
    """The committed checkpoints that stand under run.url when a controller begins, ascending."""

    at: int
    steps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CheckpointVerified:
    """The answer to VerifyCheckpoint: `node` has read the checkpoint, or could not."""

    at: int
    number: int
    """Of the order: what an older one of the same checkpoint comes to is no answer to a newer one."""
    step: int
    generation: int
    """As it was ordered."""
    node: str
    bytes: int
    read_us: int
    problems: tuple[str, ...]
    """What does not match its digest, each with its file; the first few. Empty: it is whole."""
    unread: str = ""
    """Why it was not read to its end; then there are no problems."""


@dataclass(frozen=True, kw_only=True)
class CheckpointCertified:
    """Enough audits were passed since a checkpoint to say how well its computation was watched."""

    at: int
    step: int
    generation: int
    certificate: Certificate


@dataclass(frozen=True, kw_only=True)
class CheckpointsPinned:
    """All the steps whose checkpoints somebody wants to keep, as they are now, ascending."""

    at: int
    steps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class UpdateRequested:
    """Another job from the next step boundary on, as somebody asks who has the run's token; checked as a whole before.

    The mesh is the same.
    """

    at: int
    by: str
    changes: dict[str, str]
    """``section.field`` to the new value as JSON."""
    code: str
    """Names the code that the workers shall import (runtime/code.py); empty: the installed one."""
    limits: Limits
    total_steps: int
    restarts: bool
    """Whether the workers must begin anew to do otherwise."""
    chooses_interval: bool
    """Whether the changes say how often to save, so that what was chosen before counts no more."""
    undo: dict[str, str] = field(default_factory=dict)
    """As `changes`, the values that are there now: by them the update can be taken back."""
    number: int = 0
    """Which update of the run it was checked to be, from 1. If another one was carried out meanwhile, it is void; 0,
    which older journals mean: whichever comes next."""


@dataclass(frozen=True, kw_only=True)
class IntervalChosen:
    """How often to save from now on, as computed from what the run has measured, with what it was computed from."""

    at: int
    every_steps: int
    step_us: int
    stall_us: int
    """What a durable save costs training; mean."""
    write_us: int
    """From there until every rank's part is on the store; mean."""
    restores: int
    """How often the run has lost steps to a restore from the store."""
    exposed_us: int
    """Wall-clock in which they have come, without pauses and waits for nodes."""
    why: str


@dataclass(frozen=True, kw_only=True)
class GenerationFinished:
    """Every rank left its loop in good order after `step`: "completed" or "stopped"."""

    at: int
    generation: int
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class StopRequested:
    """Somebody asked for an end. Gracefully: with a checkpoint at the next step boundary; else at once."""

    at: int
    by: str
    graceful: bool


@dataclass(frozen=True, kw_only=True)
class NodesRefused:
    """On too many nodes no agent comes up, however often it is tried, so that the mesh cannot be filled any more."""

    at: int
    error: str
    """Why, in the words of the first of them."""


@dataclass(frozen=True, kw_only=True)
class FaultRequested:
    """Somebody with the run's token asked for chaos: what is wanted, before it is done."""

    at: int
    fault: str
    """A name of orchestrator/chaos/faults.py."""
    node: str
    """The node to hurt; empty: the one that fills `slot`, or none."""
    slot: int | None
    parameters: dict[str, str]
    by: str


@dataclass(frozen=True, kw_only=True)
class FaultInjected:
    """A fault was done: its ground truth."""

    at: int
    number: int
    detail: str


@dataclass(frozen=True, kw_only=True)
class TimerFired:
    at: int
    timer: str


Event = (
    RunDeclared
    | EpochBegan
    | NodeJoined
    | NodeLost
    | NodeLeaving
    | NodeSlow
    | NodeProbed
    | AuditDisagreed
    | AuditSettled
    | WorkerFailed
    | WorkerExited
    | WorkerHung
    | NodeHalted
    | NodesHalted
    | CopyDamaged
    | GenerationFailed
    | GenerationReady
    | StepsDone
    | Validated
    | CheckpointWritten
    | CheckpointCommitted
    | CheckpointFailed
    | CheckpointsFound
    | CheckpointVerified
    | CheckpointCertified
    | CheckpointsPinned
    | UpdateRequested
    | IntervalChosen
    | GenerationFinished
    | StopRequested
    | NodesRefused
    | FaultRequested
    | FaultInjected
    | TimerFired
)
