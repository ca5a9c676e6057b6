"""Two steps of training on 1 or 2 processes: `torchrun distributed_runs.py {one,ddp,fsdp} HOW`.

Prints the loss of each step, and a norm of the weights after them.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from families import build, prepared
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def main(mode: str, how: str) -> None:
    torch.set_num_threads(1)
    rank, size = 0, 1
    if mode != "one":
        dist.init_process_group("gloo")
        rank, size = dist.get_rank(), dist.get_world_size()
    model = prepared(build("llama"), how).train()
    ids = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    mine = ids.chunk(size)[rank]
    if mode == "ddp":
        wrapped = DistributedDataParallel(model)
    elif mode == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
    else:
        wrapped = model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(2):
        loss = wrapped(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / size
        if size > 1:
            dist.all_reduce(total)
        if rank == 0:
            print(f"loss {total.item():.6f}")
    norms = [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).double().square().sum()
        for p in wrapped.parameters()
    ]
    if rank == 0:
        print(f"norm {torch.stack(norms).sum().sqrt().item():.6f}")
    if mode != "one":
        dist.destroy_process_group()
        sys.stdout.flush()
        # Without taking objects down: torch 2.13's gloo group, which ends with the last module that
        # holds it, may wait for its own thread, which waits for this one to let go of Python.
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
