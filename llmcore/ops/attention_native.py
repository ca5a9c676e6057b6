"""attention's CPU kernels as candidates: what they refuse, how calls reach them, their gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from llmcore import native
from llmcore.dispatch import Candidate, native_candidates
from llmcore.ops import contract
from llmcore.ops.attention_definition import Extra, Options, Result, reference


def refuses(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra, options: Options
) -> list[str]:
    reasons = refuses_stored(q, k, v, extra)
    for name, tensor in (("mask", extra.mask), ("alibi_slopes", extra.alibi_slopes)):
        if contract.wants_gradient(tensor):
            reasons.append(f"{name} requires a gradient: these kernels have none for it")
    return reasons


def refuses_stored(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra) -> list[str]:
    """Why the kernels can't take these queries beside these keys and values."""
    if k.dtype == q.dtype:
        return native.refuses_tensors(q, k, v)
    reasons = native.refuses_tensors(q, extra.k_scale, extra.v_scale)
    reasons += native.refuses_tensors(k, v, dtypes=(torch.bfloat16, torch.int8))
    if contract.wants_gradient(q, k, v, extra.k_scale, extra.v_scale, extra.sinks):
        reasons.append(f"an input requires a gradient: with keys in {k.dtype} there is none")
    return list(dict.fromkeys(reasons))


def raw_scales(extra: Extra) -> tuple[torch.Tensor, ...]:
    """The scales of keys and values as the raw ops take them, behind all else."""
    if extra.k_scale is None or extra.v_scale is None:
        return ()
    return extra.k_scale.float(), extra.v_scale.float()


def beside(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q as it meets these keys: in their dtype, or else in float32."""
    return q if q.dtype == keys.dtype else q.float()


def raw_arguments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra, options: Options
) -> tuple[Any, ...]:
    """A call as the raw ops take it: dtypes as in csrc/ops.h, the mask with all its axes, the
    lengths, offsets and sinks contiguous."""
    mask, lengths, offset, sinks, slopes, seed = extra[:6]
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    offsets = offset.long().contiguous() if isinstance(offset, torch.Tensor) else None
    left, right = options.window or (None, None)
    return (
        *(q, k, v, mask),
        None if lengths is None else lengths.long().contiguous(),
        offsets,
        None if sinks is None else sinks.float().contiguous(),
        None if slopes is None else slopes.float(),
        seed,
        None if offsets is not None else offset,
        options.causal,
        -1 if left is None else left,
        -1 if right is None else right,
        *(options.scale, options.softcap or 0.0, options.dropout_p),
    )


def heads_like(like: torch.Tensor, heads: Any, width: Any) -> torch.Tensor:
    """(B, heads, positions, width), in memory (B, positions, heads, width)."""
    return like.new_empty(like.shape[0], like.shape[2], heads, width).transpose(1, 2)


@native.fake("attention_forward")
def _(
    level: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return heads_like(q, q.shape[1], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@native.fake("attention_backward")
def _(
    level: int,
    dy: torch.Tensor,
    dlse: torch.Tensor | None,
    y: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    q_offsets: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    sink_rows = 0 if sinks is None else q.shape[0]
    return (
        heads_like(q, q.shape[1], q.shape[3]),
        heads_like(k, k.shape[1], k.shape[3]),
        heads_like(v, v.shape[1], v.shape[3]),
        q.new_empty(sink_rows, q.shape[1], dtype=torch.float32),
    )


def with_contract_arguments(candidate: Candidate) -> Candidate:
    """A raw candidate as one that takes the contract's arguments."""
    raw_forward, raw_backward = candidate.forward, candidate.backward
    assert raw_backward is not None

    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra, options: Options
    ) -> Result:
        call = raw_arguments(beside(q, k), k, v, extra, options)
        y, lse = raw_forward(*call, *raw_scales(extra))
        y = y.to(q.dtype)
        return (y, lse) if options.return_lse else y

    def backward(
        dy: torch.Tensor,
        dlse: torch.Tensor | None,
        y: torch.Tensor,
        lse: torch.Tensor,
        *call: Any,
    ) -> tuple[torch.Tensor, ...]:
        dq, dk, dv, dsinks = raw_backward(dy, dlse, y, lse, *raw_arguments(*call))
        return dq, dk, dv, dsinks.sum(0)

    return dataclasses.replace(candidate, forward=forward, backward=backward)


def candidates() -> tuple[Candidate, ...]:
    """The CPU kernels, for attention's contract."""
    found = native_candidates("attention", refuses, into=False)
    return tuple(map(with_contract_arguments, found))


class Attention(contract.KernelFunction):
    """The gradient of a kernel's forward pass, by the same kernel's backward pass.

    Takes the tensors of `Extra` one by one, since autograd does not look inside of a tuple.
    """

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        mask: torch.Tensor | None,
        kv_lengths: torch.Tensor | None,
        q_offset: torch.Tensor | int | None,
        alibi_slopes: torch.Tensor | None,
        seed: torch.Tensor | None,
        options: Options,
        kernel: Candidate,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        extra = Extra(mask, kv_lengths, q_offset, sinks, alibi_slopes, seed)
        return kernel.forward(q, k, v, extra, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, sinks, mask, kv_lengths, q_offset, alibi_slopes, seed = inputs[:9]
        ctx.options, ctx.kernel = inputs[9:]
        ctx.offset = None if isinstance(q_offset, torch.Tensor) else q_offset
        offset = q_offset if isinstance(q_offset, torch.Tensor) else None
        ctx.save_for_backward(q, k, v, sinks, mask, kv_lengths, offset, alibi_slopes, seed, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        q, k, v, sinks, mask, kv_lengths, offset, slopes, seed, y, lse = ctx.saved_tensors
        dy = torch.zeros_like(y) if dy is None else dy
        extra = Extra(
            mask, kv_lengths, ctx.offset if offset is None else offset, None, slopes, seed
        )
        if contract.differentiated_again():

            def define(q: Any, k: Any, v: Any, sinks: Any) -> Result:
                return reference(q, k, v, extra._replace(sinks=sinks), ctx.options)

            cotangents = (dy, torch.zeros_like(lse) if dlse is None else dlse)
            return *contract.gradients(define, (q, k, v, sinks), cotangents), *[None] * 7
        call = (q, k, v, extra._replace(sinks=sinks), ctx.options)
        dq, dk, dv, dsinks = ctx.kernel.backward(dy, dlse, y, lse, *call)
        needs = ctx.needs_input_grad
        return (
            dq if needs[0] else None,
            dk if needs[1] else None,
            dv if needs[2] else None,
            dsinks.to(sinks.dtype) if needs[3] else None,
            *[None] * 7,
        )


def record(
    kernel: Candidate,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extra: Extra,
    options: Options,
) -> Result:
    """kernel.forward(...) with its gradient."""
    mask, kv_lengths, q_offset, sinks, slopes, seed = extra[:6]
    with_lse = options._replace(return_lse=True)
    rest = (mask, kv_lengths, q_offset, slopes, seed, with_lse, kernel)
    y, lse = Attention.record(q, k, v, sinks, *rest)
    return (y, lse) if options.return_lse else y
