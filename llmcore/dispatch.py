"""Which implementation of an op runs, and why.

An op's contract (`llmcore/ops/<op>.py`) lists candidates, best first, the plain-PyTorch definition
always last. Each answers `refuses(*args)` with reasons; the first with none runs, and the choice is
remembered by the call's key.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from llmcore import device, gpu_table, native

BACKENDS = (
    "cuda",
    "triton",
    "torch",
    "cpu",
    *(f"cpu_{level}" for level in native.LEVELS),
    "reference",
)
"""Every name that `use` and LLMCORE_BACKEND take."""

UNFORCED = ("cuda", "triton", "torch", "cpu", "reference")
"""What runs when nothing is forced; single levels of the CPU kernels run by name only."""

BY_DEVICE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "torch", "reference")}
"""Of UNFORCED, what takes tensors on a kind of device."""

forced: str | None = os.environ.get("LLMCORE_BACKEND") or None
"""The backend that must run, process-wide; None: the first candidate that does not refuse."""

_unforced: str | None = forced
_entries: list[list[str]] = []
_lock = threading.Lock()
# Of `use`: what `forced` was outside of it, the blocks that are entered, and what guards all three.

REGISTRY: dict[str, Op] = {}
"""Every op by name."""

MAPPED: dict[str, tuple[Op, Callable[..., tuple[Any, ...]]]] = {}
"""Public functions that are a call of another op: name -> that op, and the function that makes its
arguments of theirs."""


class BackendError(RuntimeError):
    """A forced backend cannot run this call; the message has its reasons."""


def _never(*args: Any) -> list[str]:
    return []


@dataclass(frozen=True, eq=False)
class Candidate:
    """One implementation of an op.

    `machine` says why it cannot run here at all ("" when it can); `refuses` takes the op's own
    arguments and says why it cannot run this call. `forward`, `backward` and `into` (forward into a
    given output) have the signatures that the op's contract states; the definition has no
    `backward`: autograd knows it.
    """

    backend: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    into: Callable[..., Any] | None = None
    machine: str = ""
    refuses: Callable[..., list[str]] = _never

    def reasons(self, *args: Any) -> list[str]:
        """Why this candidate does not run this call; empty when it does."""
        if self.machine:
            return [self.machine]
        if self.backend != "reference" and forward_ad._current_level >= 0 and carries_tangent(args):
            return ["forward-mode differentiation: only the definition has it"]
        return self.refuses(*args)


def carries_tangent(args: tuple[Any, ...]) -> bool:
    """Whether forward-mode differentiation goes through a tensor among these, or inside a tuple.

    Inside of torch.func's transforms a tangent can hide below another one's wrapper: always True.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return any(
        carries_tangent(a)
        if isinstance(a, tuple)
        else isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None
        for a in args
    )


def native_candidates(
    name: str, refuses: Callable[..., list[str]], *, backward: bool = True, into: bool = True
) -> tuple[Candidate, ...]:
    """The raw ops of `name` as the candidate `cpu` (the best level here) and one for each level.

    `backward` and `into` say whether there is a raw op for each.
    """

    def at(backend: str, machine: str, level: int) -> Candidate:
        return Candidate(
            backend,
            forward=native.bind(f"{name}_forward", level),
            backward=native.bind(f"{name}_backward", level) if backward else None,
            into=native.bind(f"{name}_forward_out", level) if into else None,
            machine=machine,
            refuses=refuses,
        )

    levels = device.cpu_levels()
    candidates = [at("cpu", native.why_not, native.BEST_LEVEL)]
    for level in native.LEVELS:
        if native.module is None:
            machine = native.why_not
        elif level not in levels:
            machine = f"not built: {level} is not among the levels of this build"
        else:
            machine = f"this machine lacks{levels[level]}" if levels[level] else ""
        index = list(levels).index(level) if level in levels else native.BEST_LEVEL
        candidates.append(at(f"cpu_{level}", machine, index))
    return tuple(candidates)


def triton_candidate(
    name: str,
    refuses: Callable[..., list[str]] = _never,
    *,
    backward: bool = True,
    into: bool = True,
) -> Candidate:
    """The module kernels/<name>.py as a candidate; it is imported at the first call.

    `backward` and `into` say whether it has a function for each.
    """

    def late(attribute: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            module = importlib.import_module(f"llmcore.kernels.{name}")
            return getattr(module, attribute)(*args, **options)

        return call

    def refuses_device(*args: Any) -> list[str]:
        kinds = {a.device.type for a in args if isinstance(a, torch.Tensor)} - {"cuda"}
        interpreted = device.triton_is_interpreted() and forced == "triton"
        why = "Triton takes it in its interpreter only, if forced"
        reasons = [f"a tensor on {k}: {why}" for k in kinds if not (interpreted and k == "cpu")]
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            reasons.append("torch.compile and torch.func see through the definition only")
        if any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in args):
            reasons.append("torch.float64: Triton's kernels compute in float32")
        return reasons + refuses(*args)

    return Candidate(
        "triton",
        forward=late("forward"),
        backward=late("backward") if backward else None,
        into=late("into") if into else None,
        machine=device.triton_reason() or "",
        refuses=refuses_device,
    )


