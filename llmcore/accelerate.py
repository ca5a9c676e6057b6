"""llmcore.accelerate: llmcore's kernels inside a model that somebody else wrote.

    report = llmcore.accelerate(model)      # or weights="int8"
    print(report)                           # what was swapped, what was left and why
    report.undo()                           # every bit as before

Only this object changes (llmcore.swap.instance), and what is swapped is found by what a module
holds and computes (llmcore.swap.modules), not by the name of its family. Each swap is run once on a
small seeded input beside what it takes the place of; one that gives something else is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
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
        # Gradients are recorded where they are compared: in inference mode too, and not elsewhere.
        with quiet(model), torch.inference_mode(False), torch.no_grad():
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
    wholes: dict[str, nn.Module] = field(default_factory=dict)

    def run(self) -> None:
        before = self._wholes()
        wholes = self.wholes = {name: self.model.get_submodule(name) for name in before}
        for name, whole in wholes.items():
            if attention.is_of_transformers(whole):
                self._checked("attention", name, before[name], self._choose_attention)
        self._swap_modules(_tied_or_last(self.model, (self.model, *wholes.values())))
        for name, whole in wholes.items():
            now = outputs(whole)
            now = self._checked("rope", name, now, self._swap_rotary) or now
            self.report.error = max(self.report.error or 0.0, largest(now, before[name]))
            self._swap_loss(name, whole)
            self._swap_passes(name, whole)
        self.report.sort([name for name, _ in self.model.named_modules()])

    def _wholes(self) -> dict[str, list[Tensor]]:
        """What is held against itself as a whole, and its outputs.

        The model, or those of transformers that it is made of: the outermost ones that there is a
        small input for.
        """
        found = {}
        names = _of_transformers(self.model, "") or [""]
        seen: set[nn.Module] = set()  # a module may have several names
        for name in names:  # which grow
            whole = self.model.get_submodule(name)
            if whole in seen:
                continue
            seen.add(whole)
            if given := self._outputs(name, whole):
                found[name] = given
            elif not any(p.is_meta for p in whole.parameters()):
                for child, module in whole.named_children():
                    names += _of_transformers(module, f"{name}.{child}" if name else child)
        return found

    def _outputs(self, name: str, whole: nn.Module) -> list[Tensor]:
        """Of small inputs; none where that can't be, and the report says why."""
        if any(p.is_meta for p in whole.parameters()):
            reason = "weights without values (meta device): accelerate it when they are loaded"
        else:
            try:
                found = outputs(whole)
            except Exception as problem:  # of a model that takes something else
                reason = f"a small input failed: {problem}"
            else:
                if found or not attention.is_of_transformers(whole):
                    return found
                reason = "nothing says what a small input of it is, to hold its attention against"
        self.report.left.append(Left(name, "whole model", reason))
        return []

    def _checked(
        self,
        kind: str,
        name: str,
        expected: list[Tensor],
        swap: Callable[[str, nn.Module], None],
    ) -> list[Tensor] | None:
        """A swap whose small input is a whole model's: its output, or None where it went back."""
        steps, swapped = len(self.report._steps), len(self.report.swapped)
        whole = self.model.get_submodule(name)
        try:
            swap(name, whole)
            got = outputs(whole)
            if not (error := difference(got, expected)) <= MODEL_ROUNDINGS:
                raise Refusal(kind, f"{error:.0f} times what rounding explains in its output")
        except (Refusal, RuntimeError, TypeError, ValueError) as problem:
            self.report.undo(steps)
            del self.report.swapped[swapped:]
            reason = problem.reason if isinstance(problem, Refusal) else str(problem)
            self.report.left.append(Left(name, kind, reason))
            return None
        error, found = largest(got, expected), self.report.swapped[swapped:]
        self.report.swapped[swapped:] = [replace(swap, error=error) for swap in found]
        return got

    def _choose_attention(self, name: str, whole: nn.Module) -> None:
        others = [other for other in self.wholes.values() if other is not whole]
        choice = attention.OwnConfig.choose(whole, self.model, others)
        self.report._steps.append(choice.undo)
        self.report.swapped.append(Swap(name, "attention", 0.0))

    def _swap_rotary(self, prefix: str, whole: nn.Module) -> None:
        for name, module in whole.named_modules(prefix=prefix):
            found = None if untouchable(module) else apply(attention.ROPE, module)
            if found is not None:
                self._record(name, attention.ROPE.name, *found)

    def _swap_loss(self, name: str, whole: nn.Module) -> None:
        """The head and its cross entropy, in training."""
        found = loss.recognised(whole)
        if found is None or self.packing is not None:
            return
        theirs = type(whole).forward
        change = become(whole, loss.HeadLoss, _llmcore_loss=found)
        change = replace(change, attributes=("_llmcore_loss", "_llmcore_loss_output"))
        try:
            error = loss.checked(whole, theirs)
        except (Refusal, RuntimeError, TypeError, ValueError, KeyError) as problem:
            change.undo()
            reason = problem.reason if isinstance(problem, Refusal) else str(problem)
            self.report.left.append(Left(name, "linear_cross_entropy", reason))
        else:
            self._record(name, "linear_cross_entropy", change, error)

    def _swap_passes(self, name: str, whole: nn.Module) -> None:
        """Passes over a cache by one native call, where the model is such a decoder."""
        if decoder.generates(whole):
            attributes = {"_llmcore_passes": decoder.Passes()}
            change = become(whole, decoder.CausalDecoder, **attributes)
            try:
                undo, error = decoder.checked(whole)
            except (decoder.Unfit, *decoder.OF_OTHERS) as reason:
                change.undo()
                self.report.left.append(Left(name, "decoder pass", str(reason)))
            else:
                self.report._steps.append(undo)
                self._record(name, "decoder pass", change, error)

    def _swap_modules(self, ends: set[int]) -> None:
        """Each module by the table, children before their parents."""
        if self.packing is not None:
            self.report._steps.append(self.packing.undo)
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


def _of_transformers(module: nn.Module, name: str) -> list[str]:
    """The names of the outermost models of transformers in a module that has this name."""
    if attention.is_of_transformers(module):
        return [name]
    return [
        inner
        for child, below in module.named_children()
        for inner in _of_transformers(below, f"{name}.{child}" if name else child)
    ]


def _tied_or_last(model: nn.Module, wholes: Iterable[nn.Module]) -> set[int]:
    """The parameters, by id, that are embeddings too, or that a whole's logits come from."""
    found = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for whole in wholes:
        get_head = getattr(whole, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if isinstance(head, nn.Linear):
            found.add(id(head.weight))
    return found
