"""Every option of a decoder keeps the laws: the past is the past, bits are bits, it learns."""

import copy
from itertools import pairwise

import pytest
import torch
from model_shapes import FAMILIES, GEMMA2

import llmcore
from llmcore.models import Decoder, Encoder, EncoderDecoder, KVCache, PagedKVCache
from llmcore.models.packed import pack_weights
from llmcore.models.plan import refuses_config

POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "relative", "none")
OPTIONS = {
    **{f"positions_{p}": {"positions": p} for p in POSITIONS},
    **{f"placement_{p}": {"norm_placement": p} for p in ("post", "both", "parallel")},
    "parallel_layer_norm": {
        "norm": "layer_norm",
        "norm_placement": "parallel",
        "bias": True,
        "rotary_width": 4,
    },
    "rotary_width": {"rotary_width": 6},
    "rotary_window": {"window": 5, "full_every": 2, "window_rope_theta": 100.0, "rotary_width": 2},
    "layer_norm": {"norm": "layer_norm", "norm_placement": "both", "bias": True},
    **{
        f"activation_{a}": {"activation": a} for a in ("geglu", "gelu", "gelu_tanh", "relu", "silu")
    },
    "multi_head": {"kv_heads": 4},
    "multi_query": {"kv_heads": 1},
    "bias": {"bias": True},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True},
    "norm_offset": {"norm_offset": True},
    "window": {"window": 5},
    "alternating": {"window": 5, "full_every": 2, "window_rope_theta": 100.0},
    "alibi_window": {"window": 5, "positions": "alibi"},
    "relative_window": {"window": 5, "positions": "relative"},
    "scale": {"attention_scale": 0.5},
    "softcaps": {"attention_softcap": 5.0, "logit_softcap": 3.0},
    "scales": {"embedding_scale": 2.0, "logit_scale": 0.5},
    "embedding_norm": {"embedding_norm": True},
    "head": {"tied_embeddings": False, "head_bias": True},
    "experts": {"experts": 4, "experts_per_token": 2},
    "one_expert": {"experts": 3, "experts_per_token": 1},
    "gemma2": GEMMA2,
}


def random_ids(*shape, seed=0):
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=OPTIONS)
def decoder(request, tiny_decoder):
    return tiny_decoder(**OPTIONS[request.param])


@torch.no_grad()
@pytest.mark.usefixtures("native_kernels")
def test_option_future_never_changes_the_past(decoder):
    ids = random_ids(2, 24)
    changed = ids.clone()
    changed[:, 13:] = 299 - changed[:, 13:]
    whole, other = decoder(ids), decoder(changed)
    assert torch.equal(whole[:, :13], other[:, :13])
    assert (whole[:, 13:] != other[:, 13:]).any(dim=-1).all()
    for length in (1, 7, 20):
        assert torch.equal(decoder(ids[:, :length]), whole[:, :length])


@torch.no_grad()
@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("kind", [KVCache, PagedKVCache])
def test_option_cached_batched_padded_is_plain(decoder, kind):
    if kind is PagedKVCache and decoder.config.positions == "relative":
        with pytest.raises(ValueError, match="relative positions"):
            kind(decoder.config, 2)
        return
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    more = random_ids(2, 4, seed=1)
    cache = kind(decoder.config, 2)
    logits = [decoder(ids, cache, mask)[mask]]
    logits += [decoder(token, cache) for token in more.split(1, dim=1)]
    rows = [torch.cat((ids[b, mask[b]], more[b]))[None] for b in range(2)]
    plain = [decoder(row)[0] for row in rows]
    assert torch.equal(logits[0], torch.cat([plain[0][:7], plain[1][:12]]))
    steps = torch.cat(logits[1:], dim=1)
    assert torch.equal(steps[0], plain[0][7:]) and torch.equal(steps[1], plain[1][12:])


