"""llmcore: fused transformer kernels for CPU and GPU, verified against plain PyTorch."""

from llmcore import ops
from llmcore.dispatch import backends, explain, use
from llmcore.verify import verify

__version__ = "0.1.0"
__all__ = ["backends", "explain", "ops", "use", "verify"]
