"""What a bucket of images becomes: each image one row, exactly once, whatever happens between and during runs."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import safetensors.torch
import torch
from PIL import Image

from pipeline import lease, mask_store, mask_summary, masks, prediction_rows, segmentation, storage
from pipeline.errors import PipelineError
from pipeline.image_sources import LISTED, reading
from pipeline.images import decode_photograph
from pipeline.inference_config import InferenceConfig, inference_of, write_inference
from pipeline.lease import Lease
from pipeline.mask_products import ProductsConfig
from pipeline.parquet_files import write_table
from pipeline.prediction import load_predictor, model_classes, model_id
from pipeline.prediction_rows import SLICES, ImageReader
from pipeline.run_record import RunRecord, read_record, record_run
from pipeline.segmentation import SegmentConfig, segment
from pipeline.segmenter import Segmenter
from rssnet import RSSNet
from tests.pipeline.leftovers import await_release
from tests.pipeline.prediction_table import prediction_row, prediction_table

REPOSITORY = Path(__file__).parents[2]
ODD_NAMES = ("with blank.png", "100%25.png", "a#b?.png", "c+d.png", "straße/日本.png")


def _png(seed: int, height: int = 40, width: int = 70) -> bytes:
    """A photograph's worth of blocks of colour, another one for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    pixels = blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return _encoded(Image.fromarray(pixels), "PNG")


