"""The native pass of a shared decoder over another library's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcore import native
from llmcore.models.plan import Plan, address
from llmcore.models.transformer import Decoder
from llmcore.swap.decoder_cache import Held
from llmcore.swap.decoder_parts import Unfit, angles, has_window_angles


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

    def __init__(
        self, decoder: Decoder, backend: str, rotary: nn.Module | None, windows: Sequence[int]
    ) -> None:
        """rotary: the model's angles, None: its positions are learned; windows: of each layer."""
        assert decoder.head is not None
        self.rotary, self.windows = rotary, tuple(windows)
        self.vocabulary = decoder.head.weight.shape[0]
        kinds = getattr(rotary, "rope_type", "default")
        if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            raise Unfit("its angles depend on the length of the text")
        self._turns: dict[bool, tuple[Tensor, Tensor]] = {}
        super().__init__(decoder, backend)

    @property
    def longest(self) -> int:
        """The text that there are positions for."""
        return self.model.config.context_length

    def _window_of(self, number: int) -> tuple[int, bool]:
        window = self.windows[number]
        return window, window > 0 and has_window_angles(self.rotary)

    def angles_to(self, end: int, *, of_windows: bool = False) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 (positions, D / 2), of at least the positions below `end`."""
        if self.rotary is None:
            return torch.empty(0), torch.empty(0)
        if of_windows not in self._turns or len(self._turns[of_windows][0]) < end:
            positions = torch.arange(max(2 * end, 256))[None]
            half = self.model.config.head_width // 2
            cos, sin = angles(self.rotary, positions, of_windows=of_windows)
            self._turns[of_windows] = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return self._turns[of_windows]

    def run(
        self, ids: Tensor, logits: Tensor, buffers: Held, slots: Slots, last: Tensor | None
    ) -> None:
        """Fill the logits of these tokens, and the buffers with their keys and values."""
        cos, sin = self.angles_to(slots.end)
        window_cos, window_sin = self.angles_to(slots.end, of_windows=True)
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
            window_cos=window_cos.data_ptr(),
            window_sin=window_sin.data_ptr(),
            buffers=[*addresses, [], []],
            kv_dtype=native.module.KvDtype.same,  # type: ignore[union-attr]
            cache_strides=strides,
            scale_strides=(0, 0, 0),
            page_table=address(slots.table),
            page_columns=0 if slots.table is None else 1,
            page_length=0 if slots.table is None else buffers.capacity,
        )