def cuda_candidate(
    name: str, refuses: Callable[..., list[str]], *, backward: bool = True, into: bool = True
) -> Candidate:
    """The raw ops of `name` on a GPU: csrc/cuda/<name>.cu. `refuses` need not look at devices."""

    def refuses_device(*args: Any) -> list[str]:
        kinds = {t.device.type for t in tensors_in(args)} - {"cuda"}
        return [f"a tensor on {k}: these kernels run on CUDA" for k in kinds] + refuses(*args)

    return Candidate(
        "cuda",
        forward=native.bind(f"{name}_forward", native.BEST_LEVEL),
        backward=native.bind(f"{name}_backward", native.BEST_LEVEL) if backward else None,
        into=native.bind(f"{name}_forward_out", native.BEST_LEVEL) if into else None,
        machine=device.cuda_kernels_reason(),
        refuses=refuses_device,
    )


def tensors_in(args: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    """The tensors among an op's arguments, those inside of a tuple too."""
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, tuple):
            yield from tensors_in(a)


class Op:
    """An op: its name, definition, argument check, samples to hold it to, and what can run it.

    Definition, check and candidates take the same positional arguments. `arguments` makes them of
    a call of the public function (promotes, resolves defaults, groups options); without it they are
    the public function's own. `shapes` names a call's class of shapes in the table of what was
    measured on GPUs (gpu_table.py). `absent` holds the contract's sentence for each family of
    kernels (cpu, triton, cuda, torch) that it does not have.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        check: Callable[..., None],
        samples: Callable[..., Any],
        candidates: tuple[Candidate, ...] = (),
        arguments: Callable[..., tuple[Any, ...]] | None = None,
        shapes: Callable[..., str] = gpu_table.rows_class,
        **absent: str,
    ) -> None:
        self.name = name
        self.reference = reference
        self.check = check
        self.arguments = arguments or self._as_given
        self.samples = samples
        self.shapes = shapes
        self.candidates = (*candidates, Candidate("reference", reference))
        self.absent = absent
        self.chosen: dict[Any, Candidate] = {}
        REGISTRY[name] = self

    def kernel(self, key: Any, *args: Any) -> Candidate:
        """The candidate that runs this call, its arguments checked.

        `key` holds all of the call that the check and the choice depend on, so that both happen
        once for each key; None stands for a call that no key describes, which is checked anew.

        Raises:
            BackendError: a backend is forced and it refuses; the message has its reasons.
            ValueError: the forced backend's name is unknown.
            TypeError, ValueError: the check's own.
        """
        # In compilation shapes may be symbolic, and a graph must not depend on a cache; keys do not
        # hold tangents.
        if key is None or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
            return self._choose(*args)
        if torch._C._are_functorch_transforms_active():  # which Triton's kernels can't see through
            return self._choose(*args)
        try:
            choice = self.chosen.get((forced, key))
        except TypeError:  # an argument that cannot be a part of a key: the check names it
            return self._choose(*args)
        if choice is None:
            if len(self.chosen) >= 4096:
                self.chosen.clear()
            choice = self.chosen[forced, key] = self._choose(*args)
        return choice

    def _choose(self, *args: Any) -> Candidate:
        self.check(*args)
        if forced is not None:
            check_backend(forced)
            return self._forced(forced, *args)
        preferred = [c for c in self.candidates if c.backend in UNFORCED]
        if (found := self.measured(*args)) is not None:  # a stable sort: the fastest goes first
            preferred.sort(key=lambda c: c.backend != found.fastest)
        return next(c for c in preferred if not c.reasons(*args))

    def measured(self, *args: Any) -> gpu_table.Measured | None:
        """What is known of a call's shapes on the GPU that it would run on, where both CUDA and
        Triton have a kernel."""
        if torch.compiler.is_compiling() or not self.has_both:
            return None
        gpu = device.gpu_name(next(tensors_in(args), None))
        return gpu_table.measured(gpu, self.name, self.shapes(*args)) if gpu else None

    @property
    def has_both(self) -> bool:
        """Whether there is both a CUDA and a Triton kernel."""
        return {"cuda", "triton"} <= {c.backend for c in self.candidates}

    def _forced(self, backend: str, *args: Any) -> Candidate:
        candidate = self.candidate(backend)
        reasons = [self.why_absent(backend)] if candidate is None else candidate.reasons(*args)
        if candidate is None or reasons:
            raise BackendError(
                f"{self.name}: {backend} was asked for and cannot run: {'; '.join(reasons)}"
            )
        return candidate

    def _as_given(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        """The arguments in the order of the check's signature, defaults filled in."""
        bound = inspect.signature(self.check).bind(*args, **options)
        bound.apply_defaults()
        return (*bound.args, *bound.kwargs.values())

    def define(self, *args: Any, **options: Any) -> Any:
        """The definition of a call of the public function."""
        return self.reference(*self.arguments(*args, **options))

    @property
    def function(self) -> Callable[..., Any]:
        """The public function."""
        return getattr(importlib.import_module("llmcore.ops"), self.name)

    def candidate(self, backend: str) -> Candidate | None:
        """The candidate of a backend, None where the contract has none."""
        return next((c for c in self.candidates if c.backend == backend), None)

    def why_absent(self, backend: str) -> str:
        """The contract's sentence on a backend that it has no kernel for."""
        family = backend.split("_")[0]
        return self.absent.get(family, f"{self.name} has no {family} kernel")


