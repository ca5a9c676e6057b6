from __future__ import annotations

import math

import pytest
import torch

from llmcore import native
from llmcore.ops.quantize_rows import definition, quantize_rows


def rows(width: int) -> torch.Tensor:
    """Of every kind: zeros, halves between integers, huge, subnormal, inf and NaN among them."""
    x = torch.randn(9, width) * torch.tensor([1.0, 0, 1e-3, 1e30, 1, 1e-38, 1e-42, 1, 1])[:, None]
    if width > 2:
        x[4] = (torch.randint(-253, 254, (width,)) / 2).round(decimals=1)
        x[4, 0], x[7, 1], x[8, 2] = 127.0, -math.inf, math.nan
    return x


@pytest.mark.parametrize("width", [1, 7, 16, 64, 80, 341])
def test_quantize_rows_gives_the_bits_of_the_definition(width: int) -> None:
    x = rows(width)
    want, want_scale = definition(x)
    y, scale = quantize_rows(x)
    assert torch.equal(y, want)
    assert torch.equal(scale.nan_to_num(-1.0), want_scale.nan_to_num(-1.0))


@pytest.mark.parametrize("level", native.LEVELS)
def test_quantize_rows_every_level_gives_the_same_bits(level: str) -> None:
    from llmcore import device

    levels = device.cpu_levels()
    if levels.get(level, "not built"):
        pytest.skip(f"{level} does not run here")
    x = rows(80)[None, None]
    y, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[:3])
    native.op("store_rows")(list(levels).index(level), x, y, scale)
    want, want_scale = definition(x)
    assert torch.equal(y, want)
    assert torch.equal(scale.nan_to_num(-1.0), want_scale.nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize_rows_raw_op_rounds_to_other_dtypes(dtype: torch.dtype) -> None:
    if native.module is None:
        pytest.skip(native.why_not)
    cache = torch.zeros(2, 3, 9, 20, dtype=dtype)
    x = torch.randn(2, 3, 2, 20)
    native.op("store_rows")(native.BEST_LEVEL, x, cache[:, :, 4:6])
    assert torch.equal(cache[:, :, 4:6], x.to(dtype))
    assert not cache[:, :, :4].any() and not cache[:, :, 6:].any()


def test_quantize_rows_rounds_to_nearest_even() -> None:
    y, scale = quantize_rows(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.4]))
    assert y.tolist() == [127, 0, 2, 2, 0, -2, 3]
    assert scale.item() == 1.0


def test_quantize_rows_stands_for_x() -> None:
    x = torch.randn(5, 64)
    y, scale = quantize_rows(x)
    assert ((y * scale[:, None] - x).abs() <= scale[:, None] / 2 * (1 + 1e-5)).all()
    assert (y.abs().amax(-1) == 127).all()


def test_quantize_rows_edges() -> None:
    y, scale = quantize_rows(torch.tensor([[0.0, 0.0], [math.inf, 1.0], [math.nan, 1.0]]))
    assert not y.any()
    assert scale[0] == 0.0 and scale[1:].isnan().all()
    for shape in ((0, 4), (3, 0), (0,)):
        y, scale = quantize_rows(torch.empty(shape))
        assert y.shape == shape and scale.shape == shape[:-1]
        assert not scale.any()


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 2, 3, 6), (2, 1, 2, 3, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_quantize_rows_into_a_part_of_a_cache(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    want = quantize_rows(x)
    places = (*shape[:-1], 2)
    y = torch.zeros(*places, shape[-1], dtype=torch.int8)
    scale = torch.zeros(places)
    found = quantize_rows(x, out=(y[..., 1, :], scale[..., 1]))
    for got, expected in zip(found, want, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(y[..., 1, :], want[0]) and torch.equal(scale[..., 1], want[1])
    assert not y[..., 0, :].any() and not scale[..., 0].any()


def test_quantize_rows_strided_input_and_gradient() -> None:
    x = torch.randn(4, 6, 5, requires_grad=True)
    y, scale = quantize_rows(x.transpose(1, 2))
    want = quantize_rows(x.detach().transpose(1, 2).contiguous())
    assert torch.equal(y, want[0]) and torch.equal(scale, want[1])
    assert not scale.requires_grad


def test_quantize_rows_compiles() -> None:
    x = torch.randn(3, 8)
    y, scale = torch.compile(quantize_rows, fullgraph=True, backend="eager")(x)
    want = quantize_rows(x)
    assert torch.equal(y, want[0]) and torch.equal(scale, want[1])


def test_quantize_rows_errors() -> None:
    x = torch.randn(3, 8)
    y, scale = quantize_rows(x)
    for argument, call in (
        ("x: got torch.int8", lambda: quantize_rows(y)),
        ("x: got a scalar", lambda: quantize_rows(torch.tensor(1.0))),
        ("out: got torch.float32", lambda: quantize_rows(x, out=(x, scale))),
        ("out: got shape", lambda: quantize_rows(x, out=(y, scale[:2]))),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{argument}"):
            call()
