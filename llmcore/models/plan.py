"""A decoder's pass over a KV cache as one native call (csrc/cpu/decoder.cpp).

Module by module a pass costs some ten calls from Python in each layer, which is most of the time
of a small model's token. The plan knows where all weights lie, and hands them over at once; the
kernels are those that the modules call, in the same order, and so the bits are the same.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcore import device, dispatch, native
from llmcore.models.block import Attention, Block, FeedForward
from llmcore.models.cache_base import Cache
from llmcore.models.config import TransformerConfig
from llmcore.models.kv_buffers import Buffers
from llmcore.models.layers import Embedding, Linear, Norm, Packable
from llmcore.models.positions import rotations
from llmcore.ops.packed_weight import PackedWeight

if TYPE_CHECKING:
    from llmcore.models.transformer import Decoder

# Modules that a plan stands for: where one is of another class, it does something of its own.
KNOWN = (Attention, Block, Embedding, FeedForward, Linear, Norm, nn.Embedding, nn.ModuleList)
# What the native pass computes by, in every form it takes; other options only as by default.
SIZES = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "feed_forward",
         "context_length", "norm_eps", "rope_theta", "bias", "qkv_bias", "tied_embeddings",
         "window", "full_every", "window_rope_theta", "attention_scale", "attention_softcap",
         "logit_softcap", "embedding_scale", "head_bias", "norm", "norm_offset",
         "qk_norm", "rotary_width")  # fmt: skip
CHOICES = {
    "activation": ("swiglu", "geglu", "gelu", "gelu_tanh", "relu"),
    "positions": ("rope", "learned"),
    "norm_placement": ("pre", "both", "parallel"),
}
NOT_ITS_BUSINESS = ("eos_ids", "start_id", "token_types", "outputs")


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where a pass's tokens stand in the buffers, from `start` to `end` unless tensors say more.

    starts     (B,): the slot of each sequence's first new token
    lengths    (B,): its slots with the new ones
    positions  (B,): the position of its first new token; None: as the slot
    table, page_length  pages, as in paged attention
    """

    start: int
    end: int
    starts: Tensor | None = None
    lengths: Tensor | None = None
    positions: Tensor | None = None
    table: Tensor | None = None
    page_length: int = 0


