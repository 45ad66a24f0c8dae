"""The last stage of a whole run: gathers what the stages before it have recorded, and writes the report."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from pipeline import dataset, images, masks, storage
from pipeline.evaluation import SCORES_FILE
from pipeline.progress import announce
from pipeline.report import FILE_NAME, CurvePoint, Report, Scores, Stage, Trial, ValidationPoint, write_report
from pipeline.report_pictures import Overlay
from pipeline.run_folder import HISTORY_FILE
from pipeline.run_record import RunRecord, finished_record, read_record, record_run, refuse_other_work
from pipeline.warm_start import TRIALS_FILE

OVERLAYS = 8
STAGES = ("ingest", "train", "evaluate", "sweep", "segment")


@dataclass(frozen=True)
class ReportConfig:
    """Report on a whole run.

    Args:
        root: URL of the run, below which each stage has its place.
        out: URL that report.html is written to.
        mirror: local folder that keeps the buckets, where the S3 server is the run's own.
        new: start afresh, replacing the report.
    """

    root: str
    out: str
    mirror: str = field(default="", metadata={"identity": False})
    new: bool = field(default=False, metadata={"identity": False})


def report(config: ReportConfig) -> RunRecord:
    """Write `report.html` from the records, scores, trials and masks below `config.root`."""
    records = {name: record for name in STAGES if (record := read_record(storage.join(config.root, name)))}
    inputs = {name: record.run_id for name, record in records.items()}
    if not config.new:
        finished = finished_record(config.out, "report", config, inputs)
        if finished:
            announce(f"already reported: {config.out}/{FILE_NAME}")
            return finished
        refuse_other_work(config.out, "report", config, inputs)
    with record_run(config.out, "report", config, inputs, [FILE_NAME], keep=False) as record:
        gathered = _gathered(config, records)
        url = write_report(config.out, gathered)
        record.counts = {"overlays": len(gathered.overlays), "trials": len(gathered.trials)}
    announce(f"reported {url}")
    return record


def _gathered(config: ReportConfig, records: dict[str, RunRecord]) -> Report:
    places = {name: storage.join(config.root, name) for name in STAGES}
    data = dataset.open(places["ingest"])
    history = storage.read_json(storage.join(places["train"], HISTORY_FILE))
    model = records["train"].config["model"]
    return Report(
        title=f"RSSNet on {records['ingest'].config['source']}",
        classes=data.classes,
        dataset=places["ingest"],
        model=f"RSSNet on {model['backbone']}, {records['train'].counts['iterations']} iterations",
        counts={
            **{f"{name} images": split.rows for name, split in data.info.splits.items()},
            "rejected inputs": data.info.rejected,
            "segmented images": records["segment"].counts.get("listed", 0),
        },
        stages=[
            Stage(name, places[name], record.seconds, "done" if record.outcome == "done" else "failed", _detail(record))
            for name, record in records.items()
        ],
        scores=_scores(places["evaluate"]),
        curve=[
            CurvePoint(int(point["iteration"]), point["loss"], point["lr"])
            for point in history["training"]
            if point["loss"] is not None  # of a skipped step
        ],
        validation=[ValidationPoint(int(point["iteration"]), point["miou"]) for point in history["validation"]],
        trials=_trials(places["sweep"]),
        overlays=overlays(places["segment"], records["segment"].results["model_id"]),
        masks=places["segment"],
        mirror=Path(config.mirror) if config.mirror else None,
        versions=records["train"].versions,
    )


def _detail(record: RunRecord) -> str:
    return ", ".join(f"{count} {name}" for name, count in record.counts.items())


def _scores(place: str) -> Scores:
    document: dict[str, Any] = storage.read_json(storage.join(place, SCORES_FILE))
    return Scores(
        split=document["split"],
        images=document["images"],
        miou=document["miou"],
        macc=document["macc"],
        aacc=document["aacc"],
        class_iou=[row["iou"] for row in document["classes"]],
        class_pixels=[row["pixels"] for row in document["classes"]],
    )


def _trials(place: str) -> list[Trial]:
    filesystem, path = storage.arrow_filesystem(storage.join(place, TRIALS_FILE))
    rows = pq.read_table(path, filesystem=filesystem).to_pylist()
    return [
        Trial(row["trial"], yaml.safe_load(row["parameters"]), row["miou"], row["iterations"], row["state"])
        for row in rows
    ]


def overlays(url: str, model_id: str) -> list[Overlay]:
    """Photographs with their masks, at most `OVERLAYS`, spread evenly over all that the model has segmented.

    Only those are loaded. A photograph that is gone or was replaced since gives way to its neighbour.

    Args:
        url: the output place of a segmentation.
        model_id: whose masks to show, as `pipeline.prediction.model_id` has it.
    """
    of_model = pc.field("model_id") == model_id
    rows = masks.open_masks(url)
    columns = ["image_uri", "version"]
    found = rows.to_table(columns=columns, filter=of_model & (pc.field("status") == masks.OK))
    keys = found.sort_by("image_uri").to_pylist()
    bounds = [len(keys) * part // OVERLAYS for part in range(OVERLAYS + 1)]
    chosen: dict[tuple[str, str], bytes] = {}
    for start, end in itertools.pairwise(bounds):
        for key in keys[start:end]:
            photograph = _photograph(**key)
            if photograph is not None:
                chosen[key["image_uri"], key["version"]] = photograph
                break
    shown = of_model & pc.field("image_uri").isin(pa.array([uri for uri, _ in chosen], pa.string()))
    return [
        Overlay(row["image_uri"], images.decode_photograph(chosen[key]), masks.decode(row))
        for row in rows.to_table(filter=shown).sort_by("image_uri").to_pylist()
        if (key := (row["image_uri"], row["version"])) in chosen
    ]


def _photograph(image_uri: str, version: str) -> bytes | None:
    """The bytes of this version of a photograph; None if it is there no more."""
    try:
        return storage.read_bytes(image_uri) if storage.stat(image_uri).version == version else None
    except FileNotFoundError:
        return None
