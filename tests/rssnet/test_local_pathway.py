"""The local pathway against its definition, and that it takes from the backbone's shallow layers only."""

import pytest
import torch
import torch.nn.functional as F

from rssnet import RSSNet, RSSNetConfig
from rssnet.local_pathway import DiscrepancyBlock, LocalPathway, local_discrepancy


def discrepancy_by_loops(features, kernel_size):
    height, width = features.shape[-2:]
    reach = kernel_size // 2
    result = torch.empty_like(features)
    for y in range(height):
        for x in range(width):
            near = [
                features[:, :, min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)]
                for dy in range(-reach, reach + 1)
                for dx in range(-reach, reach + 1)
            ]
            result[:, :, y, x] = features[:, :, y, x] - torch.stack(near).mean(0)
    return result


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (4, 3)])
def test_discrepancy_is_what_a_location_has_beyond_its_neighbourhood(kernel_size, size):
    features = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(local_discrepancy(features, kernel_size), discrepancy_by_loops(features, kernel_size))


def test_a_constant_map_has_no_discrepancy_even_at_borders():
    assert local_discrepancy(torch.full((1, 2, 5, 4), 3.0), 3).abs().max() < 1e-6


def test_block_is_its_definition():
    torch.manual_seed(0)
    block = DiscrepancyBlock(width=4, kernel_size=3, layer_scale=0.1).double()
    features = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    joined = torch.cat([features, discrepancy_by_loops(features, 3)], dim=1)
    assert block.reduce.bias is not None
    assert block.mix.bias is not None
    assert block.expand.bias is not None
    w1, w2 = block.reduce.weight[:, :, 0, 0], block.expand.weight[:, :, 0, 0]
    hidden = torch.einsum("oc,bchw->bohw", w1, joined) + block.reduce.bias[:, None, None]
    padded = F.pad(hidden, (1, 1, 1, 1))
    mixed = sum(
        padded[:, :, dy : dy + 5, dx : dx + 6] * block.mix.weight[:, 0, dy, dx, None, None]
        for dy in range(3)
        for dx in range(3)
    )
    mixed = mixed + block.mix.bias[:, None, None]
    active = 0.5 * mixed * (1 + torch.erf(mixed / 2**0.5))
    branch = torch.einsum("oc,bchw->bohw", w2, active) + block.expand.bias[:, None, None]
    torch.testing.assert_close(block(features), features + 0.1 * branch)


def test_block_gradients():
    block = DiscrepancyBlock(width=2, kernel_size=3, layer_scale=0.5).double()
    features = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (features,))


@pytest.mark.parametrize(("stride", "size"), [(4, (64, 96)), (7, (56, 84)), (8, (64, 96)), (16, (64, 96))])
def test_every_stride_gives_its_grid(stride, size):
    pathway = LocalPathway(shallow_channels=6, width=16, depth=1, kernel_size=3, stride=stride, layer_scale=0.1)
    shallow = torch.randn(1, 6, size[0] // 14, size[1] // 14)
    stem, features = pathway(torch.randn(1, 3, *size), shallow)
    assert features.shape == (1, 16, size[0] // stride, size[1] // stride)
    assert stem.shape == (1, 8, -(-size[0] // 4), -(-size[1] // 4))


@pytest.mark.parametrize("frozen_deep_layers", [False, True])
def test_nothing_flows_back_from_the_local_pathway_beyond_its_tap(frozen_deep_layers):
    config = RSSNetConfig(
        backbone="vit_tiny_patch16_224", backbone_options={"depth": 8}, num_classes=3, image_size=64, decoder_width=16
    )
    model = RSSNet(config).train()
    images = torch.randn(1, 3, 64, 64)
    shallow, deep = model.backbone(images)
    local = model.decoder.local_pathway(images, shallow).map
    if frozen_deep_layers:  # the counter-check: the deep map does reach the last block
        model.decoder.deep([deep]).sum().backward()
    else:
        local.sum().backward()
    reached = {
        index
        for index, block in enumerate(model.backbone.body.blocks)
        if any(parameter.grad is not None and parameter.grad.any() for parameter in block.parameters())
    }
    assert model.backbone.taps[0].index == 1
    assert reached == (set(range(8)) if frozen_deep_layers else {0, 1})
