"""The parts of generation: how tokens are chosen, when a sequence ends, and the loop of passes.

`llmcore.generate` is the front that puts them together.
"""
