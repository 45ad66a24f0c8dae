"""SASM, the spatially adaptive separation module.

The paper (arXiv 2212.13764, abstract) says that it makes deep representations more separate, adaptively in space. How
is ours: each fine location is composed of the tokens around it, attracted to those it belongs with and repelled from
those it has been smeared with.

Shapes: B images, d channels in g groups, (h, w) tokens, r fine locations per token and axis, k*k tokens in a window.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

# Bilinear weights are zero for most tokens of a window; this floor lets their logits be finite and be learned.
BILINEAR_FLOOR = 1e-3


class SeparationWeights(NamedTuple):
    """How fine locations were composed of tokens, in phase layout: r*r fine locations for each of (h, w) tokens.

    Attributes:
        attraction: (B, g, k*k, r*r, h, w), w: the tokens a location belongs with; sums to one over k*k.
        repulsion: (B, g, k*k, r*r, h, w), v: the tokens it has been smeared with; sums to one over k*k.
        gate: (B, g, 1, r*r, h, w), a: strength of the repulsion, from 0 to a_max.
    """

    attraction: Tensor
    repulsion: Tensor
    gate: Tensor

    @property
    def composition(self) -> Tensor:
        """(B, g, k*k, r*r, h, w), u = w + a (w - v); sums to one over k*k."""
        return self.attraction + self.gate * (self.attraction - self.repulsion)


def bilinear_weights(ratio: int, kernel_size: int) -> Tensor:
    """Weights of bilinear upsampling (half-pixel centres) over a window of tokens.

    Args:
        ratio: Fine locations per token and axis, r.
        kernel_size: Odd side of the window, 3 or more, k.

    Returns:
        (k*k, r*r); columns sum to one.
    """
    # Centre of each fine location, in tokens from the centre of its own token.
    offsets = (torch.arange(ratio, dtype=torch.float64) + 0.5) / ratio - 0.5
    positions = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    per_axis = (1 - (positions[:, None] - offsets[None, :]).abs()).clamp(min=0)  # (k, r)
    return torch.einsum("ip,jq->ijpq", per_axis, per_axis).reshape(kernel_size**2, ratio**2).float()


def window_shifts(tokens: Tensor, kernel_size: int) -> list[Tensor]:
    """The map shifted to each of the k*k places of a window, row by row, as views of one padded copy.

    Args:
        tokens: (..., h, w) with at least three dimensions.
        kernel_size: Odd side of the window, k.

    Returns:
        k*k views (..., h, w); borders are replicated.
    """
    height, width = tokens.shape[-2:]
    margin = kernel_size // 2
    padded = F.pad(tokens, (margin, margin, margin, margin), mode="replicate")
    return [
        padded[..., row : row + height, column : column + width]
        for row in range(kernel_size)
        for column in range(kernel_size)
    ]


def compose(tokens: Tensor, composition: Tensor, kernel_size: int) -> Tensor:
    """Weighted sums of the tokens around each fine location.

    One pass of k*k products: never k*k copies of the map.

    Args:
        tokens: (B, d, h, w).
        composition: (B, g, k*k, r*r, h, w).
        kernel_size: Odd side of the window, k.

    Returns:
        (B, d, h * r, w * r).
    """
    batch, channels, height, width = tokens.shape
    groups, phases = composition.shape[1], composition.shape[3]
    composed = tokens.new_zeros(batch, groups, channels // groups, phases, height, width)
    for shifted, weight in zip(window_shifts(tokens, kernel_size), composition.unbind(dim=2), strict=True):
        shifted = shifted.reshape(batch, groups, channels // groups, 1, height, width)
        composed = torch.addcmul(composed, shifted, weight.unsqueeze(2).to(tokens.dtype))
    return F.pixel_shuffle(composed.reshape(batch, channels * phases, height, width), math.isqrt(phases))


class BilinearUpsampling(nn.Module):
    """Stands where the separation module would, as an ablation or to ask what a trained one is worth.

    Args:
        ratio: Fine locations per token and axis.
    """

    def __init__(self, *, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, deep: Tensor, local: Tensor | None) -> tuple[Tensor, None]:  # noqa: ARG002
        """(B, d, h, w) to (B, d, h * ratio, w * ratio); `local` is not read."""
        return F.interpolate(deep, scale_factor=float(self.ratio), mode="bilinear"), None


class SpatiallyAdaptiveSeparation(nn.Module):
    """Upsamples the deep map so that it separates where the local map says that things end.

    It starts as bilinear upsampling, up to about `max_gate * sigmoid(gate_bias)`.

    Args:
        width: Channels of the deep map, d.
        local_width: Channels of the local map; None when there is no local pathway.
        ratio: Fine locations per token and axis, r.
        kernel_size: Odd side of the window of tokens, k.
        groups: Channel groups with weights of their own, g.
        max_gate: Largest strength of the repulsion, a_max.
        gate_bias: Initial bias of the gate.
        form: "conv", "affinity" or "plain", as in `SeparationConfig`.

    Raises:
        ValueError: groups that don't divide width.
    """

    def __init__(
        self,
        *,
        width: int,
        local_width: int | None,
        ratio: int,
        kernel_size: int = 3,
        groups: int = 1,
        max_gate: float = 1.0,
        gate_bias: float = -3.0,
        form: str = "conv",
    ) -> None:
        super().__init__()
        if width % groups:
            raise ValueError(f"separation.groups must divide the decoder's width, {width}; {groups} does not.")
        self.ratio = ratio
        self.kernel_size = kernel_size
        self.groups = groups
        self.max_gate = max_gate
        self.form = form

        hidden = max(32, width // 4)
        self.from_deep = nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, hidden, kernel_size=1))
        self.from_local = None if local_width is None else nn.Conv2d(local_width, hidden, kernel_size=1)
        self.mix = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        window = kernel_size**2
        self.counts = {"conv": [window, window, 1], "affinity": [1], "plain": [1]}[form]
        self.predict = nn.Conv2d(hidden, groups * sum(self.counts), kernel_size=1)
        nn.init.zeros_(self.predict.weight)
        nn.init.zeros_(self.predict.bias)  # pyright: ignore[reportArgumentType]
        self.gate_bias = nn.Parameter(torch.full((groups, 1, 1, 1, 1), gate_bias))
        if form == "affinity":
            self.query = nn.Conv2d(hidden, groups * hidden, kernel_size=1)
            self.key = nn.Conv2d(width, groups * hidden, kernel_size=1)
            # Silent at the start, for the same reason that `predict` is.
            nn.init.zeros_(self.query.weight)
            nn.init.zeros_(self.query.bias)  # pyright: ignore[reportArgumentType]
        bilinear = bilinear_weights(ratio, kernel_size).clamp(min=BILINEAR_FLOOR).log()
        self.register_buffer("log_bilinear", bilinear[..., None, None], persistent=False)  # (k*k, r*r, 1, 1)

    log_bilinear: Tensor

    def forward(self, deep: Tensor, local: Tensor | None) -> tuple[Tensor, SeparationWeights]:
        """Separates a deep map.

        Args:
            deep: (B, d, h, w), G.
            local: (B, local_width, h * r, w * r), L; None when there is no local pathway.

        Returns:
            (B, d, h * r, w * r), S, and the weights that made it.
        """
        weights = self.weigh(deep, local)
        return compose(deep, weights.composition, self.kernel_size), weights

    def weigh(self, deep: Tensor, local: Tensor | None) -> SeparationWeights:
        """The weights that `forward` composes with."""
        # A 1x1 convolution commutes with bilinear upsampling: the deep half runs at token stride.
        hidden = F.interpolate(self.from_deep(deep), scale_factor=float(self.ratio), mode="bilinear")
        if self.from_local is not None:
            assert local is not None
            hidden = hidden + self.from_local(local)
        hidden = F.gelu(self.mix(F.gelu(hidden)))

        predicted = self._to_phases(self.predict(hidden)).split(self.counts, dim=2)
        gate = self.max_gate * torch.sigmoid(predicted[-1] + self.gate_bias)
        if self.form == "conv":
            attraction, repulsion = predicted[0], predicted[1]
        elif self.form == "affinity":
            attraction = self._affinity(self._to_phases(self.query(hidden)), self.key(deep))
            repulsion = -attraction
        else:
            attraction = predicted[0].new_zeros(())
            repulsion = gate.new_zeros(()).expand(*gate.shape[:2], self.kernel_size**2, *gate.shape[3:])
        return SeparationWeights(
            attraction=torch.softmax((attraction + self.log_bilinear).expand_as(repulsion), dim=2),
            repulsion=torch.softmax(repulsion, dim=2),
            gate=gate,
        )

    def _to_phases(self, fine: Tensor) -> Tensor:
        """(B, g * n, h * r, w * r) to (B, g, n, r*r, h, w)."""
        batch, channels = fine.shape[:2]
        phases = F.pixel_unshuffle(fine, self.ratio)
        return phases.reshape(batch, self.groups, channels // self.groups, self.ratio**2, *phases.shape[-2:])

    def _affinity(self, query: Tensor, key: Tensor) -> Tensor:
        """Scaled products of queries (B, g, e, r*r, h, w) and keys around (B, g * e, h, w): (B, g, k*k, r*r, h, w)."""
        batch, groups, channels = query.shape[:3]
        products = [
            (query * shifted.reshape(batch, groups, channels, 1, *key.shape[-2:])).sum(dim=2)
            for shifted in window_shifts(key, self.kernel_size)
        ]
        return torch.stack(products, dim=2) / math.sqrt(channels)
