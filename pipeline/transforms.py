"""Augmentation of a training sample: resize, crop, flip, photometric distortion, through torchvision.transforms.v2."""

from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from pipeline.augmentation_config import AugmentationConfig
from pipeline.dataset import IGNORE_LABEL

CROP_ATTEMPTS = 10
# Ranges of the factors, and of the shift of hue as a share of the circle, as in SSD (arXiv 1512.02325) and after it in
# mmsegmentation.
DISTORTIONS: dict[str, Any] = {
    "brightness": (0.875, 1.125),
    "contrast": (0.5, 1.5),
    "saturation": (0.5, 1.5),
    "hue": (-0.05, 0.05),
}


class Augmentation:
    """Makes a training crop of an image and its label; the same seed makes the same crop.

    Args:
        config: what to vary.
        crop_size: height and width of the result.
        fill: RGB, 0 to 255, of pixels beyond the image's border, which the label ignores.
    """

    def __init__(self, config: AugmentationConfig, crop_size: tuple[int, int], fill: tuple[int, int, int]) -> None:
        self.config, self.crop_size, self.fill = config, crop_size, fill
        # Not v2.RandomPhotometricDistort, which also swaps the colour channels: without their colour, a short training
        # took trees for buildings.
        self._distort = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(**{name: strength})], p=config.photometric)
                for name, strength in DISTORTIONS.items()
            ]
        )
        self._flip = v2.RandomHorizontalFlip(p=config.flip)

    def __call__(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Augment one sample.

        Args:
            image: (H, W, 3) uint8.
            label: (H, W) uint8.
            seed: of all randomness in this call.

        Returns:
            (3, h, w) uint8 and (h, w) uint8, of the crop's size.
        """
        picture = tv_tensors.Image(torch.from_numpy(image.copy()).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(label.copy()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            picture, mask = self._resized(picture, mask)
            picture, mask = self._cropped(picture, mask)
            # Indexing has made plain tensors of both, of which a transform would change the first alone.
            picture, mask = self._flip(tv_tensors.Image(picture), tv_tensors.Mask(mask))
            picture = self._distort(picture)
        return picture.contiguous().numpy(), mask.contiguous().numpy()

    def _resized(self, picture: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.config.scale
        factor = float(torch.empty(()).uniform_(low, high))
        size = [max(1, round(side * factor)) for side in picture.shape[-2:]]
        # NEAREST would shift the label against the image by up to half a pixel.
        bilinear, nearest = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.NEAREST_EXACT
        return (
            functional.resize(picture, size, interpolation=bilinear, antialias=True),
            functional.resize(mask[None], size, interpolation=nearest)[0],
        )

    def _cropped(self, picture: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = self.crop_size
        below, right = max(0, height - picture.shape[-2]), max(0, width - picture.shape[-1])
        if below or right:
            padding = [0, 0, right, below]
            picture = functional.pad(picture, padding, fill=list(self.fill))
            mask = functional.pad(mask[None], padding, fill=IGNORE_LABEL)[0]
        attempts = 0
        while True:
            top = int(torch.randint(picture.shape[-2] - height + 1, ()))
            left = int(torch.randint(picture.shape[-1] - width + 1, ()))
            crop = mask[top : top + height, left : left + width]
            attempts += 1
            if attempts == CROP_ATTEMPTS or self._is_varied(crop):
                return picture[:, top : top + height, left : left + width], crop

    def _is_varied(self, crop: torch.Tensor) -> bool:
        counts = torch.bincount(crop[crop != IGNORE_LABEL].flatten().long())
        return bool(counts.numel()) and bool(counts.max() <= self.config.max_class_fraction * counts.sum())
