"""The pulse tells the truth: wherever one rank gets stuck, all others are seen to wait, and it is not."""

from __future__ import annotations

import gc
import json
import linecache
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_sessions import SHARDED_3D, config_of, make_session, on_ranks
from torch import Tensor, nn

from trainer import contract, pulse
from trainer.contract import ParallelConfig, Pulse, WorkerConfig
from trainer.loop import train_step, validate

DEADLINE_S = 30.0
SETTLED_PULSES = 8
"""Pulses in a row that tell of one place; a rank on its way is seen at another by then."""


class Pulses:
    """The newest pulse of every rank, in a folder that all share."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank, self.count = folder, rank, 0

    def emit(self, message: Any) -> None:
        self.count += 1
        new = self.folder / f"{self.rank}.new"
        new.write_text(json.dumps([self.count, message.waiting, message.where]))
        os.replace(new, self.folder / f"{self.rank}.json")

    def settled(self, ranks: int) -> dict[int, tuple[bool, str]]:
        """What each rank tells once none of the others moves any more."""
        since: dict[int, list[Any]] = {}
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            told = {int(f.stem): json.loads(f.read_text()) for f in self.folder.glob("*.json")}
            for rank, (count, *place) in told.items():
                if rank not in since or since[rank][1:] != place:
                    since[rank] = [count, *place]
            others = [rank for rank in told if rank != self.rank]
            here = {rank: (waiting, where) for rank, (_, waiting, where) in told.items()}
            settled = len(told) == ranks and all(told[r][0] - since[r][0] >= SETTLED_PULSES for r in others)
            if settled and all(here[rank][0] for rank in others):
                return here
            time.sleep(0.02)
        assert settled, f"the ranks do not settle within {DEADLINE_S} s: {since}"
        return here  # somebody is stuck, and is not seen to wait


def get_stuck_everywhere(config: WorkerConfig, folder: str, culprit: int) -> dict[str, dict[int, tuple[bool, str]]]:
    """On `culprit`, what all ranks tell while it is stuck at one place of a step after the other."""
    pulse.INTERVAL_S = 0.05
    session = make_session(config, [])
    pulses = Pulses(Path(folder), session.rank)
    pulse.start(1, session.rank, lambda: session.state.step, pulses.emit)
    found: dict[str, dict[int, tuple[bool, str]]] = {}

    def stick(place: str) -> None:
        if session.rank == culprit and place not in found:
            found[place] = pulses.settled(config.parallel.world_size)

    def stick_in_backward(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: stick("backward"))

    def hooked(register: Callable[[Any], Any], hook: Any) -> None:
        handle = register(hook)
        train_step(session)
        handle.remove()

    train_step(session)
    stick("data")
    train_step(session)
    block = list(session.stage.module.layers.values())[-1]
    assert isinstance(block, nn.Module)
    feed_forward = block.get_submodule("feed_forward")
    hooked(feed_forward.register_forward_pre_hook, lambda module, inputs: stick("forward"))
    hooked(feed_forward.register_forward_hook, stick_in_backward)
    hooked(session.optimizer.register_step_pre_hook, lambda *arguments: stick("optimizer"))
    stick("validation")
    validate(session)
    stick("end")
    torch.distributed.barrier()
    return found


@pytest.mark.parametrize(
    ("parallel", "culprit"),
    [
        (SHARDED_3D, 6),
        (ParallelConfig(dp_replicate=2, dp_shard=2), 1),
    ],
    ids=["sharded-3d", "replicated-sharded"],
)
def test_the_others_wait_wherever_a_rank_is_stuck(parallel: ParallelConfig, culprit: int, tmp_path: Path) -> None:
    results = on_ranks(get_stuck_everywhere, config_of(parallel, n_layers=2), str(tmp_path), culprit)
    found = results[culprit]
    assert list(found) == ["data", "forward", "backward", "optimizer", "validation", "end"]
    for place, told in found.items():
        free = {rank: where for rank, (waiting, where) in told.items() if not waiting}
        assert list(free) == [culprit], f"stuck in {place}: {told}"
        # It reads files while it is stuck: pathlib may be all that is seen of it.
        assert any(file in free[culprit] for file in ("test_pulse.py", "pathlib.py")), free


def test_a_pulse_says_who_where_and_how_far() -> None:
    pulses: list[Pulse] = []
    came = threading.Event()

    def emit(message: Any) -> None:
        pulses.append(message)
        came.set()

    def work() -> None:
        ended = pulse.start(4, 7, lambda: 21, emit)
        assert came.wait(DEADLINE_S)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(DEADLINE_S)
    first = pulses[0]
    assert (first.generation, first.rank, first.step, first.waiting) == (4, 7, 21, False)
    assert first.where.count(" > ") < pulse.OWN_FRAMES + pulse.INNERMOST_FRAMES
    assert len(contract.encode(first)["where"]) < 400


def test_a_thread_that_has_ended_stands_nowhere() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join(DEADLINE_S)
    assert thread.ident is not None
    assert pulse.standing(thread.ident) == (False, "")


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="collects garbage between instructions only")
def test_no_finalizer_runs_while_frames_are_read() -> None:
    """It may let their thread run on, and a frame that is being read is freed; what is read then is other memory."""
    at: list[tuple[str, str]] = []

    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            frame = sys._getframe(1)
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            at.append((frame.f_code.co_name, line))

    thread, thresholds = threading.get_ident(), gc.get_threshold()
    try:
        for allocations in range(40):  # so many later garbage is collected
            gc.collect()
            gc.disable()
            Garbage()
            gc.set_threshold(gc.get_count()[0] + allocations)
            gc.enable()
            threshold = gc.get_threshold()
            pulse.standing(thread)
            assert gc.get_threshold() == threshold
    finally:
        gc.set_threshold(*thresholds)
    own = sys._getframe().f_code.co_name
    assert sum(name != own for name, _ in at) > 5, "it is not collected in between"
    assert not [name for name, line in at if name == "_outwards" or "_current_frames" in line]
