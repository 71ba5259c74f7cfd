"""Known-answer work for a node that wants to join: products of whole numbers, which every device must get exactly.

All partial sums of such a product are whole numbers that float32 holds exactly, so its bits depend on no order of
summation, kernel or device, and no reference run is needed. That one is right is shown on the host, in 64-bit integers
and by other means than the product was made: C = AB only if C x = A (B x), and for a wrong C and a random vector x of
numbers below n that fails to show once in n tries (Freivalds, IFIP 1977). Further products of the same matrices must
then have the same bits.

``python -P -m trainer.admission`` reads ``{"device": "cpu" | "cuda"}`` from its standard input and prints one line of
JSON: what was wrong with each device, or nothing, and how fast it was. It finds what is broken, not what is wrong once
in hours: that is what the checks of a running job are for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from torch import Tensor

LARGEST = 8
"""Of the matrices' entries, which TF32 and bfloat16 hold exactly, too."""
SIZE = {"cpu": 512, "cuda": 4096}
"""Rows and columns. The sums are at most 4096 x 8 x 8 = 2^18; float32 is exact up to 2^24."""
SECONDS = 1.0
"""Of products on each device, and at least PRODUCTS of them."""
PRODUCTS = 3
CHANCE = 1 << 16
"""One wrong product in so many passes for right."""


def check_device(device: torch.device, seed: int) -> dict[str, Any]:
    """One device's `problem`, empty when there is none, and its `tflops` in these products."""
    size, random = SIZE[device.type], torch.Generator().manual_seed(seed)
    a_host, b_host = (torch.randint(-LARGEST, LARGEST + 1, (size, size), generator=random) for _ in range(2))
    a, b = a_host.to(device, torch.float32), b_host.to(device, torch.float32)
    first = product(a, b)
    x = torch.randint(CHANCE, (size,), generator=random)
    rows = first.to("cpu").to(torch.int64) @ x != a_host @ (b_host @ x)
    if rows.any():
        return {"problem": f"{int(rows.sum())} of {size} rows of a product of whole numbers are wrong", "tflops": 0.0}
    count, began = 0, time.perf_counter()
    while count < PRODUCTS or time.perf_counter() - began < SECONDS:
        if not torch.equal(product(a, b), first):  # waits for the device
            return {"problem": f"product {count + 2} of the same matrices differs from the first", "tflops": 0.0}
        count += 1
    elapsed_s = time.perf_counter() - began
    return {"problem": "", "tflops": 2 * size**3 * count / elapsed_s / 1e12}


def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def check(device: str) -> list[dict[str, Any]]:
    """Every device of this kind that this process sees; `name` tells them apart."""
    devices = [torch.device("cpu")]
    if device == "cuda":
        devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    seed = int.from_bytes(os.urandom(4))
    return [{"name": str(each), **check_device(each, seed)} for each in devices]


def main() -> int:
    asked = json.load(sys.stdin)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(json.dumps(check(asked["device"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
