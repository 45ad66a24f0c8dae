"""The report: one HTML file that shows what was run, how good it is and where it lies, and needs nothing else.

Pictures, curves and style are inside the file, so that it can be mailed, or kept beside the run. Takes plain values:
whoever calls reads them from the run records.
"""

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from pipeline import charts, storage
from pipeline.errors import PipelineError
from pipeline.mask_store import FOLDER
from pipeline.page import page
from pipeline.redaction import redacted
from pipeline.report_pictures import Overlay, css_colour, legend, page_pictures
from rssnet.classes import Classes

FILE_NAME = "report.html"


@dataclass(frozen=True)
class Stage:
    """One stage of the run.

    Args:
        name: e.g. `train`.
        url: where its output lies.
        seconds: how long it took; None if that is not known.
        state: `done` if it ran, `skipped` if its output was there already, `failed`.
        detail: a few words, e.g. `367 images, 400 iterations`.
    """

    name: str
    url: str
    seconds: float | None
    state: Literal["done", "skipped", "failed"] = "done"
    detail: str = ""


@dataclass(frozen=True)
class Scores:
    """Scores on a labelled split, each from 0 to 1; None where there is nothing to divide by.

    Args:
        split: name of the split.
        images: how many images it has.
        miou, macc, aacc: mean intersection over union, mean accuracy of the classes, accuracy over all pixels.
        class_iou: IoU of each class, by class id.
        class_pixels: labelled pixels of each class, by class id; may be left out.
    """

    split: str
    images: int
    miou: float | None
    macc: float | None
    aacc: float | None
    class_iou: Sequence[float | None]
    class_pixels: Sequence[int] = ()


@dataclass(frozen=True)
class CurvePoint:
    """Training at one iteration: its loss and learning rate."""

    iteration: int
    loss: float
    lr: float


