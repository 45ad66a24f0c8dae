"""The 15 natural corruptions of Hendrycks and Dietterich (arXiv 1903.12261), by which robustness is evaluated.

Written after the published definitions, with their strengths for photographs of ImageNet's size at any size of image;
where a kind differs from them, its docstring says so. None of them touches the label. Knows nothing of models, datasets
or Ray.
"""

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

KINDS: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
SEVERITIES = (1, 2, 3, 4, 5)

_LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601
_ICE = np.array((0.86, 0.94, 1.0), np.float32)
_FROND_AREA, _FRONDS_PER_FAN, _BARBS = 260, 5, 12


def corrupted(image: np.ndarray, kind: str, severity: int, seed: int) -> np.ndarray:
    """The image as it would look under one corruption; its label stays valid as it is.

    Values are rounded to whole numbers, where the published code cuts them off.

    Args:
        image: (H, W, 3) uint8 RGB, of any size; it is not changed.
        kind: one of the names in `KINDS`.
        severity: 1, hardly disturbing, to 5.
        seed: of all randomness in this call, 0 or above. The severities of one kind share their draws where they can.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: an unknown kind or severity.
    """
    if kind not in _CORRUPTIONS:
        raise ValueError(f"The corruption {kind!r} is not known: give one of {', '.join(_CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise ValueError(f"The severity of {kind} is {severity!r}: give a whole number from 1 to 5.")
    corrupt, strengths = _CORRUPTIONS[kind]
    result = corrupt(image.astype(np.float32) / 255, np.random.default_rng(seed), *strengths[severity - 1])
    return _bytes(result)


# Each function below takes the image, (H, W, 3) float32 from 0 to 1, the source of randomness, and its strengths, and
# returns an image of the same shape, whose values may lie beyond 0 to 1.


def _gaussian_noise(image: np.ndarray, rng: np.random.Generator, deviation: float) -> np.ndarray:
    """As in poor light: independent normal noise in each value."""
    return image + np.float32(deviation) * rng.standard_normal(image.shape, np.float32)


def _shot_noise(image: np.ndarray, rng: np.random.Generator, photons: float) -> np.ndarray:
    """As light is discrete: each value is a Poisson count, `photons` being the mean at full brightness."""
    return rng.poisson(image * photons) / photons


def _impulse_noise(image: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """As bits flip: a share of all values, each channel on its own, becomes 0 or 1 with even chance."""
    draw = rng.random(image.shape, np.float32)
    return np.where(draw < share, np.float32(draw < share / 2), image)


def _defocus_blur(image: np.ndarray, _rng: np.random.Generator, radius: int, softness: float) -> np.ndarray:
    """As out of focus: the mean over a disk, whose rim is softened by a Gaussian of `softness` pixels.

    The image is softened instead of the disk, which differs from the published at its border alone.
    """
    height, width = image.shape[:2]
    reach = 1 if radius <= 8 else 2
    image = ndimage.gaussian_filter(image, (softness, softness, 0), mode="mirror", radius=(reach, reach, 0))
    padded = np.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    # A disk is a stack of runs, and a run's sum is the difference of two running sums whatever its length.
    running = np.cumsum(np.pad(padded, ((0, 0), (1, 0), (0, 0))), axis=1, dtype=np.float64)
    total, pixels = np.zeros(image.shape), 0
    for row in range(2 * radius + 1):
        half = math.isqrt(radius**2 - (row - radius) ** 2)
        first, end = radius - half, radius + half + 1
        total += running[row : row + height, end : end + width] - running[row : row + height, first : first + width]
        pixels += end - first
    return total / pixels


def _glass_blur(image: np.ndarray, rng: np.random.Generator, sigma: float, distance: int, rounds: int) -> np.ndarray:
    """As through frosted glass: pixels trade places with near ones, between two Gaussian blurs.

    By definition one walks over the pixels and swaps each with another at an offset drawn from [-distance, distance),
    so that each takes part in two swaps a round on average. Here all move at once, twice a round: each takes the
    colour at such an offset or, with even chance, at its opposite, as the two ends of a swap do. On a photograph the
    mean distance from the original was that of swaps within four per cent. Run as it stands, the published code
    overwrites one end of each swap and so shifts the image by one or two pixels, which no label would follow.
    """
    height, width = image.shape[:2]
    image = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
    rows, columns = np.indices((height, width), sparse=True)
    for _ in range(2 * rounds):
        down, right = rng.integers(-distance, distance, (2, height, width)) * rng.choice((-1, 1), (height, width))
        image = image[np.clip(rows + down, 0, height - 1), np.clip(columns + right, 0, width - 1)]
    return ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def _motion_blur(image: np.ndarray, rng: np.random.Generator, radius: int, sigma: float) -> np.ndarray:
    """As from a moving camera, along an angle up to 45 degrees off the horizontal."""
    return _trailed(image, radius, sigma, rng.uniform(-45, 45))


def _zoom_blur(image: np.ndarray, _rng: np.random.Generator, step: float, count: int) -> np.ndarray:
    """As moving fast towards the scene: the mean of the image and of `count` enlargements by 1, 1 + step, and so on.

    Enlarged in 8 bits about the exact middle, where the published code rounds the crop to whole pixels.
    """
    height, width = image.shape[:2]
    picture = Image.fromarray(_bytes(image))
    total = image * 255
    for factor in 1 + step * np.arange(count):
        right, below = width / 2 * (1 - 1 / factor), height / 2 * (1 - 1 / factor)
        box = (right, below, width - right, height - below)
        total += np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box))
    return total / (255 * (count + 1))


