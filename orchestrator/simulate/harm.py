"""What goes wrong in a simulation: when failures strike, whom, what the truth is then, and who learns of it when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.simulate.profile import Cause, Effect

if TYPE_CHECKING:
    from orchestrator.simulate.body import Node, Simulation

DAY_US = 86_400_000_000
STORE_PATIENCE_US = 30_000_000
"""Workers try so long to read a checkpoint that the store does not give; see docs/design.md."""


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


# --- failures that are drawn ---


def await_failure(sim: Simulation) -> None:
    """Failures strike machines at a constant rate each; one that finds nothing to hit does nothing."""
    causes, weights = sim.scenario.failures.causes, sim.weights
    total = sum(weights)
    if total == 0:
        return
    node_days_us = round(sim.scenario.failures.exposure.node_days * 1_000_000) * DAY_US
    mean_us = node_days_us // (total * len(sim.machines))

    def strike() -> None:
        cause = causes[sim.chance.pick(weights)]
        _strike_machines(sim, cause)
        for _ in range(cause.burst - 1):
            later_us = sim.chance.below(1 + round(cause.burst_s * 1_000_000))
            sim.later(later_us, lambda: _strike_machines(sim, cause))
        await_failure(sim)

    sim.later(sim.chance.exponential(mean_us), strike)


def _strike_machines(sim: Simulation, cause: Cause) -> None:
    if cause.effect == "store":
        sim.strikes[cause.name] += 1
        sim.store_away_until = max(sim.store_away_until, sim.now + round(cause.repair_s * 1_000_000))
        return
    index = sim.chance.below(len(sim.machines))
    first = index // cause.machines * cause.machines
    hit = False
    for machine in sim.machines[first : first + cause.machines]:
        node = machine.node
        if node is not None and node.alive and _hit(sim, node, cause):
            machine.repair_us = max(machine.repair_us, round(cause.repair_s * 1_000_000))
            hit = True
    sim.strikes[cause.name] += hit


def _hit(sim: Simulation, node: Node, cause: Cause) -> bool:
    """A cause strikes a live node now; whether there was anything to hit."""
    detection = getattr(sim.scenario.profile.detection, cause.sign)
    assert detection is not None, f"the profile does not say when one sees {cause.name}"
    match cause.effect:
        case "slow":
            return _slow_down(sim, node, cause, detection.us)
        case "leave":
            return _leave(sim, node, cause)
    return hit(sim, node, cause.effect, detection.us, cause.name)


# --- failures that a journal tells ---


def known_strikes(sim: Simulation, order: ac.OpenGeneration) -> tuple[Strike, ...]:
    return sim.scenario.strikes.get(order.generation, ())


def strike_while_starting(sim: Simulation, order: ac.OpenGeneration) -> None:
    for strike in known_strikes(sim, order):
        if strike.step is None:
            sim.later(strike.after_us, lambda s=strike: _strike(sim, order, s))  # type: ignore[misc]


def strike_at(sim: Simulation, order: ac.OpenGeneration, step: int) -> None:
    for strike in known_strikes(sim, order):
        if strike.step is not None and (strike.step == step or strike.step < order.step == step):
            after_us = min(strike.after_us, sim.step_us - 1)
            sim.later(after_us, lambda s=strike: _strike(sim, order, s))  # type: ignore[misc]


def _strike(sim: Simulation, order: ac.OpenGeneration, strike: Strike) -> None:
    node = sim.a_spare() if strike.place is None else sim.nodes.get(order.nodes[strike.place])
    if sim.running is None or sim.running.order is not order or node is None or not node.alive:
        return
    node.machine.repair_us = strike.repair_us
    hit(sim, node, strike.effect, strike.detect_us, "told by the journal")


# --- what a failure does ---


def hit(sim: Simulation, node: Node, effect: Effect, detect_us: int, name: str) -> bool:
    """Something fails on a live node now; whether there was anything to hit."""
    if effect == "node":
        kill(sim, node, detect_us, name)
        return True
    if effect == "leave":
        sim.later(detect_us, lambda: sim.send(node.name, ev.NodeLeaving(at=sim.now, node=node.name, by=name)))
        return True
    running = sim.running
    if running is None or not sim.fills_a_slot(node):
        return False
    generation, slot = running.order.generation, sim.slot_of(node)
    if effect == "corrupt":
        if running.phase != "training":
            return False
        step = sim.steps_done()
        sim.later(detect_us, lambda: _await_audit(sim, node, generation, slot, step, name))
        return True
    if effect in ("worker", "hang"):
        running.broken[node.name] = None
    sim.stick()
    sim.later(detect_us, lambda: sim.send(node.name, _words(sim, effect, name, node, generation, slot)))
    return True


def kill(sim: Simulation, node: Node, detect_us: int, name: str) -> None:
    node.alive = False
    sim.dead[node.name] = None
    if sim.running is not None and node.name in sim.running.places:
        sim.running.lost = True
    if sim.fills_a_slot(node):
        sim.stick()
    sim.later(detect_us, lambda: sim.send(node.name, ev.NodeLost(at=sim.now, node=node.name, cause=name)))


def _words(sim: Simulation, effect: Effect, name: str, node: Node, generation: int, slot: int) -> ev.Event:
    assert sim.running is not None
    step = sim.running.step
    if effect == "hang":
        return ev.WorkerHung(at=sim.now, node=node.name, generation=generation, slot=slot, step=step, detail=name)
    kind = "collective" if effect == "collective" else "exception"
    which = f"{name}, event {sim.events}"  # no two are the same: else it were the program's
    return ev.WorkerFailed(
        at=sim.now, node=node.name, generation=generation, slot=slot, step=step, kind=kind, error=which
    )


def refuse_the_store(sim: Simulation, order: ac.OpenGeneration) -> None:
    """A generation cannot read its checkpoint."""
    _refuse(sim, order, "store", f"the store does not answer, event {sim.events}")


def refuse_the_checkpoint(sim: Simulation, order: ac.OpenGeneration) -> None:
    """A generation finds the checkpoint damaged that it was to restore."""
    _refuse(sim, order, "state", "a block does not match its digest")


def _refuse(sim: Simulation, order: ac.OpenGeneration, kind: str, error: str) -> None:
    sim.stick()
    node, step = order.nodes[0], order.step
    failed = ev.WorkerFailed(
        at=sim.now, node=node, generation=order.generation, slot=0, step=step, kind=kind, error=error
    )
    sim.send(node, failed)


def read_back(sim: Simulation, order: ac.VerifyCheckpoint) -> None:
    """A node reads a checkpoint, if it lives so long; when a generation starts there meanwhile, not to its end."""
    back, node, running = sim.scenario.profile.read_back, sim.nodes.get(order.node), sim.running
    assert back is not None, "a body that does not read back was asked to"

    def tell() -> None:
        if node is None or not node.alive:
            return
        started = sim.running is not running and sim.fills_a_slot(node)
        unread = "a generation started" if started else ""
        if sim.store_away_until > sim.now:
            unread = "the store does not answer"
        if not unread and sim.happens(back.rotten):
            sim.rotten[order.step] = None
        bad = not unread and (order.step in sim.rotten or sim.happens(back.misread))
        answer = ev.CheckpointVerified(
            at=sim.now,
            number=order.number,
            step=order.step,
            generation=order.generation,
            node=node.name,
            bytes=0,
            read_us=back.read.us,
            problems=("a block does not match its digest",) if bad else (),
            unread=unread,
        )
        sim.send(node.name, answer)

    sim.later(back.read.us, tell)


def _slow_down(sim: Simulation, node: Node, cause: Cause, detect_us: int) -> bool:
    """The mesh is as slow as its slowest node, until somebody has noticed and swapped it."""
    running = sim.running
    if running is None or running.phase != "training" or not sim.fills_a_slot(node) or node.slowdown:
        return False
    node.slowdown, node.noticed_after_us = round(cause.slowdown * 1_000_000), detect_us
    sim.slow[node.name] = node
    sim.change_pace()
    notice_slowness(sim, node)
    return True


def notice_slowness(sim: Simulation, node: Node) -> None:
    """By its step times in this generation, against its peers'; again and again, as long as it is so."""
    running = sim.running
    assert running is not None

    def notice() -> None:
        if sim.running is running and running.phase == "training" and node.alive:
            generation = running.order.generation
            slow = ev.NodeSlow(at=sim.now, node=node.name, generation=generation, detail="slower than its peers")
            sim.send("mesh", slow)
            sim.later(max(1, node.noticed_after_us), notice)

    sim.later(node.noticed_after_us, notice)


