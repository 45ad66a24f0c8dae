"""What stands in a street: buildings' fronts, trees, cars, people, posts."""

from math import cos, pi, sin
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from pipeline.street_scenes.classes import BICYCLIST, CAR, POLE, SIGN, TREE
from pipeline.street_scenes.geometry import (
    Camera,
    Colour,
    Light,
    Shape,
    Thing,
    box,
    cloud_tile,
    cut_tile,
    disc,
    grain_tile,
    limb,
    look_up,
    noise_tile,
    pick,
    shaded,
    wall_quad,
)


def facade_picture(
    rng: Random, length: float, height: float, across: float, up: float, light: Light, style: Colour
) -> Image.Image:
    """Texture of a wall, `length` x `height` metres at `across` x `up` pixels a metre: masonry, windows, shops."""
    columns, rows = max(int(length * across), 8), max(int(height * up), 8)
    tone = 1 + 0.06 * cut_tile(cloud_tile(), rng, rows, columns) + 0.05 * cut_tile(grain_tile(), rng, rows, columns)
    if up > 7 and rng.random() < 0.7:
        course = np.arange(rows)[:, None] / up // 0.24
        tone += 0.09 * look_up(
            grain_tile(), course * 7, (np.arange(columns) / across / 0.5 + course % 2 * 0.5) // 1 * 5
        )
    wall = np.empty((rows, columns, 4), np.uint8)
    for channel in range(3):
        wall[..., channel] = np.clip(tone * style[channel], 0, 255)
    wall[..., 3] = 255
    texture = Image.frombuffer("RGBX", (columns, rows), wall.tobytes(), "raw", "RGBX", 0, 1).copy()
    draw = ImageDraw.Draw(texture)

    def block(left: float, bottom: float, right: float, top: float, colour: Colour) -> None:
        x, y = left * across, (height - top) * up
        draw.rectangle((x, y, max(right * across - 1, x), max((height - bottom) * up - 1, y)), fill=(*colour, 255))

    trim = pick(rng, (232, 228, 220), (92, 84, 78), (190, 180, 165))
    glass = pick(rng, (62, 74, 88), (44, 48, 54), (84, 98, 110))
    wide, tall, bays = rng.uniform(0.9, 1.5), rng.uniform(1.4, 1.9), max(int(length / rng.uniform(2.0, 3.2)), 1)
    for floor in range(int((height - 3.7) / 3.1)):
        bottom = 4.2 + 3.1 * floor
        for index in range(bays):
            left = (index + 0.5) * length / bays - wide / 2
            block(left - 0.12, bottom - 0.12, left + wide + 0.12, bottom + tall + 0.14, trim)
            pane = (236, 200, 128) if rng.random() < light.windows_lit else shaded(glass, rng.uniform(0.7, 1.6))
            block(left, bottom, left + wide, bottom + tall, pane)
            if up < 8:  # too far to see more
                continue
            block(
                left,
                bottom + tall * rng.uniform(0.5, 0.9),
                left + wide,
                bottom + tall,
                shaded(pane, rng.uniform(0.6, 1.7)),
            )
            block(left + wide / 2 - 0.04, bottom, left + wide / 2 + 0.04, bottom + tall, trim)
            block(left - 0.2, bottom - 0.25, left + wide + 0.2, bottom - 0.12, shaded(style, 0.65))
    block(0, height - 0.5, length, height, shaded(trim, 0.9))
    block(0, height - 0.65, length, height - 0.5, shaded(style, 0.55))
    if rng.random() < 0.6:  # a shop: fascia with lettering, display window, door
        front = pick(rng, (120, 30, 34), (28, 66, 92), (30, 84, 60), (60, 60, 64), (200, 170, 80))
        block(0.3, 0, length - 0.3, 3.7, front)
        block(0.6, 0.6, length - 0.6, 2.8, shaded(glass, 0.8))
        for index in range(int(length / 0.7) - 2):
            left, goods = 0.8 + 0.7 * index, pick(rng, (150, 130, 105), (90, 90, 100), (150, 80, 70), spread=20)
            block(left, 0.7, left + rng.uniform(0.3, 0.6), rng.uniform(1, 2.4), goods)
        for index in range(int(length / 0.84)):
            left = length * 0.25 + 0.42 * index
            block(left, 3.0, left + rng.uniform(0.12, 0.36), 3.45, (236, 228, 208))
        block(length / 2 - 0.5, 0, length / 2 + 0.5, 2.6, shaded(front, 0.7))
    else:
        block(0, 0, length, 0.7, shaded(style, 0.7))
        for index in range(bays):
            left, door = (index + 0.5) * length / bays - 0.55, index % 3 == 1
            block(left - 0.1, 0 if door else 1.0, left + 1.2, 2.8, trim)
            block(
                left,
                0 if door else 1.1,
                left + 1.1,
                2.7,
                pick(rng, (90, 30, 30), (26, 50, 80), (40, 60, 44)) if door else glass,
            )
    return texture


