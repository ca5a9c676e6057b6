"""What `llmcore.accelerate` is made of: changing one instance, the table of structures, the report.

instance   an object becomes a subclass of its own class, and goes back
structure  what a row of the table is, and how a swap is held against what it replaces
modules    norms, activations, linears, gated networks, losses
torch_modules  torch's own attention and transformer layers
packing    packed weights with the originals in a file
attention  attention and rotary positions inside transformers' models
decoder    a whole pass over transformers' cache as one native call
loss       a head and its cross entropy in one
"""
