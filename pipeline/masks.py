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
# What further columns a row may have; `pipeline.mask_products` makes them where they are asked for.
PRODUCT_COLUMNS = pa.schema(
    [
        ("polygons", pa.string()),
        ("confidence_map", pa.binary()),
        ("top_classes", pa.list_(pa.binary())),
        ("top_probabilities", pa.list_(pa.binary())),
        ("overlay_uri", pa.string()),
    ]
)
ALL_COLUMNS = pa.schema([*PREDICTION_SCHEMA, *PRODUCT_COLUMNS])
KEY = ("image_uri", "version", "model_id")  # stands once among all rows at a place

RGB = tuple[int, int, int]
OTHER_COLOUR: RGB = (224, 224, 192)  # as Pascal VOC draws what is of no class
_PIXELS_AT_ONCE = 2**20  # of an overlay: colours are made as floats


def dtype(num_classes: int) -> np.dtype:
    """What a mask of so many classes is made of: uint8, or uint16 above 256 classes."""
    return np.dtype(np.uint8 if num_classes <= PALETTE_CLASSES else np.uint16)


def other_id(num_classes: int) -> int:
    """The id of pixels that are of none of the classes that were asked for: 255, or 65535 above 255 classes."""
    return 255 if num_classes <= 255 else 65535


def encode_mask(class_map: np.ndarray, palette: Sequence[RGB]) -> bytes:
    """A class map as the PNG of a prediction row.

    Args:
        class_map: (H, W) class ids from 0 to `len(palette) - 1`, and `other_id`; integers of any width.
        palette: colour of each class. Up to 256 classes make an 8-bit PNG that carries the palette, so that it opens as
            a picture; more make a 16-bit grey one, as do 256 with other pixels.

    Raises:
        ValueError: for an array that is not such a class map.
    """
    if class_map.ndim != 2 or not np.issubdtype(class_map.dtype, np.integer):
        raise ValueError(f"A class map is (H, W) integers, got {class_map.dtype} of shape {class_map.shape}.")
    lowest, highest = (int(class_map.min()), int(class_map.max())) if class_map.size else (0, 0)
    other, colours = other_id(len(palette)), list(palette)
    if highest == other:
        colours += [(0, 0, 0)] * (other - len(palette)) + [OTHER_COLOUR]
        highest = int(class_map.max(where=class_map != other, initial=0))
    if lowest < 0 or highest >= len(palette):
        raise ValueError(
            f"The class map has ids from {lowest} to {highest}, but the palette has colours for "
            f"0 to {len(palette) - 1}: give the palette of the model that made it."
        )
    return encode_png(class_map.astype(dtype(len(colours))), colours)  # a palette fits uint8 only


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
    return _decoded(row["mask"])


def decode_confidence(row: Mapping[str, Any]) -> np.ndarray:
    """The probability of the winning class at each pixel of a prediction row: (H, W) float32 in steps of 1/255.

    Raises:
        ValueError: if the row has none.
    """
    if row.get("confidence_map") is None:
        raise ValueError(f"{row.get('image_uri')} has no confidence map: segment with products.confidence_map.")
    return _decoded(row["confidence_map"]).astype(np.float32) / 255


def decode_top(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The most probable classes of each pixel of a prediction row, most probable first, and their probabilities.

    Returns:
        (k, H, W) class ids, uint8 or uint16, and (k, H, W) float32 in steps of 1/255.

    Raises:
        ValueError: if the row has none.
    """
    if row.get("top_classes") is None:
        raise ValueError(f"{row.get('image_uri')} has no most probable classes: segment with products.top_k.")
    classes, probabilities = (
        np.stack([_decoded(png) for png in row[f"top_{name}"]]) for name in ("classes", "probabilities")
    )
    return classes, probabilities.astype(np.float32) / 255


def _decoded(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.array(image, dtype=np.uint16 if image.mode.startswith("I") else np.uint8)


def open_masks(url: str) -> pads.Dataset:
    """The prediction rows at `url` as an Arrow dataset, which reads only the columns and files that are asked for.

    Its files are those of this moment; if a run replaces some before they are read, reading fails: open it again, or
    use `read_masks`, which does. A place that nothing was written to yet has no rows. Of `PRODUCT_COLUMNS`, those that
    the run which made a row was not asked for are null.
    """
    url = storage.absolute(url)
    filesystem, _ = storage.arrow_filesystem(url)
    paths = [storage.split(file)[1] for file in mask_store.files(url)]
    return pads.dataset(paths, schema=ALL_COLUMNS, filesystem=filesystem, format="parquet")


def read_masks(url: str, filter: pc.Expression | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """The prediction rows at `url`, in memory, as they are between two changes: none missing and none twice.

    Args:
        url: the output place of a segmentation.
        filter: which rows, e.g. `pyarrow.compute.field("status") == "ok"`; all by default.
        columns: which columns of `ALL_COLUMNS`; all by default.

    Raises:
        StorageError: if the store fails, or a run changes the rows faster than they can be read.
    """
    for _ in range(mask_store.SNAPSHOT_ATTEMPTS):
        try:
            with storage.explained(url, absence=False):
                return open_masks(url).to_table(filter=filter, columns=list(columns) if columns else None)
        except FileNotFoundError:  # a file has been replaced since it was listed
            continue
    raise StorageError(f"{url} changes faster than it can be read: read it again when the run there has ended.")


def overlay(image: np.ndarray, class_map: np.ndarray, palette: Sequence[RGB], alpha: float = 0.5) -> np.ndarray:
    """The photograph tinted with the colours of its classes.

    Args:
        image: (H, W, 3) uint8 RGB.
        class_map: (H, W) class ids; pixels of `other_id` are not tinted.
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
    tinted = np.empty_like(image)
    colours, other = np.asarray(palette, np.float32), other_id(len(palette))
    rows_at_once = max(1, _PIXELS_AT_ONCE // max(1, image.shape[1]))
    for top in range(0, len(image), rows_at_once):
        rows = slice(top, top + rows_at_once)
        is_other = class_map[rows] == other
        tint = colours[np.where(is_other, 0, class_map[rows])]  # (rows, W, 3)
        blended = np.rint((1 - alpha) * image[rows] + alpha * tint).astype(np.uint8)
        tinted[rows] = np.where(is_other[..., None], image[rows], blended)
    return tinted
