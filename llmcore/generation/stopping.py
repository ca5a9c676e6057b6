"""When a sequence is at its end."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Stopping:
    """Is told every token, as it is chosen, and says which sequences it ends."""

    def __init__(self, ends: Iterable[int]) -> None:
        """ends: the token ids that end a sequence."""
        self.ends = tuple(ends)
        self._ends = torch.tensor(self.ends, dtype=torch.int64)

    def ended(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """(K,) bool: for each of these sequences (K,) whether its new token (K,) is its last."""
        return torch.isin(tokens, self._ends.to(tokens.device))


def end_ids(stop: int | Iterable[int] | None, of_model: tuple[int, ...]) -> tuple[int, ...]:
    """The token ids that `stop` names; the model's own by default."""
    if stop is None:
        return of_model
    return (stop,) if isinstance(stop, int) else tuple(stop)
