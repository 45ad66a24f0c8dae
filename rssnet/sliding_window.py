"""Where windows stand on an image, and how what a model says of each is averaged into one class map.

Probabilities are averaged on a grid of cells about as large as those of the model's logits. Windows come from top to
bottom, so only a band of the grid, about as high as a window, exists at a time; rows that no later window reaches are
brought to the image's resolution and reduced to a class and a confidence. Ours; knows no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

# RSSNet's logits have a quarter of the image's resolution. Windows a multiple of four pixels apart have their cells on
# top of each other, so that averaging doesn't blur.
_ALIGNMENT = 4
# Least weight of a position in a window's blend, as a share of the window's side: the very edge of a window counts for
# almost nothing wherever another window sees it too.
_LEAST_WEIGHT = 1e-3


def window_starts(size: int, crop: int, stride: int) -> tuple[int, ...]:
    """First pixels of the windows along one side of an image.

    Args:
        size: of the image, in pixels.
        crop: of a window; a smaller image gets one window that reaches beyond it.
        stride: between windows, at most `crop`; rounded down to a multiple of four pixels. The last window ends where
            the image does, or up to three pixels behind.
    """
    last = size - crop
    if last <= 0:
        return (0,)
    if stride >= _ALIGNMENT:
        stride -= stride % _ALIGNMENT
        last += -last % _ALIGNMENT
    return (*range(0, last, stride), last)


def resampling_weights(centers: Tensor, size: int, support: float) -> tuple[int, Tensor]:
    """Linear interpolation of a row of cells as a matrix, with the cells it needs.

    Equal to `torch.nn.functional.interpolate(mode="bilinear", antialias=True)` along one dimension, but for any part
    of the row.

    Args:
        centers: (n,) float64 positions from 0 to `size`; cell i reaches from i to i + 1.
        size: number of cells.
        support: half the filter's width in cells: 1, or the factor of the reduction where that is larger.

    Returns:
        The first cell needed and the weights (n, cells needed); every row of weights sums to one.
    """
    first = max(0, math.floor(centers.min().item() - support))
    end = min(size, math.ceil(centers.max().item() + support))
    cells = torch.arange(first, end, dtype=torch.float64) + 0.5
    weights = (1 - (centers[:, None] - cells).abs() / support).clamp_min(0)
    return first, (weights / weights.sum(1, keepdim=True)).float()


@dataclass(frozen=True)
class Axis:
    """One side of an image at one scale, with its windows.

    Attributes:
        size: of the image, in pixels.
        scaled_size: the same after scaling.
        crop: of a window, in pixels of the scaled image.
        starts: the windows' first pixels in the scaled image.
    """

    size: int
    scaled_size: int
    crop: int
    starts: tuple[int, ...]

    @classmethod
    def of(cls, size: int, scale: float, crop: int, stride: int) -> Axis:
        """The windows along a side of `size` pixels that is first scaled by `scale`."""
        scaled_size = max(1, round(size * scale))
        return cls(size, scaled_size, crop, window_starts(scaled_size, crop, stride))

    def to_image(self, scaled: int) -> float:
        """A position in the scaled image as a position in the image."""
        return scaled * self.size / self.scaled_size

    @property
    def pad_mode(self) -> str:
        """How a window that reaches beyond the image is filled up, as `torch.nn.functional.pad` calls it.

        By the border's pixels where three at most are missing; by a constant where the image is smaller than a window,
        for a repeated border would be long stripes.
        """
        return "replicate" if self.scaled_size > self.crop else "constant"

    def pixels(self, start: int) -> tuple[slice, Tensor | None]:
        """The image's pixels that the window at `start` is made of, and the weights (window, pixels) that make it.

        The weights are None where the image isn't scaled. The window is shorter than `crop` where the image ends.
        """
        end = min(start + self.crop, self.scaled_size)
        if self.scaled_size == self.size:
            return slice(start, end), None
        factor = self.size / self.scaled_size
        centers = (torch.arange(start, end, dtype=torch.float64) + 0.5) * factor
        first, weights = resampling_weights(centers, self.size, max(1.0, factor))
        return slice(first, first + weights.shape[1]), weights

    def shares(self, cell: int, window_cells: int, device: torch.device) -> dict[int, Share]:
        """What each window, by its start, adds to a grid along this side.

        A window's weight falls linearly from its middle to its edges, so that windows blend without a seam. At each
        cell of the grid the weights of all windows sum to one.

        Args:
            cell: side of the grid's cells, in pixels of the image.
            window_cells: number of cells that the model gives for a window.
            device: of the weights.

        Returns:
            Shares by start; a window that covers the center of no cell has none.
        """
        centers = (torch.arange(math.ceil(self.size / cell), dtype=torch.float64) + 0.5) * cell
        # The last cell may reach beyond the last window, and its center too.
        centers = centers.clamp(max=self.to_image(self.starts[-1] + self.crop))
        support = max(1.0, cell * (self.scaled_size / self.size) * (window_cells / self.crop))
        weight_sum = torch.zeros_like(centers)
        shares: dict[int, Share] = {}
        for start in self.starts:
            low, high = self.to_image(start), self.to_image(start + self.crop)
            covered = ((centers >= low) & (centers <= high)).nonzero().flatten()
            if not len(covered):  # a window smaller than a cell, between two centers
                continue
            position = (centers[covered] - low) / (high - low)
            weight = torch.minimum(position, 1 - position).clamp_min(_LEAST_WEIGHT)
            weight_sum[covered] += weight
            first_cell, interpolation = resampling_weights(position * window_cells, window_cells, support)
            shares[start] = Share(int(covered[0]), first_cell, weight[:, None] * interpolation)
        for start, share in shares.items():
            weights = share.weights / weight_sum[share.row : share.row + len(share.weights), None]
            shares[start] = replace(share, weights=to_device(weights.float(), device))
        return shares


@dataclass(frozen=True)
class Share:
    """What a window adds to a grid along one side.

    Attributes:
        row: first row (or column) of the grid that the window adds to.
        cell: first cell of the window that is needed.
        weights: (rows of the grid, cells of the window): interpolation times the window's weight in the blend.
    """

    row: int
    cell: int
    weights: Tensor


class ClassMap:
    """The most probable classes of every pixel of one image, made from windows that come from top to bottom.

    Args:
        height, width: of the image, in pixels.
        num_classes: number of classes K.
        cell: side of the grid's cells, in pixels.
        pixels_at_once: how many pixels may have all their K probabilities in memory at full resolution.
        top_k: how many classes are kept of each pixel.
        device: where probabilities are averaged.
    """

    def __init__(
        self,
        height: int,
        width: int,
        num_classes: int,
        cell: int,
        pixels_at_once: int,
        top_k: int,
        device: torch.device,
    ) -> None:
        pinned = device.type == "cuda"  # so that results come while the device works on
        self._classes = torch.empty(top_k, height, width, dtype=_class_dtype(num_classes), pin_memory=pinned)
        self._probabilities = torch.empty(top_k, height, width, pin_memory=pinned)
        self._cell = cell
        self._rows = math.ceil(height / cell)
        self._columns = math.ceil(width / cell)
        self._rows_at_once = max(1, pixels_at_once // (cell * cell * self._columns))
        self._band = torch.zeros(num_classes, 0, self._columns, device=device)
        self._band_start = 0  # row of the grid that the band starts with
        self._reduced = 0  # rows of the grid above this one are done

    def add(self, rows: Share, columns: Share, probabilities: Tensor) -> None:
        """Adds a window's probabilities (K, h, w), the weights of `rows` and `columns` applied.

        Windows must come in the order of `rows.row`.
        """
        self._reduce(rows.row)
        height, width = rows.weights.shape[1], columns.weights.shape[1]
        needed = probabilities[:, rows.cell : rows.cell + height, columns.cell : columns.cell + width]
        addition = rows.weights @ needed @ columns.weights.T  # (K, rows, columns)
        top, left = rows.row - self._band_start, columns.row
        missing = top + addition.shape[1] - self._band.shape[1]
        if missing > 0:
            self._band = F.pad(self._band, (0, 0, 0, missing))
        self._band[:, top : top + addition.shape[1], left : left + addition.shape[2]] += addition

    def finish(self) -> tuple[Tensor, Tensor]:
        """Class ids and probabilities, (top_k, H, W) as from `most_probable` and on the CPU, after the last window.

        Of a CUDA device they are there once its current stream is synchronized.
        """
        self._reduce(self._rows)
        return self._classes, self._probabilities

    def _reduce(self, complete_rows: int) -> None:
        """Reduces the rows above `complete_rows`, except one whose interpolation needs the next row."""
        end = complete_rows if complete_rows == self._rows else complete_rows - 1
        for start in range(self._reduced, end, self._rows_at_once):
            stop = min(start + self._rows_at_once, end)
            # One more row on either side, so that interpolation in parts equals interpolation of the whole.
            above, below = max(start - 1, 0), min(stop + 1, self._rows)
            cells = self._band[:, above - self._band_start : below - self._band_start]
            # In log space, for there interpolated probabilities are the softmax of interpolated logits.
            cells = cells.clamp_min(torch.finfo(cells.dtype).tiny).log()
            scores = F.interpolate(cells[None], scale_factor=self._cell, mode="bilinear", align_corners=False)[0]
            scores = scores[:, (start - above) * self._cell : (stop - above) * self._cell]
            top_k, height, width = self._classes.shape
            first_pixel = start * self._cell
            classes, probabilities = most_probable(scores[:, : height - first_pixel, :width], top_k)
            rows = slice(first_pixel, first_pixel + classes.shape[1])
            # One rank at a time: the rows of all of them together lie apart in memory, which no copy can do unawaited.
            for rank in range(top_k):
                self._classes[rank, rows].copy_(classes[rank], non_blocking=True)
                self._probabilities[rank, rows].copy_(probabilities[rank], non_blocking=True)
        self._reduced = max(self._reduced, end)
        obsolete = self._reduced - 1 - self._band_start
        if obsolete > 0:
            self._band = self._band[:, obsolete:].clone()  # a view would keep the whole band alive
            self._band_start += obsolete


def most_probable(scores: Tensor, top_k: int = 1) -> tuple[Tensor, Tensor]:
    """The most probable classes of every pixel, the first the winner, and their probabilities.

    Args:
        scores: (K, H, W) logits, or log probabilities that may lack a constant per pixel.
        top_k: how many classes, 1 to K.

    Returns:
        Class ids (top_k, H, W), uint8 up to 255 classes and int16 above, and probabilities (top_k, H, W) float32. Of
        equally probable classes the lower id comes first.
    """
    highest, winner = scores.max(0)
    exponentials = (scores - highest).exp_()
    confidence = exponentials.sum(0).reciprocal_()
    dtype = _class_dtype(len(scores))
    classes, probabilities = [winner.to(dtype)], [confidence]
    # One maximum after the other, for topk promises no order among equals, and the winner must not depend on top_k.
    for _ in range(top_k - 1):
        exponentials.scatter_(0, winner[None], -1.0)  # less than what any class has that is left
        value, winner = exponentials.max(0)
        classes.append(winner.to(dtype))
        probabilities.append(value * confidence)
    return torch.stack(classes), torch.stack(probabilities)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; a CUDA device is not waited for, which takes a copy in pinned memory on the way."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return staged.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A tensor on the CPU; from a CUDA device it is there once the device's current stream is synchronized."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _class_dtype(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 255 else torch.int16
