from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import llmcore
from llmcore import native, ops
from llmcore.dispatch import REGISTRY, Candidate
from llmcore.ops.linear import as_multiplied, rounded_to_int8
from llmcore.ops.packed_weight import FORMATS, PackedWeight, from_integers

pytestmark = pytest.mark.usefixtures("backend")
formats = pytest.mark.parametrize("format", FORMATS)


def candidates_for(x: torch.Tensor, weight: PackedWeight) -> list[Candidate]:
    """Every level that runs here, and the definition."""
    return [c for c in REGISTRY["linear"].candidates if not c.reasons(x, weight, None)]


def packed_in_every_way(weight: torch.Tensor, group: int = 32) -> dict[str, PackedWeight]:
    """The weight in int8, in int4 and in asymmetric int4."""
    packed = {format: llmcore.pack(weight, format, group) for format in ("int8", "int4")}
    return packed | {"int4_asymmetric": llmcore.pack(weight, "int4", group, asymmetric=True)}


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no_bias"])
def test_linear_equals_torch(biased: bool) -> None:
    tensors = [torch.randn(4, 6, 33), torch.randn(17, 33), torch.randn(17)]
    cotangent, results = torch.randn(4, 6, 17), []
    for function in (ops.linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in tensors[: 2 + biased]]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, cotangent)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_sums_half_types_in_float32(dtype: torch.dtype) -> None:
    """4096 ones: a sum in bfloat16 stops at 256, one in float16 at 2048."""
    x, weight = torch.ones(2, 4096, dtype=dtype), torch.ones(3, 4096, dtype=dtype)
    assert torch.equal(ops.linear(x, weight), torch.full((2, 3), 4096.0, dtype=dtype))


def test_linear_bias_is_added_before_the_rounding() -> None:
    x, weight = torch.ones(1, 2).bfloat16(), torch.tensor([[256.0, 1.0]]).bfloat16()
    y = ops.linear(x, weight, torch.tensor([1.0]))  # 257 alone would round to 256
    assert y.item() == 258.0


def test_linear_nan_stays_in_its_row() -> None:
    x, weight = torch.randn(3, 40), torch.randn(7, 40)
    x[1, 3] = math.nan
    y = ops.linear(x, weight)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_linear_out_takes_the_result() -> None:
    x, weight, bias = torch.randn(2, 5, 33), torch.randn(9, 33), torch.randn(9)
    room = torch.empty(2, 5, 9)
    assert ops.linear(x, weight, bias, out=room) is room
    assert torch.equal(room, ops.linear(x, weight, bias))


