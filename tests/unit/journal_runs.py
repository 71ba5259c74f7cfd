"""Journals for tests: recorded histories to put into them, stores to put them on, controllers that crash."""

from __future__ import annotations

import json
import os
import random
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from core_body import Body
from core_world import Tape
from test_storage_s3 import url as s3_url  # noqa: F401  (a fixture)

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core.codec import action_to_json, state_to_json
from orchestrator.core.state import State
from orchestrator.core.supervisor import Supervisor
from orchestrator.runtime import core_snapshots, journal
from orchestrator.runtime.journal import Journal, claim_epoch
from storage.urls import list_names

Log = list[tuple[ev.Event, list[ac.Action]]]


@cache
def recorded(seed: int) -> Log:
    """What a supervisor was told and ordered in one hostile history."""
    body = Body(Tape(random.Random(seed).randbytes(300)))
    body.run()
    return body.watch.log


@pytest.fixture(name="url", params=["local", "memory", "s3"])
def url_on_every_store(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    return str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path}/run"


@pytest.fixture(name="clock")
def clock_by_hand(monkeypatch):
    """Seconds that the journal's clocks show."""
    now = SimpleNamespace(seconds=1000.0)
    fake = SimpleNamespace(monotonic=lambda: now.seconds, time_ns=lambda: int(now.seconds * 1e9))
    monkeypatch.setattr(journal, "time", fake)
    return now


def begin(url: str, tail: Path) -> Journal:
    return Journal(url, tail, claim_epoch(url, "test").epoch)


def append(to: Journal, log: Log) -> None:
    for event, actions in log:
        to.append(event, actions)


def keep(of: Journal) -> None:
    """The tail is due."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "TAIL_INTERVAL_S", 0.0)
        of.keep()


def crash(of: Journal) -> None:
    """Its process dies: nothing more is written, and its files are closed by the kernel."""
    os.close(of._tail)


def as_log(records: list[journal.Record]) -> list[tuple[ev.Event, list[Any]]]:
    return [(record.event, list(record.actions)) for record in records]


def as_json(log: Log) -> list[tuple[ev.Event, list[Any]]]:
    return [(event, [json.loads(json.dumps(action_to_json(a))) for a in actions]) for event, actions in log]


def segments(url: str) -> list[str]:
    return list_names(url, "journal")


def folded(log: Log) -> Supervisor:
    """The supervisor that has lived through this."""
    supervisor = Supervisor()
    for event, _ in log:
        supervisor.handle(event)
    return supervisor


def snapshot(of: Journal, state: State) -> str:
    """Write a snapshot after the newest record. Returns its name."""
    core_snapshots.write(of._url, of.epoch, *of.head, "test", state_to_json(state))
    return core_snapshots.names(of._url)[0]
