"""Corrupted images: their form, what their seed fixes, that they get worse with severity, and known closed forms."""

import colorsys
import io
import random

import numpy as np
import pytest
from PIL import Image

from pipeline.corruptions import KINDS, SEVERITIES, corrupted

NAMES = [name for group in KINDS.values() for name in group]
WITHOUT_CHANCE = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
# Where the published strengths do not move every image further away: frost 4 adds as much ice as 3 and only darkens
# the image more, fog 4 is as thick as 3 and only rougher.
NOT_FURTHER = {("frost", 4), ("fog", 4)}


def by_severity(*strengths: float) -> list[tuple[int, float]]:
    return list(zip(SEVERITIES, strengths, strict=True))


def photograph(height: int = 120, width: int = 160) -> np.ndarray:
    """A bright sky above a dark street of blocks with fine grain: large and small structure, and colours."""
    rng = np.random.default_rng(0)
    cells = rng.integers(10, 130, (-(-height // 11), -(-width // 17), 3))
    street = cells.repeat(11, axis=0).repeat(17, axis=1)[:height, :width].astype(float)
    sky = np.linspace((150, 190, 240), (215, 225, 240), height)[:, None]
    image = np.where(np.arange(height)[:, None, None] < height // 4, sky, street)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def flat(level: int, height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def distance(image: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(image.astype(float) - other).mean())


def test_there_are_fifteen_kinds_in_four_groups() -> None:
    assert {group: len(names) for group, names in KINDS.items()} == {"noise": 3, "blur": 4, "weather": 4, "digital": 4}
    assert len(set(NAMES)) == 15
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("kind", NAMES)
def test_the_seed_fixes_it_and_the_image_stays_as_it_is(kind: str) -> None:
    image = photograph()
    image.setflags(write=False)
    for severity in SEVERITIES:
        first, second, other = (corrupted(image, kind, severity, seed) for seed in (7, 7, 8))
        assert (first.shape, first.dtype) == (image.shape, np.uint8)
        np.testing.assert_array_equal(first, second)
        assert (first != other).any() == (kind not in WITHOUT_CHANCE)
    np.testing.assert_array_equal(image, photograph())


@pytest.mark.parametrize("kind", NAMES)
def test_nothing_but_the_seed_fixes_it_and_nothing_else_is_disturbed(kind: str) -> None:
    expected = corrupted(photograph(), kind, 3, 7)
    np.random.seed(1)
    random.seed(1)
    state, following = random.getstate(), np.random.random(3)
    np.random.seed(1)
    np.testing.assert_array_equal(corrupted(photograph(), kind, 3, 7), expected)
    assert random.getstate() == state
    np.testing.assert_array_equal(np.random.random(3), following)


@pytest.mark.parametrize("kind", NAMES)
def test_a_higher_severity_moves_the_image_further_away(kind: str) -> None:
    image = photograph()
    means = [
        np.mean([distance(corrupted(image, kind, level, seed), image) for seed in range(3)]) for level in SEVERITIES
    ]
    assert means[0] > 0
    for severity, lower, higher in zip(SEVERITIES[1:], means, means[1:], strict=False):
        assert higher > lower or (kind, severity) in NOT_FURTHER, means
    assert means[-1] > means[1]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (7, 300), (300, 1)])
def test_an_image_may_have_any_size_and_be_black_or_white(kind: str, height: int, width: int) -> None:
    cases = [(photograph(height, width), severity) for severity in SEVERITIES]
    for image, severity in [*cases, (flat(0, height, width), 5), (flat(255, height, width), 5)]:
        with np.errstate(all="raise", under="ignore"):
            assert corrupted(image, kind, severity, 0).shape == (height, width, 3)


@pytest.mark.parametrize(("severity", "deviation"), by_severity(0.08, 0.12, 0.18, 0.26, 0.38))
def test_gaussian_noise_has_its_standard_deviation(severity: int, deviation: float) -> None:
    noisy = corrupted(flat(128), "gaussian_noise", severity, 0) / 255
    inside = (noisy > 0) & (noisy < 1)
    # Percentiles bear the clipping at 0 and 1, which a standard deviation would not.
    low, middle, high = np.percentile(noisy, (30, 50, 70))
    assert (high - low) / 2 == pytest.approx(0.5244 * deviation, rel=0.05)
    assert middle == pytest.approx(128 / 255, abs=0.01)
    assert inside.mean() > 0.8
    assert abs(np.corrcoef(noisy[..., 0].ravel(), noisy[..., 1].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize(("severity", "photons"), by_severity(60, 25, 12, 5, 3))
def test_shot_noise_is_a_count_of_photons(severity: int, photons: float) -> None:
    noisy = corrupted(flat(51), "shot_noise", severity, 0) / 255
    np.testing.assert_allclose(noisy * photons, np.rint(noisy * photons), atol=photons / 500)
    assert noisy.mean() == pytest.approx(0.2, rel=0.03)
    assert noisy.var() == pytest.approx(0.2 / photons, rel=0.06)


@pytest.mark.parametrize(("severity", "share"), by_severity(0.03, 0.06, 0.09, 0.17, 0.27))
def test_impulse_noise_hits_its_share_of_values_half_white_half_black(severity: int, share: float) -> None:
    noisy = corrupted(flat(100), "impulse_noise", severity, 0)
    assert (noisy == 0).mean() == pytest.approx(share / 2, rel=0.1)
    assert (noisy == 255).mean() == pytest.approx(share / 2, rel=0.1)
    assert ((noisy == 0) | (noisy == 100) | (noisy == 255)).all()


@pytest.mark.parametrize(("severity", "radius"), by_severity(3, 4, 6, 8, 10))
def test_defocus_blur_turns_a_point_into_a_disk(severity: int, radius: float) -> None:
    image = flat(0, 61, 61)
    image[30, 30] = 255
    blurred = corrupted(image, "defocus_blur", severity, 0)[..., 0].astype(float)
    rows, columns = np.indices((61, 61)) - 30
    far = np.hypot(rows, columns)
    pixels = (far <= radius).sum()
    np.testing.assert_array_equal(blurred[far <= radius - 2], round(255 / pixels))
    assert (blurred[far > radius + 3] == 0).all()
    assert blurred.sum() == pytest.approx(255, rel=0.3)  # each of some hundred pixels is rounded


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("kind", [*KINDS["blur"], "elastic_transform", "pixelate", "contrast"])
def test_what_has_no_structure_has_nothing_to_lose(kind: str, severity: int) -> None:
    np.testing.assert_array_equal(corrupted(flat(90), kind, severity, 0), flat(90))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("kind", ["glass_blur", "elastic_transform"])
def test_what_moves_pixels_about_does_not_shift_the_image_from_its_label(kind: str, severity: int) -> None:
    """The middle of a square stays, on average over seeds, within half a pixel."""
    image = flat(0)
    image[40:80, 60:100] = 255
    rows, columns = np.indices(image.shape[:2])
    middles = []
    for seed in range(6):
        weights = corrupted(image, kind, severity, seed)[..., 0].astype(float)
        middles.append(((rows * weights).sum() / weights.sum(), (columns * weights).sum() / weights.sum()))
    np.testing.assert_allclose(np.mean(middles, axis=0), (59.5, 79.5), atol=0.5)


def test_motion_blur_trails_along_one_line_to_one_side() -> None:
    image = flat(0, 101, 101)
    image[50, 50] = 255
    for seed in range(5):
        blurred = corrupted(image, "motion_blur", 1, seed)[..., 0]
        rows, columns = np.nonzero(blurred)
        assert blurred[50, 50] == blurred.max()
        assert (columns <= 50).all()
        slope = (rows - 50)[columns < 50] / (columns - 50)[columns < 50]
        assert np.ptp(slope[columns[columns < 50] < 46]) < 0.2
        assert np.abs(slope).max() <= 1


def test_zoom_blur_leaves_the_middle_sharp_and_smears_the_rim() -> None:
    image = photograph()
    change = np.abs(corrupted(image, "zoom_blur", 3, 0).astype(float) - image)
    assert change[50:70, 70:90].mean() < 0.7 * change[:, :20].mean()


@pytest.mark.parametrize(("severity", "added"), by_severity(0.1, 0.2, 0.3, 0.4, 0.5))
def test_brightness_adds_to_the_value_and_keeps_hue_and_saturation(severity: int, added: float) -> None:
    image = np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)
    image[0, 0], image[0, 1] = 0, 255
    expected = []
    for pixel in image.reshape(-1, 3) / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + added)))
    result = corrupted(image, "brightness", severity, 0)
    np.testing.assert_allclose(result.reshape(-1, 3), 255 * np.array(expected), atol=0.51)


