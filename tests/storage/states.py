"""States that are a function of their step, how they are saved, and what serves of what was saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from parallel_pool import CONTEXT
from spoilt import spoilt

from storage.checkpointer import Checkpointer
from storage.commits import create_commit, list_commits, read_commit, verify
from storage.durable import load, write_part
from storage.manifest import Commit, ManifestError, RankPart
from storage.state import TrainState

SENTINEL = 7
# For a sweep of one test; each run in it has deadlines of its own.
SWEEP_S = 1200


def state_of(step: int, rows: int = 40) -> TrainState:
    """Some 170 kB for each 40 rows."""
    g = torch.Generator().manual_seed(step)
    tensors = {
        "model/embed": torch.randn(rows, 900, generator=g),
        "model/half": torch.randn(33, 5, generator=g).bfloat16(),
        "exp_avg/embed": torch.randn(rows // 4, 700, generator=g),
        "scalar": torch.randn((), generator=g),
    }
    return TrainState(step, tensors, {"rng": torch.randint(0, 256, (5056,), generator=g).to(torch.uint8)})


def blank(rows: int = 40) -> TrainState:
    state = state_of(0, rows)
    for tensor in [*state.tensors.values(), *state.per_rank.values()]:
        tensor.fill_(SENTINEL)
    return state


def same(a: TrainState, b: TrainState, *, per_rank: bool = True) -> bool:
    """Bit for bit, the step included."""

    def bits(state: TrainState) -> dict[str, torch.Tensor]:
        named = {**state.tensors, **({f"rank/{k}": v for k, v in state.per_rank.items()} if per_rank else {})}
        return {name: tensor.contiguous().reshape(-1).view(torch.uint8) for name, tensor in named.items()}

    ours, theirs = bits(a), bits(b)
    return a.step == b.step and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def commit_of(parts: list[RankPart], step: int, generation: int = 1) -> Commit:
    mesh = {"dp_shard": len(parts)}
    return Commit(run="r", step=step, epoch=1, generation=generation, mesh=mesh, parts=tuple(parts), versions={})


def write(url: str, step: int, generation: int = 1) -> Commit:
    """The data of a checkpoint; its record, not created yet."""
    part = write_part(url, state_of(step), step=step, epoch=1, generation=generation, rank=0)
    return commit_of([part], step, generation)


def save(url: str, step: int, generation: int = 1) -> Commit:
    commit = write(url, step, generation)
    create_commit(url, commit)
    return commit


def checkpointer(url: str, generation: int = 1, ram_dir: str = "/nowhere") -> Checkpointer:
    return Checkpointer(
        url=url, run="r", rank=0, world_size=1, epoch=1, generation=generation, ram_dir=ram_dir, node="n"
    )


def served(url: str) -> list[int]:
    """Steps of the committed checkpoints, each of which is whole, loads, and is the state of its step bit for bit.

    Raises:
        AssertionError: one is not.
    """
    steps = list_commits(url)
    for step in steps:
        commit = read_commit(url, step)
        assert verify(url, commit) == []
        restored = blank()
        load(url, commit, restored)
        assert same(restored, state_of(step)), f"the checkpoint of step {step} holds another state"
    return steps


def refuses(url: str, step: int, error: type[Exception] = ManifestError) -> bool:
    """Whether the checkpoint of `step` is refused, with no tensor changed or all of them useless."""
    restored = blank()
    try:
        load(url, read_commit(url, step), restored)
    except error:
        assert same(restored, blank()) or spoilt(restored), "a tensor has changed"
        return True
    return False


def in_clean_process(function: Callable[..., Any], *arguments: Any, timeout_s: float = SWEEP_S) -> Any:
    """What `function(*arguments)` returns in a process that has one thread and everything imported.

    Raises:
        AssertionError: it did not answer in time, or died.
    """
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(timeout_s), f"{function.__name__} did not answer within {timeout_s} s"
        result = ours.recv()
    finally:
        process.kill()
        process.join(10)
    if isinstance(result, Exception):
        raise result
    return result


def _answer(pipe: Any, function: Callable[..., Any], arguments: Any) -> None:
    try:
        result = function(*arguments)
    except Exception as error:
        result = error
    pipe.send(result)
