"""What a prediction row holds, and what readers get from it."""

import io

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pipeline import mask_store, masks, storage
from pipeline.parquet_files import write_table
from rssnet.classes import Classes

PALETTE = Classes.default(7).palette
MANY = Classes.default(300).palette


def _row(uri: str, mask: bytes | None = None, **values: object) -> dict[str, object]:
    empty = dict.fromkeys(masks.PREDICTION_SCHEMA.names)
    return {**empty, "image_uri": uri, "version": "1", "model_id": "m", "mask": mask, "status": masks.OK, **values}


def _write(url: str, *rows: dict[str, object]) -> None:
    table = pa.Table.from_pylist(list(rows), schema=masks.PREDICTION_SCHEMA)
    write_table(storage.join(url, mask_store.FOLDER, f"part-{table.num_rows}.parquet"), table)


@pytest.mark.parametrize(("palette", "dtype"), [(PALETTE, np.uint8), (MANY, np.uint16)])
@given(data=st.data())
def test_a_mask_comes_back_as_it_was(palette, dtype, data):
    shape = data.draw(arrays.array_shapes(min_dims=2, max_dims=2, max_side=40))
    class_map = data.draw(arrays.arrays(np.int64, shape, elements=st.integers(0, len(palette) - 1)))
    decoded = masks.decode(_row("a.jpg", masks.encode_mask(class_map, palette)))
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, class_map)


def test_a_mask_opens_as_a_picture_in_the_classes_colours():
    class_map = np.arange(7).reshape(1, 7)
    with Image.open(io.BytesIO(masks.encode_mask(class_map, PALETTE))) as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB"))[0], PALETTE)


@pytest.mark.parametrize(
    ("class_map", "said"),
    [
        (np.full((2, 2), 7), "ids from 7 to 7.*0 to 6"),
        (np.full((2, 2), -1), "ids from -1"),
        (np.zeros((2, 2)), "float64"),
        (np.zeros((2, 2, 1), int), r"\(2, 2, 1\)"),
    ],
)
def test_what_is_no_class_map_is_refused(class_map, said):
    with pytest.raises(ValueError, match=said):
        masks.encode_mask(class_map, PALETTE)


def test_a_row_without_a_mask_says_why():
    with pytest.raises(ValueError, match=r"b.jpg has no mask: damaged, truncated after 3 bytes"):
        masks.decode(_row("b.jpg", status="damaged", error="truncated after 3 bytes"))


def test_rows_are_read_by_filter_and_column(tmp_path):
    url = str(tmp_path)
    _write(url, _row("a.jpg"), _row("b.jpg", status="damaged"))
    _write(url, _row("c.jpg"))
    assert masks.read_masks(url).schema == masks.ALL_COLUMNS
    good = masks.read_masks(url, filter=pc.field("status") == "ok", columns=["image_uri"])
    assert sorted(good["image_uri"].to_pylist()) == ["a.jpg", "c.jpg"]
    assert good.column_names == ["image_uri"]


def test_a_place_without_masks_has_no_rows(tmp_path):
    table = masks.read_masks(str(tmp_path / "nothing"))
    assert (table.num_rows, table.schema) == (0, masks.ALL_COLUMNS)


def test_a_file_that_is_still_being_written_is_not_read(tmp_path):
    _write(str(tmp_path), _row("a.jpg"))
    (tmp_path / mask_store.FOLDER / ".half.parquet").write_bytes(b"PAR1")
    assert masks.read_masks(str(tmp_path)).num_rows == 1


def test_duckdb_reads_the_rows(tmp_path):
    _write(str(tmp_path), _row("a.jpg", class_ids=[0, 3], class_pixels=[10, 30]), _row("b.jpg", status="damaged"))
    query = f"SELECT image_uri, list_sum(class_pixels) FROM '{tmp_path}/masks/*.parquet' WHERE status = 'ok'"
    assert duckdb.execute(query).fetchall() == [("a.jpg", 40)]


def test_an_overlay_is_the_photograph_tinted():
    image = np.full((2, 7, 3), 100, np.uint8)
    class_map = np.tile(np.arange(7), (2, 1))
    colours = np.asarray(PALETTE)[class_map]
    np.testing.assert_array_equal(masks.overlay(image, class_map, PALETTE, alpha=0), image)
    np.testing.assert_array_equal(masks.overlay(image, class_map, PALETTE, alpha=1), colours)
    half = masks.overlay(image, class_map, PALETTE)
    assert half.dtype == np.uint8
    assert np.abs(half - (image / 2 + colours / 2)).max() <= 0.5


@pytest.mark.parametrize(
    ("shape", "alpha", "said"), [((2, 3), 0.5, r"\(2, 3\).*same size"), ((2, 2), 1.5, "alpha is 1.5")]
)
def test_an_overlay_of_another_size_or_weight_is_refused(shape, alpha, said):
    with pytest.raises(ValueError, match=said):
        masks.overlay(np.zeros((2, 2, 3), np.uint8), np.zeros(shape, int), PALETTE, alpha)
