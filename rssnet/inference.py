"""Segmentation of whole images of any size with a model that takes crops of one size.

A window slides over the image; the class probabilities of windows, scales and mirror images are averaged. Knows no
files and no pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .sliding_window import Axis, ClassMap, Share, most_probable, to_device, to_host

_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image of H x W pixels.

    Attributes:
        top_classes: (top_k, H, W) ids of the most probable classes on the CPU, the winner first; uint8 up to 255
            classes and int16 above.
        top_probabilities: (top_k, H, W) float32 on the CPU, the probabilities of these classes.
    """

    top_classes: Tensor
    top_probabilities: Tensor

    @property
    def class_map(self) -> Tensor:
        """(H, W) class ids: of each pixel the most probable class."""
        return self.top_classes[0]

    @property
    def confidence(self) -> Tensor:
        """(H, W) float32, the probability of the winning class."""
        return self.top_probabilities[0]


class Predictor:
    """Segments images of any mix of sizes.

    An image that fits into one window is padded with the model's mean colour, never resized, and what the padding got
    is cut off: its classes are exactly the argmax of the model's logits, upsampled bilinearly. A larger one is covered
    by overlapping windows whose probabilities are blended with weights that fall from the middle of a window to its
    edges. Windows of different images share a batch.

    Memory doesn't grow with the height of an image and hardly with its width. Beside the images and results (3 bytes
    and 5 bytes per pixel, and 5 more for each further class of `top_k`) it holds the forward pass of `window_batch`
    windows and, of the image at work, the K probabilities of a band of its width and a window's height at the
    resolution of the logits, a copy of them while the band moves on, and those of an eighth of a window's pixels at
    full resolution: for K = 150 and a crop of 512, 120 MB for a width of 2,500 pixels and 440 MB for one of 10,000. A
    scale s makes the band 1 / s windows high, for each window is resampled from the image and its probabilities back to
    the band on its own; no scaled image ever exists.

    Args:
        model: an RSSNet, on the device to use; gives `config.image_size`, `pixel_mean` and `pixel_std`.
        crop_size: (height, width) of the windows in pixels; the model's image size when not given.
        stride: (vertical, horizontal) pixels between windows, at most the crop; two thirds of the crop when not given.
            Rounded down to a multiple of 4 pixels, so that the cells of overlapping windows coincide (patches of 14 at
            crops that 28 doesn't divide have cells of a little more than 4 pixels; theirs are interpolated).
        window_batch: windows per forward pass.
        scales: factors that the image is scaled by; probabilities are averaged over them.
        flip: whether each window is also seen mirrored left to right.
        dtype: torch.bfloat16 or torch.float16 to run the model under autocast.
        top_k: how many classes of each pixel are kept with their probabilities; 1 is the winner alone.
        compile: run the model through torch.compile. Each forward pass then has exactly `window_batch` windows, blank
            ones filling up the last: another size would be compiled anew.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        crop_size: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        window_batch: int = 8,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        dtype: torch.dtype | None = None,
        top_k: int = 1,
        compile: bool = False,
    ) -> None:
        self.model: Any = model
        self.crop_size = _pair("crop_size", self.model.config.image_size if crop_size is None else crop_size)
        self.stride = _pair(
            "stride", tuple(max(1, side * 2 // 3) for side in self.crop_size) if stride is None else stride
        )
        if any(step > side for step, side in zip(self.stride, self.crop_size, strict=True)):
            raise ValueError(
                f"stride {self.stride} is larger than the crop {self.crop_size} and would leave gaps; "
                "two thirds of the crop is usual."
            )
        if window_batch < 1:
            raise ValueError(f"window_batch must be at least 1, got {window_batch}.")
        if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
            raise ValueError(f"scales must be one or more factors above 0, such as (0.75, 1.0, 1.25), got {scales}.")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be torch.bfloat16, torch.float16, torch.float32 or None, got {dtype}.")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, which is the most probable class, got {top_k}.")
        self.window_batch = window_batch
        self.scales = tuple(scales)
        self.flip = flip
        self.dtype = dtype
        self.top_k = top_k
        self._compiled = compile
        self._run: Any = torch.compile(model, dynamic=False) if compile else model
        self._colours: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()  # not inference mode: what a model caches (rotary tables) must still serve training
    def __call__(self, images: Sequence[Tensor]) -> list[Prediction]:
        """Segments images.

        Args:
            images: uint8 tensors (3, H, W) of any sizes, RGB, on any device.

        Returns:
            One prediction per image, in order.

        Raises:
            ValueError: an image of another type or shape, or a model that gives no numbers.
        """
        for index, image in enumerate(images):
            _check_image(index, image)
        jobs: list[_ImageJob] = []

        def all_windows() -> Iterator[_Window]:
            for image in images:
                jobs.append(_ImageJob(image, self))
                yield from jobs[-1].windows

        windows = all_windows()
        with evaluation_mode(self.model):
            while batch := list(islice(windows, self.window_batch)):
                logits = self._forward(torch.stack([window.job.pixels(window) for window in batch]))
                for window, window_logits in zip(batch, logits, strict=True):
                    window.job.add(window, window_logits)
        if self.device.type == "cuda":  # the only wait for the device: what it made of all images is on its way
            torch.cuda.current_stream(self.device).synchronize()
        return [job.prediction() for job in jobs]

    def _forward(self, pixels: Tensor) -> Tensor:
        windows = len(pixels)
        if self._compiled:
            pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, self.window_batch - windows))
        autocast = self.dtype not in (None, torch.float32)
        with torch.autocast(pixels.device.type, dtype=self.dtype if autocast else None, enabled=autocast):
            logits = self._run(pixels).logits[:windows]
        if logits.shape[1] < self.top_k:
            raise ValueError(f"top_k is {self.top_k}, but the model has only {logits.shape[1]} classes.")
        return logits.float()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (3, h, w) from 0 to 255 as the model takes them, in its dtype."""
        if pixels.device not in self._colours:
            mean, std = (
                torch.tensor(values, device=pixels.device)[:, None, None]
                for values in (self.model.pixel_mean, self.model.pixel_std)
            )
            self._colours[pixels.device] = mean, std
        mean, std = self._colours[pixels.device]
        return ((pixels / 255 - mean) / std).to(next(self.model.parameters()).dtype)


