"""Where a token stands, in each of the ways that a model can be told.

All is computed from the positions at each pass, in float32: trained weights expect these very
numbers, and a model has no buffers that could be of another dtype or be left out of a file.
"""

import math

import torch
from torch import Tensor, nn

from llmcore.models.config import TransformerConfig

# T5's: distances below 8 (16 backwards only) have a bucket each, those from 128 on share the last.
BUCKETS, FAR = 32, 128


def rotations(
    config: TransformerConfig, positions: Tensor, theta: float | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles at positions (...), float32 (..., R/2) each.

    theta: the config's unless given.
    """
    theta = config.rope_theta if theta is None else theta
    # In float32 whatever the model's dtype: the weights were trained with these very angles.
    pairs = torch.arange(0, config.rotated, 2, device=positions.device)
    frequencies = 1.0 / theta ** (pairs.float() / config.rotated)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def sinusoids(config: TransformerConfig, positions: Tensor) -> Tensor:
    """The fixed position vectors (..., C) at positions (...), float32.

    Vaswani et al., 2017, section 3.5, in the order of their own code and of Marian: all sines, then
    all cosines (the paper's formula has them in turn, which is the same up to a permutation of C).
    """
    pairs = torch.arange(0, config.width, 2, device=positions.device)
    angles = positions[..., None].float() / 10000.0 ** (pairs.float() / config.width)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """By how much each head's scores fall for a step of distance, float32 (H,).

    Press et al., 2021: 2^(-8/H), 2^(-16/H), ... for a power of two; between powers, every second
    one of the next is taken besides.
    """
    power = 2 ** math.floor(math.log2(heads))
    exponents = [-8.0 * (i + 1) / power for i in range(power)]
    exponents += [-4.0 * (i + 1) / power for i in range(0, 2 * (heads - power), 2)]
    return torch.tensor([2.0**exponent for exponent in exponents], device=device)


class RelativePositions(nn.Module):
    """A learned bias of the scores for each head and bucket of distances (Raffel et al., 2020).

    Small distances have a bucket each, greater ones share logarithmically wider ones. Looking both
    ways, half of the buckets are for each direction.
    """

    def __init__(self, config: TransformerConfig, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.embedding = nn.Embedding(BUCKETS, config.heads)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """What is added to the scores: queries (T,) or (B, T), keys (S,) -> (1 or B, H, T, S)."""
        distances = keys - queries[..., None]
        bias = self.embedding(self.buckets(distances))
        return bias.movedim(-1, -3).reshape(-1, bias.shape[-1], *distances.shape[-2:])

    def buckets(self, distances: Tensor) -> Tensor:
        """The bucket of each key's position minus the query's, int64 of the same shape."""
        if self.causal:
            return _buckets((-distances).clamp(min=0), BUCKETS)
        half = BUCKETS // 2
        return torch.where(distances > 0, half, 0) + _buckets(distances.abs(), half)


def _buckets(distances: Tensor, count: int) -> Tensor:
    exact = count // 2
    # At least 1 before the logarithm: what is below `exact` is not taken from here.
    logarithm = (distances.clamp(min=1).float() / exact).log() / math.log(FAR / exact)
    wide = exact + (logarithm * (count - exact)).to(torch.int64)
    return torch.where(distances < exact, distances, wide.clamp(max=count - 1))