def _encoded(image: Image.Image, encoding: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    return buffer.getvalue()


def _portrait() -> bytes:
    """A JPEG that is stored 60 wide and 40 high, and to be shown turned, 40 wide and 60 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(_png(1, 40, 60))) as image:
        return _encoded(image, "JPEG", exif=exif)


def _config(model: str, images: str, out: str, **settings: object) -> SegmentConfig:
    return dataclasses.replace(SegmentConfig(model, images, out, cpus_per_worker=0.5, batch_size=2), **settings)


def _read(folder: Path, listed: list[dict[str, str]]) -> pa.Table:
    """What reading gives of some listed images, the list of which is kept in a folder."""
    place = str(folder / ".listed.parquet")
    write_table(place, pa.Table.from_pylist([{**dict.fromkeys(LISTED.names), **row} for row in listed], LISTED))
    slices = [{"file": place, "start": start, "stop": start + 1, "number": start} for start in range(len(listed))]
    return pa.concat_tables(ImageReader()(pa.Table.from_pylist(slices, SLICES)))


def _rows(url: str) -> dict[str, dict]:
    """The rows at `url` by the last part of the image's URI; every key is there once."""
    rows = masks.read_masks(url).to_pylist()
    assert max(Counter(tuple(row[name] for name in masks.KEY) for row in rows).values(), default=1) == 1
    return {row["image_uri"].rpartition("/")[2]: row for row in rows}


def _files(url: str) -> set[tuple[str, str]]:
    return {(item.url, item.version) for item in storage.list_objects(storage.join(url, mask_store.FOLDER))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many kinds, files that are no images, and one that only looks like one by its name."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "straße").mkdir()
    for seed, name in enumerate(ODD_NAMES):
        (folder / name).write_bytes(_png(seed, 30 + seed, 90 - seed))
    (folder / "portrait.jpg").write_bytes(_portrait())
    (folder / "grey.PNG").write_bytes(_encoded(Image.open(io.BytesIO(_png(7))).convert("L"), "PNG"))
    (folder / "large.png").write_bytes(_png(8, 150, 131))
    (folder / "pixel.png").write_bytes(_png(9, 1, 1))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "cut.png").write_bytes(_png(10)[:-40])
    (folder / "notes.txt").write_text("not asked for")
    (folder / ".hidden.png").write_bytes(_png(11))
    return folder


@pytest.fixture(scope="module")
def segmented(
    ray_cluster: None,  # noqa: ARG001
    tiny_model: str,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[SegmentConfig, RunRecord]:
    config = _config(tiny_model, str(folder), str(tmp_path_factory.mktemp("segmented")), workers=2)
    return config, segment(config)


def test_each_image_has_a_mask_of_its_size_as_the_model_alone_makes_it(segmented, tiny_model):
    rows = {name: row for name, row in _rows(segmented[0].out).items() if row["status"] == "ok"}
    assert len(rows) == 9
    predictor = load_predictor(tiny_model, InferenceConfig())
    for row in rows.values():
        pixels = decode_photograph(Path(row["image_uri"]).read_bytes())
        (expected,) = predictor([torch.tensor(pixels).permute(2, 0, 1)])
        mask = masks.decode(row)
        assert mask.shape == (row["height"], row["width"]) == pixels.shape[:2]
        # Windows share batches with those of other images, which may tip a tie between classes.
        assert (mask == expected.class_map.numpy()).mean() > 0.995
        assert row["confidence"] == pytest.approx(expected.confidence.mean().item(), rel=1e-3)
        assert dict(zip(row["class_ids"], row["class_pixels"], strict=True)) == Counter(mask.ravel().tolist())
    assert masks.decode(rows["portrait.jpg"]).shape == (60, 40)
    assert len(rows["large.png"]["class_ids"]) > 1


def test_names_are_kept_as_they_are(segmented, folder):
    uris = set(masks.read_masks(segmented[0].out)["image_uri"].to_pylist())
    assert {str(folder / name) for name in ODD_NAMES} <= uris


def test_an_image_that_cannot_be_used_is_a_row_that_says_why(segmented):
    bad = {name: row for name, row in _rows(segmented[0].out).items() if row["status"] != "ok"}
    assert {name: row["status"] for name, row in bad.items()} == {
        "empty.jpg": "empty",
        "page.jpg": "not_an_image",
        "cut.png": "damaged",
    }
    assert all(row["error"] and row["mask"] is None and row["height"] is None for row in bad.values())


def test_counts_add_up_and_say_what_was_passed_over(segmented):
    record = read_record(segmented[0].out)
    assert record is not None
    assert record.outcome == "done"
    assert record.counts == {"listed": 12, "other_files": 1, "done_before": 0, "ok": 9, "failed": 3}
    assert record.results["statuses"] == {"damaged": 1, "empty": 1, "not_an_image": 1, "ok": 9}
    assert {failure["status"] for failure in record.results["first_failures"]} == {"empty", "not_an_image", "damaged"}


def test_duckdb_and_polars_read_the_rows(segmented):
    files = f"{segmented[0].out}/masks/*.parquet"
    statuses = {"ok": 9, "empty": 1, "not_an_image": 1, "damaged": 1}
    assert dict(duckdb.execute(f"SELECT status, count(*) FROM '{files}' GROUP BY ALL").fetchall()) == statuses
    found = polars.scan_parquet(files).group_by("status").len().collect()
    assert dict(found.iter_rows()) == statuses
    pixels = polars.scan_parquet(files).select(polars.col("class_pixels").list.sum().sum()).collect().item()
    by_duckdb = duckdb.execute(f"SELECT sum(list_sum(class_pixels)) FROM '{files}'").fetchone()
    assert by_duckdb == (pixels,)


def test_a_second_run_writes_nothing(segmented, capsys):
    config, first = segmented
    files, record = _files(config.out), Path(config.out, "run.json").read_bytes()
    assert segment(config) == first
    assert "nothing new" in capsys.readouterr().out
    assert (_files(config.out), Path(config.out, "run.json").read_bytes()) == (files, record)


@pytest.mark.usefixtures("ray_cluster")
def test_only_new_and_changed_objects_of_a_bucket_are_segmented(tiny_model, bucket):
    images, out = storage.join(bucket, "images"), storage.join(bucket, "out")
    for seed, name in enumerate(ODD_NAMES):
        storage.write_bytes(storage.join(images, name), _png(seed))
    segment(_config(tiny_model, images, out))
    before, files = _rows(out), _files(out)

    storage.write_bytes(storage.join(images, ODD_NAMES[0]), _png(20))
    storage.write_bytes(storage.join(images, "later/new.png"), _png(21))
    record = segment(_config(tiny_model, images, out))

    assert record.counts == {"listed": 6, "other_files": 0, "done_before": 4, "ok": 2, "failed": 0}
    assert files < _files(out)
    rows = masks.read_masks(out).to_pylist()
    assert len(rows) == 7
    versions = {(row["image_uri"], row["version"]) for row in rows}
    assert versions > {(item.url, item.version) for item in storage.list_objects(images)}
    assert (storage.join(images, ODD_NAMES[0]), before[ODD_NAMES[0]]["version"]) in versions


@pytest.fixture
def archived(bucket: str) -> Iterator[str]:
    """Where two objects lie in an archive: they are listed, but cannot be read."""
    url = storage.join(bucket, "images")
    for name in ("archived.png", "still archived.png"):
        _put(storage.join(url, name), _png(1), StorageClass="GLACIER")
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
        segment(_config(tiny_model, archived, out))
    before = _rows(out)
    assert {name: row["status"] for name, row in before.items()} == dict.fromkeys(before, "storage_error")
    assert "archived.png" in before["archived.png"]["error"]
    record = read_record(out)
    assert record is not None
    assert (record.outcome, record.counts["failed"]) == ("failed", 2)

    _put(storage.join(archived, "archived.png"), _png(1))  # taken out of the archive it has the same version
    counts = segment(_config(tiny_model, archived, out)).counts
    assert (counts["done_before"], counts["ok"], counts["failed"]) == (0, 1, 1)
    after = _rows(out)
    assert {name: row["status"] for name, row in after.items()} == {
        "archived.png": "ok",
        "still archived.png": "storage_error",
    }
    assert after["archived.png"]["version"] == before["archived.png"]["version"]


@pytest.mark.usefixtures("ray_cluster")
def test_what_cannot_be_fetched_does_not_keep_new_images_from_being_added(tiny_model, archived, bucket, capsys):
    out = storage.join(bucket, "out")
    segment(_config(tiny_model, _with_one_good_image(archived), out, exclude=("still*", "archived*")))
    record = segment(_config(tiny_model, archived, out))
    assert (record.outcome, record.counts["done_before"], record.counts["failed"]) == ("done", 1, 2)
    assert "2 images could not be segmented" in capsys.readouterr().out


def _with_one_good_image(url: str) -> str:
    storage.write_bytes(storage.join(url, "good.png"), _png(1))
    return url


@pytest.mark.usefixtures("ray_cluster")
def test_a_model_that_fails_on_every_image_fails_the_run(tiny_model, folder, tmp_path):
    model = RSSNet.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.save_pretrained(str(tmp_path / "model"))
    out = str(tmp_path / "out")
    config = _config(str(tmp_path / "model"), str(folder), out, include=("c*.png",))
    with pytest.raises(PipelineError, match=r"The model failed on every image .*, 1 in all: .* no numbers"):
        segment(config)
    rows = _rows(out)
    assert {name: row["status"] for name, row in rows.items()} == {"c+d.png": "inference_error", "cut.png": "damaged"}
    assert rows["c+d.png"]["mask"] is None
    with pytest.raises(PipelineError, match="The model failed on every image"):
        segment(config)  # tried again, and no row doubled
    assert _rows(out).keys() == rows.keys()
    await_release()


def test_an_image_that_the_model_fails_on_costs_no_other_its_mask(tiny_model, tmp_path):
    """One for which memory is not enough, here all white, in a batch with others."""
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(_png(seed, 64, 64))
    (tmp_path / "white.png").write_bytes(_encoded(Image.new("RGB", (64, 64), "white"), "PNG"))
    listed = [{"image_uri": item.url, "version": item.version} for item in storage.list_objects(str(tmp_path))]
    segmenter = Segmenter(tiny_model, InferenceConfig())
    failures: list[type[RuntimeError]] = [torch.OutOfMemoryError]

    def fail_on_white(model: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:  # noqa: ARG001
        if (arguments[0].amax((2, 3)) == arguments[0].amin((2, 3))).all(1).any():
            raise failures[0]("CUDA out of memory.\nTried to allocate 3 GiB.")

    segmenter.predictor.model.register_forward_pre_hook(fail_on_white)
    pixels = _read(tmp_path, listed)
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
        (images / f"{number}.png").write_bytes(_png(number))
    (images / "2.png").write_bytes(_png(2, height=1))
    (images / "4.png").write_bytes(_png(4, height=2))
    with monkeypatch.context() as patched:
        patched.setattr(segmentation, "ImageReader", _FragileReader)
        patched.setattr(segmentation, "Segmenter", _FragileSegmenter)
        record = segment(_config(tiny_model, str(images), out, batch_size=3))
    assert (record.counts["ok"], record.counts["failed"]) == (4, 2)
    rows = _rows(out)
    assert {name for name, row in rows.items() if row["status"] == "ok"} == {"0.png", "1.png", "3.png", "5.png"}
    assert {name: row["error"] for name, row in rows.items() if row["status"] == "crashed"} == {
        "2.png": "the process that was to read it died 3 times, as for want of memory",
        "4.png": "the process that was to segment it died 3 times, as for want of memory",
    }
    segment(_config(tiny_model, str(images), out))
    assert {name: row["status"] for name, row in _rows(out).items()} == {f"{number}.png": "ok" for number in range(6)}
    await_release()


@pytest.mark.usefixtures("ray_cluster")
def test_another_model_adds_rows_and_a_fresh_start_leaves_only_its_own(tiny_model, tmp_path):
    images, out = tmp_path / "images", str(tmp_path / "out")
    (images / "night").mkdir(parents=True)
    for name in ("a.png", "night/b.png", "night/c.png"):
        (images / name).write_bytes(_png(len(name)))
    of_other_model = [
        {**dict.fromkeys(masks.PREDICTION_SCHEMA.names), "model_id": "another", "image_uri": item.url}
        | {"version": item.version, "status": "ok"}
        for item in storage.list_objects(str(images))
    ]
    earlier = pa.Table.from_pylist(of_other_model, schema=masks.PREDICTION_SCHEMA)
    write_table(storage.join(out, mask_store.FOLDER, "part-earlier.parquet"), earlier)

    config = _config(tiny_model, str(images), out, exclude=("*/c.png",), inference=InferenceConfig(flip=True))
    segment(config)
    assert Counter(masks.read_masks(out)["model_id"].to_pylist()) == {
        "another": 3,
        model_id(tiny_model, config.inference): 2,
    }

    segment(dataclasses.replace(config, include=("night/*",), new=True))
    assert _rows(out).keys() == {"b.png"}


@pytest.mark.usefixtures("ray_cluster")
def test_a_new_model_replaces_the_old_one_and_rows_of_what_is_gone_are_pruned(tiny_model, tmp_path):
    images, out, model = tmp_path / "images", str(tmp_path / "out"), tmp_path / "model"
    (images / "day 2026-11-25").mkdir(parents=True)
    for seed, name in enumerate(("kept.png", "deleted.png", "overwritten.png", "day 2026-11-25/bad.png")):
        (images / name).write_bytes(_png(seed) if seed < 3 else b"")
    storage.upload_folder(Path(tiny_model), str(model))
    first = segment(_config(str(model), str(images), out))
    elsewhere = prediction_row("/elsewhere/a.png", model_id=first.results["model_id"])
    write_table(storage.join(out, mask_store.FOLDER, "part-elsewhere.parquet"), prediction_table(elsewhere))

    (images / "deleted.png").unlink()
    (images / "overwritten.png").write_bytes(_png(20, 41))
    weights = model / "model.safetensors"
    state = safetensors.torch.load_file(str(weights))
    safetensors.torch.save_file({name: value * 1.01 for name, value in state.items()}, str(weights))
    config = _config(str(model), str(images), out, replace_model=True, prune=True, compact=True, summary=True)
    second = segment(config)

    assert second.results["model_id"] != first.results["model_id"]
    assert second.counts == {
        **{"listed": 3, "other_files": 0, "done_before": 0, "ok": 2, "failed": 1},
        # Of the first model `kept` and `bad`, and `overwritten` in the version that it had, which is gone as well.
        **{"replaced": 3, "pruned": 2, "files_merged": 0, "files_made": 0},
    }
    rows = {(row["image_uri"].rpartition("/")[2], row["model_id"]) for row in masks.read_masks(out).to_pylist()}
    old, new = first.results["model_id"], second.results["model_id"]
    assert rows == {("a.png", old), ("kept.png", new), ("overwritten.png", new), ("bad.png", new)}
    pruned = pq.read_table(storage.join(out, "pruned")).to_pylist()
    assert sorted(Path(row["image_uri"]).name for row in pruned) == ["deleted.png", "overwritten.png"]
    assert {row["model_id"] for row in pruned} == {old}
    shares = pq.read_table(storage.join(out, mask_summary.TABLE_FILE)).to_pylist()
    assert sum(row["share"] for row in shares if row["model_id"] == new) == pytest.approx(1.0)
    assert segment(config) == read_record(out)  # nothing is new, and nothing is done again


@pytest.mark.usefixtures("ray_cluster")
def test_merging_and_summing_up_need_no_model_and_leave_the_record(tmp_path):
    out = str(tmp_path)
    for number in range(3):
        write_table(
            storage.join(out, mask_store.FOLDER, f"part-{number}.parquet"),
            prediction_table(prediction_row(f"{number}.png")),
        )
    record = segment(SegmentConfig(out=out, compact=True, summary=True))
    assert record.counts == {"files_merged": 3, "files_made": 1}
    assert len(_files(out)) == 1
    assert masks.read_masks(out).num_rows == 3
    assert (tmp_path / mask_summary.PLOT_FILE).is_file()
    assert read_record(out) is None
    with pytest.raises(PipelineError, match=r"There are no masks at .*elsewhere: correct the URL"):
        segment(SegmentConfig(out=f"{out}/elsewhere", compact=True))
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ValueError, match="replace_model, prune and new need model and images"):
        SegmentConfig(out=out, compact=True, prune=True)
    halves: list[dict[str, Any]] = [{"model": "m"}, {"images": "i", "compact": True}, {}]
    for wrong in halves:
        with pytest.raises(ValueError, match="model and images go together"):
            SegmentConfig(out=out, **wrong)
    with pytest.raises(ValueError, match="out is not given"):
        SegmentConfig("m", "i")


@pytest.mark.usefixtures("ray_cluster")
def test_members_of_a_tar_get_rows_with_what_was_asked_for_beside_the_mask(tiny_model, bucket):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (
            ("a#1.png", _png(1, 150, 131)),
            ("b/ü.jpg", _portrait()),
            ("c.png", b"broken"),
            ("notes.md", b""),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    photos, out = storage.join(bucket, "photos.tar"), storage.join(bucket, "out")
    storage.write_bytes(photos, buffer.getvalue())
    names = model_classes(tiny_model).names
    overlays = storage.join(bucket, "overlays")
    products = ProductsConfig(classes=names[:3], polygons=True, confidence_map=True, top_k=2, overlays=overlays)
    record = segment(_config(tiny_model, photos, out, products=products))
    assert record.counts == {"listed": 3, "other_files": 1, "done_before": 0, "ok": 2, "failed": 1}
    rows = {row["image_uri"]: row for row in masks.read_masks(out).to_pylist()}
    assert rows.keys() == {f"{photos}#a#1.png", f"{photos}#b/ü.jpg", f"{photos}#c.png"}
    row = rows[f"{photos}#b/ü.jpg"]
    assert masks.decode(row).shape == masks.decode_confidence(row).shape == (60, 40)
    assert set(np.unique(masks.decode(row))) <= {0, 1, 2, masks.other_id(len(names))}
    assert masks.decode_top(row)[0].shape == (2, 60, 40)
    assert json.loads(row["polygons"])["type"] == "FeatureCollection"
    with Image.open(io.BytesIO(storage.read_bytes(row["overlay_uri"]))) as overlay:
        assert (overlay.format, overlay.size) == ("JPEG", (40, 60))
    with pytest.raises(PipelineError, match="The model has no class 'lake': give some of"):
        segment(_config(tiny_model, photos, out, products=ProductsConfig(classes=("lake",))))


def test_a_second_run_says_who_is_there_and_is_no_failure(tiny_model, folder, tmp_path):
    out = str(tmp_path / "out")
    command = [sys.executable, "workflows/segment.py", "--model", tiny_model, "--images", str(folder), "--out", out]
    with Lease(out, "the first"):
        ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert "lease.json is held by run the first (process " in ended.stdout
    assert sorted(path.name for path in Path(out).iterdir() if not path.name.startswith(".")) == ["lease.json"]


def test_a_manifest_says_nothing_of_what_is_deleted(tiny_model, tmp_path):
    (tmp_path / "list.txt").write_text("a.png\n")
    with pytest.raises(PipelineError, match=r"prune is true, but .*list.txt is a manifest"):
        segment(_config(tiny_model, str(tmp_path / "list.txt"), str(tmp_path / "out"), prune=True))


_KILLED = """
import sys
from pipeline import lease, mask_stager, segmentation
from pipeline.segmentation import SegmentConfig, segment
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
        (images / name).write_bytes(_png(int(name[:2]), 300, 300))
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

    record = segment(_config(*arguments))  # at once: what is left of the killed run may still be at work
    assert 6 <= record.counts["done_before"] < len(names)
    assert record.counts["done_before"] + record.counts["ok"] == len(names)
    rows = _rows(str(out))
    assert len(masks.read_masks(str(out))) == len(names)
    assert rows.keys() == names
    assert all(row["status"] == "ok" for row in rows.values())


def test_what_changed_between_listing_and_reading_is_not_taken_for_what_was_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "READ_WAITS", ())
    for name in ("same.png", "overwritten.png", "deleted.png"):
        (tmp_path / name).write_bytes(_png(1))
    (tmp_path / "folder.png").mkdir()
    listed = {item.url: item.version for item in storage.list_objects(str(tmp_path))}
    listed[str(tmp_path / "folder.png")] = "1"
    (tmp_path / "overwritten.png").write_bytes(_png(2, 41))
    (tmp_path / "deleted.png").unlink()
    rows = _read(tmp_path, [{"image_uri": uri, "version": version} for uri, version in listed.items()]).to_pylist()
    assert [row["number"] for row in rows] == list(range(len(listed)))
    assert {Path(row["image_uri"]).name: row["status"] for row in rows} == {
        "same.png": "ok",
        "overwritten.png": "changed",
        "deleted.png": "changed",
        "folder.png": "storage_error",
    }


@pytest.mark.usefixtures("ray_cluster")
def test_wrong_input_gets_one_sentence(tiny_model, folder, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(PipelineError, match=r"There is no model at .*/nowhere \(no config.json\)"):
        segment(_config(str(tmp_path / "nowhere"), str(folder), out))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model").symlink_to(tiny_model)
    with pytest.raises(PipelineError, match=r"There is no model at .*/run \(.*\), but one at .*/run/model: give that"):
        segment(_config(str(tmp_path / "run"), str(folder), out))
    with pytest.raises(PipelineError, match=r"There is nothing at .*/nowhere: correct the URL"):
        segment(_config(tiny_model, str(tmp_path / "nowhere"), out))
    with pytest.raises(PipelineError, match="no bucket named no-such-bucket"):
        segment(_config(tiny_model, "s3://no-such-bucket/images", out))
    assert not Path(out).exists()
    with pytest.raises(PipelineError, match=r"64 workers .* need 64\.25 CPUs and 0 GPUs, but the cluster has \d+"):
        segment(_config(tiny_model, str(folder), out, workers=64, cpus_per_worker=1))
    with pytest.raises(PipelineError, match=r"need [\d.]+ CPUs and 1 GPUs, but the cluster has"):
        segment(_config(tiny_model, str(folder), out, use_gpu=True))
    with record_run(str(tmp_path / "other"), "evaluate", InferenceConfig(), {}, []):
        pass
    with pytest.raises(PipelineError, match="holds the output of evaluate"):
        segment(_config(tiny_model, str(folder), str(tmp_path / "other"), new=True))


@pytest.mark.usefixtures("ray_cluster")
def test_a_broken_model_gets_one_sentence_from_the_worker_to_the_caller(tiny_model, folder, tmp_path):
    model = tmp_path / "model"
    storage.upload_folder(Path(tiny_model), str(model))
    (model / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(PipelineError):
        segment(_config(str(model), str(folder), str(tmp_path / "out")))
    document = json.loads((tmp_path / "out" / "run.json").read_text())
    assert document["outcome"] == "failed"
    assert document["error"].startswith(f"The model at {model} cannot be used: ")
    assert "Traceback" not in document["error"]
    assert masks.read_masks(str(tmp_path / "out")).num_rows == 0


@pytest.mark.usefixtures("ray_cluster")
def test_an_empty_folder_is_no_failure(tiny_model, tmp_path):
    (tmp_path / "images").mkdir()
    record = segment(_config(tiny_model, str(tmp_path / "images"), str(tmp_path / "out")))
    assert record.counts == {"listed": 0, "other_files": 0, "done_before": 0, "ok": 0, "failed": 0}


def test_settings_that_are_not_given_are_those_that_the_model_was_validated_with(tiny_model, tmp_path):
    model = tmp_path / "model"
    storage.upload_folder(Path(tiny_model), str(model))
    write_inference(model, InferenceConfig(scales=(0.5,), flip=True))
    settings = inference_of(str(model), InferenceConfig(flip=False, window_batch=2))
    assert settings == InferenceConfig(scales=(0.5,), flip=False, window_batch=2)
    assert load_predictor(str(model), settings).scales == (0.5,)
    assert model_id(str(model), InferenceConfig()) == model_id(str(model), InferenceConfig(scales=(0.5,), flip=True))
    assert model_id(str(model), InferenceConfig()) != model_id(tiny_model, InferenceConfig())
    (model / "inference.json").write_text('{"zoom": 2}')
    with pytest.raises(PipelineError, match=r"broken inference.json: it must have no fields but crop_size"):
        load_predictor(str(model), InferenceConfig())


def test_a_models_id_follows_what_the_masks_depend_on(tiny_model, tmp_path):
    storage.upload_folder(Path(tiny_model), str(tmp_path / "copy"))
    usual = model_id(tiny_model, InferenceConfig())
    assert model_id(str(tmp_path / "copy"), InferenceConfig(window_batch=2)) == usual
    assert model_id(tiny_model, InferenceConfig(stride=(32, 32))) != usual
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert model_id(str(tmp_path / "copy"), InferenceConfig()) != usual


def test_workers_that_read_and_write_do_not_load_torch():
    """They are many; each would take seconds to start."""
    names = ("prediction_rows", "census", "mask_changes", "mask_stager", "mask_summary", "image_sources")
    imports = ", ".join(f"pipeline.{name}" for name in names)
    code = f"import sys, {imports}; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_the_workflow_says_in_one_line_what_is_wrong(tmp_path):
    command = [sys.executable, "workflows/segment.py", "--model", "nowhere", "--images", ".", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: There is no model at ")
    assert len(ended.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
