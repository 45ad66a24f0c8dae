"""From a listed image to its prediction row: read and decode, (segment,) encode, write.

Each stage takes a batch of rows and gives as many: what cannot be segmented stays a row, with its status and what was
found. The stage in the middle is the model's, in `pipeline.segmentation`; nothing here imports torch, which the many
processes that these stages run in would take seconds to load.
"""

import collections
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data.block import Block

from pipeline import masks, storage
from pipeline.errors import PipelineError
from pipeline.images import BadImage, decode_photograph, encode_png
from pipeline.mask_products import (
    ProductsConfig,
    overlay_jpeg,
    overlay_url,
    polygons_json,
    prediction_schema,
    simplified,
)
from pipeline.parquet_sink import ParquetSink, Written
from pipeline.progress import Reporter
from pipeline.storage_errors import StorageError

TURN_FILE = "turn.json"
ROWS_PER_FILE = 64
SHOWN_FAILURES = 20
READ_WAITS = (0.5, 2.0)  # seconds between attempts to read an image that storage does not give

STORAGE_ERROR = "storage_error"  # storage did not give the image
CHANGED = "changed"  # the version that was listed was overwritten or deleted before it was read
INFERENCE_ERROR = "inference_error"  # the model fails on this image alone
TRIED_AGAIN = (STORAGE_ERROR, CHANGED, INFERENCE_ERROR)  # the next run replaces their rows by another attempt

LISTED = pa.schema([("image_uri", pa.string()), ("version", pa.string())])
PIXELS = pa.schema(
    [
        *LISTED,
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


def read_images(batch: pa.Table) -> Iterator[pa.Table]:
    """Rows of `LISTED` to rows of `PIXELS`, one at a time: an image that cannot be used stays, with its reason."""
    for listed in batch.to_pylist():
        row = {**listed, "status": masks.OK}
        try:
            image = decode_photograph(_fetched(listed["image_uri"], listed["version"]))
            row |= {"height": image.shape[0], "width": image.shape[1], "pixels": image.tobytes()}
        except _Changed as error:
            row |= {"status": CHANGED, "error": str(error)}
        except StorageError as error:
            row |= {"status": STORAGE_ERROR, "error": str(error)}
        except BadImage as error:
            row |= {"status": error.reason, "error": error.detail}
        yield pa.Table.from_pylist([row], schema=PIXELS)


class _Changed(Exception):
    """The version that was listed is no longer there."""


def _fetched(url: str, version: str) -> bytes:
    """The bytes of this very version of an object.

    It had the version when it was listed; that it still has it after reading shows that what was read is of it.
    """
    for wait in (*READ_WAITS, None):
        try:
            data = storage.read_bytes(url)
            if storage.stat(url).version == version:
                return data
            raise _Changed(f"{url} was overwritten after it was listed")
        except FileNotFoundError:
            raise _Changed(f"{url} was listed, but is not there") from None
        except StorageError:
            if wait is None:
                raise
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True)
class MaskEncoder:
    """Rows of `class_maps_schema(products)` to those of `prediction_schema(products)`; overlays are written on the way.

    Args:
        model: the model's id.
        palette: colour of each of its classes.
        names: name of each; needed only for a subset of them and for polygons.
        products: what rows hold beside the mask.
    """

    model: str
    palette: tuple[masks.RGB, ...]
    names: tuple[str, ...] = ()
    products: ProductsConfig = field(default_factory=ProductsConfig)

    def __post_init__(self) -> None:
        if len(self.names) != len(self.palette) and (self.names or self.products.classes or self.products.polygons):
            raise ValueError(f"{len(self.names)} class names but {len(self.palette)} colours; give one of each.")

    def __call__(self, batch: pa.Table) -> pa.Table:
        # Row by row: as Python objects, the arrays of a whole batch would be in memory twice.
        rows = [self._row(row) for part in range(batch.num_rows) for row in batch.slice(part, 1).to_pylist()]
        return pa.Table.from_pylist(rows, schema=prediction_schema(self.products))

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
            row["overlay_uri"] = overlay_url(self.products.overlays, given["image_uri"])
            storage.write_bytes(row["overlay_uri"], overlay_jpeg(image, class_map, self.palette))
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
    def total(cls, summaries: Iterable["Summary"]) -> "Summary":
        """Of all rows that `summaries` are of."""
        statuses: collections.Counter[str] = collections.Counter()
        failures: list[dict[str, str]] = []
        for summary in summaries:
            statuses.update(summary.statuses)
            failures.extend(summary.failures)
        return cls(statuses, sorted(failures, key=lambda row: row["image_uri"])[:SHOWN_FAILURES])


class LostTurn(PipelineError):
    """Another run has begun to write to the same place."""


class MaskSink(ParquetSink):
    """Writes prediction rows below `url`, as long as the run has the turn there.

    Encoding and uploading take long enough for another run to take the turn meanwhile. It may have looked before these
    rows appeared, and so make them itself: they are taken away again.
    """

    def __init__(self, url: str, run_id: str, reporter: Reporter) -> None:
        super().__init__(url, _route, masks.KEY, Summary.of, reporter, ROWS_PER_FILE)
        self.run_id = run_id

    def write(self, blocks: Iterable[Block], ctx: Any) -> Written:
        self._require_turn()
        written = super().write(blocks, ctx)
        try:
            self._require_turn()
        except LostTurn:
            for file in written.files:
                storage.delete(storage.join(self.url, file.path))
            raise
        return written

    def _require_turn(self) -> None:
        holder = storage.read_json(storage.join(self.url, TURN_FILE))["run_id"]
        if holder != self.run_id:
            raise LostTurn(
                f"Another run, {holder}, has begun to write to {self.url}, so this one stops: let the other one finish."
            )


def _route(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Rows that stand, and apart from them, in a file of their own, rows that the next run replaces."""
    replaced = pc.field("status").isin(TRIED_AGAIN)
    for part in (table.filter(~replaced), table.filter(replaced)):
        if part.num_rows:
            yield masks.FOLDER, part.select(masks.PREDICTION_SCHEMA.names).cast(masks.PREDICTION_SCHEMA)
