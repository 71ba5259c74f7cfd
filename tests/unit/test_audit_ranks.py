"""The audit of state in real training: what is found, by whom, and before what."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_sessions import (
    HYBRID_3D,
    SINGLE,
    config_of,
    digests,
    local,
    make_session,
    of_type,
    on_ranks,
    train_and_record,
)

from storage.manifest import ManifestError
from storage.ram import ram_copy, snapshot_path
from storage.snapshots import RamTier, tensors_of
from storage.state import TrainState
from trainer import contract
from trainer.audit import PeerStateError, StateAudit, StateCorruptError, StateDivergedError, judge
from trainer.contract import AuditConfig, ParallelConfig, WorkerConfig
from trainer.loop import Session, train, train_step

HSDP = ParallelConfig(dp_replicate=2, dp_shard=2)
REPLICAS_3 = ParallelConfig(dp_replicate=3)
OFF = AuditConfig(at_rest=False, replicas=False)
AUDIT_ERRORS = (StateCorruptError, StateDivergedError, PeerStateError)
NOTHING = ("", "")


@dataclass(frozen=True)
class Flip:
    """Bits to change on one rank: `mask` is drawn anew for each of `count` neighbours, or they become zero."""

    rank: int
    tensors: str
    count: int
    zero: bool
    seed: int

    def hurt(self, session: Session) -> tuple[str, Callable[[], None]]:
        """Do it; the tensor's name, and how to undo it."""
        chance = np.random.default_rng(self.seed)
        names = [n for n, t in session.state.tensors.items() if n.startswith(self.tensors) and local(t).numel() >= 16]
        name = names[int(chance.integers(len(names)))]
        flat = local(session.state.tensors[name]).view(-1)
        cells = flat.cpu().numpy().view(np.uint32)
        candidates = np.flatnonzero(cells[: cells.size - self.count + 1]) if self.zero else cells.size - self.count + 1
        place = slice(first := int(chance.choice(candidates)), first + self.count)
        before = cells[place].copy()
        masks = np.uint32(1) << chance.integers(0, 32, self.count, dtype=np.uint32)
        after = np.zeros_like(before) if self.zero else before ^ masks

        def put(values: Any) -> None:
            flat[place] = torch.from_numpy(values).view(torch.float32)

        put(after)
        return name, lambda: put(before)


def flips(world_size: int, count: int) -> list[Flip]:
    chance = np.random.default_rng(count)
    kinds = itertools.cycle(itertools.product(("model/", "exp_avg/", "exp_avg_sq/"), ("bit", "run", "zero")))
    return [
        Flip(
            rank=int(chance.integers(world_size)),
            tensors=tensors,
            count=1 if pattern == "bit" else int(chance.integers(2, 17)),
            zero=pattern == "zero",
            seed=number,
        )
        for number, (tensors, pattern) in zip(range(count), kinds, strict=False)
    ]


# --- flips at rest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parallel", "count"), [(SINGLE, 45), (HSDP, 36), (HYBRID_3D, 9)], ids=["1", "hsdp", "3d"])
def test_flips_are_found_before_the_optimizer_and_the_rank_is_named(parallel: ParallelConfig, count: int) -> None:
    todo = flips(parallel.world_size, count)
    for rank, outcomes in enumerate(on_ranks(train_through_flips, config_of(parallel, n_layers=2), todo)):
        for flip, (name, kind, text, unchanged) in zip(todo, outcomes, strict=True):
            assert unchanged
            if rank == flip.rank:
                assert kind == "StateCorruptError"
                assert re.fullmatch(
                    rf"state changed at rest: {re.escape(name)} from (\w{{32}}) to (?!\1)\w{{32}}", text
                )
            else:
                assert kind == "PeerStateError"
                assert "corrupt on 1, diverged on 0" in text


