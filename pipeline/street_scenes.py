"""Labelled street scenes, drawn in code: the pictures of the demo and of the tests.

A scene is planned in metres (a street seen through a pinhole camera, the sun to one side) and painted from far to
near, colours and class ids together, so the label is exact by construction. Points are (right, up, ahead) in metres.
Seeded: the same seed and size give the same pixels. Knows numpy and Pillow only, not the network or Ray.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import cos, exp, hypot, pi, sin
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# The eleven classes of CamVid (Brostow et al., 2009, in the usual grouping) and their colours.
CLASSES: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)
NAMES: tuple[str, ...] = tuple(name for name, _ in CLASSES)
PALETTE: tuple[tuple[int, int, int], ...] = tuple(colour for _, colour in CLASSES)
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(len(NAMES))
IGNORE_LABEL = 255

STREET_END = 120.0  # metres ahead at which the street ends and the skyline stands
TILE = 512  # side of the repeating noise image, a power of two
EXIF_ORIENTATION, TURN_RIGHT = 0x0112, 6  # the EXIF tag, and its value for "turn right to see it upright"

Colour = tuple[int, int, int]
Point = tuple[float, float, float]
Shape = tuple[list[Point], Colour]  # a polygon and the colour of its surface


@dataclass(frozen=True)
class Scene:
    """A drawn photograph: `image` uint8 (H, W, 3) RGB; `label` uint8 (H, W) of indices into `NAMES`, 255 = ignore."""

    image: np.ndarray
    label: np.ndarray


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
def _noise(*octaves: int) -> np.ndarray:
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


def _clouds() -> np.ndarray:
    return _noise(4, 8, 16, 32, 64, 128)


def _grain() -> np.ndarray:
    return _noise(32, 64, 128, 256, 512)


def _cut(noise: np.ndarray, rng: Random, height: int, width: int) -> np.ndarray:
    row, column = rng.randrange(TILE), rng.randrange(TILE)
    return noise[row : row + height, column : column + width]


def _look_up(noise: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return noise[row.astype(np.int32) & (TILE - 1), column.astype(np.int32) & (TILE - 1)]


def _scaled(colour: Sequence[float], factor: float) -> Colour:
    red, green, blue = (int(min(255, max(0, value * factor))) for value in colour)
    return red, green, blue


def _pick(rng: Random, *colours: Colour, spread: float = 9) -> Colour:
    return _scaled([value + rng.gauss(0, spread) for value in rng.choice(colours)], 1)


def _box(left: float, bottom: float, right: float, top: float, z: float) -> list[Point]:
    return [(left, bottom, z), (right, bottom, z), (right, top, z), (left, top, z)]


def _wall(x: float, bottom: float, top: float, near: float, far: float) -> list[Point]:
    return [(x, bottom, near), (x, bottom, far), (x, top, far), (x, top, near)]


def _disc(x: float, y: float, z: float, rx: float, ry: float, corners: int = 16, along: bool = False) -> list[Point]:
    """Ellipse or regular polygon that faces the camera or, `along` the street, the road."""
    turns = [(rx * sin(2 * pi * i / corners), y + ry * cos(2 * pi * i / corners)) for i in range(corners)]
    return [(x, up, z + across) if along else (x + across, up, z) for across, up in turns]


def _limb(x0: float, y0: float, x1: float, y1: float, width: float, z: float) -> list[Point]:
    """A bar of the given width from one point to another, facing the camera."""
    half = width / 2 / max(hypot(x1 - x0, y1 - y0), 1e-6)
    dx, dy = (y1 - y0) * half, (x0 - x1) * half
    return [(x0 - dx, y0 - dy, z), (x0 + dx, y0 + dy, z), (x1 + dx, y1 + dy, z), (x1 - dx, y1 - dy, z)]


def _light(rng: Random) -> Light:
    weathers = (  # sun, ambient, zenith, horizon; haze, clouds, lit windows
        ((0.62, 0.57, 0.48), (0.50, 0.54, 0.62), (58, 108, 188), (196, 216, 234), 0.004, 0.4, 0.0),
        ((0.40, 0.38, 0.34), (0.58, 0.61, 0.65), (98, 138, 190), (212, 222, 230), 0.006, 1.0, 0.0),
        ((0.05, 0.05, 0.05), (0.80, 0.82, 0.84), (158, 166, 176), (214, 217, 219), 0.009, 1.6, 0.1),
        ((0.72, 0.47, 0.25), (0.45, 0.44, 0.50), (88, 118, 172), (248, 206, 150), 0.008, 0.7, 0.1),
        ((0.04, 0.03, 0.03), (0.46, 0.47, 0.58), (70, 84, 126), (206, 160, 146), 0.007, 0.8, 0.5),
    )
    *colours, haze, clouds, lit = rng.choices(weathers, (6, 5, 4, 3, 2))[0]
    tint = [rng.gauss(1, 0.03) for _ in range(3)]
    sun, ambient, zenith, horizon = ([value * shift for value, shift in zip(c, tint, strict=True)] for c in colours)
    side = rng.choice((-1, 1))
    shadow = -side * rng.uniform(0.5, 1.1), rng.uniform(-0.45, 0.45)
    haze, clouds = haze * rng.uniform(0.6, 1.5), clouds * rng.uniform(0.7, 1.3)
    return Light(sun, ambient, zenith, horizon, haze, clouds, lit, side, shadow)


def _street(rng: Random) -> Street:
    road, fronts = rng.uniform(4.6, 6.2), {}
    for side in (-1, 1):
        z, usual, fronts[side] = rng.uniform(-4, 6), rng.uniform(7, 14), []
        while z < 0.7 * STREET_END:
            if rng.random() < 0.35:
                fronts[side].append((z, z + rng.uniform(5, 11), 0.0))
                z = fronts[side][-1][1]
            fronts[side].append((z, z + rng.uniform(9, 18), usual * rng.uniform(0.65, 1.35)))
            z = fronts[side][-1][1]
    return Street(road, road + rng.uniform(2.6, 4.0), rng.choice((-1, 1)), fronts)


class _Canvas:
    """The picture while it is painted: colours (3, H, W), class ids, and how things get onto both."""

    def __init__(self, size: tuple[int, int], camera: Camera, light: Light, rng: Random) -> None:
        self.height, self.width = size
        self.camera, self.light, self.rng = camera, light, rng
        self.colour = np.zeros((3, *size), np.float32)
        self.label = np.full(size, IGNORE_LABEL, np.uint8)
        self.sunlit = np.ones(size, np.float32)  # share of the sun that the buildings let through to the ground

    def _lay(self, patch: Image.Image, left: int, top: int, class_id: int, depth: float, lit: float) -> None:
        """Light, haze and blend one patch, whose fourth band is its coverage, with its corner at (left, top)."""
        bands, (width, height) = np.asarray(patch), patch.size
        alpha = bands[..., 3] * np.float32(1 / 255)
        keep = exp(-self.light.haze * depth)
        # Lighter above and towards the sun, and nowhere flat.
        tone = _cut(_grain(), self.rng, height, width) * np.float32(0.045)
        tone += (np.arange(height, dtype=np.float32) * (-0.14 / height) + 1.06)[:, None]
        tone += (np.arange(width, dtype=np.float32) / width - np.float32(0.5)) * (0.2 * self.light.side * lit)
        where = slice(top, top + height), slice(left, left + width)
        for channel in range(3):
            surface = bands[..., channel] * tone
            surface *= (self.light.ambient[channel] + self.light.sun[channel] * lit) * keep
            region = self.colour[channel][where]
            surface += (
                alpha * (self.light.horizon[channel] * (1 - keep)) - region * alpha
            )  # bands came multiplied by alpha
            region += surface
        self.label[where][alpha > 0.4] = class_id

    def _visible(self, pixels: np.ndarray) -> tuple[int, int, int, int] | None:
        """Return left, top, right, bottom of the part of these positions' frame that is in the picture, if any is."""
        (x0, y0), (x1, y1) = pixels.min(0), pixels.max(0)
        left, top, right, bottom = (
            max(int(x0), 0),
            max(int(y0), 0),
            min(int(x1) + 2, self.width),
            min(int(y1) + 2, self.height),
        )
        return (left, top, right, bottom) if left < right and top < bottom and x1 > 0 and y1 > 0 else None

    def paint(self, thing: Thing, lit: float | None = None) -> None:
        """Draw a thing, anti-aliased, in the light that falls where it stands."""
        pixels = self.camera.project([point for points, _ in thing.shapes for point in points])
        if (frame := self._visible(pixels)) is None:
            return
        left, top, right, bottom = frame
        if lit is None:
            lit = 0.1 + 0.75 * float(self.sunlit[bottom - 1, min((left + right) // 2, self.width - 1)])
        if thing.sprite is not None:
            (x0, y0), (x1, y1) = pixels.min(0), pixels.max(0)
            fx, fy = thing.sprite.width / (x1 - x0), thing.sprite.height / (y1 - y0)
            place = (fx, 0, (left - x0) * fx, 0, fy, (top - y0) * fy)
            size = (right - left, bottom - top)
            patch = thing.sprite.transform(size, Image.Transform.AFFINE, place, Image.Resampling.BILINEAR)
        else:
            # Small things need the finest edges; the skyline's are lost in the haze.
            fine = 1 if thing.depth > STREET_END else 3 if (right - left) * (bottom - top) < 9000 else 2
            # RGBX: four plain bands, which Pillow does not divide by alpha again.
            patch = Image.new("RGBX", ((right - left) * fine, (bottom - top) * fine))
            draw, spread, start = ImageDraw.Draw(patch), ((pixels - (left, top)) * fine).ravel().tolist(), 0
            for points, colour in thing.shapes:
                draw.polygon(spread[start : start + 2 * len(points)], fill=(*colour, 255))
                start += 2 * len(points)
            patch = patch.reduce(fine)
        self._lay(patch, left, top, thing.class_id, thing.depth, lit)

    def sees(self, quad: list[Point]) -> bool:
        """Whether any of the frame around a quad is in the picture."""
        return self._visible(self.camera.project(quad)) is not None

    def hang(self, texture: Image.Image, quad: list[Point], class_id: int, lit: float) -> None:
        """Map a texture in perspective onto a quad: lower left, lower right, upper right, upper left."""
        pixels, (width, height) = self.camera.project(quad), texture.size
        if (frame := self._visible(pixels)) is None:
            return
        left, top, right, bottom = frame
        rows, wanted = [], []
        for (x, y), (u, v) in zip(
            pixels - (left, top), ((0, height), (width, height), (width, 0), (0, 0)), strict=True
        ):
            rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
            wanted += [u, v]
        homography, size = np.linalg.solve(rows, wanted).tolist(), (right - left, bottom - top)
        patch = texture.transform(size, Image.Transform.PERSPECTIVE, homography, Image.Resampling.BILINEAR)
        self._lay(patch, left, top, class_id, sum(point[2] for point in quad) / 4, lit)

    def sky(self) -> None:
        """Gradient and clouds down to just below the horizon."""
        light, camera = self.light, self.camera
        rows = min(int(camera.horizon) + 4, self.height)
        row = np.arange(rows, dtype=np.float32)[:, None]
        height = np.maximum(camera.horizon - row, 2) / camera.focal
        # Clouds lie on a plane overhead: closer together towards the horizon, where haze takes them.
        across = (np.arange(self.width, dtype=np.float32) - camera.centre) / camera.focal * height**-0.6
        at = 110 * np.log(height) + self.rng.randrange(TILE) + TILE, 130 * across + self.rng.randrange(TILE) + 8 * TILE
        cover = np.clip(_look_up(_clouds(), *at) * 0.45 + (light.clouds - 0.45), 0, 1) * np.clip(height * 5, 0, 1)
        white = 232 + 9 * _look_up(_clouds(), at[0] + 6, at[1] - 6 * light.side)
        for channel in range(3):
            low, high = light.horizon[channel], light.zenith[channel]
            blue = high + (low - high) * (row / rows) ** 1.3
            bright = 0.35 * light.sun[channel] + 0.8 * light.ambient[channel] + 0.25
            self.colour[channel, :rows] = blue + (white * bright - blue) * cover
        self.label[:rows] = SKY

    def ground(self, street: Street, things: list[Thing]) -> None:
        """Road, lane marks, pavement and the shadows upon them, each pixel from its place on the ground."""
        camera, light, rng = self.camera, self.light, self.rng
        top = int(camera.horizon) + 2
        below = np.arange(top, self.height, dtype=np.float32)[:, None] + (0.5 - camera.horizon)
        z = camera.focal * camera.height / below
        pixel = z / camera.focal  # metres across one pixel; along the street it covers `deep`
        deep, fade = z * pixel / camera.height, np.minimum(0.05 / (z * pixel / camera.height), 1)
        x = (np.arange(self.width, dtype=np.float32) + (0.5 - camera.centre)) * pixel + camera.x
        aside = np.abs(x)

        def band(where: np.ndarray, middle: float, half: float, footprint: np.ndarray = pixel) -> np.ndarray:
            return np.clip((half - np.abs(where - middle)) / footprint + 0.5, 0, 1)

        patches = _look_up(_clouds(), z * 6 + rng.randrange(TILE), x * 14 + 8 * TILE)
        grain = _look_up(_grain(), z * 24, x * 24 + 64 * TILE) * np.sqrt(fade)
        tracks = 1 / (1 + (aside - street.road / 2) ** 2)
        road = rng.uniform(80, 112) * (0.98 + 0.035 * patches + 0.13 * grain + 0.08 * tracks)
        marks = band(x, 0, 0.075) * band((z + rng.uniform(0, 6)) % 6, 3, 1.5, deep)
        if rng.random() < 0.6:
            marks = np.maximum(marks, band(aside, street.road - rng.choice((0.35, 2.3)), 0.06))
        if rng.random() < 0.4:  # a zebra crossing
            stripes = np.abs(x - np.floor(x) - 0.5) < 0.27
            marks = np.maximum(marks, stripes * band(z, rng.uniform(8, 18), 1.5, deep) * (aside < street.road - 0.3))
        road += (205 - road) * marks * np.clip(0.85 + 0.25 * patches + 0.3 * grain, 0, 1)

        slab_x, slab_z = aside / 0.7, z / 0.9
        joint = np.maximum((slab_x - np.floor(slab_x) < 0.06) * np.minimum(0.04 / pixel, 1), (slab_z % 1 < 0.06) * fade)
        pave = 1 + 0.06 * _look_up(_grain(), slab_z, slab_x) + 0.05 * patches + 0.08 * grain - 0.3 * joint
        pave += 0.22 * band(aside, street.road + 0.09, 0.09) - 0.3 * band(aside, street.road + 0.22, 0.04)

        # The height of the street front on the sun's side by half metres ahead; a ray passes it `lean` metres up.
        tall, paved = np.zeros(int(2 * STREET_END), np.float32), aside > street.road
        for start, end, height in street.fronts[light.side]:
            tall[max(int(start * 2), 0) : max(int(end * 2), 0)] = height
        lean = (street.wall - light.side * x) / abs(light.shadow[0])
        passed = np.clip((z - lean * light.shadow[1]) * 2, 0, len(tall) - 1).astype(np.int32)
        self.sunlit[top:] = 1 - np.clip((tall[passed] - lean) * 2.5, 0, 1)
        sun = self.sunlit[top:] * (1 - self._cast_shadows(things)[top:])
        shelter = 0.75 + 0.25 * sun
        for side in (-1, 1):
            for start, end, height in street.fronts[side]:
                if height == 0 and end - start > 8:  # a side street
                    paved &= (x * side < street.road) | (z < start + 1) | (z > end - 1)
        stone = _pick(rng, (168, 160, 150), (150, 146, 144), (176, 160, 138))
        keep = np.exp(-light.haze * z)
        for channel in range(3):
            surface = np.where(paved, pave * stone[channel], road)
            surface *= light.ambient[channel] * shelter + light.sun[channel] * sun
            self.colour[channel, top:] = surface * keep + light.horizon[channel] * (1 - keep)
        self.label[top:] = np.where(paved, PAVEMENT, ROAD)

    def _cast_shadows(self, things: list[Thing]) -> np.ndarray:
        """Return how much the things shade each pixel of the ground (H, W): outlines laid down along the sun's rays."""
        mask = Image.new("L", (self.width, self.height))
        draw, sunny = ImageDraw.Draw(mask), max(self.light.sun) > 0.1
        across, along = self.light.shadow
        for thing in (thing for thing in things if thing.depth < 32):
            outlines = [points for points, _ in thing.shapes] if sunny else []
            if thing.sprite is not None:  # the crown is round, its cut-out's frame is not
                (x0, y0, z), _, (x1, y1, _), _ = thing.shapes[0][0]
                outlines = [_disc((x0 + x1) / 2, (y0 + y1) / 2, z, (x1 - x0) * 0.45, (y1 - y0) * 0.45)] * sunny
            if thing.class_id == CAR:  # dark underneath in any weather
                xs, _, zs = zip(*(point for points, _ in thing.shapes for point in points), strict=True)
                outlines.append(
                    [
                        (x, 0, z)
                        for x, z in zip(
                            (min(xs), max(xs), max(xs), min(xs)), (min(zs) - 0.3,) * 2 + (max(zs),) * 2, strict=True
                        )
                    ]
                )
            if outlines:
                fallen = [(x + y * across, 0.0, z + y * along) for points in outlines for x, y, z in points]
                spread, start = self.camera.project(fallen).ravel().tolist(), 0
                for points in outlines:
                    draw.polygon(spread[start : start + 2 * len(points)], fill=255)
                    start += 2 * len(points)
        return np.asarray(mask.filter(ImageFilter.BoxBlur(1)), np.float32) / 255

    def finish(self) -> Scene:
        """Return the scene as a camera records it: a soft lens, darker corners, exposure, sensor noise."""
        rng, size = self.rng, self.height * self.width
        soft, gain, noise = rng.uniform(0.06, 0.14), rng.uniform(0.92, 1.1), rng.uniform(0.012, 0.03)
        down, across = (np.linspace(-1, 1, n, dtype=np.float32) ** 2 for n in (self.height, self.width))
        vignette = (1.03 - 0.13 * (down[:, None] + across)) * gain
        image = np.empty((self.height, self.width, 3), np.uint8)
        for channel, plane in enumerate(self.colour):
            plane[1:-1] += soft * (plane[:-2] + plane[2:] - 2 * plane[1:-1])
            plane[:, 1:-1] += soft * (plane[:, :-2] + plane[:, 2:] - 2 * plane[:, 1:-1])
            plane *= vignette
            static = np.frombuffer(rng.randbytes(2 * size), np.uint8).reshape(2, self.height, self.width)
            plane += (static[0].astype(np.float32) - static[1]) * noise
            image[..., channel] = np.clip(plane, 0, 255)
        return Scene(image, self.label)


def _facade(
    rng: Random, length: float, height: float, across: float, up: float, light: Light, style: Colour
) -> Image.Image:
    """Texture of a wall, `length` x `height` metres at `across` x `up` pixels a metre: masonry, windows, shops."""
    columns, rows = max(int(length * across), 8), max(int(height * up), 8)
    tone = 1 + 0.06 * _cut(_clouds(), rng, rows, columns) + 0.05 * _cut(_grain(), rng, rows, columns)
    if up > 7 and rng.random() < 0.7:
        course = np.arange(rows)[:, None] / up // 0.24
        tone += 0.09 * _look_up(_grain(), course * 7, (np.arange(columns) / across / 0.5 + course % 2 * 0.5) // 1 * 5)
    wall = np.empty((rows, columns, 4), np.uint8)
    for channel in range(3):
        wall[..., channel] = np.clip(tone * style[channel], 0, 255)
    wall[..., 3] = 255
    texture = Image.frombuffer("RGBX", (columns, rows), wall.tobytes(), "raw", "RGBX", 0, 1).copy()
    draw = ImageDraw.Draw(texture)

    def block(left: float, bottom: float, right: float, top: float, colour: Colour) -> None:
        x, y = left * across, (height - top) * up
        draw.rectangle((x, y, max(right * across - 1, x), max((height - bottom) * up - 1, y)), fill=(*colour, 255))

    trim = _pick(rng, (232, 228, 220), (92, 84, 78), (190, 180, 165))
    glass = _pick(rng, (62, 74, 88), (44, 48, 54), (84, 98, 110))
    wide, tall, bays = rng.uniform(0.9, 1.5), rng.uniform(1.4, 1.9), max(int(length / rng.uniform(2.0, 3.2)), 1)
    for floor in range(int((height - 3.7) / 3.1)):
        bottom = 4.2 + 3.1 * floor
        for index in range(bays):
            left = (index + 0.5) * length / bays - wide / 2
            block(left - 0.12, bottom - 0.12, left + wide + 0.12, bottom + tall + 0.14, trim)
            pane = (236, 200, 128) if rng.random() < light.windows_lit else _scaled(glass, rng.uniform(0.7, 1.6))
            block(left, bottom, left + wide, bottom + tall, pane)
            if up < 8:  # too far to see more
                continue
            block(
                left,
                bottom + tall * rng.uniform(0.5, 0.9),
                left + wide,
                bottom + tall,
                _scaled(pane, rng.uniform(0.6, 1.7)),
            )
            block(left + wide / 2 - 0.04, bottom, left + wide / 2 + 0.04, bottom + tall, trim)
            block(left - 0.2, bottom - 0.25, left + wide + 0.2, bottom - 0.12, _scaled(style, 0.65))
    block(0, height - 0.5, length, height, _scaled(trim, 0.9))
    block(0, height - 0.65, length, height - 0.5, _scaled(style, 0.55))
    if rng.random() < 0.6:  # a shop: fascia with lettering, display window, door
        front = _pick(rng, (120, 30, 34), (28, 66, 92), (30, 84, 60), (60, 60, 64), (200, 170, 80))
        block(0.3, 0, length - 0.3, 3.7, front)
        block(0.6, 0.6, length - 0.6, 2.8, _scaled(glass, 0.8))
        for index in range(int(length / 0.7) - 2):
            left, goods = 0.8 + 0.7 * index, _pick(rng, (150, 130, 105), (90, 90, 100), (150, 80, 70), spread=20)
            block(left, 0.7, left + rng.uniform(0.3, 0.6), rng.uniform(1, 2.4), goods)
        for index in range(int(length / 0.84)):
            left = length * 0.25 + 0.42 * index
            block(left, 3.0, left + rng.uniform(0.12, 0.36), 3.45, (236, 228, 208))
        block(length / 2 - 0.5, 0, length / 2 + 0.5, 2.6, _scaled(front, 0.7))
    else:
        block(0, 0, length, 0.7, _scaled(style, 0.7))
        for index in range(bays):
            left, door = (index + 0.5) * length / bays - 0.55, index % 3 == 1
            block(left - 0.1, 0 if door else 1.0, left + 1.2, 2.8, trim)
            block(
                left,
                0 if door else 1.1,
                left + 1.1,
                2.7,
                _pick(rng, (90, 30, 30), (26, 50, 80), (40, 60, 44)) if door else glass,
            )
    return texture


def _crown(rng: Random, light: Light, side: int = 144) -> Image.Image:
    """Cut-out of a tree's crown: overlapping leafy balls, lighter where they face the sun, ragged at the edge."""
    leaf = _pick(rng, (70, 104, 44), (86, 112, 40), (54, 88, 50), (134, 118, 44), (64, 96, 62))
    column = np.linspace(-1, 1, side, dtype=np.float32)
    row, nearest, facing = column[:, None], np.full((side, side), -1, np.float32), np.zeros((side, side), np.float32)
    for _ in range(11):
        angle, reach, radius = rng.uniform(0, 2 * pi), rng.uniform(0, 0.58), rng.uniform(0.26, 0.42)
        dx, dy = (column - reach * cos(angle)) / radius, (row - reach * sin(angle)) / radius
        inside = 1 - dx * dx - dy * dy
        facing = np.where(inside > nearest, 0.5 * light.side * dx - 0.8 * dy, facing)
        nearest = np.maximum(inside, nearest)
    leaves, clumps = _cut(_grain(), rng, side, side), _cut(_noise(16, 32, 64), rng, side, side)
    tone = 0.72 + 0.2 * facing + 0.17 * leaves + 0.14 * clumps + 0.12 * np.maximum(nearest, 0) - 0.1 * row
    alpha = np.clip((nearest + 0.16 * (leaves + clumps)) * 6 + 0.3, 0, 1)
    bands = [np.clip(tone * value, 0, 255) * alpha for value in (leaf[0] * 1.05, leaf[1], leaf[2] * 0.85)]
    pixels = np.stack([*bands, alpha * 255], 2).astype(np.uint8)
    return Image.frombuffer("RGBX", (side, side), pixels.tobytes(), "raw", "RGBX", 0, 1)


def _tree(rng: Random, crowns: list[Image.Image], x: float, z: float) -> list[Thing]:
    height, spread, bark = rng.uniform(5, 8.5), rng.uniform(1.7, 2.7), _pick(rng, (92, 76, 60), (74, 66, 58))
    trunk: list[Shape] = [(_limb(x, 0, x + rng.uniform(-0.3, 0.3), height * 0.6, 0.32, z), bark)]
    trunk += [(_limb(x, height * 0.35, x + dx, height * 0.6, 0.13, z), bark) for dx in (-0.8, 0.9)]
    trunk.append((_limb(x + 0.08, 0, x + 0.12, height * 0.5, 0.1, z), _scaled(bark, 0.7)))
    crown = _box(x - spread, height * 0.36, x + spread, height * rng.uniform(1.0, 1.15), z)
    return [Thing(z + 0.01, TREE, trunk), Thing(z, TREE, [(crown, bark)], rng.choice(crowns))]


def _car(rng: Random, camera: Camera, x: float, z: float, oncoming: bool) -> Thing:
    """A car from behind or from the front: its side view drawn out over its width, then glass, wheels and lamps."""
    colours = (
        (150, 24, 28),
        (30, 60, 120),
        (206, 208, 210),
        (48, 50, 54),
        (120, 124, 130),
        (226, 226, 222),
        (40, 90, 70),
    )
    paint, dark, glass, rear = _pick(rng, *colours), (24, 24, 27), (52, 62, 74), rng.uniform(0.02, 0.16)
    length, half, height = rng.uniform(3.9, 4.7), rng.uniform(0.84, 0.95), rng.uniform(1.38, 1.75)
    # Corners of the side view from back to front, as shares of length and height, and the light on each face between.
    side = [(0, 0.22), (0, 0.58), (rear, 0.66), (rear + 0.1, 0.98), (0.58, 1), (0.76, 0.66), (0.98, 0.55), (1, 0.2)]
    tones = [0.85, 1.0, 0.6, 1.25, 0.6, 1.1, 0.8]
    if oncoming:
        side, tones = [(1 - along, up) for along, up in side[::-1]], tones[::-1]
    corners = [(half * (0.78 if up > 0.8 else 1), up * height, z + along * length) for along, up in side]

    def strip(index: int, low: float, high: float, inset: float, colour: Colour) -> Shape:
        """The part of a face between two shares of its height, drawn in from the car's sides."""
        (w0, y0, z0), (w1, y1, z1) = corners[index : index + 2]
        ends = [((w0 + (w1 - w0) * s) * (1 - inset), y0 + (y1 - y0) * s, z0 + (z1 - z0) * s) for s in (low, high)]
        (w0, y0, z0), (w1, y1, z1) = ends
        return [(x - w0, y0, z0), (x + w0, y0, z0), (x + w1, y1, z1), (x - w1, y1, z1)], colour

    shapes = [strip(index, 0, 1, 0, _scaled(paint, tones[index])) for index in range(6, -1, -1)]
    near = -1 if x > camera.x else 1  # the flank that is turned to us
    flank = [(x + near * w, y, ahead) for w, y, ahead in corners]
    cabin = flank[2:6]
    middle = sum(point[2] for point in cabin) / 4
    pane = [
        (px, 0.66 * height + (y - 0.66 * height) * 0.82 + 0.03, middle + (ahead - middle) * 0.84)
        for px, y, ahead in cabin
    ]
    shapes += [(flank, _scaled(paint, 0.8)), (_wall(x + near * half, 0.2, 0.4, z, z + length), _scaled(paint, 0.5))]
    shapes += [
        (pane, _scaled(glass, 0.8)),
        (_wall(pane[2][0], pane[0][1], pane[2][1], middle, middle + 0.12), _scaled(paint, 0.7)),
    ]
    for share in (0.2, 0.8):
        for radius, colour in ((0.33, dark), (0.2, (128, 130, 134)), (0.07, (60, 60, 62))):
            shapes.append((_disc(x + near * half, 0.33, z + share * length, radius, radius, along=True), colour))
    shapes += [(_box(x + end * half - 0.12, 0, x + end * half + 0.12, 0.4, z + 0.02), dark) for end in (-0.86, 0.86)]
    shapes += [strip(2, 0.12, 0.9, 0.1, glass), strip(2, 0.5, 0.85, 0.16, _scaled(glass, 1.7))]
    shapes += [strip(0, 0, 0.3, 0.02, _scaled(paint, 0.45)), strip(0, 0.36, 0.62, 0.66, (226, 220, 170))]
    if oncoming:
        shapes.append(strip(0, 0.66, 0.9, 0.4, dark))
    lamp, low, high = (
        (244, 240, 214) if oncoming else (196, 26, 22),
        corners[0][1] * 0.45 + corners[1][1] * 0.55,
        corners[1][1],
    )
    for end in (-0.8, 0.8):
        shapes.append((_box(x + end * half - 0.15, low, x + end * half + 0.15, high, z - 0.01), lamp))
        shapes.append(
            (_box(x + end * half - 0.07, low + 0.08, x + end * half + 0.06, high - 0.03, z - 0.01), _scaled(lamp, 1.3))
        )
    return Thing(z, CAR, shapes)


def _person(rng: Random, x: float, z: float, lift: float = 0.0) -> list[Shape]:
    """A person in mid-step, from shoes to hair; `lift` puts the hips onto a saddle."""
    size, stride, turn = rng.uniform(0.92, 1.06), rng.uniform(0.08, 0.34), rng.choice((-1, 1))
    coat = _pick(
        rng, (160, 40, 40), (40, 60, 110), (60, 62, 66), (196, 176, 130), (70, 100, 70), (210, 205, 200), spread=16
    )
    trousers, skin = (
        _pick(rng, (44, 50, 70), (60, 56, 54), (110, 100, 84)),
        _pick(rng, (226, 178, 148), (150, 104, 78), (96, 66, 50)),
    )
    hip = 0.88 * size + lift
    shoulder, head = hip + 0.58 * size, hip + 0.76 * size
    shapes: list[Shape] = []
    for end in (-1, 1):
        foot, knee, leg = (
            x + end * stride,
            x + end * (0.06 + stride * 0.45),
            _scaled(trousers, 1.0 if end == turn else 0.7),
        )
        shapes += [
            (_limb(x + end * 0.08, hip, knee, hip * 0.55, 0.19, z), leg),
            (_limb(knee, hip * 0.55, foot, 0.06 + lift, 0.14, z), leg),
        ]
        shapes.append((_limb(foot - 0.05, 0.05 + lift, foot + 0.14 * turn, 0.04 + lift, 0.09, z), (30, 28, 28)))
    shapes.append(
        (_limb(x - turn * 0.2, shoulder - 0.05, x - turn * (0.2 + stride / 2), hip, 0.12, z), _scaled(coat, 0.65))
    )
    chest = [(0.17, hip - 0.12), (0.24, shoulder - 0.06), (0.12, shoulder + 0.03)]
    shapes.append(([(x + dx, y, z) for dx, y in chest] + [(x - dx, y, z) for dx, y in chest[::-1]], coat))
    shapes.append(
        ([(x + turn * dx, y, z) for dx, y in chest] + [(x + turn * 0.04, hip - 0.12, z)], _scaled(coat, 0.78))
    )
    shapes.append(
        (_limb(x + turn * 0.21, shoulder - 0.06, x + turn * 0.3, (hip + shoulder) / 2, 0.12, z), _scaled(coat, 0.9))
    )
    shapes.append((_limb(x + turn * 0.3, (hip + shoulder) / 2, x + turn * 0.22, hip + 0.05, 0.1, z), skin))
    if rng.random() < 0.4:
        shapes.append(
            (_box(x - 0.3, hip - 0.25, x - 0.08, hip + 0.15, z), _pick(rng, (90, 60, 40), (60, 60, 64), (150, 50, 60)))
        )
    shapes.append((_disc(x, head + 0.02, z, 0.12, 0.15), _pick(rng, (40, 30, 24), (90, 64, 40), (160, 130, 80))))
    return [*shapes, (_disc(x + turn * 0.03, head - 0.02, z, 0.095, 0.12), skin)]


def _cyclist(rng: Random, x: float, z: float) -> Thing:
    """A rider and the bicycle, seen from the side or (`slim`) from an end."""
    slim, frame = rng.choice((0.12, 1.0)), _pick(rng, (180, 40, 40), (40, 90, 150), (220, 220, 220))
    shapes: list[Shape] = []
    for hub in (x - 0.52 * slim, x + 0.52 * slim):
        outer, inner = _disc(hub, 0.34, z, 0.34 * slim, 0.34), _disc(hub, 0.34, z, 0.27 * slim, 0.28)
        shapes.append(([*outer, outer[0], inner[0], *inner[::-1]], (26, 26, 28)))
    for x0, y0, x1, y1 in (
        (-0.52, 0.34, -0.18, 0.85),
        (-0.18, 0.85, 0.38, 0.8),
        (-0.05, 0.3, 0.38, 0.8),
        (0.52, 0.34, 0.36, 1.05),
    ):
        shapes.append((_limb(x + x0 * slim, y0, x + x1 * slim, y1, 0.06, z), frame))
    shapes += _person(rng, x - 0.1 * slim, z, lift=0.14)
    shapes.append((_limb(x - 0.05 * slim, 1.4, x + 0.36 * slim, 1.08, 0.1, z), _scaled(frame, 0.8)))
    return Thing(z, BICYCLIST, shapes)


def _post(rng: Random, x: float, z: float) -> list[Thing]:
    """A lamp post, a traffic light or a road sign: the post is a pole, what it carries is a sign."""
    kind, grey = (
        rng.choice(("lamp", "lamp", "lights", "round", "triangle", "board")),
        _pick(rng, (70, 76, 74), (120, 124, 126)),
    )
    top = rng.uniform(5.5, 8) if kind == "lamp" else rng.uniform(2.3, 2.9)
    post: list[Shape] = [
        (_limb(x, 0, x, top, 0.12, z), grey),
        (_limb(x + 0.03, 0, x + 0.03, top, 0.05, z), _scaled(grey, 0.6)),
    ]
    if kind == "lamp":
        inward = -1 if x > 0 else 1
        post += [
            (_limb(x, 0, x, 1.1, 0.22, z), _scaled(grey, 0.85)),
            (_limb(x, top, x + inward * 1.4, top + 0.3, 0.1, z), grey),
        ]
        post.append((_limb(x + inward * 1.1, top + 0.22, x + inward * 1.9, top + 0.3, 0.18, z), (206, 206, 196)))
        return [Thing(z, POLE, post)]
    if kind == "lights":
        face: list[Shape] = [(_box(x - 0.22, top - 0.1, x + 0.22, top + 1.0, z), (28, 30, 32))]
        lit = rng.randrange(3)
        for index, colour in enumerate(((40, 230, 120), (250, 180, 40), (240, 40, 30))):
            face.append(
                (_disc(x, top + 0.1 + 0.33 * index, z, 0.13, 0.13), _scaled(colour, 1 if index == lit else 0.25))
            )
    elif kind == "board":
        ink, board = (236, 236, 232), _pick(rng, (24, 74, 150), (30, 110, 70))
        face = [
            (_box(x - 0.6, top - 0.45, x + 0.6, top + 0.35, z), ink),
            (_box(x - 0.56, top - 0.41, x + 0.56, top + 0.31, z), board),
        ]
        face += [
            (_box(x - 0.45, top + y, x + rng.uniform(0, 0.45), top + y + 0.12, z), ink) for y in (-0.3, -0.08, 0.12)
        ]
    else:
        corners, radius = (24, 0.38) if kind == "round" else (3, 0.5)
        face = [
            (_disc(x, top, z, radius, radius, corners), (196, 28, 30)),
            (_disc(x, top, z, radius * 0.7, radius * 0.7, corners), (238, 236, 228)),
        ]
        face += [(_box(x + dx, top - 0.13, x + dx + 0.11, top + 0.13, z), (30, 30, 32)) for dx in (-0.14, 0.03)]
    return [Thing(z + 0.01, POLE, post), Thing(z, SIGN, face)]


def _traffic(rng: Random, camera: Camera, street: Street, crowns: list[Image.Image]) -> list[Thing]:
    """Everything that stands, walks and drives between the walls."""
    things: list[Thing] = []
    for side in (-1, 1):
        z = rng.uniform(7, 13)
        while z < 42:  # parked along the kerb
            if rng.random() < 0.45:
                things.append(_car(rng, camera, side * (street.road - 1.15), z, side != street.traffic_side))
            z += rng.uniform(5.6, 9)
        z, x = rng.uniform(6, 14), side * (street.road + rng.uniform(0.5, 0.8))
        while z < 65:
            things += _post(rng, x, z) if rng.random() < 0.62 else _tree(rng, crowns, x, z)
            z += rng.uniform(10, 17)
        for _ in range(rng.randrange(5)):
            x, z = side * rng.uniform(street.road + 0.4, street.wall - 0.5), rng.uniform(6, 32)
            things.append(Thing(z, PEDESTRIAN, _person(rng, x, z)))
    for direction in (1, -1):  # ahead in our lane, and oncoming
        if rng.random() < 0.7:
            z = 10 + rng.expovariate(1 / 14)
            things.append(_car(rng, camera, direction * street.traffic_side * 1.7, z, direction < 0))
    if rng.random() < 0.3:  # crossing the road
        z = rng.uniform(9, 22)
        things.append(Thing(z, PEDESTRIAN, _person(rng, rng.uniform(-3.5, 3.5), z)))
    for _ in range(rng.randrange(3)):
        things.append(
            _cyclist(rng, rng.choice((-1, 1)) * rng.uniform(street.road - 2.6, street.road - 2.1), rng.uniform(6, 24))
        )
    return things


def _skyline(canvas: _Canvas) -> None:
    """The town beyond the end of the street: roofs and trees in the haze."""
    rng = canvas.rng
    z = 2 * STREET_END
    reach = z * canvas.width / canvas.camera.focal * 0.6
    roofs: list[Shape] = []
    trees: list[Shape] = []
    for _ in range(22):
        x, wide, tall = rng.uniform(-reach, reach), rng.uniform(5, 13), rng.uniform(6, 26)
        colour = _pick(rng, (150, 130, 120), (120, 110, 110), (170, 160, 150))
        roofs.append((_box(x - wide, 0, x + wide, tall, z), colour))
        roofs += [
            (_box(x - wide * 0.8, 4 * y, x + wide * 0.8, 4 * y + 1.4, z), _scaled(colour, 0.7))
            for y in range(1, int(tall / 4))
        ]
        trees.append(
            (_disc(rng.uniform(-reach, reach), 2, z, wide, tall * 0.35), _pick(rng, (70, 92, 60), (84, 100, 58)))
        )
    canvas.paint(Thing(z, BUILDING, roofs), 0.5)
    canvas.paint(Thing(z, TREE, trees), 0.5)


def _fronts(canvas: _Canvas, street: Street, crowns: list[Image.Image]) -> None:
    """Both sides of the street from far to near: street fronts, end walls, and gardens and fences in the gaps."""
    rng, light, focal = canvas.rng, canvas.light, canvas.camera.focal
    styles = (
        (150, 84, 66),
        (172, 110, 84),
        (196, 180, 152),
        (168, 162, 154),
        (212, 204, 190),
        (186, 160, 130),
        (132, 120, 116),
    )
    for side in (-1, 1):
        lit, x = (0.9 if side == -light.side else 0.05), side * street.wall
        for start, end, height in reversed(street.fronts[side]):
            near = max(start, 2.0)
            if end < near + 1 or not canvas.sees(_wall(x, 0, max(height, 9), near, end)):
                continue
            if height == 0:
                for z in (end - 1.5, near + 1.5):
                    for thing in _tree(rng, crowns, x + side * rng.uniform(3, 7), z):
                        canvas.paint(thing, 0.4)
                if end - start <= 8:
                    wood = _pick(rng, (120, 92, 66), (96, 100, 92), (146, 128, 104))
                    planks = [
                        _wall(x, 0, rng.uniform(1.5, 1.7), end - 0.25 * i - 0.25, end - 0.25 * i)
                        for i in range(int((end - near) * 4))
                    ]
                    canvas.paint(
                        Thing(near, FENCE, [(plank, _scaled(wood, rng.uniform(0.75, 1.2))) for plank in planks]), lit
                    )
                continue
            style = _pick(rng, *styles, spread=5)
            # No finer than the wall is seen: its nearest visible metre, and less across, where it is foreshortened.
            seen = max(near, focal * (street.wall - 2) / canvas.width * 1.5)
            up = min(focal / seen, 24.0)
            across = min(max(up * street.wall / seen * 1.2, 3.0), up)
            canvas.paint(Thing(start, BUILDING, [(_box(x, 0, x + 9 * side, height, near), _scaled(style, 0.9))]), 0.3)
            wall = _wall(x, 0, height, near, end)
            canvas.hang(_facade(rng, end - near, height, across, up, light, style), wall, BUILDING, lit)


def _bonnet(canvas: _Canvas) -> None:
    """The bonnet of our own car along the lower edge, which nobody labels."""
    rng, camera = canvas.rng, canvas.camera
    low, wide = camera.height - (canvas.height - camera.horizon) / camera.focal, canvas.width / camera.focal
    paint, rise = _pick(rng, (40, 44, 52), (120, 124, 130), (110, 30, 30), (200, 200, 204)), rng.uniform(0.05, 0.12)
    shades = ((1.0, 0.8), (0.9, 1.3), (0.8, 1.0), (0.55, 0.85), (0.3, 0.7))
    discs: list[Shape] = [
        (_disc(camera.x, low, 1, wide * (0.6 + 0.2 * s), rise * s, 60), _scaled(paint, f)) for s, f in shades
    ]
    canvas.paint(Thing(1, IGNORE_LABEL, discs), 0.5)


def draw_scene(seed: int, size: tuple[int, int] = (360, 480)) -> Scene:
    """Draw one labelled street scene.

    Args:
        seed: any non-negative integer; the same seed and size give the same pixels, in any process.
        size: (height, width) in pixels, each from 64 to 1024.

    Raises:
        ValueError: for a negative seed or another size.
    """
    height, width = size
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; give an integer of 0 or more")
    if not 64 <= min(size) <= max(size) <= 2 * TILE:
        raise ValueError(f"size {size} cannot be drawn; give (height, width) with each from 64 to {2 * TILE} pixels")
    rng = Random(seed)
    light, street = _light(rng), _street(rng)
    camera = Camera(
        focal=max(size) * rng.uniform(0.72, 0.92),
        centre=width * rng.uniform(0.42, 0.58),
        horizon=height * rng.uniform(0.42, 0.54),
        x=street.traffic_side * rng.uniform(1.2, 2.2),
        height=rng.uniform(1.25, 1.7),
    )
    canvas = _Canvas(size, camera, light, rng)
    crowns = [_crown(rng, light) for _ in range(2)]
    things = _traffic(rng, camera, street, crowns)
    canvas.sky()
    canvas.ground(street, things)
    _skyline(canvas)
    _fronts(canvas, street, crowns)
    for thing in sorted(things, key=lambda thing: -thing.depth):
        canvas.paint(thing)
    if rng.random() < 0.6:
        _bonnet(canvas)
    return canvas.finish()


def write_street_scenes(
    folder: Path, train: int, val: int, photos: int, seed: int = 0, size: tuple[int, int] = (360, 480)
) -> None:
    """Write labelled scenes in the `folders` layout, and unlabelled photographs of other streets.

    `labelled/` holds `classes.json` (names, palette, ignore_label) and, for each split, `images/<split>/` with
    `scene_00000.jpg` and so on, and `labels/<split>/` with `scene_00000.png` of class ids; `photos/2026/` holds
    `street_00000.jpg` and so on. Of every eight photographs the first is a portrait that lies on its side with an
    EXIF orientation tag, and two have another size. Files of the same names are written over, and `classes.json`
    comes last: where it stands, all do.

    Args:
        folder: where to write; made if missing.
        train, val, photos: how many of each, 0 or more.
        seed: a street is drawn from it, its set and its number, so more of them leave the first ones as they are.
        size: (height, width) of the scenes in pixels.

    Raises:
        ValueError: for a negative count or seed, or a size that `draw_scene` refuses.
    """
    counts = {"train": train, "val": val, "photos": photos}
    for name, value in {**counts, "seed": seed}.items():
        if value < 0:
            raise ValueError(f"{name} {value} is negative; give 0 or more")
    height, width = size
    photo_sizes = [(width, height), size, size, (height * 3 // 4, width), size, size, (height, height), size]

    def scene(name: str, index: int, size: tuple[int, int]) -> Scene:
        return draw_scene(seed * 3_000_000 + list(counts).index(name) * 1_000_000 + index, size)

    for split in ("train", "val"):
        images, labels = folder / "labelled" / "images" / split, folder / "labelled" / "labels" / split
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for index in range(counts[split]):
            drawn = scene(split, index, size)
            Image.fromarray(drawn.image).save(images / f"scene_{index:05d}.jpg", quality=92)
            Image.fromarray(drawn.label).save(labels / f"scene_{index:05d}.png")
    album = folder / "photos" / "2026"
    album.mkdir(parents=True, exist_ok=True)
    for index in range(photos):
        photo, exif = Image.fromarray(scene("photos", index, photo_sizes[index % 8]).image), Image.Exif()
        if index % 8 == 0:
            photo = photo.transpose(Image.Transpose.ROTATE_90)
            exif[EXIF_ORIENTATION] = TURN_RIGHT
        photo.save(album / f"street_{index:05d}.jpg", quality=92, exif=exif)
    classes = {"names": NAMES, "palette": PALETTE, "ignore_label": IGNORE_LABEL}
    (folder / "labelled" / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
