"""Sample calls of the ops: what verification and the tests run every candidate on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Sample:
    """One call of an op: `args` and `options` as the public function takes them.

    Floating tensors are float32 here; whoever runs the sample casts them to the dtype under test. A
    tensor held under a name in `keep` stays float32 (statistics, slopes), counted by position in
    args or by name in options.
    """

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    keep: tuple[int | str, ...] = ()

    def cast(
        self, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and options with the floating tensors in `dtype`, on `device`."""

        def to(where: int | str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value.to(device) if hasattr(value, "to") else value  # a PackedWeight
            if not value.is_floating_point() or (where in self.keep and dtype != torch.float64):
                return value.detach().to(device)
            return value.detach().to(device, dtype)  # its own tensor, though not its own memory

        return [to(i, a) for i, a in enumerate(self.args)], {
            k: to(k, v) for k, v in self.options.items()
        }


class Draw:
    """Random values and shapes from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal float32 values."""
        return torch.randn(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator)

    def chance(self, p: float, *shape: int) -> torch.Tensor:
        """Booleans, True with probability p."""
        return torch.rand(shape, generator=self.generator) < p

    def size(self, low: int, high: int) -> int:
        """One integer in [low, high]."""
        return int(self.integers(low, high + 1, 1))
