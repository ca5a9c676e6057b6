"""Derivatives of every kind through the kernels, against those of the definitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import llmcore
from llmcore import ops

Function = Callable[[torch.Tensor], torch.Tensor]

# Inputs that are one another, or are computed from one another: each path counts once.
SHARED: dict[str, Function] = {
    "rms_norm": lambda x: ops.rms_norm(x, x.mean(0)),
    "layer_norm": lambda x: ops.layer_norm(x, x.mean(0), x[0] * 1.0),
    "add_rms_norm": lambda x: ops.add_rms_norm(x, x * 2, x.mean(0), 1e-6)[0],
    "softmax": ops.softmax,
    "masked_softmax": lambda x: ops.masked_softmax(x, causal=True),
    "linear": lambda x: ops.linear(x, x),
    "swiglu": lambda x: ops.swiglu(x, x * 2),
    "gelu": ops.gelu,
    "attention": lambda x: ops.attention(*[x.view(1, 2, 4, 4)] * 3, causal=True),
}
CASES = pytest.mark.parametrize("name", SHARED)


@CASES
def test_derivatives_shared_inputs_with_create_graph(name: str) -> None:
    function, x = SHARED[name], torch.randn(4, 8, requires_grad=True)
    cotangent = torch.randn_like(function(x))
    (plain,) = torch.autograd.grad((function(x) * cotangent).sum(), x)
    (graph,) = torch.autograd.grad((function(x) * cotangent).sum(), x, create_graph=True)
    torch.testing.assert_close(graph, plain, rtol=1e-4, atol=1e-5)
    with llmcore.use("reference"):
        (exact,) = torch.autograd.grad((function(x) * cotangent).sum(), x)
    torch.testing.assert_close(plain, exact, rtol=1e-4, atol=1e-5)


@CASES
def test_derivatives_jacobian_both_ways(name: str) -> None:
    """Never a zero tangent: where a kernel has no forward mode, the definition runs."""
    function, x = SHARED[name], torch.randn(4, 8)
    with llmcore.use("reference"):
        expected = torch.func.jacrev(function)(x)
    assert expected.abs().max() > 1e-3
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(function)(x), expected, rtol=1e-4, atol=1e-5)


def test_derivatives_dual_tensors() -> None:
    x, tangent = torch.randn(3, 8), torch.randn(3, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(ops.rms_norm(dual)).tangent
    expected = torch.func.jvp(
        lambda t: t * (t.square().mean(-1, True) + 1e-6).rsqrt(), (x,), (tangent,)
    )
    torch.testing.assert_close(found, expected[1])


def test_derivatives_out_is_a_write_that_autograd_sees() -> None:
    a = torch.randn(4, 8, requires_grad=True)
    y = a.exp()
    with torch.no_grad():
        ops.rms_norm(torch.randn(4, 8), out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), a)


def test_out_may_be_the_input_but_not_overlap_it() -> None:
    buffer = torch.randn(65)
    x = buffer[:64].view(4, 16)
    expected = ops.rms_norm(x)
    with pytest.raises(ValueError, match=r"^out: overlaps"):
        ops.rms_norm(x, out=buffer[1:].view(4, 16))
    assert torch.equal(ops.rms_norm(x, out=x), expected)
    both = torch.empty(4, 16)
    with pytest.raises(ValueError, match=r"^out"):
        ops.add_rms_norm(expected, expected, torch.ones(16), out=(both, both[:]))
    row, weight = torch.randn(16), torch.ones(16)
    with pytest.raises(ValueError, match=r"^out: overlaps"):  # it is read after the sum is written
        ops.add_rms_norm(row, row, weight, out=(torch.empty(16), weight))
