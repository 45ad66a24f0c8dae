"""Scores of a model on a labelled split of a dataset: exact sums of pixel counts over a pool of workers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray

from pipeline import dataset, storage
from pipeline.cluster import connected
from pipeline.contact_sheet import contact_sheet, prediction_panels
from pipeline.corruptions import KINDS, SEVERITIES
from pipeline.dataset import SegmentationDataset
from pipeline.diagnostics import diagnosed, diagnostics_document, diagnostics_picture, diagnostics_text
from pipeline.errors import PipelineError
from pipeline.evaluation_pictures import confusion_picture, corruption_picture
from pipeline.inference_config import InferenceConfig, inference_of
from pipeline.parquet_files import write_table
from pipeline.prediction import load_predictor, model_classes, model_id, predictor_pool
from pipeline.progress import Progress, announce
from pipeline.run_record import RunRecord, finished_record, identity, record_run, refuse_other_work
from pipeline.scoring import COLUMNS, IMAGE_SCORES, Condition, Counts, Scorer
from rssnet.classes import Classes

WORKFLOW = "evaluate"
SCORES_FILE = "scores.json"
CONFUSION_FILE = "confusion.json"
CONFUSION_PICTURE = "confusion.png"
CORRUPTIONS_PICTURE = "corruptions.png"
DIAGNOSTICS_FILE = "diagnostics.json"
DIAGNOSTICS_PICTURE = "diagnostics.png"
IMAGES_FILE = "images.parquet"
WORST_FILE = "worst.png"
WORST = 6  # images that are drawn


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a model on a labelled split.

    Args:
        model: URL of a saved model.
        dataset: URL of a canonical dataset with the model's classes.
        out: URL that the scores are written to.
        split: name of the split.
        corruptions: natural corruptions to score under too, each at five severities, separated by commas: kinds such as
            fog, groups (noise, blur, weather, digital), or all.
        diagnostics: images, spread evenly over the split, on which to measure how separate each layer's representations
            are; 0 is none. Each costs about two forward passes; 16 steady the measures and are little beside a split.
        inference: how the model is applied.
        workers: processes that hold a model each. Images come by row groups, 32 as ingest writes them: of more workers
            than the split has of these, some have nothing to do.
        use_gpu: give each of them a GPU.
        cpus_per_worker: CPUs, and threads, for each of them.
        batch_size: images that a worker gets at a time.
        new: start afresh: replace the scores that an earlier run left at the output.
    """

    model: str
    dataset: str
    out: str
    split: str = "val"
    corruptions: str | None = None
    diagnostics: int = 16
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    workers: int = field(default=1, metadata={"identity": False})
    use_gpu: bool = field(default=False, metadata={"identity": False})
    cpus_per_worker: float = field(default=1, metadata={"identity": False})
    batch_size: int = field(default=4, metadata={"identity": False})
    new: bool = field(default=False, metadata={"identity": False})


