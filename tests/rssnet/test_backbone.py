"""The adapter to timm: where it taps, what it removes, how it resizes, and what it refuses."""

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import register_model

from rssnet import Classes, RSSNet, RSSNetConfig
from rssnet.backbone import Backbone, inspect_backbone

TINY_VIT = {"depth": 4, "embed_dim": 48, "num_heads": 3}


def build(name="vit_tiny_patch16_224", options=None, size=(64, 96), taps=None, **arguments):
    options = TINY_VIT if options is None else options
    layout = inspect_backbone(name, options)
    return Backbone(layout=layout, taps=taps or layout.quarters, image_size=size, options=options, **arguments)


# Where features are taken.


@pytest.mark.parametrize(("depth", "index"), [(1, 0), (4, 0), (6, 1), (8, 1), (12, 2), (24, 5), (40, 9)])
def test_the_shallow_tap_of_a_plain_transformer_is_at_a_quarter_of_the_depth(depth, index):
    layout = inspect_backbone("vit_tiny_patch16_224", {"depth": depth})
    assert layout.is_plain
    assert layout.shallow.index == index
    assert [tap.index for tap in layout.deep] == [depth - 1]


def test_four_quarters_are_the_blocks_that_upernet_is_published_with():
    assert [tap.index for tap in inspect_backbone("vit_base_patch16_224").quarters] == [2, 5, 8, 11]
    assert [tap.index for tap in inspect_backbone("beit_large_patch16_224").quarters] == [5, 11, 17, 23]


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "maxvit_tiny_tf_224", "hrnet_w18_small", "resnet18"])
def test_a_pyramid_gives_its_first_stage_and_its_two_deepest(name):
    layout = inspect_backbone(name)
    assert not layout.is_plain
    assert layout.shallow.stride == 4
    assert [tap.stride for tap in layout.deep] == [16, 32]
    assert [tap.stride for tap in layout.quarters] == [4, 8, 16, 32]


def test_features_are_the_patch_tokens_of_the_tapped_blocks_without_class_and_register_tokens():
    backbone = build("vit_small_patch14_reg4_dinov2", size=(56, 84)).eval()
    images = torch.randn(2, 3, 56, 84)
    body = backbone.body
    tokens = body.norm_pre(body._pos_embed(body.patch_embed(images)))
    assert tokens.shape[1] == 1 + 4 + 4 * 6
    for block, found in zip(body.blocks, backbone(images), strict=True):
        tokens = block(tokens)
        torch.testing.assert_close(found, tokens[:, 5:].transpose(1, 2).unflatten(-1, (4, 6)))


def test_taps_come_in_the_order_asked_and_may_repeat():
    layout = inspect_backbone("vit_tiny_patch16_224", TINY_VIT)
    taps = (layout.taps[2], layout.taps[0], layout.taps[2])
    backbone = build(taps=taps).eval()
    images = torch.randn(1, 3, 64, 96)
    late, early, again = backbone(images)
    assert torch.equal(late, again)
    assert not torch.equal(late, early)
    assert torch.equal(early, build_like(backbone, (layout.taps[0],))(images)[0])


def build_like(backbone, taps):
    other = build(taps=taps).eval()
    other.load_state_dict({name: backbone.state_dict()[name] for name in other.state_dict()})
    return other


# What nothing reads is removed, or takes no gradient.


def test_blocks_after_the_last_tap_norms_and_heads_are_removed():
    layout = inspect_backbone("vit_tiny_patch16_224", TINY_VIT)
    backbone = build(taps=layout.taps[:2])
    names = dict(backbone.named_parameters())
    assert any(name.startswith("body.blocks.1.") for name in names)
    assert not any(name.startswith(("body.blocks.2.", "body.norm.", "body.head.", "body.fc_norm.")) for name in names)