@dataclass(frozen=True)
class _Window:
    """A window of an image: which of its scales, the first row and column in the scaled image, and mirrored or not."""

    job: _ImageJob
    scale: int
    top: int
    left: int
    mirrored: bool


class _ImageJob:
    """One image on its way through the model."""

    def __init__(self, image: Tensor, predictor: Predictor) -> None:
        self._image: Tensor | None = image
        self._predictor = predictor
        self._size = (image.shape[1], image.shape[2])
        self._scales = [
            tuple(
                Axis.of(size, scale, crop, stride)
                for size, crop, stride in zip(self._size, predictor.crop_size, predictor.stride, strict=True)
            )
            for scale in predictor.scales
        ]
        self.windows = [
            _Window(self, scale, top, left, mirrored)
            for scale, (rows, columns) in enumerate(self._scales)
            for top in rows.starts
            for left in columns.starts
            for mirrored in ((False, True) if predictor.flip else (False,))
        ]
        # A class map is made from top to bottom, whatever the scale.
        self.windows.sort(key=lambda window: self._scales[window.scale][0].to_image(window.top))
        self._views = len(predictor.scales) * (1 + predictor.flip)
        # One look at the unscaled image: nothing is to be averaged.
        self._one_look = len(self.windows) == 1 and all(axis.size == axis.scaled_size for axis in self._scales[0])
        self._pending = len(self.windows)
        self._class_map: ClassMap | None = None
        self._shares: list[list[dict[int, Share]]] = []
        self._prediction: Prediction | None = None

    def pixels(self, window: _Window) -> Tensor:
        """What the model is fed for a window, (3, h, w) of the crop's size."""
        assert self._image is not None, "the image is dropped with its last window"
        rows, columns = self._scales[window.scale]
        (row_range, row_weights), (column_range, column_weights) = rows.pixels(window.top), columns.pixels(window.left)
        device = self._predictor.device
        pixels = to_device(self._image[:, row_range, column_range], device).float()  # bytes travel, not floats
        if row_weights is not None:
            pixels = to_device(row_weights, device) @ pixels
        if column_weights is not None:
            pixels = pixels @ to_device(column_weights, device).T
        pixels = self._predictor.normalize(pixels)
        # The constant is zero, which is the mean colour once normalised.
        pixels = F.pad(pixels, (0, columns.crop - pixels.shape[2], 0, 0), mode=columns.pad_mode)
        pixels = F.pad(pixels, (0, 0, 0, rows.crop - pixels.shape[1]), mode=rows.pad_mode)
        return pixels.flip(-1) if window.mirrored else pixels

    def add(self, window: _Window, logits: Tensor) -> None:
        """Takes what the model said of a window, logits (K, h, w); windows come in the order of `windows`."""
        if window.mirrored:
            logits = logits.flip(-1)
        if self._one_look:
            full = F.interpolate(logits[None], size=self._predictor.crop_size, mode="bilinear", align_corners=False)
            scores = full[0, :, : self._size[0], : self._size[1]]
            self._finish(*map(to_host, most_probable(scores, self._predictor.top_k)))
            return
        if self._class_map is None:
            self._class_map = self._make_class_map(logits)
        rows, columns = self._shares[window.scale]
        if window.top in rows and window.left in columns:
            self._class_map.add(rows[window.top], columns[window.left], logits.softmax(0) / self._views)
        self._pending -= 1
        if not self._pending:
            self._finish(*self._class_map.finish())

    def prediction(self) -> Prediction:
        """The result, after the last window and, on a CUDA device, its synchronization.

        Raises:
            ValueError: if the model gave values that are no numbers.
        """
        assert self._prediction is not None
        if self._prediction.confidence.isnan().any():
            dtype = self._predictor.dtype
            remedy = f" or its dtype overflows: try dtype=torch.bfloat16 or None instead of {dtype}" if dtype else ""
            raise ValueError(
                f"the model gave values that are no numbers for an image of {self._size} pixels; its weights hold nan"
                f"{remedy}."
            )
        return self._prediction

    def _make_class_map(self, logits: Tensor) -> ClassMap:
        (crop_height, crop_width), (_, height, width) = self._predictor.crop_size, logits.shape
        cell = max(1, min(crop_height // height, crop_width // width))
        self._shares = [
            [axis.shares(cell, cells, logits.device) for axis, cells in zip(axes, (height, width), strict=True)]
            for axes in self._scales
        ]
        pixels_at_once = max(1, crop_height * crop_width // 8)  # more take memory, and no less time
        top_k = self._predictor.top_k
        return ClassMap(*self._size, len(logits), cell, pixels_at_once, top_k, device=logits.device)

    def _finish(self, classes: Tensor, probabilities: Tensor) -> None:
        self._prediction = Prediction(classes, probabilities)
        self._class_map = self._image = None


def _check_image(index: int, image: Tensor) -> None:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        found = f"{image.dtype} values" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        if isinstance(image, Tensor) and image.is_floating_point() and image.isnan().any():
            found += ", nan among them"
        raise ValueError(
            f"image {index} must be a torch.uint8 tensor of values from 0 to 255, got {found}; "
            "the predictor itself normalises."
        )
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(
            f"image {index} must have the shape (3, height, width), got {tuple(image.shape)}; "
            "give a list of images, and grey ones with three equal channels."
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and the like are off inside; afterwards every module is as it was, frozen parts included."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
        raise ValueError(f"{name} must be two whole numbers of pixels above 0, height first, got {value}.")
    return pair
