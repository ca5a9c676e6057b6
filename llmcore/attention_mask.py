"""The mask of a Hugging Face model as attention's options: causal, window, offset, lengths.

transformers builds one mask for a forward pass and hands it to every attention layer. Here it is an
`AttentionMask`, which says in a few numbers what a (B, 1, T, S) tensor would: nothing of that size
is made unless a model's mask has a pattern that no option names (packed sequences, chunks, custom
functions), or something else than `attend` reads it.

With q_i the query and k_j the key of a forward pass, query i may attend to key j where all hold:
    j <= offset + i                                        with causal
    offset + i - left <= j <= offset + i + right           with window = (left, right)
    j < lengths_b                                          with lengths
    padding_bj                                             with padding
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmcore.ops import contract

Window = tuple[int | None, int | None]


@dataclass(eq=False)
class AttentionMask:
    """Which of S keys each of T queries may attend to, for B sequences.

    Elsewhere it behaves as the bool tensor (B, 1, T, S), True = may attend, that it stands for:
    torch's functions, indexing and a tensor's methods take that tensor, made when it is asked for.

    Attributes:
        shape: (B, 1, T, S).
        device: of the tensor that it stands for.
        causal, window: as of llmcore.ops.attention.
        offset: int or (B,) int64, the position of query 0 among the keys.
        lengths: (B,) int64, how many keys of each sequence are no padding, which is on the right.
        padding: (B, S) bool, False where a key is padding; instead of lengths.
    """

    shape: tuple[int, int, int, int]
    device: torch.device | str
    causal: bool = False
    window: Window | None = None
    offset: int | torch.Tensor = 0
    lengths: torch.Tensor | None = None
    padding: torch.Tensor | None = None

    ndim = 4
    dtype = torch.bool

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.as_bool()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle ask for
            raise AttributeError(name)
        return getattr(self.as_bool(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def plain(value: Any) -> Any:
            return value.as_bool() if isinstance(value, cls) else value

        return function(*map(plain, args), **{n: plain(v) for n, v in (kwargs or {}).items()})

    def contiguous(self) -> AttentionMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> AttentionMask | torch.Tensor:
        """As of a tensor; to another device it stays compact."""
        moved = torch.empty(0, dtype=torch.bool, device=self.device).to(*args, **kwargs)
        if moved.dtype != torch.bool:
            return self.as_bool().to(*args, **kwargs)
        if moved.device == torch.device(self.device):
            return self

        def there(value: Any) -> Any:
            return value.to(moved.device) if isinstance(value, torch.Tensor) else value

        tensors = map(there, (self.offset, self.lengths, self.padding))
        return AttentionMask(self.shape, moved.device, self.causal, self.window, *tensors)

    def as_bool(self) -> torch.Tensor:
        """The mask as a tensor (B, 1, T, S), True = may attend."""
        batch, _, rows, keys = self.shape
        offset = self.offset
        if isinstance(offset, torch.Tensor):
            offset = offset.view(-1, 1, 1, 1)
        query = torch.arange(rows, device=self.device)[:, None] + offset
        key = torch.arange(keys, device=self.device)
        seen = torch.ones(batch, 1, rows, keys, dtype=torch.bool, device=self.device)
        if self.causal:
            seen = seen & (key <= query)
        left, right = self.window or (None, None)
        if left is not None:
            seen = seen & (key >= query - left)
        if right is not None:
            seen = seen & (key <= query + right)
        if self.lengths is not None:
            seen = seen & (key < self.lengths.view(-1, 1, 1, 1))
        if self.padding is not None:
            seen = seen & self.padding[:, None, None, :]
        return seen

    def as_float(self, dtype: torch.dtype) -> torch.Tensor:
        """The mask as eager attention adds it: 0, or the dtype's least number."""
        return added(self.as_bool(), dtype)

    def options(self) -> dict[str, Any]:
        """The options of llmcore.ops.attention that say the same."""
        options: dict[str, Any] = {"causal": self.causal, "q_offset": self.offset}
        if self.window is not None:
            options["window"] = self.window
        if self.lengths is not None:
            options["kv_lengths"] = self.lengths
        if self.padding is not None:
            options["mask"] = self.padding[:, None, None, :]
        return options


