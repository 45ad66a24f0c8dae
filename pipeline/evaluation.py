"""Scores of a model on a labelled split of a dataset: exact sums of pixel counts over a pool of workers."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import pyarrow as pa
import torch

from pipeline import dataset, storage
from pipeline.cluster import connected
from pipeline.dataset import SegmentationDataset
from pipeline.errors import PipelineError
from pipeline.images import decode_label, decode_photograph
from pipeline.parquet_sink import write_table
from pipeline.prediction import InferenceConfig, PredictorActor, model_classes, model_id, predictor_pool
from pipeline.progress import Progress, announce
from pipeline.run_record import RunRecord, finished_record, record_run, refuse_other_work
from rssnet.classes import Classes
from rssnet.inference import Predictor
from rssnet.metrics import ConfusionMatrix

WORKFLOW = "evaluate"
SCORES_FILE = "scores.json"
CONFUSION_FILE = "confusion.json"
IMAGES_FILE = "images.parquet"
COLUMNS = ("image_id", "image", "label")  # of a dataset's row, what evaluation reads

_IMAGE_SCORES = pa.schema(
    [("image_id", pa.string()), ("miou", pa.float64()), ("aacc", pa.float64()), ("pixels", pa.int64())]
)
_BATCH = pa.schema([("counts", pa.list_(pa.list_(pa.int64()))), ("images", pa.list_(pa.struct(list(_IMAGE_SCORES))))])


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a model on a labelled split.

    Args:
        model: URL of a saved model.
        dataset: URL of a canonical dataset with the model's classes.
        out: URL that the scores are written to.
        split: name of the split.
        inference: how the model is applied.
        workers: processes that hold a model each.
        use_gpu: give each of them a GPU.
        cpus_per_worker: CPUs, and threads, for each of them.
        batch_size: images that a worker gets at a time.
        new: start afresh: replace the scores that an earlier run left at the output.
    """

    model: str
    dataset: str
    out: str
    split: str = "val"
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    workers: int = field(default=1, metadata={"identity": False})
    use_gpu: bool = field(default=False, metadata={"identity": False})
    cpus_per_worker: float = field(default=1, metadata={"identity": False})
    batch_size: int = field(default=4, metadata={"identity": False})
    new: bool = field(default=False, metadata={"identity": False})


def evaluate(config: EvaluateConfig) -> RunRecord:
    """Score the model; write `scores.json`, `confusion.json`, `images.parquet` and the run record.

    Raises:
        PipelineError: if the model or the dataset cannot serve, or they do not have the same classes.
    """
    config = dataclasses.replace(
        config,
        model=storage.absolute(config.model),
        dataset=storage.absolute(config.dataset),
        out=storage.absolute(config.out),
    )
    data = dataset.open(config.dataset)
    data.require_labels(config.split)
    _require_same_classes(config, model_classes(config.model), data.classes)
    inputs = {"model": model_id(config.model, config.inference), "dataset": data.info.fingerprint}
    if not config.new:
        finished = finished_record(config.out, WORKFLOW, config, inputs)
        if finished:
            announce(f"already evaluated: {config.out} ({scores_text(finished.results)})")
            return finished
        refuse_other_work(config.out, WORKFLOW, config, inputs)
    outputs = [SCORES_FILE, CONFUSION_FILE, IMAGES_FILE]
    with record_run(config.out, WORKFLOW, config, inputs, outputs, keep=not config.new) as record:
        with connected():
            confusion, images = _evaluate_split(config, data)
        scores = confusion.scores().to_dict()
        record.counts = {"images": images.num_rows, "pixels": int(confusion.counts.sum())}
        record.results = {name: scores[name] for name in ("miou", "macc", "aacc", "fwiou")}
        document = {
            "dataset": config.dataset,
            "split": config.split,
            "model": config.model,
            "model_id": inputs["model"],
            **record.counts,
            **record.results,
            "classes": _class_rows(confusion, data.classes),
        }
        confusion_document = {"names": list(data.classes.names), "rows": "truth", "counts": confusion.to_list()}
        storage.write_json(storage.join(config.out, CONFUSION_FILE), confusion_document)
        write_table(storage.join(config.out, IMAGES_FILE), images)
        storage.write_json(storage.join(config.out, SCORES_FILE), document)
    announce(f"evaluated {config.model} on {images.num_rows} images of {config.split} ({scores_text(record.results)})")
    return record


def confusion_matrix(
    predictor: Predictor, rows: Iterable[dict[str, Any]], num_classes: int, batch_size: int = 4
) -> ConfusionMatrix:
    """The confusion matrix of a predictor over rows of a dataset, in this process.

    Args:
        predictor: gives class maps of full size.
        rows: dicts with the `image` and `label` of `pipeline.dataset.SCHEMA`; read once, `batch_size` at a time.
        num_classes: number of classes.
        batch_size: images given to the predictor at once.
    """
    total = ConfusionMatrix(num_classes, dataset.IGNORE_LABEL)
    for _, confusion in image_confusions(predictor, rows, num_classes, batch_size):
        total.merge(confusion)
    return total


