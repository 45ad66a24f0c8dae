"""What of a source is ingested, and into which split; images without labels; shards; duplicates; sizes."""

import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import dataset, storage
from pipeline.dataset import quantiles
from pipeline.images import decode_label, encode_png
from pipeline.ingest import IngestConfig, ingest
from tests.pipeline.labelled_source import (
    CLASSES,
    HEIGHT,
    WIDTH,
    label_values,
    photograph,
    refused,
    reject_rows,
    write_pair,
    write_source,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")


def ids(url: str) -> dict[str, list[str]]:
    data = dataset.open(url)
    return {split: sorted(row["image_id"] for row in data.rows(split, ["image_id"])) for split in data.info.splits}


def add_to_tar(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def shard(samples: dict[str, dict[str, bytes]]) -> bytes:
    """A tar file: by key, the files of a sample by their ending."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for key, files in samples.items():
            for ending, data in files.items():
                add_to_tar(archive, f"{key}.{ending}", data)
    return buffer.getvalue()


def test_only_the_splits_asked_for_are_ingested(tmp_path: Path) -> None:
    write_source(str(tmp_path / "source"), pairs=2, splits=("train", "val", "night"))
    url = str(tmp_path / "set")
    ingest(IngestConfig(str(tmp_path / "source"), url, splits="night,val"))
    assert ids(url) == {"night": ["night/00", "night/01"], "val": ["val/00", "val/01"]}


def test_a_split_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    write_source(str(tmp_path / "source"), pairs=1)
    config = IngestConfig(str(tmp_path / "source"), str(tmp_path / "set"), splits="test")
    assert "has no split test: choose of train, val, or leave out --splits" in refused(config)


def test_a_share_of_train_becomes_val_and_an_image_stays_where_it_is_when_others_come(tmp_path: Path) -> None:
    write_source(str(tmp_path / "source"), pairs=16, splits=("train",))
    few, more = str(tmp_path / "few"), str(tmp_path / "more")
    ingest(IngestConfig(str(tmp_path / "source"), few, val_fraction=0.4))
    write_source(str(tmp_path / "source"), pairs=20, splits=("train",))
    ingest(IngestConfig(str(tmp_path / "source"), more, val_fraction=0.4))
    before, after = ids(few), ids(more)
    assert len(before["train"]) + len(before["val"]) == 16
    assert 2 <= len(before["val"]) <= 11
    assert set(before["val"]) <= set(after["val"])
    assert set(before["train"]) <= set(after["train"])


def test_another_share_is_another_dataset(tmp_path: Path) -> None:
    write_source(str(tmp_path / "source"), pairs=16, splits=("train",))
    urls = {share: str(tmp_path / f"set{share}") for share in (0.2, 0.6)}
    records = [ingest(IngestConfig(str(tmp_path / "source"), url, val_fraction=share)) for share, url in urls.items()]
    assert records[0].results["fingerprint"] != records[1].results["fingerprint"]


def test_val_is_not_divided_from_train_where_it_is_there_already(tmp_path: Path) -> None:
    write_source(str(tmp_path / "source"), pairs=1)
    config = IngestConfig(str(tmp_path / "source"), str(tmp_path / "set"), val_fraction=0.5)
    assert "divides a split `train` where there is none `val`" in refused(config)


def test_a_limit_takes_the_same_few_images_of_each_split_every_time(tmp_path: Path) -> None:
    write_source(str(tmp_path / "source"), pairs=6)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    for url in (first, second):
        assert ingest(IngestConfig(str(tmp_path / "source"), url, limit=2)).counts == {"in": 4, "out": 4, "rejected": 0}
    assert ids(first) == ids(second)
    assert [len(found) for found in ids(first).values()] == [2, 2]


def test_a_limit_of_none_is_refused(tmp_path: Path) -> None:
    assert refused(IngestConfig(str(tmp_path), str(tmp_path / "set"), limit=0)).startswith("limit is 0: give 1 or more")


def test_images_without_labels_become_rows_without_labels(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "deep/b c.png"):
        storage.write_bytes(str(tmp_path / "photos" / name), photograph(len(name)))
    storage.write_bytes(str(tmp_path / "photos/broken.png"), photograph(1)[:-30])
    url = str(tmp_path / "set")
    record = ingest(IngestConfig(str(tmp_path / "photos"), url, max_reject_fraction=0.5))
    assert record.counts == {"in": 4, "out": 3, "rejected": 1}
    data = dataset.open(url)
    assert data.info.layout == "unlabelled"
    assert data.info.names == []
    assert (data.split("all").rows, data.split("all").labelled) == (3, 0)
    assert sorted(row["image_id"] for row in data.rows("all")) == ["all/a.jpg", "all/a.png", "all/deep/b c.png"]
    assert all(row["label"] is None for row in data.rows("all"))
    assert [item["label"] for item in data.torch("all")] == [None] * 3


def test_tar_shards_become_rows_and_a_sample_that_is_none_a_reject(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "shards/classes.json"), CLASSES)
    label = encode_png(label_values(1))
    samples = {
        "a": {"jpg": photograph(1), "png": label, "json": b"{}"},
        "b": {"png": photograph(2), "seg.png": label},
        "deep/c": {"jpg": photograph(3), "label.png": label},
        "alone": {"jpg": photograph(4)},
        "two": {"jpg": photograph(4), "webp": photograph(5), "seg.png": label},
        "text": {"txt": b"no image"},
    }
    storage.write_bytes(str(tmp_path / "shards/train-0000.tar"), shard(samples))
    storage.write_bytes(str(tmp_path / "shards/train-0001.tar"), shard({"a": samples["a"]}))
    url = str(tmp_path / "set")
    record = ingest(IngestConfig(str(tmp_path / "shards"), url, max_reject_fraction=0.5))
    assert record.counts == {"in": 7, "out": 4, "rejected": 3}
    assert ids(url) == {"train": ["train-0000/a", "train-0000/b", "train-0000/deep/c", "train-0001/a"]}
    reasons = {row["source_uri"].rpartition("#")[2]: row["reason"] for row in reject_rows(url)}
    assert reasons == {"alone": "no_label", "two": "ambiguous", "text": "no_image"}
    (row,) = [row for row in dataset.open(url).rows("train") if row["image_id"] == "train-0000/b"]
    assert row["image"] == photograph(2)
    assert (decode_label(row["label"]) == label_values(1)).all()
    assert row["source_uri"] == f"{tmp_path}/shards/train-0000.tar#b"


@pytest.mark.parametrize("damage", ["cut between files", "cut in a file", "a header overwritten"])
def test_what_stands_before_the_damage_of_a_shard_is_kept_and_the_damage_is_a_reject(
    tmp_path: Path, damage: str
) -> None:
    storage.write_json(str(tmp_path / "shards/classes.json"), CLASSES)
    label = encode_png(label_values(1))
    whole = shard({key: {"jpg": photograph(number), "png": label} for number, key in enumerate("abc")})
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        third = archive.getmember("c.jpg").offset
    broken = {
        "cut between files": whole[:third],
        "cut in a file": whole[: third + 700],
        "a header overwritten": whole[:third] + b"x" * 512 + whole[third + 512 :],
    }[damage]
    storage.write_bytes(str(tmp_path / "shards/train.tar"), broken)
    url = str(tmp_path / "set")
    config = IngestConfig(str(tmp_path / "shards"), url, max_reject_fraction=0.5)
    assert "1 of 1 shards cannot be read to their end" in refused(config)
    record = ingest(dataclasses.replace(config, max_reject_fraction=1.0))
    assert record.counts["rejected"] == 1
    assert {"train/a", "train/b"} <= set(ids(url)["train"])
    (reject,) = reject_rows(url)
    assert reject["reason"] == "damaged"
    assert reject["source_uri"].endswith("train.tar")


@pytest.mark.parametrize("damage", ["cut", "a page overwritten"])
def test_a_damaged_parquet_file_is_a_reject_and_the_others_are_kept(tmp_path: Path, damage: str) -> None:
    storage.write_json(str(tmp_path / "source/classes.json"), CLASSES)
    table = pa.table({"image": [photograph(1)] * 40, "label": [encode_png(label_values(1))] * 40})
    for name in ("train-0", "train-1"):
        pq.write_table(table, tmp_path / f"source/{name}.parquet", row_group_size=20, use_dictionary=False)
    whole = (tmp_path / "source/train-1.parquet").read_bytes()
    middle = len(whole) // 2
    broken = whole[:-100] if damage == "cut" else whole[:middle] + b"\xff" * 4000 + whole[middle + 4000 :]
    (tmp_path / "source/train-1.parquet").write_bytes(broken)
    url = str(tmp_path / "set")
    record = ingest(IngestConfig(str(tmp_path / "source"), url, max_reject_fraction=0.5))
    assert record.counts["rejected"] == 1
    assert [(row["source_uri"].rpartition("/")[2], row["reason"]) for row in reject_rows(url)] == [
        ("train-1.parquet", "damaged")
    ]
    assert sum("train-0" in image_id for image_id in ids(url)["train"]) == 40


def test_a_canonical_dataset_is_itself_a_source_and_comes_back_the_same(tmp_path: Path) -> None:
    write_source(str(tmp_path / "source"), pairs=3)
    first, again = str(tmp_path / "first"), str(tmp_path / "again")
    ingest(IngestConfig(str(tmp_path / "source"), first))
    ingest(IngestConfig(first, again))
    assert ids(again) == ids(first)
    assert dataset.open(again).info.fingerprint == dataset.open(first).info.fingerprint
    assert dataset.open(again).info.layout == "parquet"


def test_parquet_from_elsewhere_may_nest_its_bytes_and_lack_ids(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "source/classes.json"), CLASSES)
    rows = [
        {"image": {"bytes": photograph(n), "path": f"{n}.png"}, "label": {"bytes": encode_png(label_values(n))}}
        for n in range(3)
    ]
    (tmp_path / "source/data").mkdir()
    pq.write_table(pa.Table.from_pylist([*rows, {"image": None}]), tmp_path / "source/train-00000-of-00001.parquet")
    (tmp_path / "source/data").rmdir()
    url = str(tmp_path / "set")
    record = ingest(IngestConfig(str(tmp_path / "source"), url, max_reject_fraction=0.3))
    assert record.counts == {"in": 4, "out": 3, "rejected": 1}
    assert ids(url) == {"train": [f"train-00000-of-00001/{n}" for n in range(3)]}
    assert [row["reason"] for row in reject_rows(url)] == ["no_image"]


@pytest.mark.parametrize("column", ["annotation", "label"])
def test_parquet_in_which_labels_cannot_be_found_is_refused_and_not_unlabelled(tmp_path: Path, column: str) -> None:
    storage.write_json(str(tmp_path / "source/classes.json"), CLASSES)
    rows = [{"image": photograph(n), column: 3 if column == "label" else b""} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "source/train-0.parquet")
    assert "no_label" in refused(IngestConfig(str(tmp_path / "source"), str(tmp_path / "set"), max_reject_fraction=0.5))


def test_links_in_a_shard_and_files_of_one_ending_are_rejects(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "shards/classes.json"), CLASSES)
    label, buffer = encode_png(label_values(1)), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (("a.jpg", photograph(1)), ("a.png", label), ("b.jpg", photograph(2)), ("b.JPG", label)):
            add_to_tar(archive, name, data)
        add_to_tar(archive, "b.png", label)
        linked = tarfile.TarInfo("c.jpg")
        linked.type, linked.linkname = tarfile.LNKTYPE, "a.jpg"
        archive.addfile(linked)
        add_to_tar(archive, "c.png", label)
    storage.write_bytes(str(tmp_path / "shards/train.tar"), buffer.getvalue())
    url = str(tmp_path / "set")
    assert ingest(IngestConfig(str(tmp_path / "shards"), url, max_reject_fraction=0.9)).counts["out"] == 1
    reasons = {row["source_uri"].rpartition("#")[2]: row["reason"] for row in reject_rows(url)}
    assert reasons == {"b": "ambiguous", "c": "no_file"}


def test_an_archive_behind_another_is_not_passed_over(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "shards/classes.json"), CLASSES)
    parts = [shard({key: {"jpg": photograph(1), "png": encode_png(label_values(1))}}) for key in "ab"]
    storage.write_bytes(str(tmp_path / "shards/train.tar"), b"".join(parts))
    message = refused(IngestConfig(str(tmp_path / "shards"), str(tmp_path / "set"), max_reject_fraction=0.5))
    assert "or another follows its end" in message


def test_an_id_that_two_shards_share_is_refused_by_name(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "source/classes.json"), CLASSES)
    table = pa.table({"image_id": ["same"], "image": [photograph(1)], "label": [encode_png(label_values(1))]})
    for name in ("train-0", "train-1"):
        pq.write_table(table, tmp_path / f"source/{name}.parquet")
    message = refused(IngestConfig(str(tmp_path / "source"), str(tmp_path / "set")))
    assert "image_id are there more than once, such as 'same': make them unique" in message


def test_images_that_are_there_twice_are_named_with_the_first_of_them(tmp_path: Path, capsys) -> None:
    write_source(str(tmp_path / "source"), pairs=3)
    for split, name in (("train", "copy"), ("val", "leak")):
        storage.write_bytes(str(tmp_path / f"source/images/{split}/{name}.png"), photograph(0))
        storage.write_bytes(str(tmp_path / f"source/labels/{split}/{name}.png"), encode_png(label_values(5)))
    url = str(tmp_path / "set")
    ingest(IngestConfig(str(tmp_path / "source"), url))
    assert dataset.open(url).info.duplicates == 2
    found = pq.read_table(tmp_path / "set/_duplicates").to_pylist()
    assert [(row["image_id"], row["split"], row["first_id"]) for row in found] == [
        ("train/copy", "train", "train/00"),
        ("val/leak", "val", "train/00"),
    ]
    assert "2 images are byte for byte those of another row, 1 of them in another split" in capsys.readouterr().out


def test_the_sizes_of_images_are_described_by_quantiles(tmp_path: Path) -> None:
    write_source(str(tmp_path / "source"), pairs=3, splits=("train",))
    tall = np.zeros((40, 10), np.uint8)
    write_pair(str(tmp_path / "source"), "tall.png", encode_png(tall), encode_png(tall))
    url = str(tmp_path / "set")
    ingest(IngestConfig(str(tmp_path / "source"), url))
    sizes = dataset.open(url).info.sizes
    assert (sizes["height"]["min"], sizes["height"]["median"], sizes["height"]["max"]) == (HEIGHT, HEIGHT, 40)
    assert (sizes["width"]["min"], sizes["width"]["median"], sizes["width"]["max"]) == (10, WIDTH, WIDTH)


def test_quantiles_are_those_of_numpy_where_a_value_is_to_occur() -> None:
    values = np.random.default_rng(0).integers(1, 50, 301)
    counts = {int(value): int(count) for value, count in zip(*np.unique(values, return_counts=True), strict=True)}
    found = quantiles(counts)
    for name, share in {"min": 0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1}.items():
        assert found[name] == np.quantile(values, share, method="inverted_cdf")
    assert quantiles({}) == {}
