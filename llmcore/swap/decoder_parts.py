"""The parts of a decoder that has a native pass, found by what its modules are; and its shape."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore.models.config import Activation, TransformerConfig
from llmcore.swap.activations import Gelu
from llmcore.swap.decoder_trace import Trace, Unfit
from llmcore.swap.gated_mlp import GatedMLP
from llmcore.swap.linears import Linear, columns, is_linear, outputs
from llmcore.swap.norms import LayerNorm, RMSNorm
from llmcore.swap.structure import own_tensors


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
    """Its norms: one before each of the two, or one behind each too, in the order of the pass.

    parallel  whether both read the same stream; they may have one norm for both then
    """

    attention: Attention
    feed_forward: FeedForward
    norms: tuple[nn.Module, ...]
    parallel: bool


@dataclass(frozen=True)
class Parts:
    """A decoder's modules.

    position           (positions, C), where they are learned; else `rotary` gives the angles
    kv_heads, head_width  of the cache
    interleaved_heads  whether one linear gives query, key and value of a head, then the next one's
    """

    embedding: nn.Embedding
    position: Tensor | None
    rotary: nn.Module | None
    layers: tuple[Layer, ...]
    norm: nn.Module
    head: nn.Module
    kv_heads: int
    head_width: int
    interleaved_heads: bool

    def norms(self) -> Iterator[Any]:
        for layer in self.layers:
            yield from (*layer.norms, *layer.attention.head_norms)
        yield self.norm


def parts_of(model: nn.Module, trace: Trace) -> Parts:
    """Unfit, with the reason, where the model has another structure."""
    own: Any = model
    backbone, head = own.base_model, own.get_output_embeddings()
    embedding = own.get_input_embeddings()
    if backbone is model or [*model.children()] != [backbone, head]:
        raise Unfit("it has more than a backbone and a head")
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        raise Unfit("its embedding is no plain one")
    children = trace.parts(backbone)
    while len(children) == 1 and not own_tensors(backbone):  # nothing but what it wraps
        (backbone,) = children
        children = trace.parts(backbone)
    stacks = [m for m in children if isinstance(m, nn.ModuleList)]
    norms = [m for m in children if is_norm(m)]
    others = [m for m in children if m not in (*stacks, *norms, embedding)]
    if not isinstance(head, Linear):
        raise Unfit(f"its head, a {type(head).__name__}, is no linear that was swapped")
    if (len(stacks), len(norms), len(others)) != (1, 1, 1):
        raise Unfit(
            "its parts are not an embedding, positions, layers and a norm before the head: it has "
            + ", ".join(described(m) for m in (*norms, *others))
        )
    layers = tuple(layer_of(layer, trace) for layer in stacks[0])
    (place,) = others
    position = rotary = None
    if isinstance(place, nn.Embedding) and place.max_norm is None:
        position = positions_of(place, trace.output(place))
    elif list(inspect.signature(place.forward).parameters)[:2] == ["x", "position_ids"]:
        rotary = place
    else:
        raise Unfit("its positions are neither an embedding's nor rotary angles")
    _, kv_heads, _, head_width = trace.values.shape
    return Parts(
        embedding,
        position,
        rotary,
        layers,
        norms[0],
        head,  # type: ignore[arg-type]
        kv_heads,
        head_width,
        interleaves(layers[0].attention, trace),
    )


def positions_of(table: nn.Embedding, found: Tensor) -> Tensor:
    """The rows of positions 0, 1, ... by what the table gave for the first few (1 or B, T, C)."""
    rows, weight = found[0], table.weight.detach()
    starts = (weight[: len(weight) - len(rows) + 1] == rows[0]).all(-1).nonzero().flatten().tolist()
    starts = [i for i in starts if torch.equal(weight[i : i + len(rows)], rows)]
    if len(starts) != 1:
        raise Unfit("its positions are not one row of a table after the other")
    return weight[starts[0] :]


def interleaves(attention: Attention, trace: Trace) -> bool:
    """Whether heads are interleaved in a projection, by where the cache's values come from."""
    *_, kv_heads, length, width = trace.values.shape
    projected, values = trace.output(attention.qkv[-1]), trace.values.transpose(1, 2)
    if projected.shape[-1] % width == 0:
        heads = projected[:, projected.shape[1] - length :].unflatten(-1, (-1, width))
        if torch.equal(heads[:, :, -kv_heads:], values):
            return False
        if len(attention.qkv) == 1 and torch.equal(heads[:, :, 2::3], values):
            return True
    raise Unfit("its cache's values are not the last third, or each third head, of a projection")


