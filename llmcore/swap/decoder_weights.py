"""A models.Decoder over the memory of another library's decoder.

Where it holds several of the model's matrices as one, or rows of what the model holds as columns,
the model's parameters become views of that one: no weight lies in memory twice, and what is changed
in place is changed for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.models.block import Block, FeedForward
from llmcore.models.config import TransformerConfig
from llmcore.models.transformer import Decoder
from llmcore.ops.packed_weight import PANEL, PackedWeight
from llmcore.swap.decoder_parts import Layer, Parts
from llmcore.swap.decoder_trace import Unfit
from llmcore.swap.linears import holds_columns


def shared_decoder(config: TransformerConfig, parts: Parts) -> Decoder:
    """A Decoder whose parameters are the model's own; several of them become one matrix."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.embedding.weight = parts.embedding.weight  # type: ignore[assignment]
    if parts.position is not None:
        assert decoder.position_embedding is not None
        places = parts.position.detach()
        decoder.position_embedding.weight = nn.Parameter(places, requires_grad=False)
    share_norm(decoder.norm, parts.norm)
    share(decoder.head, (parts.head,))
    for block, layer in zip(decoder.blocks, parts.layers, strict=True):
        assert isinstance(block, Block)
        share_layer(block, layer)
    return decoder.eval()


def share_layer(block: Block, layer: Layer) -> None:
    ours, norms = [block.attention_norm, block.feed_forward_norm], layer.norms
    if len(norms) == 1:  # both read it
        norms = norms * 2
    if len(layer.norms) == 4:
        ours = [ours[0], block.attention_after_norm, ours[1], block.feed_forward_after_norm]  # type: ignore[list-item]
    if layer.attention.head_norms:
        ours += [block.attention.q_norm, block.attention.k_norm]  # type: ignore[list-item]
    for norm, theirs in zip(ours, (*norms, *layer.attention.head_norms), strict=True):
        share_norm(norm, theirs)
    assert isinstance(block.feed_forward, FeedForward)
    share(block.attention.qkv, layer.attention.qkv)
    share(block.attention.output, (layer.attention.output,))
    share(block.feed_forward.up, layer.feed_forward.up)
    share(block.feed_forward.down, (layer.feed_forward.down,))


def share_norm(ours: Any, theirs: Any) -> None:
    ours.weight, ours.bias = theirs.weight, theirs._parameters.get("bias")


def share(ours: Any, theirs: Sequence[Any]) -> None:
    """Give a linear of ours the weights and biases of theirs, one below the other."""
    del ours.weight
    packed = [getattr(m, "_llmcore_packed", None) for m in theirs]
    if None not in packed:
        ours.weight = joined_packed(packed, theirs)  # type: ignore[arg-type]
    else:
        across = [holds_columns(m) for m in theirs]
        ours.weight = joined([m.weight for m in theirs], across)
    biases = [m._parameters.get("bias") for m in theirs]
    if any(b is None for b in biases) and any(b is not None for b in biases):
        raise Unfit("some linears have a bias and others not")
    ours.bias = None if biases[0] is None else joined(biases)


def joined(parameters: Sequence[nn.Parameter], across: Sequence[bool] = (False,)) -> nn.Parameter:
    """One parameter of all rows, of which these (or those `across`, transposed) become views.

    Where there is one that holds rows, itself.
    """
    if len(parameters) == 1 and not across[0]:
        return parameters[0]
    across = across if len(across) == len(parameters) else [False] * len(parameters)
    matrices = [p.detach().T if a else p.detach() for p, a in zip(parameters, across, strict=True)]
    whole = torch.cat(matrices) if len(matrices) > 1 else matrices[0].contiguous()
    parts = whole.split([len(m) for m in matrices])
    for parameter, rows, turned in zip(parameters, parts, across, strict=True):
        parameter.data = rows.T if turned else rows
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


def way_back(model: nn.Module) -> Callable[[], None]:
    """What gives each parameter that is a view by then memory of its own again, as it lay."""
    strides = {id(p): p.stride() for p in model.parameters() if is_whole(p)}

    def undo() -> None:
        for parameter in model.parameters():
            stride = strides.get(id(parameter))
            if stride is None or (is_whole(parameter) and parameter.stride() == stride):
                continue
            own = torch.empty_strided(
                parameter.shape, stride, dtype=parameter.dtype, device=parameter.device
            )
            parameter.data = own.copy_(parameter.data)

    return undo


def is_whole(parameter: Tensor) -> bool:
    """Whether its memory is its own, and not a part of a matrix's with others."""
    return parameter.untyped_storage().nbytes() == parameter.nbytes
