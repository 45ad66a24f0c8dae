"""A model small enough to be run in every test of a stage that needs one."""

import pytest
import torch

from rssnet import RSSNet, RSSNetConfig

NUM_CLASSES = 6


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where an untrained RSSNet of `NUM_CLASSES` classes is saved. Its windows are 64 x 64 pixels."""
    torch.manual_seed(0)
    config = RSSNetConfig(
        backbone="vit_tiny_patch16_224",
        backbone_options={"depth": 2, "embed_dim": 48, "num_heads": 3},
        num_classes=NUM_CLASSES,
        image_size=64,
        decoder_width=16,
    )
    model = RSSNet(config)
    with torch.no_grad():
        for parameter in model.parameters():  # as initialized it sees one class everywhere
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = str(tmp_path_factory.mktemp("models") / "tiny")
    model.save_pretrained(folder)
    return folder
