"""The config: what it refuses, and that JSON gives back what went in."""

import json
from dataclasses import fields

import pytest

from rssnet import CrossAttentionConfig, LocalPathwayConfig, LossConfig, RSSNetConfig, SeparationConfig


def test_json_gives_back_the_same_config():
    config = RSSNetConfig(
        backbone="swin_tiny_patch4_window7_224",
        num_classes=7,
        image_size=(64, 96),
        backbone_options={"depths": [1, 1, 1, 1]},
        separation=SeparationConfig(form="affinity", groups=4),
        local_pathway=LocalPathwayConfig(enabled=False),
        cross_attention=CrossAttentionConfig(null_token=True),
    )
    assert RSSNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_side_is_a_square():
    assert RSSNetConfig(image_size=96).image_hw == (96, 96)
    assert RSSNetConfig(image_size=(64, 96)).image_hw == (64, 96)


def test_an_unknown_field_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"SeparationConfig has no field kernel; its fields are .*kernel_size"):
        RSSNetConfig.from_dict({"backbone": "vit_tiny_patch16_224", "separation": {"kernel": 3}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RSSNetConfig(num_classes=1), "num_classes must be 2 or more, not 1"),
        (lambda: RSSNetConfig(head="fcn"), "head must be one of rssnet, linear, upernet, not 'fcn'"),  # pyright: ignore
        (lambda: RSSNetConfig(image_size=0), "image_size must be positive, not 0"),
        (lambda: RSSNetConfig(image_size=(1, 2, 3)), "image_size must be a side or"),  # pyright: ignore
        (lambda: RSSNetConfig(drop_path=1.0), "drop_path must be in"),
        (lambda: RSSNetConfig(decoder_width=4), "decoder_width must be 8"),
        (lambda: RSSNetConfig(backbone_options={"img_size": 64}), "Set image_size instead of img_size"),
        (lambda: RSSNetConfig(backbone_options={"drop_path_rate": 0.1}), "Set drop_path instead of drop_path_rate"),
        (lambda: LocalPathwayConfig(kernel_size=4), "local_pathway.kernel_size must be an odd number"),
        (lambda: LocalPathwayConfig(depth=-1), "local_pathway.depth must be 0 or more"),
        (lambda: SeparationConfig(kernel_size=2), "separation.kernel_size must be an odd number"),
        (lambda: SeparationConfig(kernel_size=1), "separation.kernel_size must be 3 or more"),
        (lambda: SeparationConfig(groups=0), "separation.groups must be 1 or more"),
        (lambda: SeparationConfig(max_gate=0), "separation.max_gate must be above 0"),
        (lambda: SeparationConfig(form="magic"), "separation.form must be one of"),  # pyright: ignore
        (lambda: CrossAttentionConfig(layers=0), "cross_attention.layers must be 1 or more"),
        (lambda: CrossAttentionConfig(heads=0), "cross_attention.heads must be 1 or more"),
        (lambda: CrossAttentionConfig(mlp_ratio=0), "cross_attention.mlp_ratio must be above 0, not 0"),
        (lambda: SeparationConfig(kernel_size=3.0), "separation.kernel_size must be a whole number, not 3.0"),  # pyright: ignore
        (lambda: RSSNetConfig(image_size=(64.7, 96)), "image_size must be a whole number, not 64.7"),  # pyright: ignore
        (lambda: RSSNetConfig(image_size=512.5), "image_size must be a whole number, not 512.5"),  # pyright: ignore
        (lambda: RSSNetConfig(num_classes=2.5), "num_classes must be a whole number, not 2.5"),  # pyright: ignore
        (lambda: RSSNetConfig.from_dict({"num_classes": "3"}), "num_classes must be a whole number, not '3'"),
        (lambda: RSSNetConfig.from_dict({"drop_path": "much"}), "RSSNetConfig has a value of a wrong type"),
        (lambda: RSSNetConfig.from_dict({"separation": None}), "RSSNetConfig.separation must be a group of fields"),
        (lambda: LossConfig(auxiliary=-1), "auxiliary must be finite and not below 0, not -1"),
        (lambda: LossConfig(attention_bce=float("nan")), "attention_bce must be finite and not below 0, not nan"),
        (lambda: LossConfig(class_weights=[1.0, -1.0]), "class_weights must be finite and not below 0, not -1.0"),
        (lambda: LossConfig(temperature=0), "temperature must be above 0"),
        (lambda: LossConfig(label_smoothing=1), "label_smoothing must be in"),
        (lambda: LossConfig(hardest_fraction=0), "hardest_fraction must be in"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "config", [RSSNetConfig, LocalPathwayConfig, SeparationConfig, CrossAttentionConfig, LossConfig]
)
def test_help_explains_every_field(config):
    documented = {line.strip().split(":")[0] for line in config.__doc__.splitlines() if ":" in line}
    assert {field.name for field in fields(config)} <= documented
