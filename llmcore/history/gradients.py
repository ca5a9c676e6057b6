"""How far back a gradient reaches: the vanishing gradient, measured.

    share(d) = |d y / d x_(T-1-d)| / |d y / d x_(T-2)|       y = u . h_(T-1), u random

x_t is the embedding of token t and h_(T-1) the last hidden state. In a recurrent network y depends
on x_(T-1-d) through d factors d h_t / d h_(t-1), one for each step between; where these are smaller
than 1 their product falls exponentially with d, and what stood far back can't teach the weights
anything (Hochreiter 1991; Bengio et al. 1994, https://doi.org/10.1109/72.279181). Attention reaches
every token in one step: no product, no such fall.
"""

from typing import Any

import torch
from torch import Tensor


def gradient_shares(model: Any, length: int, *, batch: int = 8, seed: int = 0) -> Tensor:
    """share(d) for d = 0 to length - 1, float64 (length,): means over `batch` random sequences.

    model   has embedding, a module from ids to vectors, and hidden(ids) -> (B, T, C); it is
            measured in float64, for shares far below float32's, and left as it was
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    seen: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    dtype = next(model.parameters()).dtype
    hook = model.embedding.register_forward_hook(keep)
    try:
        last = model.double().hidden(ids)[:, -1]
        direction = torch.randn(last.shape, generator=generator, dtype=last.dtype)
        [gradient] = torch.autograd.grad((last * direction).sum(), seen)
    finally:
        hook.remove()
        model.to(dtype)
    norms = gradient.norm(dim=-1).mean(dim=0).flip(0)
    return norms / norms[1]
