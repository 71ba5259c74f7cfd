"""What golden traces are too coarse for: the ledger's exact figures, the cost of an incident, and floods of reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from core_watch import LIMITS

from orchestrator.core import events as ev
from orchestrator.core.actions import EndRun, HaltGeneration, OpenGeneration, SetTimer, VerifyCheckpoint
from orchestrator.core.events import Layout, Snapshot
from orchestrator.core.recovery import EVIDENCE_KEPT
from orchestrator.core.supervisor import Supervisor
from storage.peer import MAX_TRANSFERS


def started(
    nodes: int, slots_per_node: int, spares: int, capabilities: tuple[str, ...] = ("ram", "peer")
) -> Supervisor:
    """A run whose first generation trains, one second after its declaration; its nodes are n0, n1, ..."""
    core = Supervisor()
    mesh = Layout(
        pp=1,
        dp_replicate=nodes,
        dp_shard=slots_per_node,
        tp=1,
        slots_per_node=slots_per_node,
        nodes=nodes,
        spares=spares,
    )
    core.handle(
        ev.RunDeclared(at=0, run="run", layout=mesh, limits=LIMITS, total_steps=1000, capabilities=capabilities)
    )
    core.handle(ev.EpochBegan(at=0, epoch=1, version="test"))
    for number in range(nodes + spares):
        core.handle(ev.NodeJoined(at=400_000, node=f"n{number}", domain="", snapshots={}))
    core.handle(ready(1_000_000, generation=1, step=0, forked=nodes * slots_per_node))
    return core


def ready(at: int, generation: int, step: int, **processes: int) -> ev.GenerationReady:
    return ev.GenerationReady(
        at=at, generation=generation, step=step, rendezvous_us=0, build_us=0, restore_us=0, processes=processes
    )


def steps(at: int, generation: int, first: int, last: int, data_wait_us: int = 0) -> ev.StepsDone:
    return ev.StepsDone(
        at=at,
        generation=generation,
        first=first,
        last=last,
        data_wait_us=data_wait_us,
        checkpoint_us=0,
        validation_us=0,
        tokens=0,
        loss_millionths=(),
    )


def test_each_label_of_an_incident_has_its_exact_time() -> None:
    """Two nodes and a spare; in seconds: 0.4 joined, 1 ready, 11 ten steps, 13 a node dies, 14 its peer has halted,
    20 ready again at step 6, 25 the lost steps are done again, 26 one new step."""
    core = started(nodes=2, slots_per_node=1, spares=1)
    core.handle(steps(11_000_000, generation=1, first=1, last=10, data_wait_us=1_000_000))
    core.handle(ev.NodeLost(at=13_000_000, node="n0", cause="connection closed"))
    held = {1: (Snapshot(generation=1, step=6),)}
    (opened, _) = core.handle(ev.NodeHalted(at=14_000_000, node="n1", generation=1, snapshots=held))
    assert isinstance(opened, OpenGeneration) and opened.step == 6
    core.handle(ready(20_000_000, generation=2, step=6, parked=1, warm=1))
    core.handle(steps(25_000_000, generation=2, first=7, last=10))
    core.handle(steps(26_000_000, generation=2, first=11, last=11))

    tenths = {label: us // 100_000 for label, us in core.state.ledger.totals.items() if us}
    assert tenths == {
        "provisioning": 3 * 4,
        "start_up": 2 * 6,
        "idle_spare": 6 + 120 + 10,  # to the halt's end, when the spare becomes one of the mesh
        "productive": 2 * 90 + 2 * 10,
        "data_wait": 2 * 10,
        "detection": 2 * 20,
        "recovery": 10 + 2 * 60,  # one node while the peer halts, two while they start
        "degraded_capacity": 10 + 120,  # the lost node's place
        "recomputed": 2 * 50,
    }
    (incident,) = core.state.incidents
    assert incident.cost_us // 100_000 == 40 + 130 + 100, "detection, recovery and recomputation, each once"
    assert (incident.cause, incident.culprit, incident.rungs, incident.steps_lost) == ("node", "n0", ["spare"], 4)
    assert incident.processes == {"parked": 1, "warm": 1}
    assert core.state.ledger.processes == {"parked": 1, "warm": 1, "forked": 2}


def test_the_ledger_that_was_told_with_the_verdict_stays_until_a_resume() -> None:
    """Whatever a controller that died after it, and came back, still hears."""
    core = started(nodes=2, slots_per_node=1, spares=0)
    core.handle(steps(11_000_000, generation=1, first=1, last=10))
    core.handle(ev.StopRequested(at=12_000_000, by="somebody", graceful=False))
    told = dict(core.state.ledger.totals)
    assert core.state.job == "ended" and core.state.ledger.owed == 2 * 12_000_000
    (again,) = core.handle(ev.EpochBegan(at=15_000_000, epoch=2, version="test"))
    assert isinstance(again, EndRun)
    core.handle(ev.CheckpointsFound(at=16_000_000, steps=()))
    assert core.state.ledger.totals == told

    assert core.state.layout is not None
    core.handle(
        ev.RunDeclared(
            at=20_000_000, run="run", layout=core.state.layout, limits=LIMITS, total_steps=1000, capabilities=()
        )
    )
    assert core.state.ledger.totals == told | {"paused": 2 * 8_000_000}


def test_a_recovery_that_fails_after_it_was_ready_is_charged_once() -> None:
    core = started(nodes=2, slots_per_node=1, spares=0)
    core.handle(steps(11_000_000, generation=1, first=1, last=10))
    for generation, at in ((1, 12_000_000), (2, 22_000_000)):
        core.handle(ev.WorkerExited(at=at, node="n0", generation=generation, slot=0, exit_code=None, signal=9))
        for node, slot in (("n0", 0), ("n1", 1)):
            held = {slot: (Snapshot(generation=1, step=10),)}
            core.handle(ev.NodeHalted(at=at + 1_000_000, node=node, generation=generation, snapshots=held))
        core.handle(ready(at + 5_000_000, generation=generation + 1, step=core.state.step))
    core.handle(steps(40_000_000, generation=3, first=1, last=11))
    totals = core.state.ledger.totals
    (incident,) = core.state.incidents
    assert incident.rungs == ["replace", "durable"]
    assert incident.cost_us == totals["detection"] + totals["recovery"] + totals["recomputed"]


def test_ten_thousand_broken_connections_do_not_hide_the_one_cause() -> None:
    core = started(nodes=1250, slots_per_node=8, spares=0)
    core.handle(steps(11_000_000, generation=1, first=1, last=10))
    at = 12_000_000
    for slot in range(10_000):
        if slot == 7000:
            continue
        node = f"n{slot // 8}"
        core.handle(
            ev.WorkerFailed(
                at=at + slot,
                node=node,
                generation=1,
                slot=slot,
                step=10,
                kind="collective",
                error="Connection closed by peer",
            )
        )
        core.handle(ev.WorkerExited(at=at + slot, node=node, generation=1, slot=slot, exit_code=1, signal=None))
    core.handle(ev.WorkerExited(at=at + 10_000, node="n875", generation=1, slot=7000, exit_code=None, signal=11))
    assert core.state.incident is not None
    assert len(core.state.incident.evidence) == EVIDENCE_KEPT
    for number in range(1250):
        held = {slot: (Snapshot(generation=1, step=10),) for slot in range(8 * number, 8 * number + 8)}
        core.handle(ev.NodeHalted(at=at + 20_000, node=f"n{number}", generation=1, snapshots=held))
    assert core.state.job == "starting" and core.state.incident is not None
    assert (core.state.incident.cause, core.state.incident.culprit) == ("signal", "n875")


def test_the_copies_after_the_loss_of_a_rack_come_from_all_the_nodes_that_are_left() -> None:
    """Twenty nodes, each with a whole replica; nine go at once, and nine spares want eight slots each."""
    core = started(nodes=20, slots_per_node=8, spares=9)
    core.handle(steps(11_000_000, generation=1, first=1, last=10))
    for number in range(9):
        core.handle(ev.NodeLost(at=12_000_000, node=f"n{number}", cause="no power"))
    actions = []
    for number in range(9, 20):
        held = {slot: (Snapshot(generation=1, step=10),) for slot in range(8 * number, 8 * number + 8)}
        actions = core.handle(ev.NodeHalted(at=13_000_000, node=f"n{number}", generation=1, snapshots=held))
    (opened,) = (action for action in actions if isinstance(action, OpenGeneration))
    assert (opened.source, opened.step, len(opened.transfers)) == ("ram", 10, 72)
    assert {t.slot for t in opened.transfers} == set(range(72))
    assert all(t.from_slot % 8 == t.slot % 8 for t in opened.transfers), "of another shard"
    given = Counter(t.from_node for t in opened.transfers)
    assert max(given.values()) == 8 and len(given) == 9 and sum(given.values()) > MAX_TRANSFERS


def test_who_verifies_as_fast_as_a_slow_store_lets_it_is_waited_for() -> None:
    """840 GB, at 25 MB a second, where 500 were ordered."""
    core = started(nodes=1, slots_per_node=1, spares=0, capabilities=("verify",))
    core.handle(steps(11_000_000, generation=1, first=1, last=10))
    size = 840_000_000_000
    core.handle(ev.CheckpointWritten(at=12_000_000, generation=1, step=10, bytes=size, write_us=1))
    order, timer = core.handle(ev.CheckpointCommitted(at=13_000_000, step=10, epoch=1, generation=1))
    assert isinstance(order, VerifyCheckpoint) and isinstance(timer, SetTimer)
    assert order.bytes_per_s == 500_000_000
    assert timer.at == 13_000_000 + LIMITS.start_deadline_us + size // 25


def test_of_ten_thousand_findings_the_earliest_step_decides_what_is_restored() -> None:
    """Ranks are up to a step apart, and more tell of corruption than an incident keeps evidence."""
    core = started(nodes=1250, slots_per_node=8, spares=1)
    core.handle(steps(11_000_000, generation=1, first=1, last=10))
    for slot in range(10_000):
        core.handle(
            ev.WorkerFailed(
                at=12_000_000 + slot,
                node=f"n{slot // 8}",
                generation=1,
                slot=slot,
                step=9 if slot == 9_999 else 10,
                kind="diverged",
                error="replicas differ",
            )
        )
    for number in range(1250):
        held = {
            slot: tuple(Snapshot(generation=1, step=step) for step in (8, 9, 10))
            for slot in range(8 * number, 8 * number + 8)
        }
        core.handle(ev.NodeHalted(at=13_000_000, node=f"n{number}", generation=1, snapshots=held))
    assert core.state.order is not None
    assert (core.state.order.source, core.state.order.step) == ("ram", 8)


def slow(core: Supervisor, **fields: bool) -> ev.NodeSlow:
    return ev.NodeSlow(at=3_000_000, node="n1", generation=core.state.generation, detail="30% slower", slot=1, **fields)


def test_a_slow_node_is_swapped_only_if_that_is_wanted_and_it_is_the_node() -> None:
    swaps = started(nodes=2, slots_per_node=1, spares=1)
    assert any(isinstance(action, HaltGeneration) for action in swaps.handle(slow(swaps)))
    for workload, swaps_slow in ((True, True), (False, False)):
        core = started(nodes=2, slots_per_node=1, spares=1)
        core.state.limits = replace(LIMITS, swaps_slow=swaps_slow)
        assert core.handle(slow(core, workload=workload)) == []
        assert (core.state.slow, core.state.strikes) == ({"n1": core.state.generation}, {})
