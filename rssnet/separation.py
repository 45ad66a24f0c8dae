"""SASM, the spatially adaptive separation module.

The paper (arXiv 2212.13764, abstract) says that it makes deep representations more separate, adaptively in space. How
is ours: the deep map is upsampled bilinearly, and each fine location is moved towards the tokens around it that it
belongs with and away from those it has been smeared with.

Shapes: B images, d channels in g groups, (h, w) tokens, r fine locations per token and axis, k*k tokens in a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .composition import compose, window_shifts

# Bilinear weights are zero for most tokens of a window; this floor lets their logits be finite and be learned.
BILINEAR_FLOOR = 1e-3

# Of what is predicted: an optimizer that moves every weight equally far would otherwise move a softmax from bilinear
# weights to single tokens within tens of steps, long before the maps that it reads mean anything.
PREDICTION_SCALE = 0.1


@dataclass(frozen=True)
class SeparationWeights:
    """How fine locations were composed of the tokens around them.

    Attributes:
        attraction: (B, h * r, w * r, g, k*k), w: the tokens a location belongs with; sums to one over k*k.
        repulsion: (B, h * r, w * r, g, k*k), v: the tokens it has been smeared with; sums to one over k*k.
        gate: (B, h * r, w * r, g, 1), a: strength of the two, from 0 to a_max.
        bilinear: (r, r, k*k), b: the weights of bilinear upsampling, the same in every token.
    """

    attraction: Tensor
    repulsion: Tensor
    gate: Tensor
    bilinear: Tensor

    @property
    def composition(self) -> Tensor:
        """(B, h * r, w * r, g, k*k), u = b + a (w - v); sums to one over k*k."""
        height, width = self.gate.shape[1:3]
        ratio = self.bilinear.shape[0]
        bilinear = self.bilinear.repeat(height // ratio, width // ratio, 1)[:, :, None]
        # Without the difference of the two, which would be kept for backward.
        return torch.addcmul(bilinear, self.gate, self.attraction).addcmul(self.gate, self.repulsion, value=-1)


# So that exported programs return it, and can be saved.
torch.export.register_dataclass(SeparationWeights, serialized_type_name="rssnet.SeparationWeights")


def bilinear_weights(ratio: int, kernel_size: int) -> Tensor:
    """Weights of bilinear upsampling (half-pixel centres) over a window of tokens.

    Args:
        ratio: Fine locations per token and axis, r.
        kernel_size: Odd side of the window, 3 or more, k.

    Returns:
        (r, r, k*k), for each place inside a token; sums to one over k*k.
    """
    # Centre of each fine location, in tokens from the centre of its own token.
    offsets = (torch.arange(ratio, dtype=torch.float64) + 0.5) / ratio - 0.5
    positions = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    per_axis = (1 - (offsets[:, None] - positions[None, :]).abs()).clamp(min=0)  # (r, k)
    return torch.einsum("pi,qj->pqij", per_axis, per_axis).reshape(ratio, ratio, kernel_size**2).float()


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

    It starts as bilinear upsampling, up to about `max_gate * sigmoid(gate_bias)`, and is that where the gate is closed.

    Args:
        width: Channels of the deep map, d.
        local_width: Channels of the local map; None when there is no local pathway.
        ratio: Fine locations per token and axis, r.
        kernel_size: Odd side of the window of tokens, k.
        groups: Channel groups with weights of their own, g.
        max_gate: Largest strength of attraction and repulsion, a_max.
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

        hidden = max(16, width // 4)
        window = kernel_size**2
        self.from_deep = nn.Conv2d(width, hidden, kernel_size=1)
        self.from_local = None if local_width is None else nn.Conv2d(local_width, hidden, kernel_size=1)
        self.mix = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        # Zero at the start, so that what is added to bilinear weights and to the gate's bias is learned from nothing.
        self.predict_gate = _zero_convolution(hidden, groups)
        if form == "conv":
            self.predict_attraction = _zero_convolution(hidden, groups * window)
            self.predict_repulsion = _zero_convolution(hidden, groups * window)
        elif form == "affinity":
            self.query = _zero_convolution(hidden, groups * hidden)
            self.key = nn.Conv2d(width, groups * hidden, kernel_size=1)
        self.gate_bias = nn.Parameter(torch.full((groups, 1), gate_bias))
        # Saved, for models that are built on meta and then filled.
        self.register_buffer("bilinear", bilinear_weights(ratio, kernel_size))

    bilinear: Tensor

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

        # What is added to the bilinear attraction, and what repels: (B, h * r, w * r, g, k*k).
        gate = self.max_gate * torch.sigmoid(self._grouped(self.predict_gate(hidden)) + self.gate_bias)
        if self.form == "conv":
            attraction = self._predicted(self.predict_attraction, hidden)
            repulsion = self._predicted(self.predict_repulsion, hidden)
        elif self.form == "affinity":
            attraction = self._affinity(self._predicted(self.query, hidden), self.key(deep))
            repulsion = -attraction
        else:
            attraction = repulsion = torch.zeros_like(gate).expand(*gate.shape[:-1], self.kernel_size**2)

        prior = self.bilinear.clamp(min=BILINEAR_FLOOR).log().repeat(*deep.shape[-2:], 1)[:, :, None]
        return SeparationWeights(
            attraction=(attraction + prior).softmax(dim=-1),
            repulsion=repulsion.softmax(dim=-1),
            gate=gate,
            bilinear=self.bilinear,
        )

    def _predicted(self, layer: nn.Conv2d, hidden: Tensor) -> Tensor:
        """(B, h * r, w * r, g, n), scaled: by the layer's weights, which takes no memory of the map's size."""
        return self._grouped(F.conv2d(hidden, PREDICTION_SCALE * layer.weight))

    def _grouped(self, features: Tensor) -> Tensor:
        """(B, g * n, height, width) to (B, height, width, g, n)."""
        return features.permute(0, 2, 3, 1).unflatten(-1, (self.groups, -1))

    def _affinity(self, query: Tensor, key: Tensor) -> Tensor:
        """Scaled products of queries (B, h * r, w * r, g, e) and the keys (B, g * e, h, w) around, for g, k*k."""
        batch, height, width, groups, channels = query.shape
        ratio = self.ratio
        inside = query.reshape(batch, height // ratio, ratio, width // ratio, ratio, groups, channels)
        products = [
            (inside * shifted.unflatten(-1, (groups, channels))[:, :, None, :, None]).sum(dim=-1)
            for shifted in window_shifts(key, self.kernel_size)
        ]
        return torch.stack(products, dim=-1).reshape(batch, height, width, groups, -1) / math.sqrt(channels)


def _zero_convolution(inputs: int, outputs: int) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)
    nn.init.zeros_(convolution.weight)
    return convolution
