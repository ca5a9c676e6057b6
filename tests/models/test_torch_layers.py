"""The 2017 transformer against PyTorch's own: nn.TransformerEncoder and nn.TransformerDecoder."""

import pytest
import torch
from torch import nn

from llmcore.models import Decoder, Encoder, EncoderDecoder

SHAPE = {"kv_heads": 4, "norm": "layer_norm", "bias": True, "start_id": 0}


def copy_attention(own, theirs):
    theirs.in_proj_weight.copy_(own.qkv.weight)
    theirs.in_proj_bias.copy_(own.qkv.bias)
    theirs.out_proj.load_state_dict(own.output.state_dict())


def copy_block(own, theirs):
    copy_attention(own.attention, theirs.self_attn)
    norms = [own.attention_norm, own.feed_forward_norm]
    if own.cross_attention is not None:
        cross = own.cross_attention
        theirs.multihead_attn.in_proj_weight.copy_(torch.cat((cross.q.weight, cross.kv.weight)))
        theirs.multihead_attn.in_proj_bias.copy_(torch.cat((cross.q.bias, cross.kv.bias)))
        theirs.multihead_attn.out_proj.load_state_dict(cross.output.state_dict())
        norms.insert(1, own.cross_attention_norm)
    for i, norm in enumerate(norms):
        getattr(theirs, f"norm{i + 1}").load_state_dict(norm.state_dict())
    theirs.linear1.load_state_dict(own.feed_forward.up.state_dict())
    theirs.linear2.load_state_dict(own.feed_forward.down.state_dict())


def stock(stack, layer_class, stack_class, activation):
    """torch's stack with the weights of ours."""
    pre = stack.config.norm_placement == "pre"
    layer = layer_class(
        32, 4, 48, dropout=0.0, activation=activation, batch_first=True, norm_first=pre
    )
    options = {"enable_nested_tensor": False} if stack_class is nn.TransformerEncoder else {}
    theirs = stack_class(layer, 3, norm=nn.LayerNorm(32) if pre else None, **options).eval()
    with torch.no_grad():
        for own, other in zip(stack.blocks, theirs.layers, strict=True):
            copy_block(own, other)
        if pre:
            theirs.norm.load_state_dict(stack.norm.state_dict())
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_torch_encoder_and_decoder(tiny_model, placement, activation):
    # No positions: torch's layers have none, the models add theirs to the vectors before.
    shape = {**SHAPE, "norm_placement": placement, "activation": activation, "positions": "none"}
    model = tiny_model(EncoderDecoder, std=0.1, **shape)
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(2, 11, 32, generator=generator)
    target = torch.randn(2, 7, 32, generator=generator)
    lengths = torch.tensor([11, 6])
    padding = torch.arange(11) >= lengths[:, None]

    encoder = stock(model.encoder, nn.TransformerEncoderLayer, nn.TransformerEncoder, activation)
    expected = encoder(source, src_key_padding_mask=padding)
    hidden, _ = model.encoder.run(source, lengths)
    kept = ~padding
    assert expected[kept].std() > 0.3
    torch.testing.assert_close(hidden[kept], expected[kept], atol=1e-5, rtol=0)

    decoder = stock(model.decoder, nn.TransformerDecoderLayer, nn.TransformerDecoder, activation)
    expected = decoder(
        target,
        hidden,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(7),
        tgt_is_causal=True,
        memory_key_padding_mask=padding,
    )
    found, _ = model.decoder.run(target, source=model.decoder.read(hidden, lengths))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_cross_attention_weights(tiny_model):
    model = tiny_model(EncoderDecoder, **SHAPE)
    generator = torch.Generator().manual_seed(0)
    ids, target = (torch.randint(300, (2, n), generator=generator) for n in (9, 5))
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    weights = model.cross_attention(ids, target, mask)
    assert weights.shape == (3, 2, 4, 5, 9)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 2, 4, 5))
    assert weights[:, 1, :, :, 4:].abs().max() == 0
    # The last layer's, by the definition, from what its attention is given.
    block, seen = model.decoder.blocks[-1], []
    hook = block.cross_attention.register_forward_hook(lambda m, args, y: seen.append((args, y)))
    model(ids, target, mask)
    hook.remove()
    (_, now), output = seen[0]
    y = weights[-1] @ now.source.values[-1].repeat_interleave(1, dim=1)
    expected = block.cross_attention.output(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_encoder_outputs(tiny_model):
    model = tiny_model(Encoder, outputs=("pooler", "masked_language"), positions="learned")
    ids = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(0))
    hidden = model(ids)
    targets = torch.full((2, 8), -100)
    targets[0, 3], targets[1, 5] = 7, 9
    logits = model.masked_language(hidden)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.masked_language_loss(hidden, targets), expected)
    assert model.pooled(hidden).shape == (2, 32)
    with pytest.raises(ValueError, match=r"no next_sentence: config\.outputs is \('pooler', "):
        model.next_sentence(hidden)
    with pytest.raises(ValueError, match="token_types: the model has none"):
        model(ids, token_types=ids)
    bare = tiny_model(Encoder)
    for call in (bare.pooled, bare.masked_language):
        with pytest.raises(ValueError, match="the encoder has no"):
            call(hidden)
    assert not isinstance(bare, Decoder) and bare.head is None


@torch.no_grad()
@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "alibi", "relative"])
def test_encoder_padded_is_alone(tiny_model, positions):
    model = tiny_model(Encoder, positions=positions, token_types=2, window=6)
    generator = torch.Generator().manual_seed(0)
    ids, types = (torch.randint(n, (3, 9), generator=generator) for n in (300, 2))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 4:] = mask[1, :3] = False
    hidden = model(ids, mask, types)
    for b in range(3):
        alone = model(ids[b : b + 1, mask[b]], token_types=types[b : b + 1, mask[b]])[0]
        assert torch.equal(hidden[b, mask[b]], alone)
        assert alone.isfinite().all()
