"""Photographs, configurations and rows of the tests of batch segmentation."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import mask_store, masks, storage
from pipeline.image_sources import LISTED
from pipeline.parquet_files import write_table
from pipeline.prediction_rows import SLICES, ImageReader
from pipeline.segment_config import SegmentConfig
from tests.pipeline.image_files import encoded


def png(seed: int, height: int = 40, width: int = 70) -> bytes:
    """A photograph's worth of blocks of colour, another one for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    pixels = blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return encoded(Image.fromarray(pixels))


def config_of(model: str, images: str, out: str, **settings: object) -> SegmentConfig:
    return dataclasses.replace(SegmentConfig(model, images, out, cpus_per_worker=0.5, batch_size=2), **settings)


def read_listed(folder: Path, listed: list[dict[str, str]]) -> pa.Table:
    """What reading gives of some listed images, the list of which is kept in a folder."""
    place = str(folder / ".listed.parquet")
    write_table(place, pa.Table.from_pylist([{**dict.fromkeys(LISTED.names), **row} for row in listed], LISTED))
    slices = [{"file": place, "start": start, "stop": start + 1, "number": start} for start in range(len(listed))]
    return pa.concat_tables(ImageReader()(pa.Table.from_pylist(slices, SLICES)))


def rows_of(url: str) -> dict[str, dict]:
    """The rows at `url` by the last part of the image's URI; every key is there once."""
    rows = masks.read_masks(url).to_pylist()
    assert max(Counter(tuple(row[name] for name in masks.KEY) for row in rows).values(), default=1) == 1
    return {row["image_uri"].rpartition("/")[2]: row for row in rows}


def files_of(url: str) -> set[tuple[str, str]]:
    return {(item.url, item.version) for item in storage.list_objects(storage.join(url, mask_store.FOLDER))}
