"""The Triton kernels, one module for each op, imported at first use.

Their source is the top-level folder `kernels/`, which has no `__init__.py`: Hugging Face's package
of that name must stay importable from a checkout. A wheel holds them in this folder; in a checkout
this package's path is extended to them.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "csrc" / "ops.h").is_file():
    __path__.append(str(_checkout / "kernels"))
