"""From a listed image to its prediction row: read and decode, (segment,) encode.

Each stage takes a batch of rows and gives as many: what cannot be segmented stays a row, with its status and what was
found. The stage in the middle is the model's, in `pipeline.segmenter`; nothing here imports torch, which the many
processes that these stages run in would take seconds to load.
"""

import collections
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import masks, storage
from pipeline.attempts import Watch
from pipeline.image_sources import CHANGED, MISSING, STORAGE_ERROR, Unread, read
from pipeline.images import BadImage, decode_photograph, encode_png
from pipeline.mask_products import (
    ProductsConfig,
    overlay_jpeg,
    overlay_url,
    polygons_json,
    prediction_schema,
    simplified,
)
from pipeline.parquet_files import read_table
from pipeline.storage_errors import patiently

SHOWN_FAILURES = 20

INFERENCE_ERROR = "inference_error"  # the model fails on this image alone
CRASHED = "crashed"  # processes die on it
# The next run replaces such rows by another attempt.
TRIED_AGAIN = (STORAGE_ERROR, CHANGED, MISSING, INFERENCE_ERROR, CRASHED)
NUMBER = "number"  # the column that tells the images of a run apart

SLICES = pa.schema(
    [
        ("file", pa.string()),  # Parquet of rows of `LISTED`
        ("start", pa.int32()),  # of its rows, these; the second is exclusive
        ("stop", pa.int32()),
        (NUMBER, pa.int64()),  # of the first
    ]
)
PIXELS = pa.schema(
    [
        (NUMBER, pa.int64()),
        ("image_uri", pa.string()),
        ("version", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixels", pa.large_binary()),  # (H, W, 3) uint8: plain bytes, so that images of all sizes share a table
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
CLASS_MAPS = pa.schema(
    [item for item in PIXELS if item.name != "pixels"]
    + [pa.field("class_map", pa.large_binary()), pa.field("confidence", pa.float32())]
)
# What some products are made of, all of them plain bytes: (H, W) uint8 probabilities, of which 255 is 1; of each rank
# (H, W) class ids and probabilities; and the photograph.
PRODUCT_SOURCES = pa.schema(
    [
        ("probabilities", pa.large_binary()),
        ("top_classes", pa.list_(pa.large_binary())),
        ("top_probabilities", pa.list_(pa.large_binary())),
        PIXELS.field("pixels"),
    ]
)


def class_maps_schema(products: ProductsConfig) -> pa.Schema:
    """The schema of what the model gives: `CLASS_MAPS`, and of `PRODUCT_SOURCES` only what the products need."""
    needed = {
        "probabilities": products.needs_probabilities,
        "top_classes": products.top_k > 0,
        "top_probabilities": products.top_k > 0,
        "pixels": products.overlays is not None,
    }
    return pa.schema([*CLASS_MAPS, *(item for item in PRODUCT_SOURCES if needed[item.name])])


@dataclass(frozen=True)
class ImageReader:
    """Rows of `SLICES` to rows of `PIXELS`, one at a time: an image that cannot be used stays, with its reason.

    Args:
        attempts: handle of the actor of `pipeline.attempts`.
    """

    attempts: Any = None

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        watch = Watch("read", self.attempts)
        for part in batch.to_pylist():
            table = patiently(lambda url=part["file"]: read_table(url))
            rows = table.slice(part["start"], part["stop"] - part["start"]).to_pylist()
            rows = [{**row, NUMBER: part[NUMBER] + index} for index, row in enumerate(rows)]
            for positions, wanted in watch.groups([row[NUMBER] for row in rows]):
                some = [rows[position] for position in positions]
                found = read(some) if wanted else [Unread(CRASHED, watch.reason)] * len(some)
                for row, data in zip(some, found, strict=True):
                    yield pa.Table.from_pylist([_pixels(row, data)], schema=PIXELS)


def _pixels(listed: dict[str, Any], data: bytes | Unread) -> dict[str, Any]:
    """A row of `PIXELS` of one of `LISTED` and what was read of it."""
    if isinstance(data, Unread):
        return {**listed, "status": data.status, "error": data.error}
    try:
        image = decode_photograph(data)
    except BadImage as error:
        return {**listed, "status": error.reason, "error": error.detail}
    height, width, _ = image.shape
    return {**listed, "height": height, "width": width, "pixels": image.tobytes(), "status": masks.OK, "error": None}


@dataclass(frozen=True)
class MaskEncoder:
    """Rows of `class_maps_schema(products)` to those of `prediction_schema(products)`, still numbered; writes overlays.

    Args:
        model: the model's id.
        palette: colour of each of its classes.
        names: name of each; needed only for a subset of them and for polygons.
        products: what rows hold beside the mask.
        attempts: handle of the actor of `pipeline.attempts`.
    """

    model: str
    palette: tuple[masks.RGB, ...]
    names: tuple[str, ...] = ()
    products: ProductsConfig = field(default_factory=ProductsConfig)
    attempts: Any = None

    def __post_init__(self) -> None:
        if len(self.names) != len(self.palette) and (self.names or self.products.classes or self.products.polygons):
            raise ValueError(f"{len(self.names)} class names but {len(self.palette)} colours; give one of each.")

    def __call__(self, batch: pa.Table) -> pa.Table:
        numbers, rows = batch[NUMBER], []
        watch = Watch("encode", self.attempts)
        for positions, wanted in watch.groups(numbers.to_pylist()):
            for position in positions:
                # Row by row: as Python objects, the arrays of a whole batch would be in memory twice.
                (given,) = batch.slice(position, 1).to_pylist()
                if given["class_map"] is not None and not wanted:
                    given |= {"class_map": None, "confidence": None, "status": CRASHED, "error": watch.reason}
                rows.append(self._row(given))
        return pa.Table.from_pylist(rows, schema=prediction_schema(self.products)).append_column(NUMBER, numbers)

    def _row(self, given: dict[str, Any]) -> dict[str, Any]:
        row = {name: value for name, value in given.items() if name not in (*PRODUCT_SOURCES.names, "class_map")}
        row["model_id"] = self.model
        if given["class_map"] is None:
            return row
        size = (given["height"], given["width"])
        id_type = masks.dtype(len(self.palette))
        class_map = np.frombuffer(given["class_map"], id_type).reshape(size)
        class_map = simplified(class_map, self.products, self.names)
        pixels = np.bincount(class_map.ravel(), minlength=len(self.palette))[: len(self.palette)]
        row["mask"] = masks.encode_mask(class_map, self.palette)
        row["class_ids"] = np.flatnonzero(pixels).tolist()
        row["class_pixels"] = pixels[pixels > 0].tolist()
        if self.products.needs_probabilities:
            probabilities = np.frombuffer(given["probabilities"], np.uint8).reshape(size)
            if self.products.classes is not None:
                row["confidence"] = _mean_probability(probabilities, class_map != masks.other_id(len(self.palette)))
            if self.products.confidence_map:
                row["confidence_map"] = encode_png(probabilities)
        if self.products.top_k:
            ranks = [np.frombuffer(ids, id_type).reshape(size) for ids in given["top_classes"]]
            row["top_classes"] = [masks.encode_mask(ids, self.palette) for ids in ranks]
            ranks = [np.frombuffer(values, np.uint8).reshape(size) for values in given["top_probabilities"]]
            row["top_probabilities"] = [encode_png(values) for values in ranks]
        if self.products.polygons:
            row["polygons"] = polygons_json(class_map, self.names)
        if self.products.overlays is not None:
            image = np.frombuffer(given["pixels"], np.uint8).reshape(*size, 3)
            place = overlay_url(self.products.overlays, given["image_uri"])
            jpeg = overlay_jpeg(image, class_map, self.palette)
            patiently(lambda: storage.write_bytes(place, jpeg))
            row["overlay_uri"] = place
        return row


def _mean_probability(probabilities: np.ndarray, where: np.ndarray) -> float | None:
    """Of the pixels that have a class; None where none has."""
    return float(probabilities.mean(where=where, dtype=np.float64)) / 255 if where.any() else None


@dataclass(frozen=True)
class Summary:
    """What became of some images.

    Args:
        statuses: how many have each status.
        failures: `image_uri`, `status` and `error` of the first that are not `ok`.
    """

    statuses: collections.Counter[str]
    failures: list[dict[str, str]]

    @classmethod
    def of(cls, table: pa.Table) -> "Summary":
        """Of some prediction rows."""
        failures = table.select(["image_uri", "status", "error"]).filter(pc.field("status") != masks.OK)
        return cls(collections.Counter(table["status"].to_pylist()), failures.slice(0, SHOWN_FAILURES).to_pylist())

    @classmethod
    def counted(cls, statuses: Iterable[str], failures: list[dict[str, str]]) -> "Summary":
        """From the statuses of some rows, and a sample of their failures."""
        return cls(collections.Counter(statuses), failures)

    @classmethod
    def total(cls, summaries: Iterable["Summary"]) -> "Summary":
        """Of all rows that `summaries` are of."""
        statuses: collections.Counter[str] = collections.Counter()
        failures: list[dict[str, str]] = []
        for summary in summaries:
            statuses.update(summary.statuses)
            failures.extend(summary.failures)
        return cls(statuses, sorted(failures, key=lambda row: row["image_uri"])[:SHOWN_FAILURES])
