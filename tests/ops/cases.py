"""Tiny calls of every op, for tests whose cost grows with the number of elements."""

from __future__ import annotations

import torch

from llmcore.ops.sample import Draw, Sample


def tiny() -> dict[str, list[Sample]]:
    """A few calls of each op, every tensor of at most a few dozen elements."""
    draw = Draw(3)
    n = draw.normal
    q, k, v = n(1, 2, 3, 4), n(1, 1, 4, 4), n(1, 1, 4, 3)
    ends = torch.tensor([0, 2, 3])
    pages = (n(1, 2, 2, 4), n(3, 1, 2, 4), n(3, 1, 2, 3), torch.tensor([[2, 0]]), torch.tensor([3]))
    seen = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    angle = n(3, 2)
    loss = {"label_smoothing": 0.2, "ignore_index": 1}
    target = torch.tensor([2, 1, 0])
    attention = [
        Sample("causal", (q, k, v), {"causal": True, "return_lse": True}),
        Sample("window", (q, k, v), {"window": (1, 1), "softcap": 2.0, "sinks": n(2)}),
        Sample("mask", (q, k, v), {"mask": n(3, 4), "alibi_slopes": n(2), "return_lse": True}),
        Sample("empty_row", (q, k, v), {"mask": seen, "kv_lengths": torch.tensor([3])}),
        Sample("dropout", (q, k, v), {"dropout_p": 0.4}),
    ]
    return {
        "layer_norm": [Sample("all", (n(3, 5), n(5), n(5), 1e-3))],
        "add_layer_norm": [Sample("all", (n(3, 5), n(3, 5), n(5), n(5), 1e-3))],
        "rms_norm": [Sample("all", (n(3, 5), n(5), 1e-3))],
        "add_rms_norm": [Sample("all", (n(3, 5), n(3, 5), n(5), 1e-3))],
        "softmax": [Sample("last", (n(3, 5),)), Sample("first", (n(3, 5), 0))],
        "masked_softmax": [
            Sample("bool", (n(3, 4),), {"mask": seen, "scale": 0.5}),
            Sample("float", (n(3, 4),), {"mask": n(4), "causal": True}),
        ],
        "cross_entropy": [
            Sample("mean", (n(3, 5), target), loss),
            Sample("none", (n(3, 5), target), {"reduction": "none"}),
        ],
        "linear_cross_entropy": [
            Sample("mean", (n(3, 4), n(5, 4), target, n(5)), loss),
            Sample("sum", (n(3, 4), n(5, 4), target), {"reduction": "sum"}),
        ],
        "rope": [
            Sample("half_split", (n(1, 2, 3, 5), angle.cos(), angle.sin())),
            Sample("interleaved", (n(1, 2, 3, 4), n(1, 3, 2), n(1, 3, 2)), {"interleaved": True}),
        ],
        "gelu": [Sample("none", (n(3, 4),)), Sample("tanh", (n(3, 4), "tanh"))],
        "swiglu": [Sample("all", (n(3, 4), n(3, 4)))],
        "geglu": [Sample("tanh", (n(3, 4), n(3, 4), "tanh"))],
        "linear": [Sample("bias", (n(3, 4), n(5, 4), n(5)))],
        "attention": attention,
        "attention_varlen": [
            Sample("causal", (n(3, 2, 4), n(3, 1, 4), n(3, 1, 3), ends, ends), {"causal": True})
        ],
        "paged_attention": [Sample("causal", pages, {"causal": True, "return_lse": True})],
    }
