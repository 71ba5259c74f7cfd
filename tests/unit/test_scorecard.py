"""The scorecard over hand-made journals: what was found is charged to the fault that it is of, and to no other."""

from __future__ import annotations

import io
import json
import os
import re
from typing import Any

import pytest
from core_watch import LIMITS
from core_world import layout
from rich.console import Console

from orchestrator.chaos import node, scorecard
from orchestrator.chaos.orders import OF_A_NODE, PAIRS, SCENARIOS, Order, resolve
from orchestrator.chaos.scorecard import Score, score
from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core.events import Snapshot
from orchestrator.core.state import State
from orchestrator.core.supervisor import Supervisor
from orchestrator.runtime.journal import Record

S = 1_000_000
"""A second in microseconds."""
HERE = "somebody@here"


class Journal:
    """Four ranks on nodes a and b, c is a spare; a step each second from second 10 on. Times are seconds."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.core = Supervisor()
        self.tell(
            0,
            ev.RunDeclared(
                at=0,
                run="r",
                layout=layout(2, 2, 1, 1, 2, 1),
                limits=LIMITS,
                total_steps=100,
                capabilities=("ram", "peer"),
            ),
        )
        self.tell(0, ev.EpochBegan(at=0, epoch=1, version="1"))
        self.tell(0, ev.CheckpointsFound(at=0, steps=()))
        for name in "abc":
            self.tell(1, ev.NodeJoined(at=0, node=name, domain="", snapshots={}))
        self.ready(10)
        self.steps(11, 1)

    def tell(self, at: float, event: ev.Event) -> list[ac.Action]:
        object.__setattr__(event, "at", round(at * S))
        actions = self.core.handle(event)
        self.records.append(Record(seq=len(self.records) + 1, epoch=1, event=event, actions=()))
        return actions

    @property
    def state(self) -> State:
        return self.core.state

    def ready(self, at: float) -> None:
        s = self.state
        self.tell(
            at,
            ev.GenerationReady(
                at=0, generation=s.generation, step=s.restored_step, rendezvous_us=1, build_us=1, restore_us=1
            ),
        )

    def steps(self, at: float, last: int) -> None:
        s = self.state
        self.tell(
            at,
            ev.StepsDone(
                at=0,
                generation=s.generation,
                first=s.step + 1,
                last=last,
                data_wait_us=0,
                checkpoint_us=0,
                validation_us=0,
                tokens=1,
                loss_millionths=(),
            ),
        )

    def order(
        self, at: float, fault: str, slot: int | None = None, node: str = "", truth: str = "done", **parameters: str
    ) -> None:
        self.tell(at, ev.FaultRequested(at=0, fault=fault, node=node, slot=slot, parameters=parameters, by=HERE))
        if truth:
            self.tell(at + 0.01, ev.FaultInjected(at=0, number=len(self.state.faults), detail=truth))

    def exited(self, at: float, node: str, slot: int, signal: int = 9) -> None:
        self.tell(
            at,
            ev.WorkerExited(
                at=0, node=node, generation=self.state.generation, slot=slot, exit_code=None, signal=signal
            ),
        )

    def failed(self, at: float, node: str, slot: int, kind: str, error: str = "E: e") -> None:
        s = self.state
        self.tell(
            at,
            ev.WorkerFailed(at=0, node=node, generation=s.generation, slot=slot, step=s.step, kind=kind, error=error),
        )

    def recover(self, at: float, steps_at: float, step: int) -> None:
        """Every node that is still awaited reports snapshots of `step`; then the next generation trains."""
        s = self.state
        for name in list(s.awaiting):
            place = s.mesh.index(name)
            held = {slot: (Snapshot(generation=s.generation, step=step),) for slot in (2 * place, 2 * place + 1)}
            self.tell(at, ev.NodeHalted(at=0, node=name, generation=s.generation, snapshots=held))
        self.ready(at + 0.5)
        self.steps(steps_at, s.step + 1)

    def only(self, identical: bool | None = None) -> Score:
        (found,) = score(self.records, identical)
        return found


def test_a_killed_worker_that_was_replaced_is_all_right() -> None:
    j = Journal()
    j.order(12, "worker-kill", slot=2, truth="SIGKILL for process 7")
    j.exited(12.5, "b", 2)
    j.recover(13, 15, step=1)
    s = j.only()
    assert (s.node, s.rank, s.by, s.truth) == ("b", 2, HERE, "SIGKILL for process 7")
    assert (s.incident, s.detected_after_s, s.right_node, s.right_rank, s.rung) == (1, 0.5, True, True, "replace")
    assert (s.recovered, s.recovery_s, s.steps_lost, s.identical) == (True, 2.5, 0, None)
    assert s.passed and s.settled
    assert j.only(identical=True).passed
    assert not j.only(identical=False).passed


def test_steps_that_are_not_in_memory_are_lost() -> None:
    j = Journal()
    j.steps(14, 4)
    j.order(14, "worker-kill", slot=0)
    j.exited(14.5, "a", 0)
    j.recover(15, 17, step=1)
    assert (j.only().steps_lost, j.only().step) == (3, 4)


def test_until_the_next_step_nothing_has_recovered() -> None:
    j = Journal()
    j.order(12, "worker-kill", slot=2)
    assert not j.only().detected and not j.only().settled
    j.exited(12.5, "b", 2)
    assert j.only().detected and not j.only().settled and not j.only().passed


@pytest.mark.parametrize(
    ("wrong_node", "wrong_slot", "right_node", "right_rank"), [("b", 3, True, False), ("a", 0, False, False)]
)
def test_somebody_else_who_is_blamed_is_a_wrong_verdict(wrong_node, wrong_slot, right_node, right_rank) -> None:
    j = Journal()
    j.order(12, "worker-stop", slot=2)
    j.tell(20, ev.WorkerHung(at=0, node=wrong_node, generation=1, slot=wrong_slot, step=1, detail="silent"))
    j.recover(21, 23, step=1)
    s = j.only()
    assert (s.detected, s.right_node, s.right_rank, s.recovered, s.passed) == (
        True,
        right_node,
        right_rank,
        True,
        False,
    )


def test_consequences_on_peers_are_not_the_verdict() -> None:
    j = Journal()
    j.order(12, "worker-kill", slot=2)
    j.failed(12.1, "a", 0, "collective", "Connection closed by peer")
    j.exited(12.2, "b", 2)
    j.recover(13, 15, step=1)
    assert (j.only().right_rank, j.only().found) == (True, "signal: signal 9")


def test_corruption_that_only_showed_as_a_divergence_is_nobodys() -> None:
    j = Journal()
    j.order(12, "flip", slot=2, truth="bit in model/x")
    j.tell(12.5, ev.WorkerFailed(at=0, node="a", generation=1, slot=0, step=1, kind="diverged", error="E: differ"))
    assert j.only().detected and not j.only().right_node


def test_two_at_once_are_found_in_one_incident() -> None:
    j = Journal()
    j.order(12, "worker-kill", slot=1)
    j.order(12.1, "worker-kill", slot=3)
    j.exited(12.5, "b", 3)
    j.exited(12.6, "a", 1)
    j.recover(13, 15, step=1)
    first, second = score(j.records)
    assert (first.incident, second.incident, first.passed, second.passed) == (1, 1, True, True)
    assert (first.detected_after_s, second.detected_after_s) == (0.6, 0.4)


def test_a_worker_whose_node_died_at_once_is_found_with_its_node() -> None:
    j = Journal()
    j.order(12, "worker-kill", slot=2)
    j.order(12.1, "node-kill", node="b")
    j.tell(12.5, ev.NodeLost(at=0, node="b", cause="its connection closed"))
    j.recover(13, 15, step=1)
    worker, node_ = score(j.records)
    assert (worker.right_node, worker.right_rank, worker.passed) == (True, None, True)
    assert (node_.right_node, node_.right_rank, node_.rung, node_.passed) == (True, None, "durable", True)


def test_a_worker_that_is_hurt_again_before_it_falls_dies_once() -> None:
    j = Journal()
    j.order(12, "worker-exception", slot=2)
    j.order(12.2, "worker-exception", slot=2)
    j.order(12.3, "worker-exception", slot=3)
    j.failed(12.5, "b", 2, "exception", "InjectedFault: fault 2, as ordered")
    j.recover(13, 15, step=1)
    first, second, other = score(j.records)
    assert (first.incident, first.passed, second.incident, second.passed) == (1, True, 1, True)
    assert (first.detected_after_s, second.detected_after_s) == (0.5, 0.3)
    assert not other.detected, "another worker's death is not its own"


def test_one_piece_of_evidence_explains_one_fault() -> None:
    j = Journal()
    j.order(12, "worker-kill", slot=2)
    j.exited(12.5, "b", 2)
    j.recover(13, 15, step=1)
    j.order(16, "worker-stop", slot=1)
    first, second = score(j.records)
    assert first.passed and not second.detected
    j.order(17, "worker-kill", slot=2)
    j.exited(17.5, "b", 2)
    assert [s.incident for s in score(j.records)] == [1, None, 2]


def test_what_strikes_a_later_generation_is_not_of_it() -> None:
    j = Journal()
    j.order(12, "flip", slot=2, truth="bit in model/x, after step 1")
    j.order(12.1, "flip", slot=0, truth="bit in model/x, after step 1")
    j.failed(12.5, "a", 0, "corrupt")
    j.recover(13, 15, step=1)
    j.order(16, "flip", slot=2, truth="bit in model/x, after step 2")
    j.failed(16.5, "b", 2, "corrupt")
    assert [s.incident for s in score(j.records)] == [None, 1, 2]


def test_what_was_there_before_the_order_is_not_of_it() -> None:
    j = Journal()
    j.exited(12, "b", 2)
    j.recover(13, 15, step=1)
    j.order(16, "worker-kill", slot=2)
    assert not j.only().detected


def test_a_spares_death_needs_no_recovery() -> None:
    j = Journal()
    j.order(12, "node-kill", node="c")
    j.tell(12.7, ev.NodeLost(at=0, node="c", cause="its connection closed"))
    s = j.only()
    assert (s.incident, s.detected_after_s, s.right_node, s.rung, s.recovered) == (None, 0.7, True, "", True)
    assert s.passed


def test_a_controllers_death_is_found_by_the_next_epoch() -> None:
    j = Journal()
    j.order(12, "controller-kill", truth="")
    assert not j.only().detected
    j.tell(14, ev.EpochBegan(at=0, epoch=2, version="1"))
    j.tell(14.1, ev.FaultInjected(at=0, number=1, detail="epoch 2 took over"))
    assert (j.only().detected_after_s, j.only().recovered) == (2, False)
    j.steps(15, 4)
    assert (j.only().recovery_s, j.only().right_node, j.only().passed) == (1, None, True)


def test_a_full_disk_is_found_by_a_failed_save_and_over_with_the_next_good_one() -> None:
    j = Journal()
    j.order(12, "disk-full")
    j.tell(13, ev.CheckpointFailed(at=0, step=1, error="No space left on device"))
    assert (j.only().detected, j.only().recovered) == (True, False)
    j.steps(16, 2)
    j.tell(17, ev.CheckpointWritten(at=0, generation=1, step=2, bytes=1, write_us=1))
    j.tell(18, ev.CheckpointCommitted(at=0, step=2, epoch=1, generation=1))
    assert (j.only().detected_after_s, j.only().recovery_s, j.only().passed) == (1, 5, True)


def test_the_second_kill_counts_from_when_it_was_done_in_the_recovery() -> None:
    j = Journal()
    j.order(12, "worker-kill", slot=1)
    j.order(12.1, "worker-kill", slot=2, truth="", during="recovery")
    j.exited(12.5, "a", 1)
    s = j.state
    for name in list(s.awaiting):
        held = {slot: (Snapshot(generation=1, step=1),) for slot in range(4)}
        j.tell(13, ev.NodeHalted(at=0, node=name, generation=1, snapshots=held))
    j.tell(14, ev.FaultInjected(at=0, number=2, detail="SIGKILL, while generation 2 began"))
    j.exited(14.2, "b", 2)
    j.recover(15, 17, step=1)
    first, second = score(j.records)
    assert (first.passed, second.passed, second.incident, second.rank) == (True, True, 1, 2)
    assert second.detected_after_s == pytest.approx(0.2)


def test_a_slow_worker_is_found_when_it_is_named() -> None:
    j = Journal()
    j.order(12, "worker-slow", slot=2, seconds="30")
    assert not j.only().detected
    j.tell(18, ev.NodeSlow(at=0, node="a", generation=1, detail="rank 0 computes twice as long", slot=0))
    assert (j.only().detected, j.only().right_node) == (True, False)
    j.tell(20, ev.NodeSlow(at=0, node="b", generation=1, detail="rank 2 computes 3 times as long", slot=2))
    assert not j.only().settled
    j.steps(21, 2)
    found = j.only()
    assert found.found.startswith("slow, after 1 others: rank 2 ")
    assert (found.detected_after_s, found.right_node, found.right_rank, found.passed) == (8, True, True, True)


@pytest.mark.parametrize("fault", ["clock-jump", "net-cut"])
def test_training_that_goes_on_through_it_is_all_that_there_is_to_find(fault) -> None:
    j = Journal()
    j.order(12, fault, node="b", seconds="10")
    j.steps(13, 2)
    assert not j.only().settled
    j.steps(23, 3)
    assert (j.only().harmless, j.only().detected, j.only().passed) == (True, False, True)


def test_a_node_that_was_cut_off_and_is_lost_was_found() -> None:
    j = Journal()
    j.order(12, "net-cut", node="b", seconds="60")
    j.tell(18, ev.NodeLost(at=0, node="b", cause="its peers do not reach it"))
    j.recover(19, 21, step=1)
    assert (j.only().harmless, j.only().detected_after_s, j.only().right_node, j.only().passed) == (
        False,
        6,
        True,
        True,
    )


@pytest.mark.parametrize(("truth", "passed"), [("not done: LookupError: no worker", False), ("no effect: zeros", True)])
def test_what_was_not_done_and_what_has_no_effect_is_called_so(truth, passed) -> None:
    j = Journal()
    j.order(12, "flip", slot=2, truth=truth)
    s = j.only()
    assert (s.settled, s.detected, s.passed) == (True, False, passed)


def test_a_false_alarm_over_no_effect_does_not_pass() -> None:
    j = Journal()
    j.order(12, "flip", slot=2, truth="no effect: zeros")
    j.failed(12.5, "b", 2, "corrupt")
    j.recover(13, 15, step=1)
    assert not j.only().passed


def test_it_prints_every_fault_and_can_be_read_as_json() -> None:
    j = Journal()
    j.order(12, "worker-kill", slot=2, truth="SIGKILL for process 7")
    j.exited(12.5, "b", 2)
    j.recover(13, 15, step=1)
    j.order(16, "controller-kill", truth="")
    page = io.StringIO()
    scorecard.show(Console(file=page, width=160), score(j.records), "something is missing")
    for words in ("worker-kill", "b r2", "replace", "in 0.50 s", "SIGKILL for process 7", "controller-kill", "NO"):
        assert words in page.getvalue()
    assert "something is missing" in page.getvalue()
    documents: list[dict[str, Any]] = json.loads(json.dumps([s.document() for s in score(j.records)]))
    assert [d["passed"] for d in documents] == [True, False]


# --- orders ---


def test_every_scenario_can_be_ordered_with_what_the_seed_leaves_open() -> None:
    state = Journal().state
    for scenario in SCENARIOS:
        drawn = {
            json.dumps([f.slot, f.node])
            for n in range(64)
            for f in resolve(Order(scenario=scenario, seed=n), state, 4, HERE)[:1]
        }
        of_none = ("controller-kill", "head-kill", "disk-full", "store-outage")
        want = 1 if scenario in of_none else 2 if scenario in OF_A_NODE else 4
        assert len(drawn) == want, (scenario, drawn)
    for scenario in PAIRS:
        for n in range(64):
            first, second = resolve(Order(scenario=scenario, seed=n), state, 4, HERE)
            assert first.slot is not None and second.slot is not None
            assert first.slot // 2 != second.slot // 2, "they are on different nodes"
    again = [resolve(Order(scenario="flip", seed=3), state, 4, HERE) for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ({"scenario": "worker-hug"}, "there is no scenario 'worker-hug': choose one of worker-kill"),
        ({"scenario": "worker-kill", "rank": 4}, "--rank 4: the run has ranks 0 to 3"),
        ({"scenario": "worker-kill", "rank": -1}, "--rank -1"),
        ({"scenario": "worker-kill", "node": "a"}, "--node is for node-kill"),
        ({"scenario": "node-kill", "rank": 1}, "--rank is for"),
        ({"scenario": "node-kill", "node": "z"}, "--node z: the run's nodes are a, b, c"),
        ({"scenario": "flip", "tensors": "grad"}, "--tensors grad: choose one of any"),
        ({"scenario": "flip", "pattern": "byte"}, "--pattern byte"),
        ({"scenario": "disk-full", "seconds": 0}, "--seconds 0"),
        ({"scenario": "disk-full", "seconds": 1e9}, "--seconds 1e+09"),
        ({"scenario": "store-outage", "seconds": -1}, "--seconds -1"),
        ({"scenario": "clock-jump", "seconds": 0}, "--seconds 0: a leap is not 0"),
        ({"scenario": "clock-jump", "process": "driver"}, "--process driver: choose one of worker, agent"),
        ({"scenario": "clock-jump", "process": "controller", "rank": 1}, "--rank is for"),
        ({"scenario": "net-cut", "cut_from": "nobody"}, "--from nobody: choose one of controller"),
        ({"scenario": "net-cut", "direction": "up"}, "--direction up"),
        ({"scenario": "net-delay", "delay_ms": 0}, "--delay-ms 0"),
        ({"scenario": "net-cut", "node": "z"}, "--node z: the run's nodes are"),
    ],
)
def test_what_cannot_be_is_refused_by_name(order, words) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        resolve(Order(**order), Journal().state, 4, HERE)


def test_a_run_that_is_over_is_not_hurt() -> None:
    j = Journal()
    j.tell(12, ev.StopRequested(at=0, by="x", graceful=False))
    with pytest.raises(ValueError, match="the run is ended"):
        resolve(Order(scenario="worker-kill"), j.state, 4, HERE)


def test_a_node_that_is_lost_is_not_killed_again() -> None:
    j = Journal()
    j.tell(12, ev.NodeLost(at=0, node="c", cause="gone"))
    with pytest.raises(ValueError, match="the run's nodes are a, b"):
        resolve(Order(scenario="node-kill", node="c"), j.state, 4, HERE)


def test_the_order_is_on_record_before_the_harm_and_names_who_is_hurt() -> None:
    j = Journal()
    (asked,) = resolve(Order(scenario="worker-kill", rank=3), j.state, 4, HERE)
    (order,) = j.tell(12, asked)
    assert order == ac.InjectFault(
        number=1, generation=1, fault="worker-kill", node="b", slot=3, parameters=asked.parameters
    )
    assert isinstance(order, ac.DECISIONS)


def test_a_process_that_is_not_under_a_raylet_is_not_a_node() -> None:
    with pytest.raises(LookupError, match="is no raylet"):
        node.family_of(os.getpid())
