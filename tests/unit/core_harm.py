"""What happens to the state and to the workers of core_body.py's world beyond death: corruption, hangs, ordered faults.

Corruption is found as trainer/audit.py finds it: before the next step, by the rank whose state has changed, or by all
ranks whose replicas differ. A worker also refuses a snapshot that was taken of changed state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from core_world import SimNode

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core import placement
from orchestrator.core.events import Snapshot
from storage.manifest import Certificate

if TYPE_CHECKING:
    from core_body import Body

Moves = list[tuple[int, Callable[[], None]]]

FAULTS = ("worker-kill", "worker-stop", "flip")


class Corruption:
    """The truth about what is kept of state: which copies are bad, and which of them the supervisor was told of."""

    def __init__(self) -> None:
        self.changed: set[tuple[int, Snapshot]] = set()
        """Slots and snapshots of them that were taken after the state had changed at rest."""
        self.diverged: set[tuple[int, Snapshot]] = set()
        """Slots and snapshots of them that differ from their replicas'."""
        self.saves: set[tuple[int, int]] = set()
        """Step and generation of checkpoints that hold diverged state."""
        self.told: set[tuple[int, int]] = set()
        """Generations and steps at which the supervisor was told of corruption."""
        self.exposed: set[tuple[int, int]] = set()
        """Step and generation of checkpoints whose state was told to be corrupt."""

    def expose(self, body: Body, event: ev.WorkerFailed) -> None:
        """The supervisor is about to be told."""
        running = body.running
        if event.kind not in ("corrupt", "diverged") or running is None or running.order.generation != event.generation:
            return
        state = body.supervisor.state
        if state.generation != event.generation or state.job == "ended":  # a run that is over hears nothing
            return
        self.told.add((event.generation, event.step))
        writer = event.generation if event.step > running.order.step else running.order.snapshot_generation
        if (event.step, writer) in self.saves:
            self.exposed.add((event.step, writer))

    def refuses(self, body: Body, node: SimNode, order: ac.OpenGeneration) -> bool:
        """Whether a worker of `node` sees that what it was given is bad; what only its replicas can see goes on."""
        assert body.running is not None
        if order.source == "durable":
            assert not self.is_exposed(body, order.step), "a checkpoint that was proven corrupt is restored"
        if order.source != "ram":
            return False
        wanted = Snapshot(generation=order.snapshot_generation, step=order.step)
        restored = body.restored(node, order)
        changed = {slot for slot, held in restored.items() if any((source, wanted) in self.changed for source in held)}
        diverged = {
            slot for slot, held in restored.items() if any((source, wanted) in self.diverged for source in held)
        }
        known = any(wanted.generation == generation and wanted.step >= step for generation, step in self.told)
        assert not known, "state that was proven corrupt is restored"
        if body.mesh.dp_replicate > 1:  # else there is no replica that could tell
            body.running.diverged |= diverged
        return bool(changed)

    def is_exposed(self, body: Body, step: int) -> bool:
        return (step, body.store.get(step)) in self.exposed


def moves(body: Body) -> Moves:
    """What an ill-meaning world may do next, each with its weight."""
    found: Moves = []
    running = body.running
    if running is not None and running.phase == "training" and body.healthy():
        slots = body.mesh.slots
        found.append((6, lambda: flip(body, body.tape.below(slots))))
        if body.mesh.dp_replicate > 1 and running.step > running.order.step:
            found.append((2, lambda: diverge(body, body.tape.below(slots))))
        found.append((1, lambda: setattr(running, "stalled", True)))
        found.append((2, lambda: tell_of_slowness(body)))
        if running.step > running.order.step and len(running.order.nodes) > 1:
            found.append((10, lambda: disagree(body)))
    working = [node for node in body.nodes.values() if node.well]
    if working:
        found.append((4, lambda: hang(working[body.tape.below(len(working))])))
    present = [node.name for node in body.nodes.values() if node.alive]
    if present:
        found.append((2, lambda: tell_of_leaving(body, present[body.tape.below(len(present))])))
    found.append((2, lambda: order_fault(body)))
    return found


def notices(body: Body) -> Moves:
    """Agents and controller lose patience with what hangs."""
    found: Moves = []
    running = body.running
    for node in body.nodes.values():
        for slot in [slot for slot, told in node.hung.items() if not told and node.alive and not node.mute]:
            found.append((20, lambda node=node, slot=slot: tell_of_hang(body, node, slot)))  # type: ignore[misc]
    if running is not None and running.stalled and not running.stall_told:
        found.append((20, lambda: tell_of_stall(body)))
    return found


def flip(body: Body, slot: int) -> None:
    """The state of a slot changes at rest, before or after it was copied."""
    running = body.running
    assert running is not None
    running.flipped.add(slot)
    if body.tape.below(2):
        snapshot = Snapshot(generation=running.order.generation, step=running.step)
        body.truth.changed.add((slot, snapshot))
    if running.saving == running.step and body.tape.below(2):
        running.saving = None
        body.send("mesh", ev.CheckpointFailed(at=0, step=running.step, error="the copy is not what was computed"))


def diverge(body: Body, slot: int) -> None:
    """The newest step was computed wrongly on one replica, and whatever was made of it since is wrong, too."""
    running = body.running
    assert running is not None
    running.diverged.add(slot)
    snapshot = Snapshot(generation=running.order.generation, step=running.step)
    body.truth.diverged |= {(slot, snapshot)}
    if running.step in (running.saving, running.saved):
        body.truth.saves.add((running.step, running.order.generation))


