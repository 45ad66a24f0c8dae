"""What a street scene is planned with: light, camera, street, polygons in metres, colours and repeating noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import cos, hypot, pi, sin
from random import Random

import numpy as np
from PIL import Image

STREET_END = 120.0  # metres ahead at which the street ends and the skyline stands
TILE = 512  # side of the repeating noise image, a power of two

Colour = tuple[int, int, int]
Point = tuple[float, float, float]
Shape = tuple[list[Point], Colour]  # a polygon and the colour of its surface


@dataclass(frozen=True)
class Light:
    """Weather and time of day: light as RGB factors, sky as RGB 0-255, haze as extinction per metre."""

    sun: Sequence[float]
    ambient: Sequence[float]
    zenith: Sequence[float]
    horizon: Sequence[float]
    haze: float
    clouds: float
    windows_lit: float  # share of the windows
    side: int  # the sun stands to the left (-1) or right (+1) of the street
    shadow: tuple[float, float]  # metres of shadow, across and along the street, per metre of height


@dataclass(frozen=True)
class Camera:
    """Pinhole camera down the street: focal length, centre column and horizon row in pixels, place in metres."""

    focal: float
    centre: float
    horizon: float
    x: float
    height: float

    def project(self, points: Sequence[Point]) -> np.ndarray:
        """Return pixel positions (N, 2) as (column, row); what lies behind the camera is put just ahead of it."""
        x, y, z = np.array(points, np.float64).T
        scale = self.focal / np.maximum(z, 0.8)
        return np.stack([self.centre + (x - self.x) * scale, self.horizon + (self.height - y) * scale], 1)


@dataclass(frozen=True)
class Street:
    """Half the road's width, the distance of the walls from its middle, and what stands along it, in metres.

    `fronts` holds (start, end, height) from near to far for each side; height 0 is a gap between buildings.
    """

    road: float
    wall: float
    traffic_side: int
    fronts: dict[int, list[tuple[float, float, float]]]


@dataclass(frozen=True)
class Thing:
    """One object in the street: polygons in painting order, or a cut-out `sprite` that fills the first of them."""

    depth: float
    class_id: int
    shapes: list[Shape]
    sprite: Image.Image | None = None


@lru_cache(maxsize=4)
def noise_tile(*octaves: int) -> np.ndarray:
    """Smooth noise (3 TILE, 3 TILE) of unit deviation that repeats every TILE, from random grids of the given sizes.

    The same for every scene, which is what makes drawing fast: scenes differ in where they look it up.
    """
    generator = np.random.default_rng(0)
    total = np.zeros((TILE, TILE), np.float32)
    for size in octaves:
        grid = np.pad(generator.standard_normal((size, size)).astype(np.float32), 2, mode="wrap")
        inner = (2.0, 2.0, 2.0 + size, 2.0 + size)
        total += np.asarray(Image.fromarray(grid).resize((TILE, TILE), Image.Resampling.BICUBIC, inner)) / size**0.5
    return np.tile((total - total.mean()) / total.std(), (3, 3))


def cloud_tile() -> np.ndarray:
    return noise_tile(4, 8, 16, 32, 64, 128)


def grain_tile() -> np.ndarray:
    return noise_tile(32, 64, 128, 256, 512)


def cut_tile(noise: np.ndarray, rng: Random, height: int, width: int) -> np.ndarray:
    row, column = rng.randrange(TILE), rng.randrange(TILE)
    return noise[row : row + height, column : column + width]


def look_up(noise: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return noise[row.astype(np.int32) & (TILE - 1), column.astype(np.int32) & (TILE - 1)]


def shaded(colour: Sequence[float], factor: float) -> Colour:
    red, green, blue = (int(min(255, max(0, value * factor))) for value in colour)
    return red, green, blue


def pick(rng: Random, *colours: Colour, spread: float = 9) -> Colour:
    return shaded([value + rng.gauss(0, spread) for value in rng.choice(colours)], 1)


def box(left: float, bottom: float, right: float, top: float, z: float) -> list[Point]:
    return [(left, bottom, z), (right, bottom, z), (right, top, z), (left, top, z)]


def wall_quad(x: float, bottom: float, top: float, near: float, far: float) -> list[Point]:
    return [(x, bottom, near), (x, bottom, far), (x, top, far), (x, top, near)]


def disc(x: float, y: float, z: float, rx: float, ry: float, corners: int = 16, along: bool = False) -> list[Point]:
    """Ellipse or regular polygon that faces the camera or, `along` the street, the road."""
    turns = [(rx * sin(2 * pi * i / corners), y + ry * cos(2 * pi * i / corners)) for i in range(corners)]
    return [(x, up, z + across) if along else (x + across, up, z) for across, up in turns]


def limb(x0: float, y0: float, x1: float, y1: float, width: float, z: float) -> list[Point]:
    """A bar of the given width from one point to another, facing the camera."""
    half = width / 2 / max(hypot(x1 - x0, y1 - y0), 1e-6)
    dx, dy = (y1 - y0) * half, (x0 - x1) * half
    return [(x0 - dx, y0 - dy, z), (x0 + dx, y0 + dy, z), (x1 + dx, y1 + dy, z), (x1 - dx, y1 - dy, z)]
