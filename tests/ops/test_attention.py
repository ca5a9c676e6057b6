from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmcore import native, ops
from llmcore.ops.attention_definition import kept, mix
from llmcore.ops.quantize_rows import quantize_rows

pytestmark = pytest.mark.usefixtures("backend")


def qkv(
    B: int = 2, H: int = 4, G: int = 2, T: int = 7, S: int = 11, D: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(B, H, T, D), torch.randn(B, G, S, D), torch.randn(B, G, S, D)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6, equal_nan=True)


def same(backend: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Bit for bit from our kernels; the definition's sums are torch's, which promise no order."""
    if backend == "best":
        assert torch.equal(got, want)
    close(got, want)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def cached(k: torch.Tensor, v: torch.Tensor, kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """k and v as a cache keeps them, and the options that go with them."""
    if kind == "bf16":
        return k.bfloat16(), v.bfloat16(), {}
    (k, k_scale), (v, v_scale) = quantize_rows(k), quantize_rows(v)
    return k, v, {"k_scale": k_scale, "v_scale": v_scale}


def widened(k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """What they stand for."""
    if not options:
        return k.float(), v.float()
    return k * options["k_scale"][..., None], v * options["v_scale"][..., None]


def test_attention_equals_torch() -> None:
    q, k, v = qkv()
    close(ops.attention(q, k, v), sdpa(q, k, v))
    close(ops.attention(q, k, v, scale=0.3), sdpa(q, k, v, scale=0.3))


def test_attention_mask_equals_torch() -> None:
    q, k, v = qkv()
    seen, added = torch.rand(2, 1, 7, 11) < 0.6, torch.randn(4, 7, 11)
    seen[..., 0] = True
    close(ops.attention(q, k, v, mask=seen), sdpa(q, k, v, attn_mask=seen))
    close(ops.attention(q, k, v, mask=added), sdpa(q, k, v, attn_mask=added))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (2, 3)}], ids=str)
def test_attention_gradients_equal_autograd_of_the_formula(options: dict[str, Any]) -> None:
    tensors, cotangent, grads = qkv(T=11), torch.randn(2, 4, 11, 16), []
    place = torch.arange(11)
    seen = torch.ones(11, 11, dtype=torch.bool)
    if "causal" in options:
        seen = place <= place[:, None]
    if "window" in options:
        seen = (place >= place[:, None] - 2) & (place <= place[:, None] + 3)
    for function in (
        lambda q, k, v: ops.attention(q, k, v, **options),
        lambda q, k, v: sdpa(q, k, v, attn_mask=seen),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        grads.append(torch.autograd.grad(function(*leaves), leaves, cotangent))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_attention_gqa_equals_repeated_heads() -> None:
    q, k, v = qkv(H=6, G=2)
    wide_k, wide_v = (t.repeat_interleave(3, 1) for t in (k, v))
    close(ops.attention(q, k, v, causal=True), ops.attention(q, wide_k, wide_v, causal=True))


def test_attention_values_of_another_width() -> None:
    q, k, _ = qkv()
    v = torch.randn(2, 2, 11, 5)
    assert ops.attention(q, k, v).shape == (2, 4, 7, 5)
    close(ops.attention(q, k, v), sdpa(q, k, v))


def test_attention_of_equal_scores_is_the_mean() -> None:
    q, k, v = qkv()
    want = v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 7, 16)
    close(ops.attention(torch.zeros_like(q), k, v), want)


def test_attention_order_of_the_keys_is_free() -> None:
    q, k, v = qkv()
    order = torch.randperm(11)
    close(ops.attention(q, k[:, :, order], v[:, :, order]), ops.attention(q, k, v))


@pytest.mark.parametrize(("T", "S"), [(9, 9), (4, 9), (9, 4)])
def test_attention_causal_is_aligned_at_the_end(T: int, S: int) -> None:
    q, k, v = qkv(T=T, S=S)
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    close(ops.attention(q, k, v, causal=True), ops.attention(q, k, v, mask=seen))


def test_attention_causal_ignores_the_future_nan_included() -> None:
    q, k, v = qkv(T=11)
    want = ops.attention(q, k, v, causal=True)
    k[:, :, 6:], v[:, :, 6:] = math.nan, math.inf
    y = ops.attention(q, k, v, causal=True)
    close(y[:, :, :6], want[:, :, :6])
    assert y[:, :, 6:].isnan().all()
    leaves = [t.requires_grad_() for t in (q[:, :, :6].clone(), k, v)]
    y = ops.attention(*leaves, causal=True, q_offset=0)
    close(y, want[:, :, :6])
    grads = torch.autograd.grad(y, leaves, torch.randn(2, 4, 6, 16))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][:, :, 6:].any() and not grads[2][:, :, 6:].any()


@pytest.mark.parametrize("S", [11, 150])
def test_attention_causal_row_equals_decode(S: int, backend: str) -> None:
    q, k, v = qkv(T=S, S=S)
    whole = ops.attention(q, k, v, causal=True)
    for place in (0, 5, S // 2, S - 1):
        row, end = slice(place, place + 1), place + 1
        alone = ops.attention(q[:, :, row], k[:, :, :end], v[:, :, :end])
        same(backend, alone, whole[:, :, row])
        at: Any = {"causal": True, "q_offset": place}
        same(backend, ops.attention(q[:, :, row], k, v, **at), whole[:, :, row])
        offsets: Any = {"causal": True, "q_offset": torch.tensor([place, place])}
        same(backend, ops.attention(q[:, :, row], k, v, **offsets), whole[:, :, row])


@pytest.mark.parametrize(("chunk", "S"), [(1, 11), (2, 11), (4, 11), (7, 11), (64, 150), (33, 150)])
def test_attention_prefill_in_chunks_equals_the_whole(chunk: int, S: int, backend: str) -> None:
    q, k, v = qkv(T=S, S=S)
    whole = ops.attention(q, k, v, causal=True)
    parts = []
    for start in range(0, S, chunk):
        lengths = torch.full((2,), min(start + chunk, S))
        parts.append(
            ops.attention(q[:, :, start : start + chunk], k, v, causal=True, kv_lengths=lengths)
        )
    same(backend, torch.cat(parts, 2), whole)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_attention_kv_lengths_equal_slicing_nan_in_the_tail(
    causal: bool, dtype: torch.dtype
) -> None:
    q, k, v = qkv(B=3, T=4)
    lengths = torch.tensor([11, 5, 1], dtype=dtype)
    want, grads_want = [], []
    cotangent = torch.randn(3, 4, 4, 16)
    for row, length in enumerate(lengths.tolist()):
        leaves = [t[row : row + 1].clone().requires_grad_() for t in (q, k, v)]
        y = ops.attention(
            leaves[0], leaves[1][:, :, :length], leaves[2][:, :, :length], causal=causal
        )
        want.append(y.detach())
        grads_want.append(torch.autograd.grad(y, leaves, cotangent[row : row + 1]))
        k[row, :, length:], v[row, :, length:] = math.nan, math.inf
    leaves = [t.requires_grad_() for t in (q, k, v)]
    y = ops.attention(q, k, v, kv_lengths=lengths, causal=causal)
    close(y, torch.cat(want))
    grads = torch.autograd.grad(y, leaves, cotangent)
    for got, parts in zip(grads, zip(*grads_want, strict=True), strict=True):
        torch.testing.assert_close(got, torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_attention_kv_lengths_out_of_range_are_the_nearest() -> None:
    q, k, v = qkv(T=4)
    y = ops.attention(q, k, v, kv_lengths=torch.tensor([-3, 99]), causal=True)
    close(y, ops.attention(q, k, v, kv_lengths=torch.tensor([0, 11]), causal=True))
    assert torch.equal(y[0], torch.zeros(4, 4, 16))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("T", "padding"), [(6, 3), (70, 1), (70, 64)])
def test_attention_padding_equals_single(side: str, T: int, padding: int, backend: str) -> None:
    q, k, v = qkv(B=1, T=T, S=T)
    alone = ops.attention(q, k, v, causal=True)
    pad = torch.full((1, 4, padding, 16), math.nan)
    seen = torch.ones(1, 1, 1, T + padding, dtype=torch.bool)
    own = slice(0, T) if side == "right" else slice(padding, padding + T)
    seen[..., : own.start] = False
    seen[..., own.stop :] = False

    def padded(t: torch.Tensor) -> torch.Tensor:
        wide = pad[:, : t.shape[1]]
        return torch.cat((t, wide) if side == "right" else (wide, t), 2)

    y = ops.attention(padded(q), padded(k), padded(v), causal=True, mask=seen)
    same(backend, y[:, :, own], alone)


def test_attention_row_does_not_depend_on_its_batch(backend: str) -> None:
    q, k, v = qkv(B=5, T=70, S=70)
    lengths = torch.tensor([70, 3, 33, 64, 65])
    whole = ops.attention(q, k, v, causal=True, kv_lengths=lengths, q_offset=0)
    for row in range(5):
        one = slice(row, row + 1)
        options: Any = {"causal": True, "kv_lengths": lengths[one], "q_offset": 0}
        same(backend, ops.attention(q[one], k[one], v[one], **options), whole[one])
        heads = ops.attention(q[one, 2:], k[one, 1:], v[one, 1:], **options)
        same(backend, heads, whole[one, 2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [64, 40])
def test_attention_few_queries_equal_many(D: int, dtype: torch.dtype, backend: str) -> None:
    """Keys are packed for all queries, packed for a few or read as they lie: the same bits."""
    q, k, v = (t.to(dtype) for t in qkv(B=1, H=6, G=2, T=70, S=600, D=D))
    v[:, :, 520, 3] = math.nan  # and a hidden one hides in each of them
    seen = torch.arange(600) != 520
    whole = ops.attention(q, k, v, mask=seen)
    assert whole.isfinite().all()
    for start, end in ((0, 1), (7, 9), (10, 19), (40, 70)):
        part = ops.attention(q[:, :, start:end], k, v, mask=seen)
        if backend == "best":
            assert torch.equal(part, whole[:, :, start:end])
    attended = ops.attention(q[:, :, :1], k, v)
    assert attended[..., 3].isnan().all() and attended[..., 4:].isfinite().all()


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("D", [64, 40])
def test_attention_cache_is_what_it_stands_for(kind: str, D: int, backend: str) -> None:
    q, k, v = qkv(B=1, H=6, G=2, T=70, S=600, D=D)
    k, v, scales = cached(k, v, kind)
    wide = widened(k, v, scales)
    for rows in (slice(0, 1), slice(40, 44), slice(0, 70)):
        got = ops.attention(q[:, :, rows], k, v, causal=True, **scales)
        want = ops.attention(q[:, :, rows], *wide, causal=True)
        close(got, want)
        if kind == "bf16" and backend == "best":
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("D", [64, 40])
def test_attention_cache_few_queries_equal_many(kind: str, D: int, backend: str) -> None:
    q, k, v = qkv(B=1, H=6, G=2, T=70, S=600, D=D)
    v[:, :, 520] = math.nan
    seen = torch.arange(600) != 520
    k, v, scales = cached(k, v, kind)
    whole = ops.attention(q, k, v, mask=seen, **scales)
    assert whole.isfinite().all()
    for start, end in ((0, 1), (7, 9), (10, 19), (40, 70)):
        part = ops.attention(q[:, :, start:end], k, v, mask=seen, **scales)
        same(backend, part, whole[:, :, start:end])
    assert ops.attention(q[:, :, :1], k, v, **scales).isnan().all()


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_attention_cache_compiles(kind: str) -> None:
    q, k, v = qkv()
    k, v, scales = cached(k, v, kind)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    close(compiled(q, k, v, **scales), ops.attention(q, k, v, **scales))


@pytest.mark.parametrize("T", [1, 40])
def test_attention_cache_scale_that_is_not_finite(T: int) -> None:
    """As NaN or inf in the rows: it spreads to those who attend to it, and to no one else."""
    q, k, v = qkv(T=T, S=200, D=64)
    k, v, scales = cached(k, v, "int8")
    v[:, :, 100, 0], v[:, :, 100, 1] = 3, 0
    for value in (math.nan, math.inf):
        scales["v_scale"][:, :, 100] = value
        y = ops.attention(q, k, v, **scales)
        close(y, ops.attention(q, *widened(k, v, scales)))
        assert not y[..., :2].isfinite().any()
        scales["k_scale"][:, :, 150:] = value
        lengths = torch.tensor([100, 30])
        y = ops.attention(q, k, v, kv_lengths=lengths, **scales)
        close(y, ops.attention(q, *widened(k, v, scales), kv_lengths=lengths))
        assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_attention_cache_beside_queries_of_another_dtype(dtype: torch.dtype, kind: str) -> None:
    q, k, v = qkv()
    if kind == "bf16" and dtype == torch.bfloat16:
        kind = "int8"
    k, v, scales = cached(k, v, kind)
    y, lse = ops.attention(q.to(dtype), k, v, return_lse=True, **scales)
    exact = ops.attention(q.to(dtype).float(), k, v, **scales)
    assert y.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(y, exact.to(dtype))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_attention_cache_gradient_goes_by_the_definition(kind: str) -> None:
    q, k, v = qkv()
    k, v, scales = cached(k, v, kind)
    leaf = q.clone().requires_grad_()
    (got,) = torch.autograd.grad(ops.attention(leaf, k, v, **scales).square().sum(), leaf)
    y = ops.attention(leaf, *widened(k, v, scales))
    (want,) = torch.autograd.grad(y.square().sum(), leaf)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if scales:
        scale = scales["v_scale"].requires_grad_()
        assert torch.autograd.grad(ops.attention(q, k, v, **scales).sum(), scale)[0].any()


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("k_scale: expected a tensor", {"k_scale": None}),
        ("v_scale: expected a tensor", {"v_scale": None}),
        ("v_scale: got shape", {"v_scale": torch.ones(2, 2, 10)}),
        ("k_scale: got torch.float16", {"k_scale": torch.ones(2, 2, 11).half()}),
        ("k_scale: on meta", {"k_scale": torch.ones(2, 2, 11, device="meta")}),
        ("v: got torch.float32, expected torch.int8", {"v": torch.randn(2, 2, 11, 16)}),
        ("k: got torch.uint8", {"k": torch.zeros(2, 2, 11, 16, dtype=torch.uint8)}),
        ("k_scale: expected None", {"k": qkv()[1], "v": qkv()[2]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_cache_errors(argument: str, change: dict[str, Any]) -> None:
    q, k, v = qkv()
    k, v, scales = cached(k, v, "int8")
    ops.attention(q, k, v, **scales)
    with pytest.raises((TypeError, ValueError), match=f"^{argument}"):
        ops.attention(**{"q": q, "k": k, "v": v, **scales, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_gradient_does_not_depend_on_its_batch(dtype: torch.dtype, backend: str) -> None:
    """A batch goes to threads head by head, one sequence in parts of heads."""
    if backend != "best":
        pytest.skip("the definition's sums are torch's, which promise no order")
    tensors = [t.to(dtype) for t in qkv(B=3, T=50, S=600)]
    cotangent = torch.randn(3, 4, 50, 16).to(dtype)

    def gradients(rows: slice) -> tuple[torch.Tensor, ...]:
        leaves = [t[rows].clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(ops.attention(*leaves, causal=True), leaves, cotangent[rows])

    whole = gradients(slice(0, 3))
    for got, want in zip(gradients(slice(1, 2)), whole, strict=True):
        assert torch.equal(got, want[1:2])


@pytest.mark.parametrize("window", [(3, 0), (0, 2), (2, 1), (None, 0), (1, None), (0, 0)], ids=str)
def test_attention_window(window: tuple[int | None, int | None]) -> None:
    q, k, v = qkv(T=5, S=11)
    left, right = window
    place, key = torch.arange(5)[:, None] + 6, torch.arange(11)
    seen = torch.ones(5, 11, dtype=torch.bool)
    if left is not None:
        seen &= key >= place - left
    if right is not None:
        seen &= key <= place + right
    close(ops.attention(q, k, v, window=window), ops.attention(q, k, v, mask=seen))
    both = ops.attention(q, k, v, window=window, causal=True)
    close(both, ops.attention(q, k, v, mask=seen & (key <= place)))


def test_attention_window_without_bounds_is_none() -> None:
    q, k, v = qkv()
    assert torch.equal(ops.attention(q, k, v, window=(None, None)), ops.attention(q, k, v))


def test_attention_softcap() -> None:
    q, k, v = qkv()
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    capped = 2.0 * torch.tanh(scores / 2.0) + torch.arange(11.0)
    want = capped.softmax(-1) @ v.repeat_interleave(2, 1)
    close(ops.attention(q, k, v, softcap=2.0, mask=torch.arange(11.0)), want)
    close(ops.attention(q, k, v, softcap=1e4), ops.attention(q, k, v))


def test_attention_sinks_join_the_sum_only() -> None:
    q, k, v = qkv()
    sinks = torch.randn(4)
    # A sink is a key with its own score whose value is 0.
    wide_k, wide_v = (F.pad(t.repeat_interleave(2, 1), (0, 0, 0, 1)) for t in (k, v))
    added = torch.zeros(1, 4, 1, 12)
    added[0, :, 0, 11] = sinks
    y, lse = ops.attention(q, k, v, sinks=sinks, return_lse=True)
    want, want_lse = ops.attention(q, wide_k, wide_v, mask=added, return_lse=True)
    close(y, want)
    close(lse, want_lse)
    none = torch.full((4,), -math.inf)
    close(ops.attention(q, k, v, sinks=none), ops.attention(q, k, v))


def test_attention_large_sink_keeps_the_sum_finite() -> None:
    q, k, v = qkv()
    y, lse = ops.attention(q, k, v, sinks=torch.full((4,), 500.0), return_lse=True)
    assert torch.equal(y, torch.zeros_like(y))
    close(lse, torch.full((2, 4, 7), 500.0))


def test_attention_alibi_is_a_distance_bias() -> None:
    q, k, v = qkv(T=5)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0])
    distance = (torch.arange(5)[:, None] + 6 - torch.arange(11)).abs()
    added = -slopes[:, None, None] * distance
    close(ops.attention(q, k, v, alibi_slopes=slopes), ops.attention(q, k, v, mask=added))
    by_row = torch.stack((slopes, slopes * 2))
    added = -by_row[:, :, None, None] * (torch.arange(5)[:, None] + 2 - torch.arange(11)).abs()
    close(
        ops.attention(q, k, v, alibi_slopes=by_row, q_offset=2), ops.attention(q, k, v, mask=added)
    )


def test_attention_lse_is_logsumexp_of_the_scores() -> None:
    q, k, v = qkv(T=11)
    _, lse = ops.attention(q, k, v, causal=True, return_lse=True)
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    hidden = torch.ones(11, 11, dtype=torch.bool).triu(1)
    close(lse, scores.masked_fill(hidden, -math.inf).logsumexp(-1))
    assert lse.dtype == torch.float32
    half = ops.attention(*(t.bfloat16() for t in (q, k, v)), return_lse=True)
    assert (half[0].dtype, half[1].dtype) == (torch.bfloat16, torch.float32)


def test_attention_lse_merges_two_halves_of_the_keys() -> None:
    q, k, v = qkv()
    parts = [
        ops.attention(q, k[:, :, s], v[:, :, s], return_lse=True)
        for s in (slice(0, 4), slice(4, 11))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(y * (part - lse).exp()[..., None] for y, part in parts)
    close(merged, ops.attention(q, k, v))


@pytest.mark.parametrize("by", ["mask", "float_mask", "kv_lengths", "causal", "window"])
@pytest.mark.parametrize("sunk", [False, True], ids=["plain", "sinks"])
def test_attention_row_that_sees_nothing_is_zero(by: str, sunk: bool) -> None:
    q, k, v = qkv(T=3, S=5)
    seen = torch.ones(3, 5, dtype=torch.bool)
    seen[0] = False
    options: Any = {
        "mask": {"mask": seen},
        "float_mask": {"mask": torch.zeros(3, 5).masked_fill(~seen, -math.inf)},
        "kv_lengths": {"kv_lengths": torch.tensor([0, 0])},
        "causal": {"causal": True, "q_offset": -1},
        "window": {"window": (0, 0), "q_offset": -1},
    }[by]
    sinks = torch.randn(4) if sunk else None
    leaves = [t.requires_grad_() for t in (q, k, v)]
    y, lse = ops.attention(q, k, v, sinks=sinks, return_lse=True, **options)
    assert not y[:, :, 0].any()
    want = torch.full((2, 4), -math.inf) if sinks is None else sinks.expand(2, 4)
    close(lse[:, :, 0], want)
    cotangent = torch.randn(y.shape)
    grads = torch.autograd.grad(y, leaves, cotangent)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][:, :, 0].any()


def test_attention_nan_that_is_seen_spreads() -> None:
    q, k, v = qkv(T=11)
    v[0, 0, 3, 5] = math.nan
    y = ops.attention(q, k, v, causal=True)
    assert y[0, :2, 3:, 5].isnan().all()
    y[0, :2, 3:, 5] = 0.0
    assert y.isfinite().all()
    k[1, 1, 4, 0] = math.nan
    y = ops.attention(q, k, v.nan_to_num(), causal=True)
    assert y[1, 2:, 4:].isnan().all()
    y[1, 2:, 4:] = 0.0
    assert y.isfinite().all()


@pytest.mark.parametrize("sizes", [{"T": 0}, {"S": 0}, {"B": 0}, {"H": 0, "G": 1}], ids=str)
def test_attention_empty(sizes: dict[str, int]) -> None:
    q, k, v = qkv(**sizes)
    y, lse = ops.attention(q, k, v, causal=True, return_lse=True)
    assert y.shape == q.shape and lse.shape == q.shape[:3]
    assert not y.any() and not lse.isfinite().any()


def test_attention_strided_tensors() -> None:
    buffer = torch.randn(2, 9, 3 * 4, 16).transpose(1, 2)
    q, k, v = buffer.split(4, 1)
    want = ops.attention(*(t.contiguous() for t in (q, k, v)), causal=True)
    close(ops.attention(q, k, v, causal=True), want)


def test_attention_dropout_keeps_the_right_share() -> None:
    q, k = torch.zeros(1, 4, 64, 8), torch.zeros(1, 4, 64, 8)
    eye = torch.eye(64).expand(1, 4, 64, 64)
    for p in (0.0, 0.1, 0.5, 0.9):
        weights = ops.attention(q, k, eye, dropout_p=p)  # the weights themselves, 1/64 each
        rate = (weights > 0).float().mean()
        assert abs(rate - (1 - p)) <= 4 * math.sqrt(p * (1 - p) / weights.numel())  # four sigma
        close(weights[weights > 0], torch.full_like(weights[weights > 0], 1 / 64 / (1 - p)))


def test_attention_dropout_is_reproducible_and_leaves_the_lse() -> None:
    q, k, v = qkv()
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(ops.attention(q, k, v, dropout_p=0.5, return_lse=True))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], results[2][0])
    again = ops.attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(again, results[2][0])  # the generator moved on
    close(results[2][1], ops.attention(q, k, v, return_lse=True)[1])


def test_attention_dropout_drops_the_same_in_the_backward_pass() -> None:
    q, k = torch.zeros(1, 2, 16, 8), torch.zeros(1, 2, 16, 8)
    v = torch.eye(16).expand(1, 2, 16, 16).clone().requires_grad_()
    weights = ops.attention(q, k, v, dropout_p=0.5)
    cotangent = torch.randn(1, 2, 16, 16)
    (dv,) = torch.autograd.grad(weights, v, cotangent)
    close(dv, weights.detach().mT @ cotangent)


def test_attention_dropout_hash() -> None:
    """The hash of the docstring, retyped in Python's own integers."""

    def plain_mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    values = [0, 1, 2**31, 2**32 - 1, 123456789]
    assert mix(torch.tensor(values)).tolist() == [plain_mix(v) for v in values]

    seed, (B, H, T, S), p = 0x1234_5678_9ABC, (2, 3, 4, 5), 0.4
    keep = kept(torch.tensor(seed), torch.Size((B, H, T, S)), p)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 4), (0, 1, 2, 3), (1, 0, 0, 2)]:
        row, key = (b * H + h) * T + i, 0
        for part in (seed % 2**32, seed >> 32, row % 2**32, row >> 32):
            key = plain_mix(key ^ part)
        hashed = plain_mix((key + j * 0x9E3779B9) % 2**32)
        assert keep[b, h, i, j].item() == (hashed >= int(p * 2**32))


