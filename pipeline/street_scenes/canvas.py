"""The picture of a street scene while it is painted, from far to near, colours and class ids together."""

from dataclasses import dataclass
from math import exp
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pipeline.street_scenes.classes import CAR, IGNORE_LABEL, PAVEMENT, ROAD, SKY
from pipeline.street_scenes.geometry import (
    STREET_END,
    TILE,
    Camera,
    Light,
    Point,
    Street,
    Thing,
    cloud_tile,
    cut_tile,
    disc,
    grain_tile,
    look_up,
    pick,
)


@dataclass(frozen=True)
class Scene:
    """A drawn photograph: `image` uint8 (H, W, 3) RGB; `label` uint8 (H, W) of indices into `NAMES`, 255 = ignore."""

    image: np.ndarray
    label: np.ndarray


class Canvas:
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
        tone = cut_tile(grain_tile(), self.rng, height, width) * np.float32(0.045)
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
        cover = np.clip(look_up(cloud_tile(), *at) * 0.45 + (light.clouds - 0.45), 0, 1) * np.clip(height * 5, 0, 1)
        white = 232 + 9 * look_up(cloud_tile(), at[0] + 6, at[1] - 6 * light.side)
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

        patches = look_up(cloud_tile(), z * 6 + rng.randrange(TILE), x * 14 + 8 * TILE)
        grain = look_up(grain_tile(), z * 24, x * 24 + 64 * TILE) * np.sqrt(fade)
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
        pave = 1 + 0.06 * look_up(grain_tile(), slab_z, slab_x) + 0.05 * patches + 0.08 * grain - 0.3 * joint
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
        stone = pick(rng, (168, 160, 150), (150, 146, 144), (176, 160, 138))
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
                outlines = [disc((x0 + x1) / 2, (y0 + y1) / 2, z, (x1 - x0) * 0.45, (y1 - y0) * 0.45)] * sunny
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
