"""The parts of a decoder that has a native pass, found by what its modules are; and its shape."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore.models.config import Activation, TransformerConfig
from llmcore.swap.activations import Gelu
from llmcore.swap.gated_mlp import GatedMLP
from llmcore.swap.linears import Linear, columns, is_linear, outputs
from llmcore.swap.norms import LayerNorm, RMSNorm


class Unfit(Exception):
    """Why this model has no native pass."""


@dataclass(frozen=True)
class Attention:
    """Three linears, or one for all three, and the one behind; norms of queries and keys."""

    module: nn.Module
    qkv: tuple[nn.Module, ...]
    output: nn.Module
    head_norms: tuple[nn.Module, ...]


@dataclass(frozen=True)
class FeedForward:
    """`up` is one linear, or two, the gate first; they are one matrix in the native pass."""

    up: tuple[nn.Module, ...]
    down: nn.Module
    activation: Activation


@dataclass(frozen=True)
class Layer:
    """Its norms: one before each of the two, or one behind each too, in the order of the pass."""

    attention: Attention
    feed_forward: FeedForward
    norms: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Parts:
    """A decoder's modules; its positions are learned, or turned by what `rotary` gives."""

    embedding: nn.Embedding
    position: nn.Embedding | None
    rotary: nn.Module | None
    layers: tuple[Layer, ...]
    norm: nn.Module
    head: nn.Module

    def norms(self) -> Iterator[Any]:
        for layer in self.layers:
            yield from (*layer.norms, *layer.attention.head_norms)
        yield self.norm


def parts_of(model: nn.Module) -> Parts:
    """Unfit, with the reason, where the model has another structure."""
    own: Any = model
    backbone, head = own.base_model, own.get_output_embeddings()
    embedding = own.get_input_embeddings()
    if backbone is model or [*model.children()] != [backbone, head]:
        raise Unfit("it has more than a backbone and a head")
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        raise Unfit("its embedding is no plain one")
    children = without_dropout(backbone)
    stacks = [m for m in children if isinstance(m, nn.ModuleList)]
    norms = [m for m in children if is_norm(m)]
    others = [m for m in children if m not in (*stacks, *norms, embedding)]
    if not isinstance(head, Linear) or (len(stacks), len(norms), len(others)) != (1, 1, 1):
        raise Unfit("its parts are not an embedding, positions, layers, a norm and a head")
    layers = tuple(layer_of(layer) for layer in stacks[0])
    (place,) = others
    if type(place) is nn.Embedding and place.max_norm is None:
        return Parts(embedding, place, None, layers, norms[0], head)  # type: ignore[arg-type]
    if list(inspect.signature(place.forward).parameters)[:2] != ["x", "position_ids"]:
        raise Unfit("its positions are neither an embedding's nor rotary angles")
    return Parts(embedding, None, place, layers, norms[0], head)  # type: ignore[arg-type]


def layer_of(layer: nn.Module) -> Layer:
    children = without_dropout(layer)
    norms = tuple(m for m in children if is_norm(m))
    attentions = [a for m in children if (a := attention_of(m)) is not None]
    networks = [n for m in children if (n := feed_forward_of(m)) is not None]
    if (len(attentions), len(networks)) != (1, 1) or len(children) != 2 + len(norms):
        raise Unfit("a layer is not attention and a feed-forward network of known parts")
    if len(norms) not in (2, 4):
        raise Unfit(f"a layer has {len(norms)} norms, not one before (and one behind) each part")
    return Layer(attentions[0], networks[0], norms)


def attention_of(module: nn.Module) -> Attention | None:
    children = without_dropout(module)
    linears = [m for m in children if is_linear(m)]
    norms = tuple(m for m in children if isinstance(m, RMSNorm))
    fits = len(linears) in (2, 4) and len(norms) in (0, 2)
    if not fits or len(children) != len(linears) + len(norms):
        return None
    return Attention(module, tuple(linears[:-1]), linears[-1], norms)


def feed_forward_of(module: nn.Module) -> FeedForward | None:
    if isinstance(module, GatedMLP):
        gate, up, down = module._llmcore_roles
        activation = {"silu": "swiglu", "gelu_tanh": "geglu"}.get(module._llmcore_activation)
        if activation is None or not module._llmcore_gate_first:
            return None
        parts: Any = module._modules
        both = (parts[gate],) if up is None else (parts[gate], parts[up])
        return FeedForward(both, parts[down], activation)  # type: ignore[arg-type]
    children = without_dropout(module)
    linears = [m for m in children if is_linear(m)]
    names = [name for m in children if (name := activation_of(m)) is not None]
    if (len(linears), len(names), len(children)) != (2, 1, 3):
        return None
    return FeedForward((linears[0],), linears[1], names[0])


def without_dropout(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.children() if not isinstance(m, nn.Dropout)]


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, RMSNorm | LayerNorm)


