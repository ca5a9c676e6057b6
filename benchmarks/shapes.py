"""The shapes that are timed, each of a real model by name."""

from __future__ import annotations

from dataclasses import dataclass

FORWARD, INTO, BACKWARD, BOTH = "forward", "forward out=", "backward", "forward+backward"
"""What is timed: the forward pass into a fresh result or a given one, the backward pass alone, or
both passes of a loss (some make its gradients in the forward pass)."""

MODES = (FORWARD, INTO, BACKWARD)


@dataclass(frozen=True)
class Rows:
    """A row-wise op's input (N, C).

    `sets` of data are used in turn, so that the caches are cold where one would fit into them;
    `quick` shapes stand for the rest in a quick run.
    """

    model: str
    N: int
    C: int
    sets: int = 1
    quick: bool = False
    modes: tuple[str, ...] = MODES

    @property
    def label(self) -> str:
        return f"{self.N}x{self.C}" + (" cold" if self.sets > 1 else "")


@dataclass(frozen=True)
class Heads:
    """Attention's q (B, H, T, D), k and v (B, G, S, D); `sets` and `quick` as in Rows."""

    model: str
    B: int
    H: int
    G: int
    T: int
    S: int
    D: int
    causal: bool = False
    sets: int = 1
    quick: bool = False
    modes: tuple[str, ...] = (FORWARD, BACKWARD)

    @property
    def label(self) -> str:
        """B x H/G x T:S x D; G where it is not H, S where it is not T."""
        heads = f"{self.H}" if self.H == self.G else f"{self.H}/{self.G}"
        length = f"{self.T}" if self.T == self.S else f"{self.T}:{self.S}"
        marks = (" causal" if self.causal else "") + (" cold" if self.sets > 1 else "")
        return f"{self.B}x{heads}x{length}x{self.D}{marks}"

    @property
    def pairs(self) -> int:
        """The (query, key) pairs that attend; the queries are the last T positions."""
        if not self.causal:
            return self.B * self.H * self.T * self.S
        first = self.S - self.T + 1
        return self.B * self.H * sum(max(first + i, 0) for i in range(self.T))


@dataclass(frozen=True)
class Product:
    """linear's x (M, K) and weight (N, K); `sets` and `quick` as in Rows.

    `packed` is the format of a PackedWeight; without it the weight is a tensor.
    """

    model: str
    M: int
    K: int
    N: int
    packed: str = ""
    sets: int = 1
    quick: bool = False
    modes: tuple[str, ...] = (FORWARD, BACKWARD)

    @property
    def label(self) -> str:
        marks = (f" {self.packed}" if self.packed else "") + (" cold" if self.sets > 1 else "")
        return f"{self.M}x{self.K}x{self.N}{marks}"


Shape = Rows | Heads | Product

