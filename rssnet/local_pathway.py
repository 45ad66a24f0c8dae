"""The local pathway of the decoupled two-pathway network.

The paper (arXiv 2212.13764, abstract) says that a second pathway enhances local-patch discrepancy and passes it down,
complementary to the transformer's global representations. The stem, the blocks and where they take from the backbone
are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from .borders import replicate_border

STEM_STRIDE = 4


class LocalFeatures(NamedTuple):
    """What the local pathway gives.

    Attributes:
        stem: (B, width / 2, ceil(H / 4), ceil(W / 4)), edges of the image before any discrepancy block.
        map: (B, width, H / stride, W / stride), the pathway's output L.
    """

    stem: Tensor
    map: Tensor


def local_discrepancy(features: Tensor, kernel_size: int) -> Tensor:
    """What sets each location apart: itself less the mean of its neighbourhood, `x - avgpool_k(x)`.

    Borders are replicated, so that a constant map has no discrepancy anywhere.

    Args:
        features: (B, C, h, w).
        kernel_size: Odd side of the neighbourhood.

    Returns:
        (B, C, h, w).
    """
    return features - F.avg_pool2d(replicate_border(features, kernel_size // 2), kernel_size, stride=1)


class DiscrepancyBlock(nn.Module):
    """A residual block on a map and its local discrepancy.

    `y = x + layer_scale * W2 GELU(depthwise3x3(W1 [x ; x - avgpool_k(x)]))`

    Args:
        width: Channels.
        kernel_size: Odd side of the neighbourhood, k.
        layer_scale: Initial factor of the branch, per channel.
    """

    def __init__(self, *, width: int, kernel_size: int, layer_scale: float) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.reduce = nn.Conv2d(2 * width, width, kernel_size=1)
        self.mix = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.expand = nn.Conv2d(width, width, kernel_size=1)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), layer_scale))

    def forward(self, features: Tensor) -> Tensor:
        """(B, width, h, w) to the same shape."""
        discrepancy = local_discrepancy(features, self.kernel_size)
        branch = self.reduce(torch.cat([features, discrepancy], dim=1))
        branch = self.expand(F.gelu(self.mix(branch)))
        return features + self.layer_scale * branch


class LocalPathway(nn.Module):
    """A light convolutional stream at high resolution, from the image and a shallow tap of the backbone.

    Gradients reach the backbone through that tap only.

    Args:
        shallow_channels: Channels of the backbone's shallow tap.
        width: Channels of the pathway.
        depth: Number of discrepancy blocks.
        kernel_size: Odd side of their neighbourhoods.
        stride: Pixels of the image per cell of the output.
        layer_scale: Initial factor of the blocks' branches.
    """

    def __init__(
        self, *, shallow_channels: int, width: int, depth: int, kernel_size: int, stride: int, layer_scale: float
    ) -> None:
        super().__init__()
        self.stride = stride
        self.stem_channels = width // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 4, kernel_size=3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 4, self.stem_channels, kernel_size=3, stride=2, padding=1),
            LayerNorm2d(self.stem_channels),
            nn.GELU(),
        )
        # Patches of 14 put this pathway at stride 7, which no strided convolution reaches from 4: the map is resized.
        self.stem_resizes = stride % STEM_STRIDE != 0
        step = 1 if self.stem_resizes else stride // STEM_STRIDE
        self.from_stem = nn.Conv2d(self.stem_channels, width, kernel_size=3, stride=step, padding=1)
        self.from_shallow = nn.Sequential(
            LayerNorm2d(shallow_channels), nn.Conv2d(shallow_channels, width, kernel_size=1)
        )
        self.norm = LayerNorm2d(width)
        self.blocks = nn.Sequential(
            *(DiscrepancyBlock(width=width, kernel_size=kernel_size, layer_scale=layer_scale) for _ in range(depth))
        )

    def forward(self, images: Tensor, shallow: Tensor) -> LocalFeatures:
        """Local features of images.

        Args:
            images: (B, 3, H, W), normalised.
            shallow: (B, shallow_channels, h, w) from the backbone.
        """
        size = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        stem = self.stem(images.contiguous(memory_format=torch.channels_last))  # so that norms need no copies
        at_stride = F.interpolate(stem, size=size, mode="bilinear") if self.stem_resizes else stem
        tapped = F.interpolate(self.from_shallow(shallow), size=size, mode="bilinear")
        return LocalFeatures(stem=stem, map=self.blocks(self.norm(self.from_stem(at_stride) + tapped)))
