"""Checkpoints are read back while a run trains: a whole one is verified, and a flipped bit found before a restore."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cluster
from herd import await_nothing_left, final_digest, job, kill_worker, spec_of, train

from orchestrator.core.actions import OpenGeneration
from orchestrator.core.codec import action_from_json
from orchestrator.observe.status import Status
from orchestrator.runtime import journal
from storage import statements
from storage.commits import read_commit

pytestmark = pytest.mark.timeout(300)
SAVE_EVERY = 4
OLDER, FLIPPED, STEPS = SAVE_EVERY, 2 * SAVE_EVERY, 4 * SAVE_EVERY
SCRUB = {"interval_steps": SAVE_EVERY, "scrub_hours": 0.0005}
NO_MEMORY = {"snapshot_interval_steps": 1000}
"""So that a worker's death is recovered from the store."""


def test_a_flipped_bit_in_a_verified_checkpoint_is_found_and_not_restored(cluster: Cluster, tmp_path: Path) -> None:
    length = {"steps": STEPS, "validation_interval_steps": STEPS}
    spec = spec_of(job("scrubbed", tmp_path, run=length, checkpoint=SCRUB | NO_MEMORY))
    slow = cluster.faults / "scrubbed.py"
    slow.write_text(f"import time; time.sleep(4.0 if session.state.step >= {FLIPPED} else 0.1)")
    flipped: list[str] = []
    found: list[Status] = []

    def chaos(status: Status) -> None:
        trust = {checkpoint.step: checkpoint for checkpoint in status.trust}
        if not flipped and all(step in trust and trust[step].trust == "verified" for step in (OLDER, FLIPPED)):
            assert status.newest_verified == status.newest_checkpoint == FLIPPED
            flipped.append(read_commit(spec.run.url, FLIPPED).parts[0].data)
            flip_a_bit(Path(spec.run.url, flipped[0]))
        said = statements.read(spec.run.url)
        stated = [s.trust for s in said.get(FLIPPED, ())] == ["verified", "damaged"]
        if flipped and not found and stated and trust[FLIPPED].trust == "damaged":
            assert status.verifications["whole"] >= 2
            found.append(status)
            kill_worker(spec, status, rank=2)
            slow.unlink()

    status, told = train(spec, chaos)
    assert status.exit_code == 0, told
    (damaged,) = [checkpoint for checkpoint in found[0].trust if checkpoint.step == FLIPPED]
    assert (damaged.trust, found[0].newest_checkpoint) == ("damaged", OLDER), told
    assert flipped[0] in damaged.why and len(damaged.by.split(" and ")) == 2, damaged
    assert any(f"checkpoint of step {FLIPPED} is damaged" in line for line in told)
    assert found[0].verifications["damaged"] == 1 and not found[0].strikes
    assert [(i.cause, i.rung) for i in status.incidents] == [("signal", "durable")]
    opened = [action for record in journal.read(spec.run.url) for action in record.actions]
    orders = [action_from_json(action) for action in opened if action["type"] == "OpenGeneration"]
    assert [(order.source, order.step) for order in orders if isinstance(order, OpenGeneration)] == [
        ("init", 0),
        ("durable", OLDER),
    ]
    # Its step was done again, and the checkpoint with it.
    assert read_commit(spec.run.url, FLIPPED).generation == 2
    final_digest(spec)
    await_nothing_left(tmp_path / "ram")


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)