NORM = (
    Rows("GPT-2 small, 4 sequences of 1024", 4096, 768, quick=True),
    Rows("GPT-2 small, 4 sequences of 1024, 12 layers", 4096, 768, sets=12),
    Rows("BERT base, 8 sequences of 128", 1024, 768),
    Rows("Llama 3.2 1B, 4 sequences of 2048", 8192, 2048),
    Rows("SmolLM2-135M, prefill of 512", 512, 576),
    Rows("SmolLM2-135M, one token", 1, 576, modes=(FORWARD,)),
)
SOFTMAX = (
    Rows("GPT-2 small, 4 sequences of 1024", 4096, 768, quick=True),
    Rows("GPT-2 small, the scores of 12 heads", 12288, 1024),
    Rows("BERT base, the scores of 8 x 12 heads", 12288, 128),
    Rows("SmolLM2-135M, the logits of 128 tokens", 128, 49152),
    Rows("SmolLM2-135M, the logits of one token", 1, 49152, modes=(FORWARD,)),
)
GATED = (
    Rows("SmolLM2-135M, prefill of 512", 512, 1536, quick=True),
    Rows("Llama 3.2 1B, prefill of 512", 512, 8192),
    Rows("Llama 3.2 1B, prefill of 512, 4 layers", 512, 8192, sets=4),
    Rows("SmolLM2-135M, one token", 1, 1536, modes=(FORWARD,)),
)
GELU = (
    Rows("GPT-2 small, 1 sequence of 1024", 1024, 3072, quick=True),
    Rows("GPT-2 small, 1 sequence of 1024, 6 layers", 1024, 3072, sets=6),
    Rows("GPT-2 small, one token", 1, 3072, modes=(FORWARD,)),
)
ROPE = (
    Heads("SmolLM2-135M, prefill of 512", 1, 9, 9, 512, 512, 64, quick=True, modes=MODES),
    Heads("Llama 3.2 1B, 2048 tokens", 1, 32, 32, 2048, 2048, 64, modes=MODES),
    Heads("Qwen3 0.6B, 1024 tokens", 1, 16, 16, 1024, 1024, 128, modes=MODES),
    Heads("SmolLM2-135M, one token", 1, 9, 9, 1, 1, 64, modes=(FORWARD,)),
)
SCORES = (
    Rows("GPT-2 small, the scores of 12 heads", 12288, 1024, quick=True),
    Rows("BERT base, the scores of 8 x 12 heads", 12288, 128),
)
LOSS = (
    Rows("GPT-2 small, 2 sequences of 1024", 2048, 50257, modes=(FORWARD, BACKWARD)),
    Rows("SmolLM2-135M, 128 tokens", 128, 49152, quick=True, modes=(FORWARD, BACKWARD)),
)
ATTENTION = (
    Heads("GPT-2 small, not causal", 1, 12, 12, 1024, 1024, 64, quick=True),
    Heads("GPT-2 small", 1, 12, 12, 1024, 1024, 64, causal=True, quick=True),
    Heads("GPT-2 small, long", 1, 12, 12, 2048, 2048, 64, causal=True),
    Heads("Qwen3 0.6B, not causal", 1, 16, 8, 1024, 1024, 128),
    Heads("Qwen3 0.6B", 1, 16, 8, 1024, 1024, 128, causal=True),
    Heads("BERT base, 8 sequences of 128", 8, 12, 12, 128, 128, 64, quick=True),
    Heads("SmolLM2-135M, prefill of 512", 1, 9, 3, 512, 512, 64, causal=True),
    Heads("SmolLM2-135M, decode", 1, 9, 3, 1, 2048, 64, quick=True, modes=(FORWARD,)),
    Heads("SmolLM2-135M, decode, 30 layers", 1, 9, 3, 1, 2048, 64, sets=30, modes=(FORWARD,)),
    Heads("SmolLM2-135M, decode of 8 sequences", 8, 9, 3, 1, 2048, 64, modes=(FORWARD,)),
)
VARLEN = (
    Heads("BERT base, 8 sequences of 128", 8, 12, 12, 128, 128, 64, quick=True),
    Heads("GPT-2 small, 4 sequences of 512", 4, 12, 12, 512, 512, 64, causal=True),
)
PAGED = (
    Heads("SmolLM2-135M, decode", 1, 9, 3, 1, 2048, 64, quick=True, modes=(FORWARD,)),
    Heads("SmolLM2-135M, decode of 8 sequences", 8, 9, 3, 1, 2048, 64, modes=(FORWARD,)),
    Heads("SmolLM2-135M, prefill of 512", 1, 9, 3, 512, 512, 64, causal=True, modes=(FORWARD,)),
)
LINEAR = (
    Product("SmolLM2-135M, prefill of 512, gate and up", 512, 576, 3072, quick=True),
    Product("SmolLM2-135M, prefill of 512, down", 512, 1536, 576),
    Product("GPT-2 small, 4 sequences of 512", 2048, 768, 3072),
    *(
        Product("GPT-2 small, 4 sequences of 512", 2048, 768, 3072, packed, modes=(FORWARD,))
        for packed in ("fp32", "bf16")
    ),
    # So many weights that the caches hold none of them.
    *(
        Product(f"8B, decode of {rows}", rows, 4096, 4096, packed, sets, quick, modes=(FORWARD,))
        for rows, quick in ((1, True), (8, False))
        for packed, sets in (("", 4), ("int8", 8), ("int4", 16))
    ),
)
LINEAR_LOSS = (
    Product("GPT-2 small, 2 sequences of 1024", 2048, 768, 50257, modes=(FORWARD, BOTH)),
    Product("SmolLM2-135M, 128 tokens", 128, 576, 49152, quick=True, modes=(FORWARD, BOTH)),
)

TINY_ROWS = Rows("tiny", 4, 64)
TINY_LOSS = Rows("tiny", 4, 64, modes=(FORWARD, BACKWARD))
TINY_HEADS = Heads("tiny", 1, 2, 2, 4, 4, 16)
"""For the cost of a call."""
TINY_PRODUCT = Product("tiny", 4, 64, 64)
TINY_LINEAR_LOSS = Product("tiny", 4, 16, 64, modes=(FORWARD, BOTH))
