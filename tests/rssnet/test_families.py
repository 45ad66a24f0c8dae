"""One contract for every family of backbones and every head."""

# ruff: noqa: RUF012 (the classes are declarations: nothing changes their options)

import pytest
import torch

from rssnet import RSSNet, RSSNetConfig
from tests.rssnet.model_contract import ModelContract

# Plain transformers: one stride.


class TestViT(ModelContract):
    backbone = "vit_tiny_patch16_224"
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    other_size = (48, 80)
    traced_heads = ("rssnet", "linear", "upernet")


class TestDeiT3(ModelContract):
    backbone = "deit3_small_patch16_224"
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    other_size = (48, 80)


class TestMAE(ModelContract):
    backbone = "vit_base_patch16_224.mae"
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    other_size = (48, 80)
    heads = ("rssnet",)


class TestSigLIP(ModelContract):
    backbone = "vit_base_patch16_siglip_224"
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    other_size = (48, 80)


class TestDINOv2(ModelContract):
    backbone = "vit_small_patch14_dinov2"
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    image_size = (56, 84)
    other_size = (42, 70)


class TestDINOv2WithRegisters(ModelContract):
    backbone = "vit_small_patch14_reg4_dinov2"
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    image_size = (56, 84)
    other_size = (42, 70)
    heads = ("rssnet",)


class TestDINOv3(ModelContract):
    backbone = "vit_small_patch16_dinov3"
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    other_size = (48, 80)


class TestBEiT(ModelContract):
    backbone = "beit_base_patch16_224"
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    other_size = (48, 80)


class TestBEiTv2(ModelContract):
    backbone = "beitv2_base_patch16_224"
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    other_size = (48, 80)
    heads = ("rssnet",)


class TestEVA02(ModelContract):
    backbone = "eva02_tiny_patch14_224"
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    image_size = (56, 84)
    other_size = (42, 70)


class TestViTWithRelativePositions(ModelContract):
    backbone = "vit_relpos_small_patch16_224"
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    other_size = (48, 80)
    heads = ("rssnet",)


class TestXCiT(ModelContract):
    backbone = "xcit_nano_12_p16_224"
    options = {"depth": 2}
    other_size = (48, 80)
    has_batch_norm = True


# Pyramids: one stride per stage.


class TestSwin(ModelContract):
    backbone = "swin_tiny_patch4_window7_224"
    options = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 4)}


class TestSwinV2(ModelContract):
    backbone = "swinv2_tiny_window8_256"
    options = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 4)}


class TestPVTv2(ModelContract):
    backbone = "pvt_v2_b0"
    options = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 40, 64)}


class TestTwinsSVT(ModelContract):
    backbone = "twins_svt_small"
    options = {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}


class TestTwinsPCPVT(ModelContract):
    backbone = "twins_pcpvt_small"
    options = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}
    heads = ("rssnet",)


class TestHiera(ModelContract):
    backbone = "hiera_tiny_224"
    options = {"stages": (1, 1, 1, 1), "embed_dim": 24}


class TestMaxViT(ModelContract):
    backbone = "maxvit_tiny_tf_224"
    options = {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": 16}
    has_batch_norm = True


class TestMViTv2(ModelContract):
    backbone = "mvitv2_tiny"
    image_size = (64, 64)  # the family takes squares only
    other_size = (96, 96)


class TestDaViT(ModelContract):
    backbone = "davit_tiny"
    options = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}


class TestTinyViT(ModelContract):
    backbone = "tiny_vit_5m_224"
    options = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}
    has_batch_norm = True


class TestEfficientViT(ModelContract):
    backbone = "efficientvit_b0"
    has_batch_norm = True


class TestConvNeXt(ModelContract):
    backbone = "convnext_atto"
    options = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}


class TestConvNeXtV2(ModelContract):
    backbone = "convnextv2_atto"
    options = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    heads = ("rssnet",)


class TestHRNet(ModelContract):
    backbone = "hrnet_w18_small"
    has_batch_norm = True


class TestResNet(ModelContract):
    backbone = "resnet18"
    has_batch_norm = True
    heads = ("rssnet",)


# A whole model as published, at the size that it is used at, without memory.


@pytest.mark.parametrize(
    ("backbone", "image_size"),
    [("eva02_large_patch14_448", 560), ("swin_large_patch4_window12_384", 640), ("maxvit_large_tf_512", 640)],
)
def test_published_sizes_build_on_the_meta_device(backbone, image_size):
    with torch.device("meta"):
        model = RSSNet(RSSNetConfig(backbone=backbone, num_classes=150, image_size=image_size)).eval()
        assert model(torch.empty(1, 3, image_size, image_size)).logits.shape == (
            1,
            150,
            image_size // 4,
            image_size // 4,
        )