class Plan:
    """The native pass of one model at one level of instructions.

    It holds the weights' memory: weights that are changed in place count, tensors put in the place
    of a few do not (make it anew then, by a new cache); those of all, as `model.to` does, are seen.
    """

    interleaved_heads = False  # whether qkv's rows are query, key and value of each head in turn

    def __init__(self, model: Decoder, backend: str) -> None:
        assert native.module is not None
        config = model.config
        self.model, self.backend = model, backend
        assert model.norm is not None
        self.dtype = model.dtype
        self.begins = _begins(model)
        self.tensors: list[Tensor] = []
        none = torch.empty(0, 0)
        self._angles = {of_windows: (none, none) for of_windows in (False, True)}
        self._buffers: Buffers | None = None
        self._held: dict[str, Any] = {}  # what the native call is told of them
        position = model.position_embedding
        embedding = self._linear(model.embedding)
        head = model.embedding if model.head is None else model.head
        self._native = native.module.DecoderPlan(
            level=_level(backend),
            embedding=embedding,
            head=self._linear(head, model.head_bias),
            position_embedding=self._at(None if position is None else position.weight),
            layers=[self._layer(i, block) for i, block in enumerate(model.blocks)],
            norm=self._norm(model.norm),
            width=config.width,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            rotary_width=config.rotated,
            eps=config.norm_eps,
            scale=config.attention_scale or config.head_width**-0.5,
            softcap=config.attention_softcap or 0.0,
            embedding_scale=config.embedding_scale,
            plus_one=config.norm_offset,
            parallel=config.norm_placement == "parallel",
            interleaved_heads=self.interleaved_heads,
            activation=getattr(native.module.Activation, config.activation),
            dtype=_dtype(self.dtype),
        )
        _settle(model, self.tensors)

    @classmethod
    def of(cls, model: Decoder, cache: Cache) -> Plan | None:
        """The plan of this pass, kept with the cache; None when there is a reason against it."""
        if refuses_call() or refuses_cache(model, cache):
            return None
        backend = dispatch.forced or "cpu"
        plan = cache.plan
        kept = plan is not None and plan.model is model and plan.backend == backend
        if not kept or plan.begins != _begins(model):
            refused = refuses_config(model.config) or refuses_model(model)
            plan = None if refused else cls(model, backend)
            cache.plan = plan
        return plan

    def logits(self, ids: Tensor, cache: Cache, counts: Tensor | None, last_only: bool) -> Tensor:
        """What Decoder.forward gives for ids (B, T) whose first counts[b] tokens are sequence b's.

        (B, 1, V) for each sequence's last token, or (B, T, V). IndexError for an id outside of the
        vocabulary.
        """
        batch, new = ids.shape
        config = self.model.config
        logits = torch.empty(batch, 1 if last_only else new, config.vocab_size, dtype=self.dtype)
        span = cache.reserve(new, logits, counts)
        ids = ids.to(torch.int64).contiguous()
        last = None
        if last_only and new > 1:
            last = torch.full((batch,), new - 1) if counts is None else (counts - 1).clamp(min=0)
        starts = span.q_offset if isinstance(span.q_offset, Tensor) else None
        positions = None  # as the slots, unless a window has let tokens go
        if config.window is not None:
            first = span.first
            positions = first if isinstance(first, Tensor) else torch.full((batch,), first)
        slots = Slots(
            start=0 if starts is not None else span.q_offset,  # type: ignore[arg-type]
            end=span.end,
            starts=starts,
            lengths=span.kv_lengths,
            positions=positions,
            table=getattr(span, "table", None),
            page_length=getattr(cache, "page_length", 0),
        )
        if cache.buffers is not self._buffers:
            self._buffers, self._held = cache.buffers, _held(cache.buffers, cache.dtype)
        self._forward(ids, logits, slots, last, len(cache) + new, **self._held)
        cache.commit(span)
        return self.model.capped(logits)

    def _forward(
        self,
        ids: Tensor,
        logits: Tensor,
        slots: Slots,
        last: Tensor | None,
        longest: int,
        **buffers: Any,
    ) -> None:
        """The native call; longest: the position behind the last one of any sequence."""
        cos, sin = self._angles_to(longest)
        window_cos = window_sin = None
        if self._has_window_angles:
            window_cos, window_sin = self._angles_to(longest, of_windows=True)
        table = slots.table
        self._native.forward(
            ids=ids.data_ptr(),
            logits=logits.data_ptr(),
            batch=ids.shape[0],
            tokens=ids.shape[1],
            start=slots.start,
            end=slots.end,
            starts=address(slots.starts),
            positions=address(slots.positions),
            kv_lengths=address(slots.lengths),
            last=address(last),
            cos=address(cos),
            sin=address(sin),
            window_cos=address(window_cos),
            window_sin=address(window_sin),
            page_table=address(table),
            page_columns=0 if table is None else table.shape[1],
            page_length=slots.page_length,
            **buffers,
        )

    def _angles_to(self, end: int, *, of_windows: bool = False) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions below `end`, and of some more: computed once."""
        cos, sin = self._angles[of_windows]
        if cos.shape[0] < end and self.model.position_embedding is None:
            count = min(2 * end, max(end, self.model.config.context_length))
            cos, sin = self._angles[of_windows] = self._rotations(torch.arange(count), of_windows)
        return cos, sin

    def _rotations(self, positions: Tensor, of_windows: bool) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 (positions, R / 2), contiguous."""
        config = self.model.config
        return rotations(config, positions, config.window_rope_theta if of_windows else None)

    @property
    def _has_window_angles(self) -> bool:
        """Whether layers with a window turn by angles of their own."""
        return self.model.config.window_rope_theta is not None

    def _layer(self, number: int, block: nn.Module) -> Any:
        assert native.module is not None and isinstance(block, Block)
        assert isinstance(block.feed_forward, FeedForward)
        window = self._window_of(number)
        return native.module.DecoderLayer(
            attention_norm=self._norm(block.attention_norm),
            qkv=self._linear(block.attention.qkv),
            output=self._linear(block.attention.output),
            feed_forward_norm=self._norm(block.feed_forward_norm),
            up=self._linear(block.feed_forward.up),
            down=self._linear(block.feed_forward.down),
            q_norm=self._norm(block.attention.q_norm),
            k_norm=self._norm(block.attention.k_norm),
            attention_after_norm=self._norm(block.attention_after_norm),
            feed_forward_after_norm=self._norm(block.feed_forward_after_norm),
            window=window,
            has_window_angles=window > 0 and self._has_window_angles,
        )

    def _window_of(self, number: int) -> int:
        """How many keys a query of this layer sees, 0: all."""
        return self.model.config.window_of(number) or 0

    def _norm(self, norm: Norm | None) -> Any:
        assert native.module is not None
        if norm is None:
            return _no_norm()
        return native.module.NormWeight(weight=self._at(norm.weight), bias=self._at(norm.bias))

    def _linear(self, module: Packable, bias: Tensor | None = None) -> Any:
        """With the bias of its own unless another one is given."""
        assert native.module is not None
        weight, bias = module.weight, getattr(module, "bias", None) if bias is None else bias
        packed = weight if isinstance(weight, PackedWeight) else None
        values = module.parameter if packed is None else packed.values
        scales = None if packed is None else packed.scales
        rows, width = weight.shape
        return native.module.LinearWeight(
            values=self._at(values),
            scales=self._at(scales),
            minimums=self._at(None if packed is None else packed.minimums),
            bias=self._at(bias),
            N=rows,
            K=width,
            group=0 if packed is None else packed.group,
            dtype=_dtype(values.dtype if scales is None else torch.float32),
            bias_dtype=_dtype(torch.float32 if bias is None else bias.dtype),
            int4=packed is not None and packed.format == "int4",
        )

    def _at(self, tensor: Tensor | None) -> int:
        """The tensor's address; it lives as long as the plan."""
        if tensor is None:
            return 0
        self.tensors.append(tensor.detach())  # a parameter's memory may be exchanged
        return tensor.data_ptr()