def test_attention_dropout_hash_has_no_pattern() -> None:
    """Neighbouring rows, keys and seeds agree as often as chance has it."""
    keep = torch.stack(
        [kept(torch.tensor(seed), torch.Size((1, 2, 256, 256)), 0.5) for seed in (7, 8)]
    )
    n = keep[0].numel()
    for one, other in (
        (keep[0], keep[1]),
        (keep[..., 1:, :], keep[..., :-1, :]),
        (keep[..., 1:], keep[..., :-1]),
        (keep[:, :, 0], keep[:, :, 1]),
    ):
        agree = (one == other).float().mean().item()
        assert abs(agree - 0.5) < 4 * 0.5 / math.sqrt(n), agree


def test_attention_autocast() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.attention(q, k, v, mask=torch.randn(11).mul(0), sinks=torch.full((4,), -math.inf))
        assert ops.attention(*(t.double() for t in (q, k, v))).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    close(y, ops.attention(*(t.bfloat16() for t in (q, k, v))))


def test_attention_autocast_gradient_has_the_input_dtype() -> None:
    leaves = [t.requires_grad_() for t in qkv()]
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.attention(*leaves, causal=True)
    grads = torch.autograd.grad(y.float().sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 3


def test_attention_under_torch_func() -> None:
    q, k, v = (t[None].repeat(3, 1, 1, 1, 1) for t in qkv())
    torch.testing.assert_close(
        torch.func.vmap(lambda a, b, c: ops.attention(a, b, c, causal=True))(q, k, v),
        torch.stack([ops.attention(q[0], k[0], v[0], causal=True)] * 3),
        rtol=1e-4,
        atol=1e-5,
    )
    leaf = q[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(ops.attention(leaf, k[0], v[0]).sum(), leaf)
    got = torch.func.grad(lambda a: ops.attention(a, k[0], v[0]).sum())(q[0])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("q: got shape", {"q": torch.randn(4, 7, 16)}),
        ("k: got shape", {"k": torch.randn(2, 2, 11, 15)}),
        ("k: got 3 key/value heads, expected a divisor of q's 4", {"k": torch.randn(2, 3, 11, 16)}),
        ("k: got shape", {"k": torch.randn(1, 2, 11, 16)}),
        ("v: got shape", {"v": torch.randn(2, 2, 10, 16)}),
        ("v: got torch.float16", {"v": torch.randn(2, 2, 11, 16).half()}),
        ("v: on meta", {"v": torch.randn(2, 2, 11, 16, device="meta")}),
        ("mask: got shape", {"mask": torch.ones(7, 10, dtype=torch.bool)}),
        ("mask: got torch.int64", {"mask": torch.ones(7, 11, dtype=torch.int64)}),
        ("mask: got torch.float16", {"mask": torch.ones(7, 11).half()}),
        ("window: got", {"window": (3, -1)}),
        ("window: got", {"window": 4}),
        ("window: got", {"window": (1, 2, 3)}),
        ("window: got", {"window": (1.5, 2)}),
        ("scale: got nan", {"scale": math.nan}),
        ("softcap: got 0", {"softcap": 0.0}),
        ("softcap: got -1", {"softcap": -1.0}),
        ("kv_lengths: got shape", {"kv_lengths": torch.tensor([1, 2, 3])}),
        ("kv_lengths: got torch.float32", {"kv_lengths": torch.tensor([1.0, 2.0])}),
        ("kv_lengths: expected a tensor", {"kv_lengths": [1, 2]}),
        ("kv_lengths: on meta", {"kv_lengths": torch.tensor([1, 2], device="meta")}),
        ("q_offset: got shape", {"q_offset": torch.tensor(1)}),
        ("q_offset: expected an int or a tensor", {"q_offset": 1.5}),
        ("sinks: got shape", {"sinks": torch.randn(2)}),
        ("sinks: got torch.float16", {"sinks": torch.randn(4).half()}),
        ("alibi_slopes: got shape", {"alibi_slopes": torch.randn(2)}),
        ("alibi_slopes: got shape", {"alibi_slopes": torch.randn(4, 2)}),
        ("dropout_p: got 1.5", {"dropout_p": 1.5}),
        ("dropout_p: got 1, expected a number below", {"dropout_p": 1.0}),
        ("dropout_p: got -0.1", {"dropout_p": -0.1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_errors(argument: str, change: dict[str, Any]) -> None:
    q, k, v = qkv()
    call = {"q": q, "k": k, "v": v, **change}
    for _ in range(2):  # what a call was refused for is not forgotten
        with pytest.raises((TypeError, ValueError), match=f"^{argument}"):
            ops.attention(**call)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"q_offset": torch.tensor([1, 2])}, {"q_offset": torch.tensor([1])}),
        ({"q_offset": 1}, {"q_offset": torch.tensor([1])}),
        ({"kv_lengths": torch.tensor([1, 2])}, {"kv_lengths": torch.tensor([1])}),
        ({"mask": torch.ones(7, 11)}, {"mask": torch.ones(7, 11).half()}),
        ({"sinks": torch.ones(4)}, {"sinks": torch.ones(3)}),
        ({"alibi_slopes": torch.ones(4)}, {"alibi_slopes": torch.ones(3)}),
        ({"window": (1, 0)}, {"window": (-1, 0)}),
        ({}, {"dropout_p": 2.0}),
    ],
    ids=lambda value: next(iter(value), "none"),
)
def test_attention_a_good_call_does_not_let_a_bad_one_pass(
    good: dict[str, Any], bad: dict[str, Any]
) -> None:
    """The check runs once for each key, so the key must hold all that it depends on."""
    q, k, v = qkv()
    ops.attention(q, k, v, **good)
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(bad))}: "):
        ops.attention(q, k, v, **bad)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_attention_hidden_values_change_no_bit(backend: str, value: float) -> None:
    """Beyond one block of keys too: rows that may not see key 450 are as if it were not there."""
    q, k, v = (torch.randn(1, 1, 600, 64) for _ in range(3))
    poisoned = v.clone()
    poisoned[0, 0, 450] = value
    clean = ops.attention(q, k, v, causal=True)
    found = ops.attention(q, k, poisoned, causal=True)
    same(backend, found[:, :, :450], clean[:, :, :450])
    assert not found[:, :, 450:].isfinite().any()


