"""What a segmentation makes of storage, models, processes and drivers that fail."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from PIL import Image

from pipeline import lease, masks, prediction_rows, segmentation, storage
from pipeline.errors import PipelineError
from pipeline.image_sources import reading
from pipeline.images import decode_photograph
from pipeline.inference_config import InferenceConfig
from pipeline.prediction_rows import ImageReader
from pipeline.run_record import read_record
from pipeline.segmentation import segment
from pipeline.segmenter import Segmenter
from rssnet import RSSNet
from tests.pipeline.image_files import encoded
from tests.pipeline.leftovers import await_release
from tests.pipeline.segmentations import config_of, png, read_listed, rows_of

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def archived(bucket: str) -> Iterator[str]:
    """Where two objects lie in an archive: they are listed, but cannot be read."""
    url = storage.join(bucket, "images")
    for name in ("archived.png", "still archived.png"):
        _put(storage.join(url, name), png(1), StorageClass="GLACIER")
    yield url
    storage.delete(url)  # the server could not save them at its end


def _put(url: str, data: bytes, **options: Any) -> None:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).put_object(
        Bucket=bucket, Key=key, Body=data, **options
    )


@pytest.mark.usefixtures("ray_cluster")
def test_what_storage_did_not_give_is_tried_again(tiny_model, archived, bucket):
    out = storage.join(bucket, "out")
    with pytest.raises(PipelineError, match=r"None of the 2 pending images could be read.*archived\.png"):
        segment(config_of(tiny_model, archived, out))
    before = rows_of(out)
    assert {name: row["status"] for name, row in before.items()} == dict.fromkeys(before, "storage_error")
    assert "archived.png" in before["archived.png"]["error"]
    record = read_record(out)
    assert record is not None
    assert (record.outcome, record.counts["failed"]) == ("failed", 2)

    _put(storage.join(archived, "archived.png"), png(1))  # taken out of the archive it has the same version
    counts = segment(config_of(tiny_model, archived, out)).counts
    assert (counts["done_before"], counts["ok"], counts["failed"]) == (0, 1, 1)
    after = rows_of(out)
    assert {name: row["status"] for name, row in after.items()} == {
        "archived.png": "ok",
        "still archived.png": "storage_error",
    }
    assert after["archived.png"]["version"] == before["archived.png"]["version"]


@pytest.mark.usefixtures("ray_cluster")
def test_what_cannot_be_fetched_does_not_keep_new_images_from_being_added(tiny_model, archived, bucket, capsys):
    out = storage.join(bucket, "out")
    segment(config_of(tiny_model, _with_one_good_image(archived), out, exclude=("still*", "archived*")))
    record = segment(config_of(tiny_model, archived, out))
    assert (record.outcome, record.counts["done_before"], record.counts["failed"]) == ("done", 1, 2)
    assert "2 images could not be segmented" in capsys.readouterr().out


def _with_one_good_image(url: str) -> str:
    storage.write_bytes(storage.join(url, "good.png"), png(1))
    return url


@pytest.mark.usefixtures("ray_cluster")
def test_a_model_that_fails_on_every_image_fails_the_run(tiny_model, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "whole.png").write_bytes(png(1))
    (images / "cut.png").write_bytes(png(2)[:-40])
    model = RSSNet.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.save_pretrained(str(tmp_path / "model"))
    out = str(tmp_path / "out")
    config = config_of(str(tmp_path / "model"), str(images), out)
    with pytest.raises(PipelineError, match=r"The model failed on every image .*, 1 in all: .* no numbers"):
        segment(config)
    rows = rows_of(out)
    assert {name: row["status"] for name, row in rows.items()} == {"whole.png": "inference_error", "cut.png": "damaged"}
    assert rows["whole.png"]["mask"] is None
    with pytest.raises(PipelineError, match="The model failed on every image"):
        segment(config)  # tried again, and no row doubled
    assert rows_of(out).keys() == rows.keys()
    await_release()


def test_an_image_that_the_model_fails_on_costs_no_other_its_mask(tiny_model, tmp_path):
    """One for which memory is not enough, here all white, in a batch with others."""
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(png(seed, 64, 64))
    (tmp_path / "white.png").write_bytes(encoded(Image.new("RGB", (64, 64), "white"), "PNG"))
    listed = [{"image_uri": item.url, "version": item.version} for item in storage.list_objects(str(tmp_path))]
    segmenter = Segmenter(tiny_model, InferenceConfig())
    failures: list[type[RuntimeError]] = [torch.OutOfMemoryError]

    def fail_on_white(model: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:  # noqa: ARG001
        if (arguments[0].amax((2, 3)) == arguments[0].amin((2, 3))).all(1).any():
            raise failures[0]("CUDA out of memory.\nTried to allocate 3 GiB.")

    segmenter.predictor.model.register_forward_pre_hook(fail_on_white)
    pixels = read_listed(tmp_path, listed)
    rows = segmenter(pixels).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "inference_error"]
    assert [row["class_map"] is not None for row in rows] == [True, True, True, False]
    assert rows[-1]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB."

    failures[0] = torch.AcceleratorError
    with pytest.raises(torch.AcceleratorError):  # no image's fault: nothing works on that device any more
        segmenter(pixels)


@dataclasses.dataclass(frozen=True)
class _FragileReader(ImageReader):
    """Reads as ever, but a photograph of one pixel's height ends its process."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        def decode(data: bytes) -> np.ndarray:
            image = decode_photograph(data)
            if image.shape[0] == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return image

        with mock.patch.object(prediction_rows, "decode_photograph", decode):
            yield from super().__call__(batch)


