"""What is to be segmented, and which rows have had their time: listed and compared on the cluster."""

import io
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipeline import census, image_sources, mask_store, storage
from pipeline.census import Census, Pending, Rows
from pipeline.image_sources import ImageSource
from pipeline.parquet_files import write_table
from tests.pipeline.prediction_table import prediction_row, prediction_table

pytestmark = pytest.mark.usefixtures("ray_cluster")

NAMES = ("new.jpg", "done.jpg", "bad.jpg", "again.jpg", "other model.jpg", "überschrieben.jpg", "a#b%20c.jpg")


@pytest.fixture
def images(bucket: str) -> str:
    url = storage.join(bucket, "images")
    for name in (*NAMES, "notes.md"):
        storage.write_bytes(storage.join(url, name), name.encode())
    return url


def _versions(images: str) -> dict[str, str]:
    return {item.url: item.version for item in storage.list_objects(images)}


@pytest.fixture
def out(bucket: str, images: str) -> str:
    """An output with rows of some of the images, and of others."""
    url, versions = storage.join(bucket, "out"), _versions(images)

    def row(name: str, version: str | None = None, **values: str) -> dict[str, Any]:
        uri = storage.join(images, name)
        return prediction_row(uri, version=versions.get(uri, "gone") if version is None else version, **values)

    standing = [
        row("done.jpg"),
        row("bad.jpg", status="damaged"),
        row("überschrieben.jpg", version="an older one"),
        row("new.jpg", version="an older one", status="damaged"),
        row("deleted.jpg"),
        row("deleted bad.jpg", status="damaged"),
        prediction_row("s3://elsewhere/x.jpg"),
    ]
    tables = {
        "part-1": standing,
        "part-2": [row("other model.jpg", model_id="older"), row("done.jpg", model_id="older")],
        "again-1": [row("again.jpg", status="storage_error"), row("deleted too.jpg", status="storage_error")],
    }
    for name, rows in tables.items():
        write_table(storage.join(url, mask_store.FOLDER, f"{name}.parquet"), prediction_table(*rows))
    return url


def _census(images: str, out: str, model: str | None) -> Census:
    return Census(image_sources.parts(ImageSource(images)), out, model)


def _names(pending: Pending) -> list[str]:
    found = []
    for file in pending.files:
        filesystem, path = storage.arrow_filesystem(file.url)
        table = pq.read_table(path, filesystem=filesystem)
        assert table.num_rows == file.rows
        found += [uri.rpartition("/")[2] for uri in table["image_uri"].to_pylist()]
    return found


def _keys(rows: Rows) -> set[tuple[str, str, str]]:
    """(name, model, file) of each."""
    table = pa.concat_tables([census.ROW_KEYS.empty_table(), *ray.get(rows.tables)])
    assert table.num_rows == rows.count
    assert set(table["file"].to_pylist()) == set(rows.files)
    return {(row["image_uri"].rpartition("/")[2], row["model_id"], row["file"]) for row in table.to_pylist()}


@pytest.mark.parametrize("partition_rows", [250_000, 2])
def test_pending_is_what_has_no_row_of_this_model_that_stands(images, out, bucket, monkeypatch, partition_rows):
    monkeypatch.setattr(census, "PARTITION_ROWS", partition_rows)
    pending = _census(images, out, "model").pending(storage.join(bucket, "work"))
    assert sorted(_names(pending)) == sorted(
        ("new.jpg", "again.jpg", "other model.jpg", "überschrieben.jpg", "a#b%20c.jpg")
    )
    assert (pending.listed, pending.others, pending.listed_twice, pending.images) == (7, 1, 0, 5)
    assert (pending.masked, pending.unusable) == (4, 1)
    assert _keys(pending.outdated) == {("again.jpg", "model", "masks/again-1.parquet")}


