"""DCA against einsum, and what it must keep: permutation of classes, regions that differ."""

import math

import pytest
import torch

from rssnet.cross_attention import DiscriminativeCrossAttention, DiscriminativeLayer, RegionState


def attend_by_einsum(query, key, value, heads):
    """softmax(q_h k_h^T / sqrt(d_h)) v_h, head by head."""
    width = query.shape[-1] // heads
    gathered = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        products = torch.einsum("bkd,bnd->bkn", query[..., part], key[..., part]) / math.sqrt(width)
        gathered.append(torch.einsum("bkn,bnd->bkd", products.softmax(-1), value[..., part]))
    return torch.cat(gathered, -1)


def layer_by_einsum(layer, regions, tokens):
    query, key, value = layer.query(layer.norm_cross(regions)), layer.key(tokens), layer.value(tokens)
    if layer.null_key is not None:
        null = layer.null_key.expand(len(tokens), 1, -1)
        key, value = torch.cat([key, null], 1), torch.cat([value, torch.zeros_like(null)], 1)
    regions = regions + layer.project_cross(attend_by_einsum(query, key, value, layer.heads))
    own = layer.query_key_value(layer.norm_self(regions))
    width = regions.shape[-1]
    mixed = attend_by_einsum(own[..., :width], own[..., width : 2 * width], own[..., 2 * width :], layer.heads)
    regions = regions + layer.project_self(mixed)
    return regions + layer.mlp(layer.norm_mlp(regions))


def attention(num_classes=5, width=16, layers=3, heads=4, **options):
    torch.manual_seed(0)
    return DiscriminativeCrossAttention(
        num_classes=num_classes, width=width, layers=layers, heads=heads, **options
    ).double()


@pytest.mark.parametrize("null_token", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_layer_is_its_definition(null_token, heads):
    torch.manual_seed(0)
    layer = DiscriminativeLayer(width=16, heads=heads, mlp_ratio=2.0, null_token=null_token).double()
    regions, tokens = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 12, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(regions, tokens).regions, layer_by_einsum(layer, regions, tokens))


def test_layers_follow_one_another_from_the_queries():
    module = attention()
    fused = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    tokens = module.norm_tokens(fused.flatten(2).transpose(1, 2))
    regions = module.queries[None].expand(2, -1, -1)
    states = module(fused)
    assert len(states) == 3
    for layer, state in zip(module.layers, states, strict=True):
        regions = layer_by_einsum(layer, regions, tokens)
        torch.testing.assert_close(state.regions, module.norm(regions))


def test_attention_logits_are_the_mean_over_heads_and_a_bias_per_class():
    module = attention()
    with torch.no_grad():
        module.attention_bias.copy_(torch.arange(5.0)[:, None])
    fused = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    state = module(fused)[0]
    layer = module.layers[0]
    assert isinstance(layer, DiscriminativeLayer)
    tokens = module.norm_tokens(fused.flatten(2).transpose(1, 2))
    query = layer.query(layer.norm_cross(module.queries[None].expand(2, -1, -1))).reshape(2, 5, 4, 4)
    key = layer.key(tokens).reshape(2, 12, 4, 4)
    per_head = torch.einsum("bkhd,bnhd->bhkn", query, key) / math.sqrt(4)
    expected = per_head.mean(1) + torch.arange(5.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(module.attention_logits(state), expected)


def test_attention_masks_start_unlikely():
    module = attention(num_classes=150)
    masks = module.attention_logits(module(torch.randn(1, 16, 8, 8, dtype=torch.float64))[0]).sigmoid()
    assert masks.mean() < 0.1


def test_gradients():
    module = attention(num_classes=2, width=4, layers=1, heads=2, null_token=True)
    fused = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)

    def outcome(fused):
        (state,) = module(fused)
        return state.regions, module.attention_logits(state), module.presence_logits(state)

    assert torch.autograd.gradcheck(outcome, (fused,))


def test_permuting_classes_permutes_regions_attention_and_presence():
    module = attention()
    fused = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    before = module(fused)[-1]
    order = torch.tensor([3, 0, 4, 1, 2])
    parts = (before.regions, module.attention_logits(before), module.presence_logits(before))
    with torch.no_grad():
        module.queries.copy_(module.queries[order])
        module.attention_bias.copy_(module.attention_bias[order])
    after = module(fused)[-1]
    permuted = (after.regions, module.attention_logits(after), module.presence_logits(after))
    for part, other in zip(parts, permuted, strict=True):
        torch.testing.assert_close(other, part[:, order])


def test_regions_differ_at_the_start():
    regions = attention(num_classes=20, width=64)(torch.randn(1, 64, 8, 8, dtype=torch.float64))[-1].regions[0]
    regions = torch.nn.functional.normalize(regions, dim=-1)
    cosines = (regions @ regions.T)[~torch.eye(20, dtype=torch.bool)]
    assert cosines.mean() < 0.5


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"heads must divide the decoder's width, 16; 3 does not"):
        attention(heads=3)


def test_attention_does_not_overflow_in_float16_where_the_product_alone_would():
    module = attention(width=64).half()
    query, key = torch.full((1, 5, 64), 40.0).half(), torch.full((1, 6, 64), 40.0).half()  # 64 * 40 * 40 > 65504
    logits = module.attention_logits(RegionState(regions=query, query=query, key=key))
    torch.testing.assert_close(logits, torch.full_like(logits, 40 * 40 * 64 / 16 - 3), rtol=1e-3, atol=0)
