"""A whole pass of a decoder over transformers' cache as one native call.

Of a model whose parts are an embedding, layers of norm, rotary attention, norm and gated network, a
norm and a head, each swapped already, a `models.Decoder` is made over the same memory: where it
holds queries, keys and values (or gate and up) as one matrix, the model's parameters become views
of that one. Its native pass (models/plan.py) then runs on buffers of which the cache's own tensors
are views, so that whoever looks into the cache, crops or reorders it finds what he expects.

Anything out of the ordinary (gradients, a hook on a part, a part that was replaced, a cache of
another kind, a mask that is more than padding on the left) goes the model's own way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmcore import native
from llmcore.models.block import Block
from llmcore.models.config import TransformerConfig
from llmcore.models.plan import Plan, refuses_call, refuses_model
from llmcore.models.transformer import Decoder
from llmcore.ops.packed_weight import PANEL, PackedWeight
from llmcore.swap.attention import RotaryAttention, small_inputs
from llmcore.swap.instance import Swapped
from llmcore.swap.loss import argument_names
from llmcore.swap.modules import GatedMLP, Linear, RMSNorm, has_hooks
from llmcore.swap.structure import difference, largest

IGNORED = {"use_cache": (True,), "return_dict": (True, None)}
"""Arguments of a pass that change nothing at these values, beside those that are None or False."""


class Unfit(Exception):
    """Why this model has no native pass."""


# The parts


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


# The same memory as a Decoder


def shared_decoder(config: TransformerConfig, parts: Parts) -> Decoder:
    """A Decoder whose parameters are the model's own; several of them become one matrix."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.embedding.weight = parts.embedding.weight  # type: ignore[assignment]
    decoder.norm.weight = parts.norm.weight  # type: ignore[assignment]
    assert decoder.head is not None
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


