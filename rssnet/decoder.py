"""What follows the backbone in RSSNet: local pathway, separation, fusion, discriminative cross-attention, prediction.

Shapes: B images of (H, W) pixels, d channels, K classes; G at the token stride, L, S and M at the fine stride.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from .backbone import BackboneLayout, Tap
from .config import RSSNetConfig
from .cross_attention import DiscriminativeCrossAttention
from .local_pathway import STEM_STRIDE, LocalPathway
from .separation import BilinearUpsampling, SeparationWeights, SpatiallyAdaptiveSeparation

LOGITS_STRIDE = 4


@dataclass(frozen=True)
class Auxiliary:
    """What the losses supervise beside the logits; made in training only.

    Attributes:
        deep_logits: (B, K, h, w), the deep map's own prediction.
        pixels: (B, d, H / 4, W / 4), pixel embeddings E(M); None without cross-attention.
        attention: Per layer of the cross-attention, (B, K, h', w') masks before a sigmoid.
        presence: Per layer, (B, K), which classes are present, before a sigmoid.
        regions: Per layer, (B, K, d), regions projected to where the logits are made, P(R).
        separation: How fine locations were composed of tokens; None without the separation module.
    """

    deep_logits: Tensor
    pixels: Tensor | None = None
    attention: tuple[Tensor, ...] = ()
    presence: tuple[Tensor, ...] = ()
    regions: tuple[Tensor, ...] = ()
    separation: SeparationWeights | None = None


@dataclass(frozen=True)
class RSSNetOutput:
    """What a model returns.

    Attributes:
        logits: (B, K, H / 4, W / 4).
        auxiliary: What the losses supervise beside them; None in evaluation, and for heads that have none.
    """

    logits: Tensor
    auxiliary: Auxiliary | None = None


# So that exported programs return them, and can be saved.
torch.export.register_dataclass(Auxiliary, serialized_type_name="rssnet.Auxiliary")
torch.export.register_dataclass(RSSNetOutput, serialized_type_name="rssnet.RSSNetOutput")


class DeepMap(nn.Module):
    """Projects the deep taps to one map G: normalised each, the deeper brought to the stride of the first, added up.

    Args:
        taps: The deep taps, finest first.
        width: Channels of the map, d.
    """

    def __init__(self, *, taps: Sequence[Tap], width: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(LayerNorm2d(tap.channels), nn.Conv2d(tap.channels, width, kernel_size=1)) for tap in taps
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, channels, h_i, w_i), one per tap, to (B, d, h_0, w_0)."""
        deep, *deeper = (project(features) for project, features in zip(self.projections, maps, strict=True))
        for features in deeper:
            deep = deep + _at_size(features, (deep.shape[-2], deep.shape[-1]))
        return deep


class PixelEmbedding(nn.Module):
    """E: embeds the fused map at stride 4, where a skip from the stem sharpens it.

    Without the non-linearity, the embedding would commute with upsampling and stride 4 would add nothing.

    Args:
        width: Channels, d.
        stem_channels: Channels of the local pathway's stem; None when there is no local pathway.
    """

    def __init__(self, *, width: int, stem_channels: int | None) -> None:
        super().__init__()
        self.from_stem = None if stem_channels is None else nn.Conv2d(stem_channels, width, kernel_size=1)
        self.mix = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.norm = LayerNorm2d(width)
        self.project = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, fused: Tensor, stem: Tensor | None, size: tuple[int, int]) -> Tensor:
        """(B, d, h, w) and (B, stem_channels, ...) to (B, d, *size)."""
        # The largest maps of the model: each is let go as soon as the next is there.
        pixels = _at_size(fused, size)
        if self.from_stem is not None:
            assert stem is not None
            pixels = _at_size(self.from_stem(stem), size).add_(pixels)
        pixels = self.mix(pixels)
        pixels = self.norm(pixels)
        pixels = F.gelu(pixels)
        return self.project(pixels)


