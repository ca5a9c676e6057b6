from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import llmcore
from llmcore import ops

pytestmark = pytest.mark.usefixtures("backend")

LENGTHS_Q, LENGTHS_K = (5, 1, 0, 7), (9, 4, 3, 7)


def ends(lengths: tuple[int, ...], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(D: int = 16, Dv: int = 8) -> Any:
    q = torch.randn(sum(LENGTHS_Q), 4, D)
    return q, torch.randn(sum(LENGTHS_K), 2, D), torch.randn(sum(LENGTHS_K), 2, Dv)


def one_by_one(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    """attention of each sequence alone, packed again."""
    split = [
        t.split(lengths)
        for t, lengths in zip(tensors, (LENGTHS_Q, LENGTHS_K, LENGTHS_K), strict=True)
    ]
    parts = [
        ops.attention(*(t.transpose(0, 1)[None] for t in part), **options)[0].transpose(0, 1)
        for part in zip(*split, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (2, 1)}, {"causal": True, "softcap": 3.0, "scale": 0.4}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_attention_varlen_is_attention_of_each_sequence(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    tensors, results = packed(), []
    where: Any = (ends(LENGTHS_Q, dtype), ends(LENGTHS_K, dtype))
    cotangent = torch.randn(sum(LENGTHS_Q), 4, 8)
    for function in (
        lambda q, k, v: ops.attention_varlen(q, k, v, *where, **options),
        lambda q, k, v: one_by_one(q, k, v, **options),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, cotangent)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_varlen_gives_the_bits_of_attention(dtype: torch.dtype, backend: str) -> None:
    if backend != "best":
        pytest.skip("the definition's sums are torch's, which promise no order")
    lengths = (70, 1, 300, 0, 3)
    where = (ends(lengths), ends(lengths))
    tensors = [torch.randn(sum(lengths), heads, 64).to(dtype) for heads in (4, 2, 2)]
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = ops.attention_varlen(*leaves, *where, causal=True)
    cotangent = torch.randn(y.shape).to(dtype)
    got = (y.detach(), *torch.autograd.grad(y, leaves, cotangent))
    for *parts, dy in zip(*(t.split(lengths) for t in (*tensors, cotangent)), strict=True):
        alone: list[Any] = [t.transpose(0, 1)[None].clone().requires_grad_() for t in parts]
        y = ops.attention(*alone, causal=True)
        want = (y.detach(), *torch.autograd.grad(y, alone, dy.transpose(0, 1)[None]))
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine[: len(dy)], theirs[0].transpose(0, 1))
        got = tuple(t[len(dy) :] for t in got)


def test_attention_varlen_native_ends_must_be_in_order() -> None:
    q, k, v = packed()
    with llmcore.use("cpu"), pytest.raises(RuntimeError, match="cu_seqlens_q"):
        ops.attention_varlen(q, k, v, ends(LENGTHS_Q).flip(0), ends(LENGTHS_K))
    with llmcore.use("cpu"), pytest.raises(RuntimeError, match="cu_seqlens_k"):
        ops.attention_varlen(q, k, v, ends(LENGTHS_Q), ends(LENGTHS_K) * 2)


def test_attention_varlen_sequences_do_not_meet() -> None:
    q, k, v = packed()
    where: Any = (ends(LENGTHS_Q), ends(LENGTHS_K))
    y = ops.attention_varlen(q, k, v, *where)
    k[:9], v[:9] = math.nan, math.inf  # the first sequence's
    changed = ops.attention_varlen(q, k, v, *where)
    assert changed[:5].isnan().all()
    torch.testing.assert_close(changed[5:], y[5:])


def test_attention_varlen_what_is_past_the_last_end_is_nobodys() -> None:
    q, k, v = packed()
    want = ops.attention_varlen(q, k, v, ends(LENGTHS_Q), ends(LENGTHS_K), causal=True)
    longer = [torch.cat((t, torch.full_like(t[:3], math.nan))) for t in (q, k, v)]
    where = (ends(LENGTHS_Q), ends(LENGTHS_K))
    y = ops.attention_varlen(longer[0], longer[1], longer[2], where[0], where[1], causal=True)
    torch.testing.assert_close(y[: len(q)], want)
    assert not y[len(q) :].any()


def test_attention_varlen_one_sequence_is_attention() -> None:
    q, k, v = torch.randn(6, 4, 16), torch.randn(6, 2, 16), torch.randn(6, 2, 16)
    one = torch.tensor([0, 6])
    y = ops.attention_varlen(q, k, v, one, one, causal=True)
    want = ops.attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), causal=True)
    torch.testing.assert_close(y, want[0].transpose(0, 1), rtol=1e-4, atol=1e-6)


def test_attention_varlen_no_sequences() -> None:
    empty = torch.tensor([0])
    nothing = torch.randn(0, 2, 8)
    y = ops.attention_varlen(nothing, nothing, nothing, empty, empty)
    assert y.shape == (0, 2, 8)


def test_attention_varlen_autocast() -> None:
    where: Any = (ends(LENGTHS_Q), ends(LENGTHS_K))
    tensors: Any = packed()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.attention_varlen(*tensors, *where)
    want = ops.attention_varlen(*(t.bfloat16() for t in tensors), *where)
    assert y.dtype == torch.bfloat16 and torch.equal(y, want)


def test_attention_varlen_errors() -> None:
    q, k, v = packed()
    where: Any = (ends(LENGTHS_Q), ends(LENGTHS_K))
    calls: Any = (
        (r"q: got shape .* expected \(total_q, H, D\)", (q[None], k, v, *where)),
        (r"k: got shape .* as q has D", (q, k[..., :15], v, *where)),
        ("k: got 2 key/value heads, expected a divisor of q's 3", (q[:, :3], k, v, *where)),
        ("v: got shape", (q, k, v[:-1], *where)),
        (
            r"cu_seqlens_q: got \(\), expected a tensor of shape \(B \+ 1,\)",
            (q, k, v, where[0][0], where[1]),
        ),
        (r"cu_seqlens_k: got shape \(4,\)", (q, k, v, where[0], where[1][:-1])),
        ("cu_seqlens_k: on meta", (q, k, v, where[0], where[1].to("meta"))),
    )
    for match, args in calls:
        with pytest.raises(ValueError, match=match):
            ops.attention_varlen(*args)
    with pytest.raises(TypeError, match="cu_seqlens_q: expected a tensor, got list"):
        ops.attention_varlen(q, k, v, [0, 3], where[1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"cu_seqlens_q: got torch.float32"):
        ops.attention_varlen(q, k, v, where[0].float(), where[1])
    with pytest.raises(ValueError, match="window: got"):
        ops.attention_varlen(q, k, v, *where, window=(-1, 0))