def test_linear_by_torch_takes_out_and_gives_gradients() -> None:
    """What runs a plain weight on a GPU."""
    tensors = [torch.randn(2, 5, 33), torch.randn(9, 33), torch.randn(9)]
    cotangent, results = torch.randn(2, 5, 9), []
    for backend in ("torch", "reference"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with llmcore.use(backend):
            y = ops.linear(*leaves)
            results.append((y, *torch.autograd.grad(y, leaves, cotangent)))
            for bias in (tensors[2], None):
                room = torch.empty(2, 5, 9)
                ops.linear(*tensors[:2], bias, out=room)
                torch.testing.assert_close(room, ops.linear(*tensors[:2], bias))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_linear_autocast() -> None:
    x, weight, bias = torch.randn(5, 33), torch.randn(9, 33), torch.randn(9)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, weight, bias)
        assert ops.linear(x.double(), weight.double()).dtype == torch.float64
        packed = ops.linear(x, llmcore.pack(weight, "fp32"))
    assert y.dtype == packed.dtype == torch.bfloat16
    assert torch.equal(y, ops.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


@formats
def test_linear_out_apart_from_a_packed_weight(format: str) -> None:
    """What a product reads must not be overwritten by it."""
    packed = llmcore.pack(torch.randn(16, 16), format, 16)
    room = packed.values if packed.scales is None else packed.scales[0]
    x = torch.randn(16 if packed.scales is None else 1, 16, dtype=room.dtype)
    with pytest.raises(ValueError, match="out: overlaps the memory of an input"):
        ops.linear(x, packed, out=room)


@formats
def test_linear_packed_is_linear_of_the_dequantized(format: str) -> None:
    x, bias = torch.randn(5, 64), torch.randn(9)
    packed = llmcore.pack(torch.randn(9, 64), format)
    y = ops.linear(x, packed, bias)
    expected = F.linear(as_multiplied(x, packed), packed.dequantize(), bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_linear_rounded_x_is_near_x() -> None:
    """Half of 127 steps to either side, of each group by itself; what is representable stays."""
    x = torch.randn(3, 64) * torch.logspace(-20, 20, 64)
    rounded = rounded_to_int8(x, 32)
    step = x.unflatten(1, (2, 32)).abs().amax(-1, keepdim=True) / 127
    error = (rounded - x).abs().unflatten(1, (2, 32))
    assert (error <= 0.50001 * step).all() and error.amax() > 0
    whole = torch.randint(-127, 128, (2, 64)).float()
    whole[:, ::32] = 127.0
    torch.testing.assert_close(rounded_to_int8(whole, 32), whole, rtol=1e-6, atol=0)
    assert rounded_to_int8(torch.full((1, 32), 1e-31), 32).abs().amax() == 0


def test_linear_beside_bf16_rounds_x() -> None:
    """x counts as bfloat16 at every level, to nearest, ties to even; NaN and inf as in torch."""
    x, packed = torch.randn(4, 96), llmcore.pack(torch.randn(40, 96), "bf16")
    x[0, 0] = 1.0 + 2**-8  # between two neighbours, the even one of which is 1
    x[1, 3], x[2, 40] = math.nan, math.inf
    for candidate in candidates_for(x, packed):
        y = candidate.forward(x, packed, None)
        assert torch.equal(y.isnan(), candidate.forward(x.bfloat16().float(), packed, None).isnan())
        assert y[1].isnan().all() and y[2].isinf().all(), candidate.backend
        rows = [0, 3]
        rounded = candidate.forward(x[rows].bfloat16().float(), packed, None)
        assert torch.equal(candidate.forward(x[rows], packed, None), rounded), candidate.backend
        halves = candidate.forward(x[rows].bfloat16(), packed, None)
        assert torch.equal(halves, rounded.bfloat16()), candidate.backend
    assert not torch.equal(rounded, F.linear(x[rows], packed.dequantize()))


@pytest.mark.parametrize("group", [16, 32, 64, 256])
def test_linear_of_integers_is_the_integers_product(group: int) -> None:
    """Whole numbers on both sides, at the ends of their range: no sum is cut off or wraps."""
    draw = torch.Generator().manual_seed(group)
    x = torch.randint(-127, 128, (11, 512), generator=draw).float()
    x[0], x[1], x[:, ::16] = 127.0, -127.0, 127.0  # the step is 1 in every group
    scales = torch.ones(35, 512 // group, dtype=torch.float16)
    for format, low, high in (("int8", -128, 127), ("int4", -8, 7)):
        q = torch.randint(low, high + 1, (35, 512), generator=draw)
        q[0], q[1] = low, high
        q[2, ::2], q[2, 1::2] = low, high
        y = x.double() @ q.T.double()
        packed = from_integers(format, q, scales)
        for candidate in candidates_for(x, packed):
            got = candidate.forward(x, packed, None)
            torch.testing.assert_close(got.double(), y, rtol=1e-6, atol=4.0, msg=candidate.backend)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_linear_packed_rows_have_their_own_bits(dtype: torch.dtype, backend: str) -> None:
    """Whatever the number of rows, a row's place among them and the threads."""
    x, bias = torch.randn(77, 160).to(dtype), torch.randn(150)
    if backend == "reference" or native.module is None:
        pytest.skip("the definition's sums are torch's, whose order depends on the number of rows")
    weight = torch.randn(150, 160)
    for packed in (llmcore.pack(weight, "bf16"), *packed_in_every_way(weight).values()):
        for level in (c for c in candidates_for(x, packed) if c.backend != "reference"):
            whole = level.forward(x, packed, bias)
            for rows in (1, 2, 3, 6, 8, 13, 64, 65):
                assert torch.equal(level.forward(x[-rows:], packed, bias), whole[-rows:])
            torch.set_num_threads(2)
            assert torch.equal(level.forward(x, packed, bias), whole)
            torch.set_num_threads(1)


def test_linear_many_rows_have_the_bits_of_few(backend: str) -> None:
    """The ways through a product differ in what threads share, and in how much of it at a time."""
    if backend == "reference" or native.module is None:
        pytest.skip("the definition's sums are torch's, whose order depends on the number of rows")
    # Of the first two each thread takes a part by itself, rows or columns. The third is packed in
    # two chunks of columns; the fourth has both gradients by rows, too.
    shapes = ((300, 1100, 150), (100, 300, 600), (700, 5000, 700), (1100, 600, 600))
    torch.set_num_threads(2)
    for rows, width, outputs in shapes:
        x, weight = torch.randn(rows, width), torch.randn(outputs, width)
        dy, bias = torch.randn(rows, outputs), torch.randn(outputs)
        levels = [c for c in REGISTRY["linear"].candidates if c.backend.startswith("cpu")]
        levels = [c for c in levels if not c.reasons(x, weight, bias)]
        for level in levels if rows < 512 else levels[:1]:
            whole = level.forward(x, weight, bias)
            dx, dweight, _ = level.backward(dy, x, weight, True, True, False)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                again = (
                    level.forward(x, weight, bias),
                    *level.backward(dy, x, weight, True, True, False),
                )
                assert all(map(torch.equal, again, (whole, dx, dweight)))
            torch.set_num_threads(2)
            for some in (slice(0, 5), slice(rows - 130, rows)):
                assert torch.equal(level.forward(x[some], weight, bias), whole[some])
                part = level.backward(dy[some], x[some], weight, True, False, False)[0]
                assert torch.equal(part, dx[some])
            for got, exact in (
                (whole, x.double() @ weight.double().T + bias),
                (dx, dy.double() @ weight.double()),
                (dweight, dy.double().T @ x.double()),
            ):
                assert (got - exact).abs().max() <= 2e-6 * exact.abs().max() * math.sqrt(width)
    torch.set_num_threads(1)


def test_linear_quantized_nan_and_inf_fill_their_row() -> None:
    x = torch.randn(4, 64)
    x[1, 3], x[2, 40] = math.nan, -math.inf
    for packed in packed_in_every_way(torch.randn(9, 64)).values():
        y = ops.linear(x, packed)
        assert y[1:3].isnan().all() and y[[0, 3]].isfinite().all()


def test_linear_quantized_levels_agree() -> None:
    """The integers are the same at every level; the float32 sums too, where there is an FMA."""
    x = torch.randn(9, 128)
    for packed in packed_in_every_way(torch.randn(40, 128)).values():
        results = {c.backend: c.forward(x, packed, None) for c in candidates_for(x, packed)}
        expected = results.pop("reference")
        for backend, y in results.items():
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            if backend != "cpu_portable":
                assert torch.equal(y, results["cpu"]), backend


@formats
def test_linear_packed_gradient_reaches_x_and_bias(format: str) -> None:
    x, bias = torch.randn(5, 64, requires_grad=True), torch.randn(9, requires_grad=True)
    packed, cotangent = llmcore.pack(torch.randn(9, 64), format), torch.randn(5, 9)
    dx, dbias = torch.autograd.grad(ops.linear(x, packed, bias), (x, bias), cotangent)
    torch.testing.assert_close(dx, cotangent @ packed.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dbias, cotangent.sum(0))


@formats
def test_linear_packed_compiles_fullgraph(format: str) -> None:
    x, packed = torch.randn(5, 64), llmcore.pack(torch.randn(9, 64), format)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: ops.linear(a, packed), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ops.linear(x, packed))


def test_pack_fp32_and_bf16_are_casts() -> None:
    weight = torch.randn(9, 33)
    assert torch.equal(llmcore.pack(weight, "fp32").dequantize(), weight)
    assert torch.equal(llmcore.pack(weight, "bf16").dequantize(), weight.bfloat16().float())
    packed = llmcore.pack(weight, "fp32")
    weight.zero_()
    assert packed.dequantize().abs().amax() > 0  # memory of its own


@pytest.mark.parametrize(("format", "levels"), [("int8", 127), ("int4", 8)])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_pack_is_off_by_half_a_step(format: str, levels: int, group: int) -> None:
    weight = torch.randn(5, 256) * torch.logspace(-6, 3, 5)[:, None]
    packed = llmcore.pack(weight, format, group)
    step = weight.unflatten(1, (-1, group)).abs().amax(-1, keepdim=True) / levels
    error = (packed.dequantize() - weight).abs().unflatten(1, (-1, group))
    # Half a step; a scale rounded to float16 adds 2^-12 of the largest magnitude, a tiny one 2^-25
    # for each step. In int4 the value opposite to the largest may be a whole step off, for +8 does
    # not exist.
    slack = 1.0 if format == "int4" else 0.5
    assert (error <= step * (slack + levels * 2**-12 + 1e-3) + levels * 2**-25).all()
    assert packed.scales is not None and packed.scales.shape == (1, 256 // group, 16)
    loss = (packed.dequantize() - weight).norm() / weight.norm()
    torch.testing.assert_close(packed.error, loss.item(), rtol=1e-4, atol=0)


def test_pack_asymmetric_is_off_by_half_a_step() -> None:
    weight = torch.rand(5, 256) + 3.0
    packed = llmcore.pack(weight, "int4", asymmetric=True)
    groups = weight.unflatten(1, (-1, 32))
    step = (groups.amax(-1) - groups.amin(-1))[..., None] / 15
    error = (packed.dequantize() - weight).abs().unflatten(1, (-1, 32))
    assert (error <= 0.5 * step + 4 * 2**-11).all()  # a minimum near 4 is rounded to float16
    assert packed.error < llmcore.pack(weight, "int4").error / 5
    assert packed.minimums is not None and "asymmetric" in repr(packed)


def test_pack_int4_uses_its_sixteen_levels() -> None:
    weight = torch.arange(-8.0, 8.0).repeat(2).expand(3, 32)
    assert torch.equal(llmcore.pack(weight, "int4", 32).dequantize(), weight)
    assert torch.equal(llmcore.pack(-weight, "int4", 32).dequantize(), -weight)


def test_pack_int8_is_exact_where_it_can_be() -> None:
    weight = torch.randint(-127, 128, (3, 64)).float()
    weight[:, ::32] = 127.0
    assert torch.equal(llmcore.pack(weight, "int8").dequantize(), weight)


@formats
def test_pack_group_of_zeros(format: str) -> None:
    weight = torch.randn(3, 64)
    weight[1, 32:] = 0.0
    assert torch.equal(llmcore.pack(weight, format).dequantize()[1, 32:], torch.zeros(32))


@pytest.mark.parametrize(
    ("format", "bits"), [("fp32", 32), ("bf16", 16), ("int8", 8.5), ("int4", 4.5)]
)
def test_pack_size(format: str, bits: float) -> None:
    packed = llmcore.pack(torch.randn(64, 128), format)
    assert packed.nbytes * 8 == 64 * 128 * bits
    assert f"{format}" in repr(packed) and f"{packed.nbytes} bytes" in repr(packed)
    assert packed.shape == (64, 128)


@formats
def test_pack_copies_and_pickles(format: str) -> None:
    packed = llmcore.pack(torch.randn(9, 64), format)
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
        assert torch.equal(again.dequantize(), packed.dequantize())


def test_pack_has_no_gradient() -> None:
    weight = torch.randn(9, 64, requires_grad=True)
    packed = llmcore.pack(weight, "int8")
    assert not packed.requires_grad and not packed.values.requires_grad
    with pytest.raises(RuntimeError, match="weight: a PackedWeight is for inference"):
        packed.requires_grad_()
    with pytest.raises(RuntimeError, match="weight: a PackedWeight is for inference"):
        _ = packed.grad
    assert packed.requires_grad_(False) is packed


def test_pack_errors() -> None:
    weight = torch.randn(9, 96)
    with pytest.raises(ValueError, match="format: got 'int5', expected one of 'fp32'"):
        llmcore.pack(weight, "int5")
    with pytest.raises(ValueError, match=r"weight: got shape \(96,\), expected \(N, K\)"):
        llmcore.pack(weight[0], "int8")
    with pytest.raises(TypeError, match=r"weight: got torch.int64"):
        llmcore.pack(weight.long(), "int8")
    with pytest.raises(ValueError, match="group: got 48, expected one of 16"):
        llmcore.pack(weight, "int8", 48)
    with pytest.raises(ValueError, match="group: got 64, expected a divisor of K"):
        llmcore.pack(weight, "int4", 64)
    with pytest.raises(ValueError, match="asymmetric: got True with int8"):
        llmcore.pack(weight, "int8", asymmetric=True)
    with pytest.raises(ValueError, match="weight: too large, its scales overflow float16"):
        llmcore.pack(weight * 1e8, "int8")
    weight[3, 3] = math.inf
    with pytest.raises(ValueError, match="weight: holds NaN or inf"):
        llmcore.pack(weight, "int8")
    assert llmcore.pack(weight, "bf16").dequantize()[3, 3] == math.inf


def test_from_integers_errors() -> None:
    q, scales = torch.zeros(3, 64, dtype=torch.int16), torch.ones(3, 2).half()
    from_integers("int8", q, scales)
    with pytest.raises(ValueError, match="format: got 'bf16'"):
        from_integers("bf16", q, scales)
    with pytest.raises(TypeError, match=r"q: got torch.float32, expected an integer dtype"):
        from_integers("int8", q.float(), scales)
    with pytest.raises(ValueError, match=r"q: got shape \(64,\)"):
        from_integers("int8", q[0], scales)
    for width in (2, 3, 5):  # groups of 24, 16 that are not whole, and of 9.6
        with pytest.raises(ValueError, match=r"scales: got shape .*expected \(3, 48 / group\)"):
            from_integers("int8", q[:, :48], torch.ones(3 if width != 3 else 4, width).half())
    with pytest.raises(TypeError, match=r"scales: got torch.float32"):
        from_integers("int8", q, scales.float())
    with pytest.raises(ValueError, match="minimums: got them with int8"):
        from_integers("int8", q, scales, scales)
    with pytest.raises(ValueError, match=r"minimums: got shape \(3, 1\)"):
        from_integers("int4", q, scales, scales[:, :1])
    with pytest.raises(ValueError, match="scales: holds NaN or inf"):
        from_integers("int4", q, scales * math.inf)
    with pytest.raises(ValueError, match="minimums: holds NaN or inf"):
        from_integers("int4", q, scales, scales * math.nan)
    for format, minimums, low, high in (
        ("int8", None, -128, 127),
        ("int4", None, -8, 7),
        ("int4", scales, 0, 15),
    ):
        for value in (low - 1, high + 1):
            with pytest.raises(ValueError, match=f"q: got values .*expected {low} to {high}"):
                from_integers(format, q.index_fill(1, torch.tensor(5), value), scales, minimums)


def test_linear_errors() -> None:
    x, weight = torch.randn(3, 4), torch.randn(7, 4)
    with pytest.raises(ValueError, match=r"weight: got shape \(7, 4\), expected \(N, 5\)"):
        ops.linear(torch.randn(3, 5), weight)
    with pytest.raises(ValueError, match=r"weight: got shape \(4,\)"):
        ops.linear(x, weight[0])
    with pytest.raises(ValueError, match=r"weight: got shape \(7, 32\), expected \(N, 4\)"):
        ops.linear(x, llmcore.pack(torch.randn(7, 32), "int4"))
    with pytest.raises(TypeError, match=r"weight: got torch.float16, expected torch.float32"):
        ops.linear(x, weight.half())
    with pytest.raises(TypeError, match="weight: expected a tensor, got int"):
        ops.linear(x, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bias: got shape \(4,\), expected \(7,\)"):
        ops.linear(x, weight, torch.randn(4))
    with pytest.raises(TypeError, match=r"bias: got torch.float16"):
        ops.linear(x, weight, torch.randn(7).half())
    with pytest.raises(ValueError, match="weight: on meta"):
        ops.linear(x, weight.to("meta"))
    with pytest.raises(ValueError, match=r"out: got shape \(3, 4\)"):
        ops.linear(x, weight, out=torch.empty(3, 4))
    with pytest.raises(RuntimeError, match="out: has no gradient"):
        ops.linear(x, weight.requires_grad_(), out=torch.empty(3, 7))
