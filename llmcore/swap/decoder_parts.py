"""The parts of a decoder that has a native pass, found by what its modules are; and its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmcore.models.config import TransformerConfig
from llmcore.swap.attention import RotaryAttention
from llmcore.swap.gated_mlp import GatedMLP
from llmcore.swap.linears import Linear
from llmcore.swap.norms import RMSNorm


class Unfit(Exception):
    """Why this model has no native pass."""


@dataclass(frozen=True)
class Layer:
    """One layer's modules; those of a name in plural are one matrix in the native pass."""

    attention: nn.Module
    attention_norm: nn.Module
    qkv: tuple[nn.Module, ...]
    output: nn.Module
    feed_forward: nn.Module
    feed_forward_norm: nn.Module
    gate_up: tuple[nn.Module, ...]
    down: nn.Module


@dataclass(frozen=True)
class Parts:
    """A decoder's modules."""

    embedding: nn.Embedding
    layers: tuple[Layer, ...]
    norm: nn.Module
    head: nn.Module
    rotary: nn.Module


def parts_of(model: nn.Module) -> Parts:
    """Unfit, with the reason, where the model has another structure."""
    own: Any = model
    backbone, head = own.base_model, own.get_output_embeddings()
    embedding = own.get_input_embeddings()
    stacks = [m for m in backbone.children() if isinstance(m, nn.ModuleList)]
    norms = [m for m in backbone.children() if isinstance(m, RMSNorm)]
    others = [m for m in backbone.children() if m not in (*stacks, *norms, embedding)]
    if backbone is model or [*model.children()] != [backbone, head]:
        raise Unfit("it has more than a backbone and a head")
    if type(embedding).forward is not nn.Embedding.forward or embedding.max_norm is not None:
        raise Unfit("its embedding is no plain one")
    if not isinstance(head, Linear) or (len(stacks), len(norms), len(others)) != (1, 1, 1):
        raise Unfit("its parts are not an embedding, layers, an RMS norm, angles and a head")
    layers = tuple(layer_of(layer) for layer in stacks[0])
    return Parts(embedding, layers, norms[0], head, others[0])  # type: ignore[arg-type]


def layer_of(layer: nn.Module) -> Layer:
    children = [*layer.children()]
    norms = [m for m in children if isinstance(m, RMSNorm)]
    attentions = [m for m in children if isinstance(m, RotaryAttention)]
    networks = [m for m in children if isinstance(m, GatedMLP)]
    if (len(norms), len(attentions), len(networks), len(children)) != (2, 1, 1, 4):
        raise Unfit("a layer is not rotary attention and a gated network with a norm before each")
    attention, network = attentions[0], networks[0]
    linears = [*attention.children()]
    if len(linears) != 4 or not all(isinstance(m, Linear) for m in linears):
        raise Unfit("attention has other parts than four linears")
    gate, up, down = network._llmcore_roles
    if network._llmcore_activation != "silu" or not network._llmcore_gate_first:
        raise Unfit("the gated network is no swiglu")
    children_of: Any = network._modules
    gate_up = (children_of[gate],) if up is None else (children_of[gate], children_of[up])
    return Layer(
        attention,
        norms[0],
        tuple(linears[:3]),
        linears[3],
        network,
        norms[1],
        gate_up,
        children_of[down],
    )


def config_of(model: nn.Module, parts: Parts) -> tuple[TransformerConfig, float]:
    """The shape, and the scale of attention's scores; Unfit where layers differ in it."""
    own: Any = model
    settings = vars(own.config.get_text_config(decoder=True))
    for name, value in settings.items():
        limits = ("window" in name or "chunk" in name) and type(value) is int and value > 0
        if limits and settings.get("use_sliding_window") is not False:
            raise Unfit(f"its config has {name} {value}")
    if set(settings.get("layer_types") or ()) - {"full_attention"}:
        raise Unfit("its config has layers of several types")
    cos, _ = parts.rotary(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64))
    first: Any = parts.layers[0]
    width, head_width = parts.embedding.embedding_dim, cos.shape[-1]
    rows = [m.weight.shape[0] for m in first.qkv]
    if rows[1] != rows[2] or any(r % head_width for r in rows):
        raise Unfit("queries, keys and values don't fit to the angles")
    norms: list[Any] = [n for x in parts.layers for n in (x.attention_norm, x.feed_forward_norm)]
    norms.append(parts.norm)
    if len({n._llmcore_eps for n in norms}) > 1 or any(n._llmcore_plus_one for n in norms):
        raise Unfit("its norms differ")
    scale = getattr(first.attention, "scaling", None)
    if not isinstance(scale, float):
        raise Unfit("attention doesn't say how its scores are scaled")
    if any(layer.attention.scaling != scale for layer in parts.layers):
        raise Unfit("its layers scale scores differently")
    head: Any = parts.head
    config = TransformerConfig(
        vocab_size=max(parts.embedding.num_embeddings, head.weight.shape[0]),
        width=width,
        layers=len(parts.layers),
        heads=rows[0] // head_width,
        kv_heads=rows[1] // head_width,
        head_width=head_width,
        feed_forward=first.down.weight.shape[1],
        context_length=1 << 30,
        norm_eps=norms[0]._llmcore_eps,
        tied_embeddings=False,
    )
    return config, scale