def crown_picture(rng: Random, light: Light, side: int = 144) -> Image.Image:
    """Cut-out of a tree's crown: overlapping leafy balls, lighter where they face the sun, ragged at the edge."""
    leaf = pick(rng, (70, 104, 44), (86, 112, 40), (54, 88, 50), (134, 118, 44), (64, 96, 62))
    column = np.linspace(-1, 1, side, dtype=np.float32)
    row, nearest, facing = column[:, None], np.full((side, side), -1, np.float32), np.zeros((side, side), np.float32)
    for _ in range(11):
        angle, reach, radius = rng.uniform(0, 2 * pi), rng.uniform(0, 0.58), rng.uniform(0.26, 0.42)
        dx, dy = (column - reach * cos(angle)) / radius, (row - reach * sin(angle)) / radius
        inside = 1 - dx * dx - dy * dy
        facing = np.where(inside > nearest, 0.5 * light.side * dx - 0.8 * dy, facing)
        nearest = np.maximum(inside, nearest)
    leaves, clumps = cut_tile(grain_tile(), rng, side, side), cut_tile(noise_tile(16, 32, 64), rng, side, side)
    tone = 0.72 + 0.2 * facing + 0.17 * leaves + 0.14 * clumps + 0.12 * np.maximum(nearest, 0) - 0.1 * row
    alpha = np.clip((nearest + 0.16 * (leaves + clumps)) * 6 + 0.3, 0, 1)
    bands = [np.clip(tone * value, 0, 255) * alpha for value in (leaf[0] * 1.05, leaf[1], leaf[2] * 0.85)]
    pixels = np.stack([*bands, alpha * 255], 2).astype(np.uint8)
    return Image.frombuffer("RGBX", (side, side), pixels.tobytes(), "raw", "RGBX", 0, 1)


def tree_things(rng: Random, crowns: list[Image.Image], x: float, z: float) -> list[Thing]:
    height, spread, bark = rng.uniform(5, 8.5), rng.uniform(1.7, 2.7), pick(rng, (92, 76, 60), (74, 66, 58))
    trunk: list[Shape] = [(limb(x, 0, x + rng.uniform(-0.3, 0.3), height * 0.6, 0.32, z), bark)]
    trunk += [(limb(x, height * 0.35, x + dx, height * 0.6, 0.13, z), bark) for dx in (-0.8, 0.9)]
    trunk.append((limb(x + 0.08, 0, x + 0.12, height * 0.5, 0.1, z), shaded(bark, 0.7)))
    crown = box(x - spread, height * 0.36, x + spread, height * rng.uniform(1.0, 1.15), z)
    return [Thing(z + 0.01, TREE, trunk), Thing(z, TREE, [(crown, bark)], rng.choice(crowns))]


