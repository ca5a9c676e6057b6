"""paged_attention: attention with keys and values kept in pages; decode (T = 1) and prefill.

    k_b[:, j] = k_pages[page_table[b, j // L], :, j % L]   for j < kv_lengths[b], v_b the same
    y = attention(q, k, v, kv_lengths=kv_lengths, ...), formula as there

Tensors (D contiguous in all):
    q           (B, H, T, D)    float32, bfloat16, float16 or float64
    k_pages     (P, G, L, D)    q's dtype, bfloat16 or int8; P pages of L places each; H a multiple
                                of G
    v_pages     (P, G, L, Dv)   k_pages' dtype
    k_scale, v_scale   (P, G, L)    with int8: what each row is to be multiplied by, as in attention
    page_table  (B, M)          int32 or int64: the pages of a sequence in order, 0 to P - 1
    kv_lengths  (B)             int32 or int64, 0 to M * L
    y, lse      as attention
Entries of page_table past a sequence's length may hold anything, -1 included, and pages nobody
refers to as well, NaN included.
Float32, autocast, NaN, source: as attention; Kwon et al., PagedAttention, 2023, section 4.1.
Edge cases: a length of 0 gives 0; any of B, T, M may be 0.
Errors: TypeError for a dtype, ValueError for a shape, a device or an option; all name the argument.
A page in use that is not 0 to P - 1 is an IndexError on the CPU and an assertion elsewhere.

Kernels: forward(q, k_pages, v_pages, pages: Pages, options: attention.Options) -> y or (y, lse).
They have no backward pass: with a gradient the definition runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from llmcore import native
from llmcore.dispatch import Candidate, Op, native_candidates, triton_candidate
from llmcore.ops import contract
from llmcore.ops.attention import (
    check_extra,
    check_heads,
    check_options,
    check_scales,
    check_stored,
    integers_of,
)
from llmcore.ops.attention_definition import (
    Extra,
    Options,
    Result,
    Window,
    bounded,
    default_scale,
    nearest,
)
from llmcore.ops.attention_definition import reference as attention_reference
from llmcore.ops.attention_native import (
    beside,
    heads_like,
    raw_arguments,
    raw_scales,
    refuses_stored,
    refuses_widths,
    wants_any_gradient,
)
from llmcore.ops.sample import Draw, Sample


class Pages(NamedTuple):
    """Where the keys are, and attention's other tensors (no mask, no seed)."""

    table: torch.Tensor
    extra: Extra


def reference(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, pages: Pages, options: Options
) -> Result:
    """The definition, in at least float32: gathers the pages, then attention."""
    lengths = pages.extra.kv_lengths
    assert lengths is not None
    first = torch.arange(pages.table.shape[1], device=q.device) * k_pages.shape[2]
    table = pages.table.masked_fill(first >= lengths[:, None], 0)

    def gathered(pages: torch.Tensor) -> torch.Tensor:
        return pages[table].transpose(1, 2).flatten(2, 3)

    extra = pages.extra
    if extra.k_scale is not None and extra.v_scale is not None:
        extra = extra._replace(k_scale=gathered(extra.k_scale), v_scale=gathered(extra.v_scale))
    return attention_reference(q, gathered(k_pages), gathered(v_pages), extra, options)


