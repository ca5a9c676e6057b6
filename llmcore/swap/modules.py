"""The table of a module's structures: norms, activations, linears, gated networks and losses.

A `recognise` looks at what a module holds (its parameters' shapes, its children, the arguments of
its forward) and then asks it: the module's result on a small seeded input must be that of one of
the formulas. Names of classes and of attributes don't count, but for where an epsilon is kept.
"""

from __future__ import annotations

from llmcore.swap.activations import Gelu, gelu
from llmcore.swap.added_norm import AddedNorm, added_inputs, added_norm
from llmcore.swap.cross_entropy import CrossEntropy, cross_entropy, loss_inputs
from llmcore.swap.gated_mlp import GatedMLP, gated_inputs, gated_mlp
from llmcore.swap.linears import Linear, linear, linear_inputs
from llmcore.swap.norms import LayerNorm, RMSNorm, layer_norm, rms_norm, rows_of
from llmcore.swap.structure import Structure, draw

STRUCTURES = (
    Structure("rms_norm", RMSNorm, rms_norm, rows_of),
    Structure("layer_norm", LayerNorm, layer_norm, rows_of),
    Structure("gelu", Gelu, gelu, lambda module: (draw(3, 64),)),
    Structure("linear", Linear, linear, linear_inputs, gradients=False),
    Structure("gated_mlp", GatedMLP, gated_mlp, gated_inputs),
    Structure("add_layer_norm", AddedNorm, added_norm, added_inputs),
    Structure("cross_entropy", CrossEntropy, cross_entropy, loss_inputs),
)
"""The table, best first; a module gets the first that fits, after its children got theirs."""