def car_thing(rng: Random, camera: Camera, x: float, z: float, oncoming: bool) -> Thing:
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
    paint, dark, glass, rear = pick(rng, *colours), (24, 24, 27), (52, 62, 74), rng.uniform(0.02, 0.16)
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

    shapes = [strip(index, 0, 1, 0, shaded(paint, tones[index])) for index in range(6, -1, -1)]
    near = -1 if x > camera.x else 1  # the flank that is turned to us
    flank = [(x + near * w, y, ahead) for w, y, ahead in corners]
    cabin = flank[2:6]
    middle = sum(point[2] for point in cabin) / 4
    pane = [
        (px, 0.66 * height + (y - 0.66 * height) * 0.82 + 0.03, middle + (ahead - middle) * 0.84)
        for px, y, ahead in cabin
    ]
    shapes += [(flank, shaded(paint, 0.8)), (wall_quad(x + near * half, 0.2, 0.4, z, z + length), shaded(paint, 0.5))]
    shapes += [
        (pane, shaded(glass, 0.8)),
        (wall_quad(pane[2][0], pane[0][1], pane[2][1], middle, middle + 0.12), shaded(paint, 0.7)),
    ]
    for share in (0.2, 0.8):
        for radius, colour in ((0.33, dark), (0.2, (128, 130, 134)), (0.07, (60, 60, 62))):
            shapes.append((disc(x + near * half, 0.33, z + share * length, radius, radius, along=True), colour))
    shapes += [(box(x + end * half - 0.12, 0, x + end * half + 0.12, 0.4, z + 0.02), dark) for end in (-0.86, 0.86)]
    shapes += [strip(2, 0.12, 0.9, 0.1, glass), strip(2, 0.5, 0.85, 0.16, shaded(glass, 1.7))]
    shapes += [strip(0, 0, 0.3, 0.02, shaded(paint, 0.45)), strip(0, 0.36, 0.62, 0.66, (226, 220, 170))]
    if oncoming:
        shapes.append(strip(0, 0.66, 0.9, 0.4, dark))
    lamp, low, high = (
        (244, 240, 214) if oncoming else (196, 26, 22),
        corners[0][1] * 0.45 + corners[1][1] * 0.55,
        corners[1][1],
    )
    for end in (-0.8, 0.8):
        shapes.append((box(x + end * half - 0.15, low, x + end * half + 0.15, high, z - 0.01), lamp))
        shapes.append(
            (box(x + end * half - 0.07, low + 0.08, x + end * half + 0.06, high - 0.03, z - 0.01), shaded(lamp, 1.3))
        )
    return Thing(z, CAR, shapes)


def person_shapes(rng: Random, x: float, z: float, lift: float = 0.0) -> list[Shape]:
    """A person in mid-step, from shoes to hair; `lift` puts the hips onto a saddle."""
    size, stride, turn = rng.uniform(0.92, 1.06), rng.uniform(0.08, 0.34), rng.choice((-1, 1))
    coat = pick(
        rng, (160, 40, 40), (40, 60, 110), (60, 62, 66), (196, 176, 130), (70, 100, 70), (210, 205, 200), spread=16
    )
    trousers, skin = (
        pick(rng, (44, 50, 70), (60, 56, 54), (110, 100, 84)),
        pick(rng, (226, 178, 148), (150, 104, 78), (96, 66, 50)),
    )
    hip = 0.88 * size + lift
    shoulder, head = hip + 0.58 * size, hip + 0.76 * size
    shapes: list[Shape] = []
    for end in (-1, 1):
        foot, knee, leg = (
            x + end * stride,
            x + end * (0.06 + stride * 0.45),
            shaded(trousers, 1.0 if end == turn else 0.7),
        )
        shapes += [
            (limb(x + end * 0.08, hip, knee, hip * 0.55, 0.19, z), leg),
            (limb(knee, hip * 0.55, foot, 0.06 + lift, 0.14, z), leg),
        ]
        shapes.append((limb(foot - 0.05, 0.05 + lift, foot + 0.14 * turn, 0.04 + lift, 0.09, z), (30, 28, 28)))
    shapes.append(
        (limb(x - turn * 0.2, shoulder - 0.05, x - turn * (0.2 + stride / 2), hip, 0.12, z), shaded(coat, 0.65))
    )
    chest = [(0.17, hip - 0.12), (0.24, shoulder - 0.06), (0.12, shoulder + 0.03)]
    shapes.append(([(x + dx, y, z) for dx, y in chest] + [(x - dx, y, z) for dx, y in chest[::-1]], coat))
    shapes.append(([(x + turn * dx, y, z) for dx, y in chest] + [(x + turn * 0.04, hip - 0.12, z)], shaded(coat, 0.78)))
    shapes.append(
        (limb(x + turn * 0.21, shoulder - 0.06, x + turn * 0.3, (hip + shoulder) / 2, 0.12, z), shaded(coat, 0.9))
    )
    shapes.append((limb(x + turn * 0.3, (hip + shoulder) / 2, x + turn * 0.22, hip + 0.05, 0.1, z), skin))
    if rng.random() < 0.4:
        shapes.append(
            (box(x - 0.3, hip - 0.25, x - 0.08, hip + 0.15, z), pick(rng, (90, 60, 40), (60, 60, 64), (150, 50, 60)))
        )
    shapes.append((disc(x, head + 0.02, z, 0.12, 0.15), pick(rng, (40, 30, 24), (90, 64, 40), (160, 130, 80))))
    return [*shapes, (disc(x + turn * 0.03, head - 0.02, z, 0.095, 0.12), skin)]


