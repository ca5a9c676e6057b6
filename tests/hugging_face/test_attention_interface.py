"""attn_implementation="llmcore" against each model's own eager attention."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import types

import pytest
import torch
from families import (
    AUDIO,
    CACHE,
    DECODERS,
    EVERY,
    SEQ2SEQ,
    TEXT,
    VISION,
    build,
    inputs,
    padding,
    transformers,
    valid,
)

from llmcore import attention_interface, attention_mask, eager_attention
from llmcore.attention_interface import attend
from llmcore.attention_mask import AttentionMask

PADDING = ("none", "left", "right")
CASES = [(family, kind) for family in TEXT for kind in PADDING]
CASES += [(family, "none") for family in (*VISION, *AUDIO)]


def run(model, arguments, **more) -> torch.Tensor:
    with torch.no_grad():
        output = model(**arguments, **more)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.fixture
def no_large_mask(monkeypatch):
    """Nothing may make a mask of T x S."""

    def refuse(*args, **kwargs):
        raise AssertionError("a mask of T x S was made")

    monkeypatch.setattr(attention_mask.AttentionMask, "as_bool", refuse)
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", refuse)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_are_eager_attention_s(family, kind, request):
    arguments = inputs(family, kind)
    expected = valid(run(build(family), arguments), arguments)
    model = build(family, "llmcore")
    request.getfixturevalue("no_large_mask")
    got = valid(run(model, arguments), arguments)
    assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_bfloat16_loses_no_more_than_eager_attention(family, kind):
    arguments = inputs(family, kind)
    gold = valid(run(build(family), arguments), arguments)  # in float64 some give NaN for padding
    halves = {n: t.bfloat16() if t.is_floating_point() else t for n, t in arguments.items()}
    plain = valid(run(build(family).bfloat16(), halves), arguments)
    got = valid(run(build(family, "llmcore").bfloat16(), halves), arguments)
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
        pieces.append(run(model, step, **{CACHE: kept}))
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


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", *SEQ2SEQ, *AUDIO])
def test_generate_gives_eager_attention_s_tokens(family, cache):
    """Greedy, a left-padded batch; encoder-decoder models with their cross attention's cache."""
    arguments = inputs(family, "none" if family in AUDIO else "left")
    arguments.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": cache}
    if cache == "dynamic":
        options["cache_implementation"] = None
    expected = build(family).generate(**arguments, **options)
    got = build(family, "llmcore").generate(**arguments, **options)
    assert torch.equal(got, expected)


def test_packed_sequences_are_kept_apart():
    """Positions that begin anew, without a mask: two sequences in one row."""
    arguments = inputs("llama")
    arguments["position_ids"] = torch.tensor([[*range(6), *range(5)]])
    expected = run(build("llama"), arguments, use_cache=False)
    got = run(build("llama", "llmcore"), arguments, use_cache=False)
    assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
def test_a_mask_of_the_caller_is_taken(dtype):
    seen = torch.rand(3, 1, 11, 11, generator=torch.Generator().manual_seed(5)) < 0.7
    seen |= torch.eye(11, dtype=torch.bool)
    added = attention_mask.added(seen, torch.float32)
    expected = run(build("llama"), {**inputs("llama"), "attention_mask": added})
    mask = seen if dtype == torch.bool else added.to(dtype)
    got = run(build("llama", "llmcore"), {**inputs("llama"), "attention_mask": mask})
    assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "bart"])
def test_output_attentions_are_the_eager_function_s(family):
    arguments = inputs(family, "left")
    with torch.no_grad():
        expected = build(family)(**arguments, output_attentions=True)
        got = build(family, "llmcore")(**arguments, output_attentions=True)
    for name in ("attentions", "decoder_attentions", "cross_attentions"):
        assert (expected.get(name) is None) == (got.get(name) is None)
        for weights, own in zip(got.get(name) or (), expected.get(name) or (), strict=True):
            assert (weights - own).abs().max() <= 1e-6
    assert (valid(got.logits - expected.logits, arguments)).abs().max() <= 1e-4


def layer_with(source: str) -> torch.nn.Module:
    """A causal layer of a module of its own, whose eager function has this source."""
    home = types.ModuleType("a_model")
    sys.modules[home.__name__] = home
    exec(compile(source, "<a model>", "exec"), home.__dict__)
    layer = type("Layer", (torch.nn.Module,), {"__module__": "a_model", "is_causal": True})
    return layer()


@pytest.fixture
def layer_of(monkeypatch):
    """layer(source), whose source can be read."""

    def make(source: str) -> torch.nn.Module:
        monkeypatch.setattr(eager_attention.inspect, "getsource", lambda function: source)
        return layer_with(source)

    yield make
    sys.modules.pop("a_model", None)


PLAIN = """
def eager_attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
                            tilt=None, **kwargs):
    weights = (query.matmul(key.transpose(2, 3)) + attention_mask).softmax(-1)
    return weights.matmul(value).transpose(1, 2) * (tilt or 1), "own"
"""
QKV = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(6))


