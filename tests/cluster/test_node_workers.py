"""The node's workers with a real zygote and real processes: start, die, halt, restart, and leave nothing behind."""

import contextlib
import gc
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent

from orchestrator.runtime import workers as workers_module
from orchestrator.runtime.assignment import NodeAssignment, WorkerExit
from orchestrator.runtime.elastic import NodeWorkers
from orchestrator.runtime.workers import ZygoteError
from trainer import contract, pulse

HERE = Path(__file__).parent
HOST = "127.0.0.1"
# What a wait for something that takes milliseconds may take on a loaded machine before the test has failed.
WAIT_S = 30.0


def config(behaviour: str) -> contract.WorkerConfig:
    return contract.WorkerConfig(
        run="test",
        url=behaviour,
        steps=1,
        seed=0,
        deterministic=True,
        device="cpu",
        dtype="float32",
        validation_interval_steps=1,
        collective_timeout_s=10.0,
        model=contract.ModelConfig(),
        data=contract.DataConfig(),
        parallel=contract.ParallelConfig(),
        optimizer=contract.OptimizerConfig(),
        checkpoint=contract.CheckpointConfig(),
        audit=contract.AuditConfig(),
    )


class Node:
    """NodeWorkers with queues for what it reports."""

    def __init__(
        self,
        log_dir: Path,
        *,
        slots: int = 2,
        node: str = "n0",
        preload: str = "fake_worker",
        on_message: Any = None,
        warm_workers: int = 0,
        path: Path = HERE,
    ) -> None:
        self.messages: queue.Queue = queue.Queue()
        self.exits: queue.Queue[tuple[float, WorkerExit]] = queue.Queue()
        self.log = log_dir / f"{node}.log"
        self.slots = slots
        before = {child.pid for child in psutil.Process().children()}
        self.workers = NodeWorkers(
            run="test",
            node=node,
            host=HOST,
            slots=slots,
            log_dir=log_dir,
            env={"PYTHONPATH": f"{path}{os.pathsep}{HERE}", "EXTRA": "given", "OMP_NUM_THREADS": "1"},
            preload=preload,
            on_message=on_message or self.messages.put,
            on_exit=lambda exit_: self.exits.put((time.monotonic(), exit_)),
            warm_workers=warm_workers,
        )
        self.workers.start(60)
        self._known = before

    def zygote_pid(self) -> int:
        (zygote,) = self.zygotes()
        return zygote

    def zygotes(self) -> list[int]:
        zygotes = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # other tests' processes end
                if child.pid not in self._known and "zygote" in " ".join(child.cmdline()):
                    zygotes.append(child.pid)
        return zygotes

    def begin(self, generation: int, behaviour: str, *, epoch: int = 1, ranks: tuple[int, ...] | None = None) -> None:
        """A generation of this node alone."""
        ranks = ranks or tuple(range(self.slots))
        port = self.workers.open_store(generation)
        self.workers.assign(plan(generation, behaviour, epoch=epoch, ranks=ranks, port=port))

    def next_message(self) -> object:
        return self.messages.get(timeout=WAIT_S)

    def next_exit(self) -> WorkerExit:
        return self.exits.get(timeout=WAIT_S)[1]

    def pids(self) -> dict[int, int]:
        """Rank to pid, from the first message of each worker of a generation of `slots` workers that wait."""
        found = [self.next_message() for _ in range(self.slots)]
        assert all(isinstance(m, contract.Phase) and m.phase == "rendezvous" for m in found), found
        return {m.rank: m.step for m in found}


def plan(
    generation: int, behaviour: str, *, ranks: tuple[int, ...], port: int, epoch: int = 1, **other: Any
) -> NodeAssignment:
    fields = {
        "group_rank": 0,
        "group_world_size": 1,
        "world_size": len(ranks),
        "store_host": HOST,
        "restore": contract.Restore(source="init"),
        "config": config(behaviour),
        "ram_dir": "",
    }
    return NodeAssignment(epoch=epoch, generation=generation, ranks=ranks, store_port=port, **{**fields, **other})


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.workers.shutdown(20)
    assert not [c for c in psutil.Process().children() if c.pid not in node._known]


def gone(pids: list[int], within_s: float) -> bool:
    """Whether all these processes end within this time."""
    deadline = time.monotonic() + within_s
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
        finally:
            os.close(fd)
    return True


