"""A whole pass of a decoder over transformers' cache as one native call.

Of a model whose parts are an embedding, layers of norms, attention and a feed-forward network, a
norm and a head (`decoder_parts`), a `models.Decoder` is made over the same memory
(`decoder_weights`). Its native pass (models/plan.py) then runs on buffers of which the cache's own
tensors are views, so that whoever looks into the cache, crops or reorders it finds what he expects.

Anything out of the ordinary (gradients, a hook on a part, a part that was replaced, a cache of
another kind, a mask that is more than padding on the left) goes the model's own way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.models.plan import Slots, refuses_call, refuses_model
from llmcore.swap.attention import small_inputs
from llmcore.swap.decoder_cache import CACHE_NAMES, held, new_cache, windows_of
from llmcore.swap.decoder_call import Call, call_of
from llmcore.swap.decoder_parts import config_of, parts_of, settings_of
from llmcore.swap.decoder_plan import SharedPlan
from llmcore.swap.decoder_trace import Unfit, cache_argument, traced
from llmcore.swap.decoder_weights import shared_decoder, way_back
from llmcore.swap.instance import Swapped, has_hooks
from llmcore.swap.linears import up_to_date
from llmcore.swap.loss import argument_names
from llmcore.swap.structure import difference, largest


class Passes:
    """A model's native passes; made anew where it is copied, for memory is not shared then."""

    def __init__(self) -> None:
        self.plan: SharedPlan | None = None
        self.output: type | None = None
        self.cache_name = ""  # of the output's field
        self.why_not = ""
        self.count = 0
        self.paused = False  # while the model's own way is asked for
        self.drops = True  # whether there is dropout in training
        self._watched: list[nn.Module] = []
        self._children: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._seen: tuple[Any, ...] = ()
        self._packed: tuple[int, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        return Passes()

    def __reduce__(self) -> Any:
        return Passes, ()

    def run(self, model: nn.Module, arguments: Mapping[str, Any]) -> Any:
        """The model's output, or None where this call goes the model's own way."""
        if self.paused or self.why_not or self.output is None or refuses_call():
            return None
        if model.training and self.drops:
            return None
        call = call_of(model, arguments)
        if call is None:
            return None
        if call.cache.get_seq_length() == 0:  # once for a text, for it takes as long as a layer
            for module in self._watched:
                if module.__dict__.get("_llmcore_packed") is not None:
                    up_to_date(module)
        if not self._ready(model):
            return None
        assert self.plan is not None
        end = call.cache.get_seq_length() + call.ids.shape[1]
        if call.windows != self.plan.windows or end > self.plan.longest:
            return None
        logits = self._logits(call)
        self.count += 1
        return self.output(logits=logits, **{self.cache_name: call.cache if call.is_kept else None})

    def keep_output(self, output: type) -> None:
        """What the model's passes give, and what it calls the cache in it."""
        fields = {field.name for field in dataclasses.fields(output)}
        name = next((name for name in CACHE_NAMES if name in fields), None)
        if name is None or "logits" not in fields:
            self.why_not = f"its output, {output.__name__}, has no field for logits and a cache"
        else:
            self.output, self.cache_name = output, name

    def build(self, model: nn.Module) -> None:
        """Unfit where the model has no native pass."""
        paused, self.paused = self.paused, True
        try:
            trace = traced(model)
        finally:
            self.paused = paused
        parts = parts_of(model, trace)
        config = config_of(model, parts)
        windows = windows_of(new_cache(model.config))
        if windows is None or len(windows) != config.layers:
            raise Unfit("its cache is no plain one")
        decoder = shared_decoder(config, parts)
        if reasons := refuses_model(decoder):
            raise Unfit(reasons[0])
        self.plan = SharedPlan(
            decoder, "cpu", parts.rotary, windows, interleaved_heads=parts.interleaved_heads
        )
        settings = settings_of(model)
        self.drops = any("drop" in name and value for name, value in settings.items())
        self._watched = [*model.modules()][1:]
        self._children = [(m._modules, dict(m._modules)) for m in model.modules() if m._modules]
        self._seen, self._packed = self._addresses(), self._packed_ones()

    def _ready(self, model: nn.Module) -> bool:
        """Whether the model is still what the plan was made of; the plan is made at first."""
        if self.plan is not None:
            if self._addresses() != self._seen or not self._unchanged():
                return False
            if self._packed_ones() == self._packed:
                return True
            self.plan = None  # of the same weights, which have other values by now
        try:
            self.build(model)
        except (Unfit, *OF_OTHERS) as reason:
            self.why_not = str(reason)
            return False
        return self._unchanged()

    def _addresses(self) -> tuple[Any, ...]:
        """Where every weight lies: memory that was replaced is not the plan's."""
        return tuple(
            None if parameter is None else parameter.data_ptr()
            for module in self._watched
            for parameter in module._parameters.values()
        )

    def _packed_ones(self) -> tuple[int, ...]:
        """Which packed weights there are."""
        return tuple(id(module.__dict__.get("_llmcore_packed")) for module in self._watched)

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
            lengths = start + new - call.pads
            slots = Slots(
                0, start + new, starts, lengths, table=table[:, None], page_length=buffers.capacity
            )
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
        return plan.model.capped(logits)


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
                passes.keep_output(type(result))
            return result

        return {"forward": forward}


def generates(model: Any) -> bool:
    """Whether the model is one of transformers' that write text, and no encoder-decoder."""
    names = ("base_model", "get_output_embeddings", "get_input_embeddings", "can_generate")
    return (
        all(hasattr(model, name) for name in names)
        and bool(model.can_generate())
        and not getattr(model.config, "is_encoder_decoder", False)
    )


def checked(model: Any) -> tuple[Callable[[], None], float]:
    """Build the model's passes and hold them against its own; what undoes it, and their error.

    Unfit where there is a reason, or they differ: a prefill and two tokens after it, without
    padding and with it.
    """
    passes: Passes = model._llmcore_passes
    training = [m for m in model.modules() if m.training]
    undo, strides = way_back(model), [p.stride() for p in model.parameters()]
    model.eval()
    try:
        passes.paused = True
        expected = generated(model)
        passes.paused = False
        passes.build(model)
        if passes.why_not:
            raise Unfit(passes.why_not)
        count, found = passes.count, generated(model)
        if passes.count == count:
            raise Unfit("its calls have arguments that a native pass has no way for")
        if (error := difference(found, expected)) > ROUNDINGS:
            raise Unfit(
                f"its logits differ by {error:.0f} times what rounding explains: something is "
                "computed that its parts don't show"
            )
        if strides != [p.stride() for p in model.parameters()]:
            # Gradients of parameters that lie transposed are copied: not before text is written.
            undo()
            passes.plan = None
    except Exception:
        undo()
        raise
    finally:
        for module in training:
            module.training = True
    return undo, largest(found, expected)


ROUNDINGS = 5.0

OF_OTHERS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What another library's parts may raise where they are not what they are taken for."""


@torch.no_grad()
def generated(model: Any) -> list[Tensor]:
    """Logits of a prefill and of two tokens after it, for inputs with and without padding."""
    from transformers.cache_utils import DynamicCache

    found, cache_name = [], cache_argument(model)
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
                use_cache=True,
                **{cache_name: cache},
            ).logits
            found.append(logits[valid[:, -ids.shape[1] :].bool()])
            ids = arguments["input_ids"][:, step : step + 1]
            valid = torch.cat((valid, torch.ones_like(ids)), -1)
    return found
