"""One case, verified and then timed: the definition, the peers and llmcore's own kernels.

They take turns on the same data. A kernel of ours that fails the yardstick (llmcore/verify.py) is
not timed. A peer is held to it too, but may fail by rounding more coarsely, which the result says;
it is only left out where it computes something else.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from llmcore import dispatch, native
from llmcore.dispatch import Op
from llmcore.ops.sample import Draw, Sample
from llmcore.verify import BACKWARD_FACTOR, FORWARD_FACTOR, judge

from . import machine, memory, roofline
from .cases import DTYPES, Case, Peer
from .shapes import BACKWARD, BOTH, INTO
from .timing import Contender, Plan, Timing, measure
from .waiting import Waiting, is_disturbed

COARSE = 0.25
"""A peer's error that still counts as rounding, as a share of the largest value: torch's bfloat16
layer_norm has dweight off by 7 % at 4096 x 768."""

DEFINITION, TORCH, OTHERS, OURS = "definition", "torch", "other library", "llmcore"
"""Whose a contender is."""

LONG_CALL = 0.5
"""Seconds from which on a call is made once to see its memory."""

TORCHS_REST = 0.005
"""Seconds in which torch's threads fall asleep; they spin for about one millisecond."""

Call = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Settings:
    """How to run: the timing plan, our backends, whether torch.compile takes part, the definition.

    `quick` leaves out the peers that take long to get ready.
    """

    plan: Plan
    backends: tuple[str, ...] = ("cpu",)
    compile: bool = True
    quick: bool = False
    definition: bool = True


@dataclass(frozen=True)
class Entry:
    """What became of one contender: a timing, or the reason why there is none.

    `error` is its worst, in units of the yardstick's bound; infinite where it raised. `extra` is
    the memory it takes beyond its results, in bytes; None where the system does not say.
    """

    name: str
    side: str
    timing: Timing | None = None
    why_not: str = ""
    error: float | None = None
    note: str = ""
    extra: int | None = None
    is_compiled: bool = False

    @property
    def seconds(self) -> float:
        return float("inf") if self.timing is None else self.timing.median


@dataclass(frozen=True, eq=False)
class Result:
    """A case on so many threads: its contenders, its limit's name and rate.

    The rate is in bytes or operations a second; None without native kernels, and `limit` says why.
    `waited` is the share of the time, warm-ups too, for which threads waited for a core, where
    that is known.
    """

    case: Case
    threads: int
    limit: str
    rate: float | None
    entries: list[Entry] = field(default_factory=list)
    waited: float | None = None

    def share(self, entry: Entry) -> float | None:
        """The part of this machine's limit that a contender reaches."""
        if self.rate is None or entry.timing is None:
            return None
        return self.case.work.amount / entry.seconds / self.rate

    def best(self, side: str, *, eager: bool = False) -> Entry | None:
        """The fastest of a side that was timed; of the `eager` ones, torch.compile left out."""
        timed = [e for e in self.entries if e.side == side and e.timing is not None]
        timed = [e for e in timed if not (eager and e.is_compiled)]
        return min(timed, key=lambda e: e.seconds, default=None)

    def against_torch(self, entry: Entry, *, eager: bool = False) -> float | None:
        """How many times as fast as torch's best a contender is."""
        best = self.best(TORCH, eager=eager)
        return None if best is None or entry.timing is None else best.seconds / entry.seconds

    @property
    def is_noisy(self) -> bool:
        """Whether others had the cores meanwhile."""
        return is_disturbed(self.waited)

    @property
    def failed(self) -> bool:
        """Whether a kernel of ours did not pass."""
        return any(e.side == OURS and e.why_not and e.error is not None for e in self.entries)


@dataclass(frozen=True)
class Ready:
    """A contender before it is verified: how to make its call for a set of data in a dtype."""

    name: str
    side: str
    make: Callable[[Sample, torch.dtype], Call]
    context: Callable[[], AbstractContextManager[Any]] = torch.no_grad
    note: str = ""
    is_compiled: bool = False


def leaves(sample: Sample, dtype: torch.dtype, gradient: bool) -> tuple[list[Any], dict[str, Any]]:
    """The arguments in `dtype`, requiring gradients where they are wanted."""
    args, options = sample.cast(dtype)
    for tensor in args:
        if gradient and isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.requires_grad_()
    return args, options


def listed(results: Any) -> list[torch.Tensor]:
    return list(results) if isinstance(results, tuple) else [results]


