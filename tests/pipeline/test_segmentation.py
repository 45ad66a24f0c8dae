"""What a bucket of images becomes: each image one row, exactly once, whatever changes between runs."""

import dataclasses
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

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

from pipeline import mask_store, mask_summary, masks, segmentation, storage
from pipeline.cluster import IO_TASK_CPUS
from pipeline.command_line import WrongCall, parse, parser_for
from pipeline.errors import PipelineError
from pipeline.images import decode_photograph
from pipeline.inference_config import InferenceConfig
from pipeline.lease import Lease
from pipeline.mask_products import ProductsConfig
from pipeline.mask_stager import Ledger
from pipeline.parquet_files import write_table
from pipeline.prediction import load_predictor, model_classes, model_id
from pipeline.run_record import RunRecord, read_record, record_run
from pipeline.segment_config import SegmentConfig
from pipeline.segmentation import segment
from tests.pipeline.image_files import encoded
from tests.pipeline.leftovers import living_actors
from tests.pipeline.prediction_table import prediction_row, prediction_table
from tests.pipeline.segmentations import config_of, files_of, png, rows_of

REPOSITORY = Path(__file__).parents[2]
ODD_NAMES = ("with blank.png", "100%25.png", "a#b?.png", "c+d.png", "straße/日本.png")


