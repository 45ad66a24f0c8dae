"""What a score is: the exact sum over every labelled image of a split, however it was distributed."""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from pipeline import dataset, storage
from pipeline.corruptions import corrupted
from pipeline.diagnostics import diagnosed
from pipeline.errors import PipelineError
from pipeline.evaluation import EvaluateConfig, evaluate
from pipeline.images import decode_label, decode_photograph, encode_png
from pipeline.inference_config import InferenceConfig
from pipeline.parquet_files import write_table
from pipeline.prediction import load_predictor
from pipeline.run_record import record_run
from pipeline.scoring import COLUMNS, Counts, confusion_matrix
from rssnet.classes import Classes
from rssnet.metrics import BoundaryIoU, ConfusionMatrix
from tests.pipeline.image_files import encoded

NUM_CLASSES = 6
IMAGES = 7


def _row(number: int, ignored_rows: int = 3) -> dict[str, Any]:
    """A photograph of its own size with a label in which the last class is nowhere and the top is ignored."""
    height, width = 40 + 7 * number, 90 - 5 * number
    random = np.random.default_rng(number)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    label = random.integers(0, NUM_CLASSES - 1, (height, width), dtype=np.uint8)
    label[:ignored_rows] = dataset.IGNORE_LABEL
    return {
        "image_id": f"val/{number}",
        "image": encoded(image),
        "label": encode_png(label),
        "height": height,
        "width": width,
        "source_uri": f"{number}.png",
    }


def _write_dataset(url: str, classes: Classes, ignored_rows: int = 3) -> str:
    """A dataset whose split `val` has seven images in three files, and whose split `test` has no labels."""
    rows = [_row(number, ignored_rows) for number in range(IMAGES)]
    unlabelled = [{**rows[0], "image_id": "test/0", "label": None}]
    files = {
        "val/part-a.parquet": rows[:3],
        "val/part-b.parquet": rows[3:5],
        "val/part-c.parquet": rows[5:],
        "test/part-a.parquet": unlabelled,
    }
    for path, part in files.items():
        write_table(storage.join(url, path), pa.Table.from_pylist(part, schema=dataset.SCHEMA))
    splits = {
        name: dataset.SplitInfo(rows, labelled, [0] * len(classes), {p: len(f) for p, f in files.items() if name in p})
        for name, rows, labelled in (("val", IMAGES, IMAGES), ("test", 1, 0))
    }
    palette = [list(colour) for colour in classes.palette]
    info = dataset.DatasetInfo(list(classes.names), palette, splits, 0, "here", "folders", fingerprint="1")
    dataset.write_info(url, info)
    return url


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _write_dataset(str(tmp_path_factory.mktemp("dataset")), Classes.default(NUM_CLASSES))


