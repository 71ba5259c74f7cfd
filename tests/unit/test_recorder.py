"""torch's flight recorder as a worker tells it: exact numbers, of this generation only, bounded; or nothing."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_pool import run_ranks
from rank_sessions import SINGLE, config_of, order_of
from torch import distributed
from torch._C import _distributed_c10d

from trainer import contract, recorder
from trainer.contract import GroupRecord, ReadRecorder, Receiver, Recorded, frame
from trainer.link import Agent

DEADLINE_S = 30.0
GENERATION = 4


kept_open: list[Listener] = []


class Listener:
    """A worker's link to its agent, as the agent sees it."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        self.ours.settimeout(DEADLINE_S)
        self.agent = Agent(theirs)
        self.ours.sendall(frame(order_of(config_of(SINGLE), generation=GENERATION, rank=7)))
        self.agent.next_work()

    def asked(self) -> Recorded:
        self.ours.sendall(frame(ReadRecorder(generation=GENERATION - 1)))  # of another generation: no answer
        self.ours.sendall(frame(ReadRecorder(generation=GENERATION)))
        receiver = Receiver(contract.FromWorker)
        while not (came := receiver.feed(self.ours.recv(65536))):
            pass
        (answer,) = came
        assert isinstance(answer, Recorded)
        return answer


def wait_for_each_other() -> list[Recorded]:
    """Rank 1 comes to the second sum of a group only when all have told where they stand."""
    rank = distributed.get_rank()
    distributed.all_reduce(torch.ones(2))
    listener = Listener()
    kept_open.append(listener)  # its worker's process ends with it, and has an answer to send first
    assert listener.asked().groups == {}, "what was done in generations before is no longer told"
    trio, pair = distributed.new_group(group_desc="the trio"), distributed.new_group([0, 1], group_desc="the pair")
    distributed.all_reduce(torch.ones(3), group=trio)
    if rank == 0:
        distributed.send(torch.ones(1), 1, group=pair)
    if rank == 1:
        distributed.recv(torch.ones(1), 0, group=pair)
        distributed.broadcast(torch.ones(5), 1, group=pair)
    else:
        sums = distributed.all_reduce(torch.ones(4, 2), group=trio, async_op=True)
    if rank == 0:
        distributed.broadcast(torch.ones(5), 1, group=pair)
    told = listener.asked()
    meet("told")
    if rank == 1:
        sums = distributed.all_reduce(torch.ones(4, 2), group=trio, async_op=True)
    assert sums is not None
    sums.wait()
    return [told, listener.asked()]


def meet(name: str) -> None:
    """Without an exchange."""
    store = distributed.distributed_c10d._get_default_store()
    store.set(f"{name} {distributed.get_rank()}", "")
    store.wait([f"{name} {rank}" for rank in range(distributed.get_world_size())])


def test_a_worker_tells_what_it_has_begun_and_what_it_waits_in(tmp_path: Path) -> None:
    results = run_ranks(wait_for_each_other, 3, tmp_path)
    for rank, (told, later) in enumerate(results):
        assert (told.generation, told.rank) == (GENERATION, 7)
        groups = {record.about: record for record in told.groups.values()}
        in_trio = (2, 2, "all_reduce of 8 elements") if rank != 1 else (1, 0, "")
        assert (groups["the trio"].begun, groups["the trio"].waits, groups["the trio"].kind) == in_trio
        assert (0 < groups["the trio"].waited_us < DEADLINE_S * 1_000_000) == (rank != 1)
        # A message between two counts for none of the group's collectives.
        assert {about: record.begun for about, record in groups.items() if about != "the trio"} == (
            {"the pair": 1} if rank < 2 else {}
        )
        assert {key.partition(" ")[0] for key in told.groups} == {"gloo"}
        newest = json.loads(told.entries)[-1]
        assert newest["profiling_name"] == ("gloo:broadcast" if rank < 2 else "gloo:all_reduce")
        assert max(record.begun for record in later.groups.values()) == 2


# One entry in the form of torch's FlightRecorder 2.10, as NCCL's recorder writes it.
ENTRY = {
    "collective_seq_id": 1,
    "duration_ms": 0.25,
    "input_dtypes": ["BFloat16"],
    "input_sizes": [[4, 2]],
    "is_p2p": False,
    "op_id": 1,
    "output_dtypes": ["BFloat16"],
    "output_sizes": [[4, 2]],
    "p2p_seq_id": 0,
    "pg_id": 3,
    "process_group": ["0", "default_pg"],
    "profiling_name": "nccl:all_reduce",
    "record_id": 0,
    "retired": True,
    "state": "completed",
    "thread_id": "1",
    "thread_name": "python",
    "time_created_ns": 1,
    "time_discovered_completed_ns": 3,
    "time_discovered_started_ns": 2,
    "timeout_ms": 600_000,
}