def _portrait() -> bytes:
    """A JPEG that is stored 60 wide and 40 high, and to be shown turned, 40 wide and 60 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(png(1, 40, 60))) as image:
        return encoded(image, "JPEG", exif=exif)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many kinds, files that are no images, and one that only looks like one by its name."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "straße").mkdir()
    for seed, name in enumerate(ODD_NAMES):
        (folder / name).write_bytes(png(seed, 30 + seed, 90 - seed))
    (folder / "portrait.jpg").write_bytes(_portrait())
    (folder / "grey.PNG").write_bytes(encoded(Image.open(io.BytesIO(png(7))).convert("L"), "PNG"))
    (folder / "large.png").write_bytes(png(8, 150, 131))
    (folder / "pixel.png").write_bytes(png(9, 1, 1))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "cut.png").write_bytes(png(10)[:-40])
    (folder / "notes.txt").write_text("not asked for")
    (folder / ".hidden.png").write_bytes(png(11))
    return folder


@pytest.fixture(scope="module")
def segmented(
    ray_cluster: None,  # noqa: ARG001
    tiny_model: str,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[SegmentConfig, RunRecord]:
    config = config_of(tiny_model, str(folder), str(tmp_path_factory.mktemp("segmented")), workers=2)
    return config, segment(config)


def test_each_image_has_a_mask_of_its_size_as_the_model_alone_makes_it(segmented, tiny_model):
    rows = {name: row for name, row in rows_of(segmented[0].out).items() if row["status"] == "ok"}
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
    bad = {name: row for name, row in rows_of(segmented[0].out).items() if row["status"] != "ok"}
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
    files, record = files_of(config.out), Path(config.out, "run.json").read_bytes()
    assert segment(config) == first
    out = capsys.readouterr().out
    assert "nothing new: all 12 images" in out
    assert "3 of them without a mask (status and error say why)" in out
    assert (files_of(config.out), Path(config.out, "run.json").read_bytes()) == (files, record)


@pytest.mark.usefixtures("ray_cluster")
def test_only_new_and_changed_objects_of_a_bucket_are_segmented(tiny_model, bucket):
    images, out = storage.join(bucket, "images"), storage.join(bucket, "out")
    for seed, name in enumerate(ODD_NAMES):
        storage.write_bytes(storage.join(images, name), png(seed))
    segment(config_of(tiny_model, images, out))
    before, files = rows_of(out), files_of(out)

    storage.write_bytes(storage.join(images, ODD_NAMES[0]), png(20))
    storage.write_bytes(storage.join(images, "later/new.png"), png(21))
    record = segment(config_of(tiny_model, images, out))

    assert record.counts == {"listed": 6, "other_files": 0, "done_before": 4, "ok": 2, "failed": 0}
    assert files < files_of(out)
    rows = masks.read_masks(out).to_pylist()
    assert len(rows) == 7
    versions = {(row["image_uri"], row["version"]) for row in rows}
    assert versions > {(item.url, item.version) for item in storage.list_objects(images)}
    assert (storage.join(images, ODD_NAMES[0]), before[ODD_NAMES[0]]["version"]) in versions


@pytest.mark.usefixtures("ray_cluster")
def test_another_model_adds_rows_and_a_fresh_start_leaves_only_its_own(tiny_model, tmp_path):
    images, out = tmp_path / "images", str(tmp_path / "out")
    (images / "night").mkdir(parents=True)
    for name in ("a.png", "night/b.png", "night/c.png"):
        (images / name).write_bytes(png(len(name)))
    of_other_model = [
        {**dict.fromkeys(masks.PREDICTION_SCHEMA.names), "model_id": "another", "image_uri": item.url}
        | {"version": item.version, "status": "ok"}
        for item in storage.list_objects(str(images))
    ]
    earlier = pa.Table.from_pylist(of_other_model, schema=masks.PREDICTION_SCHEMA)
    write_table(storage.join(out, mask_store.FOLDER, "part-earlier.parquet"), earlier)

    config = config_of(tiny_model, str(images), out, exclude=("*/c.png",), inference=InferenceConfig(flip=True))
    segment(config)
    assert Counter(masks.read_masks(out)["model_id"].to_pylist()) == {
        "another": 3,
        model_id(tiny_model, config.inference): 2,
    }

    segment(dataclasses.replace(config, include=("night/*",), new=True))
    assert rows_of(out).keys() == {"b.png"}


@pytest.mark.usefixtures("ray_cluster")
def test_a_new_model_replaces_the_old_one_and_rows_of_what_is_gone_are_pruned(tiny_model, tmp_path):
    images, out, model = tmp_path / "images", str(tmp_path / "out"), tmp_path / "model"
    (images / "day 2026-11-25").mkdir(parents=True)
    for seed, name in enumerate(("kept.png", "deleted.png", "overwritten.png", "day 2026-11-25/bad.png")):
        (images / name).write_bytes(png(seed) if seed < 3 else b"")
    storage.upload_folder(Path(tiny_model), str(model))
    first = segment(config_of(str(model), str(images), out))
    elsewhere = prediction_row("/elsewhere/a.png", model_id=first.results["model_id"])
    write_table(storage.join(out, mask_store.FOLDER, "part-elsewhere.parquet"), prediction_table(elsewhere))

    (images / "deleted.png").unlink()
    (images / "overwritten.png").write_bytes(png(20, 41))
    weights = model / "model.safetensors"
    state = safetensors.torch.load_file(str(weights))
    safetensors.torch.save_file({name: value * 1.01 for name, value in state.items()}, str(weights))
    config = config_of(str(model), str(images), out, replace_model=True, prune=True, compact=True, summary=True)
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
    assert len(files_of(out)) == 1
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
            ("a#1.png", png(1, 150, 131)),
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
    record = segment(config_of(tiny_model, photos, out, products=products))
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
        segment(config_of(tiny_model, photos, out, products=ProductsConfig(classes=("lake",))))


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
        segment(config_of(tiny_model, str(tmp_path / "list.txt"), str(tmp_path / "out"), prune=True))


def test_patterns_that_yaml_does_not_understand_are_answered_with_how_a_list_is_written():
    with pytest.raises(WrongCall, match=r"""include is \[\*\.png\]: give a list of texts, such as '\["a", "b"\]'"""):
        parse(parser_for(SegmentConfig), SegmentConfig, ["--out", "o", "--include", "[*.png]"])
    config = parse(
        parser_for(SegmentConfig), SegmentConfig, ["--out", "o", "--compact", "true", "--include", '["*.png"]']
    )
    assert config.include == ("*.png",)


@pytest.mark.usefixtures("ray_cluster")
def test_masks_are_stored_while_the_model_works(tiny_model, tmp_path, monkeypatch):
    """On exactly the CPUs that are asked for; on an eighth less the last stage would begin when the model has ended."""
    for number in range(24):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    monkeypatch.setattr(segmentation, "ROWS_PER_FILE", 4)
    models = []

    def take(ledger: Ledger, file: dict[str, Any]) -> int:
        models.append(sum("Segmenter" in name for name in living_actors()))
        return taken(ledger, file)

    taken = Ledger.take
    monkeypatch.setattr(Ledger, "take", take)
    cpus = ray.cluster_resources()["CPU"] - segmentation.CPUS_BESIDE
    segment(config_of(tiny_model, str(tmp_path), str(tmp_path / "out"), cpus_per_worker=cpus))
    assert len(models) >= 6
    assert models[0] == 1, "the model had ended before a single file was stored"


@pytest.mark.parametrize("cpus", [2, 3, 4, 8, 16, 64, 256])
def test_each_stage_has_a_task_whatever_the_models_leave(cpus, monkeypatch):
    """By Ray Data's rule: each stage in turn keeps back its share of a ratio of all CPUs, and a task's at least."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus)})
    for models in np.arange(0.125, cpus - segmentation.CPUS_BESIDE + 0.01, 0.125):
        with segmentation._data_settings(SegmentConfig("m", "i", "o", cpus_per_worker=float(models))):
            share = cpus * ray.data.DataContext.get_current().op_resource_reservation_ratio / 4
        tasks = (IO_TASK_CPUS, IO_TASK_CPUS, segmentation.STAGING_CPUS)
        assert models + sum(max(share, least) for least in tasks) <= cpus + 1e-9, models
        assert share == cpus / 8 or share >= (cpus - models) / 6, "so small a ratio slows the other stages down"