class SharedPlan(Plan):
    """The native pass of a shared decoder; its angles are the model's."""

    def __init__(self, decoder: Decoder, backend: str, rotary: nn.Module, scale: float) -> None:
        default = decoder.config.head_width**-0.5
        if abs(scale - default) > 1e-6 * default:
            raise Unfit("its scores are scaled in a way of its own")
        self.rotary = rotary
        assert decoder.head is not None
        self.vocabulary = decoder.head.weight.shape[0]
        if getattr(rotary, "rope_type", "default") in ("dynamic", "longrope"):
            raise Unfit("its angles depend on the length of the text")
        super().__init__(decoder, backend)

    def angles_to(self, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 (positions, D / 2), of at least the positions below `end`."""
        if len(self._angles[0]) < end:
            like = torch.empty(1, 1, 1, dtype=torch.float32)
            positions = torch.arange(max(2 * end, 256))[None]
            half = self.model.config.head_width // 2
            cos, sin = self.rotary(like, positions)
            self._angles = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return self._angles

    def run(
        self, ids: Tensor, logits: Tensor, buffers: Held, slots: Slots, last: Tensor | None
    ) -> None:
        """Fill the logits of these tokens, and the buffers with their keys and values."""
        cos, sin = self.angles_to(slots.end)
        strides = buffers.keys[0].stride()[:3]
        if slots.table is not None:
            strides = (self.model.config.head_width, *strides[1:])
        addresses = [[t.data_ptr() for t in tensors] for tensors in (buffers.keys, buffers.values)]
        self._native.forward(
            ids=ids.data_ptr(),
            logits=logits.data_ptr(),
            batch=ids.shape[0],
            tokens=ids.shape[1],
            start=slots.start if slots.starts is None else 0,
            end=slots.end,
            starts=address(slots.starts),
            positions=0,
            kv_lengths=address(slots.lengths),
            last=address(last),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            buffers=[*addresses, [], []],
            kv_dtype=native.module.KvDtype.same,  # type: ignore[union-attr]
            cache_strides=strides,
            scale_strides=(0, 0, 0),
            page_table=address(slots.table),
            page_columns=0 if slots.table is None else 1,
            page_length=0 if slots.table is None else buffers.capacity,
        )


@dataclass(frozen=True)
class Slots:
    """Where a pass's tokens go: from `start` to `end`, or each sequence behind its padding.

    starts, lengths  (B,): the slot of a sequence's first new token, and its tokens with them
    table            (B, 1): where its slots begin, in vectors of D
    """

    start: int
    end: int
    starts: Tensor | None = None
    lengths: Tensor | None = None
    table: Tensor | None = None


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# transformers' cache


@dataclass
class Held:
    """Buffers (B, G, capacity, D) of a cache's layers, and the views of them that it holds."""

    keys: list[Tensor]
    values: list[Tensor]
    views: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def is_held_by(self, layers: Sequence[Any]) -> bool:
        return len(self.views) == len(layers) and all(
            layer.keys is keys and layer.values is values
            for layer, (keys, values) in zip(layers, self.views, strict=True)
        )

    def show(self, layers: Sequence[Any], length: int) -> None:
        """Make the cache's tensors the views of the first `length` tokens."""
        self.views = []
        for layer, k, v in zip(layers, self.keys, self.values, strict=True):
            keys, values = k[:, :, :length], v[:, :, :length]
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            self.views.append((keys, values))


def held(cache: Any, config: TransformerConfig, batch: int, new: int, dtype: torch.dtype) -> Held:
    """Buffers with room for `new` more tokens, that hold what the cache holds."""
    layers, length = cache.layers, cache.get_seq_length()
    found = vars(cache).get("_llmcore_held")
    if found is not None and found.is_held_by(layers) and length + new <= found.capacity:
        return found
    capacity = max(2 * length, length + new + 64)
    shape = (batch, config.kv_heads, capacity, config.head_width)
    made = Held(
        [torch.zeros(shape, dtype=dtype) for _ in layers],
        [torch.zeros(shape, dtype=dtype) for _ in layers],
    )
    if length:
        for layer, keys, values in zip(layers, made.keys, made.values, strict=True):
            keys[:, :, :length] = layer.keys
            values[:, :, :length] = layer.values
    cache._llmcore_held = made
    return made


# The pass


@dataclass(frozen=True)
class Call:
    """The arguments of a pass that has a native way."""

    ids: Tensor  # (B, T) int64
    cache: Any
    pads: Tensor | None  # (B,): what pads each sequence on its left; None: nothing does
    last_only: bool


class Passes:
    """A model's native passes; made anew where it is copied, for memory is not shared then."""

    def __init__(self) -> None:
        self.plan: SharedPlan | None = None
        self.parts: Parts | None = None
        self.output: type | None = None
        self.why_not = ""
        self.count = 0
        self._watched: list[nn.Module] = []
        self._children: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._seen: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        return Passes()

    def __reduce__(self) -> Any:
        return Passes, ()

    def run(self, model: nn.Module, arguments: Mapping[str, Any]) -> Any:
        """The model's output, or None where this call goes the model's own way."""
        if self.why_not or self.output is None or refuses_call():
            return None
        call = call_of(model, arguments)
        if call is None or not self._ready(model):
            return None
        assert self.plan is not None
        if len(call.cache.layers) != self.plan.model.config.layers:
            return None
        logits = self._logits(call)
        self.count += 1
        return self.output(logits=logits, past_key_values=call.cache)

    def build(self, model: nn.Module) -> None:
        """Unfit where the model has no native pass."""
        self.parts = parts_of(model)
        config, scale = config_of(model, self.parts)
        decoder = shared_decoder(config, self.parts)
        if reasons := refuses_model(decoder):
            raise Unfit(reasons[0])
        self.plan = SharedPlan(decoder, "cpu", self.parts.rotary, scale)
        self._watched = [*model.modules()][1:]
        self._children = [(m._modules, dict(m._modules)) for m in model.modules() if m._modules]
        self._seen = self._state()

    def _ready(self, model: nn.Module) -> bool:
        """Whether the model is still what the plan was made of; the plan is made at first."""
        if self.plan is None:
            try:
                self.build(model)
            except Unfit as reason:
                self.why_not = str(reason)
                return False
        return self._state() == self._seen and self._unchanged()

    def _state(self) -> tuple[Any, ...]:
        """Where every weight lies: memory that was replaced is not the plan's."""
        found: list[Any] = []
        for module in self._watched:
            for parameter in module._parameters.values():
                found.append(None if parameter is None else parameter.data_ptr())
            found.append(id(module.__dict__.get("_llmcore_packed")))
        return tuple(found)

    def _unchanged(self) -> bool:
        """Whether the modules are the same ones, and nobody wants to see their calls."""
        for children, kept in self._children:
            if children != kept:
                return False
        return not any(has_hooks(module) for module in self._watched)

    def _logits(self, call: Call) -> Tensor:
        """(B, 1 or T, V); what padding gives means nothing."""
        plan = self.plan
        assert plan is not None
        config = plan.model.config
        (batch, new), start = call.ids.shape, call.cache.get_seq_length()
        buffers = held(call.cache, config, batch, new, plan.dtype)
        ids, last = call.ids.contiguous(), None
        if call.last_only:
            last = torch.full((batch,), new - 1)
        slots = Slots(start, start + new)
        if call.pads is not None:
            # A sequence's slots begin behind its padding: a page for each, that starts there.
            first = buffers.keys[0].stride(0) // config.head_width
            table = torch.arange(batch) * first + call.pads
            starts = (start - call.pads).clamp(min=0)
            slots = Slots(start, start + new, starts, start + new - call.pads, table)
            if start == 0:  # tokens to the front of their row
                places = (torch.arange(new) + call.pads[:, None]).clamp(max=new - 1)
                ids = ids.gather(1, places)
                last = None if last is None else last - call.pads
        rows = 1 if call.last_only else new
        logits = torch.empty(batch, rows, plan.vocabulary, dtype=plan.dtype)
        plan.run(ids, logits, buffers, slots, last)
        buffers.show(call.cache.layers, start + new)
        if call.pads is not None and start == 0 and not call.last_only:
            back = (torch.arange(new) - call.pads[:, None]).clamp(min=0)
            logits = logits.gather(1, back[..., None].expand_as(logits))
        return logits


def call_of(model: nn.Module, arguments: Mapping[str, Any]) -> Call | None:
    """The call as a native pass takes it; None where it is out of the ordinary."""
    config: Any = model.config
    named = dict(arguments)
    ids, cache = named.pop("input_ids", None), named.pop("past_key_values", None)
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
    if not is_plain_cache(cache):
        return None
    start = cache.get_seq_length()
    if start and cache.layers[0].keys.shape[0] != ids.shape[0]:
        return None
    pads = padding_on_the_left(mask, ids.shape[0], start, ids.shape[1])
    if pads is False or not positions_fit(positions, pads, start, ids.shape[1]):
        return None
    return Call(ids, cache, pads, keep == 1)  # type: ignore[arg-type]


def is_plain_cache(cache: Any) -> bool:
    """Whether it is a DynamicCache, all of whose layers keep every token."""
    if cache is None:
        return False
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return type(cache) is DynamicCache and all(type(x) is DynamicLayer for x in cache.layers)


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


class CausalDecoder(Swapped):
    """A model whose passes over a cache may go by a native call."""

    _llmcore_passes: Passes

    @classmethod
    def members(cls, original: type[nn.Module]) -> Mapping[str, Any]:
        theirs = original.forward

        @functools.wraps(theirs)
        def forward(self: Any, *args: Any, **named: Any) -> Any:
            passes = self._llmcore_passes
            if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                if args:
                    named = dict(zip(argument_names(theirs), args, strict=False)) | named
                    args = ()
                result = passes.run(self, named)
                if result is not None:
                    return result
            result = theirs(self, *args, **named)
            if passes.output is None and isinstance(result, Mapping):
                passes.output = type(result)
            return result

        return {"forward": forward}


def has_passes(model: Any) -> bool:
    """Whether the model is transformers' and generates over a cache."""
    names = ("base_model", "get_output_embeddings", "get_input_embeddings", "can_generate")
    return (
        all(hasattr(model, name) for name in names)
        and model.get_output_embeddings() is not None
        and not getattr(model.config, "is_encoder_decoder", False)
        and {"input_ids", "past_key_values"} <= set(argument_names(type(model).forward))
    )


def checked(model: Any) -> tuple[Callable[[], None], float]:
    """Build the model's passes and hold them against its own; what undoes it, and their error.

    Unfit where there is a reason, or they differ: a prefill and two tokens after it, without
    padding and with it.
    """
    passes: Passes = model._llmcore_passes
    training = [m for m in model.modules() if m.training]
    whole = {id(p) for p in model.parameters() if is_whole(p)}

    def undo() -> None:
        for parameter in model.parameters():
            if id(parameter) in whole and not is_whole(parameter):
                parameter.data = parameter.data.clone()

    model.eval()
    try:
        expected = generated(model)
        passes.build(model)
        count, found = passes.count, generated(model)
        if passes.count == count:
            raise Unfit("its calls have arguments that a native pass has no way for")
        if (error := difference(found, expected)) > ROUNDINGS:
            raise Unfit(f"{error:.0f} times what rounding explains")
    except Exception:
        undo()
        raise
    finally:
        for module in training:
            module.training = True
    return undo, largest(found, expected)


def is_whole(parameter: Tensor) -> bool:
    """Whether its memory is its own, and not a part of a matrix's with others."""
    return parameter.untyped_storage().nbytes() == parameter.nbytes


ROUNDINGS = 5.0


@torch.no_grad()
def generated(model: Any) -> list[Tensor]:
    """Logits of a prefill and of two tokens after it, for inputs with and without padding."""
    from transformers.cache_utils import DynamicCache

    found = []
    for arguments in small_inputs(model):
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        valid = torch.ones_like(ids) if mask is None else mask
        if not valid[:, -1].all():
            continue  # on the right: nobody goes on from there
        cache = DynamicCache(config=model.config)
        for step in range(3):
            positions = (valid.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            logits = model(
                input_ids=ids,
                attention_mask=valid,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).logits
            found.append(logits[valid[:, -ids.shape[1] :].bool()])
            ids = arguments["input_ids"][:, step : step + 1]
            valid = torch.cat((valid, torch.ones_like(ids)), -1)
    return found
