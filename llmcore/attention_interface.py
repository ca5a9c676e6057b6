"""`attn_implementation="llmcore"`: llmcore's attention in the models of Hugging Face transformers.

    import llmcore
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="llmcore")
    model.set_attn_implementation("llmcore")       # or of a model that is there already

`import llmcore` is enough, before transformers or after it: the name is registered as soon as both
are imported. llmcore itself imports no transformers.

`attend` computes what the model's own eager attention function does. What that function takes
beyond the usual arguments is run by the kernels (softcap, position_bias, sinks); where it takes or
does something else, it is called itself. No argument that changes its result is dropped. Masks come
as `llmcore.attention_mask.AttentionMask`, which says in a few numbers what a tensor would.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from llmcore.attention_mask import AttentionMask, added, attention_mask
from llmcore.ops.attention import attention

NAME = "llmcore"
"""What attn_implementation is set to."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | AttentionMask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers' AttentionInterface calls it.

    Args:
        module: the attention layer; its `training` and, without a mask, its `is_causal` count.
        query: (B, H, T, D).
        key: (B, G, S, D), H a multiple of G.
        value: (B, G, S, Dv).
        attention_mask: an AttentionMask; a tensor broadcastable to (B, H, T, S), bool (True = may
            attend) or float (added to the scores); padding as (B, S); or None, where query i sees
            the keys j <= i if the layer is causal and T > 1, and all keys if not.
        scaling: of the scores; 1 / sqrt(D) unless given.
        dropout: the probability with which a weight is dropped while the module is in training.
        kwargs: softcap, position_bias (added to the scores), s_aux (sinks, (H)), is_causal (instead
            of the module's); what the layer's own eager function takes besides goes to it.

    Returns (B, T, H, Dv), contiguous, and None: only the eager function keeps weights. With
    output_attentions=True it is the one that runs, and returns them.

    Raises:
        TypeError: an argument that nothing here knows, of a layer without an eager function.
        ValueError, TypeError: as llmcore.ops.attention.
    """
    from llmcore import (
        eager_attention,
    )  # not before: it brings in torch._dynamo, a second of import

    own = eager_attention.calls_for(module, kwargs)
    if own is not None:
        mask = as_eager_takes_it(module, query, key, attention_mask, kwargs.get("is_causal"))
        result: tuple[torch.Tensor, torch.Tensor | None]
        result = own(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        return result
    options: dict[str, Any] = {"scale": scaling}
    if attention_mask is None:
        if query.shape[2] > 1 and is_causal(module, kwargs.get("is_causal")):
            options["causal"], options["q_offset"] = True, 0
    elif isinstance(attention_mask, AttentionMask):
        options |= attention_mask.options()
    else:
        options["mask"] = as_attention_takes_it(attention_mask, query)
    if dropout and module.training:
        options["dropout_p"] = dropout
    if kwargs:
        bias = kwargs.get("position_bias")
        if bias is not None:
            options["mask"] = biased(bias, options.get("mask"))
        options["softcap"] = kwargs.get("softcap")
        options["sinks"] = kwargs.get("s_aux")
    if query.shape[0] != key.shape[0]:
        query, key, value = same_batch(query, key, value)
    y: torch.Tensor = attention(query, key, value, **options)
    return y.transpose(1, 2).contiguous(), None


def is_causal(module: torch.nn.Module, given: bool | None) -> bool:
    """Whether a layer without a mask is causal: what the call says, else what the layer says."""
    return bool(getattr(module, "is_causal", True) if given is None else given)


def as_attention_takes_it(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A model's mask tensor with four axes, in a dtype that llmcore.ops.attention takes."""
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
        return mask if mask.is_floating_point() else mask.bool()
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.dtype in (torch.bool, torch.float32, query.dtype):
        return mask
    return mask.to(query.dtype) if mask.is_floating_point() else mask.bool()


def as_eager_takes_it(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | AttentionMask | None,
    causal: bool | None,
) -> torch.Tensor | None:
    """A mask as the eager functions add it, where None would mean that all keys are seen."""
    if mask is None:
        if not is_causal(module, causal):
            return None
        rows, keys = query.shape[2], key.shape[2]
        offset = 0 if rows > 1 else keys - 1
        shape = (1, 1, rows, keys)
        mask = AttentionMask(shape, query.device, causal=True, offset=offset)
    if isinstance(mask, AttentionMask):
        return mask.as_float(query.dtype)
    mask = as_attention_takes_it(mask, query)
    return added(mask, query.dtype) if mask.dtype == torch.bool else mask


def biased(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A bias of the scores and a mask as one mask."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return bias + mask


def same_batch(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors with the largest first axis among them; others have one that is 1."""
    batch = max(tensor.shape[0] for tensor in tensors)
    return tuple(tensor.expand(batch, *tensor.shape[1:]) for tensor in tensors)


def register() -> None:
    """Makes attn_implementation="llmcore" known to transformers; again changes nothing.

    `import llmcore` sees to it; a call is needed only where something has hidden that import.

    Raises:
        ImportError: transformers is not installed, or too old for its attention interface.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, attention_mask)


REGISTRY_MODULE = "transformers.modeling_utils"
"""The module of transformers that the attention interface is in."""


class Registering(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds REGISTRY_MODULE where the other finders do, and registers once it has been imported."""

    def __init__(self) -> None:
        self.loader: Any = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != REGISTRY_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # As if this had never been here: pickle, inspect and reload ask a module for its loader.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if hasattr(module, "AttentionInterface"):  # since 4.48
            register()


def register_when_imported() -> None:
    """Calls `register` now if transformers is imported already, or else once its models are."""
    if REGISTRY_MODULE in sys.modules:
        register()
    elif not any(isinstance(finder, Registering) for finder in sys.meta_path):
        sys.meta_path.insert(0, Registering())