def train_through_flips(config: WorkerConfig, todo: list[Flip]) -> list[tuple[str, str, str, bool]]:
    """Steps with a flip before each that is refused and then undone; the flip's tensor, the error, and whether the
    refused step has left the state as it was."""
    session = make_session(config, [])
    train_step(session)
    outcomes = []
    for number, flip in enumerate(todo):
        name, undo = flip.hurt(session) if session.rank == flip.rank else ("", lambda: None)
        before = {name: local(tensor).clone() for name, tensor in session.state.tensors.items()}
        kind, text = outcome(session)
        unchanged = all(torch.equal(bits(local(t)), bits(before[n])) for n, t in session.state.tensors.items())
        outcomes.append((name, kind, text, unchanged and session.state.step == 1 + number // 9))
        undo()
        session.optimizer.zero_grad()
        if number % 9 == 8:
            assert outcome(session) == NOTHING
    return outcomes


def outcome(session: Session) -> tuple[str, str]:
    """What a step raises: type and text."""
    try:
        train_step(session)
    except AUDIT_ERRORS as error:
        return type(error).__name__, str(error)
    return NOTHING


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A float's bits, which can be compared also when they mean not a number."""
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize("tensors", ["model/", "exp_avg/", "exp_avg_sq/"])
def test_switched_off_the_same_flip_goes_through(tensors: str) -> None:
    flip = Flip(rank=0, tensors=tensors, count=16, zero=True, seed=1)
    (((kind, _), _),) = on_ranks(train_with_flip, config_of(), flip)
    ((unaudited, harmed),) = on_ranks(train_with_flip, config_of(audit=OFF), flip)
    ((_, clean),) = on_ranks(train_with_flip, config_of(audit=OFF), None)
    assert kind == "StateCorruptError"
    assert unaudited == NOTHING
    assert harmed != clean


def train_with_flip(config: WorkerConfig, flip: Flip | None) -> tuple[tuple[str, str], dict[str, str]]:
    """Two steps, a flip and a third; what that one raised, and the state at the end."""
    session = make_session(config, [])
    train_step(session)
    train_step(session)
    if flip is not None:
        flip.hurt(session)
    return outcome(session), digests(session.state)


@pytest.mark.parametrize("audit", [AuditConfig(), AuditConfig(replicas=False)], ids=["both", "at rest"])
def test_a_flip_after_the_last_step_is_found_before_the_state_is_saved(audit: AuditConfig) -> None:
    config = config_of(ParallelConfig(dp_replicate=2), steps=3, audit=audit)
    (corrupt, saved), (peer, _) = on_ranks(train_with_flip_at_the_end, config)
    assert (corrupt, peer) == ("StateCorruptError", "PeerStateError")
    assert saved == {}


def train_with_flip_at_the_end(config: WorkerConfig) -> tuple[str, dict[int, Any]]:
    session = make_session(config, [])

    def flip_at_the_end(message: Any) -> None:
        if isinstance(message, contract.StepDone) and message.step == config.steps and session.rank == 0:
            Flip(rank=0, tensors="exp_avg/", count=1, zero=False, seed=4).hurt(session)

    session.emit = flip_at_the_end
    with pytest.raises(AUDIT_ERRORS) as caught:
        train(session, saved_step=-1)
    return caught.typename, session.checkpointer.saved  # type: ignore[attr-defined]


# --- replicas --------------------------------------------------------------------------------------------------------


def test_two_replicas_that_differ_have_both_diverged() -> None:
    """Ranks (replica, shard) are 0 (0, 0), 1 (0, 1), 2 (1, 0) and 3 (1, 1); 3 is perturbed, so 1 and 3 differ."""
    kinds, texts = zip(*on_ranks(perturb, config_of(HSDP, n_layers=2), [3]), strict=True)
    assert kinds == ("PeerStateError", "StateDivergedError", "PeerStateError", "StateDivergedError")
    assert texts[1] == texts[3]
    assert re.fullmatch(r"replicas differ: rank 1 (\w{32}), rank 3 (?!\1)\w{32}; in exp_avg/norm.weight", texts[1])
    assert "corrupt on 0, diverged on 2" in texts[0]


@pytest.mark.parametrize("audit", [AuditConfig(), AuditConfig(at_rest=False)], ids=["both", "replicas"])
def test_of_three_replicas_the_odd_one_is_corrupt(audit: AuditConfig) -> None:
    config = config_of(REPLICAS_3, n_layers=2, audit=audit, data=contract.DataConfig(seq_len=32, global_batch=6))
    kinds, texts = zip(*on_ranks(perturb, config, [1]), strict=True)
    assert kinds == ("PeerStateError", "StateCorruptError", "PeerStateError")
    text = r"replicas differ: rank 0 (\w{32}), rank 1 (?!\1)\w{32}, rank 2 \1; in exp_avg/norm.weight"
    assert re.fullmatch(text, texts[1])


def test_of_three_replicas_that_all_differ_none_is_convicted() -> None:
    config = config_of(REPLICAS_3, n_layers=2, data=contract.DataConfig(seq_len=32, global_batch=6))
    assert [kind for kind, _ in on_ranks(perturb, config, [0, 1])] == ["StateDivergedError"] * 3


def test_replicas_can_be_left_out() -> None:
    config = config_of(ParallelConfig(dp_replicate=2), n_layers=2, audit=AuditConfig(replicas=False))
    assert on_ranks(perturb, config, [1]) == [NOTHING, NOTHING]


def perturb(config: WorkerConfig, ranks: list[int]) -> tuple[str, str]:
    """A step after which some ranks hold another state, each its own, as wrong optimizer arithmetic would leave it."""
    session = make_session(config, [])
    train_step(session)
    if session.rank in ranks:
        with torch.no_grad():
            local(session.state.tensors["exp_avg/norm.weight"])[0] += 1 + session.rank
        session.audit.record()
    return outcome(session)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_verdict_is_that_of_a_strict_majority_of_those_at_rest(count: int) -> None:
    for digests_ in itertools.product(["a", "b", "c", None], repeat=count):
        voters = [digest for digest in digests_ if digest is not None]
        majority = [digest for digest in set(voters) if voters.count(digest) > len(voters) / 2]
        for own, digest in enumerate(digests_):
            if digest is None:
                expected = "corrupt"
            elif len(set(voters)) == 1 or digest in majority:
                expected = None
            else:
                expected = "corrupt" if majority else "diverged"
            assert judge(digests_, own) == expected, (digests_, own)


# --- clean runs, and what else depends on the record -----------------------------------------------------------------


def test_a_clean_run_has_no_finding_and_the_same_bits_as_one_without_audit() -> None:
    config = config_of(HSDP, n_layers=2, steps=24, validation_interval_steps=9)
    audited = on_ranks(train_and_record, config)
    for (messages, saved), (_, expected) in zip(
        audited, on_ranks(train_and_record, replace(config, audit=OFF)), strict=True
    ):
        assert messages[-1].reason == "completed"
        assert len(of_type(messages, contract.StepDone)) == 24
        assert 24 in saved
        assert saved == expected


def test_the_state_is_at_rest_except_between_check_and_record() -> None:
    on_ranks(watch_the_lock, config_of())


def watch_the_lock(config: WorkerConfig) -> None:
    session = make_session(config, [])
    seen: dict[str, bool] = {}
    session.stage.module.register_forward_hook(lambda *_: seen.update(forward=session.at_rest.locked()))
    session.optimizer.register_step_pre_hook(lambda *_: seen.update(optimizer=session.at_rest.locked()))
    train_step(session)
    assert seen == {"forward": False, "optimizer": True}
    assert not session.at_rest.locked()
    Flip(rank=0, tensors="model/", count=1, zero=False, seed=0).hurt(session)
    with pytest.raises(StateCorruptError):
        train_step(session)
    assert not session.at_rest.locked()


def test_copies_are_held_against_the_record_of_their_step() -> None:
    on_ranks(compare_copies, config_of())


def compare_copies(config: WorkerConfig) -> None:
    session = make_session(config, [])
    train_step(session)
    changed_in = session.audit.expectation()
    copies = {name: local(tensor).clone() for name, tensor in session.state.tensors.items()}
    train_step(session)
    assert changed_in(copies) == []
    names = ["model/norm.weight", "exp_avg_sq/layers.1.attention.wq.weight"]
    for name in names:
        copies[name].view(torch.int32).view(-1)[17] ^= 1 << 30
    assert sorted(changed_in(copies)) == sorted(names)
    assert changed_in({names[0]: copies[names[0]]}) == names[:1]
    current = {name: local(tensor) for name, tensor in session.state.tensors.items()}
    assert sorted(changed_in(current)) == sorted(current)
    assert session.audit.expectation()(current) == []
    with pytest.raises(KeyError):
        changed_in({"model/unknown": copies[names[0]]})


def test_without_the_check_at_rest_nothing_is_expected_of_copies() -> None:
    on_ranks(expect_nothing, config_of(audit=AuditConfig(at_rest=False)))


def expect_nothing(config: WorkerConfig) -> None:
    session = make_session(config, [])
    assert session.audit.expectation()({"model/norm.weight": torch.zeros(3)}) == []


@pytest.mark.parametrize(("flipped", "at_rest"), [(True, True), (False, True), (True, False)])
def test_a_snapshot_that_was_made_of_changed_state_is_refused(tmp_path: Path, flipped: bool, at_rest: bool) -> None:
    config = contract.AuditConfig(at_rest=at_rest)
    tensors = {"model/a": torch.randn(7, 5), "exp_avg/a": torch.randn(35)}
    writer = StateAudit(tensors, config, None)
    writer.record()
    if flipped:
        tensors["exp_avg/a"].view(torch.int32)[3] ^= 1 << 9
    tier = RamTier(str(tmp_path), "run", "node", 0)
    tier.snapshot(TrainState(1, tensors, writer.mark()))
    tier.wait()

    restored = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    reader = StateAudit(restored, config, None)
    mark = reader.blank_mark()
    tier.restore(1, TrainState(0, restored, mark))
    path = snapshot_path(str(tmp_path), "run", "node", 0, 1)
    assert path is not None
    others = StateAudit({"model/b": torch.zeros(2)}, config, None)  # a rank of a mesh that cuts the state otherwise
    if flipped and at_rest:
        with pytest.raises(ManifestError, match="exp_avg/a"):
            reader.record_restored(mark)
        with pytest.raises(ManifestError, match="exp_avg/a changed at rest"):
            others.check_copy(tensors_of(ram_copy(path)))
    else:
        reader.record_restored(mark)
        assert reader.check() is None
        others.check_copy(tensors_of(ram_copy(path)))