def layer_of(layer: nn.Module, trace: Trace) -> Layer:
    children = trace.parts(layer)
    norms = tuple(m for m in children if is_norm(m))
    found = {m: a for m in children if (a := attention_of(m, trace)) is not None}
    rest = [m for m in children if m not in norms and m not in found]
    network = feed_forward_of(rest[0], trace) if len(rest) == 1 else plain_network(rest)
    if len(found) != 1 or network is None:
        unknown = rest if network is None else children
        raise Unfit(
            "a layer is not attention and a feed-forward network of known parts: it has "
            + ", ".join(described(m) for m in unknown)
        )
    (attention,) = found.values()
    if not norms or trace.inputs.get(attention.qkv[0]) is not trace.output(norms[0]):
        raise Unfit("a layer's attention does not read what its first norm gives")
    stream = trace.inputs[norms[0]]
    parallel = len(norms) == 1 or (stream is not None and trace.inputs.get(norms[1]) is stream)
    if len(norms) not in ((1, 2) if parallel else (2, 4)):
        raise Unfit(f"a layer has {len(norms)} norms, not one before (and one behind) each part")
    return Layer(attention, network, norms, parallel)


def described(module: nn.Module) -> str:
    """Its class, and what it is made of."""
    inside = [*own_tensors(module), *dict.fromkeys(type(m).__name__ for m in module.children())]
    return type(module).__name__ + (f" ({', '.join(inside)})" if inside else "")


def attention_of(module: nn.Module, trace: Trace) -> Attention | None:
    children = trace.parts(module)
    linears = [m for m in children if is_linear(m)]
    norms = tuple(m for m in children if isinstance(m, RMSNorm))
    fits = len(linears) in (2, 4) and len(norms) in (0, 2) and not own_tensors(module)
    if not fits or len(children) != len(linears) + len(norms):
        return None
    return Attention(module, tuple(linears[:-1]), linears[-1], norms)


def feed_forward_of(module: nn.Module, trace: Trace) -> FeedForward | None:
    if isinstance(module, GatedMLP):
        gate, up, down = module._llmcore_roles
        activation = {"silu": "swiglu", "gelu_tanh": "geglu"}.get(module._llmcore_activation)
        if activation is None or not module._llmcore_gate_first:
            return None
        parts: Any = module._modules
        both = (parts[gate],) if up is None else (parts[gate], parts[up])
        return FeedForward(both, parts[down], activation)  # type: ignore[arg-type]
    return None if own_tensors(module) else plain_network(trace.parts(module))


def plain_network(parts: Sequence[nn.Module]) -> FeedForward | None:
    """Of two linears, in the order of the pass, and an activation."""
    linears = [m for m in parts if is_linear(m)]
    names = [name for m in parts if (name := activation_of(m)) is not None]
    if (len(linears), len(names), len(parts)) != (2, 1, 3):
        return None
    return FeedForward((linears[0],), linears[1], names[0])


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
    first, width = parts.layers[0], parts.head_width
    heads = columns(first.attention.output) // width
    rows = sum(outputs(m) for m in first.attention.qkv)
    if heads * width != columns(first.attention.output):
        raise Unfit("its attention's output is not of whole heads")
    if rows != (heads + 2 * parts.kv_heads) * width:
        raise Unfit("queries, keys and values don't fit to the width of a head")
    norms_of_a_layer = of_all("norms", [len(layer.norms) for layer in parts.layers])
    is_parallel = of_all("the order of their parts", [layer.parallel for layer in parts.layers])
    has_head_norms = of_all("norms", [len(x.attention.head_norms) > 0 for x in parts.layers])
    if has_head_norms and parts.interleaved_heads:
        raise Unfit("its heads are interleaved, and have norms")
    return TransformerConfig(
        vocab_size=max(parts.embedding.num_embeddings, outputs(parts.head)),
        width=parts.embedding.embedding_dim,
        layers=len(parts.layers),
        heads=heads,
        kv_heads=parts.kv_heads,
        head_width=width,
        feed_forward=columns(first.feed_forward.down),
        context_length=1 << 30 if parts.position is None else len(parts.position),
        norm="rms_norm" if is_rms else "layer_norm",
        norm_eps=of_all("eps", [norm._llmcore_eps for norm in norms]),
        norm_offset=is_rms and of_all("1 + weight", [norm._llmcore_plus_one for norm in norms]),
        norm_placement="parallel" if is_parallel else "pre" if norms_of_a_layer == 2 else "both",
        qk_norm=has_head_norms,
        activation=of_all("activation", [x.feed_forward.activation for x in parts.layers]),
        positions="rope" if parts.position is None else "learned",
        rotary_width=rotary_width_of(parts),
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


def rotary_width_of(parts: Parts) -> int | None:
    """How many of a head's values are turned; None without angles."""
    if parts.rotary is None:
        return None
    width = angles(parts.rotary, torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1]
    if width > parts.head_width or width % 2:
        raise Unfit(f"its angles are for {width} of a head's {parts.head_width}")
    return width


def angles(
    rotary: nn.Module, positions: Tensor, *, of_windows: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin (1, T, R), float32, of positions (1, T); some have others where windows are."""
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
    scalars = [b.to(weight.dtype).item() for b in embedding.buffers(recurse=False) if b.ndim == 0]
    scalars += [value for value in vars(embedding).values() if isinstance(value, float)]
    for scale in (1.0, *scalars):
        if torch.equal(found, plain * scale):
            return scale
    raise Unfit("its embedding gives no multiple of its rows")
