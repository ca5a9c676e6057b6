"""llmcore's ops: functions with torch's meaning, each on the best kernel this machine has."""

from llmcore.ops.add_layer_norm import add_layer_norm
from llmcore.ops.add_rms_norm import add_rms_norm
from llmcore.ops.attention import attention
from llmcore.ops.attention_varlen import attention_varlen
from llmcore.ops.cross_entropy import cross_entropy
from llmcore.ops.geglu import geglu
from llmcore.ops.gelu import gelu
from llmcore.ops.layer_norm import layer_norm
from llmcore.ops.linear import linear
from llmcore.ops.linear_cross_entropy import linear_cross_entropy
from llmcore.ops.masked_softmax import masked_softmax
from llmcore.ops.paged_attention import paged_attention
from llmcore.ops.rms_norm import rms_norm
from llmcore.ops.rope import rope
from llmcore.ops.scaled_dot_product_attention import scaled_dot_product_attention
from llmcore.ops.softmax import softmax
from llmcore.ops.swiglu import swiglu

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "cross_entropy",
    "geglu",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "masked_softmax",
    "paged_attention",
    "rms_norm",
    "rope",
    "scaled_dot_product_attention",
    "softmax",
    "swiglu",
]