def test_an_argument_of_the_eager_function_goes_to_it(layer_of):
    layer = layer_of(PLAIN)
    y, weights = attend(layer, *QKV, None, scaling=1.0)
    assert weights is None
    tilted, weights = attend(layer, *QKV, None, scaling=1.0, tilt=3.0)
    assert weights == "own" and (tilted - 3 * y).abs().max() <= 1e-5  # it got the causal mask
    ignored, _ = attend(layer, *QKV, None, scaling=1.0, something_else=3.0)
    assert torch.equal(ignored, y)  # as by the eager function


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("query.matmul", "module.twist * query.matmul"),
        (".softmax(-1)", ".entmax(-1)"),
        ("(tilt or 1)", "kwargs.get('factor', 1)"),
        ("query.matmul", "len(repr(module)) * query.matmul"),
    ],
)
def test_an_eager_function_that_does_something_else_runs_itself(layer_of, old, new):
    assert old in PLAIN
    layer = layer_of(PLAIN.replace(old, new))
    assert eager_attention.calls_for(layer, {}) is not None


def test_an_unknown_argument_without_an_eager_function_is_an_error():
    layer = type("Layer", (torch.nn.Module,), {"__module__": "nowhere"})()
    assert attend(layer, *QKV, None, use_cache=True)[1] is None
    with pytest.raises(TypeError, match="tilt: not known to llmcore, and Layer has no"):
        attend(layer, *QKV, None, tilt=3.0)


def test_dropout_drops_in_training_only():
    layer = torch.nn.Module()
    y = attend(layer.eval(), *QKV, None)[0]
    assert torch.equal(attend(layer.eval(), *QKV, None, dropout=0.5)[0], y)
    layer.train()
    torch.manual_seed(0)
    dropped = torch.stack([attend(layer, *QKV, None, dropout=0.5)[0] for _ in range(400)])
    assert not torch.equal(dropped[0], y)
    error = dropped.std(0) / 400**0.5
    assert ((dropped.mean(0) - y).abs() <= 6 * error + 1e-6).all()


MASKS = [
    *[{"q_length": 7, "kv_length": 7}],
    *[{"q_length": 1, "kv_length": 7, "q_offset": 6}],
    *[{"q_length": 3, "kv_length": 9, "q_offset": 6}],
    *[{"q_length": 3, "kv_length": 9, "q_offset": 4}],
    *[{"q_length": 3, "kv_length": 6, "q_offset": 11, "kv_offset": 8}],
    *[{"q_length": 2, "kv_length": 9, "q_offset": torch.tensor(3)}],
]


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("sizes", MASKS, ids=str)
@pytest.mark.parametrize("pattern", ["causal", "bidirectional", "window", "both_sides", "chunks"])
def test_a_mask_is_transformers_own(pattern, sizes, kind):
    hugging_face = transformers.masking_utils
    function = {
        "causal": hugging_face.causal_mask_function,
        "bidirectional": hugging_face.bidirectional_mask_function,
        "window": hugging_face.sliding_window_causal_mask_function(3),
        "both_sides": hugging_face.sliding_window_bidirectional_mask_function(2),
        "chunks": hugging_face.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.int)),
    }[pattern]
    seen = int(sizes.get("q_offset", 0)) + sizes["q_length"]
    mask = padding(kind, length=seen if pattern != "bidirectional" else sizes["kv_length"] + 8)
    arguments = {**sizes, "batch_size": 3, "mask_function": function}
    arguments["attention_mask"] = mask if mask is None else mask.bool()
    expected = hugging_face.sdpa_mask(**arguments, allow_is_causal_skip=False)
    got = attention_mask.attention_mask(**arguments)
    assert isinstance(got, torch.Tensor) == (pattern == "chunks")
    if got is None:
        rows, keys = sizes["q_length"], sizes["kv_length"]
        got = torch.ones(rows, keys, dtype=torch.bool)
        if pattern in ("causal", "window") and rows > 1:
            got = got.tril()
        got = got.expand(3, 1, rows, keys)
    assert torch.equal(got[:], expected)


def test_a_mask_is_a_tensor_for_those_who_look_into_it():
    lengths = torch.tensor([2, 4])
    mask = AttentionMask((2, 1, 3, 4), "cpu", causal=True, offset=1, lengths=lengths)
    tensor = mask.as_bool()
    assert torch.equal(torch.where(mask, 1, 0), torch.where(tensor, 1, 0))
    assert torch.equal(mask[:, :, -1], tensor[:, :, -1])
    assert torch.equal(mask.float(), tensor.float()) and mask.dtype == torch.bool
    assert torch.equal(mask.to(torch.float32), tensor.float())
    assert mask.to("cpu") is mask and mask.to("meta").lengths.is_meta
    assert mask.shape == tensor.shape and mask.ndim == 4 and mask.contiguous() is mask
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert torch.equal(other.as_bool(), tensor)


def test_import_llmcore_is_enough_and_imports_no_transformers():
    code = (
        "import sys, llmcore; assert 'transformers' not in sys.modules;"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions;"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks;"
        "assert functions['llmcore'] is llmcore.attention_interface.attend;"
        "assert masks['llmcore'] is llmcore.attention_mask.attention_mask;"
        "assert not any('Registering' in repr(finder) for finder in sys.meta_path);"
        "llmcore.attention_interface.register()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_every_layer_of_transformers_is_read():
    """A layer of each tiny model: what its eager function does is known, or it runs itself."""
    for family in EVERY:
        layers = {type(m) for m in build(family).modules() if "Attention" in type(m).__name__}
        read = [eager_attention.read(layer) for layer in layers]
        assert any(facts.found for facts in read), family
        assert not any(facts.strange for facts in read), family
