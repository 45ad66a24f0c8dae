"""A model in a folder: what comes back of it, what is refused, and what a save that breaks off leaves."""

import json
from dataclasses import replace
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from rssnet import Classes, RSSNet, RSSNetConfig
from tests.rssnet.tiny_model import CONFIG


def test_a_folder_holds_config_weights_classes_and_a_card(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "classes.json",
        "config.json",
        "model.safetensors",
    ]


def test_config_classes_and_weights_come_back(tmp_path, images):
    names = ("sky", "building", "pole", "road", "car | van")
    model = RSSNet(CONFIG, Classes(names=names, palette=Classes.default(5).palette)).eval()
    model.save_pretrained(tmp_path)
    loaded = RSSNet.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.classes == model.classes
    assert torch.equal(loaded(images).logits, model(images).logits)
    card = (tmp_path / "README.md").read_text()
    assert "car &#124; van" in card
    assert "vit_tiny_patch16_224" in card


def test_a_url_serves_as_a_folder(model, images):
    model.save_pretrained("memory://bucket/models/first")
    assert fsspec.filesystem("memory").exists("/bucket/models/first/model.safetensors")
    loaded = RSSNet.from_pretrained("memory://bucket/models/first")
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_loading_never_fetches_backbone_weights(model, images, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**header, "pretrained": True}))

    def refuse(*_arguments, **_options):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("rssnet.backbone.load_backbone_weights", refuse)
    loaded = RSSNet.from_pretrained(tmp_path)
    assert loaded.config.pretrained is True  # what it once started from is still known
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_it_can_be_loaded_for_another_image_size(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = RSSNet.from_pretrained(tmp_path, image_size=(96, 48))
    assert loaded.config.image_size == (96, 48)
    assert not loaded.training
    assert loaded(torch.zeros(1, 3, 96, 48)).logits.shape == (1, 5, 24, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_classes": 4},
            r"not of the model .* 4 classes\).*decoder.class_bias is \(5, 1, 1\) instead of \(4, 1, 1\)",
        ),
        ({"head": "linear"}, r"linear on vit_tiny_patch16_224.*is missing"),
        ({"backbone_options": {"depth": 3, "embed_dim": 48, "num_heads": 3}}, r"backbone.body.blocks.2.* is missing"),
        (
            {"colour": "red"},
            r"The config.json at .* is of no model that can be built: RSSNetConfig has no field colour",
        ),
        ({"format": "other"}, r"The config.json at .* is of no model of format rssnet"),
        ({"version": 99}, r"is of no model of format rssnet, version 1"),
        ({"freeze_backbone": "false"}, r"freeze_backbone must be true or false, not 'false'"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**header, **change}))
    if "num_classes" in change:
        (tmp_path / "classes.json").write_text(Classes.default(4).to_json())
    with pytest.raises(ValueError, match=message):
        RSSNet.from_pretrained(tmp_path)


def test_a_header_that_is_no_group_of_fields_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="is of no model of format rssnet"):
        RSSNet.from_pretrained(tmp_path)


def test_whole_numbers_are_not_taken_for_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "decoder.class_bias"
    save_file({**weights, name: weights[name].int()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.class_bias is of torch.int32 instead of torch.float32"):
        RSSNet.from_pretrained(tmp_path)


def test_left_over_weights_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "decoder.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.extra is left over"):
        RSSNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "classes.json"])
def test_a_missing_file_is_named(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"There is no model at .* and {name} is missing"):
        RSSNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\x00 damaged", b"{", b""])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "classes.json"])
def test_a_damaged_file_is_named(model, tmp_path, name, content):
    model.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"The {name} at .* cannot be read: .*[^.]\. Save or copy it again"):
        RSSNet.from_pretrained(tmp_path)


def test_a_folder_in_place_of_a_file_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "classes.json").unlink()
    (tmp_path / "classes.json").mkdir()
    with pytest.raises(ValueError, match=r"The classes.json at .* cannot be read: .*directory"):
        RSSNet.from_pretrained(tmp_path)


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="There is no model at"):
        RSSNet.from_pretrained(tmp_path / "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"'nobody/nothing' is no folder here, and the Hugging Face hub did not give it"
    ):
        RSSNet.from_pretrained("nobody/nothing")


