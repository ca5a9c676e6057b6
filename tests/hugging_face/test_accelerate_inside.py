"""llmcore.accelerate on models of Hugging Face that lie inside other modules."""

from __future__ import annotations

import pytest
import torch
from families import inputs, passes, stock, transformers, valid

import llmcore

pytestmark = pytest.mark.usefixtures("one_thread")


class Wrapped(torch.nn.Module):
    """A model of one's own around one of transformers."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.head = torch.nn.Linear(96, 3)

    def forward(self, ids):
        return self.head(self.inner(ids).logits[:, -1])


def test_a_model_inside_another_one():
    model = Wrapped(stock("llama")).eval()
    ids, config = inputs("llama")["input_ids"], model.config
    with torch.no_grad():
        expected = model(ids)
        report = llmcore.accelerate(model)
        assert {"attention": 1, "decoder pass": 1}.items() <= report.structures().items()
        assert {s.name for s in report.swapped if s.structure == "attention"} == {"inner"}
        assert model.config is model.inner.config and model.config is not config
        torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
        assert report.error is not None and passes(model.inner) > 0
        report.undo()
        assert model.config is model.inner.config is config
        assert torch.equal(model(ids), expected)


def test_two_models_of_one_config_each_choose_for_themselves():
    """A policy and its reference; the reference has a second name."""
    policy = stock("llama")
    reference = type(policy)(policy.config).eval()
    both = torch.nn.ModuleDict({"policy": policy, "reference": reference, "again": reference})
    config = policy.config
    report = llmcore.accelerate(both)
    for structure in ("attention", "decoder pass", "linear_cross_entropy"):
        names = [s.name for s in report.swapped if s.structure == structure]
        assert names == ["policy", "reference"], structure
    assert policy.config is not config and reference.config is not config
    report.undo()
    assert policy.config is reference.config is config


def test_a_model_of_two_without_a_small_input():
    """The two are held against themselves, each by its own inputs."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    text = {**sizes, "num_attention_heads": 4, "vocab_size": 96, "eos_token_id": 2}
    picture = {**sizes, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=picture, projection_dim=8)
    ).eval()
    given = {"input_ids": torch.randint(3, 96, (2, 9)), "pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        expected = model(**given).logits_per_image
        report = llmcore.accelerate(model)
        names = {s.name for s in report.swapped if s.structure == "attention"}
        assert names == {"text_model", "vision_model"}
        torch.testing.assert_close(model(**given).logits_per_image, expected, atol=1e-4, rtol=1e-4)
        report.undo()
        assert torch.equal(model(**given).logits_per_image, expected)


def test_lora_below():
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(stock("llama"), peft.LoraConfig(r=2, **options))
    arguments = inputs("llama", "left")
    with torch.no_grad():
        expected = valid(model(**arguments).logits, arguments)
        counts = llmcore.accelerate(model).structures()
        assert counts["attention"] == 1 and counts["linear_cross_entropy"] == 1
        got = valid(model(**arguments).logits, arguments)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    model.train()(**arguments, labels=arguments["input_ids"]).loss.backward()
    assert all(("lora" in n) == (p.grad is not None) for n, p in model.named_parameters())
