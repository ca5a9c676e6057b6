from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcore.models import gguf_file

gguf = pytest.importorskip("gguf")
KINDS = {"Q8_0": ("int8", 34), "Q4_0": ("int4", 18), "Q4_1": ("int4", 20)}


def random_blocks(kind: str, rows: int, width: int) -> np.ndarray:
    """Rows of any integers there can be, the scales and minimums around 1."""
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (rows, width // 32, KINDS[kind][1]), dtype=np.uint8)
    heads = draw.normal(size=(rows, width // 32, 2)).astype(np.float16)
    head_bytes = 4 if kind == "Q4_1" else 2
    blocks[..., :head_bytes] = heads.view(np.uint8)[..., :head_bytes]
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weight_of_gguf_loses_nothing(kind: str) -> None:
    data, code = random_blocks(kind, 21, 96), gguf.GGMLQuantizationType[kind]
    packed = gguf_file.packed_weight(data, code)
    assert packed.format == KINDS[kind][0] and packed.group == 32 and packed.error == 0.0
    assert packed.nbytes == 32 * data.nbytes // 21  # two whole panels
    expected = torch.from_numpy(gguf.quants.dequantize(data, code))
    assert torch.equal(packed.dequantize(), expected)


def test_packed_weight_of_another_gguf_kind() -> None:
    with pytest.raises(ValueError, match="kind: got Q6_K, expected one of Q8_0"):
        gguf_file.packed_weight(np.zeros((1, 210), np.uint8), gguf.GGMLQuantizationType.Q6_K)


def test_packed_weight_of_gguf_errors() -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    with pytest.raises(ValueError, match=r"data: got shape \(1, 35\), expected \(N, a multiple"):
        gguf_file.packed_weight(np.zeros((1, 35), np.uint8), kind)
    with pytest.raises(ValueError, match="scales: holds NaN or inf"):
        gguf_file.packed_weight(np.full((1, 34), 255, np.uint8), kind)
