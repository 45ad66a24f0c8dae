"""The images of the demo: those of one source are never taken for those of another."""

import os
from pathlib import Path

import boto3
import pytest

from pipeline import storage
from pipeline.demo import CAMVID_FOLDERS, READY_MARK, demo, fill_bucket
from pipeline.errors import PipelineError

BUCKET = "two-sources"


@pytest.fixture
def bucket(s3: None) -> str:  # noqa: ARG001
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket=BUCKET)
    return BUCKET


def _camvid(folder: Path, name: str, size: int) -> Path:
    for part in CAMVID_FOLDERS:
        (folder / part).mkdir(parents=True)
        (folder / part / name).write_bytes(b"x" * size)
    return folder


def _names(url: str) -> list[str]:
    return [item.url.removeprefix(f"{url}/") for item in storage.list_objects(url)]


def test_another_source_replaces_the_images_and_what_was_ingested(bucket: str, tmp_path: Path, capsys) -> None:
    first = _camvid(tmp_path / "first", "a.png", 1)
    labelled, photos = fill_bucket(bucket, first)
    assert _names(labelled) == [f"{part}/a.png" for part in CAMVID_FOLDERS]
    ingested = f"s3://{bucket}/results/ingest/run.json"
    storage.write_bytes(ingested, b"{}")
    capsys.readouterr()

    fill_bucket(bucket, first)
    assert storage.exists(ingested)
    assert capsys.readouterr().out == ""

    fill_bucket(bucket, _camvid(tmp_path / "second", "b.png", 1))
    assert _names(labelled) == [f"{part}/b.png" for part in CAMVID_FOLDERS]
    assert _names(photos) == ["b.png"]
    assert not storage.exists(ingested)
    assert "has the images of another demo" in capsys.readouterr().out

    fill_bucket(bucket, _camvid(tmp_path / "third", "b.png", 2))  # the names alone do not make it the same
    assert storage.stat(f"{photos}/b.png").size == 2


def test_an_upload_that_was_cut_short_is_begun_again(bucket: str, tmp_path: Path) -> None:
    labelled, _ = fill_bucket(bucket, _camvid(tmp_path / "first", "a.png", 1))
    storage.delete(f"s3://{bucket}/{READY_MARK}")
    fill_bucket(bucket, _camvid(tmp_path / "second", "b.png", 1))
    assert _names(labelled) == [f"{part}/b.png" for part in CAMVID_FOLDERS]


def test_a_folder_that_lacks_a_part_of_camvid_is_refused(tmp_path: Path) -> None:
    camvid = _camvid(tmp_path / "camvid", "a.png", 1)
    (camvid / "val" / "a.png").unlink()
    (camvid / "valannot" / "a.png").unlink()
    (camvid / "valannot").rmdir()
    with pytest.raises(PipelineError, match=r"is not CamVid's folder \(nothing in val/, valannot/\): correct DATA"):
        demo(str(camvid), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