def added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as eager attention adds it: 0, or the dtype's least number."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | AttentionMask | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | AttentionMask | None:
    """What transformers' AttentionMaskInterface calls for `attn_implementation="llmcore"`.

    Its arguments are those of transformers.masking_utils.sdpa_mask; attention_mask is the 2-D
    padding mask (B, positions) or an AttentionMask that was made before (by generate()).

    Returns None where every query sees every key or, with as many of both, all up to its own; an
    AttentionMask where options say what the mask does; else transformers' bool (B, 1, T, S).
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    if isinstance(attention_mask, AttentionMask):
        return attention_mask
    pattern = pattern_of(mask_function, kwargs)
    if pattern is None:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        offset: Any = q_offset
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset=offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **kwargs,
        )
    causal, window = pattern
    lengths, padding = padding_of(attention_mask, q_length, kv_length, q_offset, kv_offset)
    position = offset_of(q_offset, kv_offset, batch_size)
    window = needed(window, kv_length)
    if (window is None and lengths is None and padding is None) and (
        not causal or sees_all_its_past(position, q_length, kv_length)
    ):
        return None
    shape = (batch_size, 1, q_length, kv_length)
    return AttentionMask(shape, device, causal, window, position, lengths, padding)


def offset_of(q_offset: int | torch.Tensor, kv_offset: int, batch: int) -> int | torch.Tensor:
    """The position of query 0 among the keys: an int, or (B,) where asking would cost."""
    if not isinstance(q_offset, torch.Tensor):
        return q_offset - kv_offset
    if contract.is_known(q_offset):
        return int(q_offset) - kv_offset
    # A copy: a static cache counts on in this tensor before the first layer attends.
    return (q_offset - kv_offset).reshape(1).repeat(batch)


def sees_all_its_past(offset: int | torch.Tensor, rows: int, keys: int) -> bool:
    """Whether a causal mask at this offset is what a layer takes None for."""
    if isinstance(offset, torch.Tensor):
        return False
    return offset == keys - 1 if rows == 1 else rows == keys and offset == 0


def needed(window: Window | None, keys: int) -> Window | None:
    """The window, or None where so few keys all lie inside."""
    if window is None or all(side is None or side >= keys - 1 for side in window):
        return None
    return window


def padding_of(
    mask: torch.Tensor | None,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Lengths (B,) or a mask (B, S) for the padding in a 2-D mask; neither where there is none."""
    if mask is None:
        return None, None
    mask = mask[:, kv_offset : kv_offset + kv_length]
    here = mask.shape[1]
    if here < kv_length:
        # What the mask does not reach is what a static cache has not been filled with.
        mask = torch.nn.functional.pad(mask, (0, kv_length - here))
    if not contract.is_known(mask):
        return None, mask
    if bool(mask.all()):
        return None, None
    lengths = mask.sum(-1)
    if bool((mask == (torch.arange(kv_length) < lengths[:, None])).all()):
        return lengths, None
    return None, mask


def pattern_of(
    function: Callable[..., Any], options: dict[str, Any]
) -> tuple[bool, Window | None] | None:
    """(causal, window) of one of transformers' mask functions; None where it has another pattern.

    Its functions are closures, told by their code. What they close over cannot be read while a
    model is compiled: then transformers' own word that a mask may be left out says what it is.
    """
    from transformers import masking_utils as hugging_face

    if function is hugging_face.causal_mask_function:
        return True, None
    if function is hugging_face.bidirectional_mask_function:
        return False, None
    if not isinstance(getattr(function, "__code__", None), type(pattern_of.__code__)):
        return None
    if torch.compiler.is_compiling():
        return traced_pattern(options)
    codes = {
        hugging_face.and_masks(function).__code__: "mask_functions",
        hugging_face.sliding_window_overlay(1).__code__: "sliding_window",
        hugging_face.sliding_window_bidirectional_overlay(1).__code__: "sliding_window",
    }
    name = codes.get(function.__code__)
    if name is None:
        return None
    closed = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    value = closed[name].cell_contents
    if name == "mask_functions":
        return both([pattern_of(part, options) for part in value])
    both_sides = function.__code__ is hugging_face.sliding_window_bidirectional_overlay(1).__code__
    return False, (value, value) if both_sides else (value - 1, None)


def both(
    patterns: list[tuple[bool, Window | None] | None],
) -> tuple[bool, Window | None] | None:
    """The pattern that allows what all of these do."""
    causal, window = False, None
    for pattern in patterns:
        if pattern is None or (window is not None and pattern[1] is not None):
            return None
        causal, window = causal or pattern[0], window or pattern[1]
    return causal, window


def traced_pattern(options: dict[str, Any]) -> tuple[bool, Window | None] | None:
    """pattern_of in compilation, from what transformers says of the function.

    A window's or a chunk's size comes as local_size; only a model without chunks is sure.
    """
    size = options.get("local_size")
    config = options.get("config")
    if size is None or config is None or getattr(config, "attention_chunk_size", None) is not None:
        return None
    if options.get("allow_is_causal_skip", False):
        return True, (size - 1, None)
    if options.get("allow_is_bidirectional_skip", False):
        return False, (size, size)
    return None