def cyclist_thing(rng: Random, x: float, z: float) -> Thing:
    """A rider and the bicycle, seen from the side or (`slim`) from an end."""
    slim, frame = rng.choice((0.12, 1.0)), pick(rng, (180, 40, 40), (40, 90, 150), (220, 220, 220))
    shapes: list[Shape] = []
    for hub in (x - 0.52 * slim, x + 0.52 * slim):
        outer, inner = disc(hub, 0.34, z, 0.34 * slim, 0.34), disc(hub, 0.34, z, 0.27 * slim, 0.28)
        shapes.append(([*outer, outer[0], inner[0], *inner[::-1]], (26, 26, 28)))
    for x0, y0, x1, y1 in (
        (-0.52, 0.34, -0.18, 0.85),
        (-0.18, 0.85, 0.38, 0.8),
        (-0.05, 0.3, 0.38, 0.8),
        (0.52, 0.34, 0.36, 1.05),
    ):
        shapes.append((limb(x + x0 * slim, y0, x + x1 * slim, y1, 0.06, z), frame))
    shapes += person_shapes(rng, x - 0.1 * slim, z, lift=0.14)
    shapes.append((limb(x - 0.05 * slim, 1.4, x + 0.36 * slim, 1.08, 0.1, z), shaded(frame, 0.8)))
    return Thing(z, BICYCLIST, shapes)


def post_things(rng: Random, x: float, z: float) -> list[Thing]:
    """A lamp post, a traffic light or a road sign: the post is a pole, what it carries is a sign."""
    kind, grey = (
        rng.choice(("lamp", "lamp", "lights", "round", "triangle", "board")),
        pick(rng, (70, 76, 74), (120, 124, 126)),
    )
    top = rng.uniform(5.5, 8) if kind == "lamp" else rng.uniform(2.3, 2.9)
    post: list[Shape] = [
        (limb(x, 0, x, top, 0.12, z), grey),
        (limb(x + 0.03, 0, x + 0.03, top, 0.05, z), shaded(grey, 0.6)),
    ]
    if kind == "lamp":
        inward = -1 if x > 0 else 1
        post += [
            (limb(x, 0, x, 1.1, 0.22, z), shaded(grey, 0.85)),
            (limb(x, top, x + inward * 1.4, top + 0.3, 0.1, z), grey),
        ]
        post.append((limb(x + inward * 1.1, top + 0.22, x + inward * 1.9, top + 0.3, 0.18, z), (206, 206, 196)))
        return [Thing(z, POLE, post)]
    if kind == "lights":
        face: list[Shape] = [(box(x - 0.22, top - 0.1, x + 0.22, top + 1.0, z), (28, 30, 32))]
        lit = rng.randrange(3)
        for index, colour in enumerate(((40, 230, 120), (250, 180, 40), (240, 40, 30))):
            face.append((disc(x, top + 0.1 + 0.33 * index, z, 0.13, 0.13), shaded(colour, 1 if index == lit else 0.25)))
    elif kind == "board":
        ink, board = (236, 236, 232), pick(rng, (24, 74, 150), (30, 110, 70))
        face = [
            (box(x - 0.6, top - 0.45, x + 0.6, top + 0.35, z), ink),
            (box(x - 0.56, top - 0.41, x + 0.56, top + 0.31, z), board),
        ]
        face += [
            (box(x - 0.45, top + y, x + rng.uniform(0, 0.45), top + y + 0.12, z), ink) for y in (-0.3, -0.08, 0.12)
        ]
    else:
        corners, radius = (24, 0.38) if kind == "round" else (3, 0.5)
        face = [
            (disc(x, top, z, radius, radius, corners), (196, 28, 30)),
            (disc(x, top, z, radius * 0.7, radius * 0.7, corners), (238, 236, 228)),
        ]
        face += [(box(x + dx, top - 0.13, x + dx + 0.11, top + 0.13, z), (30, 30, 32)) for dx in (-0.14, 0.03)]
    return [Thing(z + 0.01, POLE, post), Thing(z, SIGN, face)]
