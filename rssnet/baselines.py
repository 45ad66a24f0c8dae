"""The heads that RSSNet is compared with, on the same backbones: a linear classifier, and UPerNet.

UPerNet is Xiao et al., "Unified Perceptual Parsing for Scene Understanding" (arXiv 1807.10221); on plain transformers
it reads four blocks brought to four strides, as BEiT's and mmsegmentation's configs do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from .backbone import BackboneLayout, Tap
from .config import RSSNetConfig
from .decoder import LOGITS_STRIDE, Auxiliary, RSSNetOutput

UPERNET_WIDTH = 512
POOL_SIZES = (1, 2, 3, 6)


class LinearHead(nn.Module):
    """A linear classifier on the deep taps, upsampled.

    Args:
        config: The whole model's config.
        layout: The backbone's layout.
    """

    def __init__(self, *, config: RSSNetConfig, layout: BackboneLayout) -> None:
        super().__init__()
        assert config.num_classes is not None
        self.norms = nn.ModuleList(LayerNorm2d(tap.channels) for tap in layout.deep)
        self.classify = nn.Conv2d(sum(tap.channels for tap in layout.deep), config.num_classes, kernel_size=1)

    @staticmethod
    def taps(_config: RSSNetConfig, layout: BackboneLayout) -> tuple[Tap, ...]:
        """The taps that the head reads."""
        return layout.deep

    def forward(self, images: Tensor, features: Sequence[Tensor]) -> RSSNetOutput:
        """Classifies pixels; of `images` (B, 3, H, W) only the size is read."""
        size = features[0].shape[-2:]
        normed = [norm(feature) for norm, feature in zip(self.norms, features, strict=True)]
        joined = torch.cat([F.interpolate(feature, size=size, mode="bilinear") for feature in normed], dim=1)
        return RSSNetOutput(_at_logits_stride(self.classify(joined), images))


class UPerNetHead(nn.Module):
    """Pyramid pooling on the deepest map, a feature pyramid down to the finest, and a classifier on all of them.

    Args:
        config: The whole model's config; `decoder_width` is the head's channels, 512 as published when not given
            (BEiT-L's published 441 M parameters have 1024).
        layout: The backbone's layout.
    """

    def __init__(self, *, config: RSSNetConfig, layout: BackboneLayout) -> None:
        super().__init__()
        assert config.num_classes is not None
        width = config.decoder_width or UPERNET_WIDTH
        taps = layout.quarters
        if layout.is_plain:
            self.to_pyramid = nn.ModuleList(_rescale(tap.channels, level) for level, tap in enumerate(taps))
        else:
            self.to_pyramid = nn.ModuleList(LayerNorm2d(tap.channels) for tap in taps)
        deepest = taps[-1].channels
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), *_convolution(deepest, width, kernel_size=1))
            for size in POOL_SIZES
        )
        self.pooled = _convolution(deepest + len(POOL_SIZES) * width, width, kernel_size=3)
        self.lateral = nn.ModuleList(_convolution(tap.channels, width, kernel_size=1) for tap in taps[:-1])
        self.smooth = nn.ModuleList(_convolution(width, width, kernel_size=3) for _ in taps[:-1])
        self.fuse = _convolution(len(taps) * width, width, kernel_size=3)
        self.classify = nn.Conv2d(width, config.num_classes, kernel_size=1)
        self.classify_deep = nn.Sequential(
            LayerNorm2d(taps[-2].channels), nn.Conv2d(taps[-2].channels, config.num_classes, kernel_size=1)
        )

    @staticmethod
    def taps(_config: RSSNetConfig, layout: BackboneLayout) -> tuple[Tap, ...]:
        """The taps that the head reads."""
        return layout.quarters

    def forward(self, images: Tensor, features: Sequence[Tensor]) -> RSSNetOutput:
        """Classifies pixels; of `images` (B, 3, H, W) only the size is read."""
        pyramid = [rescale(feature) for rescale, feature in zip(self.to_pyramid, features, strict=True)]

        deepest = pyramid[-1]
        context = [F.interpolate(pool(deepest), size=deepest.shape[-2:], mode="bilinear") for pool in self.pools]
        top = self.pooled(torch.cat([deepest, *context], dim=1))

        levels = [top]
        for lateral, feature in zip(reversed(self.lateral), reversed(pyramid[:-1]), strict=True):
            top = lateral(feature) + F.interpolate(top, size=feature.shape[-2:], mode="bilinear")
            levels.insert(0, top)
        levels = [*(smooth(level) for smooth, level in zip(self.smooth, levels[:-1], strict=True)), levels[-1]]

        size = levels[0].shape[-2:]
        fused = self.fuse(torch.cat([F.interpolate(level, size=size, mode="bilinear") for level in levels], dim=1))
        logits = _at_logits_stride(self.classify(fused), images)
        if not self.training:
            return RSSNetOutput(logits)
        return RSSNetOutput(logits, Auxiliary(deep_logits=self.classify_deep(features[-2])))


def _at_logits_stride(logits: Tensor, images: Tensor) -> Tensor:
    size = (images.shape[-2] // LOGITS_STRIDE, images.shape[-1] // LOGITS_STRIDE)
    return F.interpolate(logits, size=size, mode="bilinear")


def _convolution(inputs: int, outputs: int, *, kernel_size: int) -> nn.Sequential:
    # The published head has batch norm; a batch of one on 1x1 pooled maps would have no statistics.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False), LayerNorm2d(outputs), nn.GELU()
    )


def _rescale(channels: int, level: int) -> nn.Sequential:
    """Brings level 0 to 3 of a plain transformer from its stride to a quarter, a half, the same or twice of it."""

    def double() -> nn.Module:
        return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)

    steps: tuple[nn.Module, ...] = (
        (double(), LayerNorm2d(channels), nn.GELU(), double()),
        (double(),),
        (),
        (nn.MaxPool2d(kernel_size=2, ceil_mode=True),),  # a map may be one token high or wide
    )[level]
    return nn.Sequential(LayerNorm2d(channels), *steps)