@pytest.fixture(scope="module")
def evaluated(
    ray_cluster: None,  # noqa: ARG001
    tiny_model: str,
    data: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> EvaluateConfig:
    out = str(tmp_path_factory.mktemp("evaluated"))
    config = EvaluateConfig(
        tiny_model, data, out, corruptions="fog, contrast", workers=2, cpus_per_worker=0.5, batch_size=2
    )
    evaluate(config)
    return config


@pytest.fixture(scope="module")
def expected(tiny_model: str, data: str) -> dict[str, np.ndarray]:
    """The (K, K) counts of each image, rows the truth, by a loop over the pixels' classes in this process."""
    predictor = load_predictor(tiny_model, InferenceConfig())
    counts = {}
    for row in dataset.open(data).rows("val"):
        pixels = torch.tensor(decode_photograph(row["image"])).permute(2, 0, 1)
        (prediction,) = predictor([pixels])
        label, class_map = decode_label(row["label"]), prediction.class_map.numpy()
        image_counts = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
        for truth in range(NUM_CLASSES):
            for predicted in range(NUM_CLASSES):
                image_counts[truth, predicted] = ((label == truth) & (class_map == predicted)).sum()
        counts[row["image_id"]] = image_counts
    return counts


def _miou(counts: np.ndarray) -> float:
    hits = counts.diagonal()
    unions = counts.sum(0) + counts.sum(1) - hits
    return float(np.mean(hits[unions > 0] / unions[unions > 0]))


def _read(config: EvaluateConfig, name: str) -> dict:
    return json.loads(Path(config.out, name).read_text())


def test_two_workers_count_what_one_process_counts(evaluated, expected):
    counts = np.array(_read(evaluated, "confusion.json")["counts"])
    total = np.sum(list(expected.values()), axis=0)
    assert (counts.sum(0) > 0).sum() > 2
    np.testing.assert_array_equal(counts.sum(1), total.sum(1))
    # Windows share batches with those of other images, which may tip a tie between classes.
    assert np.abs(counts - total).sum() <= 0.002 * total.sum()


@dataclasses.dataclass(frozen=True)
class OneProcess:
    """What a plain loop over the images, one at a time, counts with `rssnet.metrics`."""

    confusion: ConfusionMatrix
    boundary: BoundaryIoU
    images: list[dict[str, Any]]


def _in_one_process(
    model: str, data: str, inference: InferenceConfig, condition: tuple[str, int] | None = None
) -> OneProcess:
    predictor = load_predictor(model, inference)
    total = OneProcess(ConfusionMatrix(NUM_CLASSES), BoundaryIoU(NUM_CLASSES), [])
    for row in dataset.open(data).rows("val"):
        photograph, label = decode_photograph(row["image"]), torch.tensor(decode_label(row["label"]))
        if condition:
            photograph = corrupted(photograph, *condition, zlib.crc32(f"{row['image_id']}:{condition[0]}".encode()))
        (prediction,) = predictor([torch.tensor(photograph).permute(2, 0, 1)])
        assert prediction.class_map.shape == (row["height"], row["width"])
        alone = ConfusionMatrix(NUM_CLASSES)
        alone.update(prediction.class_map, label)
        total.confusion.merge(alone)
        total.boundary.update(prediction.class_map, label)
        scores, pixels = alone.scores(), int((label != dataset.IGNORE_LABEL).sum())
        total.images.append({"image_id": row["image_id"], "miou": scores.miou, "aacc": scores.aacc, "pixels": pixels})
    return total


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as the workers have: sums in another order may tip a tie between classes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ALONE = InferenceConfig(window_batch=1)  # no window shares a batch, whose size may tip a tie too


@pytest.mark.usefixtures("ray_cluster", "one_thread")
def test_three_workers_score_seven_images_exactly_as_one_process(tiny_model, data, tmp_path):
    config = EvaluateConfig(
        tiny_model, data, str(tmp_path), workers=3, cpus_per_worker=0.5, batch_size=1, inference=ALONE, diagnostics=0
    )
    evaluate(config)
    expected = _in_one_process(tiny_model, data, ALONE)
    assert _read(config, "confusion.json")["counts"] == expected.confusion.to_list()
    scores, boundary = _read(config, "scores.json"), expected.boundary.scores().to_dict()
    assert scores["boundary_miou"] == boundary["miou"]
    assert [row["boundary_iou"] for row in scores["classes"]] == boundary["iou"]
    for name in ("miou", "macc", "aacc", "fwiou", "mdice"):
        assert scores[name] == getattr(expected.confusion.scores(), name)
    assert pq.read_table(tmp_path / "images.parquet").to_pylist() == expected.images


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("world_size", [1, 3, 9])
def test_the_shards_of_a_validation_add_up_exactly_to_the_whole(tiny_model, data, world_size):
    predictor, opened = load_predictor(tiny_model, ALONE), dataset.open(data)
    total = ConfusionMatrix(NUM_CLASSES)
    for rank in range(world_size):
        rows = opened.rows("val", COLUMNS, shard=(rank, world_size))
        total.merge(confusion_matrix(predictor, rows, NUM_CLASSES))
    assert total.to_list() == _in_one_process(tiny_model, data, ALONE).confusion.to_list()


@pytest.mark.usefixtures("ray_cluster", "one_thread")
def test_scales_and_mirror_images_are_averaged_at_the_images_own_size_also_under_corruption(tiny_model, data, tmp_path):
    inference = dataclasses.replace(ALONE, scales=(0.5, 1.0, 1.5), flip=True)
    config = EvaluateConfig(
        tiny_model, data, str(tmp_path), corruptions="contrast", cpus_per_worker=1, inference=inference, diagnostics=0
    )
    evaluate(config)
    expected, plain = _in_one_process(tiny_model, data, inference), _in_one_process(tiny_model, data, ALONE)
    assert _read(config, "confusion.json")["counts"] == expected.confusion.to_list() != plain.confusion.to_list()
    scores = _read(config, "scores.json")
    assert (scores["inference"]["scales"], scores["inference"]["flip"]) == ([0.5, 1.0, 1.5], True)
    (contrast,) = scores["corruptions"]["kinds"]
    for severity in (1, 5):
        spoilt = _in_one_process(tiny_model, data, inference, ("contrast", severity)).confusion.scores()
        assert contrast["miou"][severity - 1] == pytest.approx(spoilt.miou, rel=1e-12)


def test_scores_follow_from_the_counts(evaluated):
    scores, confusion = _read(evaluated, "scores.json"), _read(evaluated, "confusion.json")
    counts = np.array(confusion["counts"])
    assert scores["miou"] == pytest.approx(_miou(counts))
    assert scores["aacc"] == pytest.approx(counts.trace() / counts.sum())
    assert (scores["images"], scores["pixels"]) == (IMAGES, counts.sum())
    assert [row["name"] for row in scores["classes"]] == confusion["names"] == list(Classes.default(NUM_CLASSES).names)
    assert [row["pixels"] for row in scores["classes"]] == counts.sum(1).tolist()
    absent = scores["classes"][NUM_CLASSES - 1]
    assert (absent["pixels"], absent["acc"]) == (0, None)


def test_each_image_has_a_score_of_its_own(evaluated, expected):
    images = pq.read_table(Path(evaluated.out, "images.parquet")).to_pylist()
    assert [image["image_id"] for image in images] == sorted(expected)
    for image in images:
        counts = expected[image["image_id"]]
        assert image["pixels"] == counts.sum()
        assert image["aacc"] == pytest.approx(counts.trace() / counts.sum(), abs=0.005)
        assert image["miou"] == pytest.approx(_miou(counts), abs=0.005)


def test_confusion_matrix_is_the_same_whatever_the_batches(tiny_model, data, expected):
    predictor = load_predictor(tiny_model, InferenceConfig(window_batch=1))
    rows = dataset.open(data).rows("val")
    counts = confusion_matrix(predictor, rows, NUM_CLASSES, batch_size=3).counts.numpy()
    total = np.sum(list(expected.values()), axis=0)
    np.testing.assert_array_equal(counts.sum(1), total.sum(1))
    assert np.abs(counts - total).sum() <= 0.002 * total.sum()


def test_a_second_evaluation_writes_nothing(evaluated, capsys):
    before = {item.url: item.version for item in storage.list_objects(evaluated.out)}
    evaluate(dataclasses.replace(evaluated, workers=1))
    assert "already evaluated" in capsys.readouterr().out
    assert {item.url: item.version for item in storage.list_objects(evaluated.out)} == before


def test_another_split_at_the_same_place_is_refused(evaluated, tmp_path):
    other = _write_dataset(str(tmp_path), Classes.default(NUM_CLASSES))
    with pytest.raises(PipelineError, match=r"of another configuration .*dataset.*--new true"):
        evaluate(dataclasses.replace(evaluated, dataset=other))


def test_what_cannot_be_evaluated_gets_one_sentence(tiny_model, data, tmp_path):
    config = EvaluateConfig(tiny_model, data, str(tmp_path / "out"))
    with pytest.raises(PipelineError, match="There is no model at"):
        evaluate(dataclasses.replace(config, model=str(tmp_path)))
    with pytest.raises(PipelineError, match="There is no finished dataset at"):
        evaluate(dataclasses.replace(config, dataset=str(tmp_path)))
    with pytest.raises(PipelineError, match="has no split 'train': choose one of val, test"):
        evaluate(dataclasses.replace(config, split="train"))
    with pytest.raises(PipelineError, match=r"'test' .* has 0 labels for 1 images"):
        evaluate(dataclasses.replace(config, split="test"))
    assert not (tmp_path / "out").exists()


def test_an_image_without_a_labelled_pixel_has_no_score_of_its_own(tiny_model):
    counts = Counts(NUM_CLASSES)
    counts.add([_row(0, ignored_rows=1000)], load_predictor(tiny_model, InferenceConfig()))
    assert counts.images == [{"image_id": "val/0", "miou": None, "aacc": None, "pixels": 0}]


def test_what_cannot_be_scored_is_named(tiny_model):
    predictor = load_predictor(tiny_model, InferenceConfig())
    good, bad = _row(0), _row(1)
    wrong = {
        "damaged or truncated": {"image": good["image"][:500]},
        "must have one shape": {"label": encode_png(np.zeros((5, 5), np.uint8))},
        "label holds the value 9": {"label": encode_png(np.full((47, 85), 9, np.uint8))},
    }
    for said, change in wrong.items():
        with pytest.raises(PipelineError, match=f"scored on 'val/1': .*{said}"):
            Counts(NUM_CLASSES).add([good, {**bad, **change}], predictor)
        with pytest.raises(PipelineError, match=f"scored on 'val/1': .*{said}"):
            confusion_matrix(predictor, [good, {**bad, **change}], NUM_CLASSES)
    with torch.no_grad():
        for parameter in predictor.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(PipelineError, match=r"scored on 'val/0', 'val/1': the model gave values that are no numbers"):
        Counts(NUM_CLASSES).add([good, bad], predictor)


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_runs_the_model_on_the_cpus_that_it_was_given(tiny_model):
    def threads() -> int:
        load_predictor(tiny_model, InferenceConfig())
        return torch.get_num_threads()

    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    assert ray.get(ray.remote(threads).options(num_cpus=2, runtime_env=environment).remote()) == 2


@pytest.mark.usefixtures("ray_cluster")
def test_nothing_of_an_unfinished_evaluation_stays(tiny_model, data, tmp_path):
    def interrupted() -> None:
        with record_run(str(tmp_path), "evaluate", {}, {}, ["corruptions.png"]):
            (tmp_path / "corruptions.png").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    record = evaluate(EvaluateConfig(tiny_model, data, str(tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {*record.outputs, "run.json"}


@pytest.mark.usefixtures("ray_cluster")
def test_batches_of_no_image_are_refused(tiny_model, data, tmp_path):
    with pytest.raises(PipelineError, match="batch_size is 0: give at least 1"):
        evaluate(EvaluateConfig(tiny_model, data, str(tmp_path / "out"), batch_size=0))


@pytest.mark.usefixtures("ray_cluster")
def test_a_split_without_a_labelled_pixel_is_refused(tiny_model, tmp_path):
    data = _write_dataset(str(tmp_path / "data"), Classes.default(NUM_CLASSES), ignored_rows=1000)
    with pytest.raises(PipelineError, match=r"No image of the split 'val' of .* has a labelled pixel"):
        evaluate(EvaluateConfig(tiny_model, data, str(tmp_path / "out")))
    assert not (tmp_path / "out" / "scores.json").exists()


def test_a_dataset_of_other_classes_is_refused(tiny_model, tmp_path):
    default = Classes.default(NUM_CLASSES)
    renamed = Classes((*default.names[:-1], "tram"), default.palette)
    config = EvaluateConfig(tiny_model, _write_dataset(str(tmp_path / "a"), renamed), str(tmp_path / "out"))
    with pytest.raises(PipelineError, match=r"name their classes differently \(5 is 'class_5' and 'tram'\)"):
        evaluate(config)
    fewer = _write_dataset(str(tmp_path / "b"), Classes.default(5))
    with pytest.raises(PipelineError, match=r"has 6 classes, the dataset .* has 5"):
        evaluate(dataclasses.replace(config, dataset=fewer))


def test_boundaries_are_scored_as_one_process_scores_them(evaluated, tiny_model, data):
    predictor = load_predictor(tiny_model, InferenceConfig())
    metric = BoundaryIoU(NUM_CLASSES)
    for row in dataset.open(data).rows("val"):
        (prediction,) = predictor([torch.tensor(decode_photograph(row["image"])).permute(2, 0, 1)])
        metric.update(prediction.class_map, torch.tensor(decode_label(row["label"])))
    scores = _read(evaluated, "scores.json")
    assert scores["boundary_miou"] == pytest.approx(metric.scores().miou, abs=0.005)
    found = [row["boundary_iou"] for row in scores["classes"][:-1]]
    np.testing.assert_allclose(found, metric.scores().iou[:-1], atol=0.005)


def test_corrupted_images_are_scored_by_kind_and_severity(evaluated, tiny_model, data):
    scores = _read(evaluated, "scores.json")
    found = scores["corruptions"]
    assert [row["kind"] for row in found["kinds"]] == ["fog", "contrast"]
    predictor = load_predictor(tiny_model, InferenceConfig())
    for row in found["kinds"]:
        counts = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
        for image in dataset.open(data).rows("val"):
            seed = zlib.crc32(f"{image['image_id']}:{row['kind']}".encode())
            spoilt = corrupted(decode_photograph(image["image"]), row["kind"], 5, seed)
            (prediction,) = predictor([torch.tensor(spoilt).permute(2, 0, 1)])
            label = decode_label(image["label"])
            known = label != dataset.IGNORE_LABEL
            np.add.at(counts, (label[known], prediction.class_map.numpy()[known]), 1)
        assert row["miou"][4] == pytest.approx(_miou(counts), abs=0.005)
        assert row["mean"] == pytest.approx(np.mean(row["miou"]))
    assert found["mean_miou"] == pytest.approx(np.mean([row["miou"] for row in found["kinds"]]))
    assert found["retention"] == pytest.approx(found["mean_miou"] / scores["miou"])


@pytest.mark.parametrize("name", ["confusion.png", "worst.png", "corruptions.png", "diagnostics.png"])
def test_pictures_are_drawn(evaluated, name):
    picture = np.asarray(Image.open(Path(evaluated.out, name)).convert("RGB"))
    assert min(picture.shape[:2]) > 200
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_separation_is_measured_layer_by_layer(evaluated, tiny_model, data):
    found = _read(evaluated, "diagnostics.json")
    assert (found["images"], found["crop_size"]) == (IMAGES, [64, 64])
    expected = diagnosed(load_predictor(tiny_model, InferenceConfig()), dataset.open(data).rows("val"))
    assert [row["layer"] for row in found["layers"]] == [row.layer for row in expected]
    for measured, row in zip(found["layers"], expected, strict=True):
        for name in ("token_cosine", "high_frequency_share", "class_scatter", "region_cosine"):
            value = math.nan if measured[name] is None else measured[name]
            assert value == pytest.approx(getattr(row, name), abs=1e-4, nan_ok=True)
    assert {"diagnostics.json", "diagnostics.png"} <= set(_read(evaluated, "run.json")["outputs"])


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("asked", "measured"), [(0, None), (3, 3)])
def test_separation_is_measured_on_as_many_images_as_are_asked_for(tiny_model, data, tmp_path, capsys, asked, measured):
    config = EvaluateConfig(tiny_model, data, str(tmp_path), diagnostics=asked)
    record = evaluate(config)
    said = capsys.readouterr().out
    assert ("diagnostics.json" in record.outputs) == (tmp_path / "diagnostics.json").exists() == bool(asked)
    if measured:
        assert _read(config, "diagnostics.json")["images"] == measured
        assert "separation on 3 images: token cosine" in said
    else:
        assert "separation" not in said


def test_a_negative_number_of_images_is_refused(tiny_model, data, tmp_path):
    with pytest.raises(PipelineError, match="diagnostics is -1: give a number of images"):
        evaluate(EvaluateConfig(tiny_model, data, str(tmp_path / "out"), diagnostics=-1))


def test_an_unknown_corruption_is_refused(tiny_model, data, tmp_path):
    config = EvaluateConfig(tiny_model, data, str(tmp_path / "out"), corruptions="noise,rain")
    with pytest.raises(PipelineError, match="The corruption 'rain' is not known: give some of gaussian_noise, "):
        evaluate(config)
    assert not (tmp_path / "out").exists()
