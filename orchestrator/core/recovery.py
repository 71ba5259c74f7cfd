"""The ladder: after a failure, the cheapest recovery that is sufficient.

`decide` is asked once the generation's workers are gone or parked and every reachable node has said what its shared
memory holds. It reads, top to bottom, as the ladder does:

    fail      the fault follows the job, or recovering has stopped helping
    wait      too few usable nodes, also for a smaller mesh
    resume    every worker lives, a collective failed: no process is started anew
    replace   a worker died: fork it anew, state from the nodes' shared memory
    spare     a node died, is slow, corrupt or leaves: a spare takes its place, state from a replica's or its own copies
              in shared memory
    shrink    no spare is left: the mesh goes on with fewer replicas, or as another one that the job allows, with state
              from the copies that are left
    grow      nodes are back: the mesh becomes larger again, with state from the copies of those that train
    durable   shared memory does not hold one complete step: the newest committed checkpoint, or the very beginning

Where state was proven corrupt, what may hold it is passed over: that is the rewind of each rung.

A rung is taken only when the body has said that it can do it, and one that has failed by itself in an incident is not
taken again in it: the next one down is, without the node on which it failed if there are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.core import election, placement
from orchestrator.core.actions import Transfer
from orchestrator.core.events import Layout, Snapshot
from orchestrator.core.state import (
    DISTRUSTED,
    EXIT_CRASH_LOOP,
    EXIT_JOB_FAULT,
    IN_QUARANTINE,
    STANDINGS,
    Evidence,
    Incident,
    State,
)
from orchestrator.core.state import EXIT_FAILED as RUN_FAILED
from trainer.contract import EXIT_FAILED

# What can stand at the root of an incident, the most telling first. A worker whose peer vanished says "collective":
# that is a consequence, and it is the root only when nothing else was seen.
_ROOTS = (
    "corrupt",
    "diverged",
    "node",
    "signal",
    "hang",
    "slow",
    "memory",
    "audit",
    "exception",
    "state",
    "store",
    "exit",
    "start",
    "save",
    "unclean",
    "collective",
    "leave",
    "update",
    "grow",
)
# Of the last ones the first seen: when the mesh is halted for a change, ranks that hear of it later miss their peers.
_FIRST_SEEN_FROM = _ROOTS.index("collective")

# Nothing has failed: a change that can wait for a quiet moment, and was ordered in one.
PLANNED = ("slow", "leave", "update", "grow")

# Kinds that come from the program itself when they repeat, whatever the node.
_OF_THE_JOB = ("exception", "memory", "audit")

# Kinds that a node's hardware can cause and whose reporter is the one that has it: an uncorrectable memory error of a
# GPU is an exception in torch. A number that is not finite ("audit") shows on every rank at once, a peer's death too.
_OF_A_NODE = ("corrupt", "node", "signal", "hang", "slow", "exit", "start", "exception", "memory")

# Proof that state is not what it must be. "corrupt" convicts the node that says it; "diverged" convicts nobody, but one
# of those that say it is wrong, so each gets a strike.
CORRUPTION = ("corrupt", "diverged")

# Of those, and of whoever was stopped by another rank's: the last is the only word left when a dead rank took its own
# along, and it says as well as theirs from which step on state is not known to be clean.
UNCLEAN = (*CORRUPTION, "unclean")

# Failures of a recovery that the rung is not to blame for, and that cannot come back: the node is gone, the state that
# was refused or found corrupt is not offered again. A save that failed says nothing about how its state was restored,
# and a store that could not be read, after tries of its own, may be back.
_NOT_THE_RUNGS = ("node", "state", "store", "save", *UNCLEAN)

# The rungs that restore from shared memory. After one that failed by itself, those that stand before it are not taken
# either. A mesh that could not grow goes on as it was.
_RAM_RUNGS = ("grow", "resume", "replace", "spare", "shrink")

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
    layout: Layout | None = None
    """Of `mesh`."""
    exit_code: int = 0


def seen(state: State, at: int, node: str, slot: int | None, kind: str, detail: str) -> Evidence:
    """A piece of evidence of now, at the step that the mesh has completed."""
    return Evidence(at=at, node=node, slot=slot, kind=kind, detail=detail, step=state.step)


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
    """Names a failure so that the same one is known again on another node.

    The program itself corrupts state where its own slot does the same thing again; fingerprints say nothing about it.
    """
    if evidence.kind == "corrupt":
        return f"corrupt at step {evidence.step} in slot {evidence.slot}"
    return told(evidence)


def told(evidence: Evidence) -> str:
    """A failure for people."""
    return f"{evidence.kind} at step {evidence.step}: {evidence.detail}"


def is_of_the_job(evidence: Evidence) -> bool:
    return evidence.kind in _OF_THE_JOB


def is_of_a_node(evidence: Evidence) -> bool:
    return evidence.kind in _OF_A_NODE


def is_planned(incident: Incident | None) -> bool:
    """Whether nothing has failed, and nothing has been tried yet: a change that somebody wants."""
    return incident is not None and not incident.rungs and root(incident).kind in PLANNED


def blames_the_rung(evidence: Evidence) -> bool:
    return evidence.kind not in _NOT_THE_RUNGS


def charged(incident: Incident) -> list[Evidence]:
    """What is charged to nodes, one piece each: the root, and with proven corruption all who said the same."""
    cause = root(incident)
    if cause.kind not in CORRUPTION:
        return [cause] if is_of_a_node(cause) else []
    first: dict[str, Evidence] = {}
    for evidence in incident.evidence:
        if evidence.kind == cause.kind:
            first.setdefault(evidence.node, evidence)
    return list(first.values())


def note_for_the_job(state: State, incident: Incident) -> None:
    """Count what can be the job's own fault, to know it again.

    A node that an audit convicts was found by another's computation, so it is not the program's, which has no slot.
    """
    cause = root(incident)
    pieces = charged(incident) if cause.kind == "corrupt" else [cause] if is_of_the_job(cause) else []
    for evidence in (piece for piece in pieces if piece.slot is not None):
        state.errors.setdefault(signature(evidence), []).append(evidence.node)


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


def _follows_the_job(state: State, evidence: Evidence) -> bool:
    """Whether no node can be the reason for a failure any more.

    The program's own failures: when they have come back often enough, and not on one node that is gone now. Corruption
    of a slot at a step: when it has struck there on as many different nodes. (That it comes back on one node, which no
    spare can replace, is that node's: it costs a step each time, and the crash-loop breaker bounds it.)
    """
    assert state.limits is not None
    struck = state.errors.get(signature(evidence), [])
    if evidence.kind == "corrupt":
        return len(set(struck)) >= max(2, state.limits.same_error_tries)
    evicted = follows_one_node(state, evidence) and state.nodes[evidence.node].state in (*IN_QUARANTINE, "lost")
    return is_of_the_job(evidence) and len(struck) >= state.limits.same_error_tries and not evicted


def decide(state: State) -> Decision:
    """The next rung for the open incident, from the state after the halt."""
    incident, limits, layout = state.incident, state.limits, state.layout
    assert incident is not None and limits is not None and layout is not None
    cause = root(incident)

    for fault in (cause, *charged(incident)):
        if _follows_the_job(state, fault):
            struck = state.errors[signature(fault)]
            return Decision(
                rung="fail",
                exit_code=EXIT_JOB_FAULT,
                reason=f"the same failure came back, {len(struck)} times on {' and '.join(dict.fromkeys(struck))}, so "
                f"it follows the job and requeueing will not help: {told(fault)}",
            )
    if state.recoveries_without_progress >= limits.recoveries_without_progress and not is_planned(incident):
        return Decision(
            rung="fail",
            exit_code=EXIT_CRASH_LOOP,
            reason=f"{state.recoveries_without_progress} generations without a step beyond {state.reached}, last: "
            f"{told(cause)}",
        )

    usable = state.usable()
    if incident.spent and is_of_a_node(cause) and len(usable) > fewest_nodes(state):
        usable = tuple(node for node in usable if node != cause.node)  # a recovery failed on it
    before = state.layout_of(incident.generation).nodes
    found = largest_mesh(state, usable, at_most=before if "grow" in incident.spent else layout.nodes)
    if found is None:
        return Decision(rung="wait", reason=f"the mesh needs {fewest_nodes(state)} nodes, {len(usable)} are usable")
    mesh, chosen = found

    what = _what(incident) + _fate(state, mesh)
    rung = _rung(state, mesh, chosen)
    if "durable" in incident.spent or any(r in incident.spent for r in _RAM_RUNGS[_RAM_RUNGS.index(rung) :]):
        failed = f"rung {incident.spent[-1]} failed before its first step"
        return durable_decision(state, mesh, chosen, f"{what}: {failed}")
    elected = election.newest_in_ram(state, mesh, chosen)
    clean = " and known to be clean" if any(e.kind in UNCLEAN for e in incident.evidence) else ""
    if elected is None or elected[0].step < (state.newest_checkpoint() or 0):
        why = f"{what}: shared memory holds no complete step that is newer{clean}"
        return durable_decision(state, mesh, chosen, why)
    snapshot, transfers = elected
    copied = f", {len(transfers)} of its slots copied from elsewhere" if transfers else ""
    size = "" if chosen == state.mesh_layout else f"; {_share(state, chosen)}"
    why = f"{what}: step {snapshot.step} is complete in shared memory{clean}{copied}{size}"
    return _ram_decision(rung, mesh, chosen, elected, why)


def fewest_nodes(state: State) -> int:
    """Nodes of the smallest mesh that this body can train with."""
    assert state.layout is not None
    return state.layout.smallest.nodes


def size_of(state: State, layout: Layout) -> str:
    """What the mesh becomes, in words: its replicas, where nothing else changes."""
    if layout.has_shards_of(state.mesh_layout):
        return f"{layout.dp_replicate} replicas"
    return str(layout.degrees)


def _share(state: State, layout: Layout) -> str:
    """The same, beside what the whole mesh has."""
    declared = state.declared_layout
    if layout.has_shards_of(state.mesh_layout) and layout.has_shards_of(declared):
        return f"{layout.dp_replicate} of {declared.dp_replicate} replicas"
    return f"{'as' if layout.has_shards_of(state.mesh_layout) else 'resharded to'} {layout.degrees}"


def largest_mesh(state: State, usable: Sequence[str], at_most: int) -> tuple[tuple[str, ...], Layout] | None:
    """The largest mesh that these nodes fill, of `at_most` nodes, and how it is laid out; None when none is filled.

    Nodes that leave are kept where the mesh would be smaller without them than it is. Spares are taken by standing;
    racks decide between those of one.
    """
    layout = state.layout
    assert layout is not None
    staying = [name for name in usable if name not in state.leaving]
    previous = set(state.mesh)
    held = {node: election.slots_held(runs) for node, runs in state.inventory.items() if node not in previous}
    for wanted in layout.meshes:
        if wanted.nodes > min(at_most, len(usable)):
            continue
        keeps = state.leaving and wanted.nodes <= state.mesh_layout.nodes
        for names in (staying, usable) if keeps else (staying,):
            best = _best(state, names, wanted.nodes)
            mesh = placement.place(
                wanted, state.mesh_layout, state.mesh, best, held, lambda name: state.nodes[name].domain
            )
            if mesh is not None:
                return mesh, wanted
    return None


def _best(state: State, names: Sequence[str], n: int) -> Sequence[str]:
    """The first `n` of nodes that are sorted by standing, and those that are as good as the last of them."""
    order = list(STANDINGS)

    def rank(name: str) -> int:
        return -1 if state.nodes[name].state == "active" else order.index(state.standing(name))

    end = len(names)
    while end > n and rank(names[end - 1]) > rank(names[n - 1]):
        end -= 1
    return names[:end]


def _rung(state: State, mesh: tuple[str, ...], layout: Layout) -> str:
    """What a mesh is, seen from the last one."""
    if layout != state.mesh_layout:
        return "shrink" if layout.nodes < state.mesh_layout.nodes else "grow"
    if mesh != state.mesh:
        return "spare"
    return "resume" if state.parked else "replace"


def first_decision(state: State, mesh: tuple[str, ...], layout: Layout, why: str) -> Decision:
    """Where the first generation of a declared run starts.

    A resume after the loss of the whole cluster may find a step in shared memory that is no older than the newest
    checkpoint. A run that has none begins anew: that its data are still the same is known by its checkpoints only.
    """
    elected, newest = election.newest_in_ram(state, mesh, layout), state.newest_checkpoint()
    if elected is None or newest is None or elected[0].step < newest:
        return durable_decision(state, mesh, layout, why)
    why = f"{why}; the nodes' shared memory has kept step {elected[0].step} complete"
    return _ram_decision("replace", mesh, layout, elected, why)


def _ram_decision(
    rung: str, mesh: tuple[str, ...], layout: Layout, elected: tuple[Snapshot, tuple[Transfer, ...]], why: str
) -> Decision:
    snapshot, transfers = elected
    return Decision(
        rung=rung,
        mesh=mesh,
        source="ram",
        step=snapshot.step,
        snapshot_generation=snapshot.generation,
        transfers=transfers,
        layout=layout,
        reason=why,
    )


def durable_decision(state: State, mesh: tuple[str, ...], layout: Layout, why: str) -> Decision:
    """Start from the newest committed checkpoint that nobody distrusts, else from the beginning.

    A run that has checkpoints never begins again by itself: when all are damaged, or those that are left hold corrupt
    state and older ones have been deleted, people must look at them.
    """
    step = state.newest_checkpoint()
    lost = {n: c.trust for n, c in state.checkpoints.items() if c.trust in DISTRUSTED}
    if step is None and ("damaged" in lost.values() or (lost and state.retired)):
        which = ", ".join(f"{n} ({trust})" for n, trust in lost.items())
        return Decision(rung="fail", exit_code=RUN_FAILED, reason=f"{why}; no checkpoint is left to trust: {which}")
    if step is None:
        why, source = f"{why}; no checkpoint is committed", "init"
    else:
        why, source = f"{why}; checkpoint {step}", "durable"
    return Decision(rung="durable", mesh=mesh, layout=layout, source=source, step=step or 0, reason=why)


def _telling(evidence: Evidence) -> tuple[int, int]:
    return (min(_ROOTS.index(evidence.kind), _FIRST_SEEN_FROM), evidence.at)


def _what(incident: Incident) -> str:
    """What happened, in a few words: the root, and what else happened for itself."""
    cause = root(incident)
    others = [e for e in incident.evidence if e is not cause and e.kind in (*CORRUPTION, "node", "leave")]
    pieces = [
        f"{e.kind} on {e.node or 'the mesh'}" + ("" if e.slot is None else f", slot {e.slot}")
        for e in (cause, *others[:3])
    ]
    return "; ".join(pieces) + (f" and {len(others) - 3} more" if len(others) > 3 else "")


def _fate(state: State, mesh: tuple[str, ...]) -> str:
    """What becomes of nodes of the last mesh that are not to be trusted."""
    assert state.limits is not None
    gone = [node for node in state.mesh if state.nodes[node].state in IN_QUARANTINE] if state.n_in_quarantine else []
    full = state.n_in_quarantine >= state.limits.quarantined_at_most
    failed = [node for node, struck in state.strikes.items() if full and len(struck) >= state.limits.strikes]
    kept = [node for node in dict.fromkeys((*state.convicted, *failed)) if node in mesh]
    why = "since quarantine is full" if full else "for want of a spare"
    words = [f"{node} is quarantined" for node in gone] + [f"{node} stays {why}" for node in kept]
    return f" ({', '.join(words)})" if words else ""
