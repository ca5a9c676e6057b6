"""llmcore.accelerate on modules of plain PyTorch: what is swapped, what is left, the way back."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import llmcore
from llmcore.swap.instance import is_swapped

pytestmark = pytest.mark.usefixtures("one_thread")


class RootMeanSquare(nn.Module):
    """An RMS norm by its formula, as many libraries write it; its names are its own."""

    def __init__(self, width: int, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1 + (0.0 if plus_one else 1.0))
        self.small = 1e-4
        self.plus_one = plus_one

    def forward(self, x):
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.small)
        return (y * ((1.0 + self.weight) if self.plus_one else self.weight)).to(x.dtype)


class OddNorm(RootMeanSquare):
    """Almost an RMS norm: it divides by the mean of absolute values."""

    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + self.small) * self.weight


class Gated(nn.Module):
    def __init__(self, width: int = 32, hidden: int = 48, act: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden, bias=False)
        self.second = nn.Linear(width, hidden, bias=False)
        self.last = nn.Linear(hidden, width, bias=False)
        self.act = act or nn.SiLU()

    def forward(self, x):
        return self.last(self.first(x) * self.act(self.second(x)))


class Model(nn.Module):
    """A bit of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.norm = RootMeanSquare(32)
        self.gemma = RootMeanSquare(32, plus_one=True)
        self.layer_norm = nn.LayerNorm(32)
        self.network = Gated()
        self.act = nn.GELU(approximate="tanh")
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.network(self.norm(x))
        x = x + self.act(self.gemma(x))
        return self.head(self.layer_norm(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def ids():
    return torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(1))


def gradients(model, ids):
    model.zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_accelerate_swaps_by_what_modules_compute(model, ids):
    expected, expected_gradients = model(ids), gradients(model, ids)
    report = llmcore.accelerate(model)
    assert report.structures() == {
        "rms_norm": 2,
        "layer_norm": 1,
        "gated_mlp": 1,
        "gelu": 1,
        "linear": 4,
    }
    assert [left.name for left in report.left] == ["embedding"]
    assert all(swap.error < 1e-6 for swap in report.swapped)
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(model, ids), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert "rms_norm" in str(report) and "network" in str(report)


def test_accelerate_undo_is_exact(model, ids):
    expected, classes = model(ids), [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    report = llmcore.accelerate(model)
    assert [type(m) for m in model.modules()] != classes
    report.undo()
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(model(ids), expected)
    report.undo()  # changes nothing


def test_accelerate_changes_this_instance_only(model, ids):
    other = copy.deepcopy(model)
    expected = other(ids)
    llmcore.accelerate(model)
    assert not any(is_swapped(m) for m in other.modules())
    assert not any(is_swapped(m) for m in Model().modules())
    assert torch.equal(other(ids), expected)


def test_accelerate_gated_activations():
    for act in (nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")):
        torch.manual_seed(0)
        module, x = Gated(act=act), torch.randn(2, 3, 32)
        expected = module(x)
        assert llmcore.accelerate(module).structures()["gated_mlp"] == 1
        torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-5)
    assert "gated_mlp" not in llmcore.accelerate(Gated(act=nn.ReLU())).structures()


def test_accelerate_leaves_a_custom_norm_alone():
    module, x = nn.Sequential(OddNorm(32), nn.Linear(32, 8)), torch.randn(3, 32)
    expected = module[0](x)
    report = llmcore.accelerate(module)
    assert [left.kind for left in report.left] == ["OddNorm"]
    assert torch.equal(module[0](x), expected)


def test_accelerate_hooks_see_what_they_saw(model, ids):
    seen = []
    model.norm.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    model.network.second.register_forward_hook(lambda m, args, out: out * 2.0)
    expected = model(ids)
    seen.clear()
    llmcore.accelerate(model)
    assert not seen  # small inputs of ours are not the model's calls
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
    assert seen == [torch.Size([2, 7, 32])]


def test_accelerate_leaves_replaced_forwards_and_parametrizations_alone(model, ids):
    nn.utils.parametrizations.weight_norm(model.network.first)
    model.layer_norm.forward = lambda x: x * 2.0
    expected = model(ids)
    report = llmcore.accelerate(model)
    reasons = {left.name: left.reason for left in report.left}
    assert "forward" in reasons["layer_norm"]
    assert not is_swapped(model.network.first)
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_accelerate_before_parameters_move(weights):
    """Pruning and weight norm put something computed in a parameter's place."""
    changed = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32))
    expected, x = copy.deepcopy(changed), torch.randn(3, 32)
    llmcore.accelerate(changed, weights=weights)
    for model in (changed, expected):
        prune.l1_unstructured(model[0], "weight", 0.5)
        prune.l1_unstructured(model[1], "bias", 0.5)
        prune.l1_unstructured(model[1], "weight", 0.5)
        nn.utils.parametrizations.weight_norm(model[3])
    for model in (changed, expected):
        model[1].weight_mask[::2] = 0
    torch.testing.assert_close(changed(x), expected(x))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_accelerate_leaves_a_weight_that_is_no_parameter(weights):
    class Fixed(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.register_buffer("weight", torch.randn(32, 48))
            self.rows = rows

        def forward(self, x):
            return x @ (self.weight.T if self.rows else self.weight)

    for rows in (True, False):
        report = llmcore.accelerate(Fixed(rows), weights=weights)
        assert not report.swapped and report.left[0].kind == "Fixed"


def test_accelerate_keeps_frozen_and_tied(model, ids):
    model.network.first.weight.requires_grad_(False)
    parameters = list(model.parameters())
    llmcore.accelerate(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.head.weight is model.embedding.weight
    model(ids).sum().backward()
    assert model.network.first.weight.grad is None
    assert model.network.second.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_accelerate_other_dtypes(model, ids, dtype):
    model = model.to(dtype)
    expected = model(ids)
    report = llmcore.accelerate(model)
    assert report.structures()["rms_norm"] == 2
    # The norm computes in float32, whatever the dtype.
    tolerance = {torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float64: 1e-5}[dtype]
    got = model(ids)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def test_accelerate_a_half_precision_part(model, ids):
    class Cast(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner.bfloat16()

        def forward(self, x):
            return self.inner(x.bfloat16()).float()

    model.network = Cast(model.network)
    expected = model(ids)
    llmcore.accelerate(model)
    torch.testing.assert_close(model(ids), expected, atol=3e-2, rtol=3e-2)
    model.to(torch.bfloat16)  # casts what was swapped
    assert torch.isfinite(model.norm(torch.randn(2, 32)).float()).all()


@pytest.mark.parametrize("weights", [None, "int8"])
def test_accelerate_copies_and_pickles(model, ids, weights, tmp_path):
    llmcore.accelerate(model, weights=weights)
    with torch.no_grad():
        expected = model(ids)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
        ):
            assert torch.equal(other(ids), expected)
            assert is_swapped(other.norm)
            assert other.head.weight is other.embedding.weight


def test_accelerate_pickle_opens_in_another_process(tmp_path):
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))
    llmcore.accelerate(model)
    path = tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps(model))
    code = (
        f"import pickle; m = pickle.load(open({str(path)!r}, 'rb')); print(type(m[0]).__mro__[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert "llmcore.swap.norms.LayerNorm" in done.stdout


def test_accelerate_state_dict_round_trip(model, ids):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    llmcore.accelerate(model)
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    fresh = Model()
    fresh.load_state_dict(state)
    assert fresh.eval()(ids).allclose(model(ids), atol=1e-5)


def test_accelerate_compiles_without_a_break(model, ids):
    llmcore.accelerate(model)
    expected = model(ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), expected, atol=1e-5, rtol=1e-5)


