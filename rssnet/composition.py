"""Weighted sums of the tokens around each fine location, without a copy of the map for each place around.

Shapes: B images, d channels in g groups, (h, w) tokens, r fine locations per token and axis, k*k tokens in a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .borders import replicate_border

# Parts that backward goes through a map in: more of them take less memory and more calls.
_BANDS = 4


def window_shifts(tokens: Tensor, kernel_size: int) -> Iterator[Tensor]:
    """The map shifted to each of the k*k places of a window, row by row, as views of one padded copy.

    Args:
        tokens: (B, C, h, w).
        kernel_size: Odd side of the window, k.

    Yields:
        k*k views (B, h, w, C); borders are replicated.
    """
    height, width = tokens.shape[-2:]
    padded = replicate_border(tokens, kernel_size // 2).permute(0, 2, 3, 1)
    for row in range(kernel_size):
        for column in range(kernel_size):
            yield padded[:, row : row + height, column : column + width]


def compose(tokens: Tensor, composition: Tensor, kernel_size: int) -> Tensor:
    """Weighted sums of the tokens around each fine location.

    k*k products, each of which spreads a token over the r*r fine locations inside it and is added where it belongs.

    Args:
        tokens: (B, d, h, w).
        composition: (B, h * r, w * r, g, k*k), the weights.
        kernel_size: Odd side of the window, k.

    Returns:
        (B, d, h * r, w * r), channels last in memory.
    """
    composed: Tensor = _Compose.apply(tokens, composition.to(tokens.dtype), kernel_size)  # pyright: ignore[reportAssignmentType]
    return composed


class _Compose(torch.autograd.Function):
    """Autograd would do, but in backward it would hold several maps at once that are needed one after another."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, composition: Tensor, kernel_size: int) -> Tensor:
        ctx.save_for_backward(tokens, composition)
        ctx.kernel_size = kernel_size
        batch, channels, height, width = tokens.shape
        fine_height, fine_width, groups = composition.shape[1:4]
        ratio = fine_height // height
        weights = composition.reshape(batch, height, ratio, width, ratio, groups, -1)
        composed = tokens.new_zeros(batch, height, ratio, width, ratio, groups, channels // groups)
        for place, shifted in enumerate(window_shifts(tokens, kernel_size)):
            spread = shifted.reshape(batch, height, 1, width, 1, groups, channels // groups)
            composed.addcmul_(spread, weights[..., place, None])
        return composed.reshape(batch, fine_height, fine_width, channels).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens, composition = ctx.saved_tensors
        kernel_size: int = ctx.kernel_size
        batch, channels, height, width = tokens.shape
        groups, window = composition.shape[3:]
        ratio = composition.shape[1] // height
        margin = kernel_size // 2
        token_gradient = tokens.new_zeros(batch, height + 2 * margin, width + 2 * margin, channels)
        fine = (batch, height, ratio, width, ratio, groups, window)
        weights, weights_gradient = composition.reshape(fine), composition.new_empty(fine)
        gradient = gradient.permute(0, 2, 3, 1).reshape(*fine[:-1], channels // groups)
        shifts = list(window_shifts(tokens, kernel_size))
        start = 0
        # A band of rows at a time, so that no copy of a whole map is made.
        for rows, spread in zip(gradient.tensor_split(_BANDS, 1), weights.tensor_split(_BANDS, 1), strict=True):
            band = slice(start, start + rows.shape[1])
            inside = (batch, rows.shape[1], width, groups, ratio**2)  # the fine locations inside each token
            rows = rows.permute(0, 1, 3, 5, 2, 4, 6).reshape(*inside, channels // groups)
            spread = spread.permute(0, 1, 3, 5, 6, 2, 4).reshape(*inside[:-1], window, 1, ratio**2)
            for place, shifted in enumerate(shifts):
                token = shifted[:, band].reshape(*inside[:-1], channels // groups, 1)
                weights_gradient[:, band, ..., place] = (
                    (rows @ token).reshape(*inside[:-1], ratio, ratio).permute(0, 1, 4, 2, 5, 3)
                )
                row, column = divmod(place, kernel_size)
                back = spread[..., place, :, :] @ rows  # (B, h', w, g, 1, d / g)
                token_gradient[:, row + start : row + band.stop, column : column + width] += back.flatten(3)
            start = band.stop
        return (
            _fold_borders(token_gradient, margin).permute(0, 3, 1, 2),
            weights_gradient.reshape(composition.shape),
            None,
        )


def _fold_borders(padded: Tensor, margin: int) -> Tensor:
    """Adds what reached replicated borders to the cells that they copy: (B, h + 2m, w + 2m, C) to (B, h, w, C)."""
    for dim in (1, 2):
        size = padded.shape[dim] - 2 * margin
        before, inside, after = padded.split([margin, size, margin], dim=dim)
        inside.select(dim, 0).add_(before.sum(dim))
        inside.select(dim, size - 1).add_(after.sum(dim))
        padded = inside
    return padded