# What is saved beside the weights, and what a save that breaks off leaves.


@pytest.fixture
def normalised():
    """A model whose weights were trained with another normalisation than timm's for its backbone."""
    overlay = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    return RSSNet(replace(CONFIG, backbone_options={**CONFIG.backbone_options, "pretrained_cfg_overlay": overlay}))


def forget_overlay(folder):
    """Makes timm's normalisation for the backbone of a saved model another, as a new release of timm could."""
    header = json.loads((folder / "config.json").read_text())
    del header["backbone_options"]["pretrained_cfg_overlay"]
    (folder / "config.json").write_text(json.dumps(header))


@pytest.mark.parametrize("image_size", [None, (96, 48)])
def test_a_saved_model_keeps_its_normalisation_whatever_timm_says_later(normalised, tmp_path, image_size):
    normalised.save_pretrained(tmp_path)
    forget_overlay(tmp_path)
    loaded = RSSNet.from_pretrained(tmp_path, image_size)
    assert (loaded.pixel_mean, loaded.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    resized = loaded.resized(64)
    assert (resized.pixel_mean, resized.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_model_saved_without_its_normalisation_takes_that_of_its_backbone(model, tmp_path):
    model.save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    del header["pixel_mean"], header["pixel_std"]
    (tmp_path / "config.json").write_text(json.dumps(header))
    loaded = RSSNet.from_pretrained(tmp_path)
    assert (loaded.pixel_mean, loaded.pixel_std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pixel_mean": 0.5},
            r"pixel_mean in the config.json at .* must be three numbers, one per channel, not 0.5; corr",
        ),
        ({"pixel_mean": [0.5, 0.5]}, r"three numbers, one per channel, not \[0.5, 0.5\]"),
        ({"pixel_mean": ["a", 0, 0]}, r"three numbers, one per channel, not \['a', 0, 0\]"),
        ({"pixel_std": [0.5, 0, 0.5]}, r"three numbers above 0, one per channel, not \[0.5, 0, 0.5\]"),
    ],
)
def test_a_normalisation_that_is_none_is_refused(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**header, **change}))
    with pytest.raises(ValueError, match=message):
        RSSNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_save_that_breaks_off_leaves_no_model_rather_than_a_mixture(model, tmp_path, monkeypatch, scheme):
    folder = f"{scheme}{tmp_path}"
    model.save_pretrained(folder)
    files: Any = type(fsspec.core.url_to_fs(folder)[0])
    write = files.pipe_file

    def break_off(self, path, value, **options):
        if path.endswith("README.md"):
            raise OSError("the disk is full")
        write(self, path, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "pipe_file", break_off)
        with pytest.raises(OSError, match="disk is full"):
            model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"There is no model at .*config.json.* is missing"):
        RSSNet.from_pretrained(folder)
    model.save_pretrained(folder)
    RSSNet.from_pretrained(folder)


def test_a_model_that_cannot_be_saved_leaves_the_one_that_is_there(model, images, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)

    def refuse(*_arguments):
        raise ValueError("no card")

    with monkeypatch.context() as patch:
        patch.setattr("rssnet.serialization.model_card", refuse)
        with pytest.raises(ValueError, match="no card"):
            RSSNet(CONFIG).save_pretrained(tmp_path)
    assert torch.equal(RSSNet.from_pretrained(tmp_path)(images).logits, model(images).logits)


def test_a_config_with_tuples_comes_back_equal(tmp_path):
    options = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    model = RSSNet(RSSNetConfig("convnext_atto", 5, (64, 96), backbone_options=options))
    model.save_pretrained(tmp_path)
    assert RSSNet.from_pretrained(tmp_path).config == model.config


def test_the_card_counts_parameters_and_not_statistics(tmp_path):
    model = RSSNet(CONFIG)
    model.decoder.register_buffer("statistics", torch.zeros(1_000_000))
    model.save_pretrained(tmp_path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters / 1e6:.1f} M parameters" in (tmp_path / "README.md").read_text()
