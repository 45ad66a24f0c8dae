"""What a mask costs as bytes: its size and the time to encode and decode it, in several codecs.

    python -m tests.benchmarks.masks --data /path/to/camvid

The masks are CamVid's label images, drawn by hand; and the same with pixels swapped near the borders of regions, which
is harder to compress than any model's mask. Pillow packs up to 16 classes into 4 bits per pixel; 8 bits are what masks
of more classes have. Times are the processor's, one thread, each the median of several rounds over all masks.
"""

import argparse
import io
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from scipy import ndimage

from pipeline.images import decode_label
from rssnet.classes import Classes
from tests.benchmarks.machine import describe, results_file
from tests.pipeline.image_files import encoded

ROUNDS = 3
CLASSES = 12
BORDER = 3  # pixels to either side of the border of regions in which pixels are swapped


@dataclass(frozen=True)
class Codec:
    """A way to keep an (H, W) uint8 array, and to get it back."""

    name: str
    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, tuple[int, ...]], np.ndarray]


def png(name: str, colours: int = CLASSES, **options: Any) -> Codec:
    """Pillow's PNG with the palette of the classes inside, as the rows have it."""
    palette = [channel for colour in Classes.default(colours).palette for channel in colour]

    def encode(mask: np.ndarray) -> bytes:
        image = Image.fromarray(mask)
        image.putpalette(palette)
        return encoded(image, **options)

    return Codec(f"PNG, {name}", encode, lambda data, _: np.array(Image.open(io.BytesIO(data))))


def zstd(level: int) -> Codec:
    """The array's bytes, compressed as they are."""
    codec = pa.Codec("zstd", compression_level=level)

    def decode(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(codec.decompress(data, int(np.prod(shape)), asbytes=True), np.uint8).reshape(shape)

    return Codec(f"raw, zstd level {level}", lambda mask: codec.compress(mask.tobytes(), asbytes=True), decode)


def encode_rle(mask: np.ndarray) -> bytes:
    """Every class as COCO keeps it: its pixels down the columns as runs, off and on by turns, of 4 bytes each."""
    columns = mask.T.ravel()
    parts = []
    for value in np.unique(columns):
        changes = np.flatnonzero(np.diff(columns == value, prepend=False))  # at 0 where the first pixel is of the class
        runs = np.diff(changes, prepend=0, append=len(columns)).astype("<u4")
        parts.append(np.array([value, len(runs)], "<u4").tobytes() + runs.tobytes())
    return b"".join(parts)


def decode_rle(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """What `encode_rle` made, as the array again."""
    columns, at = np.zeros(int(np.prod(shape)), np.uint8), 0
    while at < len(data):
        value, count = np.frombuffer(data, "<u4", 2, at)
        runs = np.frombuffer(data, "<u4", count, at + 8)
        columns[np.repeat(np.arange(count) % 2 == 1, runs)] = value
        at += 8 + 4 * int(count)
    return columns.reshape(shape[::-1]).T


CODECS = [
    Codec("raw", lambda mask: mask.tobytes(), lambda data, shape: np.frombuffer(data, np.uint8).reshape(shape)),
    zstd(1),
    zstd(3),
    zstd(9),
    Codec("RLE of each class (COCO), 4-byte runs", encode_rle, decode_rle),
    Codec(
        "RLE of each class (COCO), zlib level 6",
        lambda mask: zlib.compress(encode_rle(mask), 6),
        lambda data, shape: decode_rle(zlib.decompress(data), shape),
    ),
    png("level 1", compress_level=1),
    png("level 3", compress_level=3),
    png("level 6", compress_level=6),
    png("level 9", compress_level=9),
    png("level 1, run lengths only", compress_level=1, compress_type=zlib.Z_RLE),
    png("level 6, run lengths only", compress_level=6, compress_type=zlib.Z_RLE),
    png("level 6, Huffman codes only", compress_level=6, compress_type=zlib.Z_HUFFMAN_ONLY),
    png("level 6, zlib's filtered", compress_level=6, compress_type=zlib.Z_FILTERED),
    png("optimized", optimize=True),
    png("level 6, 8 bits per pixel", compress_level=6, colours=17),
    png("level 1, run lengths only, 8 bits per pixel", compress_level=1, compress_type=zlib.Z_RLE, colours=17),
]


def ragged(mask: np.ndarray, seed: int) -> np.ndarray:
    """The mask with every fourth pixel near a border taken from a place up to `BORDER` pixels away."""
    generator = np.random.default_rng(seed)
    lowest, highest = ndimage.minimum_filter(mask, 2 * BORDER + 1), ndimage.maximum_filter(mask, 2 * BORDER + 1)
    moved = (lowest != highest) & (generator.random(mask.shape) < 0.25)
    offsets = generator.integers(-BORDER, BORDER + 1, (2, *mask.shape))
    rows, columns = (
        np.clip(grid + offset, 0, size - 1)
        for grid, offset, size in zip(np.indices(mask.shape), offsets, mask.shape, strict=True)
    )
    return np.where(moved, mask[rows, columns], mask)


def measured(codec: Codec, masks: list[np.ndarray]) -> str:
    """A row of the table; AssertionError if a mask doesn't come back as it was."""
    megapixels = sum(mask.size for mask in masks) / 1e6
    encoding, decoding, encoded = [], [], []
    for _ in range(ROUNDS):
        started = time.process_time()
        encoded = [codec.encode(mask) for mask in masks]
        encoding.append(time.process_time() - started)
        started = time.process_time()
        decoded = [codec.decode(data, mask.shape) for data, mask in zip(encoded, masks, strict=True)]
        decoding.append(time.process_time() - started)
        for mask, found in zip(masks, decoded, strict=True):
            assert np.array_equal(mask, found), codec.name
    size = sum(map(len, encoded)) / megapixels
    times = [1000 * statistics.median(seconds) / megapixels for seconds in (encoding, decoding)]
    line = f"| {codec.name} | {size:,.0f} | {times[0]:.1f} | {times[1]:.1f} |"
    print(line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the CamVid folder")
    parser.add_argument("--images", type=int, default=100, help="of the validation split")
    arguments = parser.parse_args()
    files = sorted((arguments.data / "valannot").glob("*.png"))[: arguments.images]
    drawn = [decode_label(file.read_bytes()) for file in files]
    sets = {
        "Drawn by hand": drawn,
        "With ragged borders": [ragged(mask, number) for number, mask in enumerate(drawn)],
    }
    columns = (
        "| codec | bytes per megapixel | encode, CPU ms/megapixel | decode, CPU ms/megapixel |\n|---|---|---|---|\n"
    )
    tables = [
        f"## {name}\n\n{columns}" + "\n".join(measured(codec, masks) for codec in CODECS)
        for name, masks in sets.items()
    ]
    device = torch.device("cpu")
    header = "\n".join(f"- {name}: {value}" for name, value in describe(device).items())
    height, width = drawn[0].shape
    text = "\n\n".join(
        [
            "# Mask codecs",
            header,
            f"{len(drawn)} masks of {height} x {width} pixels and {CLASSES} ids, one thread. A PNG holds the palette, "
            "so that it opens as a picture.",
            *tables,
        ]
    )
    results_file("masks", device, ".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