def find(body: Body) -> None:
    """The audit before the next step stops all ranks."""
    running = body.running
    assert running is not None
    kinds = dict.fromkeys(running.flipped, "corrupt")
    for slot in running.diverged - running.flipped:
        group = (slot, *placement.replicas(body.mesh, slot))
        kinds = dict.fromkeys(group, "diverged") | kinds
    order = running.order
    for slot, kind in sorted(kinds.items(), key=lambda item: item[0] * (1 - 2 * body.tape.below(2))):
        node = body.nodes[order.nodes[slot // body.mesh.slots_per_node]]
        body.end_worker(node, slot, kind, f"state of slot {slot}")
    for node in [n for n in body.nodes.values() if n.well][: body.tape.below(3)]:
        body.end_worker(node, next(iter(node.slots)), "unclean", "the audit stopped all ranks")


def hang(node: SimNode) -> None:
    node.hung[next(iter(node.slots))] = False


def tell_of_hang(body: Body, node: SimNode, slot: int) -> None:
    node.hung[slot] = True
    step = body.running.step if body.running else 0
    body.send(
        node.name,
        ev.WorkerHung(at=0, node=node.name, generation=node.generation, slot=slot, step=step, detail="no sign of life"),
    )


def tell_of_stall(body: Body) -> None:
    running = body.running
    assert running is not None
    running.stall_told = True
    generation = running.order.generation
    body.send(
        "mesh", ev.WorkerHung(at=0, node="", generation=generation, slot=None, step=running.step, detail="no progress")
    )


def tell_of_slowness(body: Body) -> None:
    assert body.running is not None
    order = body.running.order
    node = order.nodes[body.tape.below(len(order.nodes))]
    body.send("mesh", ev.NodeSlow(at=0, node=node, generation=order.generation, detail="30% slower than its peers"))


def tell_of_leaving(body: Body, node: str) -> None:
    if node in body.supervisor.state.nodes:  # else its joining must be heard first
        body.tell(ev.NodeLeaving(at=body.at, node=node, by="the cloud"))


def disagree(body: Body) -> None:
    """An audit of the newest step: one of two nodes is wrong, and either may be the one that audits."""
    assert body.running is not None
    order, step = body.running.order, body.running.step
    first = body.tape.below(len(order.nodes))
    auditor, accused = order.nodes[first], order.nodes[first - 1]
    event = ev.AuditDisagreed(
        at=0, generation=order.generation, step=step, auditor=auditor, accused=accused, detail="gradients differ"
    )
    body.send("mesh", event)


def examine(body: Body, order: ac.ProbeNode | ac.AskThird) -> None:
    """Known work on an idle node, or an audited computation on a third, if it is still there."""
    name = order.node if isinstance(order, ac.ProbeNode) else order.judge
    if name not in body.nodes or not body.nodes[name].alive:
        return
    if isinstance(order, ac.ProbeNode):
        passed = body.tape.below(3) < 2
        return body.send(name, ev.NodeProbed(at=0, node=name, number=order.number, passed=passed, detail="known work"))
    wrong = (order.auditor, order.accused, "")[body.tape.below(3)]
    body.send(name, ev.AuditSettled(at=0, number=order.number, wrong=wrong, detail="the other two agree"))


def read_back(body: Body, order: ac.VerifyCheckpoint) -> None:
    """A node reads a checkpoint, rightly or wrongly, or comes to nothing."""
    node = body.nodes.get(order.node)
    if node is None or not node.alive or node.mute:
        return
    luck = body.tape.below(8)
    stands = order.step in body.store
    bad = order.step in body.bad_steps or not stands
    another = stands and order.generation not in (0, body.store.get(order.step))
    body.send(
        node.name,
        ev.CheckpointVerified(
            at=0,
            number=order.number,
            step=order.step,
            generation=order.generation,
            node=node.name,
            bytes=1,
            read_us=1,
            problems=("block 7",) if not another and luck < 7 and (bad or luck == 6) else (),
            unread="another stands there" if another else "no answer" if luck == 7 else "",
        ),
    )


def certify(body: Body) -> None:
    """Somebody has counted the audits since a checkpoint."""
    step = sorted(body.store)[body.tape.below(len(body.store))]
    certificate = Certificate(
        step=step,
        generation=body.store[step],
        checks=("third",),
        audits_passed=300,
        fault_rate_per_billion=10_000_000,
        confidence_per_million=950_000,
        epoch=body.epoch,
    )
    event = ev.CheckpointCertified(at=body.at, step=step, generation=body.store[step], certificate=certificate)
    body.tell(event)


def order_fault(body: Body) -> None:
    """Somebody with the run's token asks for harm, to a slot, to a node, or to neither."""
    slot = (None, body.tape.below(body.mesh.slots))[body.tape.below(2)]
    names = ["", *body.nodes]
    body.tell(
        ev.FaultRequested(
            at=body.at,
            fault=FAULTS[body.tape.below(len(FAULTS))],
            node=names[body.tape.below(len(names))] if slot is None else "",
            slot=slot,
            parameters={},
            by="a tester",
        )
    )


def inject(body: Body, order: ac.InjectFault) -> None:
    """Do it, if what it is meant for is still there, and say what was done."""
    node = body.nodes.get(order.node)
    detail = "nothing was left to hurt"
    if node is not None and node.well and node.generation == order.generation:
        slot = order.slot if order.slot in node.slots else next(iter(node.slots))
        running, detail = body.running, f"{order.fault} of slot {slot}"
        if order.fault == "worker-kill":
            body.kill_worker(node, slot, None, 9)
        elif order.fault == "worker-stop":
            node.hung[slot] = False
        elif running is not None and running.phase == "training" and body.healthy():
            flip(body, slot)
    body.send("body", ev.FaultInjected(at=0, number=order.number, detail=detail))
