"""The parts of generation: how tokens are chosen, when a sequence ends, and the loop of passes.

`llmcore.generate` is the front that puts them together.
"""

from llmcore.generation.prefix import PrefixCache
from llmcore.generation.speculative import DraftModel, LayerSkipDraft, LookupDraft

__all__ = ["DraftModel", "LayerSkipDraft", "LookupDraft", "PrefixCache"]