def test_what_cannot_be_removed_takes_no_gradient():
    # HRNet makes its maps all at once; the one at stride 8 is not read.
    layout = inspect_backbone("hrnet_w18_small")
    backbone = build("hrnet_w18_small", {}, (32, 32), taps=(layout.shallow, *layout.deep)).train()
    torch.stack([feature.sum() for feature in backbone(torch.randn(2, 3, 32, 32))]).sum().backward()
    trainable = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    reached = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert trainable == reached
    assert len(trainable) < len(list(backbone.parameters()))


def test_it_is_the_same_whatever_mode_it_is_built_in():
    with torch.inference_mode():
        backbone = build()
    with torch.no_grad():
        other = build()
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == {
        name for name, p in other.named_parameters() if p.requires_grad
    }
    assert all(parameter.requires_grad for parameter in build().parameters())


# Image sizes.


def test_position_embeddings_are_resized_from_the_grid_that_they_had():
    backbone, larger = build(size=(64, 96)), build(size=(96, 64))
    larger.load_resized(backbone)
    expected = resample_abs_pos_embed(backbone.body.pos_embed, new_size=[6, 4], old_size=[4, 6], num_prefix_tokens=1)
    torch.testing.assert_close(larger.body.pos_embed, expected)


def test_rotary_embeddings_follow_the_image_size():
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    backbone = build("eva02_tiny_patch14_224", options, (56, 84))
    assert backbone.body.rope.get_embed().shape[0] == 4 * 6
    larger = build("eva02_tiny_patch14_224", options, (84, 84))
    larger.load_resized(backbone)
    assert larger.body.rope.get_embed().shape[0] == 6 * 6


def test_tables_of_relative_positions_are_resized_and_keep_a_smooth_bias():
    options = {"depth": 1, "embed_dim": 48, "num_heads": 2}
    backbone, larger = (
        build("beit_base_patch16_224", options, (64, 64)),
        build("beit_base_patch16_224", options, (96, 128)),
    )
    attention = backbone.body.blocks[0].attn
    with torch.no_grad():  # a bias that falls with the vertical distance, the same for every horizontal one
        vertical = (torch.arange(7.0) - 3)[:, None].expand(7, 7).reshape(-1, 1)
        attention.relative_position_bias_table[:-3] = vertical
        attention.relative_position_bias_table[-3:] = 5.0
    larger.load_resized(backbone)
    table = larger.body.blocks[0].attn.relative_position_bias_table
    assert table.shape == (11 * 15 + 3, 2)
    assert torch.equal(table[-3:], torch.full((3, 2), 5.0))  # to and from the class token: no distance to resize
    grid = table[:-3, 0].reshape(11, 15)
    assert (grid.std(dim=1) < 1e-4).all()
    assert (grid.diff(dim=0) > 0).all()
    assert grid[5, 7].abs() < 1e-4


def test_a_size_back_and_forth_is_the_same_model():
    model = RSSNet(
        RSSNetConfig(
            backbone="swin_tiny_patch4_window7_224",
            backbone_options={"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 4)},
            num_classes=3,
            image_size=(64, 96),
            decoder_width=16,
        ),
        Classes(("sky", "road", "car"), Classes.default(3).palette),
    ).eval()
    images = torch.randn(1, 3, 64, 96)
    again = model.resized((64, 96))
    assert torch.equal(again(images).logits, model(images).logits)
    assert again.classes == model.classes
    assert model.resized(64).config.image_size == 64


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_tiny_patch16_224", (64, 100), r"\(64, 100\) .* multiple of 16, such as \(64, 96\) or \(64, 112\)"),
        ("vit_tiny_patch16_224", (5, 64), r"multiple of 16, such as \(16, 64\)"),
        ("swin_tiny_patch4_window7_224", (48, 64), r"multiple of 32, such as \(32, 64\) or \(64, 64\)"),
    ],
)
def test_a_size_that_patches_do_not_divide_is_refused_with_the_next_that_they_do(name, size, message):
    with pytest.raises(ValueError, match=message):
        build(name, {}, size)


def test_images_of_another_size_than_the_backbone_was_built_for_are_refused():
    with pytest.raises(ValueError, match=r"built for images of \(64, 96\) .* not \(96, 96\).*resized"):
        build()(torch.randn(1, 3, 96, 96))


