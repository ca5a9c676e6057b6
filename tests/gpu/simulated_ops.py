"""Each op's CUDA candidate with the simulator in the GPU's place: what csrc/register does with
tensors, over simulated memory. The signatures are the raw ops', without their level."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nvcc
import torch
from simulated import DTYPES, Library, pointer

from llmcore.dispatch import REGISTRY, Candidate

Tensor = torch.Tensor


class Call:
    """One call: its tensors in simulated memory, its result out of it."""

    def __init__(self, library: Library) -> None:
        library.memory.clear()
        self.library, self.memory = library, library.memory

    def input(self, tensor: Tensor | None, name: str, contiguous: bool = True) -> Tensor | None:
        if tensor is not None and contiguous:
            tensor = tensor.contiguous()
        return self.memory.input(tensor, name)

    def like(self, tensor: Tensor, name: str) -> Tensor:
        return self.memory.output(tensor.shape, tensor.dtype, name)

    def floats(self, shape: tuple[int, ...], name: str) -> Tensor:
        return self.memory.output(shape, torch.float32, name)

    def run(self, function: str, struct: str, scratch: bool = False, **fields: Any) -> None:
        plain = {k: pointer(v) if isinstance(v, Tensor) else v for k, v in fields.items()}
        self.library.call(function, struct, plain, scratch=scratch)


def rows_of(x: Tensor) -> dict[str, int]:
    width = x.shape[-1]
    return {"rows": x.numel() // max(width, 1), "width": width, "dtype": DTYPES[x.dtype]}


def parameter(name: str, tensor: Tensor | None) -> dict[str, Any]:
    code = 0 if tensor is None else DTYPES[tensor.dtype]
    return {name: tensor, f"{name}_dtype": code}


class Norm:
    """layer_norm and rms_norm, alone or after an addition."""

    def __init__(self, library: Library, name: str) -> None:
        self.library, self.name = library, name
        self.center, self.add = "layer" in name, "add" in name
        self.struct = "".join(part.title() for part in name.split("_"))

    def forward(self, *args: Any) -> Any:
        *tensors, eps = args
        call = Call(self.library)
        x = call.input(tensors.pop(0), "x")
        fields: dict[str, Any] = {"x": x, "y": call.like(x, "y"), "eps": eps, **rows_of(x)}
        if self.add:
            fields["residual"] = call.input(tensors.pop(0), "residual")
            fields["total"] = call.like(x, "total")
        for name, tensor in zip(("weight", "bias"), tensors, strict=False):
            fields |= parameter(name, call.input(tensor, name))
        call.run(f"{self.name}_forward", f"{self.struct}Forward", **fields)
        y = fields["y"].clone()
        return (y, fields["total"].clone()) if self.add else y

    def backward(self, dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        wanted = 2 + self.center
        dtotal = args[0] if self.add else None
        x, weight, eps = args[1:4] if self.add else args[:3]
        need_dx, *need = args[-wanted:]
        call = Call(self.library)
        x = call.input(x, "x")
        outputs = [call.like(x, "dx") if need_dx else x.new_empty(0)]
        names = ["dweight", "dbias"][: 1 + self.center]
        for name, needed in zip(names, need, strict=True):
            size = x.shape[-1] if needed else 0
            outputs.append(call.floats((size,), name))
        fields: dict[str, Any] = {"dy": call.input(dy, "dy"), "x": x, "eps": eps, **rows_of(x)}
        fields |= parameter("weight", call.input(weight, "weight"))
        for name, output in zip(("dx", *names), outputs, strict=True):
            fields[name] = pointer(output) if output.numel() else None
        fields = {k: pointer(v) if isinstance(v, Tensor) else v for k, v in fields.items()}
        if self.add:
            fields = {"norm": fields, "dtotal": call.input(dtotal, "dtotal")}
        call.run(f"{self.name}_backward", f"{self.struct}Backward", scratch=True, **fields)
        return tuple(output.clone() for output in outputs)


class Softmax:
    def __init__(self, library: Library, name: str) -> None:
        self.library = library

    def forward(self, x: Tensor) -> Tensor:
        call = Call(self.library)
        x = call.input(x, "x")
        y = call.like(x, "y")
        call.run("softmax_forward", "SoftmaxForward", x=x, y=y, **rows_of(x))
        return y.clone()

    def backward(self, dy: Tensor, y: Tensor) -> Tensor:
        call = Call(self.library)
        y, dy = call.input(y, "y"), call.input(dy, "dy")
        dx = call.like(y, "dx")
        call.run("softmax_backward", "SoftmaxBackward", dy=dy, y=y, dx=dx, **rows_of(y))
        return dx.clone()


class CrossEntropy:
    def __init__(self, library: Library, name: str) -> None:
        self.library = library

    @staticmethod
    def fields(logits: Tensor, target: Tensor, options: tuple[int, float, int]) -> dict[str, Any]:
        fields = {"logits": logits, "target": target, "rows": target.numel()}
        fields |= {"classes": logits.shape[-1], "dtype": DTYPES[logits.dtype]}
        names = ("ignore_index", "label_smoothing", "reduction")
        return fields | dict(zip(names, options, strict=True))

    def forward(self, logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        call = Call(self.library)
        logits, target = call.input(logits, "logits"), call.input(target, "target")
        shape = target.shape if options[2] == 2 else ()
        loss = call.memory.output(shape, logits.dtype, "loss")
        statistics = call.floats((target.numel(), 2), "statistics")
        fields = self.fields(logits, target, options)
        fields |= {"loss": loss, "statistics": statistics}
        call.run("cross_entropy_forward", "CrossEntropyForward", scratch=True, **fields)
        return loss.clone(), statistics.clone()

    def backward(
        self, dloss: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, *options: Any
    ) -> Tensor:
        call = Call(self.library)
        logits, target = call.input(logits, "logits"), call.input(target, "target")
        dlogits = call.like(logits, "dlogits")
        fields = self.fields(logits, target, options)
        fields |= {"dloss": call.input(dloss, "dloss"), "dlogits": dlogits}
        fields["statistics"] = call.input(statistics, "statistics")
        call.run("cross_entropy_backward", "CrossEntropyBackward", scratch=True, **fields)
        return dlogits.clone()


class Rope:
    def __init__(self, library: Library, name: str) -> None:
        self.library = library

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
        call = Call(self.library)
        x = x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
        x = call.input(x, "x", contiguous=False)
        cos, sin = call.input(cos, "cos"), call.input(sin, "sin")
        y = call.like(x, "y")
        batch, heads, rows, width = x.shape
        half = cos.shape[-1]
        fields = {"B": batch, "H": heads, "T": rows, "D": width, "half": half}
        fields |= {"x_strides": x.stride()[:3], "dtype": DTYPES[x.dtype]}
        fields |= {"angle_dtype": DTYPES[cos.dtype], "interleaved": interleaved, "back": back}
        fields["angle_batch_stride"] = rows * half if cos.ndim == 3 else 0
        call.run("rope", "Rope", x=x, cos=cos, sin=sin, y=y, **fields)
        return y.clone()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return self.turn(x, cos, sin, interleaved, False)

    def backward(self, dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return self.turn(dy, cos, sin, interleaved, True)


class SwiGLU:
    def __init__(self, library: Library, name: str) -> None:
        self.library = library

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        call = Call(self.library)
        gate, up, strides = self.inputs(call, gate, up)
        y = call.like(gate, "y")
        fields = rows_of(gate.reshape(-1, gate.shape[-1]) if gate.ndim else gate.reshape(1, 1))
        call.run("swiglu_forward", "GatedForward", gate=gate, up=up, y=y, **fields, **strides)
        return y.clone()

    def backward(self, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        call = Call(self.library)
        gate, up, strides = self.inputs(call, gate, up)
        tensors = {"dy": call.input(dy, "dy"), "gate": gate, "up": up}
        tensors |= {"dgate": call.like(gate, "dgate"), "dup": call.like(gate, "dup")}
        fields = rows_of(gate if gate.ndim else gate.reshape(1, 1))
        call.run("swiglu_backward", "GatedBackward", **tensors, **fields, **strides)
        return tensors["dgate"].clone(), tensors["dup"].clone()

    @staticmethod
    def inputs(call: Call, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
        """Two axes with one row stride stay as they are, all else is made contiguous."""
        found, strides = [], {}
        for name, tensor in (("gate", gate), ("up", up)):
            stays = tensor.ndim == 2 and tensor.stride(1) == 1
            placed = call.input(tensor, name, contiguous=not stays)
            found.append(placed)
            width = tensor.shape[-1] if tensor.ndim else 1
            strides[f"{name}_stride"] = placed.stride(0) if stays else width
        return found[0], found[1], strides


class Attention:
    def __init__(self, library: Library, name: str) -> None:
        self.library = library

    @staticmethod
    def problem(call: Call, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> dict[str, Any]:
        names = ("scale", "causal", "q_offset", "mask", "kv_lengths", "q_offsets", "sinks")
        names = (*names, "alibi_slopes", "seed", "window_left", "window_right", "softcap")
        given = dict(zip(names, options, strict=False))
        batch, heads, rows, width = q.shape
        fields: dict[str, Any] = {"B": batch, "H": heads, "T": rows, "D": width}
        fields |= {"G": k.shape[1], "S": k.shape[2], "Dv": v.shape[3], "dtype": DTYPES[q.dtype]}
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            fields[name], fields[f"{name}_strides"] = heads_of(call, tensor, name)
        for name in ("kv_lengths", "q_offsets"):
            fields[name] = pointer(call.input(given.get(name), name))
        offset = given.get("q_offset")
        fields["q_offset"] = -(2**63) if offset is None else offset
        fields |= {"scale": given["scale"], "causal": given["causal"]}
        fields |= {"softcap": given.get("softcap", 0.0)}
        fields |= {name: given.get(name, -1) for name in ("window_left", "window_right")}
        return fields

    @staticmethod
    def fresh(call: Call, heads: int, like: Tensor, name: str) -> Tensor:
        """(B, heads, positions, width), in memory (B, positions, heads, width)."""
        batch, _, rows, width = like.shape
        return call.memory.output((batch, rows, heads, width), like.dtype, name).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        call = Call(self.library)
        out, lse = self.fresh(call, q.shape[1], q, "out"), call.floats(q.shape[:3], "lse")
        fields = {"problem": self.problem(call, q, k, v, *options)}
        fields |= {"out": out, "out_strides": out.stride()[:3], "lse": lse}
        call.run("attention_forward", "AttentionForward", scratch=True, **fields)
        return out.clone(), lse.clone()

    def backward(
        self,
        dy: Tensor,
        dlse: Tensor | None,
        y: Tensor,
        lse: Tensor,
        need_dmask: bool,
        need_dslopes: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        call = Call(self.library)
        fields: dict[str, Any] = {"problem": self.problem(call, q, k, v, *options)}
        fields |= {"lse": call.input(lse, "lse"), "dlse": call.input(dlse, "dlse")}
        for name, tensor in (("out", y), ("dout", dy)):
            fields[name], fields[f"{name}_strides"] = heads_of(call, tensor, name)
        outputs = []
        for name, tensor in (("dq", q), ("dk", k), ("dv", v)):
            output = self.fresh(call, tensor.shape[1], tensor, name)
            outputs.append(output)
            fields |= {name: output, f"{name}_strides": output.stride()[:3]}
        call.run("attention_backward", "AttentionBackward", scratch=True, **fields)
        nothing = [q.new_empty(0, dtype=torch.float32)] * 3
        return (*(output.clone() for output in outputs), *nothing)


def heads_of(call: Call, tensor: Tensor, name: str) -> tuple[int | None, tuple[int, ...]]:
    """Pointer and strides of (B, heads, positions, width), copied where rows are not aligned."""
    aligned = tensor.stride(3) == 1 and all(stride % 8 == 0 for stride in tensor.stride()[:3])
    placed = call.input(tensor, name, contiguous=not aligned)
    return pointer(placed), placed.stride()[:3]


@dataclass(frozen=True)
class Binding:
    """What runs an op's raw calls, and the contract's wrapper that makes a candidate of them."""

    make: Callable[[Library, str], Any]
    wrapper: str = ""
    module: str = ""
    sources: tuple[str, ...] = ()


BINDINGS = {
    "rms_norm": Binding(Norm),
    "layer_norm": Binding(Norm),
    "add_rms_norm": Binding(Norm),
    "add_layer_norm": Binding(Norm),
    "softmax": Binding(Softmax, "last_axis"),
    "cross_entropy": Binding(CrossEntropy, "with_options"),
    "rope": Binding(Rope),
    "swiglu": Binding(SwiGLU),
    "attention": Binding(
        Attention,
        "with_contract_arguments",
        "attention_native",
        ("attention", "attention_sm90", "attention_backward"),
    ),
}


def sources_of(name: str) -> tuple[str, ...]:
    """The files of csrc/cuda that hold the op's kernels."""
    return BINDINGS[name].sources or (name,)


def library_of(name: str, *edits: nvcc.Edit, capability: int = 80) -> Library:
    """The op's launchers, of sources as they are or edited."""
    return Library(sources_of(name), edits, capability)


def candidate(library: Library, name: str) -> Candidate:
    """The op's CUDA candidate, run by the simulator; it refuses what the real one refuses, but for
    the device."""
    binding = BINDINGS[name]
    contract = sys.modules[f"llmcore.ops.{binding.module or name}"]
    raw = binding.make(library, name)

    def into(*args: Any) -> None:
        *inputs, out = args
        out.copy_(raw.forward(*inputs))

    found = Candidate("cuda", raw.forward, raw.backward, into, refuses=contract.refuses_cuda)
    return getattr(contract, binding.wrapper)(found) if binding.wrapper else found


@contextmanager
def installed(library: Library, name: str) -> Iterator[None]:
    """The simulated candidate in the place of the op's own."""
    op = REGISTRY[name]
    before = op.candidates
    simulated = candidate(library, name)
    op.candidates = tuple(simulated if c.backend == "cuda" else c for c in before)
    op.chosen.clear()
    try:
        yield
    finally:
        op.candidates = before
        op.chosen.clear()
