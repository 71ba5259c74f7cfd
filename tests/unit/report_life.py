"""What ranks say in one good generation."""

from __future__ import annotations

from trainer import contract

STEPS = 9
CHECKPOINT_EVERY = 3
START = 20
"""Steps that the restored state has."""
GENERATION = 4


def restored(rank: int, step: int = START, **versions: str) -> contract.Restored:
    return contract.Restored(
        generation=GENERATION,
        rank=rank,
        step=step,
        source="ram",
        rendezvous_us=10 + rank,
        build_us=200 - rank,
        restore_us=3000 + rank,
        versions={"torch": "2", **versions},
        process="parked" if rank else "warm",
    )


def step_done(rank: int, step: int, loss: float | None = None) -> contract.StepDone:
    return contract.StepDone(
        generation=GENERATION,
        rank=rank,
        step=step,
        step_us=1000 * step + rank,
        data_us=10 * step + rank,
        snapshot_us=step,
        save_us=5 if step - 1 in SAVED else 0,
        tokens=64,
        loss=(step / 8 if loss is None else loss) if rank == 0 else None,
        grad_norm=1.5 if rank == 0 else None,
        lr=0.1 if rank == 0 else None,
        snapshot_step=step,
    )


def shard(rank: int, step: int) -> contract.ShardWritten:
    part = {"rank": rank, "data": f"d{step}-{rank}", "index": "i", "data_bytes": 100 + rank, "index_digest": "x"}
    return contract.ShardWritten(generation=GENERATION, rank=rank, step=step, part=part, write_us=50 + rank)


def validated(step: int, loss: float = 2.5) -> contract.Validated:
    return contract.Validated(generation=GENERATION, rank=0, step=step, loss=loss, validate_us=700)


def finished(rank: int) -> contract.Finished:
    return contract.Finished(generation=GENERATION, rank=rank, step=START + STEPS, reason="completed")


SAVED = [step for step in range(START + 1, START + STEPS + 1) if step % CHECKPOINT_EVERY == 0 or step == START + STEPS]


def life(rank: int) -> list[contract.FromWorker]:
    """What a rank says in one good generation, in the order of trainer/loop.py: a save comes after its step."""
    messages: list[contract.FromWorker] = [restored(rank)]
    for step in range(START + 1, START + STEPS + 1):
        messages.append(step_done(rank, step))
        if step in SAVED:
            messages += [shard(rank, step), *([validated(step)] if rank == 0 else [])]
    return [*messages, finished(rank)]
