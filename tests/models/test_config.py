"""A config that can't be a model is refused, by the name of what is wrong."""

import dataclasses

import pytest

from llmcore.models import TransformerConfig

SIZES = {
    "vocab_size": 10,
    "width": 8,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "head_width": 4,
    "feed_forward": 16,
    "context_length": 32,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width must be a whole number of at least 1, got 0"),
        ({"layers": 1.5}, "layers must be a whole number"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"norm_eps": 0.0}, "norm_eps must be a finite number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta must be a finite number above 0"),
        ({"norm": "batch_norm"}, "norm must be one of rms_norm, layer_norm, got 'batch_norm'"),
        ({"activation": "tanh"}, "activation must be one of swiglu, .*, got 'tanh'"),
        ({"positions": "xpos"}, "positions must be one of rope, learned, .*, got 'xpos'"),
        ({"norm_placement": "sandwich"}, "norm_placement must be one of pre, post, both"),
        ({"heads": 3, "kv_heads": 2}, "heads must be a multiple of kv_heads, got 3 and 2"),
        ({"head_width": 3}, "head_width must be even, got 3"),
        ({"rotary_width": 0}, "rotary_width must be None or 1 to head_width 4, got 0"),
        ({"rotary_width": 5}, "rotary_width must be None or 1 to head_width 4, got 5"),
        ({"rotary_width": 3}, "rotary_width must be even, got 3"),
        ({"rotary_width": 2, "positions": "alibi"}, "rotary_width needs rope, got positions alibi"),
        ({"window": 0}, "window must be None or a whole number of at least 1, got 0"),
        ({"window": True}, "window must be None or a whole number of at least 1, got True"),
        ({"eos_ids": (10,)}, "eos_ids must be token ids below vocab_size 10, got 10"),
        ({"start_id": 10}, "start_id must be None or a token id below vocab_size 10, got 10"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"attention_scale": 0.0}, "attention_scale must be a finite number above 0, got 0.0"),
        ({"experts": -1}, "experts must be a whole number of at least 0, got -1"),
        ({"experts": 1}, "experts_per_token must be at most experts, 1, got 2"),
        ({"norm": "layer_norm", "norm_offset": True}, "norm_offset belongs to rms_norm"),
        ({"full_every": 2}, "full_every needs a window, got None"),
        ({"window_rope_theta": 5.0}, "window_rope_theta needs a window, got None"),
        (
            {"window_rope_theta": 5.0, "window": 3, "positions": "alibi"},
            "window_rope_theta needs rope, got positions alibi",
        ),
        ({"positions": "sinusoidal", "width": 7}, "width must be even, got 7"),
        ({"outputs": ("classes",)}, "outputs are pooler, .*, got 'classes'"),
        ({"outputs": ("next_sentence",)}, "outputs: next_sentence needs the pooler"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**SIZES, **change})


def test_config_refuses_what_is_no_switch():
    with pytest.raises(TypeError, match="bias must be true or false, got 1"):
        TransformerConfig(**SIZES, bias=1)


def test_config_odd_head_width_without_rope():
    assert TransformerConfig(**{**SIZES, "head_width": 3}, positions="learned").head_width == 3


def test_config_is_frozen_and_hashable():
    config = TransformerConfig(**SIZES, eos_ids=[1, 2])
    assert config.eos_ids == (1, 2)
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 9
