"""What is made of a class map beside the mask: each product as its definition says, on arrays alone."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw
from scipy import ndimage

from pipeline import mask_store, masks, storage
from pipeline.errors import PipelineError
from pipeline.mask_products import (
    ProductsConfig,
    only_classes,
    overlay_jpeg,
    overlay_url,
    polygons_json,
    prediction_schema,
    simplified,
    without_small_regions,
)
from pipeline.parquet_files import write_table
from rssnet.classes import Classes

CLASSES = Classes(("sky", "road", "car", "tree"), Classes.default(4).palette)
SMALL_MAPS = arrays.arrays(np.uint8, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.integers(0, 3))


def regions(class_map: np.ndarray) -> list[np.ndarray]:
    """The masks of all 4-connected regions, by scipy."""
    found = []
    for value in np.unique(class_map):
        labelled: Any = ndimage.label(class_map == value)  # the regions' numbers, and how many
        found += [labelled[0] == number for number in range(1, labelled[1] + 1)]
    return found


@pytest.mark.parametrize(("num_classes", "other"), [(4, 255), (255, 255), (256, 65535), (300, 65535)])
def test_pixels_of_other_classes_get_one_id_that_no_class_has(num_classes, other):
    ids = np.arange(num_classes).reshape(1, -1).astype(masks.dtype(num_classes))
    kept = only_classes(ids, [1, num_classes - 1], num_classes)
    expected = np.full(num_classes, other)
    expected[[1, num_classes - 1]] = 1, num_classes - 1
    np.testing.assert_array_equal(kept[0], expected)
    palette = Classes.default(num_classes).palette
    decoded = masks.decode({"mask": masks.encode_mask(kept, palette)})
    np.testing.assert_array_equal(decoded, kept)


def test_other_pixels_have_a_colour_of_their_own_in_the_picture():
    kept = only_classes(np.array([[0, 1, 2, 3]], np.uint8), [1, 2], 4)
    with Image.open(io.BytesIO(masks.encode_mask(kept, CLASSES.palette))) as picture:
        colours = np.asarray(picture.convert("RGB"))[0].tolist()
    assert colours == [list(colour) for colour in (masks.OTHER_COLOUR, *CLASSES.palette[1:3], masks.OTHER_COLOUR)]
    nothing = masks.encode_mask(np.full((2, 2), 255), CLASSES.palette)
    assert (masks.decode({"mask": nothing}) == 255).all()
    with pytest.raises(ValueError, match="ids from 0 to 4"):
        masks.encode_mask(np.array([[0, 4, 255]]), CLASSES.palette)


def test_a_class_that_is_not_known_is_named_with_those_that_are():
    with pytest.raises(PipelineError, match="no class 'bus', 'tram': give some of sky, road, car, tree"):
        ProductsConfig(classes=("car", "bus", "tram")).require(CLASSES.names)
    with pytest.raises(PipelineError, match="classes names no class: give some of sky"):
        ProductsConfig(classes=()).require(CLASSES.names)
    with pytest.raises(PipelineError, match="min_region is -1"):
        ProductsConfig(min_region=-1).require(CLASSES.names)
    with pytest.raises(PipelineError, match="top_k is 5: give 0 for none, and at most 4"):
        ProductsConfig(top_k=5).require(CLASSES.names)
    ProductsConfig(classes=("tree", "sky"), min_region=9, top_k=4).require(CLASSES.names)
    assert ProductsConfig(classes=("tree", "sky", "tree")).kept_ids(CLASSES.names) == [0, 3]


def test_a_small_region_gets_the_class_of_its_largest_neighbour():
    class_map = np.zeros((20, 20), np.uint8)
    class_map[:, 12:] = 1
    class_map[5:8, 10:13] = 2  # nine pixels between the two, of which 0 is the larger
    class_map[15, 15] = class_map[16, 16] = 3  # two pixels that meet at a corner only
    sieved = without_small_regions(class_map, 10)
    expected = np.zeros((20, 20), np.uint8)
    expected[:, 12:] = 1
    expected[5:8, 12] = 0
    np.testing.assert_array_equal(sieved, expected)
    kept = without_small_regions(class_map, 9)
    assert (kept == 2).sum() == 9
    assert not (kept == 3).any()
    np.testing.assert_array_equal(without_small_regions(class_map[:2, :2], 1000), class_map[:2, :2])


def test_pixels_that_meet_at_corners_only_are_no_region_together():
    diagonal = np.eye(12, dtype=np.uint8)
    assert not without_small_regions(diagonal, 5).any()


@settings(deadline=None)
@given(SMALL_MAPS, st.integers(2, 12))
def test_no_small_region_is_left_beside_a_large_one_and_none_appears(class_map, least):
    before = class_map.copy()
    sieved = without_small_regions(class_map, least)
    np.testing.assert_array_equal(class_map, before)
    assert sieved.dtype == np.uint8
    assert set(np.unique(sieved)) <= set(np.unique(class_map))
    large = [region for region in regions(class_map) if region.sum() >= least]
    for region in large:
        np.testing.assert_array_equal(sieved[region], class_map[region])
    if large:
        assert all(region.sum() >= least for region in regions(sieved))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_subset_is_taken_before_small_regions_go(dtype):
    class_map = np.zeros((10, 10), dtype)
    class_map[2:4, 2:4] = 1  # in the midst of what is left out
    class_map[6:9, 6:9] = 2
    class_map[7, 7] = 3  # left out too, and small
    products = ProductsConfig(classes=("road", "car"), min_region=5)
    found = simplified(class_map, products, CLASSES.names)
    expected = np.full((10, 10), 255)
    expected[6:9, 6:9] = 2
    np.testing.assert_array_equal(found, expected)
    assert simplified(class_map, ProductsConfig(), CLASSES.names) is class_map


def drawn(collection: dict, shape: tuple[int, int]) -> np.ndarray:
    """The polygons painted into an array again: a pixel belongs to the one around its center."""
    scale = 4  # corners of pixels on whole coordinates, centers between them
    painted = np.full(shape, 255, np.uint8)
    for feature in collection["features"]:
        picture = Image.new("L", (shape[1] * scale, shape[0] * scale), 0)
        outer, *holes = feature["geometry"]["coordinates"]
        for ring, value in ((outer, 1), *((hole, 0) for hole in holes)):
            ImageDraw.Draw(picture).polygon([(x * scale, y * scale) for x, y in ring], fill=value, outline=value)
        inside = np.asarray(picture)[scale // 2 :: scale, scale // 2 :: scale] == 1
        painted[inside] = feature["properties"]["class_id"]
    return painted


@settings(deadline=None, max_examples=50)
@given(SMALL_MAPS)
def test_polygons_cover_each_region_once_and_nothing_else(class_map):
    collection = json.loads(polygons_json(class_map, CLASSES.names))
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == len(regions(class_map))
    area = 0
    for feature in collection["features"]:
        assert feature["properties"]["class_name"] == CLASSES.names[feature["properties"]["class_id"]]
        areas = [abs(shoelace(ring)) for ring in feature["geometry"]["coordinates"]]
        assert all(ring[0] == ring[-1] for ring in feature["geometry"]["coordinates"])
        assert areas[0] == max(areas)  # the outer ring comes first
        area += areas[0] - sum(areas[1:])
    assert area == class_map.size


def shoelace(ring: list[list[int]]) -> float:
    points = np.array(ring, float)
    x, y = points[:-1].T
    return 0.5 * float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())


def test_polygons_are_outlines_along_the_edges_of_pixels_with_holes():
    class_map = np.full((6, 8), 255, np.uint8)
    class_map[1:5, 2:7] = 1
    class_map[2:4, 3:5] = 255
    (feature,) = json.loads(polygons_json(class_map, CLASSES.names))["features"]
    outer, hole = ({tuple(point) for point in ring} for ring in feature["geometry"]["coordinates"])
    assert feature["properties"] == {"class_id": 1, "class_name": "road"}
    assert outer == {(2, 1), (7, 1), (7, 5), (2, 5)}
    assert hole == {(3, 2), (5, 2), (5, 4), (3, 4)}
    np.testing.assert_array_equal(drawn({"features": [feature]}, class_map.shape), class_map)


def test_an_overlay_tints_only_what_has_a_class():
    image = np.full((32, 64, 3), 100, np.uint8)
    class_map = np.full((32, 64), 255, np.uint8)
    class_map[:, 32:] = 2  # from here JPEG has other blocks
    tinted = np.rint((100 + np.array(CLASSES.palette[2])) / 2)
    pixels = masks.overlay(image, class_map, CLASSES.palette).astype(int)
    assert (pixels[:, :32] == 100).all()
    assert np.abs(pixels[:, 32:] - tinted).max() <= 1
    with Image.open(io.BytesIO(overlay_jpeg(image, class_map, CLASSES.palette))) as picture:
        assert picture.format == "JPEG"
        shown = np.asarray(picture).astype(int)
    assert np.abs(shown - pixels).mean() < 4


def test_an_overlay_of_many_rows_is_that_of_each(monkeypatch):
    generator = np.random.default_rng(0)
    image, class_map = generator.integers(0, 256, (23, 7, 3), np.uint8), generator.integers(0, 4, (23, 7))
    whole = masks.overlay(image, class_map, CLASSES.palette, 0.3)
    monkeypatch.setattr(masks, "_PIXELS_AT_ONCE", 15)
    np.testing.assert_array_equal(masks.overlay(image, class_map, CLASSES.palette, 0.3), whole)


def test_a_side_that_no_jpeg_can_have_is_reduced():
    image = np.zeros((2, 70_000, 3), np.uint8)
    with Image.open(io.BytesIO(overlay_jpeg(image, np.zeros((2, 70_000), np.uint8), CLASSES.palette))) as picture:
        assert picture.width == 65_500


ODD = [
    "a b.jpg",
    "a+b.jpg",
    "a_b.jpg",
    "x/a.jpg",
    "y/a.jpg",
    "a.png",
    "a",
    "ä.jpg",
    "日本.jpg",
    "%20.jpg",
    "#?.jpg",
    ".jpg",
]


def test_overlays_of_two_images_never_share_a_name():
    urls = [overlay_url("s3://overlays/here/", f"s3://photos/{name}") for name in (*ODD, "n" * 300 + ".jpg")]
    assert len(set(urls)) == len(urls)
    for url in urls:
        name = url.removeprefix("s3://overlays/here/")
        assert name.isascii()
        assert name.endswith(".jpg")
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert len(name) < 130
    assert overlay_url("out", "s3://photos/front 7.jpg").startswith("out/front_7-")


def test_rows_have_the_columns_that_are_asked_for_and_no_others():
    assert prediction_schema(ProductsConfig(classes=("car",), min_region=3)) == masks.PREDICTION_SCHEMA
    extra = prediction_schema(ProductsConfig(polygons=True, top_k=2)).names[len(masks.PREDICTION_SCHEMA) :]
    assert extra == ["polygons", "top_classes", "top_probabilities"]
    every = ProductsConfig(polygons=True, confidence_map=True, top_k=1, overlays="here")
    assert prediction_schema(every) == masks.ALL_COLUMNS


def test_files_with_and_without_products_are_read_together(tmp_path):
    empty = {"version": "1", "model_id": "m", "status": masks.OK}
    for name, products in (("a.jpg", ProductsConfig()), ("b.jpg", ProductsConfig(polygons=True))):
        schema = prediction_schema(products)
        row = {**dict.fromkeys(schema.names), **empty, "image_uri": name}
        row |= {"polygons": "{}"} if products.polygons else {}
        table = pa.Table.from_pylist([row], schema=schema)
        write_table(storage.join(str(tmp_path), mask_store.FOLDER, f"{name}.parquet"), table)
    rows = {row["image_uri"]: row for row in masks.read_masks(str(tmp_path)).to_pylist()}
    assert rows["a.jpg"]["polygons"] is None
    assert rows["b.jpg"]["polygons"] == "{}"
    assert rows["b.jpg"]["top_classes"] is None
    with pytest.raises(ValueError, match=r"a.jpg has no confidence map: segment with products.confidence_map"):
        masks.decode_confidence(rows["a.jpg"])
    with pytest.raises(ValueError, match=r"b.jpg has no most probable classes: segment with products.top_k"):
        masks.decode_top(rows["b.jpg"])


def test_products_do_not_load_torch_or_ray():
    code = "import sys, pipeline.mask_products; raise SystemExit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
