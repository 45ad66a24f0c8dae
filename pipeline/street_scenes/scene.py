"""Labelled street scenes, drawn in code: the pictures of the demo and of the tests.

A scene is planned in metres (a street seen through a pinhole camera, the sun to one side) and painted from far to
near, colours and class ids together, so the label is exact by construction. Points are (right, up, ahead) in metres.
Seeded: the same seed and size give the same pixels. Knows numpy and Pillow only, not the network or Ray.
"""

import json
from pathlib import Path
from random import Random

from PIL import Image

from pipeline.street_scenes.canvas import Canvas, Scene
from pipeline.street_scenes.classes import BUILDING, FENCE, IGNORE_LABEL, NAMES, PALETTE, PEDESTRIAN, TREE
from pipeline.street_scenes.geometry import (
    STREET_END,
    TILE,
    Camera,
    Light,
    Shape,
    Street,
    Thing,
    box,
    disc,
    pick,
    shaded,
    wall_quad,
)
from pipeline.street_scenes.things import (
    car_thing,
    crown_picture,
    cyclist_thing,
    facade_picture,
    person_shapes,
    post_things,
    tree_things,
)

EXIF_ORIENTATION, TURN_RIGHT = 0x0112, 6  # the EXIF tag, and its value for "turn right to see it upright"


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


def _traffic(rng: Random, camera: Camera, street: Street, crowns: list[Image.Image]) -> list[Thing]:
    """Everything that stands, walks and drives between the walls."""
    things: list[Thing] = []
    for side in (-1, 1):
        z = rng.uniform(7, 13)
        while z < 42:  # parked along the kerb
            if rng.random() < 0.45:
                things.append(car_thing(rng, camera, side * (street.road - 1.15), z, side != street.traffic_side))
            z += rng.uniform(5.6, 9)
        z, x = rng.uniform(6, 14), side * (street.road + rng.uniform(0.5, 0.8))
        while z < 65:
            things += post_things(rng, x, z) if rng.random() < 0.62 else tree_things(rng, crowns, x, z)
            z += rng.uniform(10, 17)
        for _ in range(rng.randrange(5)):
            x, z = side * rng.uniform(street.road + 0.4, street.wall - 0.5), rng.uniform(6, 32)
            things.append(Thing(z, PEDESTRIAN, person_shapes(rng, x, z)))
    for direction in (1, -1):  # ahead in our lane, and oncoming
        if rng.random() < 0.7:
            z = 10 + rng.expovariate(1 / 14)
            things.append(car_thing(rng, camera, direction * street.traffic_side * 1.7, z, direction < 0))
    if rng.random() < 0.3:  # crossing the road
        z = rng.uniform(9, 22)
        things.append(Thing(z, PEDESTRIAN, person_shapes(rng, rng.uniform(-3.5, 3.5), z)))
    for _ in range(rng.randrange(3)):
        things.append(
            cyclist_thing(
                rng, rng.choice((-1, 1)) * rng.uniform(street.road - 2.6, street.road - 2.1), rng.uniform(6, 24)
            )
        )
    return things


def _skyline(canvas: Canvas) -> None:
    """The town beyond the end of the street: roofs and trees in the haze."""
    rng = canvas.rng
    z = 2 * STREET_END
    reach = z * canvas.width / canvas.camera.focal * 0.6
    roofs: list[Shape] = []
    trees: list[Shape] = []
    for _ in range(22):
        x, wide, tall = rng.uniform(-reach, reach), rng.uniform(5, 13), rng.uniform(6, 26)
        colour = pick(rng, (150, 130, 120), (120, 110, 110), (170, 160, 150))
        roofs.append((box(x - wide, 0, x + wide, tall, z), colour))
        roofs += [
            (box(x - wide * 0.8, 4 * y, x + wide * 0.8, 4 * y + 1.4, z), shaded(colour, 0.7))
            for y in range(1, int(tall / 4))
        ]
        trees.append(
            (disc(rng.uniform(-reach, reach), 2, z, wide, tall * 0.35), pick(rng, (70, 92, 60), (84, 100, 58)))
        )
    canvas.paint(Thing(z, BUILDING, roofs), 0.5)
    canvas.paint(Thing(z, TREE, trees), 0.5)


def _fronts(canvas: Canvas, street: Street, crowns: list[Image.Image]) -> None:
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
            if end < near + 1 or not canvas.sees(wall_quad(x, 0, max(height, 9), near, end)):
                continue
            if height == 0:
                for z in (end - 1.5, near + 1.5):
                    for thing in tree_things(rng, crowns, x + side * rng.uniform(3, 7), z):
                        canvas.paint(thing, 0.4)
                if end - start <= 8:
                    wood = pick(rng, (120, 92, 66), (96, 100, 92), (146, 128, 104))
                    planks = [
                        wall_quad(x, 0, rng.uniform(1.5, 1.7), end - 0.25 * i - 0.25, end - 0.25 * i)
                        for i in range(int((end - near) * 4))
                    ]
                    canvas.paint(
                        Thing(near, FENCE, [(plank, shaded(wood, rng.uniform(0.75, 1.2))) for plank in planks]), lit
                    )
                continue
            style = pick(rng, *styles, spread=5)
            # No finer than the wall is seen: its nearest visible metre, and less across, where it is foreshortened.
            seen = max(near, focal * (street.wall - 2) / canvas.width * 1.5)
            up = min(focal / seen, 24.0)
            across = min(max(up * street.wall / seen * 1.2, 3.0), up)
            canvas.paint(Thing(start, BUILDING, [(box(x, 0, x + 9 * side, height, near), shaded(style, 0.9))]), 0.3)
            wall = wall_quad(x, 0, height, near, end)
            canvas.hang(facade_picture(rng, end - near, height, across, up, light, style), wall, BUILDING, lit)


def _bonnet(canvas: Canvas) -> None:
    """The bonnet of our own car along the lower edge, which nobody labels."""
    rng, camera = canvas.rng, canvas.camera
    low, wide = camera.height - (canvas.height - camera.horizon) / camera.focal, canvas.width / camera.focal
    paint, rise = pick(rng, (40, 44, 52), (120, 124, 130), (110, 30, 30), (200, 200, 204)), rng.uniform(0.05, 0.12)
    shades = ((1.0, 0.8), (0.9, 1.3), (0.8, 1.0), (0.55, 0.85), (0.3, 0.7))
    discs: list[Shape] = [
        (disc(camera.x, low, 1, wide * (0.6 + 0.2 * s), rise * s, 60), shaded(paint, f)) for s, f in shades
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
    canvas = Canvas(size, camera, light, rng)
    crowns = [crown_picture(rng, light) for _ in range(2)]
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
