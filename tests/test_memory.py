"""What calls hold beyond their results: attention grows with the length and not with its square,
linear_cross_entropy never holds the logits, generation no more at its end than at its beginning.
What does hold them, the definitions above all, must be told from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmcore import dispatch, ops
from llmcore.benchmarks import contest, memory, timing
from llmcore.generation.batch import Task, steps
from llmcore.generation.sampling import Sampling, samplers_of
from llmcore.generation.stopping import Stopping
from llmcore.models import Decoder, TransformerConfig
from llmcore.models.packed import pack_weights
from llmcore.ops.sample import Draw, Sample

pytestmark = pytest.mark.skipif(
    not memory.can_be_measured(), reason="this system does not tell the memory of a call"
)

NOISE = 1 << 20
"""Pages that come and go beside a call, in bytes."""

forward_call, backward_call = contest.forward_call, contest.backward_call

Make = Callable[[Callable[..., Any], Sample, torch.dtype], Callable[[], Any]]


def skip_without_kernel(op: str) -> None:
    candidate = dispatch.REGISTRY[op].candidate("cpu")
    why = dispatch.REGISTRY[op].why_absent("cpu") if candidate is None else candidate.machine
    if why:
        pytest.skip(why)


def extra(backend: str, function: Callable[..., Any], make: Make, sample: Sample) -> int:
    """Bytes that a call holds beyond its results."""
    with dispatch.use(backend), torch.no_grad():
        call = make(function, sample, torch.float32)
        call()
        found = memory.extra(timing.Contender(backend, call), 5)
    assert found is not None
    return found


def attention_sample(length: int) -> Sample:
    draw = Draw(0)
    tensors = tuple(draw.normal(1, 2, length, 64) for _ in range(3))
    return Sample(str(length), tensors, {"causal": True})


def grows_linearly(backend: str, make: Make, length: int) -> bool:
    """Whether twice the length takes no more than twice the memory."""
    lengths = (length, 2 * length)
    half, whole = (extra(backend, ops.attention, make, attention_sample(n)) for n in lengths)
    return whole <= 2 * half + NOISE


@pytest.mark.parametrize("make", [forward_call, backward_call])
def test_memory_of_attention_grows_linearly(make: Make) -> None:
    skip_without_kernel("attention")
    assert grows_linearly("cpu", make, 2048)


@pytest.mark.parametrize("make", [forward_call, backward_call])
def test_memory_of_a_quadratic_attention_is_seen(make: Make) -> None:
    assert not grows_linearly("reference", make, 1024)


ROWS, WIDTH, CLASSES = 2048, 64, 16384
LOGITS = 4 * ROWS * CLASSES


def loss_sample() -> Sample:
    draw = Draw(0)
    tensors = draw.normal(ROWS, WIDTH), draw.normal(CLASSES, WIDTH)
    return Sample("loss", (*tensors, draw.integers(0, CLASSES, ROWS)))


@pytest.mark.parametrize("make", [forward_call, contest.both_call])
def test_memory_of_linear_cross_entropy_is_a_twentieth_of_the_logits(make: Make) -> None:
    """Starts to run with the native kernel: until then it is skipped with the contract's reason."""
    skip_without_kernel("linear_cross_entropy")
    assert extra("cpu", ops.linear_cross_entropy, make, loss_sample()) <= LOGITS / 20


@pytest.mark.parametrize("make", [forward_call, contest.both_call])
def test_memory_of_whole_logits_is_seen(make: Make) -> None:
    assert extra("reference", ops.linear_cross_entropy, make, loss_sample()) > 0.9 * LOGITS


VOCABULARY = 2000


def grown_by_generating(
    tokens: int, keep: Callable[[torch.Tensor], Any], weights: str | None = None
) -> int:
    """The most bytes that the process holds beyond those at token 200."""
    config = TransformerConfig(
        vocab_size=VOCABULARY,
        width=16,
        layers=1,
        heads=1,
        kv_heads=1,
        head_width=16,
        feed_forward=16,
        context_length=tokens + 1,
    )
    model = Decoder(config).eval()
    if weights is not None:
        pack_weights(model, weights)
    task = Task(model, [[1]], tokens, Sampling(1.0), Stopping(()), samplers_of([[1]], 0))
    kept, before = [], 0
    for step in steps(task):
        kept.append(keep(step.logits))
        if len(kept) == 200:
            memory.give_back()
            memory.CLEAR.write_text(memory.FORGET_THE_PEAK)
            before = memory.status("VmRSS")
    assert len(kept) == tokens
    return memory.status("VmHWM") - before


@pytest.mark.parametrize("weights", [None, "bf16"])
def test_memory_of_generation_is_flat(weights: str | None) -> None:
    """The cache has 256 KB at the end; the dispatcher remembers its choice for each length."""
    torch.set_num_threads(1)
    assert grown_by_generating(2000, lambda logits: None, weights) <= 4 * NOISE


def test_memory_of_logits_that_are_kept_is_seen() -> None:
    torch.set_num_threads(1)
    assert grown_by_generating(900, lambda logits: logits) > 4 * NOISE


def test_scratch_is_kept_for_the_next_call_and_released() -> None:
    skip_without_kernel("linear")
    x, weight = torch.randn(1024, 1024), torch.randn(1024, 1024)
    with dispatch.use("cpu"), torch.no_grad():
        ops.linear(x, weight)
        memory.give_back()
        released = memory.status("VmRSS")
        ops.linear(x, weight)
        kept = memory.status("VmRSS")
    memory.give_back()
    assert kept - released > 4 * NOISE  # x, packed
    assert memory.status("VmRSS") - released < NOISE