def _begins(model: Decoder) -> int:
    """Where the weights begin: elsewhere, once all of them were moved."""
    weight = model.embedding.weight
    return (weight.values if isinstance(weight, PackedWeight) else weight).data_ptr()


def refuses_call() -> list[str]:
    """Why no pass goes by a native call right now; empty when it may."""
    reasons = []
    if native.module is None:
        reasons.append(native.why_not)
    if torch.is_grad_enabled():
        reasons.append("gradients are recorded: wrap the pass in torch.no_grad()")
    if torch.is_autocast_enabled("cpu"):
        reasons.append("autocast is on")
    if torch.compiler.is_compiling():
        reasons.append("torch.compile traces the modules")
    if dispatch.forced is not None:
        if dispatch.forced.partition("_")[0] != "cpu":
            reasons.append(f"{dispatch.forced} is forced")
        elif native.module is not None and _level(dispatch.forced) is None:
            reasons.append(f"this machine doesn't run {dispatch.forced}")
    return reasons


def refuses_cache(model: Decoder, cache: Cache) -> list[str]:
    """Why passes over this cache go module by module; empty when they need not."""
    reasons = []
    if cache.dtype is not None and (dtype := model.dtype) != torch.float32:
        reasons.append(f"a cache in {cache.dtype} beside activations in {dtype}: float32 is needed")
    if model.training and model.config.dropout:
        reasons.append("dropout in training")
    if model.cross:
        reasons.append("cross-attention")
    return reasons


def refuses_model(model: Decoder) -> list[str]:
    """Why this model's passes go module by module; empty when they need not."""
    reasons = list(refuses_config(model.config))
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        tensors |= {f"{name}.{n}": t for n, t in module._parameters.items() if t is not None}
        if module is not model and type(module) not in KNOWN:
            reasons.append(f"{name} is a {type(module).__name__} of someone else's")
        if module._forward_hooks or module._forward_pre_hooks:
            reasons.append(f"{name or 'the model'} has a forward hook")
    reasons += native.refuses_tensors(*tensors.values())
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1:
        reasons.append(f"parameters of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    reasons += [f"{name} is not contiguous" for name, t in tensors.items() if not t.is_contiguous()]
    return reasons


@functools.lru_cache
def refuses_config(config: TransformerConfig) -> tuple[str, ...]:
    """What of a config the native pass doesn't know; empty when it knows all.

    An option that is not named here is known in its default only: a new one is refused.
    """
    reasons = []
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        known = name in (*SIZES, *NOT_ITS_BUSINESS, "dropout", "experts_per_token")
        if not known and value not in CHOICES.get(name, (field.default,)):
            reasons.append(f"{name} {value!r}: the native pass doesn't compute it")
    if config.qk_norm and config.norm != "rms_norm":
        reasons.append(f"qk_norm with {config.norm}: the native pass computes it by rms_norm")
    return tuple(reasons)


def _level(backend: str) -> int | None:
    """The number of a backend's level of instructions; None where this machine lacks it."""
    if backend == "cpu":
        return native.BEST_LEVEL
    levels = device.cpu_levels()
    level = backend.removeprefix("cpu_")
    return list(levels).index(level) if levels.get(level) == "" else None


@functools.lru_cache
def _no_norm() -> Any:
    """What stands for a norm that a model doesn't have."""
    assert native.module is not None
    return native.module.NormWeight(weight=0, bias=0)


@functools.lru_cache
def _dtype(dtype: torch.dtype) -> Any:
    assert native.module is not None
    return getattr(native.module.Dtype, str(dtype).removeprefix("torch."))


_settled: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


def _settle(model: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Its weights into huge pages, tried once for each place where they lie."""
    places = frozenset(t.data_ptr() for t in tensors)
    if _settled.get(model) != places:
        _settled[model] = places
        into_huge_pages(tensors)


def into_huge_pages(tensors: Sequence[Tensor]) -> int:
    """Their memory into huge pages, as csrc/huge_pages.h says: how many bytes are in such pages.

    A pass of few tokens is bound by reading the weights.
    """
    assert native.module is not None
    pieces = {(t.data_ptr(), t.nbytes) for t in tensors}  # a tied embedding is one
    moved: int = native.module.into_huge_pages(sorted(pieces))
    return moved


def address(tensor: Tensor | None) -> int:
    """Where the tensor lies, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def _held(buffers: Buffers, dtype: str | None) -> dict[str, Any]:
    """What the native pass is told of a cache: a cache that moves has other buffers."""
    assert native.module is not None
    lists = (buffers.keys, buffers.values, buffers.key_scales, buffers.value_scales)
    names = {None: "same", "bf16": "bfloat16", "int8": "int8"}
    return {
        "buffers": [[tensor.data_ptr() for tensor in tensors] for tensors in lists],
        "kv_dtype": getattr(native.module.KvDtype, names[dtype]),
        "cache_strides": buffers.keys[0].stride()[:3],
        "scale_strides": buffers.key_scales[0].stride() if buffers.key_scales else (0, 0, 0),
    }