def check_backend(name: object) -> None:
    """Raises ValueError unless `name` is a backend's."""
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Forces one backend inside a `with` block, process-wide (as torch.backends' flags are).

    A call that the backend refuses raises BackendError with the reasons; nothing falls back. The
    block entered last of those not yet left counts, whichever thread it is in.
    """
    global forced, _unforced
    check_backend(backend)
    entry = [backend]  # told from others by identity
    with _lock:
        if not _entries:
            _unforced = forced
        _entries.append(entry)
        forced = backend
    try:
        yield
    finally:
        with _lock:
            _entries[:] = [e for e in _entries if e is not entry]
            forced = _entries[-1][0] if _entries else _unforced


class Backends(dict[str, dict[str, str]]):
    """op -> backend -> "" where it runs on this machine, else why not. Prints as a table."""

    def __str__(self) -> str:
        best = device.best_cpu_level()
        notes: dict[str, int] = {}
        width = max(map(len, self))
        lines = [
            f"cpu stands for cpu_{best} on this machine"
            if best
            else "there is no cpu backend: " + native.why_not
        ]
        lines.append(" ".join([" " * width, *BACKENDS]))
        for name, row in self.items():
            cells = [
                ("runs" if not why else f"({notes.setdefault(why, len(notes) + 1)})")
                for why in row.values()
            ]
            lines.append(
                " ".join(
                    [
                        f"{name:<{width}}",
                        *(f"{c:<{len(b)}}" for c, b in zip(cells, row, strict=True)),
                    ]
                ).rstrip()
            )
        return "\n".join([*lines, *(f"({number}) {why}" for why, number in notes.items())])


def backends() -> Backends:
    """Every op with every backend: "" where it runs on this machine, else the reason."""
    table = Backends()
    for name, op in REGISTRY.items():
        found = {backend: op.candidate(backend) for backend in BACKENDS}
        table[name] = {b: op.why_absent(b) if c is None else c.machine for b, c in found.items()}
    for name, (op, _) in MAPPED.items():
        table[name] = dict(table[op.name])
    return table


def order(op: str, kind: str) -> list[str]:
    """The backends that run on this machine for an op's tensors on a kind of device ("cpu" or
    "cuda"), in the order in which they are asked for a call."""
    found = MAPPED[op][0] if op in MAPPED else REGISTRY[op]
    return [c.backend for c in found.candidates if c.backend in BY_DEVICE[kind] and not c.machine]


@dataclass(frozen=True)
class Explanation:
    """Which candidate runs a call, and why each other one does not. Prints as a list.

    `measured` is what the order of CUDA and Triton on this GPU rests on, where it was measured.
    """

    op: str
    chosen: str
    reasons: dict[str, list[str]]
    measured: str = ""

    def __str__(self) -> str:
        others = [
            f"  {b}: {'; '.join(why) or 'could run'}"
            for b, why in self.reasons.items()
            if b != self.chosen
        ]
        measured = [f"  {self.measured}"] if self.measured else []
        return "\n".join([f"{self.op} runs on {self.chosen}", *measured, *others])


def explain(op: str | Callable[..., Any], *args: Any, **options: Any) -> Explanation:
    """Which candidate would run op(*args, **options), and the reasons of all others.

    `op` is a public function of llmcore.ops or its name. Raises what the call itself would raise
    for bad arguments.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name in MAPPED:
        found, arguments = MAPPED[name]
    elif name in REGISTRY:
        found = REGISTRY[name]
        arguments = found.arguments
    else:
        raise ValueError(f"op: got {name!r}, expected one of {', '.join((*REGISTRY, *MAPPED))}")
    with torch.random.fork_rng(devices=[]):  # a seed for dropout is drawn, and given back
        call = arguments(*args, **options)
    chosen = found._choose(*call)
    reasons = {}
    for backend in BACKENDS:
        candidate = found.candidate(backend)
        reasons[backend] = (
            [found.why_absent(backend)] if candidate is None else candidate.reasons(*call)
        )
    return Explanation(found.name, chosen.backend, reasons, str(found.measured(*call) or ""))