def _snow(
    image: np.ndarray,
    rng: np.random.Generator,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    kept: float,
) -> np.ndarray:
    """Flakes, and the scene under them whitened: enlarged normal noise above a threshold, trailed as it falls.

    Only as much noise is drawn as its enlargement shows, and flakes keep their fractions of 1/255.
    """
    height, width = image.shape[:2]
    angle = rng.uniform(-135, -45)
    shape = math.ceil(height / zoom), math.ceil(width / zoom)
    noise = Image.fromarray(mean + np.float32(deviation) * rng.standard_normal(shape, np.float32))
    flakes = np.array(noise.resize((width, height), Image.Resampling.BILINEAR))
    flakes[flakes < threshold] = 0
    flakes = _trailed(flakes.clip(0, 1), radius, sigma, angle)
    white = np.maximum(image, (image @ _LUMA)[..., None] * 1.5 + 0.5)
    return kept * image + (1 - kept) * white + (flakes + flakes[::-1, ::-1])[..., None]


def _frost(image: np.ndarray, rng: np.random.Generator, kept: float, added: float) -> np.ndarray:
    """As through a frosted window: the image darkened, and ice added to it.

    The published code adds one of five photographs of frost, which are not ours to ship: the ice is drawn here.
    """
    height, width = image.shape[:2]
    return np.float32(kept) * image + np.float32(added) * _ice(height, width, rng)


def _fog(image: np.ndarray, rng: np.random.Generator, thickness: float, decay: float) -> np.ndarray:
    """Swathes of fog, a plasma fractal: larger than the published 256 pixels where the image is."""
    height, width = image.shape[:2]
    brightest = image.max()
    fog = thickness * _plasma(height, width, decay, rng)
    return (image + fog[..., None]) * brightest / (brightest + thickness)


def _brightness(image: np.ndarray, _rng: np.random.Generator, added: float) -> np.ndarray:
    """As in stronger daylight: the value of hue, saturation and value grows, at most to 1."""
    value = image.max(axis=2, keepdims=True)
    brighter = np.minimum(value + np.float32(added), 1)
    # Hue and saturation stay if the three channels keep their proportions; black has none and becomes grey.
    return np.where(value > 0, image * (brighter / np.where(value > 0, value, 1)), brighter)


def _contrast(image: np.ndarray, _rng: np.random.Generator, factor: float) -> np.ndarray:
    """Less contrast: each channel is drawn towards its mean over the image."""
    mean = image.mean(axis=(0, 1), dtype=np.float64)
    return (image - mean) * factor + mean


