"""The ladder: after a failure, the cheapest recovery that is sufficient.

`decide` is asked once the generation's workers are gone and every reachable node has said what its shared memory
holds. It reads, top to bottom, as the ladder does:

    fail      the fault follows the job, or recovering has stopped helping
    wait      too few usable nodes
    replace   a worker died: fork it anew, state from the nodes' shared memory
    spare     a node died: a spare takes its place, state from a replica's or its own copies in shared memory
    durable   shared memory does not hold one complete step: the newest committed checkpoint, or the very beginning

A rung is taken only when the body has said that it can do it ("ram", "peer"), and a rung that has failed by itself in
an incident is not taken again in it: the next one down is, without the node on which it failed if there are others.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core import placement
from orchestrator.core.actions import Transfer
from orchestrator.core.events import Snapshot
from orchestrator.core.state import EXIT_CRASH_LOOP, EXIT_JOB_FAULT, Evidence, Incident, State
from orchestrator.core.state import EXIT_FAILED as RUN_FAILED
from trainer.contract import EXIT_FAILED

# What can stand at the root of an incident, the most telling first. A worker whose peer vanished says "collective":
# that is a consequence, and it is the root only when nothing else was seen.
_ROOTS = ("node", "signal", "memory", "audit", "exception", "state", "exit", "start", "save", "collective")

# Kinds that come from the program itself when they repeat, whatever the node.
_OF_THE_JOB = ("exception", "memory", "audit")

# Kinds that a node's hardware can cause and whose reporter is the one that has it: an uncorrectable memory error of a
# GPU is an exception in torch. A number that is not finite ("audit") shows on every rank at once, a peer's death too.
_OF_A_NODE = ("node", "signal", "exit", "start", "exception", "memory")

# Failures of a recovery that the rung is not to blame for, and that cannot come back: the node is gone, the state that
# was refused is not offered again. A save that failed says nothing about how its state was restored.
_NOT_THE_RUNGS = ("node", "state", "save")

# The rungs that restore from shared memory, the cheaper first.
_RAM_RUNGS = ("replace", "spare")

# Pieces of evidence that an incident keeps. Every rank of a mesh reports that its peer vanished, so their number must
# not grow with the mesh; what matters is the root, and that is never dropped.
EVIDENCE_KEPT = 64


@dataclass(frozen=True, kw_only=True)
class Decision:
    rung: str
    reason: str
    mesh: tuple[str, ...] = ()
    source: str = ""
    step: int = 0
    snapshot_generation: int = 0
    transfers: tuple[Transfer, ...] = ()
    exit_code: int = 0


def root(incident: Incident) -> Evidence:
    """The piece of evidence that explains the others: the most telling kind, and of those the first seen."""
    return min(incident.evidence, key=_telling)


def note(incident: Incident, evidence: Evidence) -> None:
    """Add a piece of evidence, once; of more than EVIDENCE_KEPT the least telling goes."""
    kept = incident.evidence
    if any((e.node, e.slot, e.kind) == (evidence.node, evidence.slot, evidence.kind) for e in kept):
        return
    kept.append(evidence)
    if len(kept) > EVIDENCE_KEPT:
        del kept[max(range(len(kept)), key=lambda i: (_telling(kept[i]), i))]


def has_told_why(incident: Incident, node: str, slot: int, exit_code: int | None) -> bool:
    """Whether a worker that exited has left its last words in `incident`, or there was no room for them."""
    told = any((e.node, e.slot) == (node, slot) and e.kind not in ("signal", "exit") for e in incident.evidence)
    return told or (exit_code == EXIT_FAILED and len(incident.evidence) == EVIDENCE_KEPT)


def signature(evidence: Evidence) -> str:
    """Names a failure so that the same one is known again on another node."""
    return f"{evidence.kind} at step {evidence.step}: {evidence.detail}"


def is_of_the_job(evidence: Evidence) -> bool:
    return evidence.kind in _OF_THE_JOB


def is_of_a_node(evidence: Evidence) -> bool:
    return evidence.kind in _OF_A_NODE


def blames_the_rung(evidence: Evidence) -> bool:
    return evidence.kind not in _NOT_THE_RUNGS


def follows_one_node(state: State, evidence: Evidence) -> bool:
    """Whether a failure has come back `same_error_tries` times and never on another node: it may be that node's."""
    assert state.limits is not None
    struck = state.errors.get(signature(evidence), [])
    return (
        is_of_a_node(evidence)
        and is_of_the_job(evidence)
        and len(struck) >= state.limits.same_error_tries
        and len(set(struck)) == 1
    )


