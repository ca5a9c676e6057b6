"""attention_varlen: attention of sequences packed one behind the other, without padding.

    sequence b: attention(q[cq_b : cq_b+1], k[ck_b : ck_b+1], v[ck_b : ck_b+1]), formula as there,
    its queries at the positions (number of its keys) - (number of its queries) + 0, 1, 2, ...

Tensors (D contiguous in all):
    q             (total_q, H, D)   float32, bfloat16, float16 or float64
    k, v          (total_k, G, D), (total_k, G, Dv)   q's dtype; H a multiple of G
    cu_seqlens_q  (B + 1)           int32 or int64: 0, then where each sequence of q ends
    cu_seqlens_k  (B + 1)           the same of k and v
    y             (total_q, H, Dv)  q's dtype
Float32, autocast, NaN, source: as attention. Queries past the last end are no sequence's: 0. Keys
past it are never used.
Edge cases: a sequence may have no queries or no keys; total_q and total_k may be 0.
Errors: TypeError for a dtype, ValueError for a shape, a device or an option; all name the argument.
The ends must not decrease; only CPU kernels check that (RuntimeError), for elsewhere it would wait
for an accelerator.

Kernels: forward(q, k, v, ends: Ends, options: attention.Options) -> y, or (y, lse (H, total_q))
with options.return_lse; backward(dy, y, lse, q, k, v, ends, options) -> dq, dk, dv. The
definition's memory grows with total_q * total_k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from llmcore import native
from llmcore.dispatch import Candidate, Op, native_candidates, triton_candidate
from llmcore.ops import contract
from llmcore.ops.attention import check_heads, check_options
from llmcore.ops.attention_definition import Extra, Options, Window, bounded, default_scale
from llmcore.ops.attention_definition import reference as attention_reference
from llmcore.ops.attention_native import refuses_widths
from llmcore.ops.sample import Draw, Sample


class Ends(NamedTuple):
    """Where the sequences end, 0 before the first."""

    q: torch.Tensor
    k: torch.Tensor


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: Ends, options: Options
) -> torch.Tensor:
    """The definition, in at least float32: one attention over all, each sequence seeing itself."""
    sequence_q, place_q = places(q, ends.q)
    sequence_k, place_k = places(k, ends.k)
    lengths = ends.k.diff() - ends.q.diff()
    # Tokens of no sequence look up the last length, which no result depends on.
    offset = torch.cat((lengths, lengths.new_zeros(1)))[sequence_q.clamp(max=lengths.shape[0])]
    query, key = (place_q + offset)[:, None], place_k
    allowed = (sequence_q[:, None] == sequence_k) & (sequence_q < lengths.shape[0])[:, None]
    left, right = options.window or (None, None)
    if options.causal:
        allowed = allowed & (key <= query)
    if left is not None:
        allowed = allowed & (key >= query - left)
    if right is not None:
        allowed = allowed & (key <= query + right)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    whole = options._replace(causal=False, window=None)
    y: torch.Tensor = attention_reference(q, k, v, Extra(mask=allowed), whole)
    return y[0].transpose(0, 1)


def places(tokens: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token the number of its sequence (B past the last) and its place in it."""
    index = torch.arange(tokens.shape[0], device=tokens.device)
    sequence = torch.searchsorted(ends[1:].contiguous(), index, right=True)
    return sequence, index - ends[sequence]


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: Ends, options: Options) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating(q=q, k=k, v=v)
    contract.check_dtype(q, "q", k=k, v=v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 3:
            axes = "(total_q, H, D)" if name == "q" else "(total_k, G, D)"
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {axes}")
    check_heads(q, k, "k")
    contract.check_shape((*k.shape[:2], q.shape[2]), "as q has D", k=k)
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v: got shape {tuple(v.shape)}, expected {tuple(k.shape[:2])} and Dv, as k"
        )
    for name, end in (("cu_seqlens_q", ends.q), ("cu_seqlens_k", ends.k)):
        if not isinstance(end, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(end).__name__}")
    if ends.q.ndim != 1 or ends.q.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens_q: got {tuple(ends.q.shape)}, expected a tensor of shape (B + 1,)"
        )
    why = "(B + 1,), as cu_seqlens_q"
    contract.check_integers(q, "q", ends.q.shape, why, cu_seqlens_q=ends.q, cu_seqlens_k=ends.k)
    check_options(options)


def arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Any, ...]:
    """Defaults resolved, tensors as autocast wants them."""
    q, k, v = contract.autocast(q, k, v)
    ends = Ends(cu_seqlens_q, cu_seqlens_k)
    scale = default_scale(q) if scale is None else scale
    return q, k, v, ends, Options(bool(causal), bounded(window), scale, softcap)


