"""Triton's interpreter as a GPU rounds: to the nearest bfloat16, where it cuts off the bits.

It counts what it runs, too.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from kernel_counts import Recorder, digest

executed = Recorder()
"""What was interpreted since `prepare`."""


@functools.cache
def prepare() -> None:
    """Makes the interpreter round and count, for good."""
    round_to_nearest()
    count_launches()


def round_to_nearest() -> None:
    """Puts torch's conversion from float32 to bfloat16 in place of the interpreter's."""
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, sink: Any, rounding: Any) -> np.ndarray:
        if source != tl.float32 or sink != tl.bfloat16:
            return cut(data, source, sink, rounding)
        wide = torch.from_numpy(np.ascontiguousarray(data, np.float32))
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    interpreter._convert_float = convert


def count_launches() -> None:
    """Puts each launch of a kernel into `executed`."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = f"{self.fn.__module__.rsplit('.', 1)[-1]}.{self.fn.__name__}"
        executed.add(f"triton {kernel}", digest(grid, args, options))
        return run(self, *args, grid=grid, warmup=warmup, **options)

    InterpretedFunction.run = counted