def decide(state: State) -> Decision:
    """The next rung for the open incident, from the state after the halt."""
    incident, limits, layout = state.incident, state.limits, state.layout
    assert incident is not None and limits is not None and layout is not None
    cause = root(incident)

    struck = state.errors.get(signature(cause), [])
    evicted = follows_one_node(state, cause) and state.nodes[cause.node].state in ("quarantined", "lost")
    if is_of_the_job(cause) and len(struck) >= limits.same_error_tries and not evicted:
        return Decision(
            rung="fail",
            exit_code=EXIT_JOB_FAULT,
            reason=f"the same failure came back, {len(struck)} times on {' and '.join(dict.fromkeys(struck))}, so it "
            f"follows the job and requeueing will not help: {signature(cause)}",
        )
    if state.recoveries_without_progress >= limits.recoveries_without_progress:
        return Decision(
            rung="fail",
            exit_code=EXIT_CRASH_LOOP,
            reason=f"{state.recoveries_without_progress} generations without one new step, last: {signature(cause)}",
        )

    usable = state.usable()
    if incident.spent and is_of_a_node(cause) and len(usable) > layout.nodes:
        usable = tuple(node for node in usable if node != cause.node)  # a recovery failed on it
    mesh = placement.place(layout, state.mesh, usable, state.inventory)
    if mesh is None:
        return Decision(rung="wait", reason=f"the mesh needs {layout.nodes} nodes, {len(usable)} are usable")

    rung = "replace" if mesh == state.mesh else "spare"
    if "durable" in incident.spent or any(r in incident.spent for r in _RAM_RUNGS[_RAM_RUNGS.index(rung) :]):
        return durable_decision(state, mesh, f"{_what(cause)}: rung {incident.spent[-1]} failed before its first step")
    found = newest_in_ram(state, mesh)
    if found is None or found[0].step < (state.newest_checkpoint() or 0):
        return durable_decision(state, mesh, f"{_what(cause)}: shared memory holds no complete step that is newer")
    snapshot, transfers = found
    copied = f", {len(transfers)} of its slots copied from elsewhere" if transfers else ""
    return Decision(
        rung=rung,
        mesh=mesh,
        source="ram",
        step=snapshot.step,
        snapshot_generation=snapshot.generation,
        transfers=transfers,
        reason=f"{_what(cause)}: step {snapshot.step} is complete in shared memory{copied}",
    )


def durable_decision(state: State, mesh: tuple[str, ...], why: str) -> Decision:
    """Start from the newest committed checkpoint that nobody has found damaged, else from the beginning.

    A run that has checkpoints never begins again by itself: when all are damaged, people must look at them.
    """
    step = state.newest_checkpoint()
    damaged = [n for n, checkpoint in state.checkpoints.items() if checkpoint.trust == "damaged"]
    if step is None and damaged:
        which = ", ".join(str(n) for n in damaged)
        return Decision(rung="fail", exit_code=RUN_FAILED, reason=f"{why}; every checkpoint is damaged: {which}")
    if step is None:
        return Decision(rung="durable", mesh=mesh, source="init", reason=f"{why}; no checkpoint is committed")
    return Decision(rung="durable", mesh=mesh, source="durable", step=step, reason=f"{why}; checkpoint {step}")


def newest_in_ram(state: State, mesh: tuple[str, ...]) -> tuple[Snapshot, tuple[Transfer, ...]] | None:
    """The newest snapshot that shared memory can give to every slot of `mesh`, with the copies that it takes.

    A snapshot is known by its step *and* the generation that wrote it: where collectives are not bitwise
    reproducible, the same step of two generations is two states, and they must never be mixed.
    """
    if "ram" not in state.capabilities:
        return None
    held = {s for slots in state.inventory.values() for snapshots in slots.values() for s in snapshots}
    for snapshot in sorted(held, key=lambda s: (s.step, s.generation), reverse=True):
        if snapshot.name in state.bad_snapshots:
            continue
        transfers = _transfers(state, mesh, snapshot)
        if transfers is not None:
            return snapshot, transfers
    return None


def _transfers(state: State, mesh: tuple[str, ...], snapshot: Snapshot) -> tuple[Transfer, ...] | None:
    """The copies that give every slot of `mesh` this snapshot; None when some slot's cannot be had.

    A quarantined node is read from, too: what it holds carries digests.
    """
    layout = state.layout
    assert layout is not None
    holders: dict[int, str] = {}
    for node, slots in state.inventory.items():
        holders |= {slot: node for slot, held in slots.items() if snapshot in held}
    transfers = []
    for index, node in enumerate(mesh):
        for slot in placement.slots_of(layout, index):
            if snapshot in state.inventory.get(node, {}).get(slot, ()):
                continue
            source = next((s for s in (slot, *placement.replicas(layout, slot)) if s in holders), None)
            if source is None or "peer" not in state.capabilities:
                return None
            transfers.append(Transfer(slot=slot, to_node=node, from_slot=source, from_node=holders[source]))
    return tuple(transfers)


def _telling(evidence: Evidence) -> tuple[int, int]:
    return (_ROOTS.index(evidence.kind), evidence.at)


def _what(cause: Evidence) -> str:
    return f"{cause.kind} on {cause.node or 'the mesh'}" + ("" if cause.slot is None else f", slot {cause.slot}")
