"""Photographs and their masks as pictures that stand inside an HTML page, small enough for all to fit in one file."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.images import encode_png
from pipeline.masks import PALETTE_CLASSES, overlay
from pipeline.redaction import redacted
from rssnet.classes import Classes

MAX_OVERLAYS = 12
PICTURE_HEIGHT_SHOWN = 340  # pixels of the page, so that one upright photograph does not fill the screen
PICTURE_BYTES = 2_600_000  # of all pictures together; base64 makes a third more of them
# Longest side in pixels (a picture is shown about 360 wide, on screens of up to twice the density) and JPEG quality.
# The first pair that keeps to PICTURE_BYTES is taken.
PICTURE_STEPS = ((600, 84), (600, 60), (400, 60), (280, 50))


@dataclass(frozen=True)
class Overlay:
    """A photograph and its prediction.

    Args:
        uri: where the photograph lies.
        image: (H, W, 3) uint8 RGB.
        class_map: (H, W) class ids, integers.
    """

    uri: str
    image: np.ndarray
    class_map: np.ndarray


@dataclass(frozen=True)
class PagePictures:
    """An overlay as the page's template takes it.

    Args:
        uri: where the photograph lies.
        photograph, mask, overlay: data URLs.
        width: pixels of the page that the three may take together.
    """

    uri: str
    photograph: str
    mask: str
    overlay: str
    width: int


def page_pictures(overlays: Sequence[Overlay], classes: Classes) -> list[PagePictures]:
    """The pictures of the first `MAX_OVERLAYS`, compressed until all together keep to `PICTURE_BYTES`.

    Raises:
        PipelineError: if an overlay's parts do not fit each other or the classes.
    """
    shown = overlays[:MAX_OVERLAYS]
    for item in shown:
        _require_fit(item, classes)
    encoded: list[tuple[bytes, bytes, bytes]] = []
    for side, quality in PICTURE_STEPS:
        encoded = [_encoded(item, classes, side, quality) for item in shown]
        if sum(len(picture) for triple in encoded for picture in triple) <= PICTURE_BYTES:
            break
    return [
        PagePictures(
            uri=item.uri,
            photograph=_data_url("jpeg", photograph),
            mask=_data_url("png", mask),
            overlay=_data_url("jpeg", blend),
            width=round(3 * PICTURE_HEIGHT_SHOWN * item.image.shape[1] / item.image.shape[0]),
        )
        for item, (photograph, mask, blend) in zip(shown, encoded, strict=True)
    ]


def legend(overlays: Sequence[Overlay], classes: Classes) -> list[tuple[str, str]]:
    """Name and colour, as CSS writes it, of the classes that are shown, by class id."""
    present = sorted({int(value) for item in overlays[:MAX_OVERLAYS] for value in np.unique(item.class_map)})
    return [(classes.names[index], css_colour(classes.palette[index])) for index in present]


def css_colour(colour: tuple[int, int, int]) -> str:
    """Red, green and blue, 0 to 255, as CSS writes them."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _require_fit(item: Overlay, classes: Classes) -> None:
    if item.image.dtype != np.uint8 or item.image.shape != (*item.class_map.shape, 3):
        raise PipelineError(
            f"The overlay of {redacted(item.uri)} has an image of {item.image.shape} {item.image.dtype} and a "
            f"class map of {item.class_map.shape}: give (H, W, 3) uint8 and (H, W) of one size."
        )
    if item.class_map.min() < 0 or item.class_map.max() >= len(classes):
        raise PipelineError(
            f"The class map of {redacted(item.uri)} has ids from {item.class_map.min()} to "
            f"{item.class_map.max()}, but the report has {len(classes)} classes: give the classes of its model."
        )


def _encoded(item: Overlay, classes: Classes, side: int, quality: int) -> tuple[bytes, bytes, bytes]:
    """Photograph, mask and overlay, no side longer than `side` pixels."""
    height, width = item.class_map.shape
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    photograph = Image.fromarray(item.image).resize(size, Image.Resampling.LANCZOS)
    class_map = np.asarray(Image.fromarray(item.class_map.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    blend = Image.fromarray(overlay(np.asarray(photograph), class_map, classes.palette))
    return (
        _compressed(photograph, "JPEG", quality=quality, optimize=True),
        _mask_png(class_map, classes),
        _compressed(blend, "JPEG", quality=quality, optimize=True),
    )


def _mask_png(class_map: np.ndarray, classes: Classes) -> bytes:
    if len(classes) <= PALETTE_CLASSES:
        return encode_png(class_map.astype(np.uint8), list(classes.palette))
    return _compressed(Image.fromarray(np.asarray(classes.palette, np.uint8)[class_map]), "PNG", optimize=True)


def _compressed(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
