"""A head and its cross entropy in one, in training: many logits are never whole.

transformers' models for text end in `head(hidden)` and `loss_function(logits, labels)`. Where that
function is the plain cross entropy, of each next token or of each token, the two are one op. The
output still has `logits`: they are computed when somebody asks for them.

The op multiplies with the head's matrix once more than with kept logits, on the way back. Few
logits are not worth that: they are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore import ops
from llmcore.swap.attention import small_inputs
from llmcore.swap.decoder_cache import CACHE_NAMES
from llmcore.swap.instance import Swapped, has_hooks
from llmcore.swap.linears import Linear
from llmcore.swap.structure import Refusal, difference, draw, largest

OF_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Arguments that transformers hands on to the loss."""

PLAIN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
"""Arguments that the backbone takes and the loss doesn't; others may mean another loss."""

FEW_LOGITS = 1 << 24
"""So many are kept: 64 MiB, beside which a step has as much in other activations."""

MODEL_ROUNDINGS = 5.0


class HeadLoss(Swapped):
    """A model with a head whose loss is `linear_cross_entropy` in training."""

    _llmcore_loss: tuple[Callable[..., Tensor], bool]  # the loss function, whether labels shift
    _llmcore_loss_output: type

    @classmethod
    def members(cls, original: type[nn.Module]) -> Mapping[str, Any]:
        theirs = original.forward

        @functools.wraps(theirs)
        def forward(self: Any, *args: Any, **named: Any) -> Any:
            if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                if args:
                    named = dict(zip(argument_names(theirs), args, strict=False)) | named
                    args = ()
                if takes(self, named):
                    return fused(self, named)
            return theirs(self, *args, **named)

        return {"forward": forward}


@functools.cache
def argument_names(function: Any) -> tuple[str, ...]:
    """Of a method, without its object."""
    return tuple(inspect.signature(function).parameters)[1:]


def takes(model: Any, named: Mapping[str, Any]) -> bool:
    """Whether this call's loss is that of the op."""
    head = model.get_output_embeddings()
    function, _ = model._llmcore_loss
    parameter = next(model.base_model.parameters())
    known = ("labels", "use_cache", *CACHE_NAMES, *PLAIN, *OF_LOSS)
    asked = [n for n, v in named.items() if n not in known and v is not None and v is not False]
    asked += [n for n, v in vars(model.config).items() if n.startswith("output_") and v]
    if set(asked) - {"logits_to_keep", "return_dict"}:
        return False
    return (
        isinstance(named.get("labels"), Tensor)
        and model.loss_function is function
        and named.get("logits_to_keep") in (None, 0)
        and named.get("return_dict") is not False
        and model.config.return_dict
        and isinstance(head, Linear)
        and head._llmcore_packed is None
        and not has_hooks(head)  # type: ignore[arg-type]
        and type(head).forward is Linear.forward
        # The op gives a loss of its input's dtype, where theirs is always in float32.
        and parameter.dtype == torch.float32
        and not torch.is_autocast_enabled(parameter.device.type)
    )


def fused(model: Any, named: Mapping[str, Any]) -> Any:
    """The model's output, its loss by the op and its logits when asked for."""
    named = dict(named)
    labels, _ = named.pop("labels"), named.pop("logits_to_keep", None)
    named.pop("return_dict", None)
    options = {name: named.pop(name, None) for name in OF_LOSS}
    found = model.base_model(**named)
    hidden, head = found[0], model.get_output_embeddings()
    few = hidden.numel() // hidden.shape[-1] * head.weight.shape[0] <= FEW_LOGITS
    logits = head(hidden) if few else None

    def loss_of_labels(labels: Tensor, **options: Any) -> Tensor:
        if logits is not None:
            return ops.cross_entropy(logits.flatten(0, -2), labels, **options)
        rows, bias = hidden.flatten(0, -2), getattr(head, "bias", None)
        return ops.linear_cross_entropy(rows, head.weight, labels, bias, **options)

    loss = loss_of(loss_of_labels, labels.to(hidden.device), model._llmcore_loss[1], options)
    kind = lazy(model._llmcore_loss_output)
    fields = {f.name for f in dataclasses.fields(kind)} - {"loss", "logits"}
    output = kind(loss=loss, **{name: found[name] for name in fields if name in found})
    output._llmcore_logits = lambda: head(hidden) if logits is None else logits
    return output


