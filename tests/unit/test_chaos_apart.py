"""Harm that lasts: it is done by a process of its own, which ends in time; and what no machine may do is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from orchestrator.chaos import hog, late, net
from orchestrator.core.actions import InjectFault
from storage import faults, urls


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]) as process:
        yield process
        process.kill()


def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one core there is no other to be taken")
def test_a_slowed_process_has_one_core_for_a_while_and_all_of_them_back(victim: subprocess.Popen[bytes]) -> None:
    cores = os.sched_getaffinity(victim.pid)
    told = hog.slow(victim.pid, 1.0)
    assert told.startswith(f"process {victim.pid} shares core ")
    assert len(os.sched_getaffinity(victim.pid)) == 1
    until(lambda: os.sched_getaffinity(victim.pid) == cores)


def test_nobody_is_slowed_twice_at_a_time(victim: subprocess.Popen[bytes]) -> None:
    """The second would take the one core for all that the process had."""
    hog.slow(victim.pid, 600.0)  # it ends with the victim
    with pytest.raises(RuntimeError, match="did not begin"):
        hog.slow(victim.pid, 600.0)


def test_nobody_is_slowed_that_is_not_there(victim: subprocess.Popen[bytes]) -> None:
    victim.kill()
    victim.wait()
    with pytest.raises(RuntimeError, match="did not begin"):
        hog.slow(victim.pid, 1.0)


def test_a_store_refuses_for_as_long_as_ordered_and_no_other_does(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(faults.time, "monotonic", lambda: now[0])
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    faults.refuse_store(run, 5.0)
    for name in (run, f"{run}/journal"):
        with pytest.raises(ConnectionRefusedError, match="as chaos has ordered"):
            urls.write_exclusive(name, "record", b"x")
    assert urls.write_exclusive(other, "record", b"x")
    now[0] = 105.1
    assert urls.write_exclusive(run, "record", b"x")


def order(**parameters: str) -> InjectFault:
    given = {"from": "peers", "direction": "both", "seconds": "1", "controller": "10.0.0.1|7", "peers": "10.0.0.2"}
    return InjectFault(number=1, generation=1, fault="net-cut", node="a", slot=None, parameters=given | parameters)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"peers": "10.0.0.3,10.0.0.2"}, "addresses of their own"),
        ({"peers": ""}, "addresses of their own"),
        ({"from": "controller", "controller": "10.0.0.3|7"}, "addresses of their own"),
        ({"peers": "10.0.0.1"}, "a peer is on the head node"),
    ],
)
def test_nodes_that_share_an_address_are_not_cut_off(parameters: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        net.cut(order(**parameters), "10.0.0.3")


def test_who_may_not_change_the_network_is_told_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(PermissionError, match="CAP_NET_ADMIN"):
        net.cut(order(), "10.0.0.3")
    monkeypatch.setattr(late.os, "open", forbidden)
    with pytest.raises(PermissionError, match="CAP_NET_ADMIN"):
        late.delay("127.0.0.1", 5, 1.0)


def forbidden(*args: object) -> int:
    raise PermissionError(13, "no")


def test_only_a_node_with_that_address_can_be_late() -> None:
    with pytest.raises(ValueError, match=r"192\.0\.2\.1 is no IPv4 address of this node"):
        late.delay("192.0.2.1", 5, 1.0)
