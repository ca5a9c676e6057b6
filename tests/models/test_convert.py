"""Names of other libraries, both ways, and configs that are not ours to run."""

import pytest
import torch

from llmcore.models.convert import (
    config_from_gguf,
    config_from_hugging_face,
    config_to_hugging_face,
    to_ours,
    to_theirs,
)
from llmcore.models.families import GGUF_LLAMA, HUGGING_FACE_LLAMA, LLMCORE

FAMILIES = {"hugging_face": HUGGING_FACE_LLAMA, "gguf": GGUF_LLAMA, "llmcore": LLMCORE}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [{}, {"tied_embeddings": False, "bias": True, "kv_heads": 4}])
def test_convert_there_and_back(tiny_decoder, family, shape):
    model = tiny_decoder(**shape)
    theirs = to_theirs(model, FAMILIES[family])
    back = to_ours(theirs, FAMILIES[family], model.config)
    assert back.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_convert_llmcore_names_are_the_state_dict(tiny_decoder, gpt2_shape):
    model = tiny_decoder(**gpt2_shape)
    assert to_theirs(model, LLMCORE).keys() == model.state_dict().keys()


def test_convert_gguf_rows_are_interleaved_pairs(tiny_decoder):
    """llama.cpp turns rows 2 j and 2 j + 1 of a head as a pair; ours are j and j + D/2."""
    model = tiny_decoder()
    theirs = to_theirs(model, GGUF_LLAMA)
    ours = model.blocks[1].attention.qkv.weight.detach()
    for name, first, heads in (("attn_q", 0, 4), ("attn_k", 32, 2)):
        for head in range(heads):
            for j in range(4):
                row, place = first + 8 * head + j, 8 * head + 2 * j
                assert torch.equal(theirs[f"blk.1.{name}.weight"][place], ours[row])
                assert torch.equal(theirs[f"blk.1.{name}.weight"][place + 1], ours[row + 4])
    assert torch.equal(theirs["blk.1.attn_v.weight"], ours[48:])


def test_convert_takes_half_precision_and_a_repeated_head(tiny_decoder):
    model = tiny_decoder()
    theirs = {k: v.bfloat16() for k, v in to_theirs(model, HUGGING_FACE_LLAMA).items()}
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    theirs["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    back = to_ours(theirs, HUGGING_FACE_LLAMA, model.config)
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    torch.testing.assert_close(back.norm.weight, model.norm.weight, atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.2.self_attn.k_proj.weight"),
            r"must have model\.layers\.2\.self_attn\.k_proj\.weight: not found",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
            r"1 tensors have no place .*: model\.layers\.0\.self_attn\.q_norm\.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model\.norm\.weight has the shape \(31,\); the config says \(32,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            r"model\.norm\.weight is torch\.int8",
        ),
    ],
)
def test_convert_refuses_other_tensors(tiny_decoder, change, message):
    model = tiny_decoder()
    theirs = to_theirs(model, HUGGING_FACE_LLAMA)
    change(theirs)
    with pytest.raises(ValueError, match=message):
        to_ours(theirs, HUGGING_FACE_LLAMA, model.config)


@pytest.mark.parametrize("shape", [{}, {"bias": True, "tied_embeddings": False, "eos_ids": ()}])
def test_convert_config_there_and_back(tiny_decoder, shape):
    config = tiny_decoder(**shape).config
    assert config_from_hugging_face(config_to_hugging_face(config)) == config


def test_convert_config_of_old_transformers(tiny_decoder):
    config = tiny_decoder().config
    found = config_to_hugging_face(config)
    del found["rope_parameters"], found["head_dim"]
    found |= {"rope_theta": 5e5, "rope_scaling": None, "eos_token_id": 7, "hidden_act": "silu"}
    read = config_from_hugging_face(found)
    assert (read.rope_theta, read.eos_ids, read.head_width) == (5e5, (7,), 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "model_type 'bloom' .* accepted are 'llama', 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type 'linear'"),
        ({"attention_bias": True}, "mlp_bias False .* accepted is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_convert_refuses_other_llamas(tiny_decoder, change, message):
    found = config_to_hugging_face(tiny_decoder().config)
    with pytest.raises(ValueError, match=message):
        config_from_hugging_face({**found, **change})


def test_convert_refuses_to_call_gpt2_a_llama(tiny_decoder, gpt2_shape):
    with pytest.raises(ValueError, match="a Hugging Face Llama model has window None, not 9"):
        config_to_hugging_face(tiny_decoder(window=9).config)
    message = r"has norm 'rms_norm', not 'layer_norm', .*'rope', not 'learned'"
    with pytest.raises(ValueError, match=message):
        config_to_hugging_face(tiny_decoder(**gpt2_shape).config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("llama.rope.scaling.type", "yarn"),
        ("llama.expert_count", 8),
        ("llama.rope.dimension_count", 4),
        ("llama.attention.value_length", 4),
    ],
)
def test_convert_refuses_other_ggufs(field, value):
    fields = {"llama.attention.head_count": 4, "llama.embedding_length": 32, field: value}
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        config_from_gguf(fields, tied_embeddings=True)