def loss_of(
    function: Callable[..., Tensor], labels: Tensor, shifts: bool, options: Mapping[str, Any]
) -> Tensor:
    """A cross entropy of labels (B, T): the mean, or the sum over a given number of items."""
    ignored = -100 if options["ignore_index"] is None else options["ignore_index"]
    if shifts and options["shift_labels"] is not None:
        labels = options["shift_labels"].to(labels.device)
    elif shifts:
        labels = F.pad(labels, (0, 1), value=ignored)[..., 1:]
    items = options["num_items_in_batch"]
    reduction = "mean" if items is None else "sum"
    loss = function(labels.reshape(-1), ignore_index=ignored, reduction=reduction)
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


@functools.cache
def lazy(output: type) -> type:
    """The output's class, with logits that are computed when somebody asks for them."""

    class Lazy(output):
        _llmcore_logits: Callable[[], Tensor] | None = None
        _llmcore_made: Tensor | None = None

        @property
        def logits(self) -> Tensor | None:
            if self._llmcore_made is None and self._llmcore_logits is not None:
                object.__setattr__(self, "_llmcore_made", self._llmcore_logits())
            return self._llmcore_made

        @logits.setter
        def logits(self, value: Tensor | None) -> None:
            object.__setattr__(self, "_llmcore_made", value)

        def __getitem__(self, key: Any) -> Any:
            return self.logits if key == "logits" else super().__getitem__(key)

        def __reduce__(self) -> Any:
            plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(output)}
            return functools.partial(output, **plain), ()

    Lazy.__name__ = Lazy.__qualname__ = output.__name__
    return Lazy


# Recognised and held against the model's own


def recognised(model: Any) -> tuple[Callable[..., Tensor], bool] | None:
    """The loss function and whether it shifts labels; None for a model without such a loss."""
    if not all(hasattr(model, n) for n in ("loss_function", "base_model", "get_output_embeddings")):
        return None
    head = model.get_output_embeddings()
    if "labels" not in argument_names(type(model).forward) or not isinstance(head, Linear):
        return None
    if model.base_model is model or getattr(model.config, "is_encoder_decoder", False):
        return None
    function = model.loss_function
    logits, labels = draw(2, 5, 11), torch.arange(10).view(2, 5)
    try:
        found = function(logits=logits, labels=labels, vocab_size=11)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    for shifts in (True, False):
        kept, target = (logits[:, :-1], labels[:, 1:]) if shifts else (logits, labels)
        expected = F.cross_entropy(kept.flatten(0, 1), target.flatten())
        if isinstance(found, Tensor) and torch.allclose(found, expected, rtol=1e-5):
            return function, shifts
    return None


def checked(model: Any, theirs: Callable[..., Any]) -> float:
    """The error of the loss and its gradients against those of the model's own forward.

    Refusal where they differ, or this model's head is not all that is behind its backbone.
    """
    arguments = next(iter(small_inputs(model)), None)
    if arguments is None or "input_ids" not in arguments:
        raise Refusal("linear_cross_entropy", "nothing says what a small input of this model is")
    if (dtype := model.get_output_embeddings().weight.dtype) in (torch.bfloat16, torch.float16):
        raise Refusal(
            "linear_cross_entropy", f"a loss in float32 over weights in {dtype}, which it rounds to"
        )
    arguments = {**arguments, "labels": arguments["input_ids"].clone()}
    arguments["labels"][0, :2] = -100
    # What everything behind the head goes through, at a fraction of all gradients' memory.
    head = model.get_output_embeddings().weight
    wanted = [p for p in model.parameters() if p.requires_grad and (p.ndim == 1 or p is head)]
    training = [m for m in model.modules() if m.training]
    model.eval()  # without dropout
    try:
        with torch.enable_grad():
            output = theirs(model, **arguments)
            object.__setattr__(model, "_llmcore_loss_output", type(output))
            expected = [output.loss, *_gradients(output.loss, wanted)]
            loss = fused(model, arguments).loss
            found = [loss, *_gradients(loss, wanted)]
    finally:
        for module in training:
            module.training = True
    if not difference(found, expected) <= 10 * MODEL_ROUNDINGS:
        raise Refusal("linear_cross_entropy", "the loss is not that of the head alone")
    return largest(found[:1], expected[:1])


def _gradients(loss: Tensor, wanted: list[nn.Parameter]) -> list[Tensor]:
    if not wanted or not loss.requires_grad:
        return []
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [g for g in found if g is not None]
