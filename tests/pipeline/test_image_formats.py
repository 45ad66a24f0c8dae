"""Photographs as cameras, phones and scanners store them, each in a file that is written here."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, features

from pipeline import images
from pipeline.images import BadImage, decode_photograph
from tests.pipeline.image_files import encoded
from tests.pipeline.test_images import CORNERS, ORIENTATION, UPRIGHT

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
needs_heif = pytest.mark.skipif("HEIF" not in images.FORMATS, reason="pillow-heif is not installed")
MODERN = [
    pytest.param("AVIF", marks=needs_avif),
    pytest.param("HEIF", marks=needs_heif),
    "WEBP",
    "TIFF",
]


def error(pixels: np.ndarray, expected: np.ndarray) -> float:
    assert pixels.shape == expected.shape
    assert pixels.dtype == np.uint8
    return float(np.abs(pixels.astype(int) - expected).mean())


def written(image: Image.Image, kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    if kind == "HEIF":  # turns pixels by a property of the format, which its writer makes of what the image carries
        image.info["exif"] = exif.tobytes()
        return encoded(image, kind)
    return encoded(image, kind, exif=exif)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", MODERN)
def test_every_format_is_turned_as_its_orientation_says(kind: str, orientation: int) -> None:
    pixels = decode_photograph(written(Image.fromarray(CORNERS), kind, orientation))
    assert error(pixels, UPRIGHT[orientation](CORNERS)) < 10  # turned wrongly it is 85


@needs_heif
def test_heic_is_a_photograph_and_damage_to_it_is_told() -> None:
    data = encoded(Image.fromarray(CORNERS), "HEIF", quality=95)
    assert error(decode_photograph(data), CORNERS) < 5
    with pytest.raises(BadImage) as bad:
        decode_photograph(data[: len(data) // 2])
    assert bad.value.reason in ("damaged", "not_an_image")


@needs_heif
def test_without_its_plug_in_heic_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(CORNERS), "HEIF")
    monkeypatch.setattr(images, "FORMATS", tuple(name for name in images.FORMATS if name != "HEIF"))
    with pytest.raises(BadImage, match="where pillow-heif is installed, the extra heif") as bad:
        decode_photograph(data)
    assert bad.value.reason == "no_decoder"


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG", pytest.param("AVIF", marks=needs_avif)])
def test_of_several_pictures_it_is_the_first(kind: str) -> None:
    pages = [Image.new("RGB", (64, 48), colour) for colour in ("red", "lime", "blue")]
    data = encoded(pages[0], kind, save_all=True, append_images=pages[1:])
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert error(decode_photograph(data), np.full((48, 64, 3), (255, 0, 0))) < 3


def test_a_transparent_gif_lies_over_white() -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    pixels = decode_photograph(encoded(image, "GIF", transparency=1))
    assert pixels.tolist() == [[[10, 20, 30], [255] * 3], [[255] * 3, [10, 20, 30]]]


def test_a_palette_whose_colours_are_half_transparent_lies_over_white() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([0, 0, 0, 200, 0, 0, 9, 9, 9])
    pixels = decode_photograph(encoded(image, "PNG", transparency=bytes([255, 128, 0])))
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert np.abs(pixels[0, 1].astype(int) - [227, 127, 127]).max() <= 1
    assert pixels[0, 2].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_the_colour_that_it_prints(kind: str) -> None:
    inks = {"red": (0, 255, 255, 0), "blue": (255, 255, 0, 0), "black": (0, 0, 0, 255), "white": (0, 0, 0, 0)}
    light = {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "white": (255, 255, 255)}
    for name, ink in inks.items():
        pixels = decode_photograph(encoded(Image.new("CMYK", (16, 16), ink), kind))
        assert error(pixels, np.full((16, 16, 3), light[name])) < 3, name


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_sixteen_bits_is_scaled(kind: str) -> None:
    deep = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    expected = (deep / 257.0)[..., None].repeat(3, 2)
    assert np.abs(decode_photograph(encoded(Image.fromarray(deep), kind)) - expected).max() <= 1


def test_how_deep_an_image_is_shows_in_all_of_it_and_not_in_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bright pixel below, in a part that is converted after the others."""
    monkeypatch.setattr(images, "_PIXELS_AT_ONCE", 30)
    deep = np.full((20, 30), 200, np.uint16)
    deep[19, 29] = 65535
    pixels = decode_photograph(encoded(Image.fromarray(deep)))
    assert pixels.max(initial=0, where=np.arange(20)[:, None, None] < 19) <= 1
    assert pixels[19, 29].tolist() == [255] * 3


