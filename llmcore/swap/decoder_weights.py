"""A models.Decoder over the memory of another library's decoder.

Where it holds several of the model's matrices as one, the model's parameters become views of that
one: no weight lies in memory twice, and what is changed in place is changed for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.models.block import Block
from llmcore.models.config import TransformerConfig
from llmcore.models.transformer import Decoder
from llmcore.ops.packed_weight import PANEL, PackedWeight
from llmcore.swap.decoder_parts import Parts, Unfit


def shared_decoder(config: TransformerConfig, parts: Parts) -> Decoder:
    """A Decoder whose parameters are the model's own; several of them become one matrix."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.embedding.weight = parts.embedding.weight  # type: ignore[assignment]
    assert decoder.norm is not None and decoder.head is not None
    decoder.norm.weight = parts.norm.weight  # type: ignore[assignment]
    share(decoder.head, (parts.head,))
    for block, layer in zip(decoder.blocks, parts.layers, strict=True):
        assert isinstance(block, Block)
        block.attention_norm.weight = layer.attention_norm.weight  # type: ignore[assignment]
        block.feed_forward_norm.weight = layer.feed_forward_norm.weight  # type: ignore[assignment]
        share(block.attention.qkv, layer.qkv)
        share(block.attention.output, (layer.output,))
        share(block.feed_forward.up, layer.gate_up)
        share(block.feed_forward.down, (layer.down,))
    return decoder.eval()


def share(ours: Any, theirs: Sequence[Any]) -> None:
    """Give a linear of ours the weights and biases of theirs, one below the other."""
    del ours.weight
    packed = [m._llmcore_packed for m in theirs]
    if None not in packed:
        ours.weight = joined_packed(packed, theirs)
    else:
        ours.weight = joined([m.weight for m in theirs])
    biases = [m._parameters.get("bias") for m in theirs]
    if any(b is None for b in biases) and any(b is not None for b in biases):
        raise Unfit("some linears have a bias and others not")
    ours.bias = None if biases[0] is None else joined(biases)


def joined(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """One parameter of all rows, of which these become views; where there is one, itself."""
    if len(parameters) == 1:
        return parameters[0]
    whole = torch.cat([p.detach() for p in parameters])
    for parameter, rows in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = rows
    return nn.Parameter(whole, requires_grad=False)


def joined_packed(packed: Sequence[PackedWeight], modules: Sequence[Any]) -> PackedWeight:
    """Likewise of packed weights."""
    if len(packed) == 1:
        return packed[0]
    kinds = {(p.format, p.group, p.minimums is None) for p in packed}
    if len(kinds) > 1 or any(p.shape[0] % PANEL for p in packed):
        raise Unfit(f"packed weights of several kinds, or rows that are no multiple of {PANEL}")

    def whole(name: str) -> Tensor | None:
        parts = [getattr(p, name) for p in packed]
        return None if parts[0] is None else torch.cat(parts)

    tensors = {name: whole(name) for name in ("values", "scales", "minimums")}
    rows = sum(p.shape[0] for p in packed)
    shape = torch.Size((rows, packed[0].shape[1]))
    start = 0
    for part, module in zip(packed, modules, strict=True):
        count = len(part.values)
        views = {n: None if t is None else t[start : start + count] for n, t in tensors.items()}
        module.__dict__["_llmcore_packed"] = replace(part, **views)  # type: ignore[arg-type]
        start += count
    error = max(p.error for p in packed)
    return replace(packed[0], shape=shape, error=error, **tensors)  # type: ignore[arg-type]


def is_whole(parameter: Tensor) -> bool:
    """Whether its memory is its own, and not a part of a matrix's with others."""
    return parameter.untyped_storage().nbytes() == parameter.nbytes
