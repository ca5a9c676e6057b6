"""llmcore.patch_sdpa: torch's scaled_dot_product_attention is llmcore's inside a block.

For code that cannot be told an attention implementation: plain PyTorch models, timm.

    with llmcore.patch_sdpa():
        y = model(x)

What calls `torch.nn.functional.scaled_dot_product_attention` in the block gets
llmcore.ops.scaled_dot_product_attention. nn.MultiheadAttention, nn.TransformerEncoderLayer and
nn.TransformerDecoderLayer are among them: their fused path of eval mode, which calls no Python, is
off in the block (torch.backends.mha.set_fastpath_enabled). Three things go another way:

- Code that took the function itself before (`from torch.nn.functional import
  scaled_dot_product_attention`) keeps torch's. A module compiled before keeps what it was compiled
  with.
- nn.MultiheadAttention called with need_weights=True, its default, computes the weights that it
  returns, with no such call. (The encoder and decoder layers pass False.)
- Nested tensors, tensor subclasses and dtypes that llmcore has not are torch's.

Without the fused path, nn.TransformerEncoder does not cut padding out of its input: at padded
positions its output is what its layers give there, where torch's has zeros.

The block counts for the process, as the attribute of torch's module that it replaces: other threads
get llmcore's function too while any is inside. Blocks may nest and overlap, in one thread or in
many; the last to end restores torch's function, whatever ended it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from llmcore.ops import contract
from llmcore.ops.scaled_dot_product_attention import scaled_dot_product_attention

_torch_function: Callable[..., torch.Tensor] = F.scaled_dot_product_attention
_fastpath = True
_blocks = 0
_lock = threading.Lock()
# Of the blocks that are entered: what they replace, how many there are, and what guards all three.


def is_plain(tensor: Any) -> bool:
    """Whether llmcore's function takes a tensor like this."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.dtype in contract.FLOATS
    )


def patched(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """llmcore's function for plain tensors, torch's for all others; a signature like torch's."""
    plain = is_plain(query) and is_plain(key) and is_plain(value)
    function = scaled_dot_product_attention if plain else _torch_function
    return function(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


@contextlib.contextmanager
def patch_sdpa() -> Iterator[None]:
    """F.scaled_dot_product_attention is llmcore's function in this block, for the process."""
    global _torch_function, _fastpath, _blocks
    with _lock:
        if _blocks == 0:
            _torch_function = F.scaled_dot_product_attention
            _fastpath = torch.backends.mha.get_fastpath_enabled()
            F.scaled_dot_product_attention = patched
            torch.backends.mha.set_fastpath_enabled(False)
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                F.scaled_dot_product_attention = _torch_function
                torch.backends.mha.set_fastpath_enabled(_fastpath)
