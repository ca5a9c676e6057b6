"""The cost of a call: every way into an op on a tensor so small that the work itself is nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from llmcore import dispatch
from llmcore.ops.sample import Draw

from .cases import Bench
from .contest import forward_call, leaves, why_not
from .timing import Contender, Plan, measure

STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "with gradient": torch.enable_grad,
}


@dataclass(frozen=True)
class Cost:
    """Median microseconds of one way into an op, in one of torch's states; quartiles beside it."""

    op: str
    way: str
    state: str
    microseconds: float
    low: float
    high: float


def ways(bench: Bench) -> Iterator[tuple[str, str, Contender]]:
    """Way, state and contender of everything that is timed for an op."""
    sample = bench.sample(bench.tiny, Draw(0))
    op = dispatch.REGISTRY[bench.op]
    if not why_not(op, "cpu"):
        candidate = op.candidate("cpu")
        assert candidate is not None
        args, options = sample.cast(torch.float32)
        call = op.arguments(*args, **options)
        raw = candidate.forward
        yield "kernel alone", "no_grad", Contender("kernel", lambda: raw(*call), torch.no_grad)
    peer = bench.peers(bench.tiny)[0]
    for way, function in ((f"llmcore.ops.{bench.op}", op.function), (peer.name, peer.call)):
        for state, context in STATES.items():
            yield way, state, Contender(way, tiny_call(function, sample, state), context)


def tiny_call(function: Callable[..., Any], sample: Any, state: str) -> Callable[[], Any]:
    """A call of the function; its arguments require gradients where those are to be recorded."""
    if state != "with gradient":
        return forward_call(function, sample, torch.float32)
    args, options = leaves(sample, torch.float32, True)
    return lambda: function(*args, **options)


def costs(bench: Bench, plan: Plan) -> list[Cost]:
    """The cost of a call of one op, everything on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        entries = list(ways(bench))
        timings = measure([contender for _, _, contender in entries], plan)
    finally:
        torch.set_num_threads(threads)
    found = []
    for (way, state, _), timing in zip(entries, timings, strict=True):
        microseconds = [1e6 * t for t in (timing.median, *timing.quartiles)]
        found.append(Cost(bench.op, way, state, *microseconds))
    return found
