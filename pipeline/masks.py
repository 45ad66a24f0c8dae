"""Predicted masks: the schema of their rows, the PNG inside a row, reading and drawing them. Knows no model and no Ray.

Rows lie in `<url>/masks/*.parquet`. Everything that reads Parquet can read them; `read_masks` and `decode` are here for
Python. A row with the status `ok` has a mask; any other status says why there is none.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from PIL import Image

from pipeline import mask_store, storage
from pipeline.images import encode_png
from pipeline.storage_errors import StorageError

OK = "ok"
PALETTE_CLASSES = 256  # what an 8-bit PNG can tell apart; masks of more classes are 16-bit grey

PREDICTION_SCHEMA = pa.schema(
    [
        ("image_uri", pa.string()),
        ("version", pa.string()),
        ("model_id", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("mask", pa.binary()),
        ("class_ids", pa.list_(pa.int32())),
        ("class_pixels", pa.list_(pa.int64())),
        ("confidence", pa.float32()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
KEY = ("image_uri", "version", "model_id")  # stands once among all rows at a place

RGB = tuple[int, int, int]


def dtype(num_classes: int) -> np.dtype:
    """What a mask of so many classes is made of: uint8, or uint16 above 256 classes."""
    return np.dtype(np.uint8 if num_classes <= PALETTE_CLASSES else np.uint16)


def encode_mask(class_map: np.ndarray, palette: Sequence[RGB]) -> bytes:
    """A class map as the PNG of a prediction row.

    Args:
        class_map: (H, W) class ids from 0 to `len(palette) - 1`, integers of any width.
        palette: colour of each class. Up to 256 classes make an 8-bit PNG that carries the palette, so that it opens as
            a picture; more make a 16-bit grey one.

    Raises:
        ValueError: for an array that is not such a class map.
    """
    if class_map.ndim != 2 or not np.issubdtype(class_map.dtype, np.integer):
        raise ValueError(f"A class map is (H, W) integers, got {class_map.dtype} of shape {class_map.shape}.")
    if class_map.size and not 0 <= class_map.min() <= class_map.max() < len(palette):
        raise ValueError(
            f"The class map has ids from {class_map.min()} to {class_map.max()}, but the palette has colours for "
            f"0 to {len(palette) - 1}: give the palette of the model that made it."
        )
    return encode_png(class_map.astype(dtype(len(palette))), list(palette))  # a palette fits uint8 only


def decode(row: Mapping[str, Any]) -> np.ndarray:
    """The class map of a prediction row: (H, W) uint8, or uint16 for a model of more than 256 classes.

    Raises:
        ValueError: if the row has no mask; the message has its status and error.
    """
    if row["mask"] is None:
        raise ValueError(
            f"{row.get('image_uri')} has no mask: {row.get('status')}, {row.get('error')}. "
            f"Read with filter=pyarrow.compute.field('status') == '{OK}' to get rows with masks only."
        )
    with Image.open(io.BytesIO(row["mask"])) as image:
        return np.array(image, dtype=np.uint16 if image.mode.startswith("I") else np.uint8)


def open_masks(url: str) -> pads.Dataset:
    """The prediction rows at `url` as an Arrow dataset, which reads only the columns and files that are asked for.

    Its files are those of this moment; if a run replaces some before they are read, reading fails: open it again, or
    use `read_masks`, which does. A place that nothing was written to yet has no rows.
    """
    url = storage.absolute(url)
    filesystem, _ = storage.arrow_filesystem(url)
    paths = [storage.split(file)[1] for file in mask_store.files(url)]
    return pads.dataset(paths, schema=PREDICTION_SCHEMA, filesystem=filesystem, format="parquet")


def read_masks(url: str, filter: pc.Expression | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """The prediction rows at `url`, in memory, as they are between two changes: none missing and none twice.

    Args:
        url: the output place of a segmentation.
        filter: which rows, e.g. `pyarrow.compute.field("status") == "ok"`; all by default.
        columns: which columns of `PREDICTION_SCHEMA`; all by default.

    Raises:
        StorageError: if the store fails, or a run changes the rows faster than they can be read.
    """
    for _ in range(mask_store.SNAPSHOT_ATTEMPTS):
        try:
            return open_masks(url).to_table(filter=filter, columns=list(columns) if columns else None)
        except FileNotFoundError:  # a file has been replaced since it was listed
            continue
    raise StorageError(f"{url} changes faster than it can be read: read it again when the run there has ended.")


def overlay(image: np.ndarray, class_map: np.ndarray, palette: Sequence[RGB], alpha: float = 0.5) -> np.ndarray:
    """The photograph tinted with the colours of its classes.

    Args:
        image: (H, W, 3) uint8 RGB.
        class_map: (H, W) class ids.
        palette: colour of each class.
        alpha: weight of the colours, 0 (only the photograph) to 1 (only the colours).

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: if the sizes differ or `alpha` is out of range.
    """
    if image.shape != (*class_map.shape, 3):
        raise ValueError(
            f"The image is {image.shape}, the class map {class_map.shape}: give (H, W, 3) and (H, W) of the same size."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: give a weight from 0 to 1.")
    colours = np.asarray(palette, np.float32)[class_map]  # (H, W, 3)
    return np.rint((1 - alpha) * image + alpha * colours).astype(np.uint8)
