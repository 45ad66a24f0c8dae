"""Rows are taken away and files merged, each time at one moment, and nothing else changes."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipeline import mask_changes, mask_store, masks, storage
from pipeline.census import ROW_KEYS, Rows
from pipeline.errors import PipelineError, mendable_cause
from pipeline.mask_changes import PRUNED_FOLDER, compact, remove_rows
from pipeline.mask_store import MaskStore
from pipeline.parquet_files import write_table
from tests.pipeline.prediction_table import prediction_row, prediction_table

pytestmark = pytest.mark.usefixtures("ray_cluster")


def _put(url: str, file: str, *rows: dict[str, Any]) -> None:
    write_table(storage.join(url, mask_store.FOLDER, f"{file}.parquet"), prediction_table(*rows))


def _rows(url: str) -> list[dict[str, Any]]:
    return sorted(masks.read_masks(url).to_pylist(), key=lambda row: (row["image_uri"], row["model_id"]))


def _names(url: str) -> list[str]:
    return [item.url.rpartition("/")[2] for item in storage.list_objects(storage.join(url, mask_store.FOLDER))]


def _taken(*keys: tuple[str, str], version: str = "1", model: str = "model") -> Rows:
    """Rows of (URI, file)."""
    rows = [
        {"image_uri": uri, "version": version, "model_id": model, "status": "ok", "file": f"masks/{file}.parquet"}
        for uri, file in keys
    ]
    table = pa.Table.from_pylist(rows, ROW_KEYS)
    return Rows([ray.put(table)], sorted(set(table["file"].to_pylist())), table.num_rows)


def test_rows_are_taken_away_and_the_others_of_their_files_stay(bucket):
    _put(bucket, "part-1", prediction_row("a"), prediction_row("b"), prediction_row("a", version="2"))
    _put(bucket, "part-2", prediction_row("c"))
    _put(bucket, "part-3", prediction_row("d"), prediction_row("e"))
    _put(bucket, "again-4", prediction_row("f", status="changed"), prediction_row("g", status="changed"))
    before = _rows(bucket)
    with MaskStore(bucket, "run") as store:
        gone = _taken(("a", "part-1"), ("c", "part-2"), ("f", "again-4"))
        remove_rows(store, _taken(("a", "part-1")), record=gone)
    keys = {("a", "1"), ("c", "1"), ("f", "1")}
    assert _rows(bucket) == [row for row in before if (row["image_uri"], row["version"]) not in keys]
    assert "part-3.parquet" in _names(bucket)
    assert [name.partition("-")[0] for name in _names(bucket)] == ["again", "part", "part"]
    filesystem, path = storage.arrow_filesystem(storage.join(bucket, PRUNED_FOLDER))
    recorded = pq.read_table(path, filesystem=filesystem)
    assert recorded.schema.names == ["image_uri", "version", "model_id", "run_id", "pruned"]
    assert sorted(recorded["image_uri"].to_pylist()) == ["a", "c", "f"]
    assert set(recorded["run_id"].to_pylist()) == {"run"}


def test_nothing_to_remove_rows_changes_nothing(tmp_path):
    _put(str(tmp_path), "part-1", prediction_row("a"))
    with MaskStore(str(tmp_path), "run") as store:
        remove_rows(store, Rows([], [], 0), record=Rows([], [], 0))
    assert _names(str(tmp_path)) == ["part-1.parquet"]
    assert not (tmp_path / PRUNED_FOLDER).exists()


def test_small_files_are_merged_by_model_and_no_row_changes(bucket):
    for number in range(5):
        _put(bucket, f"part-{number}", prediction_row(f"{9 - number}.jpg"), prediction_row(f"x{number}.jpg"))
    _put(bucket, "part-o1", prediction_row("1.jpg", model_id="older"))
    _put(bucket, "part-o2", prediction_row("2.jpg", model_id="older"))
    _put(bucket, "part-alone", prediction_row("1.jpg", model_id="oldest"))
    _put(bucket, "part-mixed", prediction_row("3.jpg", model_id="older"), prediction_row("3.jpg", model_id="oldest"))
    _put(bucket, "again-1", prediction_row("z.jpg", status="changed"))
    before = _rows(bucket)
    with MaskStore(bucket, "run") as store:
        assert compact(store) == (7, 2)
        assert _rows(bucket) == before
        assert len(_names(bucket)) == 5
        assert compact(store) == (0, 0)
    merged = max(
        masks.open_masks(bucket).files,
        key=lambda file: len(masks.open_masks(bucket).filesystem.open_input_file(file).read()),
    )
    filesystem, _ = storage.arrow_filesystem(bucket)
    uris = pq.read_table(merged, filesystem=filesystem)["image_uri"].to_pylist()
    assert uris == sorted(uris)
    assert len(uris) == 10


def test_merged_files_are_of_the_size_that_is_asked_for(bucket, monkeypatch):
    for number in range(6):
        _put(bucket, f"part-{number}", prediction_row(f"{number}.jpg"))
    size = next(storage.list_objects(storage.join(bucket, mask_store.FOLDER))).size
    monkeypatch.setattr(mask_changes, "MERGED_BYTES", int(3.5 * size))
    with MaskStore(bucket, "run") as store:
        assert compact(store) == (6, 2)


def test_rows_that_stand_twice_are_not_hidden(tmp_path):
    for name in ("part-1", "part-2"):
        _put(str(tmp_path), name, prediction_row("a.jpg"))
    with MaskStore(str(tmp_path), "run") as store, pytest.raises(Exception, match="rows of the same image") as error:
        compact(store)
    assert isinstance(mendable_cause(error.value), PipelineError)
    assert sorted(_names(str(tmp_path))) == ["part-1.parquet", "part-2.parquet"]
