"""The native pass of a shared decoder over another library's cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from llmcore import native
from llmcore.models.plan import Plan, Slots
from llmcore.models.transformer import Decoder
from llmcore.swap.decoder_cache import Held
from llmcore.swap.decoder_parts import angles, has_window_angles
from llmcore.swap.decoder_trace import Unfit


class SharedPlan(Plan):
    """The native pass of a shared decoder; its angles are the model's."""

    def __init__(
        self,
        decoder: Decoder,
        backend: str,
        rotary: nn.Module | None,
        windows: Sequence[int],
        *,
        interleaved_heads: bool,
    ) -> None:
        """rotary: the model's angles, None: its positions are learned; windows: of each layer."""
        assert decoder.head is not None
        self.rotary, self.windows = rotary, tuple(windows)
        self.interleaved_heads = interleaved_heads
        self.vocabulary = decoder.head.weight.shape[0]
        kinds = getattr(rotary, "rope_type", "default")
        if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            raise Unfit("its angles depend on the length of the text")
        super().__init__(decoder, backend)

    @property
    def longest(self) -> int:
        """The text that there are positions for."""
        return self.model.config.context_length

    def _window_of(self, number: int) -> int:
        return self.windows[number]

    @property
    def _has_window_angles(self) -> bool:
        return has_window_angles(self.rotary)

    def _rotations(self, positions: Tensor, of_windows: bool) -> tuple[Tensor, Tensor]:
        assert self.rotary is not None
        found = angles(self.rotary, positions[None], of_windows=of_windows)
        cos, sin = (x[0, :, : x.shape[-1] // 2].contiguous() for x in found)
        return cos, sin

    def run(
        self, ids: Tensor, logits: Tensor, buffers: Held, slots: Slots, last: Tensor | None
    ) -> None:
        """Fill the logits of these tokens, and the buffers with their keys and values.

        A page of the slots' table is a vector of D: a sequence may begin at any.
        """
        assert native.module is not None
        strides = buffers.keys[0].stride()[:3]
        if slots.table is not None:
            strides = (self.model.config.head_width, *strides[1:])
        addresses = [[t.data_ptr() for t in tensors] for tensors in (buffers.keys, buffers.values)]
        self._forward(
            ids,
            logits,
            slots,
            last,
            slots.end,
            buffers=[*addresses, [], []],
            kv_dtype=native.module.KvDtype.same,
            cache_strides=strides,
            scale_strides=(0, 0, 0),
        )
