from __future__ import annotations

import pytest
import torch

from llmcore import ops

pytestmark = pytest.mark.usefixtures("backend")
interleaved = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])


def table(positions: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position / 10000^(r / half)."""
    angle = positions[..., None] / 10000 ** (torch.arange(half) / half)
    return angle.cos(), angle.sin()


@interleaved
def test_rope_equals_a_complex_product(interleaved: bool) -> None:
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    y = ops.rope(x, angle.cos(), angle.sin(), interleaved=interleaved)

    def pairs(t: torch.Tensor) -> torch.Tensor:
        split = t.unflatten(-1, (4, 2)) if interleaved else t.unflatten(-1, (2, 4)).mT
        return torch.view_as_complex(split.contiguous())

    torch.testing.assert_close(pairs(y), pairs(x) * torch.polar(torch.ones(5, 4), angle))


@interleaved
def test_rope_keeps_norms(interleaved: bool) -> None:
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    y = ops.rope(x, angle.cos(), angle.sin(), interleaved=interleaved)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


@interleaved
def test_rope_products_depend_on_relative_positions_only(interleaved: bool) -> None:
    q, k, places = torch.randn(1, 1, 6, 16), torch.randn(1, 1, 6, 16), torch.arange(6)
    scores = [
        ops.rope(q, *table(places + shift, 8), interleaved=interleaved)
        @ ops.rope(k, *table(places + shift, 8), interleaved=interleaved).mT
        for shift in (0, 11)
    ]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


@interleaved
def test_rope_angle_0_changes_nothing_and_the_opposite_turns_back(interleaved: bool) -> None:
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    still = ops.rope(x, torch.ones(5, 4), torch.zeros(5, 4), interleaved=interleaved)
    assert torch.equal(still, x)
    turned = ops.rope(x, angle.cos(), angle.sin(), interleaved=interleaved)
    back = ops.rope(turned, angle.cos(), -angle.sin(), interleaved=interleaved)
    torch.testing.assert_close(back, x)


@interleaved
def test_rope_rest_of_the_head_is_copied(interleaved: bool) -> None:
    x, angle = torch.randn(2, 3, 5, 11), torch.randn(5, 3)
    y = ops.rope(x, angle.cos(), angle.sin(), interleaved=interleaved)
    assert torch.equal(y[..., 6:], x[..., 6:])
    part = ops.rope(x[..., :6], angle.cos(), angle.sin(), interleaved=interleaved)
    torch.testing.assert_close(y[..., :6], part)


@interleaved
def test_rope_a_table_for_each_sequence(interleaved: bool) -> None:
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 4)
    y = ops.rope(x, angle.cos(), angle.sin(), interleaved=interleaved)
    for row in range(2):
        alone = ops.rope(
            x[row : row + 1], angle[row].cos(), angle[row].sin(), interleaved=interleaved
        )
        assert torch.equal(y[row : row + 1], alone)


@interleaved
def test_rope_gradient_turns_back(interleaved: bool) -> None:
    x, angle = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(5, 4)
    cos, sin, cotangent = angle.cos(), angle.sin(), torch.randn(2, 3, 5, 8)
    (dx,) = torch.autograd.grad(ops.rope(x, cos, sin, interleaved=interleaved), x, cotangent)
    torch.testing.assert_close(dx, ops.rope(cotangent, cos, -sin, interleaved=interleaved))


def test_rope_out_may_be_x() -> None:
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    y = ops.rope(x, angle.cos(), angle.sin())
    room = torch.empty(2, 3, 5, 8)
    assert ops.rope(x, angle.cos(), angle.sin(), out=room) is room
    assert torch.equal(room, y)
    assert ops.rope(x, angle.cos(), angle.sin(), out=x) is x
    assert torch.equal(x, y)


def test_rope_errors() -> None:
    x, cos = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"x: got shape \(3, 5, 8\), expected \(B, H, T, D\)"):
        ops.rope(x[0], cos, cos)
    with pytest.raises(ValueError, match=r"cos: got shape \(4, 4\), expected .* T = 5, B = 2"):
        ops.rope(x, cos[:4], cos[:4])
    with pytest.raises(ValueError, match=r"cos: got shape \(5, 5\).* R <= 8"):
        ops.rope(x, torch.randn(5, 5), torch.randn(5, 5))
    with pytest.raises(ValueError, match=r"cos: got shape \(3, 5, 4\)"):
        ops.rope(x, torch.randn(3, 5, 4), torch.randn(3, 5, 4))
    with pytest.raises(ValueError, match=r"sin: got shape \(5, 3\), expected \(5, 4\)"):
        ops.rope(x, cos, cos[:, :3])
    with pytest.raises(TypeError, match=r"sin: got torch.float16"):
        ops.rope(x, cos, cos.half())
    with pytest.raises(ValueError, match="out: got shape"):
        ops.rope(x, cos, cos, out=torch.empty(2, 3, 5, 7))