def test_a_backbone_without_positions_takes_any_multiple_of_its_stride():
    backbone = build("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, (64, 64))
    assert backbone(torch.randn(1, 3, 32, 96))[0].shape == (1, 8, 8, 24)


# Other refusals.


def test_an_unknown_backbone_is_answered_with_names_like_it():
    with pytest.raises(ValueError, match=r"no model 'vit_tiny_patch16_223'. Names like it: .*vit_tiny_patch16_224"):
        inspect_backbone("vit_tiny_patch16_223")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "vit_tiny_patch16_224.mae",
            "no weights 'mae' of vit_tiny_patch16_224; choose one of .*224.augreg_in21k, vit",
        ),
        ("vit_base_patch16_18x2_224.mae", "no weights 'mae' of .*; choose one of vit_base_patch16_18x2_224.$"),
    ],
)
def test_an_unknown_tag_of_weights_is_answered_with_those_that_there_are(name, message):
    with pytest.raises(ValueError, match=message):
        inspect_backbone(name)


def test_a_backbone_without_intermediate_features_is_answered_with_families_that_have_them():
    @register_model
    def rssnet_test_featureless(pretrained=False, **kwargs):  # noqa: ARG001
        return torch.nn.Linear(3, 3)

    with pytest.raises(ValueError, match=r"'rssnet_test_featureless' gives no intermediate features.*plain: vit"):
        inspect_backbone("rssnet_test_featureless")


def test_a_backbone_tied_to_one_size_is_refused_at_another():
    with pytest.raises(ValueError, match=r"'levit_128' cannot run on images of \(256, 256\)"):
        build("levit_128", {}, (256, 256))


def test_options_that_the_backbone_does_not_know_are_refused():
    with pytest.raises(ValueError, match=r"'vit_tiny_patch16_224' cannot be built with .*colour"):
        inspect_backbone("vit_tiny_patch16_224", {"colour": "red"})


def test_a_tap_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="cannot be tapped at 9; choose one of 0, 1, 2, 3"):
        inspect_backbone("vit_tiny_patch16_224", TINY_VIT).at(9)


# Training options.


def test_a_frozen_backbone_keeps_weights_and_statistics():
    options = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    backbone = build("convnext_atto", options, (64, 64), drop_path=0.5, frozen=True)
    backbone.train()
    images = torch.randn(2, 3, 64, 64)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
    assert torch.equal(backbone(images)[-1], backbone(images)[-1])


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = build(gradient_checkpointing=checkpointing).train()
        assert backbone.body.grad_checkpointing == checkpointing
        backbone(torch.ones(1, 3, 64, 96))[-1].square().sum().backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_drop_path_reaches_the_backbone():
    dropping = build(drop_path=0.9).train()
    images = torch.randn(2, 3, 64, 96)
    assert not torch.equal(dropping(images)[-1], dropping(images)[-1])
    dropping.eval()
    assert torch.equal(dropping(images)[-1], dropping(images)[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop_path": 0.1}, r"'hrnet_w18_small' has no stochastic depth; set drop_path to 0, not 0.1"),
        ({"gradient_checkpointing": True}, r"'hrnet_w18_small' cannot recompute its activations"),
    ],
)
def test_options_that_a_family_lacks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build("hrnet_w18_small", {}, (32, 32), **arguments)


def test_normalisation_is_the_one_of_the_backbones_name_unless_another_is_given():
    assert build().pixel_mean == (0.5, 0.5, 0.5)
    deit = build("deit3_small_patch16_224")
    assert deit.pixel_mean == pytest.approx((0.485, 0.456, 0.406))
    assert deit.pixel_std == pytest.approx((0.229, 0.224, 0.225))
    given = build(options={**TINY_VIT, "pretrained_cfg_overlay": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}})
    assert (given.pixel_mean, given.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_normalisation_comes_with_weights_of_another_size():
    backbone, larger = build(), build(size=(96, 64))
    backbone.pixel_mean, backbone.pixel_std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    larger.load_resized(backbone)
    assert (larger.pixel_mean, larger.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