def test_rows_of_other_models_and_of_what_is_gone_are_found(images, out):
    whole = _census(images, out, None)
    assert _keys(whole.superseded("model")) == {("done.jpg", "older", "masks/part-2.parquet")}
    assert _keys(whole.gone(image_sources.resolved(ImageSource(images)))) == {
        ("deleted.jpg", "model", "masks/part-1.parquet"),
        ("deleted bad.jpg", "model", "masks/part-1.parquet"),
        ("überschrieben.jpg", "model", "masks/part-1.parquet"),
        ("new.jpg", "model", "masks/part-1.parquet"),
        ("deleted too.jpg", "model", "masks/again-1.parquet"),
    }
    assert _keys(whole.gone(image_sources.resolved(ImageSource(images, include=("del*",))))) == {
        ("deleted.jpg", "model", "masks/part-1.parquet"),
        ("deleted bad.jpg", "model", "masks/part-1.parquet"),
        ("deleted too.jpg", "model", "masks/again-1.parquet"),
    }


def test_the_fingerprint_hangs_on_images_and_versions_alone(images, bucket, monkeypatch):
    nothing, work = storage.join(bucket, "nothing"), storage.join(bucket, "work")
    first = _census(images, nothing, "model").pending(work)
    assert (first.masked, first.unusable) == (0, 0)
    assert _keys(first.outdated) == set()
    monkeypatch.setattr(census, "PARTITION_ROWS", 2)
    assert _census(images, nothing, "another").pending(work).fingerprint == first.fingerprint
    storage.write_bytes(storage.join(images, "new.jpg"), b"new bytes")
    assert _census(images, nothing, "model").pending(work).fingerprint != first.fingerprint


def test_what_a_manifest_names_twice_is_listed_once(images, bucket):
    manifest = storage.join(bucket, "list.txt")
    names = ["new.jpg", "done.jpg", "new.jpg"]
    storage.write_bytes(manifest, "\n".join(storage.join(images, name) for name in names).encode())
    pending = _census(manifest, storage.join(bucket, "out"), "model").pending(storage.join(bucket, "work"))
    assert (pending.listed, pending.images) == (2, 2)
    assert sorted(_names(pending)) == ["done.jpg", "new.jpg"]


def test_what_was_said_of_a_tar_is_out_of_date_when_its_images_are_listed(bucket):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    photos, out = storage.join(bucket, "photos.tar"), storage.join(bucket, "out")
    storage.write_bytes(photos, buffer.getvalue())
    row = prediction_row(photos, status="changed")
    write_table(storage.join(out, mask_store.FOLDER, "again-1.parquet"), prediction_table(row))
    found = _census(photos, out, "model")
    assert _keys(found.pending(storage.join(bucket, "work")).outdated) == {
        ("photos.tar", "model", "masks/again-1.parquet")
    }


@pytest.mark.parametrize(
    ("source", "uri", "covered"),
    [
        (ImageSource("s3://b/in", "prefix"), "s3://b/in/x/a.JPG", True),
        (ImageSource("s3://b/in", "prefix"), "s3://b/inner/a.jpg", False),
        (ImageSource("s3://b/in", "prefix"), "s3://b/in/x.tar#a.jpg", False),
        (ImageSource("s3://b/in", "prefix"), "s3://b/in/.hidden/a.jpg", False),
        (ImageSource("s3://b/in", "prefix", exclude=("x/*",)), "s3://b/in/x/a.jpg", False),
        (ImageSource("s3://b/in/a.jpg", "prefix"), "s3://b/in/a.jpg", True),
        (ImageSource("s3://b/in", "tar"), "s3://b/in/x.TAR#a#1.jpg", True),
        (ImageSource("s3://b/in", "tar"), "s3://b/in/x.tar", True),
        (ImageSource("s3://b/in", "tar"), "s3://b/in/a.jpg", False),
        (ImageSource("s3://b/in/x.tar", "tar"), "s3://b/in/y.tar#a.jpg", False),
        (ImageSource("s3://b/set", "dataset"), "s3://b/set/train/a", False),
    ],
)
def test_only_what_a_source_would_list_is_covered(source, uri, covered):
    assert source.covers(uri) == covered


def test_an_empty_source_has_nothing_pending(tmp_path):
    (tmp_path / "images").mkdir()
    pending = _census(str(tmp_path / "images"), str(tmp_path / "out"), "model").pending(str(tmp_path / "work"))
    assert (pending.listed, pending.images, pending.files) == (0, 0, [])
