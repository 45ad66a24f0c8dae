"""What is counted of each labelled image: true against predicted classes, boundaries, and the same under corruption.

Counts of any images, from any workers, add up to exactly what one process would have counted.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline import corruptions, dataset
from pipeline.errors import PipelineError
from pipeline.images import decode_label, decode_photograph
from pipeline.inference_config import InferenceConfig
from pipeline.prediction import PredictorActor
from rssnet.inference import Predictor
from rssnet.metrics import BoundaryIoU, ConfusionMatrix

COLUMNS = ("image_id", "image", "label")  # of a dataset's row, what is read
IMAGE_SCORES = pa.schema(
    [("image_id", pa.string()), ("miou", pa.float64()), ("aacc", pa.float64()), ("pixels", pa.int64())]
)

_COUNTS = pa.list_(pa.list_(pa.int64()))
_BATCH = pa.schema(
    [
        ("confusion", _COUNTS),
        ("boundary", _COUNTS),
        ("corrupted", pa.list_(_COUNTS)),
        ("images", pa.list_(pa.struct(list(IMAGE_SCORES)))),
    ]
)


@dataclass(frozen=True)
class Condition:
    """A natural corruption at a severity of 1 to 5 (pipeline.corruptions)."""

    kind: str
    severity: int


class Counts:
    """Everything that is counted of some images.

    Args:
        num_classes: K.
        conditions: corruptions that the images are scored under beside the clean ones.

    Attributes:
        confusion: of the clean images, as `boundary`.
        corrupted: (conditions, 3, K) pixels per class that are right, true, and predicted.
        images: the scores of each clean image, None where it has no labelled pixel. This alone grows with their number,
            by some 400 bytes each: 40 MB for 100,000 images.
    """

    def __init__(self, num_classes: int, conditions: Sequence[Condition] = ()) -> None:
        self.conditions = tuple(conditions)
        self.confusion = ConfusionMatrix(num_classes, dataset.IGNORE_LABEL)
        self.boundary = BoundaryIoU(num_classes, dataset.IGNORE_LABEL)
        self.corrupted = np.zeros((len(self.conditions), 3, num_classes), np.int64)
        self.images: list[dict[str, Any]] = []

    def add(self, rows: Sequence[dict[str, Any]], predictor: Predictor) -> None:
        """Predict the images of some rows and count.

        Raises:
            PipelineError: naming the image, if it cannot be decoded, its label does not fit, or the model fails on it.
        """
        photographs, labels = _decoded(rows)
        for row, found, label in zip(rows, _class_maps(predictor, photographs, rows), labels, strict=True):
            confusion = self._confusion(row, found, label)
            scores = confusion.scores().to_dict()
            self.confusion.merge(confusion)
            self.boundary.update(found, label)
            self.images.append(
                {
                    "image_id": row["image_id"],
                    "miou": scores["miou"],
                    "aacc": scores["aacc"],
                    "pixels": int(confusion.counts.sum()),
                }
            )
        for counts, condition in zip(self.corrupted, self.conditions, strict=True):
            spoilt = [
                corruptions.corrupted(photograph, condition.kind, condition.severity, _seed(row["image_id"], condition))
                for row, photograph in zip(rows, photographs, strict=True)
            ]
            for row, found, label in zip(rows, _class_maps(predictor, spoilt, rows), labels, strict=True):
                matrix = self._confusion(row, found, label).counts.numpy()
                counts += matrix.diagonal(), matrix.sum(1), matrix.sum(0)

    def to_row(self) -> dict[str, Any]:
        """As a row of the batches that workers return."""
        return {
            "confusion": self.confusion.to_list(),
            "boundary": self.boundary.to_list(),
            "corrupted": self.corrupted.tolist(),
            "images": self.images,
        }

    def add_row(self, row: dict[str, Any]) -> None:
        """Add what `to_row` made of others' counts of the same classes and conditions."""
        self.confusion.merge(ConfusionMatrix.from_list(row["confusion"], dataset.IGNORE_LABEL))
        self.boundary.merge(BoundaryIoU.from_list(row["boundary"], dataset.IGNORE_LABEL))
        self.corrupted += np.array(row["corrupted"], np.int64).reshape(self.corrupted.shape)
        self.images += row["images"]

    def corrupted_miou(self) -> list[float]:
        """The mIoU under each condition, of images with labelled pixels."""
        right, true, predicted = np.moveaxis(self.corrupted, 1, 0)
        union = true + predicted - right
        return [float(np.mean(hits[whole > 0] / whole[whole > 0])) for hits, whole in zip(right, union, strict=True)]

    def _confusion(self, row: Mapping[str, Any], found: torch.Tensor, label: torch.Tensor) -> ConfusionMatrix:
        confusion = ConfusionMatrix(self.confusion.num_classes, dataset.IGNORE_LABEL)
        with _blamed_on([row]):
            confusion.update(found, label)
        return confusion


