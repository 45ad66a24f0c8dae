"""A canonical dataset opens to what was written, reads row by row in a fixed order, and says what it lacks."""

import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import dataset, storage
from pipeline.dataset import SCHEMA, DatasetInfo, SplitInfo
from pipeline.errors import PipelineError
from pipeline.images import encode_png
from pipeline.parquet_files import ROW_GROUP_ROWS, write_table
from tests.pipeline.faulty_s3 import faulty_s3

LABEL = encode_png(np.zeros((2, 3), np.uint8))


def rows(split: str, numbers: range, labelled: bool = True) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "image_id": f"{split}/{number:03}",
                "image": f"bytes of {number}".encode(),
                "label": LABEL if labelled else None,
                "height": 2,
                "width": 3,
                "source_uri": f"s3://raw/{split}/{number:03}.png",
            }
            for number in numbers
        ],
        schema=SCHEMA,
    )


def write_dataset(url: str) -> DatasetInfo:
    """Two files of 40 and 5 rows to train on, an unlabelled split, and one with a few labels missing."""
    files = {
        "train/part-b.parquet": rows("train", range(40)),
        "train/part-a.parquet": rows("train", range(40, 45)),
        "test/part-a.parquet": rows("test", range(3), labelled=False),
        "val/part-a.parquet": rows("val", range(4)),
    }
    for path, table in files.items():
        write_table(storage.join(url, path), table)
    info = DatasetInfo(
        names=["road", "car"],
        palette=[[128, 64, 128], [64, 0, 128]],
        splits={
            "train": SplitInfo(45, 45, [270, 0], {"train/part-b.parquet": 40, "train/part-a.parquet": 5}),
            "test": SplitInfo(3, 0, [0, 0], {"test/part-a.parquet": 3}),
            "val": SplitInfo(4, 4, [24, 0], {"val/part-a.parquet": 4}),
        },
        rejected=2,
        source="s3://raw",
        layout="folders",
        fingerprint="f" * 64,
    )
    dataset.write_info(url, info)
    return info


@pytest.fixture
def url(tmp_path: Path) -> str:
    write_dataset(str(tmp_path))
    return str(tmp_path)


def test_it_opens_to_what_was_written(tmp_path: Path) -> None:
    info = write_dataset(str(tmp_path))
    opened = dataset.open(str(tmp_path))
    assert opened.info == info
    assert opened.classes.names == ("road", "car")
    assert opened.classes.palette == ((128, 64, 128), (64, 0, 128))