def test_accelerate_autocast(model, ids):
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids)
        llmcore.accelerate(model)
        got = model(ids)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=6e-2, rtol=6e-2)


# Packed weights


@pytest.mark.parametrize(("weights", "limit"), [("bf16", 0.02), ("int8", 0.05), ("int4", 0.5)])
def test_accelerate_packed(model, ids, weights, limit):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids)
        report = llmcore.accelerate(model, weights=weights)
        error = (model(ids) - expected).abs().max() / expected.abs().max()
    assert 0 < error < limit
    packed = [swap for swap in report.swapped if swap.structure == f"linear, {weights}"]
    assert len(packed) == 4 and all(swap.error > 0 for swap in packed)
    assert report.memory_saved > 0.4 * sum(t.nbytes for n, t in before.items() if "act" not in n)
    assert model.head.weight is model.embedding.weight and not model.head.weight.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    report.undo()
    assert torch.equal(model(ids), expected)
    assert model.head.weight.requires_grad


def test_accelerate_packed_gradient_goes_through(model):
    llmcore.accelerate(model, weights="int8")
    x = torch.randn(2, 3, 32, requires_grad=True)
    model.network(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert model.network.first.weight.grad is None


def test_accelerate_packed_takes_new_weights(model, ids):
    other = Model().eval()
    expected = copy.deepcopy(other)
    llmcore.accelerate(expected, weights="int8")
    llmcore.accelerate(model, weights="int8")
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(model(ids), expected(ids))


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("part", [slice(None), slice(8, None)], ids=["all", "columns"])
def test_accelerate_packed_sees_values_that_were_written(model, ids, weights, part):
    """As merging an adapter writes them: neither a version nor an address tells."""
    other = copy.deepcopy(model)
    llmcore.accelerate(model, weights=weights)
    model(ids)
    for changed in (model, other):
        network = changed.network
        for linear in (network.first, network.second, network.last, changed.head):
            linear.weight.data[:, part] += 0.1
    llmcore.accelerate(other, weights=weights)
    with torch.no_grad():
        assert torch.equal(model(ids), other(ids))


def test_accelerate_packed_leaves_widths_without_a_group():
    module = nn.Sequential(nn.Linear(20, 8), nn.Linear(32, 8))
    report = llmcore.accelerate(module, weights="int8")
    assert [(left.name, "multiple of 16" in left.reason) for left in report.left] == [("0", True)]
    assert report.structures() == {"linear, int8": 1}


@pytest.mark.parametrize("weights", [None, "int8"])
def test_accelerate_stacks_of_linears(weights):
    """A subclass of nn.Linear that computes something else is no linear."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    module, x = nn.Sequential(Doubled(32, 32), nn.Linear(32, 32)), torch.randn(3, 32)
    expected = module[0](x)
    report = llmcore.accelerate(module, weights=weights)
    assert [left.kind for left in report.left] == ["Doubled"]
    assert torch.equal(module[0](x), expected)


# torch's attention


def masks(kind: str) -> dict:
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    return {
        "none": {},
        "padding": {"src_key_padding_mask": padding},
        "causal": {"src_mask": causal, "is_causal": True},
        "both": {"src_mask": causal, "src_key_padding_mask": padding},
        "bool": {"src_mask": causal.isinf()},
    }[kind]


@pytest.mark.parametrize("kind", ["none", "padding", "causal", "both", "bool"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_accelerate_encoder_layer(kind, norm_first, training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        32, 4, 48, dropout=0.0, batch_first=True, norm_first=norm_first, activation="gelu"
    ).train(training)
    x = torch.randn(2, 6, 32, requires_grad=training)
    with torch.set_grad_enabled(training):
        expected = layer(x, **masks(kind))
        report = llmcore.accelerate(layer)
        got = layer(x, **masks(kind))
    assert {"encoder_layer", "multihead_attention"} <= set(report.structures())
    valid = slice(0, 4) if "padding" in kind or kind == "both" else slice(None)
    torch.testing.assert_close(got[:, valid], expected[:, valid], atol=1e-5, rtol=1e-5)


def test_accelerate_decoder_layer():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(32, 4, 48, dropout=0.0)  # (length, batch, width)
    x, memory = torch.randn(6, 2, 32), torch.randn(5, 2, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    arguments = (x, memory, causal)
    expected = layer(*arguments, tgt_is_causal=True)
    report = llmcore.accelerate(layer)
    assert {"decoder_layer": 1, "multihead_attention": 2}.items() <= report.structures().items()
    got = layer(*arguments, tgt_is_causal=True)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_accelerate_encoder_with_nested_tensors():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        llmcore.accelerate(encoder)
        got = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_accelerate_multihead_attention_weights_are_torch_s():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 5, 32)
    expected, weights = attention(x, x, x)
    llmcore.accelerate(attention)
    got, same = attention(x, x, x)
    assert torch.equal(got, expected) and torch.equal(same, weights)
    got, none = attention(x, x, x, need_weights=False)
    assert none is None
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_accelerate_cross_entropy():
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss(ignore_index=3, label_smoothing=0.1)
    logits, target = torch.randn(4, 7, 5, requires_grad=True), torch.randint(7, (4, 5))
    expected = loss(logits, target)
    (wanted,) = torch.autograd.grad(expected, logits)
    assert llmcore.accelerate(loss).structures() == {"cross_entropy": 1}
    got = loss(logits, target)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, logits)[0], wanted)
    plain, shares = nn.CrossEntropyLoss(), logits.detach().softmax(1)
    expected = plain(logits, shares)
    llmcore.accelerate(plain)
    assert torch.equal(plain(logits, shares), expected)  # shares of classes go to torch's


# Errors


def test_accelerate_refuses_bad_arguments(model):
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        llmcore.accelerate(3)
    with pytest.raises(ValueError, match="weights: got 'int2'"):
        llmcore.accelerate(model, weights="int2")
    assert not any(is_swapped(m) for m in model.modules())
    llmcore.accelerate(model)
    with pytest.raises(ValueError, match="accelerated already"):
        llmcore.accelerate(model)


def test_accelerate_takes_back_what_fails(model, ids, monkeypatch):
    """A swap that gives something else on its small input is taken back, with the reason."""
    from llmcore.swap.norms import RMSNorm

    compute = RMSNorm._compute
    monkeypatch.setattr(RMSNorm, "_compute", lambda self, x: compute(self, x) * 1.001)
    expected = model(ids)
    report = llmcore.accelerate(model)
    assert "rms_norm" not in report.structures()
    reasons = {left.name: left.reason for left in report.left}
    assert "times what rounding explains" in reasons["norm"]
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
