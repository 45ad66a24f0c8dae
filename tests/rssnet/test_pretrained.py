"""Pre-trained weights from files and URLs: what fits, what is missing, what is left over, what is refused."""

import pickle
from typing import Any

import fsspec
import pytest
import timm
import torch
from safetensors.torch import save_file

from rssnet import RSSNet, RSSNetConfig

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


def test_missing_and_unexpected_weights_are_reported_and_logged(published, tmp_path, caplog):
    weights = dict(published)
    weights["blocks.7.extra"] = weights.pop("blocks.1.mlp.fc2.bias")
    save_file(weights, tmp_path / "weights.safetensors")
    with caplog.at_level("INFO", logger="rssnet"):
        report = load(tmp_path / "weights.safetensors").weights_report
    assert report is not None
    assert report.missing == ("blocks.1.mlp.fc2.bias",)
    assert report.unexpected == ("blocks.7.extra",)
    (record,) = (record for record in caplog.records if record.name == "rssnet.pretrained")
    assert record.levelname == "WARNING"
    assert "blocks.1.mlp.fc2.bias" in record.getMessage()


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


def test_weights_of_another_architecture_are_refused(tmp_path):
    save_file(timm.create_model("convnext_atto", num_classes=0).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"another architecture than vit_tiny_patch16_224: \d+ of its \d+ tensors"):
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
