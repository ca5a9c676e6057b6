from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import close, qkv, sdpa

from llmcore import ops

pytestmark = pytest.mark.usefixtures("backend")


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