def _elastic_transform(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Small regions stretched or squeezed, by about one pixel in 360 at severity 1 and two at severity 5.

    After Michaelis et al. (arXiv 1907.07484), who made it for scenes: the original's severities 1 and 2 move whole
    images by up to 49 pixels, after which no label would fit. This one leaves the label as it is, as theirs leaves
    the boxes, and so costs a perfect model a sliver along each border.
    """
    height, width = image.shape[:2]
    largest, sigma = 0.005 * height, (0.01 * height, 0.01 * width)
    places = np.indices((height, width), dtype=np.float32)
    for axis in range(2):
        noise = rng.uniform(-largest, largest, (height, width))
        places[axis] += strength * ndimage.gaussian_filter(noise, sigma, truncate=3)
    return np.stack(
        [ndimage.map_coordinates(image[..., channel], places, order=1, mode="reflect") for channel in range(3)], axis=2
    )


def _pixelate(image: np.ndarray, _rng: np.random.Generator, factor: float) -> np.ndarray:
    """As a small image shown large: shrunk to `factor` of its sides by the mean over boxes, and enlarged again."""
    height, width = image.shape[:2]
    small = max(1, int(width * factor)), max(1, int(height * factor))
    picture = Image.fromarray(_bytes(image)).resize(small, Image.Resampling.BOX)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX), np.float32) / 255


def _jpeg_compression(image: np.ndarray, _rng: np.random.Generator, quality: int) -> np.ndarray:
    """As stored by JPEG at a low quality."""
    buffer = io.BytesIO()
    Image.fromarray(_bytes(image)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer), np.float32) / 255


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _trailed(image: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """The mean of an (H, W) or (H, W, 3) image shifted step by step along an angle in degrees, as in ImageMagick.

    The weights of the 2 radius + 1 steps fall as one half of a Gaussian. The border is continued outwards.
    """
    height, width = image.shape[:2]
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(np.float32)
    down, right = (
        np.ceil(steps * part - 0.5).astype(int)
        for part in (math.sin(math.radians(angle)), math.cos(math.radians(angle)))
    )
    reach = 2 * radius
    padded = np.pad(image, [(reach, reach)] * 2 + [(0, 0)] * (image.ndim - 2), mode="edge")
    total = np.zeros_like(image)
    for weight, top, left in zip(weights, down + reach, right + reach, strict=True):
        total += weight * padded[top : top + height, left : left + width]
    return total


def _plasma(height: int, width: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Clouds, (H, W) from 0 to 1, by diamond-square (Fournier et al. 1982) on a torus whose side is a power of two.

    The lower `decay`, the rougher: noise shrinks by its square with each halving of the grid, as in the published code.
    """
    step = 2 ** max(1, (max(height, width) - 1).bit_length())
    heights, amplitude = np.zeros((step, step), np.float32), 1.0

    def middles(*neighbours: np.ndarray) -> np.ndarray:
        noise = amplitude * rng.uniform(-1, 1, neighbours[0].shape)
        return np.add.reduce(neighbours) / len(neighbours) + noise

    while step > 1:
        half = step // 2
        corners = heights[::step, ::step]
        right, below = np.roll(corners, -1, 1), np.roll(corners, -1, 0)
        centres = middles(corners, right, below, np.roll(right, -1, 0))
        heights[half::step, half::step] = centres
        heights[::step, half::step] = middles(corners, right, centres, np.roll(centres, 1, 0))
        heights[half::step, ::step] = middles(corners, below, centres, np.roll(centres, 1, 1))
        step, amplitude = half, amplitude / decay**2
    heights -= heights.min()
    return (heights / heights.max())[:height, :width]


def _ice(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Frost on a window, (H, W, 3) from 0 to 1: fans of feathery crystals on a film of uneven thickness."""
    fans = max(1, height * width // (_FROND_AREA * _FRONDS_PER_FAN))
    roots = rng.uniform((0, 0), (width, height), (fans, 2)).repeat(_FRONDS_PER_FAN, axis=0)
    angles = (rng.uniform(0, 2 * np.pi, (fans, 1)) + rng.uniform(-1.2, 1.2, (fans, _FRONDS_PER_FAN))).ravel()
    lengths = rng.uniform(10, 50, len(roots))
    brightness = rng.integers(90, 256, len(roots))

    along = np.linspace(0.08, 0.95, _BARBS)
    starts = roots[:, None] + (lengths[:, None] * along)[..., None] * _directions(angles)[:, None]
    reach = (0.4 * lengths[:, None] * (1 - along))[..., None]
    stems = np.concatenate([roots, roots + lengths[:, None] * _directions(angles)], axis=1)
    barbs = [  # ice branches at a third of a straight angle
        np.concatenate([starts, starts + reach * _directions(angles + turn)[:, None]], axis=2).reshape(-1, 4)
        for turn in (-np.pi / 3, np.pi / 3)
    ]
    levels = np.concatenate([brightness, *[(brightness * 0.75).astype(int).repeat(_BARBS)] * 2])

    picture = Image.new("L", (width, height))
    draw = ImageDraw.Draw(picture)
    for line, level in zip(np.concatenate([stems, *barbs]).tolist(), levels.tolist(), strict=True):
        draw.line(line, fill=level)
    crystals = ndimage.gaussian_filter(np.asarray(picture, np.float32) / 255, 0.6)
    film = _plasma(height, width, 1.7, rng)
    return ((0.36 + 0.42 * film + 0.75 * crystals * (0.3 + 0.7 * film))[..., None] * _ICE).clip(0, 1)


def _directions(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


_CORRUPTIONS: dict[str, tuple[Callable[..., np.ndarray], tuple[tuple[float, ...], ...]]] = {
    "gaussian_noise": (_gaussian_noise, ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))),
    "shot_noise": (_shot_noise, ((60,), (25,), (12,), (5,), (3,))),
    "impulse_noise": (_impulse_noise, ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))),
    "defocus_blur": (_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (_zoom_blur, ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))),
    "snow": (
        _snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (_frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (_brightness, ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "contrast": (_contrast, ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    "elastic_transform": (_elastic_transform, ((12.5,), (16.25,), (21.25,), (25,), (30,))),
    "pixelate": (_pixelate, ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))),
    "jpeg_compression": (_jpeg_compression, ((25,), (18,), (15,), (10,), (7,))),
}