class RSSNetDecoder(nn.Module):
    """RSSNet after the backbone.

    Args:
        config: The whole model's config; its parts switch modules off for ablations.
        layout: The backbone's layout.
    """

    def __init__(self, *, config: RSSNetConfig, layout: BackboneLayout) -> None:
        super().__init__()
        assert config.num_classes is not None
        local, separation, attention = config.local_pathway, config.separation, config.cross_attention
        width = config.decoder_width or default_width(layout)
        local_width = (local.width or width) if local.enabled else None
        deep_stride = layout.deep[0].stride
        stride = fine_stride(layout)
        ratio = deep_stride // stride

        self.deep = DeepMap(taps=layout.deep, width=width)
        self.local_pathway = None
        if local.enabled:
            assert local_width is not None
            self.local_pathway = LocalPathway(
                shallow_channels=shallow_tap(config, layout).channels,
                width=local_width,
                depth=local.depth,
                kernel_size=local.kernel_size,
                stride=stride,
                layer_scale=local.layer_scale,
            )
        self.separation: nn.Module = BilinearUpsampling(ratio=ratio)
        if separation.enabled:
            self.separation = SpatiallyAdaptiveSeparation(
                width=width,
                local_width=local_width,
                ratio=ratio,
                kernel_size=separation.kernel_size,
                groups=separation.groups,
                max_gate=separation.max_gate,
                gate_bias=separation.gate_bias,
                form=separation.form,
            )
        self.fuse = nn.Sequential(
            nn.Conv2d(width + (local_width or 0), width, kernel_size=1), LayerNorm2d(width), nn.GELU()
        )
        self.embed = PixelEmbedding(
            width=width, stem_channels=None if self.local_pathway is None else self.local_pathway.stem_channels
        )
        self.cross_attention = None
        if attention.enabled:
            self.cross_attention = DiscriminativeCrossAttention(
                num_classes=config.num_classes,
                width=width,
                layers=attention.layers,
                heads=attention.heads or default_heads(width),
                mlp_ratio=attention.mlp_ratio,
                null_token=attention.null_token,
            )
            self.project_regions = nn.Linear(width, width)
            with torch.no_grad():
                self.project_regions.weight.mul_(1 / math.sqrt(width))  # so that logits start at the scale of one
            self.class_bias = nn.Parameter(torch.zeros(config.num_classes, 1, 1))
        else:
            self.classify = nn.Conv2d(width, config.num_classes, kernel_size=1)
        self.classify_deep = nn.Conv2d(width, config.num_classes, kernel_size=1)
        # As the maps are, once normalised: convolutions of mixed layouts are slower, and their gradients have strides
        # that distributed training warns about.
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @staticmethod
    def taps(config: RSSNetConfig, layout: BackboneLayout) -> tuple[Tap, ...]:
        """The taps that the decoder reads: the shallow one, if there is a local pathway, then the deep ones."""
        return ((shallow_tap(config, layout),) if config.local_pathway.enabled else ()) + layout.deep

    def forward(self, images: Tensor, features: Sequence[Tensor]) -> RSSNetOutput:
        """Classifies pixels.

        Args:
            images: (B, 3, H, W), normalised.
            features: The backbone's maps at `taps`.
        """
        # The two pathways: G, deep and coarse; L, local and fine.
        deep = self.deep(features[-len(self.deep.projections) :])
        stem, local = None, None
        if self.local_pathway is not None:
            stem, local = self.local_pathway(images, features[0])

        # S: the deep map upsampled, separated where the local map says that things end. M: both, fused.
        separated, separation = self.separation(deep, local)
        fused = self.fuse(separated if local is None else torch.cat([separated, local], dim=1))

        # E(M): pixel embeddings at stride 4.
        pixels = self.embed(fused, stem, (images.shape[-2] // LOGITS_STRIDE, images.shape[-1] // LOGITS_STRIDE))

        if self.cross_attention is None:
            logits = self.classify(pixels)
            if not self.training:
                return RSSNetOutput(logits)
            return RSSNetOutput(logits, Auxiliary(deep_logits=self.classify_deep(deep), separation=separation))

        # R: one region per class, from all pixels; a class is where pixels look like its region, if it is there at all.
        states = self.cross_attention(fused)
        presence = self.cross_attention.presence_logits(states[-1])  # (B, K)
        regions = self.project_regions(states[-1].regions)  # (B, K, d)
        offset = self.class_bias + F.logsigmoid(presence)[..., None, None]  # (B, K, 1, 1)
        logits = (regions @ pixels.flatten(2)).unflatten(-1, pixels.shape[-2:]) + offset
        if not self.training:
            return RSSNetOutput(logits)
        auxiliary = Auxiliary(
            deep_logits=self.classify_deep(deep),
            pixels=pixels,
            attention=tuple(
                self.cross_attention.attention_logits(state).unflatten(-1, fused.shape[-2:]) for state in states
            ),
            presence=(*(self.cross_attention.presence_logits(state) for state in states[:-1]), presence),
            regions=(*(self.project_regions(state.regions) for state in states[:-1]), regions),
            separation=separation,
        )
        return RSSNetOutput(logits, auxiliary)


def _at_size(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation, where there is something to interpolate."""
    same = features.shape[-2:] == size
    return features if same else F.interpolate(features, size=size, mode="bilinear")


def default_width(layout: BackboneLayout) -> int:
    """Decoder width by the backbone's, read at the stride of G: 64 tiny, 128 small, 256 base and large."""
    channels = layout.deep[0].channels
    return 64 if channels <= 256 else 128 if channels <= 448 else 256


def default_heads(width: int) -> int:
    """The most heads, of at least 32 channels each, that divide a width; one if it is narrower."""
    return next(heads for heads in range(max(1, width // 32), 0, -1) if width % heads == 0)


def fine_stride(layout: BackboneLayout) -> int:
    """Stride of the local pathway: 4 for pyramids; for plain transformers the largest up to 8 that divides the patch.

    Raises:
        ValueError: a patch that nothing divides.
    """
    if not layout.is_plain:
        return STEM_STRIDE
    patch = layout.deep[0].stride
    divisors = [stride for stride in range(2, min(8, patch - 1) + 1) if patch % stride == 0]
    if not divisors:
        raise ValueError(f"{layout.name} has patches of {patch} pixels, which no finer stride divides; use 14 or 16.")
    return divisors[-1]


def shallow_tap(config: RSSNetConfig, layout: BackboneLayout) -> Tap:
    """The tap that the local pathway starts from."""
    return layout.shallow if config.local_pathway.tap is None else layout.at(config.local_pathway.tap)
