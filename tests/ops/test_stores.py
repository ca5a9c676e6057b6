"""How results are stored: rounded as torch rounds, past the caches or not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmcore import dispatch, native
from llmcore.dispatch import REGISTRY
from llmcore.ops.sample import Draw, Sample
from llmcore.verify import differentiable, run

pytestmark = pytest.mark.usefixtures("one_thread")

ROW_WISE = (
    *("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "softmax", "masked_softmax"),
    *("cross_entropy", "rope", "gelu", "swiglu", "geglu"),
)


def aligned(name: str) -> Sample:
    """A call whose every row starts a line of the cache, as large ones do."""
    n = Draw(5).normal
    calls = {
        "rope": (n(1, 2, 3, 128), n(3, 64), n(3, 64)),
        "cross_entropy": (n(3, 64), torch.tensor([1, 63, 5])),
        "gelu": (n(3, 64), "tanh"),
    }
    pair = name.startswith("add") or name in ("swiglu", "geglu")
    return Sample("aligned", calls.get(name, (n(3, 64), n(3, 64)) if pair else (n(3, 64),)))


@pytest.fixture
def restored() -> Iterator[None]:
    if native.module is None:
        pytest.skip(native.why_not)
    kept = native.module.set_cache_bytes(0)
    yield
    native.module.set_cache_bytes(kept)


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("name", ROW_WISE)
def test_stores_past_caches_have_the_same_bits(name: str, level: str, restored: None) -> None:
    op, backend = REGISTRY[name], f"cpu_{level}"
    candidate = op.candidate(backend)
    assert candidate is not None and native.module is not None
    if candidate.machine:
        pytest.skip(candidate.machine)
    for dtype in native.DTYPES:
        for sample in (aligned(name), *op.samples(Draw(0))):
            wanted = differentiable(op, backend, sample, dtype)
            results = []
            for cache_bytes in (0, 1 << 40):
                native.module.set_cache_bytes(cache_bytes)
                with dispatch.use(backend):
                    y, d = run(op.function, sample, dtype, "cpu", 7, wanted)
                results.append([*y, *d.values()])
            for one, other in zip(*results, strict=True):
                same = torch.equal(one.nan_to_num(3.0), other.nan_to_num(3.0))
                assert same, f"{sample.name} in {dtype}"


@pytest.mark.parametrize("level", native.LEVELS)
def test_stores_round_as_torch(level: str) -> None:
    """The sums of bfloat16 with any bits: subnormal numbers, ties, NaN and inf among them."""
    candidate = REGISTRY["add_rms_norm"].candidate(f"cpu_{level}")
    assert candidate is not None
    if candidate.machine:
        pytest.skip(candidate.machine)
    bits = torch.randint(
        -(1 << 15), 1 << 15, (2, 1 << 15), generator=torch.Generator().manual_seed(0)
    )
    x, residual = bits.to(torch.int16).view(torch.bfloat16).unbind()
    tiny = torch.arange(1 << 10, dtype=torch.int16).view(torch.bfloat16)
    x, residual = torch.cat((x, tiny, tiny)), torch.cat((residual, -tiny.flip(0), tiny / 128))
    for width in (x.numel(), 37):  # whole vectors, and single ones with a rest
        a, b = x[: x.numel() // width * width], residual[: x.numel() // width * width]
        total = candidate.forward(a.view(-1, width), b.view(-1, width), None, 1e-6)[1].flatten()
        want = a + b
        assert torch.equal(total.isnan(), want.isnan())
        seen = ~want.isnan()
        assert torch.equal(total[seen].view(torch.int16), want[seen].view(torch.int16))