@pytest.mark.parametrize(("severity", "factor"), by_severity(0.4, 0.3, 0.2, 0.1, 0.05))
def test_contrast_shrinks_each_channel_about_its_mean(severity: int, factor: float) -> None:
    image = photograph()
    mean = image.mean(axis=(0, 1))
    result = corrupted(image, "contrast", severity, 0)
    np.testing.assert_allclose(result, mean + factor * (image - mean), atol=0.51)


@pytest.mark.parametrize(("severity", "quality"), by_severity(25, 18, 15, 10, 7))
def test_jpeg_compression_is_that_of_pillow(severity: int, quality: float) -> None:
    buffer = io.BytesIO()
    Image.fromarray(photograph()).save(buffer, "JPEG", quality=int(quality))
    np.testing.assert_array_equal(corrupted(photograph(), "jpeg_compression", severity, 0), Image.open(buffer))


def test_pixelate_shows_means_over_boxes() -> None:
    image = photograph()
    means = image.reshape(30, 4, 40, 4, 3).mean(axis=(1, 3))
    result = corrupted(image, "pixelate", 5, 0)
    np.testing.assert_allclose(result, means.repeat(4, axis=0).repeat(4, axis=1), atol=1.01)  # rounded twice


@pytest.mark.parametrize(("severity", "factor"), by_severity(0.6, 0.5, 0.4, 0.3, 0.25))
def test_pixelate_leaves_its_share_of_rows_and_columns(severity: int, factor: float) -> None:
    result = corrupted(photograph(100, 140), "pixelate", severity, 0).astype(int)
    assert np.abs(np.diff(result, axis=0)).any(axis=(1, 2)).sum() + 1 == int(100 * factor)
    assert np.abs(np.diff(result, axis=1)).any(axis=(0, 2)).sum() + 1 == int(140 * factor)


