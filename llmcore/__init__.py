"""llmcore: fused transformer kernels for CPU and GPU, verified against plain PyTorch.

`llmcore.ops` holds the ops, `llmcore.models` the thin transformer, `llmcore.text` its tokenizer.
"""

from llmcore import attention_interface, models, ops, text
from llmcore.accelerate import accelerate
from llmcore.dispatch import backends, explain, use
from llmcore.generate import best_of, generate, stream
from llmcore.ops.packed_weight import PackedWeight, pack
from llmcore.patch_sdpa import patch_sdpa
from llmcore.verify import verify

__version__ = "0.1.0"
__all__ = [
    "PackedWeight",
    "accelerate",
    "attention_interface",
    "backends",
    "best_of",
    "explain",
    "generate",
    "models",
    "ops",
    "pack",
    "patch_sdpa",
    "stream",
    "text",
    "use",
    "verify",
]

attention_interface.register_when_imported()
