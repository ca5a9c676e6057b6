"""The native pass of a shared decoder over another library's cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcore import native
from llmcore.models.plan import Plan
from llmcore.models.transformer import Decoder
from llmcore.swap.decoder_cache import Held
from llmcore.swap.decoder_parts import Unfit


@dataclass(frozen=True)
class Slots:
    """Where a pass's tokens go: from `start` to `end`, or each sequence behind its padding.

    starts, lengths  (B,): the slot of a sequence's first new token, and its tokens with them
    table            (B, 1): where its slots begin, in vectors of D
    """

    start: int
    end: int
    starts: Tensor | None = None
    lengths: Tensor | None = None
    table: Tensor | None = None


class SharedPlan(Plan):
    """The native pass of a shared decoder; its angles are the model's."""

    def __init__(self, decoder: Decoder, backend: str, rotary: nn.Module, scale: float) -> None:
        default = decoder.config.head_width**-0.5
        if abs(scale - default) > 1e-6 * default:
            raise Unfit("its scores are scaled in a way of its own")
        self.rotary = rotary
        assert decoder.head is not None
        self.vocabulary = decoder.head.weight.shape[0]
        if getattr(rotary, "rope_type", "default") in ("dynamic", "longrope"):
            raise Unfit("its angles depend on the length of the text")
        super().__init__(decoder, backend)

    def angles_to(self, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 (positions, D / 2), of at least the positions below `end`."""
        if len(self._angles[0]) < end:
            like = torch.empty(1, 1, 1, dtype=torch.float32)
            positions = torch.arange(max(2 * end, 256))[None]
            half = self.model.config.head_width // 2
            cos, sin = self.rotary(like, positions)
            self._angles = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return self._angles

    def run(
        self, ids: Tensor, logits: Tensor, buffers: Held, slots: Slots, last: Tensor | None
    ) -> None:
        """Fill the logits of these tokens, and the buffers with their keys and values."""
        cos, sin = self.angles_to(slots.end)
        strides = buffers.keys[0].stride()[:3]
        if slots.table is not None:
            strides = (self.model.config.head_width, *strides[1:])
        addresses = [[t.data_ptr() for t in tensors] for tensors in (buffers.keys, buffers.values)]
        self._native.forward(
            ids=ids.data_ptr(),
            logits=logits.data_ptr(),
            batch=ids.shape[0],
            tokens=ids.shape[1],
            start=slots.start if slots.starts is None else 0,
            end=slots.end,
            starts=address(slots.starts),
            positions=0,
            kv_lengths=address(slots.lengths),
            last=address(last),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            buffers=[*addresses, [], []],
            kv_dtype=native.module.KvDtype.same,  # type: ignore[union-attr]
            cache_strides=strides,
            scale_strides=(0, 0, 0),
            page_table=address(slots.table),
            page_columns=0 if slots.table is None else 1,
            page_length=0 if slots.table is None else buffers.capacity,
        )


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
