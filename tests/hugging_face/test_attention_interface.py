"""attn_implementation="llmcore" against each model's own eager attention."""

from __future__ import annotations

import pytest
import torch
from families import DECODERS, TEXT, build, inputs, transformers, valid

from llmcore import attention_interface, attention_mask

PADDING = ("none", "left", "right")
TEXT_CASES = [(family, kind) for family in TEXT for kind in PADDING]


def run(model, arguments, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(**arguments, **more).logits


@pytest.fixture
def no_large_mask(monkeypatch):
    """Nothing may make a mask of T x S."""

    def refuse(*args, **kwargs):
        raise AssertionError("a mask of T x S was made")

    monkeypatch.setattr(attention_mask.AttentionMask, "as_bool", refuse)
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", refuse)


@pytest.mark.parametrize(("family", "kind"), TEXT_CASES)
def test_logits_are_eager_attention_s(family, kind, request):
    arguments = inputs(family, kind)
    expected = valid(run(build(family), arguments), arguments)
    model = build(family, "llmcore")
    request.getfixturevalue("no_large_mask")
    got = valid(run(model, arguments), arguments)
    assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("family", TEXT)
def test_bfloat16_loses_no_more_than_eager_attention(family, kind):
    arguments = inputs(family, kind)
    gold = valid(run(build(family), arguments), arguments)  # in float64 some give NaN for padding
    plain = valid(run(build(family).bfloat16(), arguments), arguments)
    got = valid(run(build(family, "llmcore").bfloat16(), arguments), arguments)
    bound = 2 * (plain - gold).abs().max() + 2 * torch.finfo(torch.bfloat16).eps * gold.abs().max()
    assert (got - gold).abs().max() <= bound


def gradients(model, arguments) -> dict[str, torch.Tensor]:
    logits = valid(model(**arguments).logits, arguments)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits.log_softmax(-1) * weights).sum().div(logits.numel()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "bert", "t5", "bart"])
def test_gradients_are_eager_attention_s(family, kind):
    arguments = inputs(family, kind)
    expected = gradients(build(family).train(), arguments)
    got = gradients(build(family, "llmcore").train(), arguments)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1), name


def cache_of(kind, config):
    if kind == "static":
        return transformers.StaticCache(config=config, max_cache_len=16)
    return transformers.DynamicCache(config=config)


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_cached_steps_are_the_whole_pass(family, cache, kind, request):
    """Prefill, two tokens at once, then one by one, past the window's end."""
    arguments = inputs(family, kind, length=14)
    mask = arguments.get("attention_mask", torch.ones_like(arguments["input_ids"]))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    takes_positions = family != "opt"
    expected = run(
        build(family),
        {**arguments, "attention_mask": mask},
        **({"position_ids": positions} if takes_positions else {}),
    )
    model = build(family, "llmcore")
    request.getfixturevalue("no_large_mask")
    kept, pieces, begin = cache_of(cache, model.config), [], 0
    for end in (4, 8, 10, 11, 12, 13, 14):
        step = {"input_ids": arguments["input_ids"][:, begin:end], "attention_mask": mask[:, :end]}
        if takes_positions:
            step["position_ids"] = positions[:, begin:end]
        pieces.append(run(model, step, past_key_values=kept))
        begin = end
    got = torch.cat(pieces, 1)
    assert (got - expected)[mask.bool()].abs().max() <= 1e-4


@pytest.mark.parametrize("fault", ["softcap", "padding", "sinks", "window", "position_bias"])
def test_a_planted_fault_is_seen(fault, monkeypatch):
    """What the comparisons above would say if an argument were dropped."""
    family, kind = {
        "softcap": ("gemma2", "none"),
        "padding": ("llama", "left"),
        "sinks": ("gpt_oss", "none"),
        "window": ("mistral", "none"),
        "position_bias": ("t5", "none"),
    }[fault]
    right = attention_interface.attention

    def wrong(*args, **options):
        dropped = {"padding": "mask", "position_bias": "mask"}.get(fault, fault)
        options.pop(dropped, None)
        return right(*args, **options)

    arguments = inputs(family, kind)
    expected = valid(run(build(family), arguments), arguments)
    monkeypatch.setattr(attention_interface, "attention", wrong)
    got = valid(run(build(family, "llmcore"), arguments), arguments)
    assert (got - expected).abs().max() > 1e-2
