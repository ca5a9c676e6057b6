"""Every family against transformers' own model: the same numbers, there and back."""

import dataclasses

import pytest
import torch
from model_shapes import FAMILIES

from llmcore.models import Encoder, EncoderDecoder, load
from llmcore.models.convert import hugging_face_of, to_theirs, to_transformers

pytest.importorskip("transformers")


def random_ids(*shape, seed=0):
    return torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FAMILIES)
def pair(request, tiny_model):
    """A random model of ours, and transformers' with the same weights."""
    kind, changes = FAMILIES[request.param]
    # T5's unscaled scores would magnify every rounding by their size.
    model = tiny_model(kind, std=0.2 if changes.get("attention_scale") == 1.0 else 0.3, **changes)
    return model, to_transformers(model)


MASK = torch.tensor([[1] * 30, [1] * 21 + [0] * 9])


def both(model, stock):
    """What the two say about the same padded tokens, of each result a pair."""
    ids, mask = random_ids(2, 30), MASK.bool()
    if isinstance(model, EncoderDecoder):
        target = random_ids(2, 14, seed=1)
        theirs = stock(input_ids=ids, attention_mask=MASK, decoder_input_ids=target).logits
        return [(model(ids, target, mask), theirs)]
    if isinstance(model, Encoder):
        types = (torch.arange(30) > 12).long().expand(2, -1)
        found = stock(ids, attention_mask=MASK, token_type_ids=types, output_hidden_states=True)
        hidden = model(ids, mask, types)
        return [
            (hidden[mask], found.hidden_states[-1][mask]),
            (model.masked_language(hidden)[mask], found.prediction_logits[mask]),
            (model.next_sentence(hidden), found.seq_relationship_logits),
        ]
    return [(model(ids, attention_mask=mask)[mask], stock(ids, attention_mask=MASK).logits[mask])]


@torch.no_grad()
def test_family_equals_transformers(pair):
    for ours, theirs in both(*pair):
        assert theirs.std() > 0.1  # the comparison below means something
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_family_comes_back_the_same(pair, tiny_tokenizer, tmp_path):
    """What transformers writes is read as the model that it was made of, bit for bit."""
    model, stock = pair
    tiny_tokenizer.save(tmp_path)
    stock.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert type(again) is type(model)
    assert dataclasses.replace(again.config, eos_ids=model.config.eos_ids) == model.config
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_family_gradients_equal_transformers(pair):
    model, stock = pair
    for ours, theirs in both(model, stock):
        for logits in (ours, theirs):
            logits.square().mean().backward(retain_graph=True)
    family, _ = hugging_face_of(model)
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert names == dict(model.named_parameters()).keys()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    found = to_theirs(model, family)
    for name, parameter in stock.named_parameters():
        if parameter.grad is None or name not in found:  # fused experts, fixed positions
            continue
        scale = max(1.0, float(parameter.grad.abs().max()))
        torch.testing.assert_close(
            found[name] / scale, parameter.grad / scale, atol=5e-5, rtol=1e-4
        )