class _FragileSegmenter(Segmenter):
    """Segments as ever, but a photograph of two pixels' height ends its process."""

    def _segment(self, rows: list[dict], readable: list[int], pixels: pa.ChunkedArray) -> None:
        if any(rows[index]["height"] == 2 for index in readable):
            os.kill(os.getpid(), signal.SIGKILL)
        super()._segment(rows, readable, pixels)


@pytest.mark.usefixtures("ray_cluster")
def test_an_image_that_processes_die_on_is_a_row_and_costs_no_other_its_mask(tiny_model, tmp_path, monkeypatch):
    images, out = tmp_path / "images", str(tmp_path / "out")
    images.mkdir()
    for number in range(6):
        (images / f"{number}.png").write_bytes(png(number))
    (images / "2.png").write_bytes(png(2, height=1))
    (images / "4.png").write_bytes(png(4, height=2))
    with monkeypatch.context() as patched:
        patched.setattr(segmentation, "ImageReader", _FragileReader)
        patched.setattr(segmentation, "Segmenter", _FragileSegmenter)
        record = segment(config_of(tiny_model, str(images), out, batch_size=3))
    assert (record.counts["ok"], record.counts["failed"]) == (4, 2)
    rows = rows_of(out)
    assert {name for name, row in rows.items() if row["status"] == "ok"} == {"0.png", "1.png", "3.png", "5.png"}
    assert {name: row["error"] for name, row in rows.items() if row["status"] == "crashed"} == {
        "2.png": "the process that was to read it died 3 times, as for want of memory",
        "4.png": "the process that was to segment it died 3 times, as for want of memory",
    }
    segment(config_of(tiny_model, str(images), out))
    assert {name: row["status"] for name, row in rows_of(out).items()} == {f"{number}.png": "ok" for number in range(6)}
    await_release()


_KILLED = """
import sys
from pipeline import lease, mask_stager, segmentation
from pipeline.segment_config import SegmentConfig
from pipeline.segmentation import segment
lease.LEASE_SECONDS, mask_stager.COMMIT_SECONDS, segmentation.ROWS_PER_FILE = 4.0, 0.0, 2
segment(SegmentConfig(*sys.argv[1:], cpus_per_worker=0.5, batch_size=2))
"""


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_that_was_killed_is_completed_by_the_next(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 4.0)
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    names = {f"{number:02}.png" for number in range(36)}
    for name in names:
        (images / name).write_bytes(png(int(name[:2]), 300, 300))
    arguments = [tiny_model, str(images), str(out)]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen([sys.executable, "-c", _KILLED, *arguments], env=environment, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 300  # a busy machine takes long to start a worker
        while len(list(out.glob("masks/*.parquet"))) < 3:
            assert driver.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no masks appeared"
            time.sleep(0.01)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()

    record = segment(config_of(*arguments))  # at once: what is left of the killed run may still be at work
    assert 6 <= record.counts["done_before"] < len(names)
    assert record.counts["done_before"] + record.counts["ok"] == len(names)
    rows = rows_of(str(out))
    assert len(masks.read_masks(str(out))) == len(names)
    assert rows.keys() == names
    assert all(row["status"] == "ok" for row in rows.values())


def test_what_changed_between_listing_and_reading_is_not_taken_for_what_was_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "READ_WAITS", ())
    for name in ("same.png", "overwritten.png", "deleted.png"):
        (tmp_path / name).write_bytes(png(1))
    (tmp_path / "folder.png").mkdir()
    listed = {item.url: item.version for item in storage.list_objects(str(tmp_path))}
    listed[str(tmp_path / "folder.png")] = "1"
    (tmp_path / "overwritten.png").write_bytes(png(2, 41))
    (tmp_path / "deleted.png").unlink()
    rows = read_listed(
        tmp_path, [{"image_uri": uri, "version": version} for uri, version in listed.items()]
    ).to_pylist()
    assert [row["number"] for row in rows] == list(range(len(listed)))
    assert {Path(row["image_uri"]).name: row["status"] for row in rows} == {
        "same.png": "ok",
        "overwritten.png": "changed",
        "deleted.png": "changed",
        "folder.png": "storage_error",
    }


@pytest.mark.usefixtures("ray_cluster")
def test_a_broken_model_gets_one_sentence_from_the_worker_to_the_caller(tiny_model, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "whole.png").write_bytes(png(1))
    model = tmp_path / "model"
    storage.upload_folder(Path(tiny_model), str(model))
    (model / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(PipelineError):
        segment(config_of(str(model), str(images), str(tmp_path / "out")))
    document = json.loads((tmp_path / "out" / "run.json").read_text())
    assert document["outcome"] == "failed"
    assert document["error"].startswith(f"The model at {model} cannot be used: ")
    assert "Traceback" not in document["error"]
    assert masks.read_masks(str(tmp_path / "out")).num_rows == 0
