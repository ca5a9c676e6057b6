"""llmcore.patch_sdpa: torch's own modules, timm's models, nesting, threads."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmcore
from llmcore.patch_sdpa import patched

ORIGINAL = F.scaled_dot_product_attention


@pytest.fixture
def calls(monkeypatch):
    """How many calls have come to llmcore's function."""
    count = []

    def counted(*args, **options):
        count.append(args[0].shape)
        return llmcore.ops.scaled_dot_product_attention(*args, **options)

    module = sys.modules[patched.__module__]
    monkeypatch.setattr(module, "scaled_dot_product_attention", counted)
    return count


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(layer: type[nn.Module], *args, **options) -> nn.Module:
    torch.manual_seed(1)
    return layer(*args, **options).eval()


def agree(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).abs().max() <= 1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_patch_sdpa_replaces_the_function_and_restores_it(calls, is_causal):
    q, k, v = draw(2, 4, 5, 8), draw(2, 2, 7, 8, seed=1), draw(2, 2, 7, 8, seed=2)
    options = {"is_causal": is_causal, "enable_gqa": True, "scale": 0.3}
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    with llmcore.patch_sdpa():
        got = F.scaled_dot_product_attention(q, k, v, **options)
    assert len(calls) == 1 and agree(got, expected)
    assert F.scaled_dot_product_attention is ORIGINAL


def test_patch_sdpa_nests_and_ends_with_an_exception():
    with pytest.raises(KeyError), llmcore.patch_sdpa():
        with llmcore.patch_sdpa():
            pass
        assert F.scaled_dot_product_attention is patched
        raise KeyError
    assert F.scaled_dot_product_attention is ORIGINAL
    assert torch.backends.mha.get_fastpath_enabled()


def test_patch_sdpa_blocks_of_threads_may_overlap():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with llmcore.patch_sdpa():
            inside.set()
            leave.wait(600)

    thread = threading.Thread(target=other)
    with llmcore.patch_sdpa():
        thread.start()
        assert inside.wait(600)
    assert F.scaled_dot_product_attention is patched  # the other thread is still inside
    leave.set()
    thread.join()
    assert F.scaled_dot_product_attention is ORIGINAL


def test_patch_sdpa_leaves_other_tensors_to_torch(calls):
    parts = [draw(3, 2, 8), draw(5, 2, 8)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    with llmcore.patch_sdpa():
        got = F.scaled_dot_product_attention(nested, nested, nested)
    assert got.is_nested and not calls


@pytest.mark.parametrize("mask", ["none", "padding", "causal"])
@pytest.mark.parametrize("training", [False, True])
def test_patch_sdpa_reaches_transformer_encoder(calls, mask, training):
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model = build(nn.TransformerEncoder, layer, 2).train(training)
    options = {}
    padded = torch.zeros(3, 6, dtype=torch.bool)
    if mask == "padding":
        padded[1, 4:] = padded[2, 2:] = True
        options["src_key_padding_mask"] = padded
    if mask == "causal":
        options |= {"mask": nn.Transformer.generate_square_subsequent_mask(6), "is_causal": True}
    x = draw(3, 6, 32)
    expected = model(x, **options)
    with llmcore.patch_sdpa():
        got = model(x, **options)
    assert len(calls) == 2
    assert agree(got[~padded], expected[~padded])


def test_patch_sdpa_reaches_transformer_decoder_and_its_gradient(calls):
    model = build(nn.TransformerDecoderLayer, 32, 4, 48, dropout=0.0, batch_first=True).train()
    x, memory = draw(2, 5, 32).requires_grad_(), draw(2, 7, 32, seed=1).requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    expected = torch.autograd.grad(model(x, memory, mask).square().mean(), (x, memory))
    with llmcore.patch_sdpa():
        got = torch.autograd.grad(model(x, memory, mask).square().mean(), (x, memory))
    assert len(calls) == 2
    assert all(map(agree, got, expected))


def test_patch_sdpa_reaches_multihead_attention_without_weights(calls):
    model = build(nn.MultiheadAttention, 32, 4, batch_first=True)
    x = draw(2, 5, 32)
    with torch.no_grad():
        expected = model(x, x, x, need_weights=False)[0]
        with llmcore.patch_sdpa():
            got, weights = model(x, x, x, need_weights=False)
            assert model(x, x, x)[1] is not None
    assert len(calls) == 1 and weights is None and agree(got, expected)


def test_patch_sdpa_compiles_without_a_break():
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    q = draw(2, 3, 5, 8)
    expected = function(q, q, q)
    with llmcore.patch_sdpa():
        got = torch.compile(function, backend="aot_eager", fullgraph=True)(q, q, q)
    torch._dynamo.reset()
    assert agree(got, expected)


class AnyMember(type):
    """A class whose every public attribute is its own name."""

    def __getattr__(cls, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class NoTorchvision(importlib.machinery.PathFinder):
    """Stands in for torchvision, which timm imports for its data sets and which has no build that
    fits to every torch: any name in it is an empty class."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, cls, is_package=True)

    @staticmethod
    def create_module(spec):
        module = types.ModuleType(spec.name)

        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return AnyMember(name, (nn.Module,), {"__module__": spec.name})

        module.__getattr__ = attribute
        return module

    @staticmethod
    def exec_module(module):
        pass


@pytest.fixture
def timm():
    """timm, beside torchvision or without."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    before = set(sys.modules)
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(NoTorchvision)
    import timm

    yield timm
    if NoTorchvision in sys.meta_path:
        sys.meta_path.remove(NoTorchvision)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("timm", "torchvision"):
                del sys.modules[name]


def test_patch_sdpa_runs_timm_s_vit(timm, calls):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = timm.models.vision_transformer.VisionTransformer(**sizes, num_classes=5).eval()
    images = draw(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        with llmcore.patch_sdpa():
            got = model(images)
    assert len(calls) == 2 and agree(got, expected)
