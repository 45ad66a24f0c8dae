"""A training crop: its form, what its seed fixes, and that image and label stay one above the other."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.augmentation_config import AugmentationConfig
from pipeline.dataset import IGNORE_LABEL
from pipeline.transforms import Augmentation

FILL = (1, 2, 3)
PLAIN = {"scale": (1.0, 1.0), "max_class_fraction": 1.0, "flip": 0.0, "photometric": 0.0}


def augmentation(crop_size: tuple[int, int] = (32, 48), **settings: Any) -> Augmentation:
    return Augmentation(AugmentationConfig(**settings), crop_size, FILL)


def sample(height: int = 64, width: int = 96, cell: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Cells of classes 0 to 9, and an image whose every channel is 25 times the class."""
    cells = np.random.default_rng(0).integers(0, 10, (-(-height // cell), -(-width // cell)), dtype=np.uint8)
    label = cells.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
    return (label * 25)[..., None].repeat(3, axis=2), label


@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 48), (20, 200), (200, 20), (1, 1), (3, 5)])
def test_the_crop_has_its_size_whatever_the_image_has(height: int, width: int) -> None:
    for seed in range(5):
        image, label = augmentation()(*sample(height, width), seed)
        assert (image.shape, label.shape) == ((3, 32, 48), (32, 48))
        assert (image.dtype, label.dtype) == (np.uint8, np.uint8)
        assert image.flags.c_contiguous
        assert label.flags.c_contiguous


def test_the_seed_fixes_the_sample() -> None:
    augment = augmentation()
    first, second, other = (augment(*sample(), seed) for seed in (7, 7, 8))
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left, right)
    assert any((left != right).any() for left, right in zip(first, other, strict=True))


def test_nothing_but_the_seed_fixes_it_and_nothing_else_is_disturbed() -> None:
    augment = augmentation()
    expected = augment(*sample(), 7)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.random(3)
    np.random.seed(1)
    image, label = augment(*sample(), 7)
    np.testing.assert_array_equal(image, expected[0])
    np.testing.assert_array_equal(label, expected[1])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    np.testing.assert_array_equal(np.random.random(3), states[2])


def test_its_inputs_stay_as_they_are_also_where_they_cannot_be_written() -> None:
    image, label = sample()
    image.setflags(write=False)
    label.setflags(write=False)
    augmentation()(image, label, 0)
    np.testing.assert_array_equal(label, sample()[1])


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_image_and_label_are_cropped_and_mirrored_as_one(flip: float) -> None:
    for seed in range(20):
        image, label = augmentation(**{**PLAIN, "flip": flip})(*sample(), seed)
        np.testing.assert_array_equal(image, np.broadcast_to(label * 25, (3, 32, 48)))


@pytest.mark.parametrize("factor", [0.6, 0.73, 1.7])
def test_image_and_label_are_resized_as_one_to_less_than_a_pixel(factor: float) -> None:
    """Thresholded halfway between its two classes, the image draws their borders where the label does."""
    image, label = sample(128, 192)
    image, label = np.where(image < 125, np.uint8(0), np.uint8(200)), (label >= 5).astype(np.uint8)
    differ = []
    for seed in range(20):
        crop, mask = augmentation(**{**PLAIN, "scale": (factor, factor), "flip": 0.5})(image, label, seed)
        differ.append(((crop[0] >= 100) != mask)[mask != IGNORE_LABEL].mean())
    assert np.mean(differ) < 0.018  # a shift of half a pixel makes 0.023 to 0.057


def test_a_resized_label_has_no_class_that_it_did_not_have() -> None:
    image, label = sample()
    label = np.where(label < 5, 0, 9).astype(np.uint8)
    for seed in range(20):
        _, crop = augmentation()(image, label, seed)
        assert set(np.unique(crop)) <= {0, 9, IGNORE_LABEL}


