"""A worker that sums ranks over gloo through its generation's store: by the contract, or by torch's ``env://``."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer import contract


def main(sock: socket.socket) -> int:
    receiver = contract.Receiver(contract.ToWorker)
    assigns: list[contract.Assign] = []
    while not assigns:
        assigns = receiver.feed(sock.recv(65536))
    assign = assigns[0]
    timeout = timedelta(seconds=20)
    if assign.config.url == "env":
        dist.init_process_group("gloo", timeout=timeout)
    else:
        store = dist.TCPStore(assign.store_host, assign.store_port, is_master=False, timeout=timeout)
        store = dist.PrefixStore("workers", store)
        dist.init_process_group("gloo", store=store, rank=assign.rank, world_size=assign.world_size, timeout=timeout)
    total = torch.tensor([float(assign.rank + 1)])
    dist.all_reduce(total)
    dist.destroy_process_group()
    contract.send(
        sock,
        contract.Validated(
            generation=assign.generation, rank=assign.rank, step=os.getpid(), loss=total.item(), validate_us=0
        ),
    )
    return contract.EXIT_FINISHED
