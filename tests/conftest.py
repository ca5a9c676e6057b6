"""What several test files need: small models with random weights, a small tokenizer, SmolLM2.

The hooks of every run (native kernels must have loaded, the table of candidates at the end) stand
in run_report.py, the builds that go on beside the tests in built_ahead.py.
"""

import os
from functools import partial

# Before llmcore is imported, which asks it once: Triton's kernels run in its interpreter here.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from built_ahead import package, pytest_collection_finish, sanitized_program  # noqa: F401
from run_report import (  # noqa: F401  (pytest finds hooks and fixtures by name here)
    backend,
    nothing_left_behind,
    one_thread,
    pytest_sessionstart,
    pytest_terminal_summary,
)

from llmcore.dispatch import REGISTRY
from llmcore.models import Decoder, Encoder, TransformerConfig, load, minilm, smollm2
from llmcore.text import Tokenizer, WordPieces
from llmcore.text.tokenizer import _byte_alphabet

TINY = {
    "vocab_size": 300,
    "width": 32,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 8,
    "feed_forward": 48,
    "context_length": 64,
    "eos_ids": (1,),
}
GPT2_SHAPE = {
    "kv_heads": 4,
    "norm": "layer_norm",
    "activation": "gelu_tanh",
    "positions": "learned",
    "bias": True,
}


@pytest.fixture
def tiny_model():
    """make(kind=Decoder, seed=0, std=0.3, **changes) -> a model of the class `kind`, with weights
    large enough to tell errors by."""

    def make(kind=Decoder, seed: int = 0, std: float = 0.3, **changes):
        model = kind(TransformerConfig(**{**TINY, **changes})).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=std, generator=generator)
                if parameter.ndim == 1:
                    parameter.add_(1.0)
        return model

    # One thread is the faster for so small a model, by far where another process has a core.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_decoder(tiny_model):
    """make(seed=0, **changes) -> a Decoder, as tiny_model makes it."""
    return partial(tiny_model, Decoder)


@pytest.fixture
def native_kernels():
    """Bits are promised by the kernels: the definitions' sums depend on the shapes."""
    for op in ("attention", "paged_attention", "linear"):
        candidate = REGISTRY[op].candidate("cpu")
        why = REGISTRY[op].why_absent("cpu") if candidate is None else candidate.machine
        if why:
            pytest.skip(why)


@pytest.fixture
def gpt2_shape() -> dict:
    return dict(GPT2_SHAPE)


@pytest.fixture
def tiny_tokenizer() -> Tokenizer:
    """Every byte, a few merges, two special tokens: 266 tokens."""
    merges = ["t h", "th e", "Ġ the", "Ġ a", "a n", "1 2", "Ġ Ġ", "h i"]
    special = ["<|end|>", "<|turn|>"]
    tokens = [*special, *_byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    template = (
        "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    return Tokenizer.from_bpe(
        tokens, merges, special, eos="<|end|>", pad="<|end|>", chat_template=template
    )


@pytest.fixture(scope="session")
def smollm2_files() -> str:
    """The path of SmolLM2's .gguf, where it can be had without a network."""
    try:
        return str(smollm2.obtain(download=False))
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def minilm_pair() -> tuple[Encoder, WordPieces]:
    """MiniLM and its tokenizer, shared: not to be changed."""
    try:
        minilm.obtain(download=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return load("minilm")


@pytest.fixture(scope="session")
def smollm2_pair(smollm2_files) -> tuple[Decoder, Tokenizer]:
    """SmolLM2 and its tokenizer, shared: not to be changed."""
    return load(smollm2_files)