def activation_of(module: nn.Module) -> Activation | None:
    if isinstance(module, Gelu):
        return "gelu_tanh" if module._llmcore_approximate == "tanh" else "gelu"
    return "relu" if isinstance(module, nn.ReLU) else None


# The shape


def config_of(model: nn.Module, parts: Parts) -> TransformerConfig:
    """Unfit where layers differ in it, or it has something that the native pass doesn't know."""
    settings = settings_of(model)
    for name, value in settings.items():
        if "chunk" in name and type(value) is int and value > 0:
            raise Unfit(f"its config has {name} {value}")
    norms = [*parts.norms()]
    is_rms = of_all("norms", [isinstance(norm, RMSNorm) for norm in norms])
    if not is_rms and any(norm._parameters.get("bias") is None for norm in norms):
        raise Unfit("its layer norms have no bias")
    first = parts.layers[0]
    head_width = head_width_of(parts)
    queries, rest = columns(first.attention.output) // head_width, 0
    if len(first.attention.qkv) == 3:
        rest = sum(outputs(m) for m in first.attention.qkv[1:])
    else:
        rest = outputs(first.attention.qkv[0]) - queries * head_width
    if rest % (2 * head_width) or queries * head_width != columns(first.attention.output):
        raise Unfit("queries, keys and values don't fit to the width of a head")
    norms_of_a_layer = of_all("norms", [len(layer.norms) for layer in parts.layers])
    return TransformerConfig(
        vocab_size=max(parts.embedding.num_embeddings, outputs(parts.head)),
        width=parts.embedding.embedding_dim,
        layers=len(parts.layers),
        heads=queries,
        kv_heads=rest // (2 * head_width),
        head_width=head_width,
        feed_forward=columns(first.feed_forward.down),
        context_length=1 << 30 if parts.position is None else parts.position.num_embeddings,
        norm="rms_norm" if is_rms else "layer_norm",
        norm_eps=of_all("eps", [norm._llmcore_eps for norm in norms]),
        norm_offset=is_rms and of_all("1 + weight", [norm._llmcore_plus_one for norm in norms]),
        norm_placement="pre" if norms_of_a_layer == 2 else "both",
        qk_norm=bool(of_all("norms", [len(x.attention.head_norms) for x in parts.layers])),
        activation=of_all("activation", [x.feed_forward.activation for x in parts.layers]),
        positions="rope" if parts.position is None else "learned",
        attention_scale=scale_of(parts),
        attention_softcap=settings.get("attn_logit_softcapping"),
        logit_softcap=settings.get("final_logit_softcapping"),
        embedding_scale=embedding_scale(parts.embedding),
        tied_embeddings=False,
    )


def settings_of(model: nn.Module) -> dict[str, Any]:
    """The config of the model's text part, by name."""
    own: Any = model
    return vars(own.config.get_text_config(decoder=True))


def of_all(name: str, values: list[Any]) -> Any:
    """What all have in common; Unfit where they differ."""
    if len(set(values)) > 1:
        raise Unfit(f"its parts differ in {name}")
    return values[0]


def head_width_of(parts: Parts) -> int:
    if parts.rotary is not None:
        width = angles(parts.rotary, torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1]
    else:
        widths = [getattr(layer.attention.module, "head_dim", 0) for layer in parts.layers]
        width = of_all("head_dim", widths)
    given = getattr(parts.layers[0].attention.module, "head_dim", width)
    if type(width) is not int or width < 1 or width != given:
        raise Unfit(f"its angles are for {width} of a head's {given}")
    return width


def angles(
    rotary: nn.Module, positions: Tensor, *, of_windows: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin (1, T, D), float32, of positions (1, T); some have others where windows are."""
    options = {}
    if has_window_angles(rotary):
        options["layer_type"] = "sliding_attention" if of_windows else "full_attention"
    found: tuple[Tensor, Tensor] = rotary(torch.zeros(1, 1, 1), positions, **options)
    return found


def has_window_angles(rotary: nn.Module | None) -> bool:
    return rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters


def scale_of(parts: Parts) -> float:
    scales = [getattr(layer.attention.module, "scaling", None) for layer in parts.layers]
    scale = of_all("the scale of scores", scales)
    if not isinstance(scale, float):
        raise Unfit("attention doesn't say how its scores are scaled")
    return scale


def embedding_scale(embedding: nn.Embedding) -> float:
    """What the embedding multiplies its rows by; Unfit where it does something else."""
    weight = embedding.weight
    ids = torch.arange(min(4, len(weight)))
    found, plain = embedding(ids), F.embedding(ids, weight)
    scalars = [b for b in embedding.buffers(recurse=False) if b.ndim == 0]
    for scale in (1.0, *(b.to(weight.dtype).item() for b in scalars)):
        if torch.equal(found, plain * scale):
            return scale
    raise Unfit("its embedding gives no multiple of its rows")
