"""What a decoder's modules did in one small pass: who was called, in which order, with what.

Which projection is the keys', whether two norms read the same stream, where the table of positions
begins: a module's names don't say it, and its calls do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.swap.attention import small_inputs
from llmcore.swap.decoder_cache import CACHE_NAMES, new_cache
from llmcore.swap.instance import quiet
from llmcore.swap.loss import argument_names


class Unfit(Exception):
    """Why this model has no native pass."""


@dataclass(frozen=True)
class Trace:
    """A pass over some tokens without padding.

    inputs, outputs  of each module's first call, in the order of the calls' ends; None: no tensor
    values           (B, G, T, D) of the first layer, the last of the tokens, as the cache has them
    """

    values: Tensor
    inputs: dict[nn.Module, Tensor | None]
    outputs: dict[nn.Module, Tensor | None]

    def parts(self, module: nn.Module) -> list[nn.Module]:
        """A module's children without dropout, in the order of their calls."""
        children = [m for m in module.children() if not isinstance(m, nn.Dropout)]
        place = {m: i for i, m in enumerate(self.inputs)}
        return sorted(children, key=lambda m: place.get(m, len(place)))

    def output(self, module: nn.Module) -> Tensor:
        """Unfit where the module has not been called, or gave no tensor."""
        found = self.outputs.get(module)
        if found is None:
            raise Unfit(f"a {type(module).__name__} gave no tensor in a small pass")
        return found


@torch.no_grad()
def traced(model: Any) -> Trace:
    """One pass of the model's own. Unfit where nobody says what it takes, or it keeps no cache."""
    arguments = next(small_inputs(model), {})
    if "input_ids" not in arguments:
        raise Unfit("nothing says what a small input of this model is")
    cache = new_cache(model.config)
    inputs: dict[nn.Module, Tensor | None] = {}
    outputs: dict[nn.Module, Tensor | None] = {}

    def note(module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        first = given[0] if given else None
        inputs.setdefault(module, first if isinstance(first, Tensor) else None)
        outputs.setdefault(module, result if isinstance(result, Tensor) else None)

    with quiet(model):  # its hooks come back, and these are gone
        for module in model.modules():
            module.register_forward_hook(note)
        model(**arguments, **{cache_argument(model): cache}, use_cache=True)
    if not cache.layers or not isinstance(getattr(cache.layers[0], "values", None), Tensor):
        raise Unfit("its first layer has put nothing into the cache")
    return Trace(cache.layers[0].values, inputs, outputs)


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its cache; Unfit where that, or the tokens, has no name."""
    names = argument_names(type(model).forward)
    for name in CACHE_NAMES:
        if name in names and "input_ids" in names:
            return name
    raise Unfit(f"its forward has no input_ids with a {' or '.join(CACHE_NAMES)}")