def test_option_learns(decoder):
    model = copy.deepcopy(decoder).train()
    ids = random_ids(4, 12)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = model.loss(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_option_loss_is_that_of_the_logits(decoder):
    ids = random_ids(2, 9)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -100
    expected = torch.nn.functional.cross_entropy(
        decoder(ids).flatten(0, 1), targets.flatten(), label_smoothing=0.1
    )
    found = decoder.loss(ids, targets, label_smoothing=0.1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_option_packed_documents_are_alone(decoder):
    """Documents of one row, and one that goes on in the next row: each as if by itself."""
    ids, ends = random_ids(2, 10), [0, 4, 13, 20]
    cu_seqlens = torch.tensor(ends)
    if decoder.config.positions in ("alibi", "relative"):
        with pytest.raises(ValueError, match="packed documents don't go with"):
            decoder(ids, cu_seqlens=cu_seqlens)
        return
    found = decoder(ids, cu_seqlens=cu_seqlens).flatten(0, 1)
    for start, end in pairwise(ends):
        alone = decoder(ids.flatten()[None, start:end])[0]
        torch.testing.assert_close(found[start:end], alone, atol=1e-5, rtol=1e-5)
    targets = ids.roll(-1, dims=1)
    expected = torch.nn.functional.cross_entropy(found, targets.flatten())
    torch.testing.assert_close(decoder.loss(ids, targets, cu_seqlens=cu_seqlens), expected)


@pytest.mark.skipif(llmcore.native.module is None, reason="no native pass to refuse anything")
@torch.no_grad()
def test_option_is_known_or_refused_by_the_native_pass(decoder):
    """Its own logits are the modules' wherever it takes a config, and the rest it refuses."""
    cache = KVCache(decoder.config, 1)
    ids = random_ids(1, 9)
    logits = decoder(ids, cache)
    assert (cache.plan is None) == bool(refuses_config(decoder.config))
    assert torch.equal(logits, decoder(ids))


def test_native_pass_knows_what_it_did_before(tiny_decoder):
    taken = {name for name, o in OPTIONS.items() if not refuses_config(tiny_decoder(**o).config)}
    assert taken == {
        "positions_rope", "positions_learned", "placement_both", "placement_parallel",
        "parallel_layer_norm", "rotary_width", "rotary_window", "layer_norm", "activation_geglu",
        "activation_gelu", "activation_gelu_tanh", "activation_relu", "multi_head", "multi_query",
        "bias", "qkv_bias", "qk_norm", "norm_offset", "window", "alternating", "scale", "softcaps",
        "head", "gemma2",
    }  # fmt: skip


def test_options_combine(tiny_model):
    """Positions, placements, norms and activations in every combination, of every model."""
    ids = random_ids(2, 6)
    for positions in POSITIONS:
        for placement in ("pre", "post", "both", "parallel"):
            for norm, activation in (("rms_norm", "geglu"), ("layer_norm", "relu")):
                shape = {"positions": positions, "norm_placement": placement, "norm": norm,
                         "activation": activation, "layers": 1, "start_id": 0}  # fmt: skip
                loss = tiny_model(Decoder, **shape).loss(ids, ids)
                loss = loss + tiny_model(EncoderDecoder, **shape).loss(ids, ids, ids)
                loss = loss + tiny_model(Encoder, **shape)(ids).square().mean()
                loss.backward()
                assert torch.isfinite(loss)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_blocks_give_the_same_gradients(tiny_model, name):
    kind, changes = FAMILIES[name]
    ids = random_ids(2, 9)
    grads = []
    for checkpointed in (False, True):
        model = tiny_model(kind, dropout=0.2, std=0.2, **changes).train()
        for module in model.modules():
            if hasattr(module, "checkpoint_blocks"):
                module.checkpoint_blocks = checkpointed
        torch.manual_seed(1)
        if kind is Encoder:
            loss = model.masked_language_loss(model(ids), ids)
        else:
            loss = model.loss(ids, ids, ids) if kind is EncoderDecoder else model.loss(ids, ids)
        loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.equal(plain, again)


def test_dropout_is_for_training(tiny_decoder):
    model, ids = tiny_decoder(dropout=0.5), random_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(model(ids), tiny_decoder()(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))
        cache = KVCache(model.config, 1)
        assert not torch.equal(model(ids, cache)[:, -1], tiny_decoder()(ids)[:, -1])


def test_experts_balance_loss(tiny_decoder):
    """1 for tokens spread evenly, towards E where they all choose one; only in training."""
    model, ids = tiny_decoder(experts=4, experts_per_token=1, layers=1), random_ids(4, 60)
    router = model.blocks[0].feed_forward.router
    plain = model.loss(ids, ids)
    model.train()
    even = (model.loss(ids, ids) - plain).item() / 0.01
    with torch.no_grad():
        router.weight[1:] = -router.weight[:1].abs()
        router.weight[0] = router.weight[0].abs()
    assert 0.9 < even < 2.5
    _, [balance] = model.run(model.embed(ids, torch.float32).abs() * 0 + 1)
    assert 2.5 < balance.item() <= 4.0


def passes(model, ids):
    """What each kind of model makes of ids, and of one token more over a cache."""
    if isinstance(model, Encoder):
        return [model(ids)]
    decoder = model if isinstance(model, Decoder) else model.decoder
    cache = KVCache(decoder.config, len(ids))
    if decoder is not model:
        cache.source = model.read(ids)
    return [decoder(ids[:, :-1], cache), decoder(ids[:, -1:], cache)]


# Bounds of the error, root mean square, as a share of the logits' spread; Gemma 3 comes nearest,
# with 0.041 and 0.090: its norms of queries and keys magnify roundings.
DTYPES = {torch.bfloat16: 0.08, torch.float64: 1e-4}
PACKED = {"bf16": 0.04, "int8": 0.15}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_family_in_other_dtypes_and_packed(tiny_model, name):
    kind, changes = FAMILIES[name]
    ids = random_ids(2, 9)
    model = tiny_model(kind, std=0.1, **changes)
    expected = passes(model, ids)
    forms = [(copy.deepcopy(model).to(dtype), bound) for dtype, bound in DTYPES.items()]
    for form, bound in PACKED.items():
        forms.append((copy.deepcopy(model), bound))
        pack_weights(forms[-1][0], form)
    for twin, bound in forms:
        for found, exact in zip(passes(twin, ids), expected, strict=True):
            assert found.dtype == next(twin.parameters()).dtype
            assert (found - exact).square().mean().sqrt() < bound * exact.std()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_family_compiles_whole(tiny_model, name):
    """One graph, forward and backward, with padding (aot_eager needs no compiler)."""
    kind, changes = FAMILIES[name]
    model, ids = tiny_model(kind, std=0.1, **{**changes, "layers": 2}), random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    arguments = {Decoder: (ids, None, mask), Encoder: (ids, mask)}.get(kind, (ids, ids, mask))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    grads = []
    for called in (model, compiled):
        model.zero_grad()
        found = called(*arguments)
        found.square().mean().backward()
        given = (p.grad for p in model.parameters() if p.grad is not None)
        grads.append([found.detach(), *(gradient.clone() for gradient in given)])
    for plain, other in zip(*grads, strict=True):
        torch.testing.assert_close(plain, other, atol=1e-4, rtol=1e-4)