def dump(*entries: dict[str, Any]) -> bytes:
    document: dict[str, Any] = {"version": "2.10", "comm_lib_version": "2.28.9", "nccl_comm_state": {}}
    document |= {"pg_status": {}, "pg_config": {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1]"}}}
    entries = tuple(ENTRY | {"record_id": n} | entry for n, entry in enumerate(entries))
    return json.dumps(document | ({"entries": entries} if entries else {})).encode()


def test_the_recorder_of_nccl_is_read_alike() -> None:
    shard = {"process_group": ["5", "mesh_dp_shard"], "pg_id": 4, "profiling_name": "nccl:_all_gather_base"}
    pending = {"retired": False, "state": "scheduled"}
    stage = {"is_p2p": True, "profiling_name": "nccl:recv 0<-1", "p2p_seq_id": 6} | pending
    groups, entries = recorder.summarized(
        dump(
            {"pg_id": 2, "collective_seq_id": 90},  # of a generation before
            {},
            {"collective_seq_id": 2, "retired": False},  # complete, though nobody has taken note of it
            shard | {"collective_seq_id": 7},
            shard | {"collective_seq_id": 8} | pending | {"state": "started"},
            shard | {"collective_seq_id": 9} | pending,
            stage | {"process_group": ["0", "default_pg"], "time_created_ns": 2_000_000},
            {"collective_seq_id": 3, "time_created_ns": 3_000_000} | pending,
            stage | {"process_group": ["6", "mesh_pp"], "time_created_ns": 4_000_000},
            {"process_group": ["7", "mesh_tp"]},
        ),
        after=2,
        now_ns=9_000_000,
    )
    assert groups == {
        "nccl 0": GroupRecord(about="default_pg", begun=3, waits=3, kind="all_reduce of 8 elements", waited_us=7_000),
        "nccl 5": GroupRecord(about="mesh_dp_shard", begun=9, waits=8, kind="_all_gather_base", waited_us=8_999),
        "nccl 6": GroupRecord(about="mesh_pp", begun=0, waited_us=5_000),
        "nccl 7": GroupRecord(about="mesh_tp", begun=1),
    }
    assert [json.loads(entry)["record_id"] for entry in entries] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert recorder.summarized(dump(), after=2, now_ns=9_000_000) == ({}, [])


def test_what_nccl_carried_out_together_counts_as_complete_once_later_things_are() -> None:
    """torch never marks the members of a `batch_isend_irecv`, only what stands for all of them."""
    member = {"is_p2p": True, "retired": False, "state": "scheduled", "profiling_name": "nccl:send 0->1"}
    whole = {"is_p2p": True, "profiling_name": "nccl:coalesced"}

    def waited_us(*entries: dict[str, Any]) -> int:
        groups, _ = recorder.summarized(dump(*entries), after=2, now_ns=9_000_000)
        return groups["nccl 0"].waited_us

    assert waited_us(member, member, whole) == 0
    assert waited_us(member, whole, member | {"time_created_ns": 4_000_000}) == 5_000
    gloo = {"retired": False, "state": "scheduled", "profiling_name": "gloo:all_reduce"}
    groups, _ = recorder.summarized(dump(gloo, gloo | {"retired": True}), after=2, now_ns=9_000_000)
    assert groups["gloo 0"].waited_us == 8_999, "two threads carry out gloo's"


def reading(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    reader: Callable[..., bytes] = lambda collectives, active: text  # noqa: E731
    monkeypatch.setattr(_distributed_c10d, "_dump_fr_trace_json", reader)


def test_what_is_told_is_bounded_and_the_newest_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = [[3, 5, 7]] * 20
    many = [{"process_group": [f"{n}", "d" * 500], "input_sizes": wide, "collective_seq_id": n} for n in range(1, 400)]
    reading(monkeypatch, dump(*many))
    groups, text = recorder.read({})
    assert next(iter(groups)) == "nccl 399" and len(groups) == recorder.GROUPS_MAX
    assert {len(record.about) for record in groups.values()} == {recorder.WORDS_CHARS}
    assert 0.9 * recorder.ENTRIES_CHARS < len(text) <= recorder.ENTRIES_CHARS
    kept = [entry["collective_seq_id"] for entry in json.loads(text)]
    assert kept == list(range(400 - len(kept), 400))


def test_without_a_recorder_or_in_another_form_nothing_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for text in (b"", b"[]", b'{"entries": [{}]}', b'{"entries": [[]]}', dump({"pg_id": "3"}), b"\xff"):
        reading(monkeypatch, text)
        assert recorder.read(recorder.newest_groups()) == ({}, "")
        assert "the flight recorder cannot be read" in capfd.readouterr().err
    reading(monkeypatch, dump())  # switched off
    assert recorder.read(recorder.newest_groups()) == ({}, "")
    monkeypatch.delattr(_distributed_c10d, "_dump_fr_trace_json")
    assert recorder.read(recorder.newest_groups()) == ({}, "")
    assert capfd.readouterr().err == ""