def _leave(sim: Simulation, node: Node, cause: Cause) -> bool:
    """Somebody says beforehand that the machine will be taken, and takes it when its time has come."""
    sim.send(node.name, ev.NodeLeaving(at=sim.now, node=node.name, by=cause.name))

    def take() -> None:
        if node.alive and sim.nodes.get(node.name) is node:
            kill(sim, node, sim.scenario.profile.detection.exit.us, cause.name)

    sim.later(round(cause.notice_s * 1_000_000), take)
    return True


def _await_audit(sim: Simulation, node: Node, generation: int, slot: int, step: int, name: str) -> None:
    """The audit comes before the optimizer, so at the end of the step under way, and that step is not taken."""
    running = sim.running
    if running is None or running.order.generation != generation or running.phase != "training":
        return
    end = running.since + (sim.steps_done() + 1 - running.step) * running.step_us - 1
    sim.at(max(sim.now, end), lambda: _audit(sim, node, generation, slot, step, name))


def _audit(sim: Simulation, node: Node, generation: int, slot: int, step: int, name: str) -> None:
    """State has been wrong since `step`, and is found to be, if its generation has lived to see it."""
    running = sim.running
    if running is None or running.order.generation != generation or running.phase != "training":
        return
    running.broken[node.name] = None
    sim.stick()
    found = ev.WorkerFailed(
        at=sim.now, node=node.name, generation=generation, slot=slot, step=step, kind="corrupt", error=name
    )
    sim.send(node.name, found)
