"""attention's CPU kernels as candidates: what they refuse, how calls reach them, their gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from llmcore import native
from llmcore.dispatch import Candidate, cuda_candidate, native_candidates
from llmcore.ops import contract
from llmcore.ops.attention_definition import Extra, Options, Result, reference


def refuses(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra, options: Options
) -> list[str]:
    if k.dtype != q.dtype:
        return refuses_stored(q, k, v, extra)
    reasons = native.refuses_tensors(q, k, v)
    if q.dtype == torch.float32:
        return reasons
    # Most cancels in a sum over keys. What is left would be less than what delta, a row's dy . y,
    # has lost by the rounding of y.
    for name, tensor, is_summed in (
        ("mask", extra.mask, is_one_for_all_keys(extra.mask)),
        ("alibi_slopes", extra.alibi_slopes, True),
    ):
        if is_summed and contract.wants_gradient(tensor):
            reasons.append(
                f"{name} requires a gradient, a sum over keys: "
                "these kernels have it in float32 only"
            )
    return reasons


def refuses_widths(q: torch.Tensor, v: torch.Tensor) -> list[str]:
    """Why Triton's kernels can't take heads of these widths."""
    widest = max(q.shape[-1], v.shape[-1])
    if widest > 256:
        return [f"head width {widest}: these kernels hold tiles of at most 256 in registers"]
    return []


def is_one_for_all_keys(mask: torch.Tensor | None) -> bool:
    """Whether one element of a mask is added to the scores of all keys."""
    return mask is not None and (mask.ndim == 0 or mask.shape[-1] == 1)


def refuses_stored(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra) -> list[str]:
    """Why the kernels can't take these queries beside keys and values of another dtype."""
    reasons = native.refuses_tensors(q, extra.k_scale, extra.v_scale)
    reasons += native.refuses_tensors(k, v, dtypes=(torch.bfloat16, torch.int8))
    if wants_any_gradient(q, k, v, extra):
        reasons.append(f"an input requires a gradient: with keys in {k.dtype} there is none")
    return list(dict.fromkeys(reasons))


def wants_any_gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra) -> bool:
    """Whether autograd must record a call for any of its tensors."""
    mask, _, _, sinks, slopes, _, *scales = extra
    return contract.wants_gradient(q, k, v, mask, sinks, slopes, *scales)


def raw_scales(extra: Extra) -> dict[str, torch.Tensor]:
    """The scales of keys and values as the raw ops take them."""
    if extra.k_scale is None or extra.v_scale is None:
        return {}
    return {"k_scale": extra.k_scale.float(), "v_scale": extra.v_scale.float()}


