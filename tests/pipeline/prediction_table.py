"""Prediction rows that no model has made, for tests of what happens to rows."""

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import masks

PALETTE = ((128, 64, 128), (70, 70, 70), (107, 142, 35))


def prediction_row(image_uri: str, **values: Any) -> dict[str, Any]:
    """A row with a mask of 2 x 4 pixels, the upper half of class 0, the lower of class 2; or without one.

    Args:
        values: in place of the usual; with another `status` than `ok` the row has no mask.
    """
    row = {"image_uri": image_uri, "version": "1", "model_id": "model", "status": masks.OK, **values}
    if row["status"] == masks.OK:
        class_map = np.repeat(np.array([[0], [2]], np.uint8), 4, axis=1)
        mask = {"height": 2, "width": 4, "mask": masks.encode_mask(class_map, PALETTE), "confidence": 0.75}
        row = {**mask, "class_ids": [0, 2], "class_pixels": [4, 4], **row}
    return {**dict.fromkeys(masks.PREDICTION_SCHEMA.names), **row}


def prediction_table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), masks.PREDICTION_SCHEMA)
