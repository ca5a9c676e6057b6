"""A pass's arguments, as a native pass takes them: anything out of the ordinary has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.swap.decoder_cache import CACHE_NAMES, new_cache, windows_of

IGNORED = {"use_cache": (True,), "return_dict": (True, None)}
"""Arguments of a pass that change nothing at these values, beside those that are None or False."""


@dataclass(frozen=True)
class Call:
    """The arguments of a pass that has a native way."""

    ids: Tensor  # (B, T) int64
    cache: Any
    windows: tuple[int, ...]  # of the cache's layers
    is_kept: bool  # whether the model's output has the cache
    pads: Tensor | None  # (B,): what pads each sequence on its left; None: nothing does
    last_only: bool


def call_of(model: nn.Module, arguments: Mapping[str, Any]) -> Call | None:
    """The call as a native pass takes it; None where it is out of the ordinary."""
    config: Any = model.config
    named = dict(arguments)
    ids: Any = named.pop("input_ids", None)
    cache: Any = None
    for name in CACHE_NAMES:  # of both names, the other one stays to be refused
        cache = named.pop(name, None) if cache is None else cache
    wanted = named.get("use_cache")
    is_kept = cache is not None or bool(config.use_cache if wanted is None else wanted)
    mask, positions = named.pop("attention_mask", None), named.pop("position_ids", None)
    keep = named.pop("logits_to_keep", 0)
    for name, value in named.items():
        if value is not None and value is not False and value not in IGNORED.get(name, ()):
            return None
    if config.output_attentions or config.output_hidden_states or not config.return_dict:
        return None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype != torch.int64 or not ids.numel():
        return None
    if ids.device.type != "cpu" or type(keep) is not int or keep not in (0, 1):
        return None
    cache = new_cache(config) if cache is None else cache
    windows = windows_of(cache)
    if windows is None:
        return None
    start = cache.get_seq_length()
    if start and cache.layers[0].keys.shape[0] != ids.shape[0]:
        return None
    pads = padding_on_the_left(mask, ids.shape[0], start, ids.shape[1])
    if pads is False or not positions_fit(positions, pads, start, ids.shape[1]):
        return None
    return Call(ids, cache, windows, is_kept, pads, keep == 1)  # type: ignore[arg-type]


def padding_on_the_left(mask: Any, batch: int, start: int, new: int) -> Tensor | bool | None:
    """(B,) padding tokens of each sequence, None where there are none, False for another mask."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != (batch, start + new):
        return False
    valid = mask.bool()
    if valid.all():
        return None
    pads = start + new - valid.sum(-1)
    if not torch.equal(valid, torch.arange(start + new) >= pads[:, None]):
        return False
    # Padding is part of the first pass, and of no other; each sequence has a token in it.
    most = int(pads.max())
    return pads if most <= start or (start == 0 and most < new) else False


def positions_fit(positions: Any, pads: Any, start: int, new: int) -> bool:
    """Whether tokens have the positions that they have among their sequence's tokens."""
    if positions is None:
        return pads is None  # without them, the model counts padding
    expected = torch.arange(start, start + new)[None]
    if pads is not None:
        expected = expected - pads[:, None]
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        return False
    return bool(((positions == expected) | (expected < 0)).all())