def forward_call(function: Callable[..., Any], sample: Sample, dtype: torch.dtype) -> Call:
    args, options = leaves(sample, dtype, False)
    return lambda: listed(function(*args, **options))


def into_call(
    function: Callable[..., Any], sample: Sample, dtype: torch.dtype, *, results: int = 1
) -> Call:
    args, options = leaves(sample, dtype, False)
    rooms = tuple(torch.zeros_like(args[0]) for _ in range(results))  # pages used before
    out = rooms[0] if results == 1 else rooms
    return lambda: listed(function(*args, **options, out=out))


def backward_call(function: Callable[..., Any], sample: Sample, dtype: torch.dtype) -> Call:
    """The backward pass alone, over a graph that is kept."""
    args, options = leaves(sample, dtype, True)
    wanted = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
    with torch.enable_grad():
        results = listed(function(*args, **options))
    draw = Draw(1)
    cotangents = [draw.normal(*y.shape).to(y.device, dtype) for y in results]
    return lambda: list(torch.autograd.grad(results, wanted, cotangents, retain_graph=True))


def both_call(function: Callable[..., Any], sample: Sample, dtype: torch.dtype) -> Call:
    """A loss and its gradients."""
    args, options = leaves(sample, dtype, True)
    wanted = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]

    def call() -> list[torch.Tensor]:
        with torch.enable_grad():
            loss = function(*args, **options)
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    return call


def prepared_call(peer: Peer, sample: Sample, dtype: torch.dtype) -> Call:
    """A peer's call on the arguments that it prepared."""
    assert peer.prepare is not None
    args, options = leaves(sample, dtype, False)
    with torch.no_grad():
        prepared = peer.prepare(*args, **options)
    return lambda: listed(peer.call(*prepared))


def make_call(mode: str, has_out: bool = True, results: int = 1) -> Callable[..., Call]:
    if mode == BACKWARD:
        return backward_call
    if mode == BOTH:
        return both_call
    if mode == INTO and has_out:
        return functools.partial(into_call, results=results)
    return forward_call


def on_backend(backend: str) -> Callable[[], AbstractContextManager[Any]]:
    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with torch.no_grad(), dispatch.use(backend):
            yield

    return context


def line_up(case: Case, settings: Settings) -> Iterator[Ready | Entry]:
    """Everyone who takes part in a case, and an entry for each of ours that cannot."""
    op = dispatch.REGISTRY[case.bench.op]
    if settings.definition and case.mode != INTO:  # it takes no out
        yield Ready("definition", DEFINITION, functools.partial(make_call(case.mode), op.define))
    for peer in case.bench.peers(case.shape):
        invited = settings.compile or not peer.is_compiled
        if invited and peer.takes(case.dtype, case.mode, settings.quick):
            yield peer_in(peer, case)
    for backend in settings.backends:
        why = why_not(op, backend)
        if why:
            yield Entry(f"llmcore {backend}", OURS, why_not=why)
            continue
        context = on_backend(backend)
        yield Ready(f"llmcore {backend}", OURS, ours_in(op, case, context), context)


def why_not(op: Op, backend: str) -> str:
    """Why a backend of ours has no part; empty when it has."""
    candidate = op.candidate(backend)
    return op.why_absent(backend) if candidate is None else candidate.machine


def peer_in(peer: Peer, case: Case) -> Ready:
    """A peer in a case's mode; in a fresh result where it knows no out."""
    mode, has_out = case.mode, peer.into is not None
    function = peer.into if mode == INTO and peer.into is not None else peer.call
    note = "into a fresh result: it takes no out" if mode == INTO and not has_out else ""
    make = functools.partial(make_call(mode, has_out, case.bench.results), function)
    if peer.prepare is not None:
        make = functools.partial(prepared_call, peer)
    side, context = TORCH if peer.is_torch else OTHERS, functools.partial(rested, peer.rest)
    return Ready(peer.name, side, make, context, note, peer.is_compiled)


@contextlib.contextmanager
def rested(seconds: float) -> Iterator[None]:
    """A turn without gradients; its threads rest for `seconds` after it, torch's before it."""
    time.sleep(min(seconds, TORCHS_REST))
    with torch.no_grad():
        yield
    time.sleep(seconds)


def ours_in(
    op: Op, case: Case, context: Callable[[], AbstractContextManager[Any]]
) -> Callable[[Sample, torch.dtype], Call]:
    def make(sample: Sample, dtype: torch.dtype) -> Call:
        with context():
            make = make_call(case.mode, results=case.bench.results)
            return make(op.function, sample, dtype)

    return make