def test_attention_scale_0_has_finite_gradients() -> None:
    q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
    found = torch.autograd.grad(ops.attention(q, k, v, scale=0.0).square().sum(), (q, k, v))
    assert all(t.isfinite().all() for t in found)
    assert found[2].abs().max() > 0


def test_attention_huge_windows_and_offsets() -> None:
    """Far beyond any key they bound nothing, or everything; nothing overflows."""
    q, k, v = (torch.randn(1, 2, 7, 16) for _ in range(3))
    whole = ops.attention(q, k, v)
    for far in (2**31, 2**63 - 1, 2**63):
        close(ops.attention(q, k, v, window=(far, far)), whole)
    assert not ops.attention(q, k, v, causal=True, q_offset=-(2**63)).any()
    far_back = torch.tensor([-(2**62)])
    assert not ops.attention(q, k, v, causal=True, q_offset=far_back).any()


@pytest.mark.skipif(native.module is None, reason=native.why_not)
def test_attention_raw_backward_refuses_empty_sinks() -> None:
    """Their pointer is null, as that of no sinks is, and their gradient was asked for."""
    q, k, v = qkv()
    rest: Any = (None, None, None, torch.empty(0), None, None, None, False, -1, -1, 0.25, 0.0, 0.0)
    backward = native.bind("attention_backward", native.BEST_LEVEL)
    with pytest.raises(RuntimeError, match="sinks: expected"):
        backward(q, None, q, torch.zeros(q.shape[:3]), q, k, v, *rest)
