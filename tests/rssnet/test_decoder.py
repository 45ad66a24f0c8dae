"""The whole decoder: its prediction by definition, its switches, permuted classes, and where gradients go."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rssnet import (
    CrossAttentionConfig,
    LocalPathwayConfig,
    LossConfig,
    RSSNet,
    RSSNetLoss,
    SeparationConfig,
)
from rssnet.backbone import inspect_backbone
from rssnet.decoder import DeepMap, PixelEmbedding, default_width, fine_stride
from rssnet.separation import BilinearUpsampling, SpatiallyAdaptiveSeparation
from tests.rssnet.tiny_model import CONFIG, build

PYRAMID = replace(CONFIG, backbone="convnext_atto", backbone_options={"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)})


def test_logits_are_regions_times_pixels_with_bias_and_presence(images):
    model = build().double().train()
    with torch.no_grad():
        model.decoder.class_bias.copy_(torch.arange(5.0)[:, None, None])
    output = model(images.double())
    regions, pixels, presence = (output.auxiliary.regions[-1], output.auxiliary.pixels, output.auxiliary.presence[-1])
    expected = torch.einsum("bkd,bdhw->bkhw", regions, pixels)
    expected = expected + torch.arange(5.0)[:, None, None] + torch.log(presence.sigmoid())[..., None, None]
    torch.testing.assert_close(output.logits, expected)


def test_logits_start_at_the_scale_of_one(images):
    for width in (32, 256):
        logits = build(decoder_width=width).eval()(images).logits
        assert 0.01 < logits.std() < 3


def test_without_cross_attention_a_classifier_reads_the_pixels(images):
    model = build(cross_attention=CrossAttentionConfig(enabled=False)).eval()
    seen = {}
    model.decoder.embed.register_forward_hook(lambda module, inputs, pixels: seen.update(pixels=pixels))  # noqa: ARG005
    weight, bias = model.decoder.classify.weight[:, :, 0, 0], model.decoder.classify.bias
    logits = model(images).logits
    torch.testing.assert_close(logits, torch.einsum("kd,bdhw->bkhw", weight, seen["pixels"]) + bias[:, None, None])


@pytest.mark.parametrize("config", [CONFIG, PYRAMID], ids=["plain", "pyramid"])
def test_permuting_classes_permutes_logits_and_supervision(config, images):
    model = build(config).train()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for parameter in model.decoder.parameters():  # as if trained: nothing left at its initial value
            parameter.add_(torch.randn_like(parameter) * 0.05)
        before = model(images)
        decoder = model.decoder
        for per_class in (
            decoder.cross_attention.queries,
            decoder.cross_attention.attention_bias,
            decoder.class_bias,
            decoder.classify_deep.weight,
            decoder.classify_deep.bias,
        ):
            per_class.copy_(per_class[order])
        after = model(images)
    torch.testing.assert_close(after.logits, before.logits[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.auxiliary.deep_logits, before.auxiliary.deep_logits[:, order])
    for name in ("attention", "presence", "regions"):
        for part, other in zip(getattr(before.auxiliary, name), getattr(after.auxiliary, name), strict=True):
            torch.testing.assert_close(other, part[:, order], rtol=1e-4, atol=1e-5)


ABLATIONS = {
    "no local pathway": {"local_pathway": LocalPathwayConfig(enabled=False)},
    "no separation": {"separation": SeparationConfig(enabled=False)},
    "no cross-attention": {"cross_attention": CrossAttentionConfig(enabled=False)},
    "none of them": {
        "local_pathway": LocalPathwayConfig(enabled=False),
        "separation": SeparationConfig(enabled=False),
        "cross_attention": CrossAttentionConfig(enabled=False),
    },
    "affinity": {"separation": SeparationConfig(form="affinity")},
    "plain": {"separation": SeparationConfig(form="plain")},
    "groups": {"separation": SeparationConfig(groups=8)},
    "wide window": {"separation": SeparationConfig(kernel_size=5)},
    "null token": {"cross_attention": CrossAttentionConfig(null_token=True)},
    "one layer, one head": {"cross_attention": CrossAttentionConfig(layers=1, heads=1)},
    "narrow local pathway": {"local_pathway": LocalPathwayConfig(width=16, depth=0)},
}


@pytest.mark.parametrize("config", [CONFIG, PYRAMID], ids=["plain", "pyramid"])
@pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS.keys())
def test_every_ablation_trains_all_that_it_has_and_can_be_saved(config, changes, images, tmp_path):
    model = build(config, **changes).train()
    labels = torch.randint(0, 5, (2, 64, 96))
    RSSNetLoss(LossConfig(separation_supervision=0.1), 5)(model(images), labels)["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(RSSNet.from_pretrained(tmp_path)(images).logits, model(images).logits)


def test_a_switch_removes_its_module():
    model = build()
    assert isinstance(model.decoder.separation, SpatiallyAdaptiveSeparation)
    assert model.decoder.local_pathway is not None
    assert model.decoder.cross_attention is not None
    bare = build(**ABLATIONS["none of them"])
    assert isinstance(bare.decoder.separation, BilinearUpsampling)
    assert bare.decoder.local_pathway is None
    assert bare.decoder.cross_attention is None
    assert len(bare.backbone.taps) == len(model.backbone.taps) - 1


def test_separation_can_be_forced_to_bilinear_after_training(images):
    model = build().eval()
    trained = model(images).logits
    model.decoder.separation = BilinearUpsampling(ratio=model.decoder.separation.ratio)
    forced = model(images).logits
    assert not torch.equal(forced, trained)
    assert (forced - trained).abs().max() < 0.5  # it starts close to bilinear


def test_the_local_pathway_can_start_from_another_tap():
    model = build(local_pathway=LocalPathwayConfig(tap=1))
    assert [tap.index for tap in model.backbone.taps] == [1, 1]
    with pytest.raises(ValueError, match="cannot be tapped at 5; choose one of 0, 1"):
        build(local_pathway=LocalPathwayConfig(tap=5))


def test_freezing_the_backbone_leaves_the_decoder_to_learn(images):
    model = build(freeze_backbone=True).train()
    RSSNetLoss(LossConfig(), 5)(model(images), torch.zeros(2, 64, 96, dtype=torch.long))["loss"].backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())


def test_deep_map_adds_what_the_deeper_stage_says_at_the_stride_of_the_finer():
    layout = inspect_backbone(PYRAMID.backbone, PYRAMID.backbone_options)
    deep = DeepMap(taps=layout.deep, width=8)
    finer, deeper = torch.randn(1, 24, 4, 6), torch.randn(1, 32, 2, 3)
    expected = deep.projections[0](finer) + F.interpolate(deep.projections[1](deeper), size=(4, 6), mode="bilinear")
    torch.testing.assert_close(deep([finer, deeper]), expected)


def test_pixel_embedding_does_not_commute_with_upsampling():
    torch.manual_seed(0)
    embed = PixelEmbedding(width=8, stem_channels=None)
    fused = torch.randn(1, 8, 4, 4)
    fine = embed(fused, None, (8, 8))
    coarse = F.interpolate(embed(fused, None, (4, 4)), size=(8, 8), mode="bilinear")
    assert (fine - coarse).abs().max() > 0.05


@pytest.mark.parametrize(
    ("backbone", "width", "stride"),
    [
        ("vit_tiny_patch16_224", 64, 8),
        ("vit_small_patch14_dinov2", 128, 7),
        ("vit_base_patch16_224", 256, 8),
        ("beit_large_patch16_224", 256, 8),
        ("vit_small_patch8_224", 128, 4),
        ("vit_base_patch32_224", 256, 8),
        ("swin_tiny_patch4_window7_224", 128, 4),
        ("swin_base_patch4_window7_224", 256, 4),
    ],
)
def test_width_and_fine_stride_follow_the_backbone(backbone, width, stride):
    layout = inspect_backbone(backbone)
    assert default_width(layout) == width
    assert fine_stride(layout) == stride


@pytest.mark.parametrize("image_size", [(16, 16), (32, 16), (16, 64)])
def test_every_head_takes_a_plain_map_one_token_high_or_wide(image_size):
    for head in ("rssnet", "linear", "upernet"):
        model = RSSNet(replace(CONFIG, image_size=image_size, head=head)).eval()
        logits = model(torch.randn(1, 3, *image_size)).logits
        assert logits.shape[-2:] == (image_size[0] // 4, image_size[1] // 4)
        assert logits.isfinite().all()
