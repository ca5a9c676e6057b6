"""The simulator on small kernels compiled by nvcc: they match NumPy, and seeded defects are found,
each report naming the right thread and source line."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys

import numpy as np
import nvcc
import ptxsim
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(nvcc.why_not()), reason=nvcc.why_not()),
]


def to_bf16(x: np.ndarray) -> np.ndarray:
    return ((x.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_vector_add_is_exact(rng):
    n = 5000
    a, b = rng.standard_normal((2, n)).astype(np.float32)
    c = np.zeros(n, np.float32)
    ptxsim.load(nvcc.sample("basic.cu")).launch("vadd", -(-n // 256), 256, [a, b, c, n])
    np.testing.assert_array_equal(c, a + b)


@pytest.mark.parametrize("rows, cols", [(1, 1), (5, 33), (37, 200)])
def test_softmax(rng, rows, cols):
    x = (4 * rng.standard_normal((rows, cols))).astype(np.float32)
    y = np.zeros_like(x)
    ptxsim.load(nvcc.sample("basic.cu")).launch(
        "softmax_rows", -(-rows // 4), (32, 4), [x, y, rows, cols]
    )
    e = np.exp(x - x.max(1, keepdims=True))
    np.testing.assert_allclose(y, e / e.sum(1, keepdims=True), rtol=2e-6, atol=1e-8)


def test_layernorm_f16(rng):
    rows, cols = 6, 768
    x = rng.standard_normal((rows, cols)).astype(np.float16)
    g, b = rng.standard_normal((2, cols)).astype(np.float32)
    y = np.zeros_like(x)
    ptxsim.load(nvcc.sample("basic.cu")).launch(
        "layernorm_f16", rows, 128, [x, g, b, y, cols, 1e-5]
    )
    w = x.astype(np.float64)
    ref = (w - w.mean(1, keepdims=True)) / np.sqrt(w.var(1, keepdims=True) + 1e-5) * g + b
    np.testing.assert_allclose(y.astype(np.float64), ref, rtol=2e-3, atol=2e-3)


def test_gelu_bf16(rng):
    x = to_bf16(rng.standard_normal(777))
    y = np.zeros_like(x)
    ptxsim.load(nvcc.sample("basic.cu")).launch("gelu_bf16", 4, 256, [x, y, x.size])
    v = from_bf16(x)
    ref = [0.5 * t * (1 + math.erf(t / math.sqrt(2))) for t in v]
    np.testing.assert_allclose(from_bf16(y), ref, rtol=8e-3, atol=1e-6)


def test_histogram_atomics(rng):
    x = rng.integers(0, 1000, 3000).astype(np.int32)
    hist = np.zeros(10, np.int32)
    ptxsim.load(nvcc.sample("basic.cu")).launch(
        "histogram", 12, 256, [x, hist, x.size, 10], shared_bytes=40
    )
    np.testing.assert_array_equal(hist, np.bincount(x % 10, minlength=10))


def test_divergent_loop():
    def steps(v: int) -> int:
        count = 0
        while v != 1:
            v, count = (3 * v + 1 if v & 1 else v // 2), count + 1
        return count

    x = np.arange(1, 301, dtype=np.int32)
    out = np.zeros_like(x)
    ptxsim.load(nvcc.sample("basic.cu")).launch("collatz", 3, 128, [x, out, x.size])
    np.testing.assert_array_equal(out, [steps(int(v)) for v in x])


@pytest.mark.parametrize("kernel", ["gemm_f16", "gemm_bf16"])
def test_tensor_core_gemm(rng, kernel):
    m, n, k = 128, 64, 96
    a, b = (
        rng.standard_normal((m, k)).astype(np.float32),
        rng.standard_normal((k, n)).astype(np.float32),
    )
    if kernel == "gemm_f16":
        da, db = a.astype(np.float16), b.astype(np.float16)
        ref = da.astype(np.float64) @ db.astype(np.float64)
    else:
        da, db = to_bf16(a), to_bf16(b)
        ref = from_bf16(da).astype(np.float64) @ from_bf16(db)
    c = np.zeros((m, n), np.float32)
    ptxsim.load(nvcc.sample("gemm.cu")).launch(
        kernel, (n // 64, m // 64), 128, [da, db, c, m, n, k]
    )
    np.testing.assert_allclose(c, ref, rtol=1e-5, atol=1e-4)


def test_statistics_see_bank_conflicts(rng):
    x = rng.standard_normal((64, 64)).astype(np.float32)
    extra = {}
    for name in ("transpose_padded", "transpose_conflicts"):
        y = np.zeros_like(x)
        stats = ptxsim.load(nvcc.sample("basic.cu"), statistics=True).launch(
            name, (2, 2), (32, 8), [x, y, 64]
        )
        np.testing.assert_array_equal(y, x.T)
        assert stats.coalescing == 1.0
        extra[name] = stats.bank_conflicts
    # 4 blocks x 32 column reads, each 32-way conflicting: 31 extra wavefronts
    assert extra == {"transpose_padded": 0, "transpose_conflicts": 4 * 32 * 31}


def test_off_by_one_bound():
    a = np.ones(100, np.float32)
    args = [a, a.copy(), np.zeros_like(a), 100]
    with pytest.raises(
        ptxsim.OutOfBounds, match=r"(?s)400 bytes into .*thread \(100, 0, 0\).*basic.cu"
    ):
        ptxsim.load(nvcc.sample("basic.cu", "MUT_BOUND")).launch("vadd", 1, 128, args)


def layernorm_args() -> list:
    x = np.ones((2, 256), np.float16)
    return [x, np.ones(256, np.float32), np.zeros(256, np.float32), np.zeros_like(x), 256, 1e-5]


def test_missing_syncthreads():
    with pytest.raises((ptxsim.RaceHazard, ptxsim.UninitialisedRead)):
        ptxsim.load(nvcc.sample("basic.cu", "MUT_NOSYNC")).launch(
            "layernorm_f16", 2, 128, layernorm_args()
        )


def test_missing_syncthreads_in_histogram():
    args = [np.arange(256, dtype=np.int32), np.zeros(10, np.int32), 256, 10]
    with pytest.raises(ptxsim.RaceHazard, match="no barrier in between"):
        ptxsim.load(nvcc.sample("basic.cu", "MUT_NOSYNC")).launch(
            "histogram", 1, 256, args, shared_bytes=40
        )


def test_wrong_shuffle_mask():
    with pytest.raises(ptxsim.WarpMaskError, match="0x0000ffff lacks the executing thread"):
        ptxsim.load(nvcc.sample("basic.cu", "MUT_MASK")).launch(
            "layernorm_f16", 2, 128, layernorm_args()
        )


def test_uninitialised_shared():
    x = np.arange(64, dtype=np.float32)
    y = np.zeros_like(x)
    ptxsim.load(nvcc.sample("basic.cu")).launch("uninit_shared", 1, 64, [x, y])
    np.testing.assert_array_equal(y, x[::-1])
    with pytest.raises(ptxsim.UninitialisedRead, match="stored value"):
        ptxsim.load(nvcc.sample("basic.cu", "MUT_UNINIT")).launch("uninit_shared", 1, 64, [x, y])


def gemm_args() -> list:
    a = np.ones((64, 96), np.float16)
    return [a, np.ones((96, 64), np.float16), np.zeros((64, 64), np.float32), 64, 64, 96]


def test_cp_async_not_waited_for():
    with pytest.raises(ptxsim.AsyncCopyHazard):
        ptxsim.load(nvcc.sample("gemm.cu", "MUT_WAIT")).launch("gemm_f16", (1, 1), 128, gemm_args())


def test_missing_barrier_before_refill():
    with pytest.raises(ptxsim.RaceHazard, match="read by"):
        ptxsim.load(nvcc.sample("gemm.cu", "MUT_NOSYNC")).launch(
            "gemm_f16", (1, 1), 128, gemm_args()
        )


def test_misaligned_vector_load():
    x, y = np.zeros(256, np.float32), np.zeros((32, 4), np.float32)
    module = ptxsim.load(nvcc.sample("basic.cu"))
    module.launch("load_vec4", 1, 32, [x, y, 4])
    with pytest.raises(ptxsim.Misaligned, match="multiple of 16"):
        module.launch("load_vec4", 1, 32, [x, y, 1])


def test_read_only_array():
    a = np.ones(32, np.float32)
    out = np.zeros_like(a)
    out.flags.writeable = False
    with pytest.raises(ptxsim.ReadOnlyWrite):
        ptxsim.load(nvcc.sample("basic.cu")).launch("vadd", 1, 32, [a, a, out, 32])


def ptx(body: str, params: str = ".param .u64 out") -> str:
    return (
        f".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k({params})\n{{\n"
        f".reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<4>;\n{body}\nret;\n}}\n"
    )


def test_barrier_deadlock():
    body = (
        "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra W; bar.sync 1, 64; bra E;\n"
        "W: bar.sync 2, 64;\nE:"
    )
    with pytest.raises(ptxsim.BarrierError, match="wait forever"):
        ptxsim.load(ptx(body)).launch("k", 1, 64, [np.zeros(1, np.int32)])


def test_uninitialised_register():
    body = "ld.param.u64 %rd1, [out]; add.s32 %r2, %r1, 1; st.global.b32 [%rd1], %r2;"
    with pytest.raises(ptxsim.UninitialisedRead, match="%r2"):
        ptxsim.load(ptx(body)).launch("k", 1, 1, [np.zeros(1, np.int32)])


def test_unsupported_opcode_is_named():
    module = ptxsim.load(ptx("tcgen05.fence.sync.aligned;"))
    assert "tcgen05.fence.sync.aligned" in module.unsupported()[0]
    with pytest.raises(ptxsim.UnsupportedInstruction, match=r"tcgen05.*\n.*PTX line 7"):
        module.launch("k", 1, 32, [np.zeros(1, np.int32)])


HAND_OVER = """
mov.u32 %r1, %tid.x; mov.b32 %r2, 1024; setp.ne.u32 %p1, %r1, 0;
@%p1 bra AFTER; mbarrier.init.shared::cta.b64 [%r2], COUNT;
AFTER: bar.sync 0; setp.lt.u32 %p1, %r1, 32; @%p1 bra GIVE;
TAKE: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra TAKE;
shl.b32 %r3, %r1, 2; ld.shared.b32 %r4, [%r3+928]; bra END;
GIVE: shl.b32 %r3, %r1, 2; st.shared.b32 [%r3+1056], %r1; ARRIVE
END: ld.param.u64 %rd1, [out];
"""
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r2];"


@pytest.mark.parametrize(
    ("count", "arrive", "fault"),
    [
        (32, ARRIVE, None),
        (33, ARRIVE, ptxsim.BarrierError),
        (16, ARRIVE, ptxsim.BarrierError),
        (32, ARRIVE + "st.shared.b32 [%r3+1056], %r3;", ptxsim.RaceHazard),
    ],
)
def test_memory_barrier_hands_over(count, arrive, fault):
    """One warp stores and arrives, another waits and loads."""
    text = HAND_OVER.replace("COUNT", str(count)).replace("ARRIVE", arrive)
    module, out = ptxsim.load(ptx(text)), np.zeros(1, np.int32)
    with pytest.raises(fault) if fault else contextlib.nullcontext():
        module.launch("k", 1, 64, [out], shared_bytes=256)


PASS_ON = """
ld.param.u64 %rd1, [out]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %tid.x;
mul.wide.u32 %rd2, %r2, 4; add.s64 %rd2, %rd1, %rd2; setp.eq.u32 %p1, %r1, GIVER;
setp.ne.u32 %p2, %r2, 0; @%p1 bra GIVE; @%p2 bra READY;
WAIT: ld.ACQUIRE.gpu.global.u32 %r3, [%rd1+256]; setp.eq.u32 %p3, %r3, 0; @%p3 bra WAIT; AFTER
READY: bar.sync 0; ld.global.u32 %r4, [%rd2]; st.global.u32 [%rd2+512], %r4; bra END;
GIVE: st.global.u32 [%rd2], %r2; bar.sync 0; @%p2 bra END; BEFORE
mov.b32 %r5, 1; st.RELEASE.gpu.global.u32 [%rd1+256], %r5;
END:
"""
FENCE = "fence.acq_rel.gpu;"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"ACQUIRE": "relaxed", "AFTER": FENCE}, None),
        ({"RELEASE": "relaxed", "BEFORE": "membar.gl;"}, None),
        ({"RELEASE": "relaxed"}, ptxsim.RaceHazard),
        ({"RELEASE": "relaxed", "BEFORE": "membar.cta;"}, ptxsim.RaceHazard),
        ({"ACQUIRE": "relaxed"}, ptxsim.RaceHazard),
        ({"bar.sync 0; @%p2": "@%p2"}, ptxsim.RaceHazard),
        ({"bar.sync 0; ld": "ld"}, ptxsim.RaceHazard),
        ({"WAIT: ": "bra READY; WAIT: "}, ptxsim.RaceHazard),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("lanes", [64, 128], ids=["in_turn", "together"])
def test_blocks_pass_on_what_they_wrote(changes, fault, lanes):
    """One block stores and says so, another waits for that and loads: blocks simulated one after
    the other, and at once."""
    with pytest.raises(fault) if fault else contextlib.nullcontext():
        assert (pass_on(changes, lanes)[128:192] == np.arange(64)).all()


def pass_on(changes: dict[str, str], lanes: int) -> np.ndarray:
    text = PASS_ON
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    defaults = {"ACQUIRE": "acquire", "RELEASE": "release", "GIVER": "0", "AFTER": "", "BEFORE": ""}
    for old, new in defaults.items():
        text = text.replace(old, new)
    out = np.zeros(256, np.int32)
    ptxsim.load(ptx(text), lanes_per_chunk=lanes).launch("k", 2, 64, [out])
    return out


def test_blocks_must_not_wait_for_later_ones() -> None:
    """Which hangs where those can't start; and to look once is not to wait."""
    pass_on({"GIVER": "1"}, 128)
    with pytest.raises(ptxsim.BarrierError, match="a value in global memory"):
        pass_on({"GIVER": "1"}, 64)
    with pytest.raises(ptxsim.RaceHazard, match=r"which block \(0, 0, 0\) read"):
        pass_on({"GIVER": "1", "@%p3 bra WAIT;": ""}, 128)


