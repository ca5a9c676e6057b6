"""Training: the loop, its recipe, checkpoints and metrics; objectives and pre-training."""

from llmcore.train.loop import Interrupted, Trainer, Validation
from llmcore.train.objectives import CausalLM
from llmcore.train.processes import Processes
from llmcore.train.recipe import Recipe

__all__ = ["CausalLM", "Interrupted", "Processes", "Recipe", "Trainer", "Validation"]
