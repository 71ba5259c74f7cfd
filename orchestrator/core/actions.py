"""What can be ordered: the supervisor's answers to events, for a body to carry out.

Each is delivered at least once: after a controller's restart the open ones are ordered again. Bodies and agents apply
each once, by its generation. Only harm (InjectFault) is ordered once and never again: it may have ended the controller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from storage.manifest import Certificate
from trainer.contract import Degrees


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Copy the snapshot of (from_slot on from_node) into slot's place on to_node before the generation opens.

    Slots are numbered as in the generation that wrote the snapshot. Where that had another mesh, `slot` is `from_slot`:
    see OpenGeneration.
    """

    slot: int
    to_node: str
    from_slot: int
    from_node: str


@dataclass(frozen=True, kw_only=True)
class OpenGeneration:
    """Start workers for every slot. Node i of `nodes` fills slots [i * slots_per_node, (i + 1) * slots_per_node).

    Where `snapshot_dp_replicate` is not `dp_replicate`, the mesh has another size than the one that wrote the
    snapshots, and slots other numbers: a rank restores whatever its node holds of its shard (`placement.shard_of`).
    Where shards are others, too (`Layout.has_shards_of`), all of that mesh's are in the nodes' memory once transfers
    are made, and the ranks restore from them together.
    """

    generation: int
    nodes: tuple[str, ...]
    source: str
    """Where the state comes from: "init", "ram" or "durable"."""
    step: int
    """Completed steps in that state."""
    snapshot_generation: int
    """For "ram": the generation that wrote the snapshots."""
    transfers: tuple[Transfer, ...]
    reason: str
    dp_replicate: int
    """Replicas of this generation's mesh. The global batch is the same with fewer: each accumulates more."""
    snapshot_dp_replicate: int
    """Replicas of the mesh whose slots the snapshots are numbered by."""
    fallback: Degrees | None = None
    """The mesh, where it is one of `Layout.fallbacks`; None: the declared one with `dp_replicate` replicas."""
    snapshot_fallback: Degrees | None = None
    """As `fallback`, of the mesh whose slots the snapshots are numbered by."""
    buddies: tuple[int, ...] = ()
    """Place to the place whose node is sent a copy of each of its snapshots; empty: nobody is."""
    code: str = ""
    """Names the code that the workers import; empty: the installed one."""


@dataclass(frozen=True, kw_only=True)
class HaltGeneration:
    """End or park the workers of `generation` on these nodes; each answers NodeHalted with its snapshots."""

    generation: int
    nodes: tuple[str, ...]
    reason: str
    park: bool
    """Live workers let go of their collectives and keep their process; what does not park is ended."""


@dataclass(frozen=True, kw_only=True)
class UpdateJob:
    """From now on the job has these changes, all since it was declared; put it on record that it was changed."""

    number: int
    changes: dict[str, str]
    """See events.UpdateRequested."""


@dataclass(frozen=True, kw_only=True)
class AskStop:
    """Ask the workers to end at their next common step boundary, with a checkpoint."""

    generation: int


@dataclass(frozen=True, kw_only=True)
class SaveEvery:
    """Have durable saves begun each so many steps, in this generation and in those that follow."""

    generation: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class CommitCheckpoint:
    """Create the commit record of `step` exclusively; answer CheckpointCommitted or CheckpointFailed."""

    step: int
    epoch: int
    generation: int
    """The generation that wrote the parts."""
    replaces_damaged: bool
    """A record of this step by another generation was found damaged: delete that one first. (Never delete one of
    this generation: the order may come twice.)"""


@dataclass(frozen=True, kw_only=True)
class DeleteCheckpoint:
    """Delete the checkpoint of `step`, its record first; one that cannot be deleted is found again by a controller.

    Not one that is pinned: then CheckpointsPinned is the answer.
    """

    step: int


@dataclass(frozen=True, kw_only=True)
class VerifyCheckpoint:
    """Have `node` read the checkpoint of `step` back, slowly; answer CheckpointVerified. Nobody waits for it."""

    number: int
    step: int
    generation: int
    """That wrote it; 0: whichever record stands."""
    node: str
    bytes_per_s: int
    """No faster: training and its saves come first."""


@dataclass(frozen=True, kw_only=True)
class PublishTrust:
    """Tell under run.url what is thought of a checkpoint from now on; what cannot be written is told with the next."""

    step: int
    generation: int
    epoch: int
    trust: Literal["verified", "certified", "damaged", "revoked"]
    by: str
    """Who has read it, or proven something of it."""
    detail: str
    certificate: Certificate | None


@dataclass(frozen=True, kw_only=True)
class InjectFault:
    """Do this harm, as somebody with the run's token asked, and answer FaultInjected with what was done."""

    number: int
    generation: int
    fault: str
    node: str
    """Empty for a fault of no slot."""
    slot: int | None
    parameters: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ReleaseNode:
    """Let go of a node that is lost or not wanted: end what is left of its agent; it may come back as a new one."""

    node: str
    reason: str
    for_good: bool = False
    """Its machine is taken away: no agent is started there any more."""


@dataclass(frozen=True, kw_only=True)
class ProbeNode:
    """Have a quarantined node do work whose result is known; answer NodeProbed."""

    node: str
    number: int


@dataclass(frozen=True, kw_only=True)
class AskThird:
    """Repeat the computation in which two nodes disagreed on a third, `judge`; answer AuditSettled."""

    number: int
    generation: int
    step: int
    auditor: str
    accused: str
    judge: str


@dataclass(frozen=True, kw_only=True)
class SetTimer:
    """Answer TimerFired with this name at `at`. Never cancelled: a late one names something that is over."""

    timer: str
    at: int


@dataclass(frozen=True, kw_only=True)
class EndRun:
    """The run is over. Release everything; `exit_code` is from the table in docs/exit-codes.md."""

    exit_code: int
    reason: str


Action = (
    OpenGeneration
    | HaltGeneration
    | AskStop
    | SaveEvery
    | UpdateJob
    | CommitCheckpoint
    | DeleteCheckpoint
    | VerifyCheckpoint
    | PublishTrust
    | InjectFault
    | ReleaseNode
    | ProbeNode
    | AskThird
    | SetTimer
    | EndRun
)

# Orders that must be durable under run.url before they are sent (the others only need the local journal).
DECISIONS = (
    OpenGeneration,
    HaltGeneration,
    UpdateJob,
    CommitCheckpoint,
    DeleteCheckpoint,
    InjectFault,
    ReleaseNode,
    EndRun,
)