class Yardstick:
    """The definition's results on one set of data, in float64 and in the dtype itself."""

    def __init__(self, case: Case, sample: Sample) -> None:
        define = dispatch.REGISTRY[case.bench.op].define
        dtype, make = DTYPES[case.dtype], make_call(case.mode, has_out=False)
        # The same rounded inputs, widened: rounding them is not a contender's error.
        args, options = sample.cast(dtype)
        rounded = Sample(sample.name, tuple(args), options)
        with torch.no_grad():
            self.plain = make(define, sample, dtype)()
            self.gold = make(define, rounded, torch.float64)()
        self.factor = BACKWARD_FACTOR if case.mode in (BACKWARD, BOTH) else FORWARD_FACTOR

    def error(self, results: Sequence[torch.Tensor]) -> float:
        """The worst error, in units of its bound: 1 just passes."""
        verdicts = (
            judge(*tensors, self.factor)
            for tensors in zip(results, self.gold, self.plain, strict=True)
        )
        return max(v.error / v.bound if v.bound else float(v.error > 0) for v in verdicts)

    def is_coarse(self, results: Sequence[torch.Tensor]) -> bool:
        """Whether the results are right but for rounding."""
        return all(
            y.shape == gold.shape
            and bool((y.double() - gold).abs().amax() <= COARSE * gold.abs().amax())
            for y, gold in zip(results, self.gold, strict=True)
        )


def admit(
    ready: Ready, yardstick: Yardstick, samples: Sequence[Sample], dtype: torch.dtype
) -> tuple[Entry, Contender | None]:
    """Verifies a contender; without one to time the entry says why."""
    entry = Entry(ready.name, ready.side, note=ready.note, is_compiled=ready.is_compiled)
    try:
        calls = [ready.make(sample, dtype) for sample in samples]
        with ready.context():
            results = calls[0]()
    except dispatch.BackendError as refusal:
        return replace(entry, why_not=str(refusal)), None
    except Exception as error:  # the table says it; of ours it fails the run
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return replace(entry, why_not=reason, error=math.inf), None
    error_ratio = yardstick.error(results)
    entry = replace(entry, error=error_ratio)
    if error_ratio > 1:
        text = f"{error_ratio:.3g} times the yardstick's bound"
        if ready.side == OURS or not yardstick.is_coarse(results):
            reason = f"its error is {text}"
            return replace(entry, why_not=reason), None
        notes = filter(None, (ready.note, f"rounds coarsely, {text}"))
        entry = replace(entry, note="; ".join(notes))
    return entry, Contender(ready.name, roofline.in_turn(calls), ready.context)


def hold(case: Case, threads: int, settings: Settings) -> Result:
    """Verifies and times everyone on a case; the machine's limit takes its turns among them."""
    torch._dynamo.reset()
    draw, dtype, work = Draw(0), DTYPES[case.dtype], case.work
    samples = [case.bench.sample(case.shape, draw) for _ in range(case.shape.sets)]
    torch.set_num_threads(max(threads, machine.cores()))
    yardstick = Yardstick(case, samples[0])
    torch.set_num_threads(threads)
    # A graph is run backward many times: by default inductor would reuse its saved tensors.
    with torch._functorch.config.patch(donated_buffer=False):
        line = list(line_up(case, settings))
        admitted = [
            (e, None) if isinstance(e, Entry) else admit(e, yardstick, samples, dtype) for e in line
        ]
        del yardstick
        limit = None
        if native.module is not None:
            limit = roofline.limit(work.bound, dtype, work.bytes, case.shape.sets)
        contenders = [contender for _, contender in admitted if contender is not None]
        waiting = Waiting()
        timings = measure(([limit.contender()] if limit else []) + contenders, settings.plan)
        waited = waiting.share()
        rate = limit.rate(timings.pop(0)) if limit else None
        remaining = iter(timings)
        entries = [
            entry if contender is None else measured(entry, contender, next(remaining))
            for entry, contender in admitted
        ]
    return Result(case, threads, limit.name if limit else native.why_not, rate, entries, waited)


def measured(entry: Entry, contender: Contender, timing: Timing) -> Entry:
    """With its timing, and with the memory that it takes."""
    calls = 1 if timing.median > LONG_CALL else 2
    return replace(entry, timing=timing, extra=memory.extra(contender, calls))
