"""attention's options: lengths, windows, offsets, soft-cap, sinks, ALiBi, dropout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import close, qkv

from llmcore import dispatch, native, ops
from llmcore.ops.attention_definition import kept, mix

pytestmark = pytest.mark.usefixtures("backend")


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


def test_attention_huge_windows_and_offsets() -> None:
    """Far beyond any key they bound nothing, or everything; nothing overflows."""
    q, k, v = (torch.randn(1, 2, 7, 16) for _ in range(3))
    whole = ops.attention(q, k, v)
    for far in (2**31, 2**63 - 1, 2**63):
        close(ops.attention(q, k, v, window=(far, far)), whole)
    assert not ops.attention(q, k, v, causal=True, q_offset=-(2**63)).any()
    far_back = torch.tensor([-(2**62)])
    assert not ops.attention(q, k, v, causal=True, q_offset=far_back).any()


def test_attention_scale_0_has_finite_gradients() -> None:
    q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
    found = torch.autograd.grad(ops.attention(q, k, v, scale=0.0).square().sum(), (q, k, v))
    assert all(t.isfinite().all() for t in found)
    assert found[2].abs().max() > 0


@pytest.mark.skipif(native.module is None, reason=native.why_not)
def test_attention_raw_backward_refuses_empty_sinks() -> None:
    """Their pointer is null, as that of no sinks is, and their gradient was asked for."""
    q, k, v = qkv()
    rest: Any = (0.25, False, None, None, None, None, torch.empty(0))
    backward = native.bind("attention_backward", native.BEST_LEVEL)
    with pytest.raises(RuntimeError, match="sinks: expected"):
        backward(q, None, q, torch.zeros(q.shape[:3]), False, False, q, k, v, *rest)


def test_attention_steps_of_decoding_share_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is checked anew as the cache grows, with lengths and without; a mask must fit."""
    op = dispatch.REGISTRY["attention"]
    monkeypatch.setattr(op, "chosen", {})
    for keys in (5, 6, 7):
        q, k, v = qkv(T=1, S=keys)
        ops.attention(q, k, v, causal=True, q_offset=keys - 1)
        ops.attention(q, k, v, kv_lengths=torch.tensor([keys, 2]))
        ops.attention(q, k, v, mask=torch.ones(keys, dtype=torch.bool))
    assert len(op.chosen) == 1 + 1 + 3
