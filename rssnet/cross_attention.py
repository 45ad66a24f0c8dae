"""DCA, the discriminative cross-attention: class queries gather region representations from pixels.

The paper (arXiv 2212.13764, abstract) says that region representations are made more discriminative by novel auxiliary
supervisions. The layers here and those supervisions (rssnet.losses) are ours.

In a layer, A_h = q_h k_h^T / sqrt(d_h) and R <- R + O(softmax over pixels (A_h) v_h), where q is a projection of the
regions R and k, v are projections of the pixel tokens T; then self-attention among regions, then a feed-forward part.

Shapes: B images, K classes (regions), d channels in H heads, N = h * w pixel tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RegionState(NamedTuple):
    """Regions after one layer, and what they asked of the pixels in it.

    Attributes:
        regions: (B, K, d), R.
        query: (B, K, d), the layer's queries, heads side by side.
        key: (B, N, d), the layer's keys.
    """

    regions: Tensor
    query: Tensor
    key: Tensor


class DiscriminativeLayer(nn.Module):
    """One layer, pre-norm: regions attend to pixels, then to one another, then a feed-forward part.

    Args:
        width: Channels, d.
        heads: Attention heads, H.
        mlp_ratio: Hidden width of the feed-forward part, as a multiple of `width`.
        null_token: Whether pixels compete with a learned token, whose value is zero.
    """

    def __init__(self, *, width: int, heads: int, mlp_ratio: float, null_token: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm_cross = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.project_cross = nn.Linear(width, width)
        self.null_key = nn.Parameter(torch.randn(1, 1, width)) if null_token else None
        self.norm_self = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project_self = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, int(width * mlp_ratio)), nn.GELU(), nn.Linear(int(width * mlp_ratio), width)
        )

    def forward(self, regions: Tensor, tokens: Tensor) -> RegionState:
        """Updates regions.

        Args:
            regions: (B, K, d).
            tokens: (B, N, d), normalised pixel tokens, T.
        """
        query, key, value = self.query(self.norm_cross(regions)), self.key(tokens), self.value(tokens)
        # The residual is needed: softmax(A) V alone makes all regions alike at the start.
        regions = regions + self.project_cross(self._attend(query, *self._with_null(key, value)))
        self_query, self_key, self_value = self.query_key_value(self.norm_self(regions)).chunk(3, dim=-1)
        regions = regions + self.project_self(self._attend(self_query, self_key, self_value))
        regions = regions + self.mlp(self.norm_mlp(regions))
        return RegionState(regions=regions, query=query, key=key)

    def _with_null(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.null_key is None:
            return key, value
        null = self.null_key.to(key.dtype).expand(key.shape[0], -1, -1)
        return torch.cat([key, null], dim=1), torch.cat([value, torch.zeros_like(null)], dim=1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, K, d), (B, N, d), (B, N, d) to (B, K, d), in H heads."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, K or N, d / H)
            for part in (query, key, value)
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class DiscriminativeCrossAttention(nn.Module):
    """Learned class queries that become region representations, layer by layer.

    Args:
        num_classes: K.
        width: Channels, d.
        layers: Number of layers, m.
        heads: Attention heads, H.
        mlp_ratio: Hidden width of feed-forward parts, as a multiple of `width`.
        null_token: Whether pixels compete with a learned token for attention.

    Raises:
        ValueError: heads that don't divide width.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        width: int,
        layers: int = 3,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        null_token: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"cross_attention.heads must divide the decoder's width, {width}; {heads} does not.")
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(num_classes, width))  # smaller ones make all regions alike
        self.norm_tokens = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            DiscriminativeLayer(width=width, heads=heads, mlp_ratio=mlp_ratio, null_token=null_token)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.presence = nn.Linear(width, 1)
        # At zero, the supervision of attention masks would start ten times too high at K = 150.
        self.attention_bias = nn.Parameter(torch.full((num_classes, 1), -3.0))

    def forward(self, fused: Tensor) -> list[RegionState]:
        """Regions of every layer.

        Args:
            fused: (B, d, h, w), M.

        Returns:
            One state per layer, its regions normalised.
        """
        tokens = self.norm_tokens(fused.flatten(2).transpose(1, 2))  # (B, N, d)
        regions = self.queries.to(tokens.dtype).repeat(tokens.shape[0], 1, 1)
        states = []
        for layer in self.layers:
            state = layer(regions, tokens)
            regions = state.regions
            states.append(state._replace(regions=self.norm(regions)))
        return states

    def attention_logits(self, state: RegionState) -> Tensor:
        """The head-mean of a layer's attention logits, with a bias per class: masks of classes, before a sigmoid.

        The mean over heads of scaled products is the product over all channels, divided: heads are never held apart,
        and training too can use fused attention.

        Returns:
            (B, K, N).
        """
        scale = self.heads * math.sqrt(state.query.shape[-1] / self.heads)
        # Scaled first: in float16 the product itself would overflow.
        return (state.query / scale) @ state.key.transpose(1, 2) + self.attention_bias

    def presence_logits(self, state: RegionState) -> Tensor:
        """How present each class is said to be, before a sigmoid: (B, K)."""
        return self.presence(state.regions).squeeze(-1)