def samples(draw: Draw) -> Iterator[Sample]:
    def packed(lengths_q: list[int], lengths_k: list[int], *sizes: int) -> tuple[Any, ...]:
        heads, groups, width, value_width = sizes
        ends = [
            torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            for lengths in (lengths_q, lengths_k)
        ]
        return (
            draw.normal(sum(lengths_q), heads, width),
            draw.normal(sum(lengths_k), groups, width),
            draw.normal(sum(lengths_k), groups, value_width),
            *ends,
        )

    lengths = draw.integers(1, 40, 4).tolist()
    longer = [n + int(extra) for n, extra in zip(lengths, draw.integers(0, 20, 4), strict=True)]
    yield Sample("same", packed(lengths, lengths, 4, 2, 32, 32), {"causal": True})
    yield Sample("full", packed(lengths, longer, 4, 4, 16, 24))
    yield Sample("more_keys", packed(lengths, longer, 4, 2, 32, 32), {"causal": True})
    options: dict[str, Any] = {"window": (5, 2), "softcap": 9.0, "scale": 0.2}
    yield Sample("window", packed(longer, lengths, 2, 1, 16, 16), options)
    gaps = packed([3, 0, 5, 1], [4, 2, 0, 1], 2, 2, 8, 8)
    yield Sample("empty_sequences", gaps, {"causal": True})
    yield Sample("nothing", packed([0, 0], [0, 0], 2, 2, 8, 8))
    q, k, v, ends_q, ends_k = packed([5, 6], [5, 6], 2, 2, 8, 8)
    v[-3:] = float("nan")
    yield Sample("past_the_end", (q, k, v, ends_q - (ends_q > 8) * 3, ends_k - (ends_k > 8) * 3))


def refuses(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: Ends, options: Options
) -> list[str]:
    return native.refuses_tensors(q, k, v)


def refuses_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: Ends, options: Options
) -> list[str]:
    return refuses_widths(q, v)


@native.fake("attention_varlen_forward")
def _(
    level: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    total, heads = q.shape[:2]
    lse = q.new_empty(heads, total, dtype=torch.float32)
    return q.new_empty(total, heads, v.shape[2]), lse


@native.fake("attention_varlen_backward")
def _(
    level: int,
    dy: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def raw_arguments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: Ends, options: Options
) -> tuple[Any, ...]:
    """A call as the raw ops take it."""
    left, right = options.window or (None, None)
    return (
        *(q, k, v, ends.q.long().contiguous(), ends.k.long().contiguous()),
        *(options.causal, -1 if left is None else left, -1 if right is None else right),
        *(options.scale, options.softcap or 0.0),
    )


def with_contract_arguments(candidate: Candidate) -> Candidate:
    """A raw candidate as one that takes the contract's arguments."""
    raw_forward, raw_backward = candidate.forward, candidate.backward
    assert raw_backward is not None

    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: Ends, options: Options
    ) -> Any:
        y, lse = raw_forward(*raw_arguments(q, k, v, ends, options))
        return (y, lse) if options.return_lse else y

    def backward(
        dy: torch.Tensor, y: torch.Tensor, lse: torch.Tensor, *call: Any
    ) -> tuple[torch.Tensor, ...]:
        return raw_backward(dy, y, lse, *raw_arguments(*call))

    return dataclasses.replace(candidate, forward=forward, backward=backward)


class AttentionVarlen(contract.KernelFunction):
    """The gradient of a kernel's forward pass, by the same kernel's backward pass."""

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ends_q: torch.Tensor,
        ends_k: torch.Tensor,
        options: Options,
        kernel: Candidate,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return kernel.forward(q, k, v, Ends(ends_q, ends_k), options._replace(return_lse=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options, ctx.kernel = inputs[5:]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:5], *output)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, dlse: Any) -> tuple[Any, ...]:
        q, k, v, ends_q, ends_k, y, lse = ctx.saved_tensors
        ends = Ends(ends_q, ends_k)
        if contract.differentiated_again():

            def define(q: Any, k: Any, v: Any) -> torch.Tensor:
                return reference(q, k, v, ends, ctx.options)

            return *contract.gradients(define, (q, k, v), dy), *[None] * 4
        grads = ctx.kernel.backward(dy, y, lse, q, k, v, ends, ctx.options)
        needs = ctx.needs_input_grad
        return *(g if n else None for g, n in zip(grads, needs, strict=False)), *[None] * 4


OP = Op(
    "attention_varlen",
    reference,
    check,
    samples,
    (
        triton_candidate("attention_varlen", refuses_triton, into=False),
        *map(with_contract_arguments, native_candidates("attention_varlen", refuses, into=False)),
    ),
    arguments=arguments,
    cuda="no CUDA kernel yet",
)


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """attention of sequences packed one behind the other; options as there.

    q (total_q, H, D), k (total_k, G, D), v (total_k, G, Dv); cu_seqlens_q and cu_seqlens_k (B + 1)
    int32 or int64: 0, then where each sequence ends. Each sequence's queries are its last
    positions. Returns (total_q, H, Dv) in q's dtype.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    args = arguments(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
    )
    q, k, v, ends, options = args
    key = contract.call_key((q, k, v, *ends), options, contract.wants_gradient(q, k, v))
    kernel = OP.kernel(key, *args)
    if kernel.backward is not None and contract.wants_gradient(q, k, v):
        return AttentionVarlen.record(q, k, v, *ends, options, kernel)[0]
    return kernel.forward(*args)