def test_blocks_must_not_write_the_same() -> None:
    """But for equal values, and for atomics."""
    body = "ld.param.u64 %rd1, [out]; mov.u32 %r1, %ctaid.x; STORE"
    for store, fault in (
        ("st.global.u32 [%rd1], %r1;", ptxsim.RaceHazard),
        ("mov.b32 %r1, 7; st.global.u32 [%rd1], %r1;", None),
        ("red.global.add.u32 [%rd1], %r1;", None),
        ("red.global.add.u32 [%rd1], 1; st.global.u32 [%rd1], %r1;", ptxsim.RaceHazard),
    ):
        module = ptxsim.load(ptx(body.replace("STORE", store)))
        with pytest.raises(fault) if fault else contextlib.nullcontext():
            module.launch("k", 2, 1, [np.zeros(1, np.int32)])


def test_triton_products() -> None:
    """wgmma, its operands laid out by Triton: along and across, in rows of 32, 64, 128 bytes."""
    pytest.importorskip("triton")
    script = nvcc.ROOT / "tests" / "gpu" / "samples" / "triton_product.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = re.findall(r"(\d+) wgmma, error (\S+)", run.stdout)
    assert len(lines) == 5
    assert all(int(count) > 0 and float(error) < 1e-4 for count, error in lines), run.stdout


def test_livelock_limit():
    with pytest.raises(ptxsim.Livelock):
        ptxsim.load(ptx("L: bra L;"), max_steps=1000).launch("k", 1, 32, [np.zeros(1, np.int32)])
