"""From a listed image to its prediction row: read and decode, (segment,) encode, write.

Each stage takes a batch of rows and gives as many: what cannot be segmented stays a row, with its status and what was
found. The stage in the middle is the model's, in `pipeline.segmentation`; nothing here imports torch, which the many
processes that these stages run in would take seconds to load.
"""

import collections
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data.block import Block

from pipeline import mask_store, masks, storage
from pipeline.errors import PipelineError
from pipeline.image_sources import CHANGED, STORAGE_ERROR, Unread, read
from pipeline.images import BadImage, decode_photograph
from pipeline.parquet_sink import ParquetSink, Written
from pipeline.progress import Reporter

TURN_FILE = "turn.json"
ROWS_PER_FILE = 64
SHOWN_FAILURES = 20

INFERENCE_ERROR = "inference_error"  # the model fails on this image alone
TRIED_AGAIN = (STORAGE_ERROR, CHANGED, INFERENCE_ERROR)  # the next run replaces their rows by another attempt

PIXELS = pa.schema(
    [
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


def read_images(batch: pa.Table) -> Iterator[pa.Table]:
    """Rows of `LISTED` to rows of `PIXELS`, one at a time: an image that cannot be used stays, with its reason."""
    rows = batch.to_pylist()
    for listed, data in zip(rows, read(rows), strict=True):
        row = {**listed, "status": masks.OK}
        try:
            if isinstance(data, Unread):
                raise BadImage(data.status, data.error)
            image = decode_photograph(data)
            row |= {"height": image.shape[0], "width": image.shape[1], "pixels": image.tobytes()}
        except BadImage as error:
            row |= {"status": error.reason, "error": error.detail}
        yield pa.Table.from_pylist([row], schema=PIXELS)


@dataclass(frozen=True)
class MaskEncoder:
    """Rows of `CLASS_MAPS` to prediction rows."""

    model: str
    palette: tuple[masks.RGB, ...]

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._row(row) for row in batch.to_pylist()], schema=masks.PREDICTION_SCHEMA)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        encoded = row.pop("class_map")
        row["model_id"] = self.model
        if encoded is not None:
            class_map = np.frombuffer(encoded, masks.dtype(len(self.palette))).reshape(row["height"], row["width"])
            pixels = np.bincount(class_map.ravel())
            row["mask"] = masks.encode_mask(class_map, self.palette)
            row["class_ids"] = np.flatnonzero(pixels).tolist()
            row["class_pixels"] = pixels[pixels > 0].tolist()
        return row


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
            yield mask_store.FOLDER, part.select(masks.PREDICTION_SCHEMA.names).cast(masks.PREDICTION_SCHEMA)
