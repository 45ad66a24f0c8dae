"""How training samples are varied."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AugmentationConfig:
    """How training samples are varied. The defaults are the usual recipe of semantic segmentation on ADE20K.

    Args:
        scale: range of the random factor by which an image is resized before the crop.
        max_class_fraction: a crop with more than this share of one class is drawn again, up to ten times; 1 is off.
        flip: probability of mirroring left to right.
        photometric: probability of distorting brightness, contrast, saturation and hue, each on its own.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    max_class_fraction: float = 0.75
    flip: float = 0.5
    photometric: float = 0.5

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high < math.inf:
            raise ValueError(f"augmentation.scale is {self.scale}: give [low, high], above 0 and low not above high.")
        if not 0 < self.max_class_fraction <= 1:
            raise ValueError(
                f"augmentation.max_class_fraction is {self.max_class_fraction}: give a share above 0, 1 being off."
            )
        for name in ("flip", "photometric"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} is {getattr(self, name)}: give a probability from 0 to 1.")
