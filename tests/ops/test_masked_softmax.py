from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llmcore import dispatch, ops

pytestmark = pytest.mark.usefixtures("backend")


def test_masked_softmax_without_a_mask_is_softmax_of_the_scaled() -> None:
    x = torch.randn(5, 3, 97)
    torch.testing.assert_close(ops.masked_softmax(x, scale=0.3), F.softmax(x * 0.3, -1))


@pytest.mark.parametrize(("rows", "keys"), [(7, 7), (3, 9), (1, 5)])
def test_masked_softmax_causal_is_aligned_at_the_end(rows: int, keys: int) -> None:
    x = torch.randn(2, rows, keys)
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    want = F.softmax(x.masked_fill(~seen, -math.inf), -1)
    torch.testing.assert_close(ops.masked_softmax(x, causal=True), want)


def test_masked_softmax_causal_ignores_the_future() -> None:
    x = torch.randn(6, 6)
    y = ops.masked_softmax(x, causal=True)
    for row in range(6):
        x[row, row + 1 :] = math.nan
    assert torch.equal(ops.masked_softmax(x, causal=True), y)
    assert torch.equal(y.triu(1), torch.zeros(6, 6))


def test_masked_softmax_float_mask_is_added_after_the_scale() -> None:
    x, mask = torch.randn(2, 5, 9), torch.randn(5, 9)
    want = F.softmax(x * 0.25 + mask, -1)
    torch.testing.assert_close(ops.masked_softmax(x, mask=mask, scale=0.25), want)


def test_masked_softmax_bool_mask_equals_minus_inf() -> None:
    x, seen = torch.randn(4, 5, 9), torch.rand(4, 1, 9) < 0.7
    seen[..., 0] = True
    added = torch.zeros(4, 1, 9).masked_fill(~seen, -math.inf)
    y = ops.masked_softmax(x, mask=seen)
    torch.testing.assert_close(y, ops.masked_softmax(x, mask=added), rtol=0, atol=0)
    torch.testing.assert_close(y.sum(-1), torch.ones(4, 5))


@pytest.mark.parametrize("kind", ["bool", "float", "causal", "scores"])
def test_masked_softmax_row_that_sees_nothing_is_zero(kind: str) -> None:
    x = torch.randn(3, 2)
    seen = torch.tensor([[False, False], [True, False], [True, True]])
    options: dict[str, object] = {}
    if kind == "bool":
        options = {"mask": seen}
    elif kind == "float":
        options = {"mask": torch.zeros(3, 2).masked_fill(~seen, -math.inf)}
    elif kind == "causal":
        options = {"causal": True}  # one row more than keys
    else:
        x = x.masked_fill(~seen, -math.inf)
    x.requires_grad_()
    y = ops.masked_softmax(x, **options)  # type: ignore[arg-type]
    assert torch.equal(y[0], torch.zeros(2))
    assert torch.equal(y[1], torch.tensor([1.0, 0.0]))
    (dx,) = torch.autograd.grad(y, x, torch.randn(3, 2))
    assert torch.equal(dx[0], torch.zeros(2))
    assert dx.isfinite().all()


def test_masked_softmax_seen_nan_spreads_and_masked_does_not() -> None:
    x = torch.randn(2, 4)
    x[0, 1] = x[1, 1] = math.nan
    seen = torch.tensor([[True, True, True, True], [True, False, True, True]])
    leaf = x.clone().requires_grad_()
    y = ops.masked_softmax(leaf, mask=seen)
    assert y[0].isnan().all()
    torch.testing.assert_close(y[1, [0, 2, 3]], F.softmax(x[1, [0, 2, 3]], -1))
    (dx,) = torch.autograd.grad(y[1].square().sum(), leaf)
    assert dx[1].isfinite().all() and dx[1, 1] == 0


def test_masked_softmax_errors() -> None:
    x = torch.randn(5, 7)
    with pytest.raises(ValueError, match=r"mask: got shape \(4, 7\).* broadcasts to \(5, 7\)"):
        ops.masked_softmax(x, mask=torch.ones(4, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: got shape"):
        ops.masked_softmax(x, mask=torch.ones(2, 5, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask: got torch.int64"):
        ops.masked_softmax(x, mask=torch.ones(5, 7, dtype=torch.int64))
    with pytest.raises(TypeError, match="mask: expected a tensor, got list"):
        ops.masked_softmax(x, mask=[True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask: on meta"):
        ops.masked_softmax(x, mask=torch.ones(5, 7, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="x: got shape"):
        ops.masked_softmax(x[0], causal=True)
    with pytest.raises(ValueError, match="scale: got nan"):
        ops.masked_softmax(x, scale=math.nan)
    with pytest.raises(TypeError, match="scale: expected a number, got str"):
        ops.masked_softmax(x, scale="half")  # type: ignore[arg-type]


def test_masked_softmax_masks_of_any_strides() -> None:
    x, seen = torch.randn(2, 3, 1, 5, 19), torch.rand(3, 1, 19, 5) < 0.6
    added = torch.randn(2, 1, 1, 19, 5)
    for mask in (seen.mT, seen.mT[..., :1], added.mT, added.mT[..., :1], added[0, 0, 0, :, 0]):
        fresh = mask.expand(x.shape).contiguous()
        want = ops.masked_softmax(x, mask=fresh, causal=True)
        got = ops.masked_softmax(x, mask=mask, causal=True)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_masked_softmax_mask_with_a_gradient_takes_the_definition() -> None:
    x, mask = torch.randn(3, 5), torch.randn(5)
    ops.masked_softmax(x, mask=mask)  # the choice for this call must not be taken again
    mask.requires_grad_()
    (dmask,) = torch.autograd.grad(ops.masked_softmax(x, mask=mask).square().sum(), mask)
    assert dmask.abs().sum() > 0
    assert dispatch.explain("masked_softmax", x, mask=mask).chosen == "reference"


def test_masked_softmax_out_may_be_x() -> None:
    x = torch.randn(2, 5, 33)
    y = ops.masked_softmax(x, causal=True, scale=0.5)
    assert ops.masked_softmax(x, causal=True, scale=0.5, out=x) is x
    assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match="out: has no gradient"):
        ops.masked_softmax(torch.randn(2, 3, requires_grad=True), out=torch.empty(2, 3))


def test_masked_softmax_second_derivative() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    results = []
    for y in (
        ops.masked_softmax(x, causal=True, scale=0.5),
        F.softmax((x * 0.5).masked_fill(hidden, -math.inf), -1),
    ):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
