"""Published labels to training ids: grey levels, palette indices, colours of a table, or arrays of MATLAB files."""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat, whosmat

from pipeline import images
from pipeline.dataset import IGNORE_LABEL
from pipeline.images import BadImage

_UNKNOWN = -1


@dataclass(frozen=True)
class LabelCoding:
    """How a label file says the class of a pixel.

    Args:
        values: published value to training id; any other value makes a label bad.
        colours: (red, green, blue) to training id, for labels that are drawn in colours; None where they are bad.
        variable: the array's name, if the label is a MATLAB file.
    """

    values: Mapping[int, int]
    colours: Mapping[tuple[int, int, int], int] | None = None
    variable: str | None = None


def training_ids(data: bytes, coding: LabelCoding) -> np.ndarray:
    """The label as (H, W) uint8 training ids, 255 where it is to be ignored.

    Raises:
        BadImage: a file that cannot be read, or a value or colour that means nothing; reasons begin with `label_`,
            or are `unknown_label_value`.
    """
    try:
        published = _matlab_array(data, coding.variable) if coding.variable else images.decode_published_label(data)
    except BadImage as error:
        raise BadImage(f"label_{error.reason.removeprefix('label_')}", error.detail) from error
    if published.ndim == 3:
        if coding.colours is None:
            raise BadImage("label_mode", "the label image has colours, class ids need a grey or palette image")
        packed = {int(_packed(np.array(colour))): training_id for colour, training_id in coding.colours.items()}
        return _looked_up(_packed(published), packed, _colour_text)
    return _looked_up(published, coding.values, str)


def _looked_up(published: np.ndarray, meaning: Mapping[int, int], text: Callable[[int], str]) -> np.ndarray:
    """Each value replaced by what it means."""
    if published.dtype == np.uint8:
        table = np.full(256, _UNKNOWN, np.int16)
        for value, training_id in meaning.items():
            if 0 <= value < 256:
                table[value] = training_id
        found = table[published]
    else:
        values, places = np.unique(published, return_inverse=True)
        table = np.array([meaning.get(int(value), _UNKNOWN) for value in values], np.int16)
        found = table[places].reshape(published.shape)
    unknown = found == _UNKNOWN
    if unknown.any():
        value = int(published[unknown][0])
        raise BadImage(
            "unknown_label_value",
            f"it has the value {text(value)} at {int(unknown.sum())} pixels, which is none of the classes "
            f"({_range_text(meaning, text)}) nor an ignore value",
        )
    return found.astype(np.uint8)


def _range_text(meaning: Mapping[int, int], text: Callable[[int], str]) -> str:
    classes = sorted(value for value, training_id in meaning.items() if training_id != IGNORE_LABEL)
    if text is not str:
        return f"{len(classes)} colours"
    if classes == list(range(classes[0], classes[-1] + 1)):
        return f"{classes[0]} to {classes[-1]}"
    return f"{len(classes)} values from {classes[0]} to {classes[-1]}"


def _packed(colours: NDArray[np.integer]) -> NDArray[np.int32]:
    """Colours (..., 3) as one number each."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return (red << 16) | (green << 8) | blue


def _colour_text(value: int) -> str:
    return str((value >> 16, (value >> 8) & 255, value & 255))


def _matlab_array(data: bytes, variable: str) -> np.ndarray:
    if not data:
        raise BadImage("empty", "the file has no bytes")
    try:
        shapes = {name: shape for name, shape, _ in whosmat(io.BytesIO(data))}
        # Not an array of any size: that of a bomb is read only if it is asked for.
        wanted = [variable] if math.prod(shapes.get(variable, ())) <= images.MAX_PIXELS else []
        found = loadmat(io.BytesIO(data), variable_names=wanted)
    except Exception as error:  # scipy raises many classes on damaged data
        raise BadImage("damaged", f"damaged, or no MATLAB file ({type(error).__name__}: {str(error)[:120]})") from error
    if variable not in shapes:
        raise BadImage("label_mode", f"the MATLAB file has no array named {variable}")
    if variable not in found:
        raise BadImage("too_large", f"its array {variable} is {shapes[variable]}, more than is accepted")
    array = found[variable]
    if array.ndim != 2 or array.dtype.kind not in "ui":
        raise BadImage(
            "label_mode", f"its array {variable} is {array.shape} {array.dtype}, not two-dimensional integers"
        )
    return array if array.dtype == np.uint8 else array.astype(np.int64)
