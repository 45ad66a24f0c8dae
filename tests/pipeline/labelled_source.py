"""Small labelled sources in the layout `folders`, good and bad, and ways to look at what an ingest made of them."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from pipeline import dataset, storage
from pipeline.dataset import REJECT_SCHEMA
from pipeline.errors import PipelineError
from pipeline.images import encode_png
from pipeline.ingest import IngestConfig, ingest
from pipeline.run_record import read_record
from tests.pipeline.image_files import encoded

REPOSITORY = Path(__file__).parents[2]
CLASSES = {"names": ["road", "car", "sky"], "palette": [[128, 64, 128], [64, 0, 128], [0, 0, 255]]}
HEIGHT, WIDTH = 12, 16


def photograph(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def label_values(seed: int) -> np.ndarray:
    """Values 0 to 2, and a corner that is ignored."""
    values = np.random.default_rng(seed).integers(0, 3, (HEIGHT, WIDTH), dtype=np.uint8)
    values[:3, :5] = 255
    return values


def portrait() -> bytes:
    """Stored 16 wide and 12 high, to be shown turned: 12 wide and 16 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(photograph(90))) as image:
        return encoded(image, "JPEG", exif=exif)


def write_source(url: str, pairs: int = 4, splits: tuple[str, ...] = ("train", "val")) -> None:
    """A tree of the layout `folders` with so many good pairs in each split."""
    storage.write_json(storage.join(url, "classes.json"), CLASSES)
    for split_number, split in enumerate(splits):
        for number in range(pairs):
            seed = 10 * split_number + number
            storage.write_bytes(storage.join(url, f"images/{split}/{number:02}.png"), photograph(seed))
            storage.write_bytes(storage.join(url, f"labels/{split}/{number:02}.png"), encode_png(label_values(seed)))


def write_pair(url: str, name: str, image: bytes | None, label: bytes | None) -> None:
    if image is not None:
        storage.write_bytes(storage.join(url, f"images/train/{name}"), image)
    if label is not None:
        storage.write_bytes(storage.join(url, f"labels/train/{Path(name).stem}.png"), label)


def write_bad_inputs(url: str) -> dict[str, str]:
    """One input of each kind that cannot become a row: name of the rejected file -> reason."""
    good, values = photograph(50), label_values(50)
    label = encode_png(values)
    above = values.copy()
    above[5, 5] = 3
    write_pair(url, "truncated.png", good[:-40], label)
    write_pair(url, "page.jpg", b"<html>404</html>", label)
    write_pair(url, "empty.png", b"", label)
    write_pair(url, "label_truncated.png", good, label[:-30])
    write_pair(url, "label_page.png", good, b"<html>404</html>")
    write_pair(url, "label_colours.png", good, photograph(51))
    write_pair(url, "label_above.png", good, encode_png(above))
    write_pair(url, "label_smaller.png", good, encode_png(values[:-1]))
    write_pair(url, "alone.png", good, None)
    write_pair(url, "orphan.png", None, label)
    return {
        "truncated.png": "damaged",
        "page.jpg": "not_an_image",
        "empty.png": "empty",
        "label_truncated.png": "label_damaged",
        "label_page.png": "label_not_an_image",
        "label_colours.png": "unknown_label_value",
        "label_above.png": "unknown_label_value",
        "label_smaller.png": "size_mismatch",
        "alone.png": "no_label",
        "orphan.png": "no_image",
    }


def reject_rows(url: str) -> list[dict[str, str]]:
    places = [item.url for item in storage.list_objects(storage.join(url, "_rejects"))]
    tables = [pq.read_table(pa.BufferReader(storage.read_bytes(place))) for place in places]
    assert all(table.schema.equals(REJECT_SCHEMA) for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def refused(config: IngestConfig) -> str:
    """The one sentence that an ingest is refused with, which must leave nothing that looks finished."""
    with pytest.raises(PipelineError) as refusal:
        ingest(config)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def assert_unfinished(url: str) -> None:
    assert not storage.exists(storage.join(url, "dataset.json"))
    record = read_record(url)
    assert record is None or record.outcome == "failed"
    with pytest.raises(PipelineError, match="no finished dataset"):
        dataset.open(url)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`workflows/ingest.py` as a process of its own that joins the tests' Ray."""
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.run(
        [sys.executable, "workflows/ingest.py", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