def evaluate(config: EvaluateConfig) -> RunRecord:
    """Score the model; write scores as JSON, Parquet and pictures, and the run record.

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
    if config.diagnostics < 0:
        raise PipelineError(f"diagnostics is {config.diagnostics}: give a number of images, 0 being none.")
    _require_same_classes(config, model_classes(config.model), data.classes)
    inputs = {"model": model_id(config.model, config.inference), "dataset": data.info.fingerprint}
    if not config.new:
        finished = finished_record(config.out, WORKFLOW, config, inputs)
        if finished:
            announce(f"already evaluated: {config.out} ({scores_text(finished.results)})")
            return finished
        refuse_other_work(config.out, WORKFLOW, config, inputs)
    conditions = _conditions(config)
    outputs = [SCORES_FILE, CONFUSION_FILE, CONFUSION_PICTURE, IMAGES_FILE, WORST_FILE]
    outputs += [CORRUPTIONS_PICTURE] if conditions else []
    outputs += [DIAGNOSTICS_FILE, DIAGNOSTICS_PICTURE] if config.diagnostics else []
    # Nothing goes on from what an unfinished run, perhaps of another configuration, has left here.
    with connected(), record_run(config.out, WORKFLOW, config, inputs, outputs, keep=False) as record:
        counts = _evaluate_split(config, data, conditions)
        scored = [image for image in counts.images if image["pixels"]]
        if not scored:
            raise PipelineError(f"No image of the split {config.split!r} of {data.url} has a labelled pixel.")
        worst = sorted(scored, key=lambda image: (image["miou"], image["image_id"]))[:WORST]
        _as_task(config, _write_worst, worst)
        if config.diagnostics:
            announce(f"  {_as_task(config, _write_diagnostics)}")
        record.counts = {"images": len(counts.images), "pixels": int(counts.confusion.counts.sum())}
        scores = counts.confusion.scores().to_dict()
        record.results = {name: scores[name] for name in ("miou", "macc", "aacc", "fwiou", "mdice")}
        record.results["boundary_miou"] = counts.boundary.scores().to_dict()["miou"]
        document = {
            "dataset": config.dataset,
            "split": config.split,
            "model": config.model,
            "model_id": inputs["model"],
            "inference": identity(inference_of(config.model, config.inference)),
            **record.counts,
            **record.results,
            "classes": _class_rows(counts, data.classes),
        }
        if conditions:
            document["corruptions"] = _corruption_scores(counts)
            picture = corruption_picture(document["corruptions"], counts.confusion.scores().miou)
            storage.write_bytes(storage.join(config.out, CORRUPTIONS_PICTURE), picture)
            for name in ("mean_miou", "retention"):
                record.results[f"corrupted_{name}"] = document["corruptions"][name]
        confusion = {"names": list(data.classes.names), "rows": "truth", "counts": counts.confusion.to_list()}
        storage.write_json(storage.join(config.out, CONFUSION_FILE), confusion)
        picture = confusion_picture(counts.confusion.counts.numpy(), data.classes.names)
        storage.write_bytes(storage.join(config.out, CONFUSION_PICTURE), picture)
        images = pa.Table.from_pylist(counts.images, schema=IMAGE_SCORES).sort_by("image_id")
        write_table(storage.join(config.out, IMAGES_FILE), images)
        storage.write_json(storage.join(config.out, SCORES_FILE), document)
    announce(
        f"evaluated {config.model} on {len(counts.images)} images of {config.split} ({scores_text(record.results)})"
    )
    return record


def _conditions(config: EvaluateConfig) -> list[Condition]:
    """The corruptions that are asked for, each at each severity.

    Raises:
        PipelineError: for a name that is neither a kind, nor a group of kinds, nor `all`.
    """
    named = {kind: (kind,) for kinds in KINDS.values() for kind in kinds} | KINDS
    named["all"] = tuple(kind for kinds in KINDS.values() for kind in kinds)
    kinds: dict[str, None] = {}
    for name in [name.strip() for name in config.corruptions.split(",")] if config.corruptions else []:
        if name not in named:
            raise PipelineError(f"The corruption {name!r} is not known: give some of {', '.join(named)}.")
        kinds |= dict.fromkeys(named[name])
    return [Condition(kind, severity) for kind in kinds for severity in SEVERITIES]


def _evaluate_split(config: EvaluateConfig, data: SegmentationDataset, conditions: Sequence[Condition]) -> Counts:
    """The counts over all images of the split; AssertionError if one is missing or is there twice."""
    expected = data.split(config.split).rows
    pool = predictor_pool(config.workers, config.cpus_per_worker, config.use_gpu, config.batch_size)
    batches = data.ray(config.split, COLUMNS).map_batches(
        Scorer,
        fn_constructor_args=(config.model, config.inference, conditions),
        batch_format="pyarrow",
        **pool,
    )
    total = Counts(len(data.classes), conditions)
    with Progress("evaluate", expected, "images") as progress:
        for table in batches.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in cast(pa.Table, table).to_pylist():
                total.add_row(row)
                progress.reporter.advance(len(row["images"]))
    distinct = len({image["image_id"] for image in total.images})
    if not len(total.images) == distinct == expected:
        raise AssertionError(f"{expected} images became {len(total.images)} scores, {distinct} of them distinct")
    return total


def _as_task(config: EvaluateConfig, work: Callable[..., Any], *arguments: Any) -> Any:
    """Do what needs the model once more with what one of the workers had."""
    task: Any = ray.remote(work).options(num_cpus=config.cpus_per_worker, num_gpus=int(config.use_gpu))
    return ray.get(task.remote(config, *arguments))


def _write_worst(config: EvaluateConfig, images: Sequence[Mapping[str, Any]]) -> None:
    """Draw the images with the lowest scores beside their labels and what the model saw. Runs as a task."""
    data = dataset.open(config.dataset)
    scored = {str(image["image_id"]): image["miou"] for image in images}
    predictor = load_predictor(config.model, config.inference)
    panels = {}
    for chunk in data.chunks(config.split):
        ids = chunk.read(["image_id"])["image_id"].to_pylist()
        places = [place for place, image_id in enumerate(ids) if image_id in scored]
        for row in chunk.read(COLUMNS).take(places).to_pylist() if places else []:
            title = f"prediction, mIoU {scored[row['image_id']]:.3f}"
            panels[row["image_id"]] = prediction_panels(row, predictor, title)
    picture = contact_sheet([panels[image_id] for image_id in scored], data.classes)
    storage.write_bytes(storage.join(config.out, WORST_FILE), picture)


def _write_diagnostics(config: EvaluateConfig) -> str:
    """Measure, write the table and the plot, and return them in a few words. Runs as a task."""
    data = dataset.open(config.dataset)
    predictor = load_predictor(config.model, config.inference)
    images = min(config.diagnostics, data.split(config.split).rows)
    table = diagnosed(predictor, data.spread_rows(config.split, images, COLUMNS))
    document = {
        "model": config.model,
        "dataset": config.dataset,
        "split": config.split,
        "images": images,
        "crop_size": predictor.crop_size,
        "layers": diagnostics_document(table),
    }
    storage.write_json(storage.join(config.out, DIAGNOSTICS_FILE), document)
    made_of = predictor.model.config
    title = f"{made_of.head} on {made_of.backbone}, layer by layer, on {images} images of {config.split}"
    storage.write_bytes(storage.join(config.out, DIAGNOSTICS_PICTURE), diagnostics_picture(table, title))
    return f"separation on {images} images: {diagnostics_text(table)}"


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


def _class_rows(counts: Counts, classes: Classes) -> list[dict[str, Any]]:
    """One row of the table of classes for each class; a score without a denominator is None."""
    scores, boundary = counts.confusion.scores().to_dict(), counts.boundary.scores().to_dict()
    columns = {"iou": scores["iou"], "acc": scores["acc"], "dice": scores["dice"], "boundary_iou": boundary["iou"]}
    pixels = counts.confusion.counts.sum(1).tolist()
    return [
        {
            "id": index,
            "name": name,
            **{column: cast(list[float | None], values)[index] for column, values in columns.items()},
            "pixels": pixels[index],
        }
        for index, name in enumerate(classes.names)
    ]


def _corruption_scores(counts: Counts) -> dict[str, Any]:
    """The mIoU of each kind by severity, its mean, and which share of the clean mIoU that is."""
    kinds: dict[str, list[float]] = {}
    for condition, miou in zip(counts.conditions, counts.corrupted_miou(), strict=True):
        kinds.setdefault(condition.kind, []).append(miou)
    clean = counts.confusion.scores().miou
    mean = float(np.mean(list(kinds.values())))
    rows = [{"kind": kind, "miou": mious, "mean": float(np.mean(mious))} for kind, mious in kinds.items()]
    return {"mean_miou": mean, "retention": mean / clean if clean else None, "kinds": rows}


def scores_text(scores: Mapping[str, float | None]) -> str:
    """The scores of a record in a few words; a score is None where no class has any pixel."""
    shown = {"mIoU": scores["miou"], "pixel accuracy": scores["aacc"]}
    return ", ".join(f"{name} {'none' if value is None else format(value, '.3f')}" for name, value in shown.items())