@pytest.mark.usefixtures("ray_cluster")
def test_wrong_input_gets_one_sentence(tiny_model, folder, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(PipelineError, match=r"There is no model at .*/nowhere \(no config.json\)"):
        segment(config_of(str(tmp_path / "nowhere"), str(folder), out))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model").symlink_to(tiny_model)
    with pytest.raises(PipelineError, match=r"There is no model at .*/run \(.*\), but one at .*/run/model: give that"):
        segment(config_of(str(tmp_path / "run"), str(folder), out))
    with pytest.raises(PipelineError, match=r"There is nothing at .*/nowhere: correct the URL"):
        segment(config_of(tiny_model, str(tmp_path / "nowhere"), out))
    with pytest.raises(PipelineError, match="no bucket named no-such-bucket"):
        segment(config_of(tiny_model, "s3://no-such-bucket/images", out))
    assert not Path(out).exists()
    with pytest.raises(PipelineError, match=r"64 workers .* need 64\.625 CPUs and 0 GPUs, but the cluster has \d+"):
        segment(config_of(tiny_model, str(folder), out, workers=64, cpus_per_worker=1))
    with pytest.raises(PipelineError, match=r"need [\d.]+ CPUs and 1 GPUs, but the cluster has"):
        segment(config_of(tiny_model, str(folder), out, use_gpu=True))
    with record_run(str(tmp_path / "other"), "evaluate", InferenceConfig(), {}, []):
        pass
    with pytest.raises(PipelineError, match="holds the output of evaluate"):
        segment(config_of(tiny_model, str(folder), str(tmp_path / "other"), new=True))


@pytest.mark.usefixtures("ray_cluster")
def test_an_empty_folder_is_no_failure(tiny_model, tmp_path):
    (tmp_path / "images").mkdir()
    record = segment(config_of(tiny_model, str(tmp_path / "images"), str(tmp_path / "out")))
    assert record.counts == {"listed": 0, "other_files": 0, "done_before": 0, "ok": 0, "failed": 0}


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
