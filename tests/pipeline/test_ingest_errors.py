"""What is said of a source or a place that cannot serve, and that nothing unfinished is left looking finished."""

import dataclasses
from pathlib import Path

import pytest

from pipeline import dataset, storage
from pipeline.images import encode_png
from pipeline.ingest import IngestConfig, ingest
from pipeline.run_record import read_record, record_run
from tests.pipeline.labelled_source import (
    assert_unfinished,
    label_values,
    photograph,
    refused,
    reject_rows,
    run_script,
    write_source,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_too_many_rejects_fail_the_ingest_and_a_mended_source_replaces_it(tmp_path: Path) -> None:
    source, url = tmp_path / "source", str(tmp_path / "dataset")
    write_source(str(source), pairs=5)
    bad = source / "images/train/03.png"
    bad.write_bytes(photograph(3)[:-40])
    config = IngestConfig(str(source), url, max_reject_fraction=0.09)

    message = refused(config)
    assert f"1 of 10 inputs were rejected, listed in {url}/_rejects/, more than --max_reject_fraction 0.09" in message
    assert f"{bad}: damaged" in message
    assert message.endswith("run again.")
    assert_unfinished(url)
    assert [row["reason"] for row in reject_rows(url)] == ["damaged"]
    record = read_record(url)
    assert record is not None
    assert record.counts == {"in": 10, "out": 9, "rejected": 1}

    tolerant = ingest(dataclasses.replace(config, max_reject_fraction=0.1, new=True))
    assert (tolerant.outcome, tolerant.counts["rejected"]) == ("done", 1)

    bad.write_bytes(photograph(3))
    assert "another source" in refused(config)
    mended = ingest(dataclasses.replace(config, new=True))
    assert mended.counts == {"in": 10, "out": 10, "rejected": 0}
    assert reject_rows(url) == []
    files = {item.url for item in storage.list_objects(url) if item.url.endswith(".parquet")}
    assert files == {f"{url}/{path}" for split in dataset.open(url).info.splits.values() for path in split.files}
    assert ingest(config) == mended


def test_a_source_without_a_single_good_pair_fails_whatever_is_tolerated(tmp_path: Path) -> None:
    source, url = tmp_path / "source", str(tmp_path / "dataset")
    write_source(str(source), pairs=1, splits=("train",))
    (source / "labels/train/00.png").write_bytes(b"")
    assert "1 of 1 inputs were rejected" in refused(IngestConfig(str(source), url, max_reject_fraction=1.0))
    assert_unfinished(url)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("s3://data/raw", "s3://data/raw/set"),
        ("s3://data/raw/", "s3://data/raw"),
        ("s3://data/raw/set", "s3://data"),
        ("/data/raw", "/data/raw/set"),
        ("/data/raw", "file:///data/"),
        ("raw", "raw/../raw/set"),
    ],
)
def test_a_dataset_within_its_source_or_around_it_is_refused(source: str, target: str) -> None:
    assert "lie in each other: choose another place" in refused(IngestConfig(source, target))


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(tmp_path: Path, fraction: float) -> None:
    config = IngestConfig(str(tmp_path / "raw"), str(tmp_path / "set"), max_reject_fraction=fraction)
    assert refused(config) == f"max_reject_fraction is {fraction}: give a share from 0 to 1."


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("{tmp}/nowhere", "{tmp}/set", "{tmp}/nowhere has no objects: correct the URL."),
        ("s3://absent/raw", "{tmp}/set", "s3://absent/raw: there is no bucket named absent"),
        ("s3://test/nothing-here", "{tmp}/set", "s3://test/nothing-here has no objects"),
        ("{tmp}/source", "s3://absent/set", "s3://absent/set: there is no bucket named absent"),
        ("{tmp}/source", "https://host/set", "unknown scheme https://"),
        ("", "{tmp}/set", "An empty URL was given"),
    ],
)
def test_a_wrong_place_is_refused_before_anything_is_written(tmp_path: Path, source: str, target: str, says: str):
    write_source(str(tmp_path / "source"), pairs=1)
    config = IngestConfig(source.format(tmp=tmp_path), target.format(tmp=tmp_path))
    assert says.format(tmp=tmp_path) in refused(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_unknown_layout_and_broken_classes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, url = tmp_path / "source", str(tmp_path / "dataset")
    write_source(str(source), pairs=1)
    assert "There is no layout 'cityscape': choose auto" in refused(IngestConfig(str(source), url, "cityscape"))
    (source / "classes.json").write_text("{")
    assert "classes.json is not valid JSON" in refused(IngestConfig(str(source), url))
    (source / "classes.json").unlink()
    assert "classes.json, which does not exist: write one like" in refused(IngestConfig(str(source), url))
    assert not Path(url).exists()


@pytest.mark.parametrize("new", [False, True])
def test_a_place_with_objects_of_others_is_refused_and_left_alone(bucket: str, tmp_path: Path, new: bool) -> None:
    source = tmp_path / "source"
    write_source(str(source), pairs=1)
    storage.write_bytes(storage.join(bucket, "set/holiday.jpg"), b"mine")
    message = refused(IngestConfig(str(source), storage.join(bucket, "set"), new=new))
    assert f"{bucket}/set already holds {bucket}/set/holiday.jpg, which no ingest wrote: choose an empty" in message
    assert [item.url for item in storage.list_objects(bucket)] == [f"{bucket}/set/holiday.jpg"]


@pytest.mark.parametrize("new", [False, True])
def test_the_place_of_another_workflow_is_refused_and_left_alone(tmp_path: Path, new: bool) -> None:
    source, url = tmp_path / "source", str(tmp_path / "run")
    write_source(str(source), pairs=1)
    with record_run(url, "train", IngestConfig("a", "b"), {}, ["model"]):
        storage.write_bytes(storage.join(url, "model/model.safetensors"), b"weights")
    before = read_record(url)
    assert "holds the output of train, not of ingest" in refused(IngestConfig(str(source), url, new=new))
    assert read_record(url) == before
    assert storage.read_bytes(storage.join(url, "model/model.safetensors")) == b"weights"


def test_the_script_says_in_one_line_what_is_wrong_with_the_labels(bucket: str) -> None:
    write_source(storage.join(bucket, "raw"), pairs=2)
    above = label_values(1)
    above[7, 7] = 9
    storage.write_bytes(storage.join(bucket, "raw/labels/train/01.png"), encode_png(above))
    failed = run_script("--source", f"{bucket}/raw", "--dataset", f"{bucket}/set")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: 1 of 4 inputs were rejected")
    assert f"{bucket}/raw/labels/train/01.png: it has the value 9 at 1 pixels" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert "Traceback" not in failed.stdout + failed.stderr
    assert_unfinished(f"{bucket}/set")