COLOURS = (np.arange(7 * 5 * 3).reshape(7, 5, 3) * 600).astype(np.uint16)


def png_of_sixteen_bits(values: np.ndarray) -> bytes:
    """A PNG with (H, W, 3 or 4) channels of 16 bits, which Pillow reads but doesn't write."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 6, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )


def tiff_of_sixteen_bits(values: np.ndarray) -> bytes:
    """The same as an uncompressed TIFF of one strip (TIFF 6.0, sections 2 and 6), without alpha."""
    height, width, channels = values.shape
    data = values.astype("<u2").tobytes()
    depth = struct.pack(f"<{channels}H", *[16] * channels)
    short, long = 3, 4
    depth_at = 8 + 2 + 12 * 9 + 4
    entries = [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, channels, depth_at),
        (259, short, 1, 1),  # not compressed
        (262, short, 1, 2),  # RGB
        (273, long, 1, depth_at + len(depth)),
        (277, short, 1, channels),
        (278, long, 1, height),
        (279, long, 1, len(data)),
    ]
    directory = b"".join(
        struct.pack("<HHII", *entry) for entry in entries
    )  # little-endian: a short fills the first half
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + struct.pack("<I", 0) + depth + data


@pytest.mark.parametrize("file", [png_of_sixteen_bits, tiff_of_sixteen_bits])
def test_colours_of_sixteen_bits_keep_the_upper_eight(file) -> None:
    np.testing.assert_array_equal(decode_photograph(file(COLOURS)), COLOURS >> 8)


def test_sixteen_bits_with_alpha_lie_over_white() -> None:
    alpha = np.zeros((7, 5, 1), np.uint16)
    alpha[:, :2] = 65535
    pixels = decode_photograph(png_of_sixteen_bits(np.concatenate([COLOURS, alpha], 2)))
    np.testing.assert_array_equal(pixels[:, :2], COLOURS[:, :2] >> 8)
    assert (pixels[:, 2:] == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK", "1", "F"])
def test_an_image_converted_in_parts_is_that_converted_at_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 23, 4), np.uint8))
    data = encoded(noise.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else noise.convert(mode), "TIFF")
    whole = decode_photograph(data)
    monkeypatch.setattr(images, "_PIXELS_AT_ONCE", 60)
    np.testing.assert_array_equal(decode_photograph(data), whole)


MEASURE_MEMORY = """
import io, sys
from PIL import Image
from pipeline.images import decode_photograph
from pipeline.process_memory import peak_memory

data = sys.stdin.buffer.read()
small = io.BytesIO()
Image.new("RGB", (64, 64)).save(small, sys.argv[1])
decode_photograph(small.getvalue())
before = peak_memory()
pixels = decode_photograph(data)
print((peak_memory() - before) / (pixels.shape[0] * pixels.shape[1]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("kind", "orientation", "most"), [("JPEG", 1, 8), ("JPEG", 6, 9), ("PNG", 1, 8)])
def test_a_large_image_takes_what_it_says_in_memory(kind: str, orientation: int, most: float) -> None:
    """7 bytes per pixel, 8 while it is turned, and what the parts of it take, here a part in thirty of it."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(Image.new("RGB", (6000, 5000), "teal"), kind, exif=exif)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE_MEMORY, kind]
    run = subprocess.run(command, input=data, capture_output=True, env=environment, check=True)
    assert 5 < float(run.stdout) < most
