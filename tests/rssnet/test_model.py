"""A model is built, trained a step, saved and loaded."""

from dataclasses import replace

import pytest
import torch

from rssnet import LossConfig, RSSNet, RSSNetConfig, RSSNetLoss

CONFIG = RSSNetConfig(
    backbone="vit_tiny_patch16_224", backbone_options={"depth": 2}, num_classes=5, image_size=(64, 96)
)


@pytest.mark.parametrize("head", ["rssnet", "linear", "upernet"])
def test_every_parameter_gets_a_gradient(head):
    torch.manual_seed(0)
    model = RSSNet(replace(CONFIG, head=head, decoder_width=32)).train()
    output = model(torch.randn(2, 3, 64, 96))
    assert output.logits.shape == (2, 5, 16, 24)
    RSSNetLoss(LossConfig(), 5)(output, torch.randint(0, 5, (2, 64, 96)))["loss"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_backbone_and_decoder_partition_the_parameters():
    model = RSSNet(CONFIG)
    parts = [*model.backbone.parameters(), *model.decoder.parameters()]
    assert [id(parameter) for parameter in parts] == [id(parameter) for parameter in model.parameters()]


def test_a_saved_model_comes_back_the_same(tmp_path):
    model = RSSNet(CONFIG).eval()
    model.save_pretrained(str(tmp_path))
    loaded = RSSNet.from_pretrained(str(tmp_path))
    images = torch.randn(1, 3, 64, 96)
    assert loaded.config == model.config
    assert loaded.classes == model.classes
    assert torch.equal(loaded(images).logits, model(images).logits)
