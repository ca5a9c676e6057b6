"""Models with packed weights: close to the whole ones, the file's own integers untouched."""

import copy

import pytest
import torch
from torch.nn import Parameter

from llmcore.models import load, save
from llmcore.models.layers import Packable
from llmcore.models.packed import pack_weights
from llmcore.ops.packed_weight import PackedWeight, pack


@pytest.mark.parametrize(
    "format, lost, off", [("bf16", 0.003, 0.02), ("int8", 0.01, 0.1), ("int4", 0.1, 0.1)]
)
def test_packed_model_is_that_of_its_rounded_weights(tiny_decoder, format, lost, off):
    """What the weights lost, and how far it is from a plain model with such weights: what they
    multiply is rounded too."""
    model = tiny_decoder()
    errors = pack_weights(model, format)
    plain = tiny_decoder()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Packable):
                assert 0 < errors.pop(name) < lost
                plain.get_submodule(name).weight.copy_(module.weight.dequantize())
        assert not errors
        ids = torch.randint(300, (2, 20))
        expected = plain(ids)
        assert 0 < (model(ids) - expected).norm() / expected.norm() < off


def test_packed_embedding_gives_the_rows_of_the_weight(tiny_decoder):
    ids = torch.randint(300, (2, 3))
    for format in ("fp32", "bf16", "int8", "int4"):
        for asymmetric in {False, format == "int4"}:
            weight = pack(torch.randn(300, 64), format, 32, asymmetric=asymmetric)
            assert torch.equal(weight.rows(ids), weight.dequantize()[ids])


def test_packed_model_is_for_inference(tiny_decoder, tiny_tokenizer, tmp_path):
    model = tiny_decoder()
    pack_weights(model, "int8")
    assert all(p.ndim == 1 for p in model.parameters())
    for use in (
        lambda: pack_weights(model, "int4"),
        lambda: model.resize_vocab(400),
        lambda: save(model, tiny_tokenizer, tmp_path / "model"),
    ):
        with pytest.raises(ValueError, match="packed"):
            use()
    assert not (tmp_path / "model").exists()
    copied = copy.deepcopy(model)
    ids = torch.randint(300, (1, 4))
    with torch.no_grad():
        assert torch.equal(copied(ids), model(ids))


def test_pack_weights_errors(tiny_decoder):
    with pytest.raises(ValueError, match="weights: got 'int3'"):
        pack_weights(tiny_decoder(), "int3")
    with pytest.raises(ValueError, match=r"weights='int8': .* has rows of 36"):
        pack_weights(tiny_decoder(head_width=9, positions="learned", width=36), "int8")
    model = tiny_decoder(feed_forward=40)  # embedding and attention could be packed
    with pytest.raises(ValueError, match=r"feed_forward\.down has rows of 40"):
        pack_weights(model, "int8")
    assert all(isinstance(m.weight, Parameter) for m in model.modules() if isinstance(m, Packable))
    with pytest.raises(ValueError, match="weights: got 'fp8'"):
        load("smollm2", weights="fp8")


def test_load_int4_takes_the_files_own_integers(smollm2_files):
    """Every matrix of the Q4_1 file stands for exactly what the file says, the Q8_0 head too."""
    model, _ = load(smollm2_files, weights="int4")
    plain, _ = load(smollm2_files)
    formats = set()
    for name, module in model.named_modules():
        if isinstance(module, Packable):
            assert isinstance(module.weight, PackedWeight) and module.weight.error == 0.0
            formats.add((module.weight.format, module.weight.minimums is not None))
            whole = plain.get_submodule(name).weight
            assert torch.equal(module.weight.dequantize(torch.float64).float(), whole)
    assert formats == {("int4", True), ("int8", False)}


def test_load_from_a_folder(tiny_decoder, tiny_tokenizer, tmp_path):
    model = tiny_decoder()
    save(model, tiny_tokenizer, tmp_path / "model")
    loaded, _ = load(tmp_path / "model", weights="int8")
    ids = torch.randint(300, (1, 6))
    pack_weights(model, "int8")
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
