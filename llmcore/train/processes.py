"""One process or several: torch's own DistributedDataParallel and FSDP2, started by torchrun.

    torchrun --nproc-per-node 2 -m llmcore pretrain ... --parallel ddp

All processes go through the same steps; what differs is which batches of a step they take. A sum
over them is all that the training loop asks for.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Parallel = Literal["ddp", "fsdp"]


class Processes:
    """Those that train one model together; this one has the number `rank` of `count`."""

    def __init__(self, parallel: Parallel = "ddp") -> None:
        """Joins the others where torchrun started this process. ValueError for another way."""
        if parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel must be ddp or fsdp, got {parallel!r}")
        self.parallel = parallel
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self._owns_group = self.count > 1 and not dist.is_initialized()
        if self._owns_group:
            dist.init_process_group("gloo")

    @property
    def is_first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def spread(self, objective: nn.Module) -> nn.Module:
        """The objective, whose gradients now come out as the mean over all processes.

        With ddp each holds all weights; with fsdp a part of each, and a block's are gathered while
        it is at work (Zhao et al. 2023, https://arxiv.org/abs/2304.11277).
        """
        if self.count == 1:
            return objective
        if self.parallel == "ddp":
            return nn.parallel.DistributedDataParallel(objective)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (self.count,))
        for module in objective.modules():
            if isinstance(module, nn.ModuleList):
                for block in module:
                    fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        return objective

    @contextlib.contextmanager
    def passing(self, spread: nn.Module, last: bool) -> Iterator[None]:
        """Forward and backward of one batch; only a step's last one passes gradients around."""
        if self.count == 1:
            yield
        elif isinstance(spread, nn.parallel.DistributedDataParallel):
            with contextlib.nullcontext() if last else spread.no_sync():
                yield
        else:
            spread.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield

    def reshard(self, spread: nn.Module) -> None:
        """Behind passes without a backward one, which leave fsdp's weights gathered."""
        if self.count > 1 and self.parallel == "fsdp":
            spread.reshard()  # type: ignore[operator]

    def sum(self, value: float) -> float:
        """Over all processes, in float64."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def any(self, flag: bool) -> bool:
        return self.sum(float(flag)) > 0.0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def leave(self) -> None:
        """The end of working together, where this object began it."""
        if self._owns_group:
            dist.destroy_process_group()
            self._owns_group = False


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, spread as `like` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value.to(like.device, copy=True)


def as_float(value: Any) -> float:
    """A scalar tensor, spread or not, as a number."""
    return float(gathered(value))