def test_reading_all_chunks_fetches_each_byte_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file of a few row groups, and of one whose footer is larger than what is first asked for."""
    generator, files = np.random.default_rng(0), {}
    for name, count, size in (("few", 2 * ROW_GROUP_ROWS, 10_000), ("many", 300 * ROW_GROUP_ROWS, 100)):
        table = rows("train", range(count))
        images = pa.array([generator.bytes(size) for _ in range(count)], pa.binary())
        files[f"train/{name}.parquet"] = count
        write_table(storage.join(bucket, f"train/{name}.parquet"), table.set_column(1, "image", images))
    total = sum(files.values())
    split = SplitInfo(total, total, [6 * total, 0], files)
    info = dataclasses.replace(write_dataset(bucket), splits={"train": split})
    dataset.write_info(bucket, info)
    place, chunks = bucket.removeprefix("s3://"), list[dataset.Chunk]()
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"], {}) as store, monkeypatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", store.endpoint)
        data = dataset.open(bucket)
        chunks = data.chunks("train")
        for again in range(2):  # the second time without the footers
            assert data.chunks("train") == chunks
            assert [chunk.rows for chunk in chunks] == [ROW_GROUP_ROWS] * (total // ROW_GROUP_ROWS)
            assert sum(chunk.read().num_rows for chunk in chunks if "few" in chunk.url) == 2 * ROW_GROUP_ROWS
            fetched = store.served[f"{place}/train/few.parquet"] / storage.stat(chunks[0].url).size
            assert (1 + again) * 0.98 < fetched <= 1.02 + again
    footer = store.served[f"{place}/train/many.parquet"]
    with pq.ParquetFile(pa.BufferReader(storage.read_bytes(chunks[-1].url))) as file:
        assert file.metadata.serialized_size > 8192
        assert footer == file.metadata.serialized_size + 8
    everything = pickle.loads(pickle.dumps(chunks[-1])).read()  # as it comes to a task
    last = range(files["train/many.parquet"])[-ROW_GROUP_ROWS:]
    assert everything["image_id"].to_pylist() == [f"train/{number:03}" for number in last]


def test_it_opens_from_an_object_store(bucket: str) -> None:
    info = write_dataset(bucket)
    opened = dataset.open(f"{bucket}/")
    assert (opened.url, opened.info) == (bucket, info)
    assert len(list(opened.rows("train", ["image_id"]))) == 45


def test_all_rows_come_once_and_in_the_same_order_each_time(url: str) -> None:
    opened = dataset.open(url)
    first, second = list(opened.rows("train")), list(opened.rows("train"))
    assert first == second
    assert [row["image_id"] for row in first] == [f"train/{number:03}" for number in (*range(40, 45), *range(40))]
    assert first[0].keys() == set(SCHEMA.names)
    assert first[0]["image"] == b"bytes of 40"


def test_columns_can_be_chosen(url: str) -> None:
    (row,) = [row for row in dataset.open(url).rows("train", ["image_id"]) if row["image_id"] == "train/007"]
    assert row == {"image_id": "train/007"}


@pytest.mark.parametrize("count", [1, 2, 3, 60])
def test_shards_share_the_rows_out_evenly(url: str, count: int) -> None:
    opened = dataset.open(url)
    shards = [[row["image_id"] for row in opened.rows("train", ["image_id"], (index, count))] for index in range(count)]
    assert sorted(image_id for shard in shards for image_id in shard) == [f"train/{number:03}" for number in range(45)]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_some_rows_are_spread_over_the_whole_split(url: str) -> None:
    opened = dataset.open(url)
    every = [row["image_id"] for row in opened.rows("train", ["image_id"])]
    assert [row["image_id"] for row in opened.spread_rows("train", 3, ["image_id"])] == [every[0], every[15], every[30]]
    assert [row["image_id"] for row in opened.spread_rows("train", 99, ["image_id"])] == every


def test_chunks_are_the_row_groups_and_small_enough_to_shuffle(url: str) -> None:
    opened = dataset.open(url)
    chunks = opened.chunks("train")
    assert [(Path(chunk.url).name, chunk.row_group, chunk.rows) for chunk in chunks] == [
        ("part-a.parquet", 0, 5),
        ("part-b.parquet", 0, ROW_GROUP_ROWS),
        ("part-b.parquet", 1, 40 - ROW_GROUP_ROWS),
    ]
    assert [chunk.read(["image_id"]).num_rows for chunk in chunks] == [chunk.rows for chunk in chunks]
    assert opened.arrow("train", ["image_id"]).num_rows == 45


@pytest.mark.usefixtures("ray_cluster")
def test_ray_reads_the_split(url: str) -> None:
    table = dataset.open(url).ray("train", ["image_id", "height"]).to_pandas()
    assert sorted(table["image_id"]) == [f"train/{number:03}" for number in range(45)]
    assert list(table.columns) == ["image_id", "height"]


def test_the_files_have_the_schema_of_the_contract(url: str) -> None:
    schema = pq.read_schema(f"{url}/train/part-a.parquet")
    assert [(field.name, str(field.type)) for field in schema] == [
        ("image_id", "string"),
        ("image", "binary"),
        ("label", "binary"),
        ("height", "int32"),
        ("width", "int32"),
        ("source_uri", "string"),
    ]


def test_an_unknown_split_is_answered_with_the_known_ones(url: str) -> None:
    with pytest.raises(PipelineError, match=r"has no split 'vall': choose one of train, test, val\."):
        dataset.open(url).split("vall")


def test_a_split_without_labels_cannot_be_trained_on(url: str) -> None:
    opened = dataset.open(url)
    assert opened.require_labels("train").rows == 45
    with pytest.raises(PipelineError, match=r"'test' of .* has 0 labels for 3 images: choose a split whose images all"):
        opened.require_labels("test")
    info = opened.info
    partly = dataclasses.replace(info, splits={"val": dataclasses.replace(info.splits["val"], labelled=3)})
    with pytest.raises(PipelineError, match="has 3 labels for 4 images"):
        dataclasses.replace(opened, info=partly).require_labels("val")


def test_where_there_is_none_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"no finished dataset at .* \(no dataset.json\).*run workflows/ingest.py"):
        dataset.open(str(tmp_path))


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_is_named() -> None:
    with pytest.raises(PipelineError, match="there is no bucket named absent: create it, or correct the name"):
        dataset.open("s3://absent/data")


def _without(document: dict, name: str) -> dict:
    return {key: value for key, value in document.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda document: {**document, "schema_version": 2}, "is not a dataset of schema version 1"),
        (lambda document: [document], "is not a dataset of schema version 1"),
        (lambda document: _without(document, "splits"), "dataset.json is damaged"),
        (lambda document: _without(document, "names"), "dataset.json is damaged"),
        (lambda document: {**document, "splits": {"train": {"rows": 1}}}, "dataset.json is damaged"),
        (lambda document: {**document, "splits": []}, "dataset.json is damaged"),
        (lambda document: {**document, "colour": "red"}, "dataset.json is damaged"),
    ],
)
def test_a_damaged_description_is_refused(url: str, damage, says: str) -> None:
    place = Path(url, "dataset.json")
    place.write_text(json.dumps(damage(json.loads(place.read_text()))))
    with pytest.raises(PipelineError, match=says):
        dataset.open(url)


def test_a_description_cut_short_is_refused(url: str) -> None:
    place = Path(url, "dataset.json")
    place.write_bytes(place.read_bytes()[:-20])
    with pytest.raises(PipelineError, match=r"dataset.json is not valid JSON"):
        dataset.open(url)