def image_confusions(
    predictor: Predictor, rows: Iterable[dict[str, Any]], num_classes: int, batch_size: int = 4
) -> Iterator[tuple[dict[str, Any], ConfusionMatrix]]:
    """Each row with the confusion matrix of its image alone; arguments as for `confusion_matrix`."""
    waiting = iter(rows)
    while batch := list(islice(waiting, batch_size)):
        photographs = [decode_photograph(row["image"]) for row in batch]
        predictions = predictor([torch.from_numpy(photograph.copy()).permute(2, 0, 1) for photograph in photographs])
        for row, prediction in zip(batch, predictions, strict=True):
            confusion = ConfusionMatrix(num_classes, dataset.IGNORE_LABEL)
            confusion.update(prediction.class_map, torch.from_numpy(decode_label(row["label"]).copy()))
            yield row, confusion


def _evaluate_split(config: EvaluateConfig, data: SegmentationDataset) -> tuple[ConfusionMatrix, pa.Table]:
    """The summed confusion matrix and the scores of each image, sorted by `image_id`."""
    expected = data.split(config.split).rows
    num_classes = len(data.classes)
    pool = predictor_pool(config.workers, config.cpus_per_worker, config.use_gpu)
    batches = data.ray(config.split, COLUMNS).map_batches(
        _Evaluator,
        fn_constructor_args=(config.model, config.inference),
        batch_size=config.batch_size,
        batch_format="pyarrow",
        **pool,
    )
    total = ConfusionMatrix(num_classes, dataset.IGNORE_LABEL)
    images: list[dict[str, Any]] = []
    with Progress("evaluate", expected, "images") as progress:
        for table in batches.iter_batches(batch_size=None, batch_format="pyarrow"):
            for batch in cast(pa.Table, table).to_pylist():
                total.merge(ConfusionMatrix.from_list(batch["counts"], dataset.IGNORE_LABEL))
                images.extend(batch["images"])
                progress.reporter.advance(len(batch["images"]))
    distinct = len({image["image_id"] for image in images})
    if not len(images) == distinct == expected:
        raise AssertionError(f"{expected} images became {len(images)} scores, {distinct} of them distinct")
    return total, pa.Table.from_pylist(images, schema=_IMAGE_SCORES).sort_by("image_id")


class _Evaluator(PredictorActor):
    """Rows of a dataset to one row of `_BATCH`."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        num_classes = self.predictor.model.config.num_classes
        total = ConfusionMatrix(num_classes, dataset.IGNORE_LABEL)
        images = []
        for row, confusion in image_confusions(self.predictor, batch.to_pylist(), num_classes, batch.num_rows):
            total.merge(confusion)
            scores = confusion.scores()
            images.append(
                {
                    "image_id": row["image_id"],
                    "miou": scores.miou,
                    "aacc": scores.aacc,
                    "pixels": int(confusion.counts.sum()),
                }
            )
        return pa.Table.from_pylist([{"counts": total.to_list(), "images": images}], schema=_BATCH)


def _require_same_classes(config: EvaluateConfig, of_model: Classes, of_dataset: Classes) -> None:
    if len(of_model) != len(of_dataset):
        raise PipelineError(
            f"The model {config.model} has {len(of_model)} classes, the dataset {config.dataset} has "
            f"{len(of_dataset)}: evaluate it on a dataset with the classes that it was trained for."
        )
    pairs = enumerate(zip(of_model.names, of_dataset.names, strict=True))
    different = [f"{index} is {ours!r} and {theirs!r}" for index, (ours, theirs) in pairs if ours != theirs]
    if different:
        raise PipelineError(
            f"The model {config.model} and the dataset {config.dataset} name their classes differently "
            f"({', '.join(different[:3])}): evaluate it on a dataset with the classes that it was trained for."
        )


def _class_rows(confusion: ConfusionMatrix, classes: Classes) -> list[dict[str, Any]]:
    """One row of the table of classes for each class; a score without a denominator is None."""
    scores = confusion.scores().to_dict()
    iou, acc, dice = scores["iou"], scores["acc"], scores["dice"]
    assert isinstance(iou, list)
    assert isinstance(acc, list)
    assert isinstance(dice, list)
    pixels = confusion.counts.sum(1).tolist()
    return [
        {"id": index, "name": name, "iou": iou[index], "acc": acc[index], "dice": dice[index], "pixels": pixels[index]}
        for index, name in enumerate(classes.names)
    ]


def scores_text(scores: Mapping[str, float | None]) -> str:
    """The scores of a record in a few words; a score is None where no class has any pixel."""
    shown = {"mIoU": scores["miou"], "pixel accuracy": scores["aacc"]}
    return ", ".join(f"{name} {'none' if value is None else format(value, '.3f')}" for name, value in shown.items())
