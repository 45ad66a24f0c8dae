"""Pre-trained weights from files, URLs and hubs: what fits, what is missing, what is left over, what is refused."""

import json
import pickle
from typing import Any

import fsspec
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed

from rssnet import RSSNet, RSSNetConfig
from rssnet.backbone import Backbone, inspect_backbone

OPTIONS: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
CONFIG = RSSNetConfig(
    backbone="vit_tiny_patch16_224", backbone_options=OPTIONS, num_classes=3, image_size=224, decoder_width=16
)


@pytest.fixture(scope="module")
def published():
    """A classifier as timm publishes them: 224 x 224, with its norm and head."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **OPTIONS).state_dict()


def load(source, **changes):
    values = {**CONFIG.to_dict(), "pretrained": str(source), **changes}
    return RSSNet(RSSNetConfig.from_dict(values)).backbone


def assert_filled(backbone, published):
    for name, tensor in backbone.body.state_dict().items():
        assert torch.equal(tensor, published[name]), name


@pytest.mark.parametrize("ending", ["safetensors", "pth", "bin"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_file_fills_the_backbone(published, tmp_path, ending, scheme):
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_file(published, path)
    else:
        torch.save({"model": published, "epoch": 3}, path)
    backbone = load(f"{scheme}{path}")
    assert_filled(backbone, published)
    report = backbone.weights_report
    assert report is not None
    assert report.source == f"{scheme}{path}"
    assert report.missing == ()
    assert report.unexpected == ()  # a classifier is left out before anything is compared


def test_a_url_fills_the_backbone(published, tmp_path):
    save_file(published, tmp_path / "weights.safetensors")
    files = fsspec.filesystem("memory")
    files.put_file(str(tmp_path / "weights.safetensors"), "/models/weights.safetensors")
    assert_filled(load("memory://models/weights.safetensors"), published)


def test_other_heads_and_norms_are_allowed_reported_and_logged(published, tmp_path, caplog):
    weights = {name: tensor for name, tensor in published.items() if not name.startswith("norm.")}
    weights["decoder_blocks.0.norm1.weight"] = torch.zeros(48)  # MAE publishes its decoder too
    save_file(weights, tmp_path / "weights.safetensors")
    with caplog.at_level("INFO", logger="rssnet"):
        report = load(tmp_path / "weights.safetensors").weights_report
    assert report is not None
    assert report.missing == ("norm.weight", "norm.bias")
    assert report.unexpected == ("decoder_blocks.0.norm1.weight",)
    (record,) = (record for record in caplog.records if record.name == "rssnet.pretrained")
    assert record.levelname == "WARNING"
    assert "norm.bias" in record.getMessage()


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("vit_relpos_small_patch16_224", "blocks.0.attn.rel_pos.relative_position_index"),  # computed by the model
        ("dla46_c", "level3.tree1.project.0.weight"),  # published, never used
    ],
)
def test_left_over_weights_that_mean_nothing_are_allowed(tmp_path, name, weight):
    options: dict[str, Any] = {"depth": 1, "embed_dim": 48, "num_heads": 3} if name.startswith("vit") else {}
    weights = timm.create_model(name, **options).state_dict()
    save_file({**weights, weight: torch.zeros(2)}, tmp_path / "weights.safetensors")
    backbone = load(tmp_path / "weights.safetensors", backbone=name, backbone_options=options)
    assert backbone.weights_report is not None
    assert backbone.weights_report.unexpected == (weight,)


def test_blocks_that_nothing_reads_may_be_missing(published, tmp_path):
    save_file(published, tmp_path / "weights.safetensors")
    options = {**OPTIONS, "depth": 4}
    layout = inspect_backbone("vit_tiny_patch16_224", options)
    backbone = Backbone(
        layout=layout,
        taps=layout.taps[:2],
        image_size=(224, 224),
        options=options,
        pretrained=str(tmp_path / "weights.safetensors"),
    )
    assert_filled(backbone, published)


def test_deit3_may_have_the_names_that_it_was_published_with(tmp_path):
    weights = timm.create_model("deit3_small_patch16_224", **OPTIONS).state_dict()
    weights = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
    original = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): weights[name] for name in weights}
    assert "blocks.0.gamma_1" in original
    save_file(original, tmp_path / "weights.safetensors")
    backbone = load(tmp_path / "weights.safetensors", backbone="deit3_small_patch16_224")
    assert_filled(backbone, weights)


SAME_SIZE: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("vit_tiny_patch16_224", OPTIONS, (448, 448)),
    ("vit_tiny_patch16_224", OPTIONS, (64, 96)),
    ("beit_base_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}, (448, 448)),
    ("beit_base_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}, (64, 96)),
    ("hiera_tiny_224", {"stages": (1, 1, 1, 1), "embed_dim": 24}, (64, 96)),  # timm resizes no Hiera
]


@pytest.mark.parametrize(("name", "options", "size"), SAME_SIZE)
def test_weights_of_the_size_asked_for_stay_as_they_are(tmp_path, name, options, size):
    torch.manual_seed(0)
    weights = timm.create_model(name, num_classes=0, img_size=size, **options).state_dict()
    for tensor in weights.values():
        tensor.normal_()  # tables start at zero, and zeros stay zeros however often they are resized
    save_file(weights, tmp_path / "weights.safetensors")
    backbone = load(tmp_path / "weights.safetensors", backbone=name, backbone_options=options, image_size=size)
    assert any(kind in name for name in backbone.body.state_dict() for kind in ("pos_embed", "position_bias_table"))
    assert_filled(backbone, weights)


def test_weights_of_a_third_size_are_resized_once(tmp_path):
    torch.manual_seed(0)
    weights = timm.create_model("vit_tiny_patch16_224", img_size=384, **OPTIONS).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    found = load(tmp_path / "weights.safetensors", image_size=(448, 320)).body.pos_embed
    expected = resample_abs_pos_embed(weights["pos_embed"], new_size=[28, 20], old_size=[24, 24], num_prefix_tokens=1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("image_size", [(64, 96), (256, 224)])
def test_weights_of_one_size_are_resized_to_another(published, tmp_path, image_size):
    save_file(published, tmp_path / "weights.safetensors")
    backbone = load(tmp_path / "weights.safetensors", image_size=image_size)
    grid = (image_size[0] // 16, image_size[1] // 16)
    positions = backbone.body.pos_embed
    assert positions.shape == (1, 1 + grid[0] * grid[1], 48)
    assert torch.equal(positions[:, 0], published["pos_embed"][:, 0])
    middle = positions[0, 1:].mean(0)
    torch.testing.assert_close(middle, published["pos_embed"][0, 1:].mean(0), atol=2e-3, rtol=0)
    assert torch.equal(backbone.body.blocks[1].mlp.fc1.weight, published["blocks.1.mlp.fc1.weight"])


@pytest.mark.parametrize("name", ["hiera_tiny_224", "mvitv2_tiny"])
def test_families_that_timm_does_not_resize_are_resized(tmp_path, name):
    options: dict[str, Any] = {"stages": (1, 1, 1, 1), "embed_dim": 24} if name.startswith("hiera") else {}
    weights = timm.create_model(name, num_classes=0, **options).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    config = RSSNetConfig(
        backbone=name,
        backbone_options=options,
        num_classes=3,
        image_size=64,
        decoder_width=16,
        pretrained=str(tmp_path / "weights.safetensors"),
    )
    model = RSSNet(config).eval()
    assert model.backbone.weights_report is not None
    assert model.backbone.weights_report.missing == ()
    assert model(torch.randn(1, 3, 64, 64)).logits.isfinite().all()


VIT: dict[str, Any] = {"embed_dim": 48, "num_heads": 3}
CONVNEXT: dict[str, Any] = {"dims": (8, 16, 24, 32)}
RESNET: dict[str, Any] = {"channels": (8, 16, 24, 32)}
OTHERS: list[tuple[str, dict[str, Any], str, dict[str, Any], str]] = [
    ("convnext_atto", CONVNEXT, "vit_tiny_patch16_224", OPTIONS, r"\d+ of its \d+ tensors are missing \(.*and 0 of"),
    (
        "vit_tiny_patch16_224",
        {**VIT, "depth": 2},
        "vit_tiny_patch16_224",
        {**VIT, "depth": 4},
        r"24 of its \d+ tensors are missing \(blocks.2.norm1.weight, .*and 0 of the weights",
    ),
    (
        "vit_tiny_patch16_224",
        {**VIT, "depth": 4},
        "vit_tiny_patch16_224",
        {**VIT, "depth": 2},
        r"0 of its \d+ tensors are missing and 24 of the weights have no place in it \(blocks.2.attn",
    ),
    ("beit_base_patch16_224", {**VIT, "depth": 4}, "beit_base_patch16_224", {**VIT, "depth": 2}, "cannot be read as"),
    (
        "convnext_atto",
        {**CONVNEXT, "depths": (1, 1, 1, 1)},
        "convnext_atto",
        {**CONVNEXT, "depths": (1, 1, 3, 1)},
        r"\(stages.2.blocks.1",
    ),
    (
        "convnext_atto",
        {**CONVNEXT, "depths": (1, 1, 3, 1)},
        "convnext_atto",
        {**CONVNEXT, "depths": (1, 1, 1, 1)},
        r"no place in it \(stages.2.blocks.1",
    ),
    ("resnet18", RESNET, "resnet34", RESNET, r"80 of its \d+ tensors .*\(layer1.2.conv1.weight"),
    ("resnet34", RESNET, "resnet18", RESNET, r"80 of the weights have no place in it \(layer1.2.bn1"),
    (
        "vit_small_patch16_224",
        {**VIT, "depth": 2},
        "vit_small_patch16_dinov3",
        {**VIT, "depth": 2},
        r"5 of its \d+ tensors are missing .* 3 of the weights have no place in it \(pos_embed, blocks.0.attn.qkv.bias",
    ),
    (
        "vit_small_patch14_reg4_dinov2",
        {**VIT, "depth": 2},
        "vit_small_patch14_dinov2",
        {**VIT, "depth": 2},
        r"could not be loaded from",
    ),
]


@pytest.mark.parametrize(("name", "options", "other_name", "other_options", "message"), OTHERS)
def test_weights_of_another_architecture_are_refused(tmp_path, name, options, other_name, other_options, message):
    weights = timm.create_model(name, **options).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=message) as refusal:
        load(tmp_path / "weights.safetensors", backbone=other_name, backbone_options=other_options)
    assert str(tmp_path) in str(refusal.value)
    assert f"weights of {other_name}" in str(refusal.value)
    assert "set pretrained to false" in str(refusal.value)


@pytest.mark.parametrize("name", ["reg_token", "dist_token"])
def test_weights_of_a_transformer_with_more_tokens_are_refused(published, tmp_path, name):
    save_file({**published, name: torch.zeros(1, 1, 48)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=rf"1 of the weights have no place in it \({name}\)"):
        load(tmp_path / "weights.safetensors")


def test_weights_of_another_width_are_refused(tmp_path):
    wider = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, embed_dim=96, num_heads=3)
    save_file(wider.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"could not be loaded .* size mismatch"):
        load(tmp_path / "weights.safetensors")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    ran = tmp_path / "ran"

    class Harm:
        def __reduce__(self):
            return ran.write_text, ("code ran",)

    torch.save({"model": Harm()}, tmp_path / "weights.pth", pickle_module=pickle)
    with pytest.raises(ValueError, match="weights_only"):
        load(tmp_path / "weights.pth")
    assert not ran.exists()


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no pre-trained weights at '.*gone.pth'; give a file, a URL or hf-hub:"):
        load(tmp_path / "gone.pth")


def test_a_file_of_another_format_is_refused(tmp_path):
    np.savez(tmp_path / "weights.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match=r"end in \.safetensors, .*weights\.npz' does not. Give such a file"):
        load(tmp_path / "weights.npz")


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="could not be loaded"):
        load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("source", [True, "hf-hub:nobody/no-such-model"])
def test_a_hub_out_of_reach_is_answered_with_what_to_do(monkeypatch, source):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    values = {**CONFIG.to_dict(), "pretrained": source}
    with pytest.raises(ValueError, match=r"could not be loaded .*or set pretrained to false"):
        RSSNet(RSSNetConfig.from_dict(values))


# Normalisation.


def normalisation(backbone):
    return backbone.pixel_mean, backbone.pixel_std


def test_a_file_leaves_the_normalisation_of_the_backbones_name_unless_another_is_given(published, tmp_path):
    save_file(published, tmp_path / "weights.safetensors")
    assert normalisation(load(tmp_path / "weights.safetensors")) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    overlay = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    options = {**OPTIONS, "pretrained_cfg_overlay": overlay}
    given = load(tmp_path / "weights.safetensors", backbone_options=options, image_size=64)
    assert normalisation(given) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """A repository as the hub's cache keeps it; called with what its config.json says."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--weights"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(published, snapshot / "model.safetensors")

    def publish(config):
        (snapshot / "config.json").write_text(json.dumps(config))
        return "hf-hub:owner/weights"

    return publish


def test_a_hub_tells_the_normalisation_of_its_weights(hub, published):
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    source = hub({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": mean, "std": std}})
    backbone = load(source)
    assert_filled(backbone, published)
    assert normalisation(backbone) == (tuple(mean), tuple(std))
    assert normalisation(load(source, image_size=64)) == (tuple(mean), tuple(std))
    options = {**OPTIONS, "pretrained_cfg_overlay": {"mean": [0.0, 0.0, 0.0]}}
    assert normalisation(load(source, backbone_options=options)) == ((0.0, 0.0, 0.0), tuple(std))


@pytest.mark.parametrize(
    "config", [{"model_type": "of another library"}, {"architecture": "vit", "pretrained_cfg": {"num_classes": 3}}]
)
def test_a_hub_that_tells_no_normalisation_leaves_that_of_the_backbones_name(hub, published, config):
    backbone = load(hub(config))
    assert_filled(backbone, published)
    assert normalisation(backbone) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
