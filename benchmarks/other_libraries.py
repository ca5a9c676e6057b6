"""Calls of other libraries, for whoever has them installed: onnxruntime, numpy's OpenBLAS.

Each runs on as many threads as torch does, which are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch

from .cases import Peer
from .shapes import FORWARD

OPSET, IR = 23, 11
"""Of ONNX: the first that has Attention."""

REST, OPENBLAS_REST = 0.005, 0.12
"""Seconds after a turn. OpenBLAS's threads spin for 2^26 clocks at least, about 105 ms on two cores
(2026-11), and until then a product of 512 x 576 x 3072 by F.linear took 24 ms instead of 11."""


def onnx_session(operator: str, inputs: Sequence[torch.Tensor], **attributes: Any) -> Any:
    """A model of one operator of float32 tensors, loaded by onnxruntime."""
    import onnxruntime
    from onnx import TensorProto, helper

    names = [f"x{i}" for i in range(len(inputs))]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(tensor.shape))
        for name, tensor in zip(names, inputs, strict=True)
    ]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    node = helper.make_node(operator, names, ["y"], **attributes)
    graph = helper.make_graph([node], operator, values, [result])
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run_session(session: Any, feeds: dict[str, numpy.ndarray]) -> torch.Tensor:
    return torch.from_numpy(session.run(None, feeds)[0])


def onnxruntime_peer(
    operator: str, arguments: Callable[..., tuple[Sequence[torch.Tensor], dict[str, Any]]]
) -> Peer:
    """onnxruntime's `operator`; `arguments` makes its inputs and attributes of llmcore's."""

    def prepare(*args: Any, **options: Any) -> tuple[Any, ...]:
        inputs, attributes = arguments(*args, **options)
        feeds = {f"x{i}": tensor.numpy() for i, tensor in enumerate(inputs)}
        return onnx_session(operator, inputs, **attributes), feeds

    return Peer(
        f"onnxruntime {operator}",
        run_session,
        prepare=prepare,
        modes=(FORWARD,),
        quick_modes=(),
        dtypes=("fp32",),
        is_torch=False,
        rest=REST,
    )


def openblas_arrays(x: torch.Tensor, weight: torch.Tensor) -> tuple[numpy.ndarray, ...]:
    import threadpoolctl

    found = [lib for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]
    if not any(lib["internal_api"] == "openblas" for lib in found):
        raise RuntimeError("numpy is not linked with OpenBLAS")
    threadpoolctl.threadpool_limits(torch.get_num_threads(), "blas")
    return x.numpy(), weight.numpy()


def openblas_linear(x: numpy.ndarray, weight: numpy.ndarray) -> torch.Tensor:
    return torch.from_numpy(x @ weight.T)


def openblas_peer() -> Peer:
    """numpy's float32 product, where numpy is linked with OpenBLAS, as its own wheels are."""
    return Peer(
        "OpenBLAS (numpy)",
        openblas_linear,
        prepare=openblas_arrays,
        modes=(FORWARD,),
        dtypes=("fp32",),
        is_torch=False,
        rest=OPENBLAS_REST,
    )