def test_an_image_is_enlarged_within_the_given_range_of_factors() -> None:
    """Cells of 16 pixels become 8 to 32 wide; the median cell tells the factor."""
    ramp = np.arange(96, dtype=np.uint8)[None].repeat(64, axis=0)
    steps = []
    for seed in range(40):
        image, _ = augmentation(**{**PLAIN, "scale": (0.5, 2.0)})(ramp[..., None].repeat(3, 2), ramp, seed)
        steps.append(np.median(np.diff(image[0, 4, 4:20].astype(float)[::4])) / 4)
    factors = 1 / np.array(steps)
    assert factors.min() < 0.75
    assert factors.max() > 1.5
    assert factors.min() > 0.4
    assert factors.max() < 2.3


def test_padding_is_filled_and_ignored() -> None:
    image, label = augmentation((40, 60), **PLAIN)(*sample(30, 50), 0)
    assert (label[30:] == IGNORE_LABEL).all()
    assert (label[:, 50:] == IGNORE_LABEL).all()
    assert (label[:30, :50] != IGNORE_LABEL).all()
    np.testing.assert_array_equal(label[:30, :50], sample(30, 50)[1])
    np.testing.assert_array_equal(image[:, label == IGNORE_LABEL].T, [FILL] * (40 * 60 - 30 * 50))


def test_what_was_ignored_stays_ignored() -> None:
    image, label = sample()
    everything = np.full_like(label, IGNORE_LABEL)
    assert (augmentation()(image, everything, 0)[1] == IGNORE_LABEL).all()


def test_distortion_of_colours_changes_the_image_alone() -> None:
    image, label = sample()
    plain, distorted = (augmentation(**{**PLAIN, "photometric": p})(image, label, 3) for p in (0.0, 1.0))
    np.testing.assert_array_equal(plain[1], distorted[1])
    assert (plain[0] != distorted[0]).mean() > 0.5


def test_distortion_keeps_the_colour_of_things() -> None:
    image, label = np.full((64, 96, 3), (40, 160, 60), np.uint8), np.zeros((64, 96), np.uint8)
    distort = augmentation(**{**PLAIN, "photometric": 1.0})
    for seed in range(20):
        red, green, blue = distort(image, label, seed)[0].mean(axis=(1, 2))
        assert green > max(red, blue)


def largest_share(label: np.ndarray) -> float:
    counts = np.bincount(label[label != IGNORE_LABEL], minlength=1)
    return counts.max() / counts.sum()


def test_a_crop_of_almost_one_class_is_drawn_again() -> None:
    label = np.zeros((64, 64), np.uint8)
    label[:, 32:] = 1
    label[:8] = IGNORE_LABEL  # counts for neither
    image = np.zeros((64, 64, 3), np.uint8)
    shares = {
        fraction: np.array(
            [
                largest_share(
                    augmentation((24, 16), **{**PLAIN, "max_class_fraction": fraction})(image, label, seed)[1]
                )
                for seed in range(60)
            ]
        )
        for fraction in (0.75, 1.0)
    }
    assert (shares[1.0] > 0.75).mean() > 0.5
    assert (shares[0.75] > 0.75).mean() < 0.25


def test_a_label_of_one_class_is_still_cropped() -> None:
    image, label = sample()
    _, crop = augmentation(max_class_fraction=0.5)(image, np.zeros_like(label), 0)
    assert set(np.unique(crop)) <= {0, IGNORE_LABEL}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (2.0, 0.5)}, r"augmentation.scale is \(2.0, 0.5\): give \[low, high\]"),
        ({"scale": (0.0, 1.0)}, "augmentation.scale is"),
        ({"scale": (1.0, float("inf"))}, "augmentation.scale is"),
        ({"max_class_fraction": 0.0}, "augmentation.max_class_fraction is 0.0: give a share above 0, 1 being off"),
        ({"max_class_fraction": 1.5}, "augmentation.max_class_fraction is 1.5"),
        ({"flip": -0.5}, "augmentation.flip is -0.5: give a probability from 0 to 1"),
        ({"photometric": float("nan")}, "augmentation.photometric is nan"),
    ],
)
def test_a_setting_that_cannot_be_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**settings)