class Scorer(PredictorActor):
    """Batches of rows of a dataset to a row of counts each, as Ray Data maps it."""

    def __init__(self, model_url: str, inference: InferenceConfig, conditions: Sequence[Condition]) -> None:
        super().__init__(model_url, inference)
        self.conditions = conditions

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Tables with `COLUMNS` to tables of one row, for `Counts.add_row`."""
        counts = Counts(self.predictor.model.config.num_classes, self.conditions)
        counts.add(batch.to_pylist(), self.predictor)
        return pa.Table.from_pylist([counts.to_row()], schema=_BATCH)


def confusion_matrix(
    predictor: Predictor, rows: Iterable[dict[str, Any]], num_classes: int, batch_size: int = 4
) -> ConfusionMatrix:
    """The confusion matrix of a predictor over rows of a dataset, in this process.

    Args:
        predictor: gives class maps of full size.
        rows: dicts with the `COLUMNS` of `pipeline.dataset.SCHEMA`; read once, `batch_size` at a time.
        num_classes: number of classes.
        batch_size: images given to the predictor at once.

    Raises:
        PipelineError: as `Counts.add`.
    """
    total = ConfusionMatrix(num_classes, dataset.IGNORE_LABEL)
    waiting = iter(rows)
    while batch := list(islice(waiting, batch_size)):
        photographs, labels = _decoded(batch)
        for row, class_map, label in zip(batch, _class_maps(predictor, photographs, batch), labels, strict=True):
            with _blamed_on([row]):
                total.update(class_map, label)
    return total


def _decoded(rows: Sequence[Mapping[str, Any]]) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    """Photographs (H, W, 3) uint8 and labels (H, W)."""
    photographs, labels = [], []
    for row in rows:
        with _blamed_on([row]):
            photographs.append(decode_photograph(row["image"]))
            labels.append(torch.from_numpy(decode_label(row["label"]).copy()))
    return photographs, labels


def _class_maps(
    predictor: Predictor, photographs: Sequence[np.ndarray], rows: Sequence[Mapping[str, Any]]
) -> list[torch.Tensor]:
    """What the model sees in the photographs of some rows. They share batches: a failure is that of them all."""
    images = [torch.from_numpy(photograph.copy()).permute(2, 0, 1) for photograph in photographs]
    with _blamed_on(rows):
        return [prediction.class_map for prediction in predictor(images)]


@contextmanager
def _blamed_on(rows: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Say of which images it is that a bad value came; in a split of thousands nobody would find it."""
    try:
        yield
    except ValueError as error:
        names = ", ".join(repr(row["image_id"]) for row in rows)
        raise PipelineError(f"The model cannot be scored on {names}: {error}") from error


def _seed(image_id: str, condition: Condition) -> int:
    return zlib.crc32(f"{image_id}:{condition.kind}".encode())  # the severities of a kind share their draws
