"""How a model is trained: everything that decides its weights besides the model and the data."""

import math
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Recipe:
    """AdamW, a learning rate that warms up and falls along a cosine, clipped gradients.

    steps             updates of the weights
    learning_rate     the highest; warm_up steps lead to it on a line from 0
    final_rate        what the cosine ends at, as a share of the highest
    weight_decay      of matrices, decoupled (Loshchilov and Hutter 2019); vectors have none
    beta1, beta2, eps AdamW's
    clip              the gradient's norm is at most this; None: any
    accumulate        batches whose gradients make one update, over all processes
    precision         "bf16": products in bfloat16 by torch.autocast, weights in float32
    average           decay of an exponential moving average of the weights, which is then what is
                      validated and saved; None: none
    seed              of dropout; the data have their own
    """

    steps: int
    learning_rate: float = 1e-3
    warm_up: int = 100
    final_rate: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float | None = 1.0
    accumulate: int = 1
    precision: Precision = "fp32"
    average: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warm_up", 0), ("accumulate", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.learning_rate > 0.0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("final_rate", "beta1", "beta2"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(f"clip must be None or above 0, got {self.clip}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")
        if self.average is not None and not 0.0 < self.average < 1.0:
            raise ValueError(f"average must be None or between 0 and 1, got {self.average}")

    def rate(self, step: int) -> float:
        """The learning rate of this step, the first being 0."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        return self.learning_rate * (self.final_rate + (1.0 - self.final_rate) * cosine)
