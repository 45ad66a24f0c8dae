"""Borders continued by their own values, for windows that reach beyond a map."""

from __future__ import annotations

import torch
from torch import Tensor


def replicate_border(features: Tensor, margin: int) -> Tensor:
    """Continues a map on all sides by its outermost values.

    `F.pad(mode="replicate")` does the same, but compiled it fails in backward on maps whose channels lie last in memory
    (torch 2.15: the strides that its meta kernel promises are not those that it returns).

    Args:
        features: (B, C, h, w).
        margin: Cells to add on each side, 0 or more.

    Returns:
        (B, C, h + 2 * margin, w + 2 * margin).
    """
    for dim in (2, 3):
        size = features.shape[dim]
        first, last = features.narrow(dim, 0, 1), features.narrow(dim, size - 1, 1)
        features = torch.cat([*[first] * margin, features, *[last] * margin], dim=dim)
    return features
