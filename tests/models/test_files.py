"""Models on disk: what is saved comes back, what is broken is named, nothing is half written."""

import dataclasses
import json
import os
import pickle

import numpy as np
import pytest
import torch

from llmcore.models import Encoder, EncoderDecoder, load, save
from llmcore.models.convert import to_theirs, to_transformers
from llmcore.models.families import GGUF_LLAMA

TEXT = "then  the héllo 12\n"


@pytest.fixture
def model(tiny_decoder, tiny_tokenizer):
    return tiny_decoder(vocab_size=len(tiny_tokenizer), eos_ids=(0,))


@pytest.fixture
def saved(model, tiny_tokenizer, tmp_path):
    save(model, tiny_tokenizer, tmp_path / "saved")
    return tmp_path / "saved"


def assert_same(path, model, tokenizer):
    loaded, its_tokenizer = load(path)
    assert loaded.config == model.config and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert its_tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    assert its_tokenizer.special == tokenizer.special
    assert its_tokenizer.eos_id == its_tokenizer.pad_id == tokenizer.eos_id
    assert its_tokenizer.chat_template == tokenizer.chat_template


def write_gguf(path, model, tokenizer, **changes):
    """The model as llama.cpp would hold it, in float32."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    inner = json.loads(tokenizer._inner.to_str())["model"]
    tokens = sorted(inner["vocab"], key=inner["vocab"].get)
    fields = {
        "llama.block_count": config.layers,
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.width,
        "llama.feed_forward_length": config.feed_forward,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in inner["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": tokenizer.chat_template,
        **changes,
    }
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, tensor in to_theirs(model, GGUF_LLAMA).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_files_save_and_load(saved, model, tiny_tokenizer):
    assert_same(saved, model, tiny_tokenizer)
    assert sorted(os.listdir(saved.parent)) == ["saved"]


@pytest.mark.parametrize("change", ["gpt2", "untied", "markers"])
def test_files_save_and_load_other_shapes(
    tiny_decoder, gpt2_shape, tiny_tokenizer, tmp_path, change
):
    if change == "markers":
        tiny_tokenizer.add_special("<USER>")
    shape = {"gpt2": gpt2_shape, "untied": {"tied_embeddings": False}, "markers": {}}[change]
    model = tiny_decoder(vocab_size=len(tiny_tokenizer), eos_ids=(0, 1), **shape)
    save(model, tiny_tokenizer, tmp_path / "new" / "model")
    assert_same(tmp_path / "new" / "model", model, tiny_tokenizer)


def test_files_save_replaces_an_older_save(saved, tiny_decoder, tiny_tokenizer):
    newer = tiny_decoder(seed=1, vocab_size=len(tiny_tokenizer), eos_ids=(0,), layers=1)
    save(newer, tiny_tokenizer, saved)
    assert_same(saved, newer, tiny_tokenizer)


def test_files_save_leaves_other_folders_alone(model, tiny_tokenizer, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which save didn't write"):
        save(model, tiny_tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"thesis\.txt is a file"):
        save(model, tiny_tokenizer, tmp_path / "thesis.txt")
    assert os.listdir(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_files_interrupted_save_leaves_the_older_one(
    saved, model, tiny_decoder, tiny_tokenizer, monkeypatch, moment
):
    real, calls = os.replace, []

    def fail_to_rename(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk gone")
        real(source, target)

    def fail_to_write(folder):
        raise OSError("disk full")

    if moment == "writing":
        monkeypatch.setattr(tiny_tokenizer, "save", fail_to_write)
    else:
        monkeypatch.setattr(os, "replace", fail_to_rename)
    newer = tiny_decoder(seed=1, vocab_size=len(tiny_tokenizer), eos_ids=(0,))
    with pytest.raises(OSError, match="disk"):
        save(newer, tiny_tokenizer, saved)
    monkeypatch.undo()
    assert_same(saved, model, tiny_tokenizer)
    assert os.listdir(saved.parent) == ["saved"]


@pytest.mark.parametrize("shards", [1, 3])
def test_files_load_a_hugging_face_folder(tmp_path, model, tiny_tokenizer, shards):
    transformers = pytest.importorskip("transformers")
    stock = to_transformers(model)
    stock.save_pretrained(tmp_path, max_shard_size="1GB" if shards == 1 else "30KB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards > 1)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer._inner, eos_token="<|end|>", pad_token="<|end|>"
    )
    theirs.chat_template = tiny_tokenizer.chat_template
    theirs.save_pretrained(tmp_path)
    assert_same(tmp_path, model, tiny_tokenizer)


def test_files_generation_config_adds_ends(saved, tmp_path, model, tiny_tokenizer):
    pytest.importorskip("transformers")
    to_transformers(model).save_pretrained(tmp_path)
    tiny_tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    assert load(tmp_path)[0].config.eos_ids == (0, 1)


def test_files_load_gguf(tmp_path, model, tiny_tokenizer):
    write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer)
    assert_same(tmp_path / "tiny.gguf", model, tiny_tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma"}, "the architecture 'gemma'; accepted is 'llama'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama': accepted is 'gpt2'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2': accepted is 'smollm'"),
        ({"tokenizer.ggml.token_type": [6] * 266}, r"266 entries of kinds \[6\]"),
        ({"llama.expert_count": 4}, "llama.expert_count is 4"),
    ],
)
def test_files_refuse_another_gguf(tmp_path, model, tiny_tokenizer, changes, message):
    write_gguf(tmp_path / "other.gguf", model, tiny_tokenizer, **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "other.gguf")


@pytest.mark.parametrize("kept", [0, 3, 20, 2000, 0.5, 0.99])
def test_files_refuse_a_cut_off_gguf(tmp_path, model, tiny_tokenizer, kept):
    path = tmp_path / "cut.gguf"
    write_gguf(path, model, tiny_tokenizer)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ValueError, match=r"cut\.gguf (is not a whole GGUF file|begins with)"):
        load(path)


def test_files_refuse_garbage_gguf(tmp_path):
    path = tmp_path / "garbage.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 20)
    with pytest.raises(ValueError, match=r"garbage\.gguf is not a whole GGUF file"):
        load(path)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.999])
def test_files_refuse_cut_off_weights(saved, kept):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load(saved)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", os.urandom(500), "is not a whole safetensors file"),
        ("config.json", b"{", r"config\.json is not JSON"),
        ("config.json", b"\xff\xfe", r"config\.json is not JSON"),
        ("config.json", b'{"model_type": "bloom"}', "'bloom' in config.json: accepted are 'llama'"),
        (
            "config.json",
            b'{"model_type": "llama"}',
            r"config\.json: num_attention_heads is missing",
        ),
        ("config.json", b'{"model_type": "llmcore_decoder"}', r"config\.json: .*missing"),
        ("tokenizer.json", b"{}", r"tokenizer\.json is not a tokenizer"),
        ("tokenizer_config.json", b"[1]", r"tokenizer_config\.json is not a tokenizer config"),
        ("tokenizer_config.json", b'{"eos_token": "<x>"}', "eos token '<x>' isn't in the"),
    ],
)
def test_files_refuse_foreign_contents(saved, name, content, message):
    (saved / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_files_refuse_json_that_is_no_object(saved):
    (saved / "config.json").write_text("[]")
    with pytest.raises(TypeError, match="must hold a JSON object, got list"):
        load(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_files_name_what_is_missing(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        load(saved)


def test_files_never_read_a_pickle(saved):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FileNotFoundError, match="never from pickles"):
        load(saved)


def test_files_refuse_an_index_that_leaves_the_folder(saved):
    (saved / "model.safetensors").rename(saved.parent / "model.safetensors")
    index = {"weight_map": {"norm.weight": "../model.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names .*, a file of another folder"):
        load(saved)


def test_files_refuse_weights_of_another_config(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "feed_forward": 40}))
    with pytest.raises(ValueError, match=r"feed_forward\.up\.weight has the shape \(96, 32\)"):
        load(saved)


def test_files_refuse_a_tokenizer_larger_than_the_model(model, tiny_tokenizer, tmp_path):
    tiny_tokenizer.add_special("<USER>")
    save(model, tiny_tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match="tokenizer has 267 tokens, the model only 266"):
        load(tmp_path / "model")


def test_files_refuse_other_names(tmp_path):
    with pytest.raises(
        FileNotFoundError, match='gpt9 does not exist; accepted: "smollm2", "minilm", a fol'
    ):
        load("gpt9")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.pt is not a model; accepted"):
        load(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="weights: got 'int3', expected None"):
        load(tmp_path, weights="int3")


def test_files_keep_the_dtype_out_of_the_config(saved, model, tiny_tokenizer):
    """A bf16 model is saved as it is and comes back as float32, rounded."""
    save(model.bfloat16(), tiny_tokenizer, saved)
    loaded, _ = load(saved)
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(model.config)
    assert torch.equal(loaded.norm.weight, model.norm.weight.float())


def test_save_leaves_a_foreign_checkpoint_alone(tiny_decoder, tiny_tokenizer, tmp_path) -> None:
    folder = tmp_path / "model"
    save(tiny_decoder(), tiny_tokenizer, folder)
    (folder / "config.json").write_text('{"model_type": "somebody elses"}')
    with pytest.raises(ValueError, match=r"somebody elses|config"):
        save(tiny_decoder(), tiny_tokenizer, folder)
    assert "somebody" in (folder / "config.json").read_text()


def test_save_through_a_link(tiny_decoder, tiny_tokenizer, tmp_path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    save(tiny_decoder(), tiny_tokenizer, link)
    assert link.is_symlink()
    assert (target / "config.json").is_file()


def test_files_load_what_earlier_versions_saved(tiny_decoder, tiny_tokenizer, tmp_path):
    """A config.json that lacks the options there are today: they have their defaults."""
    model = tiny_decoder()
    save(model, tiny_tokenizer, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    found = json.loads(path.read_text())
    first = ["vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "feed_forward",
             "context_length", "norm", "norm_eps", "activation", "positions", "rope_theta", "bias",
             "tied_embeddings", "eos_ids", "window"]  # fmt: skip
    path.write_text(json.dumps({name: found[name] for name in ["model_type", *first]}))
    again, _ = load(tmp_path / "model")
    assert again.config == model.config
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("kind", [Encoder, EncoderDecoder])
def test_files_of_the_other_models(tiny_model, tiny_tokenizer, tmp_path, kind):
    model = tiny_model(
        kind,
        positions="relative",
        outputs=("pooler", "masked_language"),
        head_bias=True,
        tied_embeddings=False,
        start_id=0,
    )
    save(model, tiny_tokenizer, tmp_path / "model")
    again, _ = load(tmp_path / "model")
    assert type(again) is kind and again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
