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
        (
            lambda: RSSNetConfig(image_size=(1, 2, 3)),  # pyright: ignore
            r"image_size must be a whole number or \[a whole number, a whole number\], not",
        ),
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
        (lambda: RSSNetConfig(image_size=(64.7, 96)), r"image_size\[0\] must be a whole number, not 64.7"),  # pyright: ignore
        (lambda: RSSNetConfig(image_size=512.5), "image_size must be a whole number or .*, not 512.5"),  # pyright: ignore
        (lambda: RSSNetConfig(num_classes=2.5), "num_classes must be a whole number or null, not 2.5"),  # pyright: ignore
        (lambda: RSSNetConfig.from_dict({"num_classes": "3"}), "num_classes must be a whole number or null, not '3'"),
        (lambda: RSSNetConfig.from_dict({"drop_path": "much"}), "drop_path must be a finite number, not 'much'"),
        (lambda: RSSNetConfig.from_dict({"separation": None}), "separation must be a group of fields, not None"),
        (lambda: LossConfig(auxiliary=-1), "auxiliary must not be below 0, as -1 is"),
        (lambda: LossConfig(attention_bce=float("nan")), "attention_bce must be a finite number, not nan"),
        (lambda: LossConfig(class_weights=[1.0, -1.0]), "class_weights must not be below 0, as -1.0 is"),
        (lambda: LossConfig(temperature=0), "temperature must be above 0"),
        (lambda: LossConfig(label_smoothing=1), "label_smoothing must be in"),
        (lambda: LossConfig(hardest_fraction=0), "hardest_fraction must be in"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"freeze_backbone": "false"}, "freeze_backbone must be true or false, not 'false'"),
        ({"freeze_backbone": 1}, "freeze_backbone must be true or false, not 1"),
        ({"num_classes": True}, "num_classes must be a whole number or null, not True"),
        ({"drop_path": False}, "drop_path must be a finite number, not False"),
        ({"pretrained": 1}, "pretrained must be true or false or a text, not 1"),
        ({"backbone": 5}, "backbone must be a text, not 5"),
        ({"backbone_options": [1]}, r"backbone_options must be names with values, not \[1\]"),
        ({"backbone_options": {"a": {"b": [1, float("nan")]}}}, r"backbone_options\.a\.b\[1\] must be .*, not nan"),
        ({"backbone_options": {"norm_layer": dict}}, r"backbone_options\.norm_layer must be .*, not <class 'dict'>"),
        ({"backbone_options": {"a": {1: 2}}}, r"backbone_options\.a must be .*, not {1: 2}"),
        ({"head": ["rssnet"]}, r"head must be one of rssnet, linear, upernet, not \['rssnet'\]"),
        ({"local_pathway": {"depth": 4.0}}, r"local_pathway\.depth must be a whole number, not 4\.0"),
        (
            {"local_pathway": {"layer_scale": float("nan")}},
            r"local_pathway\.layer_scale must be a finite number, not n",
        ),
        ({"local_pathway": [4]}, r"local_pathway must be a group of fields, not \[4\]"),
        ({"separation": {"max_gate": float("inf")}}, r"separation\.max_gate must be a finite number, not inf"),
        ({"separation": {"max_gate": 10**400}}, r"separation\.max_gate must be a finite number, not 10"),
        ({"separation": {"gate_bias": float("nan")}}, r"separation\.gate_bias must be a finite number, not nan"),
        ({"cross_attention": {"heads": "4"}}, r"cross_attention\.heads must be a whole number or null, not '4'"),
        ({5: 1}, "RSSNetConfig has no field 5; its fields are"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        RSSNetConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": float("inf")}, "temperature must be a finite number, not inf"),
        ({"ignore_index": 2.5}, "ignore_index must be a whole number, not 2.5"),
        ({"detach_prototypes": "no"}, "detach_prototypes must be true or false, not 'no'"),
        ({"class_weights": 1.0}, r"class_weights must be \[a finite number, ...\] or null, not 1.0"),
        ({"class_weights": [1.0, "2"]}, r"class_weights\[1\] must be a finite number, not '2'"),
    ],
)
def test_a_loss_option_of_another_type_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)


def test_tuples_and_lists_are_one():
    config = RSSNetConfig(image_size=[64, 96], backbone_options={"a": ({"b": (1, "c", None, True)},)})  # pyright: ignore
    assert config.image_size == (64, 96)
    assert config.backbone_options == {"a": [{"b": [1, "c", None, True]}]}
    assert LossConfig(class_weights=(1, 2.0)).class_weights == [1, 2.0]  # pyright: ignore


@pytest.mark.parametrize(
    "config", [RSSNetConfig, LocalPathwayConfig, SeparationConfig, CrossAttentionConfig, LossConfig]
)
def test_help_explains_every_field(config):
    documented = {line.strip().split(":")[0] for line in config.__doc__.splitlines() if ":" in line}
    assert {field.name for field in fields(config)} <= documented
