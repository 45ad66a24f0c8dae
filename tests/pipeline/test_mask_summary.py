"""Shares of classes by prefix and day, as a table and a plot."""

import datetime
import io

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import mask_store, storage
from pipeline.mask_summary import PLOT_FILE, TABLE_FILE, day_of, keep_classes, prefix_of, summarize
from pipeline.parquet_files import write_table
from rssnet.classes import Classes
from tests.pipeline.prediction_table import PALETTE, prediction_row, prediction_table

CLASSES = Classes(("road", "house", "tree"), PALETTE)


@pytest.mark.parametrize(
    ("uri", "day"),
    [
        ("s3://bucket/2026-11-25/a.jpg", (2026, 11, 25)),
        ("s3://bucket/2026/11/25/a.jpg", (2026, 11, 25)),
        ("s3://bucket/dt=20261125/a.jpg", (2026, 11, 25)),
        ("s3://bucket/IMG_20261125_101500.jpg", (2026, 11, 25)),
        ("s3://bucket/2026_02_30/2026-03-01.jpg", (2026, 3, 1)),
        ("s3://bucket/120261125.jpg", None),
        ("s3://bucket/2026-11/25.jpg", None),
        ("s3://bucket/a.jpg", None),
    ],
)
def test_the_day_is_the_first_date_of_the_name(uri, day):
    assert day_of(uri) == (None if day is None else datetime.date(*day))


def test_the_prefix_is_the_first_folders_below_what_all_have_in_common():
    uri = "s3://bucket/photos/north/2026/a.jpg"
    common = len("s3://bucket/photos/")
    assert [prefix_of(uri, common, depth) for depth in (0, 1, 2, 9)] == ["", "north", "north/2026", "north/2026"]


@pytest.mark.usefixtures("ray_cluster")
def test_shares_add_up_by_model_prefix_and_day(bucket):
    rows = [
        prediction_row("s3://b/in/north/2026-11-24/1.jpg"),
        # Half of it is of none of the classes that were kept.
        prediction_row("s3://b/in/north/2026-11-24/2.jpg", class_ids=[0], class_pixels=[4]),
        prediction_row("s3://b/in/north/2026-11-25/1.jpg"),
        prediction_row("s3://b/in/south/1.jpg"),
        prediction_row("s3://b/in/south/2.jpg", status="damaged"),
        prediction_row("s3://b/in/south/1.jpg", model_id="older"),
    ]
    for number, row in enumerate(rows):
        write_table(storage.join(bucket, mask_store.FOLDER, f"part-{number}.parquet"), prediction_table(row))
    keep_classes(bucket, "model", CLASSES)
    assert summarize(bucket) == summarize(bucket, "model")
    filesystem, path = storage.arrow_filesystem(storage.join(bucket, TABLE_FILE))
    found = pq.read_table(path, filesystem=filesystem).to_pylist()
    columns = ("model_id", "prefix", "day", "class_name", "images", "images_with_class", "pixels", "share")
    first, second = datetime.date(2026, 11, 24), datetime.date(2026, 11, 25)
    assert [tuple(row[name] for name in columns) for row in found] == [
        ("model", "north", first, "road", 2, 2, 8, 0.5),
        ("model", "north", first, "tree", 2, 1, 4, 0.25),
        ("model", "north", second, "road", 1, 1, 4, 0.5),
        ("model", "north", second, "tree", 1, 1, 4, 0.5),
        ("model", "south", None, "road", 1, 1, 4, 0.5),
        ("model", "south", None, "tree", 1, 1, 4, 0.5),
        ("older", "south", None, None, 1, 1, 4, 0.5),
        ("older", "south", None, None, 1, 1, 4, 0.5),
    ]
    with Image.open(io.BytesIO(storage.read_bytes(storage.join(bucket, PLOT_FILE)))) as plot:
        colours = {colour for _, colour in plot.convert("RGB").getcolors(2**24) or []}
    assert {PALETTE[0], PALETTE[2]} <= colours


@pytest.mark.usefixtures("ray_cluster")
def test_a_place_without_masks_has_an_empty_summary(tmp_path):
    assert summarize(str(tmp_path)).num_rows == 0
    assert (tmp_path / PLOT_FILE).is_file()
