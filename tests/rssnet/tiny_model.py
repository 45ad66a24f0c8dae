"""The model that most tests are about: random, two blocks deep, milliseconds an image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rssnet import RSSNet, RSSNetConfig

CONFIG = RSSNetConfig(
    backbone="vit_tiny_patch16_224",
    backbone_options={"depth": 2, "embed_dim": 48, "num_heads": 3},
    num_classes=5,
    image_size=(64, 96),
    decoder_width=32,
)


def build(config: RSSNetConfig = CONFIG, **changes: Any) -> RSSNet:
    """A model with the same weights at every call."""
    torch.manual_seed(0)
    return RSSNet(replace(config, **changes))
