"""llmcore: fused transformer kernels for CPU and GPU, verified against plain PyTorch."""

from llmcore import ops
from llmcore.dispatch import backends, explain, use
from llmcore.ops.linear import PackedWeight, pack
from llmcore.verify import verify

__version__ = "0.1.0"
__all__ = ["PackedWeight", "backends", "explain", "ops", "pack", "use", "verify"]