def check(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, pages: Pages, options: Options
) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    extra = pages.extra
    optional = {"sinks": extra.sinks, "alibi_slopes": extra.alibi_slopes}
    contract.check_floating(optional, q=q)
    check_stored(q, extra, k_pages=k_pages, v_pages=v_pages)
    for name, tensor in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        if tensor.ndim != 4:
            axes = "(B, H, T, D)" if name == "q" else "(P, G, L, D)"
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {axes}")
    check_heads(q, k_pages, "k_pages")
    contract.check_shape((*k_pages.shape[:3], q.shape[3]), "as q has D", k_pages=k_pages)
    if 0 in (k_pages.shape[0], k_pages.shape[2]):
        raise ValueError(
            f"k_pages: got shape {tuple(k_pages.shape)}, expected P and L of at least 1"
        )
    if v_pages.shape[:3] != k_pages.shape[:3]:
        raise ValueError(
            f"v_pages: got shape {tuple(v_pages.shape)}, expected {tuple(k_pages.shape[:3])} and "
            "Dv, as k_pages"
        )
    check_scales(q, k_pages, extra)
    table = pages.table
    if table is None:
        raise TypeError("page_table: expected a tensor, got NoneType")
    columns = table.shape[-1] if isinstance(table, torch.Tensor) and table.ndim else 0
    why = "(B, M), a row for each sequence of q"
    contract.check_integers(q, "q", (q.shape[0], columns), why, page_table=table)
    if extra.kv_lengths is None:
        raise TypeError("kv_lengths: expected a tensor, got NoneType")
    check_extra(q, extra)
    check_options(options)


