"""Faults to plant in copies of the Triton kernels, and the call of an op that shows each.

The tests must find every one: in the interpreter as wrong numbers, in the simulator as wrong
numbers too or as what it is (an access outside of a tensor).
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmcore.ops.packed_weight import pack
from llmcore.ops.sample import Draw, Sample

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@dataclass(frozen=True)
class Fault:
    """An edit of kernels/<file>.py, where `old` must stand once; the kernel that has it then; a
    call, by the sizes of its normal tensors, other arguments and options.

    bounds: the simulator must tell an access outside of a tensor; the interpreter has no bounds.
    """

    op: str
    file: str
    kernel: str
    old: str
    new: str
    shapes: tuple[tuple[int, ...], ...]
    more: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    bounds: bool = False

    def sample(self) -> Sample:
        draw = Draw(0)
        tensors = tuple(draw.normal(*shape) for shape in self.shapes)
        return Sample(self.kernel, (*tensors, *self.more), self.options)


def ends(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


HEADS = ((1, 2, 20, 16),) * 3
CAUSAL = {"causal": True}
TARGET = torch.tensor([2, 0, 4])

FAULTS = {
    "row_bound_off_by_one": Fault(
        *("rms_norm", "row_norm", "row_norm.forward_kernel"),
        "inside = (row < rows) & (column < width)\n    values",
        "inside = (row <= rows) & (column < width)\n    values",
        ((3, 64), (64,)),
        (1e-6,),
        bounds=True,
    ),
    "column_bound_off_by_one": Fault(
        *("cross_entropy", "cross_entropy", "cross_entropy.forward_kernel"),
        "inside = column < width\n        score",
        "inside = column <= width\n        score",
        ((3, 40),),
        (TARGET,),
        bounds=True,
    ),
    "missing_mask_of_columns": Fault(
        *("swiglu", "activation", "activation.forward_kernel"),
        "tl.store(y + row * width + column, result.to(y.dtype.element_ty), inside)",
        "tl.store(y + row * width + column, result.to(y.dtype.element_ty))",
        ((3, 40), (3, 40)),
        bounds=True,
    ),
    "padding_counts": Fault(
        *("layer_norm", "row_norm", "row_norm.forward_kernel"),
        "rows = tl.where(inside, rows - (tl.sum(rows, 1) / width)[:, None], 0.0)",
        "rows = rows - (tl.sum(rows, 1) / width)[:, None]",
        ((3, 40), (40,), (40,)),
        (1e-5,),
    ),
    "missing_term_of_the_gradient": Fault(
        *("rms_norm", "row_norm", "row_norm.backward_kernel"),
        "result = gradient - unit * (tl.sum(gradient * unit, 1) / width)[:, None]",
        "result = gradient",
        ((3, 40), (40,)),
        (1e-6,),
    ),
    "wrong_sign_of_the_angle": Fault(
        *("rope", "rope", "rope.turn_kernel"),
        "s = -s",
        "s = s * 1.0",
        ((1, 2, 3, 8), (3, 4), (3, 4)),
    ),
    "causal_off_by_one": Fault(
        *("masked_softmax", "softmax", "softmax.forward_kernel"),
        "column <= row % height + (width - height)",
        "column <= row % height + (width - height) + 1",
        ((2, 5, 9),),
        options=CAUSAL,
    ),
    "forgotten_gate": Fault(
        *("geglu", "activation", "activation.backward_kernel"),
        "(gradient * value).to(dup",
        "gradient.to(dup",
        ((3, 40), (3, 40)),
    ),
    "half_of_the_slope": Fault(
        *("gelu", "activation", "activation.backward_kernel"),
        "slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)",
        "slope = share",
        ((3, 40),),
    ),
    "maximum_of_the_last_block": Fault(
        *("cross_entropy", "cross_entropy", "cross_entropy.forward_kernel"),
        "weights = weights * tl.exp(peak - base) + ",
        "weights = weights + ",
        ((8, 8200),),
        (torch.arange(8),),
    ),
    "mask_off_by_one": Fault(
        *("attention", "attention_scores", "attention.forward_kernel"),
        "seen = seen & (key - query <= at.high)",
        "seen = seen & (key - query <= at.high + 1)",
        HEADS,
        options=CAUSAL,
    ),
    "row_limit_off_by_one": Fault(
        *("attention", "attention_scores", "attention.forward_kernel"),
        "load_tile(pointers, row < at.rows * SHARE, WIDTH",
        "load_tile(pointers, row < at.rows * SHARE + 1, WIDTH",
        HEADS,
        bounds=True,
    ),
    "not_scaled_down": Fault(
        *("attention", "attention", "attention.forward_kernel"),
        "result *= shrink[:, None]",
        "result *= 1.0",
        ((1, 2, 20, 16), (1, 2, 150, 16), (1, 2, 150, 16)),
    ),
    "parts_not_scaled_down": Fault(
        *("attention", "attention", "attention.combine_kernel"),
        "total = total * mine + other_total * theirs",
        "total = total + other_total",
        ((1, 2, 1, 16), (1, 2, 300, 16), (1, 2, 300, 16)),
    ),
    "wrong_sign_of_delta": Fault(
        *("attention", "attention_backward", "attention_backward.key_kernel"),
        "gradient = weight * (dproduct - delta) * slope",
        "gradient = weight * (dproduct + delta) * slope",
        HEADS,
    ),
    "last_rows_dropped": Fault(
        *("attention", "attention_backward", "attention_backward.key_kernel"),
        "inside = row < at.rows * SHARE\n    head",
        "inside = row < at.rows * SHARE - 1\n    head",
        HEADS,
    ),
    "keys_of_the_next_sequence": Fault(
        *("attention_varlen", "attention_scores", "attention.forward_kernel"),
        "keys = (tl.load(shape.ends_k + batch + 1, real, other=0) - first_key).to(tl.int32)",
        "keys = (tl.load(shape.ends_k + batch + 1, real, other=0) - first_key).to(tl.int32) + 1",
        ((9, 2, 16), (9, 1, 16), (9, 1, 16)),
        (ends(4, 5), ends(4, 5)),
        bounds=True,
    ),
    "place_in_page_off_by_one": Fault(
        *("paged_attention", "attention_scores", "attention.forward_kernel"),
        "place_in_page = (key % shape.page_length)",
        "place_in_page = ((key + 1) % shape.page_length)",
        ((1, 2, 1, 16), (3, 1, 4, 16), (3, 1, 4, 16)),
        (torch.tensor([[2, 0]]), torch.tensor([7])),
    ),
    "page_that_is_not_there": Fault(
        *("paged_attention", "attention_scores", "attention.forward_kernel"),
        "exists = inside & (page >= 0) & (page < shape.pages)",
        "exists = inside",
        ((1, 2, 1, 16), (3, 1, 4, 16), (3, 1, 4, 16)),
        (torch.tensor([[2, -1]]), torch.tensor([7])),
        bounds=True,
    ),
    "classes_beyond_the_last": Fault(
        *("linear_cross_entropy", "linear_cross_entropy", "linear_cross_entropy.forward_kernel"),
        'score = tl.where(is_class, logits, float("-inf"))',
        "score = logits",
        ((3, 16), (20, 16)),
        (TARGET,),
    ),
    "target_not_subtracted": Fault(
        *("linear_cross_entropy", "linear_cross_entropy", "linear_cross_entropy.gradient_kernel"),
        "- (wanted + smoothing / classes)",
        "- smoothing / classes",
        ((3, 16), (20, 16)),
        (TARGET,),
    ),
    "halves_swapped": Fault(
        *("linear", "linear", "linear.product_kernel"),
        "tl.join(raw & 15, raw >> 4)",
        "tl.join(raw >> 4, raw & 15)",
        ((2, 64),),
        (pack(Draw(1).normal(20, 64), "int4", 32),),
    ),
    "part_left_out": Fault(
        *("linear", "linear", "linear.add_kernel"),
        "for _ in range(parts_count):",
        "for _ in range(parts_count - 1):",
        ((1, 256),),
        (pack(Draw(1).normal(20, 256), "int8", 32),),
    ),
}


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """Inside, llmcore.kernels is a copy of the kernels with the fault in it."""
    package: Any = importlib.import_module("llmcore.kernels")
    before, kept = list(package.__path__), take_modules(package)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "kernels"
        shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / f"{fault.file}.py"
        text = file.read_text()
        assert text.count(fault.old) == 1, f"{fault.file}.py has {text.count(fault.old)}"
        file.write_text(text.replace(fault.old, fault.new))
        package.__path__ = [str(copy)]
        try:
            yield
        finally:
            take_modules(package)
            package.__path__ = before
            for name, module in kept.items():
                sys.modules[name] = module
                setattr(package, name.rsplit(".", 1)[-1], module)


def take_modules(package: Any) -> dict[str, Any]:
    """The kernels' modules, which are imported anew from now on."""
    found = {name: m for name, m in sys.modules.items() if name.startswith("llmcore.kernels.")}
    for name in found:
        del sys.modules[name]
        delattr(package, name.rsplit(".", 1)[-1])
    return found