def log_lines(node: Node, pattern: str, count: int) -> list[str]:
    """The lines of the log that match, once there are so many: the log is written while we look."""
    deadline = time.monotonic() + WAIT_S
    while True:
        found = [line for line in node.log.read_text().splitlines() if re.search(pattern, line)]
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline, node.log.read_text()
        select.select([], [], [], 0.01)


def test_exit_by_signal_is_known_at_once_and_touches_no_sibling(node: Node) -> None:
    node.begin(1, "wait")
    pids = node.pids()
    assert set(pids) == {0, 1}
    os.kill(pids[1], signal.SIGKILL)
    assert node.next_exit() == WorkerExit(generation=1, rank=1, pid=pids[1], exit_code=None, signal=signal.SIGKILL)
    assert psutil.pid_exists(pids[0]) and psutil.Process(pids[0]).status() != psutil.STATUS_ZOMBIE
    node.workers.stop_gracefully()
    assert node.next_message() == contract.Finished(generation=1, rank=0, step=0, reason="stopped")
    assert node.next_exit() == WorkerExit(generation=1, rank=0, pid=pids[0], exit_code=0, signal=None)


def test_exits_are_known_by_event_and_nobody_polls(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch elastic's own loop, which looks for dead workers at intervals, is never entered."""

    def polled(*args: object, **kwargs: object) -> None:
        raise AssertionError("somebody polls the workers")

    monkeypatch.setattr(SimpleElasticAgent, "_invoke_run", polled)
    for generation in range(1, 6):
        node.begin(generation, "wait")
        pids = node.pids()
        os.kill(pids[0], signal.SIGKILL)
        assert node.next_exit().pid == pids[0]


def test_stop_reaches_a_generation_that_is_just_being_started(node: Node) -> None:
    for generation in range(1, 11):
        node.begin(generation, "wait")
        node.workers.stop_gracefully()
        found = [node.next_message() for _ in range(4)]
        assert sorted(m.rank for m in found if isinstance(m, contract.Finished)) == [0, 1]
        assert [node.next_exit().exit_code, node.next_exit().exit_code] == [0, 0]


def test_segfault_and_exit_codes_are_told_apart(node: Node) -> None:
    node.begin(1, "wait")
    pids = node.pids()
    os.kill(pids[0], signal.SIGSEGV)
    assert node.next_exit().signal == signal.SIGSEGV
    log_lines(node, r"^\[g1 r0\] Fatal Python error: Segmentation fault", 1)
    node.begin(2, "exit 7")
    assert {(e.rank, e.exit_code, e.signal) for e in (node.next_exit(), node.next_exit())} == {
        (0, 7, None),
        (1, 7, None),
    }


def test_messages_come_before_the_exit_even_of_a_killed_worker(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "READ_BYTES", 64)  # so that the exit is seen long before the last message
    node.begin(1, "last-words 2000", ranks=(0,))
    exit_ = node.next_exit()
    assert exit_.signal == signal.SIGKILL
    assert node.messages.qsize() == 2000
    assert log_lines(node, "unfinished", 1) == ["[g1 r0] unfinished line"]


def test_halt_kills_silently_and_the_next_generation_starts(node: Node) -> None:
    node.begin(1, "wait")
    first = node.pids()
    node.workers.halt(10)
    assert gone(list(first.values()), 0)
    node.begin(2, "wait")
    second = node.pids()
    assert set(second) == {0, 1} and not set(second.values()) & set(first.values())
    assert node.exits.empty()
    assert log_lines(node, r"^\[g2 r1\] rank 1 of 2 runs wait", 1)


def test_parked_workers_take_the_next_assignment_in_their_processes(node: Node) -> None:
    node.begin(1, "wait")
    first = node.pids()
    assert node.workers.halt(20, park_s=10)
    assert node.workers.halt(20, park_s=10), "the order may come again"
    assert not gone(list(first.values()), 0)
    node.begin(2, "wait")
    assert node.pids() == first
    assert node.exits.empty()
    assert log_lines(node, r"^\[g1 r1\] rank 1 parks$", 1), "what it prints before it parks is of its generation"
    assert log_lines(node, r"^\[g2 r1\] rank 1 of 2 runs wait", 1)
    os.kill(first[1], signal.SIGKILL)
    assert node.next_exit() == WorkerExit(generation=2, rank=1, pid=first[1], exit_code=None, signal=signal.SIGKILL)
    assert not node.workers.halt(20, park_s=10), "one of them is dead"
    node.begin(3, "wait")
    third = node.pids()
    assert third[0] == first[0] and third[1] != first[1]
    node.workers.halt(20)
    assert gone(list(third.values()), 0), "without the word to park all end"


def test_a_worker_that_parks_by_itself_is_kept_and_its_words_are_told(node: Node) -> None:
    node.begin(1, "park-itself")
    words = [node.next_message() for _ in range(4)]
    assert sorted(type(word).__name__ for word in words) == ["Failed", "Failed", "Parked", "Parked"]
    assert node.workers.hear_out(0)
    first = node.workers.pids()
    assert node.workers.halt(20, park_s=10)
    node.begin(2, "wait")
    assert node.pids() == first and node.exits.empty()


@pytest.mark.parametrize("how", ["stopped", "stuck"])
def test_a_worker_that_does_not_park_is_killed_and_its_place_filled(node: Node, how: str) -> None:
    """Stopped: it is not even waited for. Stuck: until the deadline."""
    node.begin(1, "wait" if how == "stopped" else "stuck")
    first = node.pids()
    if how == "stopped":
        os.kill(first[1], signal.SIGSTOP)
        assert not node.workers.halt(WAIT_S, park_s=WAIT_S / 2)
        assert gone([first[1]], 0) and not gone([first[0]], 0)
    else:
        assert not node.workers.halt(WAIT_S, park_s=0.2)
        assert gone(list(first.values()), 0)
    assert node.exits.empty()
    node.begin(2, "wait")
    second = node.pids()
    assert (second[0] == first[0]) == (how == "stopped") and second[1] != first[1]


def test_a_death_that_a_halt_overtakes_is_told(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.begin(1, "wait")
    pids = node.pids()
    os.kill(node.zygote_pid(), signal.SIGSTOP)  # it is the zygote that tells of deaths
    os.kill(pids[0], signal.SIGKILL)
    with ThreadPoolExecutor(1) as pool:
        halt = pool.submit(node.workers.halt, WAIT_S, park_s=WAIT_S / 2)
        os.kill(node.zygote_pid(), signal.SIGCONT)
        assert not halt.result(WAIT_S)
    assert node.next_exit().pid == pids[0]


def test_a_parked_worker_that_dies_is_replaced_in_silence_and_one_too_many_is_ended(node: Node) -> None:
    node.begin(1, "wait")
    first = node.pids()
    assert node.workers.halt(20, park_s=10)
    with pytest.raises(LookupError, match="rank 1 has not got its assignment yet"):
        node.workers.signal(1, signal.SIGKILL)
    os.kill(first[1], signal.SIGKILL)
    assert gone([first[1]], WAIT_S)
    node.begin(2, "wait")
    third = node.pids()
    assert third[0] == first[0] and third[1] != first[1]
    assert node.workers.halt(20, park_s=10)
    node.begin(4, "wait", ranks=(0,))
    assert node.next_message().step == third[0]
    assert gone([third[1]], WAIT_S) and node.exits.empty()


def waiting_in(node: Node) -> set[int]:
    """Process ids of the node's worker processes without an assignment, once there are two that are ready for one."""
    deadline = time.monotonic() + WAIT_S
    while True:
        children = {child.pid for child in psutil.Process(node.zygote_pid()).children()}
        spare = children - set(node.workers.pids().values())
        if spare == {w.pid for w in node.workers._workers.live() if w.parked} and len(spare) == 2:
            return spare
        assert time.monotonic() < deadline, (children, spare)
        time.sleep(0.01)


def test_a_node_that_serves_nobody_has_a_warm_worker_for_each_slot(tmp_path: Path) -> None:
    node = Node(tmp_path, warm_workers=1)
    for _ in range(2):
        node.workers.prepare_all(config("wait"))
    warm = waiting_in(node)
    os.kill(min(warm), signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while len(node.workers._workers.live()) > 1:
        assert time.monotonic() < deadline, "its end is not seen"
        time.sleep(0.01)
    node.workers.prepare_all(config("wait"))
    again = waiting_in(node)
    assert len(again & warm) == 1
    node.begin(1, "wait")
    assert set(node.pids().values()) == again
    node.workers.shutdown(20)


def test_a_warm_worker_fills_the_place_of_a_dead_one_and_is_replaced(tmp_path: Path) -> None:
    node = Node(tmp_path, warm_workers=9)  # no more than there are slots
    node.begin(1, "wait")
    first = node.pids()
    for _ in range(2):
        node.workers.replenish()
    warm = waiting_in(node)
    os.kill(first[1], signal.SIGKILL)
    assert node.next_exit().pid == first[1]
    assert not node.workers.halt(20, park_s=10)
    node.begin(2, "wait")
    second = node.pids()
    assert second[0] == first[0] and second[1] in warm
    node.workers.replenish()
    assert len(waiting_in(node) & warm) == 1
    node.workers.halt(20)
    assert len(waiting_in(node) & warm) == 1, "a halt that trusts no process ends those that have served"
    assert node.exits.empty()
    node.workers.shutdown(20)
    assert not [c for c in psutil.Process().children() if c.pid not in node._known]


def test_last_words_are_waited_for_but_not_those_of_the_dead_or_the_mute(node: Node) -> None:
    node.begin(1, "fail-when-told")
    node.pids()
    assert not node.workers.hear_out(0.1)
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(node.workers.hear_out, WAIT_S)
        node.workers.stop_gracefully()
        assert heard.result(WAIT_S)
    assert {m.rank for m in (node.messages.get_nowait(), node.messages.get_nowait())} == {0, 1}
    assert node.workers.hear_out(0)  # as often as it is asked

    node.begin(2, "wait")
    pids = node.pids()
    assert not node.workers.hear_out(0)  # what was said in another generation does not count
    os.kill(pids[0], signal.SIGKILL)
    node.next_exit()
    os.kill(pids[1], signal.SIGSTOP)
    assert not node.workers.hear_out(0.1)
    os.kill(pids[1], signal.SIGKILL)
    assert node.workers.hear_out(WAIT_S)


def test_a_newer_assignment_ends_the_generation_before_it(node: Node) -> None:
    node.begin(1, "wait")
    first = node.pids()
    node.begin(2, "wait", ranks=(0,))
    message = node.next_message()
    assert (message.generation, message.rank) == (2, 0)
    assert gone(list(first.values()), 0)
    assert node.exits.empty()


def test_stopped_worker_can_be_halted(node: Node) -> None:
    node.begin(1, "wait")
    pids = node.pids()
    os.kill(pids[0], signal.SIGSTOP)
    node.workers.halt(10)
    assert gone(list(pids.values()), 0)


def test_stale_and_impossible_assignments_are_refused(node: Node) -> None:
    port = node.workers.open_store(5)
    good = plan(5, "wait", ranks=(0, 1), port=port, epoch=2)
    node.workers.assign(good)
    node.pids()
    with pytest.raises(ValueError, match="generation 5 is stale"):
        node.workers.assign(good)
    with pytest.raises(ValueError, match="generation 4 is stale"):
        node.workers.assign(plan(4, "wait", ranks=(0, 1), port=port, epoch=2))
    with pytest.raises(ValueError, match="not newer"):
        node.workers.open_store(5)
    node.workers.halt(10)
    with pytest.raises(ValueError, match="generation 5 is stale"):
        node.workers.assign(good)
    port = node.workers.open_store(6)
    for bad, why in [
        (plan(6, "wait", ranks=(0, 1), port=port, epoch=1), "epoch 1"),
        (plan(6, "wait", ranks=(0, 1, 2), port=port, epoch=2), "2 slots"),
        (plan(6, "wait", ranks=(0, 2), port=port, epoch=2, world_size=3), "contiguous"),
        (plan(6, "wait", ranks=(), port=port, epoch=2), "contiguous"),
        (plan(6, "wait", ranks=(0, 1), port=port, epoch=2, group_rank=1), "group_rank 1"),
        (plan(7, "wait", ranks=(0, 1), port=port, epoch=2), "store was not opened"),
    ]:
        with pytest.raises(ValueError, match=why):
            node.workers.assign(bad)
    node.workers.assign(plan(6, "wait", ranks=(0, 1), port=port, epoch=2))
    assert set(node.pids()) == {0, 1}


def test_messages_of_another_generation_are_dropped(node: Node) -> None:
    node.begin(3, "stale")
    assert {m.generation for m in (node.next_message(), node.next_message())} == {3}
    assert node.messages.empty()


def test_messages_of_a_halted_generation_are_dropped(tmp_path: Path) -> None:
    received: queue.Queue[object] = queue.Queue()
    released = threading.Event()

    def slow(message: object) -> None:
        received.put(message)
        released.wait(WAIT_S)

    node = Node(tmp_path, on_message=slow)
    node.begin(1, "chatter 50", ranks=(0,))
    received.get(timeout=WAIT_S)
    with pytest.raises(TimeoutError):  # the callback holds up the thread that would see the end
        node.workers.halt(0.05)
    released.set()
    node.workers.halt(10)
    assert received.empty()
    node.workers.shutdown(20)


def test_worker_that_breaks_the_protocol_is_killed(node: Node) -> None:
    node.begin(1, "garbage", ranks=(0,))
    assert node.next_exit().signal == signal.SIGKILL
    assert log_lines(node, r"^\[g1 r0\] killed, because it sent no contract message: frame of", 1)


def test_plan_that_torch_elastic_cannot_confirm_is_reported_for_each_rank(node: Node) -> None:
    port = node.workers.open_store(1)
    node.workers.assign(plan(1, "wait", ranks=(1, 2), port=port, world_size=3))  # nobody has rank 0
    exits = [node.next_exit(), node.next_exit()]
    assert {(e.rank, e.pid, e.exit_code, e.signal) for e in exits} == {(1, 0, None, None), (2, 0, None, None)}
    assert "torch elastic gave ranks (0, 1)" in exits[0].error


def test_halt_ends_a_rendezvous_whose_peer_never_comes(node: Node) -> None:
    port = node.workers.open_store(1)
    node.workers.assign(plan(1, "wait", ranks=(0, 1), port=port, world_size=4, group_world_size=2))
    store = PrefixStore("g1", TCPStore(HOST, port, is_master=False, timeout=timedelta(seconds=WAIT_S)))
    store.wait(["torchelastic/role_info/0"])  # it waits for the other node's from now on
    node.workers.halt(10)
    node.begin(2, "wait")
    assert set(node.pids()) == {0, 1}
    assert node.exits.empty()


# A lead node's store: tells its port, and when the node with group rank 1 has come.
LEAD = """
from datetime import timedelta
from torch.distributed import PrefixStore, TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120))
print(store.port, flush=True)
PrefixStore("g1", store).wait(["torchelastic/role_info/1"])
print("come", flush=True)
input()
"""


def asked_and_silent(port: int) -> bool:
    """Whether somebody has sent words to this TCP port of this machine that nobody reads."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, queues = line.split()[1], line.split()[4]
            if int(local.rpartition(":")[2], 16) == port and int(queues.partition(":")[2], 16) > 0:
                return True
    return False


@pytest.mark.parametrize("when", ["before it is reached", "while it is waited for"])
def test_a_halt_does_not_wait_for_a_lead_node_that_stands_still(node: Node, when: str) -> None:
    """As for a machine that has vanished: its connections are there, and nothing ever comes."""
    lead = subprocess.Popen([sys.executable, "-c", LEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert lead.stdout is not None
        port = int(lead.stdout.readline())
        if when == "before it is reached":
            lead.send_signal(signal.SIGSTOP)
        other = plan(1, "wait", ranks=(2, 3), port=port, world_size=4, group_rank=1, group_world_size=2)
        node.workers.assign(other)
        if when == "while it is waited for":
            assert lead.stdout.readline() == "come\n"
            lead.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + WAIT_S
        while not asked_and_silent(port):
            assert time.monotonic() < deadline, "the node asks nothing"
            time.sleep(0.01)
        began = time.monotonic()
        node.workers.halt(10)
        assert time.monotonic() - began < 5
        node.begin(2, "wait")
        assert set(node.pids()) == {0, 1}
        assert node.exits.empty()
    finally:
        lead.kill()
        lead.communicate()


def test_output_is_tagged_complete_and_in_order_with_tracebacks(node: Node) -> None:
    node.begin(1, "shout 5000", ranks=(0,))
    node.next_message()
    lines = log_lines(node, r"^\[g1 r0\] line \d+ x{100}$", 5000)
    assert [int(line.split()[3]) for line in lines] == list(range(5000))
    node.begin(2, "raise")
    assert {node.next_exit().exit_code, node.next_exit().exit_code} == {contract.EXIT_FAILED}
    assert len(log_lines(node, r"^\[g2 r[01]\] Traceback", 2)) == 2
    assert len(log_lines(node, r"^\[g2 r[01]\] LookupError: the fake worker fails as told", 2)) == 2


def test_worker_inherits_nothing_but_its_socket_and_output(node: Node) -> None:
    node.begin(1, "inspect")
    node.pids()
    for line in log_lines(node, "descriptors", 2):
        descriptors, control = re.search(r"descriptors \[(.*)\] control (\d+)", line).groups()
        assert {int(fd) for fd in descriptors.split(",")} == {0, 1, 2, int(control)}
    assert len(log_lines(node, "session True threads 1", 2)) == 2
    environments = sorted(log_lines(node, "environment", 2))
    assert environments[1].endswith("{'RANK': '1', 'LOCAL_RANK': '1', 'WORLD_SIZE': '2', 'EXTRA': 'given'}")


def test_what_a_worker_leaves_behind_is_killed_with_it(node: Node) -> None:
    node.begin(1, "descendant", ranks=(0,))
    descendant = node.next_message().step
    assert node.next_exit().exit_code == 0
    assert gone([descendant], WAIT_S)


def test_what_workers_have_started_dies_with_the_zygote_too(node: Node) -> None:
    node.begin(1, "descendant wait", ranks=(0,))
    descendant = node.next_message().step
    os.kill(node.zygote_pid(), signal.SIGKILL)
    assert node.next_exit().signal == signal.SIGKILL
    assert gone([descendant], WAIT_S)


def test_killed_zygote_takes_its_workers_along_and_is_replaced(node: Node) -> None:
    node.begin(1, "wait")
    pids = node.pids()
    zygote = node.zygote_pid()
    os.kill(zygote, signal.SIGKILL)
    exits = {e.rank: e for e in (node.next_exit(), node.next_exit())}
    assert {rank: (e.pid, e.signal) for rank, e in exits.items()} == {r: (p, signal.SIGKILL) for r, p in pids.items()}
    node.workers.halt(10)
    node.begin(2, "wait")
    assert set(node.pids()) == {0, 1}
    assert node.zygote_pid() != zygote


def test_zygote_that_dies_again_and_again_is_given_up_for_a_while(node: Node) -> None:
    for generation in range(1, 6):
        node.begin(generation, "wait")
        node.pids()
        os.kill(node.zygote_pid(), signal.SIGKILL)
        assert {node.next_exit().signal, node.next_exit().signal} == {signal.SIGKILL}
    node.begin(6, "wait")
    exit_ = node.next_exit()
    assert exit_.pid == 0 and "5 zygotes died one after the other" in exit_.error
    assert node.next_exit().pid == 0
    deadline = time.monotonic() + WAIT_S
    while not node.zygotes():
        assert time.monotonic() < deadline, "what kept it from starting may have passed"
        select.select([], [], [], 0.05)
    node.workers.halt(10)
    node.begin(7, "wait")
    assert set(node.pids()) == {0, 1}


def test_a_halt_ends_the_wait_for_a_new_zygote(tmp_path: Path) -> None:
    """Which has to import all that workers need, for longer than a halt may take."""
    (tmp_path / "slow_worker.py").write_text(
        f"import pathlib, threading\nfrom fake_worker import main\nflag = pathlib.Path({str(tmp_path / 'slow')!r})\n"
        "if flag.exists():\n    threading.Event().wait(60)\nflag.touch()\n"
    )
    node = Node(tmp_path, preload="slow_worker", path=tmp_path)
    try:
        killed = node.zygote_pid()
        os.kill(killed, signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while node.zygotes() in ([], [killed]):  # until another imports
            assert time.monotonic() < deadline
            select.select([], [], [], 0.05)
        node.begin(1, "wait")
        while not any("_await_zygote" in pulse.standing(thread.ident or 0)[1] for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            select.select([], [], [], 0.01)
        node.workers.halt(5)
    finally:
        node.workers.shutdown(20)


def test_killed_agent_leaves_no_process(tmp_path: Path) -> None:
    agent = subprocess.Popen(
        [sys.executable, str(HERE / "doomed_agent.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert agent.stdout is not None
    pids = [int(pid) for pid in agent.stdout.readline().split()]
    assert len(pids) == 3 and all(psutil.pid_exists(pid) for pid in pids)
    for pid in (pids[0], pids[2]):
        os.kill(pid, signal.SIGSTOP)  # the kernel does it, so nobody has to be awake
    agent.kill()
    assert gone(pids, WAIT_S)
    agent.wait()
    agent.stdout.close()


def test_module_that_cannot_be_preloaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ZygoteError, match="No module named 'no_such_worker'"):
        Node(tmp_path, preload="no_such_worker")
    (tmp_path / "threaded_worker.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, name='busybody', daemon=True).start()\n"
        "def main(sock): return 0\n"
    )
    workers = NodeWorkers(
        run="test",
        node="n1",
        host=HOST,
        slots=1,
        log_dir=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        preload="threaded_worker",
        on_message=print,
        on_exit=print,
    )
    with pytest.raises(ZygoteError, match=r"(?s)one thread.*busybody"):
        workers.start(60)
    workers.shutdown(10)


def test_twenty_generations_leave_no_descriptor_and_no_thread(node: Node) -> None:
    def count() -> tuple[int, int]:
        gc.collect()  # what the tests before have left
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    node.begin(1, "wait")
    node.pids()
    node.workers.halt(10)
    before = count()
    for generation in range(2, 22):
        node.begin(generation, "wait")
        pids = node.pids()
        if generation % 3 == 0:
            os.kill(pids[0], signal.SIGKILL)
            node.next_exit()
        node.workers.halt(10)
    deadline = time.monotonic() + WAIT_S
    while any(now > then for now, then in zip(count(), before, strict=True)):
        assert time.monotonic() < deadline, (count(), before)
        time.sleep(0.1)  # a thread that has done its work is gone a moment later


def test_two_nodes_sum_over_gloo_through_each_generations_store(tmp_path: Path) -> None:
    nodes = [Node(tmp_path, slots=1, node=f"n{i}", preload="gloo_worker") for i in range(2)]
    for generation, lead, way in [(1, 0, "contract"), (2, 1, "env")]:
        port = nodes[lead].workers.open_store(generation)
        for group_rank, node in enumerate([nodes[lead], nodes[1 - lead]]):
            node.workers.assign(
                plan(
                    generation,
                    way,
                    ranks=(group_rank,),
                    port=port,
                    world_size=2,
                    group_rank=group_rank,
                    group_world_size=2,
                )
            )
        sums = {(m.rank, m.loss) for m in (nodes[0].next_message(), nodes[1].next_message())}
        assert sums == {(0, 3.0), (1, 3.0)}
        assert {nodes[0].next_exit().exit_code, nodes[1].next_exit().exit_code} == {0}
    for node in nodes:
        node.workers.shutdown(20)


def test_other_code_is_warmed_beside_the_workers_and_taken_by_the_next_generation(node: Node, tmp_path: Path) -> None:
    def env_of(folder: Path, line: str) -> dict[str, str]:
        folder.mkdir()
        (folder / "fake_worker.py").write_text(f"{line}\n{(HERE / 'fake_worker.py').read_text()}")
        return {"PYTHONPATH": os.pathsep.join([str(folder), str(HERE)]), "OMP_NUM_THREADS": "1"}

    node.begin(1, "wait")
    before = node.pids()
    with pytest.raises(ZygoteError, match="this is broken"):
        node.workers.prepare_code("broken", env_of(tmp_path / "broken", "raise LookupError('this is broken')"), 60)
    for number in range(2):
        node.workers.prepare_code(f"draft {number}", env_of(tmp_path / f"{number}", ""), 60)
    node.workers.prepare_code("new", env_of(tmp_path / "new", "print('newer code', flush=True)"), 60)
    assert len(node.zygotes()) == 3, "of updates that were refused elsewhere at most two are kept"
    assert node.workers.pids() == before and node.workers.code == ""

    node.workers.halt(20)
    node.workers.use_code("new")
    assert node.workers.code == "new" and node.exits.empty()
    node.begin(2, "wait")
    after = node.pids()
    assert not set(before.values()) & set(after.values())
    assert log_lines(node, "newer code", 1)
    # The zygote of before is gone, with all that it had.
    node.zygote_pid()