@dataclass(frozen=True)
class ValidationPoint:
    """Validation after so many iterations: its mIoU, 0 to 1."""

    iteration: int
    miou: float


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep. Trial 0 is the default configuration.

    Args:
        number: from 0.
        parameters: what was tried, by name.
        miou: 0 to 1; None if the trial did not get that far.
        iterations: how many it trained.
        state: e.g. `finished`, `stopped`, `failed`.
    """

    number: int
    parameters: Mapping[str, Any]
    miou: float | None
    iterations: int
    state: str


@dataclass(frozen=True)
class Report:
    """Everything that the report can show. What a run did not have is left out, and the report says so.

    Args:
        title: its headline.
        classes: names and colours.
        dataset: URL of the dataset.
        model: what was trained, in words, e.g. `RSSNet on vit_tiny_patch16_224, 6.1 M parameters`.
        counts: numbers to show, by what they count, e.g. `{"training images": 367}`.
        stages: in the order in which they ran.
        scores: on the validation split.
        curve, validation: of the training, by iteration.
        trials: of the sweep.
        overlays: the first `report_pictures.MAX_OVERLAYS` are shown.
        masks: URL of the predictions; the Parquet files lie in its folder `masks`.
        mirror: folder that now has the buckets, where the S3 server was one of the run's own (`LocalS3`).
        versions: by package.
    """

    title: str
    classes: Classes
    dataset: str = ""
    model: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    stages: Sequence[Stage] = ()
    scores: Scores | None = None
    curve: Sequence[CurvePoint] = ()
    validation: Sequence[ValidationPoint] = ()
    trials: Sequence[Trial] = ()
    overlays: Sequence[Overlay] = ()
    masks: str = ""
    mirror: Path | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def write_report(place_url: str, report: Report) -> str:
    """Write `report.html` at a place and return its URL.

    Raises:
        PipelineError: if an overlay's parts do not fit each other, or the scores are of other classes.
        StorageError: if the place cannot be written.
    """
    url = storage.join(storage.absolute(place_url), FILE_NAME)
    storage.write_bytes(url, render(report).encode())
    return url


def render(report: Report) -> str:
    """The report as HTML text; raises what `write_report` raises for unfitting parts."""
    return page(
        f"{FILE_NAME}.j2",
        {"score": _score, "duration": _duration, "url": redacted, "value": _value},
        report=report,
        written=datetime.datetime.now(datetime.UTC),
        seconds=math.fsum(stage.seconds or 0 for stage in report.stages),
        class_scores=_class_scores(report),
        loss_chart=_loss_chart(report.curve),
        miou_chart=_miou_chart(report.validation),
        pictures=page_pictures(report.overlays, report.classes),
        legend=legend(report.overlays, report.classes),
        sweep=_sweep(report.trials),
        sql=_sql(report),
    )


@dataclass(frozen=True)
class _ClassScore:
    name: str
    colour: str
    iou: float | None
    share: float | None


@dataclass(frozen=True)
class _Sweep:
    parameters: list[str]
    trials: list[Trial]
    best: Trial | None
    default: Trial | None
    chart: Markup


def _class_scores(report: Report) -> list[_ClassScore]:
    """The classes from the best to the worst; those without a score last."""
    scores = report.scores
    if scores is None:
        return []
    count = len(report.classes)
    if len(scores.class_iou) != count or len(scores.class_pixels) not in (0, count):
        raise PipelineError(
            f"The report has {count} classes, but {len(scores.class_iou)} class scores and {len(scores.class_pixels)} "
            "pixel counts: give one per class."
        )
    pixels = sum(scores.class_pixels)
    rows = [
        _ClassScore(
            name=report.classes.names[index],
            colour=css_colour(report.classes.palette[index]),
            iou=iou if _known(iou) else None,
            share=scores.class_pixels[index] / pixels if pixels else None,
        )
        for index, iou in enumerate(scores.class_iou)
    ]
    return sorted(rows, key=lambda row: -1.0 if row.iou is None else row.iou, reverse=True)


def _loss_chart(curve: Sequence[CurvePoint]) -> Markup | None:
    points = [point for point in curve if math.isfinite(point.loss)]
    if not points:
        return None
    iterations, losses = [point.iteration for point in points], [point.loss for point in points]
    # The chart's texts are numbers and our own words: nothing in it comes from outside.
    return Markup(charts.loss_chart(iterations, losses, [point.lr for point in points]))


def _miou_chart(validation: Sequence[ValidationPoint]) -> Markup | None:
    points = [point for point in validation if _known(point.miou)]
    if not points:
        return None
    return Markup(charts.miou_chart([point.iteration for point in points], [point.miou for point in points]))


def _sweep(trials: Sequence[Trial]) -> _Sweep | None:
    if not trials:
        return None
    ordered = sorted(trials, key=lambda trial: trial.number)
    scored = [trial for trial in ordered if _known(trial.miou) and trial.state != "failed"]
    best = max(scored, key=lambda trial: trial.miou or 0.0, default=None)
    chart = Markup("")
    if best:
        mious = [trial.miou or 0.0 for trial in scored]
        chart = Markup(charts.trials_chart([str(trial.number) for trial in scored], mious, scored.index(best)))
    return _Sweep(
        parameters=list(dict.fromkeys(name for trial in ordered for name in trial.parameters)),
        trials=ordered,
        best=best,
        default=next((trial for trial in ordered if trial.number == 0), None),
        chart=chart,
    )


def _sql(report: Report) -> str:
    """What reads the masks in DuckDB."""
    if not report.masks:
        return ""
    scheme, path = storage.split(report.masks)
    place = storage.absolute(report.masks)
    if scheme != "file" and report.mirror is not None:
        place = str(report.mirror / path)
    literal = re.sub(r"[\[*?]", r"[\g<0>]", place).replace("'", "''")
    files = storage.join(literal, FOLDER, "*.parquet")
    return (
        "SELECT image_uri, height, width, class_ids, class_pixels, confidence, mask "
        f"FROM read_parquet('{files}') WHERE status = 'ok' LIMIT 10;"
    )


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _score(value: float | None) -> str:
    return f"{value:.3f}" if value is not None and math.isfinite(value) else "–"


def _value(value: Any) -> str:
    """A parameter, as short as it can be told."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
