"""A training loop of one's own under Shepherd: data parallel, on a synthetic regression, with a session's three calls.

    shepherd run --procs-per-node 2 -- python examples/own_loop.py --steps 200

keeps going when workers or nodes die, and ends with the bits that an untouched run ends with. The same file runs under
torchrun, where the three calls do nothing:

    torchrun --nproc-per-node 2 examples/own_loop.py --steps 200
"""

import argparse
import hashlib
import time

import torch
from torch import distributed as dist
from torch import nn

import shepherd

FEATURES, BATCH = 32, 64


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's samples of a step: a function of both, so that a step that is done again sees the same data."""
    noise = torch.Generator().manual_seed(step * 10_000 + rank)
    x = torch.randn(BATCH, FEATURES, generator=noise)
    return x, torch.sin(x.sum(1, keepdim=True)) + 0.1 * torch.randn(BATCH, 1, generator=noise)


def average_gradients(model: nn.Module) -> None:
    """What DistributedDataParallel does, in one order from the first step on.

    DDP itself sorts its buckets anew after its first step, and the order decides how the sum is rounded: there a run
    that was restarted is equal to an untouched one up to rounding.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--pause", type=float, default=0.0, help="seconds in each step, to have time to hurt it")
    arguments = options.parse_args()

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "samples": 0}

    session = shepherd.session()
    done = session.restore(state) or 0
    for step in range(done + 1, arguments.steps + 1):
        x, y = batch(step, rank)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model)
        optimizer.step()
        scheduler.step()
        state["samples"] += BATCH * dist.get_world_size()
        time.sleep(arguments.pause)
        session.snapshot(step, state)
        session.step(step, loss=loss.item(), tokens=BATCH * dist.get_world_size())
    session.snapshot(arguments.steps, state, durable=True)

    bits = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    digest = hashlib.sha256(bits).hexdigest()[:16]
    print(f"rank {rank}: {state['samples']} samples, model {digest}, lr {scheduler.get_last_lr()[0]:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