def arguments(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_offset: torch.Tensor | int | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """Defaults resolved, tensors as autocast wants them."""
    q, k_pages, v_pages = contract.autocast(q, k_pages, v_pages)
    extra = Extra(None, kv_lengths, nearest(q_offset), sinks, alibi_slopes, None, k_scale, v_scale)
    scale = default_scale(q) if scale is None else scale
    options = Options(bool(causal), bounded(window), scale, softcap, 0.0, return_lse)
    return q, k_pages, v_pages, Pages(page_table, extra), options


def samples(draw: Draw) -> Iterator[Sample]:
    def call(rows: int, lengths: list[int], *sizes: int) -> tuple[Any, ...]:
        heads, groups, length, width, value_width = sizes
        most = max((n + length - 1) // length for n in lengths) + 1
        pages = len(lengths) * most + 2
        order = torch.randperm(pages, generator=draw.generator)[: len(lengths) * most]
        table = order.reshape(len(lengths), most).to(torch.int32)
        k = draw.normal(pages, groups, length, width)
        v = draw.normal(pages, groups, length, value_width)
        for row, n in enumerate(lengths):
            table[row, (n + length - 1) // length :] = -1
        unused = torch.ones(pages, dtype=torch.bool)
        unused[table[table >= 0].long()] = False
        k[unused], v[unused] = float("nan"), float("nan")
        q = draw.normal(len(lengths), heads, rows, width)
        return q, k, v, table, torch.tensor(lengths, dtype=torch.int32)

    lengths = draw.integers(1, 90, 3).tolist()
    yield Sample("decode", call(1, lengths, 6, 2, 16, 64, 64))
    longer = [n + 12 for n in lengths]
    options: dict[str, Any] = {"causal": True, "return_lse": True}
    yield Sample("prefill", call(12, longer, 4, 2, 16, 32, 32), options)
    yield Sample("odd_pages", call(3, lengths, 2, 2, 5, 24, 7), options)
    yield Sample("one_place_a_page", call(2, [3, 9], 2, 1, 1, 8, 8), options)
    options = {**options, "window": (9, 0), "softcap": 7.0, "sinks": draw.normal(4)}
    yield Sample("window_softcap_sinks", call(4, longer, 4, 2, 8, 16, 16), options)
    options = {"alibi_slopes": draw.normal(4).abs(), "q_offset": draw.integers(0, 9, 3)}
    yield Sample("alibi_offset", call(4, longer, 4, 2, 8, 16, 16), {**options, "causal": True})
    for name, rows, of in (("decode", 1, lengths), ("prefill", 12, longer)):
        q, k, v, *where = call(rows, of, 6, 2, 16, 64, 64)
        yield Sample(f"bf16_{name}", (q, k.bfloat16(), v.bfloat16(), *where), keep=(1, 2))
        (k, k_scale), (v, v_scale) = integers_of(draw, k), integers_of(draw, v)
        options = {"k_scale": k_scale, "v_scale": v_scale, "causal": True}
        yield Sample(f"int8_{name}", (q, k, v, *where), options, keep=("k_scale", "v_scale"))
    yield Sample("length_0", call(1, [0, 5], 2, 1, 4, 8, 8), {"return_lse": True})


def refuses(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, pages: Pages, options: Options
) -> list[str]:
    extra = pages.extra
    if k_pages.dtype != q.dtype:
        return refuses_stored(q, k_pages, v_pages, extra)
    return native.refuses_tensors(q, k_pages, v_pages) + refuses_gradient(
        q, k_pages, v_pages, extra
    )


def refuses_triton(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, pages: Pages, options: Options
) -> list[str]:
    return refuses_widths(q, v_pages) + refuses_gradient(q, k_pages, v_pages, pages.extra)


def refuses_gradient(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, extra: Extra
) -> list[str]:
    """Why gradients need the definition."""
    if wants_any_gradient(q, k_pages, v_pages, extra):
        return ["an input requires a gradient: these kernels have no backward pass"]
    return []


@native.fake("paged_attention_forward")
def _(
    level: int, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    y = heads_like(q, q.shape[1], v_pages.shape[3])
    return y, q.new_empty(q.shape[:3], dtype=torch.float32)


def with_contract_arguments(candidate: Candidate) -> Candidate:
    """A raw candidate as one that takes the contract's arguments."""
    raw_forward = candidate.forward

    def forward(
        q: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        pages: Pages,
        options: Options,
    ) -> Result:
        # Without the mask and the seed.
        queries, _, _, scale, causal, offset, _, *tensors, _, left, right, softcap, _ = (
            raw_arguments(beside(q, k_pages), k_pages, v_pages, pages.extra, options)
        )
        table = pages.table.long().contiguous()
        rest = (table, *tensors, offset, causal, left, right, scale, softcap)
        try:
            y, lse = raw_forward(queries, k_pages, v_pages, *rest, **raw_scales(pages.extra))
        except RuntimeError as error:
            if "page_table: page" not in str(error):
                raise
            raise IndexError(str(error)) from None
        y = y.to(q.dtype)
        return (y, lse) if options.return_lse else y

    return dataclasses.replace(candidate, forward=forward)


OP = Op(
    "paged_attention",
    reference,
    check,
    samples,
    (
        triton_candidate("paged_attention", refuses_triton, backward=False, into=False),
        *map(
            with_contract_arguments,
            native_candidates("paged_attention", refuses, backward=False, into=False),
        ),
    ),
    arguments=arguments,
    cuda="no CUDA kernel yet",
)


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_offset: torch.Tensor | int | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> Result:
    """attention with the keys and values of each sequence in pages; options as there.

    q (B, H, T, D); k_pages (P, G, L, D) and v_pages (P, G, L, Dv), pages of L places; page_table
    (B, M) int32 or int64, the pages of each sequence in order (what lies past its length is never
    looked at); kv_lengths (B). Returns (B, H, T, Dv) in q's dtype, or that and the lse.
    For inference: where a gradient is wanted, the definition runs.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
        IndexError: a page in use does not exist (on the CPU).
    """
    args = arguments(
        q,
        k_pages,
        v_pages,
        page_table,
        kv_lengths,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        q_offset=q_offset,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        return_lse=return_lse,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    q, k_pages, v_pages, _, options = args
    scales = (k_scale, v_scale)
    tensors = (q, k_pages, v_pages, page_table, kv_lengths, sinks, alibi_slopes, *scales)
    offset = contract.tensor_key(q_offset) if isinstance(q_offset, torch.Tensor) else type(q_offset)
    gradient = contract.wants_gradient(q, k_pages, v_pages, sinks, alibi_slopes, *scales)
    return OP.kernel(contract.call_key(tensors, options, offset, gradient), *args).forward(*args)