def beside(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q as it meets these keys: in their dtype, or else in float32."""
    return q if q.dtype == keys.dtype else q.float()


def raw_arguments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra, options: Options
) -> tuple[Any, ...]:
    """A call as the raw ops take it: dtypes as in csrc/ops.h, the mask with four axes, the lengths,
    offsets and sinks contiguous. Of a call without options only the first arguments."""
    mask, lengths, offset, sinks, slopes, seed = extra[:6]
    causal, window, scale, softcap, dropout_p, _ = options
    offsets = offset if isinstance(offset, torch.Tensor) else None
    first = (q, k, v, scale, causal, offset if offsets is None else None)
    if (window is None and softcap is None and mask is None and lengths is None) and (
        offsets is None and sinks is None and slopes is None and seed is None
    ):
        return first
    left, right = window or (None, None)
    return (
        *first,
        None if mask is None else mask[(None,) * (4 - mask.ndim)],
        None if lengths is None else lengths.long().contiguous(),
        None if offsets is None else offsets.long().contiguous(),
        None if sinks is None else sinks.float().contiguous(),
        None if slopes is None else slopes.float(),
        seed,
        -1 if left is None else left,
        -1 if right is None else right,
        *(softcap or 0.0, dropout_p),
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
    need_dmask: bool,
    need_dslopes: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    q_offset: int | None = None,
    mask: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    q_offsets: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    def floats(*shape: Any) -> torch.Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    return (
        heads_like(q, q.shape[1], q.shape[3]),
        heads_like(k, k.shape[1], k.shape[3]),
        heads_like(v, v.shape[1], v.shape[3]),
        floats(0 if sinks is None else q.shape[0], q.shape[1]),
        floats(*mask.shape) if need_dmask and mask is not None else floats(0),
        floats(q.shape[0] if need_dslopes else 0, q.shape[1]),
    )


def with_contract_arguments(candidate: Candidate) -> Candidate:
    """A raw candidate as one that takes the contract's arguments."""
    raw_forward, raw_backward = candidate.forward, candidate.backward
    assert raw_backward is not None

    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra, options: Options
    ) -> Result:
        call = raw_arguments(beside(q, k), k, v, extra, options)
        y, lse = raw_forward(*call, **raw_scales(extra))
        y = y.to(q.dtype)
        return (y, lse) if options.return_lse else y

    def backward(
        dy: torch.Tensor,
        dlse: torch.Tensor | None,
        y: torch.Tensor,
        lse: torch.Tensor,
        need_dmask: bool,
        need_dslopes: bool,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        extra: Extra,
        options: Options,
    ) -> tuple[torch.Tensor | None, ...]:
        dq, dk, dv, dsinks, dmask, dslopes = raw_backward(
            *(dy, dlse, y, lse, need_dmask, need_dslopes),
            *raw_arguments(q, k, v, extra, options),
        )
        mask, sinks, slopes = extra.mask, extra.sinks, extra.alibi_slopes
        return (
            *(dq, dk, dv),
            None if sinks is None else dsinks.sum(0),
            dmask.reshape(mask.shape) if mask is not None and need_dmask else None,
            dslopes.sum_to_size(slopes.shape) if slopes is not None and need_dslopes else None,
        )

    return dataclasses.replace(candidate, forward=forward, backward=backward)


def refuses_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra, options: Options
) -> list[str]:
    """Why the CUDA kernels can't take this call: their products are the tensor cores'."""
    reasons = native.refuses_kinds(q, k, v, dtypes=(torch.bfloat16, torch.float16))
    if k.dtype != q.dtype:
        reasons.append(f"k in {k.dtype}, q in {q.dtype}: these kernels take one dtype")
    widths = q.shape[3], v.shape[3]
    if widths not in ((64, 64), (128, 128)):
        reasons.append(f"head widths {widths[0]} and {widths[1]}: these kernels take 64 or 128")
    given = extra._asdict()
    for name in ("mask", "sinks", "alibi_slopes", "seed"):
        if given[name] is not None:
            what = "dropout_p" if name == "seed" else name
            reasons.append(f"{what}: these kernels have none; Triton's have")
    if options.scale <= 0:
        reasons.append(f"scale {options.scale}: these kernels take a positive one")
    return reasons


def cuda() -> Candidate:
    """The CUDA kernels, for attention's contract."""
    return with_contract_arguments(cuda_candidate("attention", refuses_cuda, into=False))


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
        offset = ctx.offset if offset is None else offset
        needs = ctx.needs_input_grad
        if contract.differentiated_again():

            def define(q: Any, k: Any, v: Any, sinks: Any, mask: Any, slopes: Any) -> Result:
                extra = Extra(mask, kv_lengths, offset, sinks, slopes, seed)
                return reference(q, k, v, extra, ctx.options)

            cotangents = (dy, torch.zeros_like(lse) if dlse is None else dlse)
            inputs = (q, k, v, sinks, mask, slopes)
            grads: Any = contract.gradients(define, inputs, cotangents)
        else:
            extra = Extra(mask, kv_lengths, offset, sinks, slopes, seed)
            call = (q, k, v, extra, ctx.options)
            grads = ctx.kernel.backward(dy, dlse, y, lse, needs[4], needs[7], *call)
        dq, dk, dv, dsinks, dmask, dslopes = grads
        return (
            dq if needs[0] else None,
            dk if needs[1] else None,
            dv if needs[2] else None,
            dsinks.to(sinks.dtype) if needs[3] else None,
            dmask.to(mask.dtype) if needs[4] else None,
            *(None, None),
            dslopes.to(slopes.dtype) if needs[7] else None,
            *(None, None, None),
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
