"""A model with packed weights: the same model, its matrices in bfloat16, int8 or int4.

For inference: packed weights take no gradient and are no parameters. Activations stay in the
dtype of what is not packed (norms, biases), the stream of float32 in float32; only what a packed
weight is multiplied by is rounded, as `ops.linear` says.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from llmcore.models.layers import Packable
from llmcore.ops.packed_weight import GROUPS, PackedWeight, pack

FORMATS = ("bf16", "int8", "int4")


def pack_weights(
    model: nn.Module, format: str, given: Mapping[str, PackedWeight] | None = None
) -> dict[str, float]:
    """Put packed weights in the place of a model's matrices, in FORMATS; what each lost by it.

    int8 has groups of 32 with a scale each; int4 has a minimum too, but for the embedding and the
    head, which are int8: their errors reach the logits undiluted. The result names the modules,
    each with its `PackedWeight.error`.

    given  weights packed already, by module's name ("blocks.0.attention.qkv"), used as they are

    ValueError for another format, a model that is packed already, or a width without a group.
    """
    check_format(format)
    given = given or {}
    packed = {  # all of them first: a model that one can't be packed of stays as it is
        name: given.get(name)
        or packed_matrix(
            name,
            module.parameter.detach(),
            format,
            ends=name.rpartition(".")[2] in ("embedding", "head"),
        )
        for name, module in _matrices(model)
    }
    for name, module in _matrices(model):
        module.pack(packed[name])
    return {name: weight.error for name, weight in packed.items()}


def check_format(format: str | None) -> None:
    """ValueError for what `load` doesn't take as weights."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"weights: got {format!r}, expected None, {', '.join(FORMATS)}")


def check_not_packed(model: nn.Module) -> None:
    """ValueError for a model whose weights are not whole any more."""
    for _, module in _matrices(model):
        _ = module.parameter


def _matrices(model: nn.Module) -> Iterator[tuple[str, Packable]]:
    for name, module in model.named_modules():
        if isinstance(module, Packable):
            yield name, module


def packed_matrix(name: str, weight: Tensor, format: str, *, ends: bool) -> PackedWeight:
    """A model's matrix (N, K) in one of FORMATS, as `pack_weights` says.

    ends  whether it is the embedding or the head
    ValueError, with its name, for a width without a group.
    """
    if format == "bf16":
        return pack(weight, format)
    group = next((g for g in (32, 16) if weight.shape[1] % g == 0), None)
    if group is None:
        raise ValueError(
            f"weights={format!r}: {name} has rows of {weight.shape[1]}, a multiple of "
            f"{GROUPS[0]} is needed"
        )
    if format == "int4" and not ends:
        return pack(weight, "int4", group, asymmetric=True)
    return pack(weight, "int8", group)
