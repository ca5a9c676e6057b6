"""llmcore.accelerate: llmcore's kernels inside a model that somebody else wrote.

    report = llmcore.accelerate(model)      # or weights="int8"
    print(report)                           # what was swapped, what was left and why
    report.undo()                           # every bit as before

Only this object changes (llmcore.swap.instance), and what is swapped is found by what a module
holds and computes (llmcore.swap.modules), not by the name of its family. Each swap is run once on a
small seeded input beside what it takes the place of; one that gives something else is taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from llmcore.models.packed import check_format
from llmcore.swap import attention, decoder, loss, modules, torch_modules
from llmcore.swap.attention import outputs
from llmcore.swap.instance import Change, become, is_swapped, quiet
from llmcore.swap.linears import linear_layout
from llmcore.swap.packing import Packing
from llmcore.swap.report import Left, Report, Swap
from llmcore.swap.structure import (
    Refusal,
    Structure,
    apply,
    difference,
    largest,
    own_tensors,
    untouchable,
)

MODEL_ROUNDINGS = 5.0
"""How many times the tolerance of one module a whole model's output may differ by."""

STRUCTURES: tuple[Structure, ...] = (*torch_modules.STRUCTURES, *modules.STRUCTURES)


def accelerate(model: nn.Module, *, weights: str | None = None) -> Report:
    """Run llmcore's kernels in this model; the report says where, and takes it back.

    model    any nn.Module, on the CPU or a GPU; it is changed in place, and only it: neither its
             classes nor other models of them. Its parameters stay the same objects under the same
             names, so that optimizers, tied weights and state_dicts go on as before.
    weights  "bf16", "int8" or "int4" packs the linears' weights for inference: they take no
             gradient any more (what is added beside them does, as LoRA). The originals go to a
             temporary file, from which `state_dict` and `undo` have every bit.

    What a module computes stays the same within some roundings of its dtype, for results and for
    gradients; hooks see what they saw.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: other weights, or a model that is accelerated already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check_format(weights)
    if any(is_swapped(module) for module in model.modules()):
        raise ValueError("model: is accelerated already; undo that first")
    work = _Work(model, Packing(weights) if weights else None)
    try:
        with quiet(model):
            work.run()
    except BaseException:
        work.report.undo()
        raise
    return work.report


@dataclass
class _Work:
    """One call of accelerate."""

    model: nn.Module
    packing: Packing | None
    report: Report = field(default_factory=Report)

    def run(self) -> None:
        try:
            before = outputs(self.model)
        except Exception as problem:  # of a model that takes something else
            before = []
            self.report.left.append(Left("", "whole model", f"a small input failed: {problem}"))
        if attention.has_attention_choice(self.model):
            self._checked("attention", before, self._choose_attention)
        self._swap_modules()
        if before:
            now = outputs(self.model)
            now = self._checked("rope", now, self._swap_rotary) or now
            self.report.error = largest(now, before)
            self._swap_loss()
            self._swap_passes()
        self.report.sort([name for name, _ in self.model.named_modules()])

    def _checked(
        self, name: str, expected: list[Tensor], swap: Callable[[], None]
    ) -> list[Tensor] | None:
        """A swap whose small input is the whole model's: its output, or None where it went back."""
        steps, swapped = len(self.report._steps), len(self.report.swapped)
        try:
            if not expected:
                raise Refusal(name, "nothing says what a small input of this model is")
            swap()
            got = outputs(self.model)
            if not (error := difference(got, expected)) <= MODEL_ROUNDINGS:
                raise Refusal(name, f"{error:.0f} times what rounding explains in its output")
        except (Refusal, RuntimeError, TypeError, ValueError) as problem:
            self.report.undo(steps)
            del self.report.swapped[swapped:]
            reason = problem.reason if isinstance(problem, Refusal) else str(problem)
            self.report.left.append(Left("", name, reason))
            return None
        error, found = largest(got, expected), self.report.swapped[swapped:]
        self.report.swapped[swapped:] = [replace(swap, error=error) for swap in found]
        return got

    def _choose_attention(self) -> None:
        choice = attention.OwnConfig.choose(self.model)
        self.report._steps.append(choice.undo)
        self.report.swapped.append(Swap("", "attention", 0.0))

    def _swap_rotary(self) -> None:
        for name, module in self.model.named_modules():
            found = None if untouchable(module) else apply(attention.ROPE, module)
            if found is not None:
                self._record(name, attention.ROPE.name, *found)

    def _swap_loss(self) -> None:
        """The head and its cross entropy, in training."""
        found = loss.recognised(self.model)
        if found is None or self.packing is not None:
            return
        theirs = type(self.model).forward
        change = become(self.model, loss.HeadLoss, _llmcore_loss=found)
        change = replace(change, attributes=("_llmcore_loss", "_llmcore_loss_output"))
        try:
            error = loss.checked(self.model, theirs)
        except (Refusal, RuntimeError, TypeError, ValueError, KeyError) as problem:
            change.undo()
            reason = problem.reason if isinstance(problem, Refusal) else str(problem)
            self.report.left.append(Left("", "linear_cross_entropy", reason))
        else:
            self._record("", "linear_cross_entropy", change, error)

    def _swap_passes(self) -> None:
        """Passes over a cache by one native call, where the model is such a decoder."""
        if decoder.generates(self.model):
            attributes = {"_llmcore_passes": decoder.Passes()}
            change = become(self.model, decoder.CausalDecoder, **attributes)
            try:
                undo, error = decoder.checked(self.model)
            except (decoder.Unfit, *decoder.OF_OTHERS) as reason:
                change.undo()
                self.report.left.append(Left("", "decoder pass", str(reason)))
            else:
                self.report._steps.append(undo)
                self._record("", "decoder pass", change, error)

    def _swap_modules(self) -> None:
        """Each module by the table, children before their parents."""
        if self.packing is not None:
            self.report._steps.append(self.packing.undo)
        ends = _tied_or_last(self.model)
        for name, module in reversed(list(self.model.named_modules())):
            if reason := untouchable(module):
                self.report.left.append(Left(name, type(module).__name__, reason))
                continue
            try:
                swapped = self._swap(name, module, ends)
            except Refusal as refusal:
                self.report.left.append(Left(name, refusal.structure, refusal.reason))
            else:
                if not swapped and own_tensors(module):
                    kind = type(module).__name__
                    self.report.left.append(Left(name, kind, "no structure of the table"))
        if self.packing is not None:
            self.report.memory_saved = self.packing.saved

    def _swap(self, name: str, module: nn.Module, ends: set[int]) -> bool:
        for structure in STRUCTURES:
            found = apply(structure, module)
            if found is not None:
                if structure.name == "linear" and self.packing is not None:
                    self.report._steps.append(found[0].undo)
                    self._pack(name, module, ends)
                else:
                    self._record(name, structure.name, *found)
                return True
        if self.packing is not None and linear_layout(module) == "columns":
            self._pack(name, module, ends)
            return True
        return False

    def _pack(self, name: str, module: nn.Module, ends: set[int]) -> None:
        assert self.packing is not None
        change, error = self.packing.pack(name, module, id(module.weight) in ends)
        self._record(name, f"linear, {self.packing.format}", change, error)

    def _record(self, name: str, structure: str, change: Change | None, error: float) -> None:
        if change is not None:
            self.report._steps.append(change.undo)
        self.report.swapped.append(Swap(name, structure, error))


def _tied_or_last(model: nn.Module) -> set[int]:
    """The parameters, by id, that are embeddings too, or that the model's logits come from."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return embeddings | ({id(head.weight)} if isinstance(head, nn.Linear) else set())