@pytest.mark.parametrize(("severity", "thickness"), by_severity(1.5, 2, 2.5, 2.5, 3))
def test_fog_lays_one_grey_layer_over_an_image_grown_pale(severity: int, thickness: float) -> None:
    image = photograph()
    brightest = image.max() / 255
    paled = image / 255 * brightest / (brightest + thickness)
    fog = corrupted(image, "fog", severity, 0) / 255 - paled
    assert np.ptp(fog, axis=2).max() < 1.1 / 255  # no colour
    assert fog.min() > -0.51 / 255
    assert fog.max() < brightest * thickness / (brightest + thickness) + 0.51 / 255
    assert fog.std() > 0.05


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("kind", ["snow", "frost"])
def test_snow_and_frost_lighten_a_dark_scene_unevenly(kind: str, severity: int) -> None:
    change = corrupted(flat(30), kind, severity, 0).astype(float) - 30
    assert change.min() >= 0
    assert change.mean() > 20
    assert change.std() > 5


@pytest.mark.parametrize(("severity", "kept"), by_severity(1, 0.8, 0.7, 0.65, 0.6))
def test_frost_lets_its_share_of_the_image_through(severity: int, kept: float) -> None:
    dark, light = (corrupted(flat(level), "frost", severity, 0).astype(float) for level in (10, 50))
    assert np.median(light - dark) == pytest.approx(40 * kept, abs=0.51)


def test_the_severities_of_a_kind_share_their_draws() -> None:
    """So that they differ by their strength and not by chance."""
    noise = [corrupted(flat(128), "gaussian_noise", severity, 0).astype(float) - 128 for severity in (1, 2)]
    np.testing.assert_allclose(noise[0] / 0.08, noise[1] / 0.12, atol=12)


@pytest.mark.parametrize(
    ("kind", "severity", "message"),
    [
        ("rain", 1, "The corruption 'rain' is not known: give one of gaussian_noise, shot_noise, .*jpeg_compression"),
        ("fog", 0, "The severity of fog is 0: give a whole number from 1 to 5"),
        ("fog", 6, "The severity of fog is 6: give a whole number from 1 to 5"),
    ],
)
def test_an_unknown_kind_or_severity_is_named(kind: str, severity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corrupted(photograph(), kind, severity, 0)
