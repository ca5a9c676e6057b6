"""Packed weights in the place of a model's matrices, and the originals in a file.

A packed linear still has its parameter: the same object, with the same bits, under the same name in
the state_dict, tied where it was tied. But its values lie in a temporary file that is mapped into
memory, and so in none until somebody reads them: an embedding, the rows that it looks up; saving
the model, all of it. Gradients are no longer taken of it, for products use the packed weight.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmcore.models.packed import packed_matrix
from llmcore.ops.packed_weight import PackedWeight
from llmcore.swap.instance import Change, become
from llmcore.swap.linears import Linear, PackedColumns, holding, linear_layout
from llmcore.swap.structure import Refusal


@dataclass
class Packing:
    """What has been packed, so that each matrix is packed once and can go back."""

    format: str
    packed: dict[int, PackedWeight] = field(default_factory=dict)  # by id of the parameter
    originals: list[tuple[nn.Parameter, bool]] = field(default_factory=list)

    def pack(self, name: str, module: nn.Module, ends: bool) -> tuple[Change | None, float]:
        """Pack a linear's weight; the change, and the share of the weight that rounding lost.

        ends  whether the matrix is an embedding too, or makes the model's logits
        Refusal where it can't be packed.
        """
        layout = "rows" if isinstance(module, Linear) else linear_layout(module)
        parameter = module.weight
        assert isinstance(parameter, nn.Parameter) and layout is not None
        packed = self.packed.get(id(parameter))
        if packed is None:
            matrix = parameter.detach() if layout == "rows" else parameter.detach().T
            try:
                packed = packed_matrix(name, matrix, self.format, ends=ends)
            except ValueError as problem:
                raise Refusal("linear", str(problem)) from problem
            self.packed[id(parameter)] = packed
            self.originals.append((parameter, parameter.requires_grad))
            parameter.requires_grad_(False)
            parameter.data = in_file(parameter.data)
        attributes = holding(packed, parameter)
        if isinstance(module, Linear):
            module.__dict__.update(attributes)
            return None, packed.error
        return become(module, PackedColumns, **attributes), packed.error

    @property
    def saved(self) -> int:
        """Bytes of memory that the originals had and the packed weights don't need."""
        return sum(p.nbytes - self.packed[id(p)].nbytes for p, _ in self.originals)

    def undo(self) -> None:
        """The originals back into memory."""
        for parameter, requires_grad in self.originals:
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(requires_grad)


def in_file(values: Tensor) -> Tensor:
    """The same values, mapped from a temporary file that has no name any more.

    Writing to them changes the memory's copy, not the file. OSError where the file can't be
    written; it lies in the folder for temporary files (the environment's TMPDIR).
    """
    if values.numel() == 0:
        return values
    with tempfile.NamedTemporaryFile(prefix="llmcore-", suffix=".weight", delete=False) as file:
        for part in _bytes(values):
            file.write(part)
    try:
        count = values.numel() * values.element_size()
        storage = torch.UntypedStorage.from_file(file.name, False, count)
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is mapped
            os.unlink(file.name)
    return torch.empty(0, dtype=values.dtype).set_(storage, 0, values.shape)  # type: ignore[call-overload]


def _bytes(values: Tensor, step: int = 1 << 26) -> Iterator[memoryview]:
    flat = values.detach().cpu().contiguous().flatten().view(torch.uint8)
    for begin in range(0, flat.numel(), step):
        yield flat[begin : begin + step].numpy().data
