"""A contact sheet: photographs beside their labels or predictions in the classes' colours, with a legend."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from pipeline.dataset import IGNORE_LABEL
from pipeline.figure_png import figure_png
from pipeline.images import decode_label, decode_photograph
from rssnet.classes import Classes
from rssnet.inference import Predictor

PANEL_SIDE = 480  # pixels; what is larger is drawn smaller
LEGEND_COLUMNS = 6


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        title: above it.
        values: (H, W, 3) uint8 of a photograph, or (H, W) integers of class ids, 255 being ignored; None leaves the
            place empty.
    """

    title: str
    values: np.ndarray | None


def contact_sheet(rows: Sequence[Sequence[Panel]], classes: Classes | None) -> bytes:
    """A PNG of rows of panels, each row as long as the first; ignored pixels are white, the legend names what is seen.

    Args:
        rows: at least one.
        classes: None where no panel has class ids.
    """
    width = len(rows[0])
    figure = Figure(figsize=(4.5 * width, 2.6 * len(rows) + 1.2), layout="constrained")
    colours = np.full((256, 3), 255, np.uint8)
    if classes:
        colours[: len(classes)] = classes.palette
    present: set[int] = set()
    axes = figure.subplots(len(rows), width, squeeze=False).ravel()
    for axis, panel in zip(axes, itertools.chain.from_iterable(rows), strict=True):
        axis.set_axis_off()
        axis.set_title(panel.title, fontsize=8, parse_math=False)
        if panel.values is None:
            continue
        if panel.values.ndim == 3:
            axis.imshow(_smaller(panel.values, Image.Resampling.BILINEAR))
        else:
            ids = _smaller(panel.values.astype(np.uint8), Image.Resampling.NEAREST)
            present |= {int(value) for value in np.unique(ids)} - {IGNORE_LABEL}
            axis.imshow(colours[ids])
    handles = []
    for index in sorted(present):
        assert classes is not None
        red, green, blue = (channel / 255 for channel in classes.palette[index])
        handles.append(Patch(facecolor=(red, green, blue), label=classes.names[index].replace("$", r"\$")))
    if handles:
        title = "white: ignored"
        figure.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=7, title=title)
    return figure_png(figure)


def prediction_panels(row: Mapping[str, Any], predictor: Predictor, title: str) -> tuple[Panel, Panel, Panel]:
    """A photograph, its label, and what a model sees in it.

    Args:
        row: of a dataset.
        title: of the prediction.
    """
    photograph = decode_photograph(row["image"])
    (prediction,) = predictor([torch.from_numpy(photograph.copy()).permute(2, 0, 1)])
    return (
        Panel(row["image_id"], photograph),
        Panel("label", decode_label(row["label"])),
        Panel(title, prediction.class_map.numpy()),
    )


def _smaller(values: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
    image = Image.fromarray(values)
    image.thumbnail((PANEL_SIDE, PANEL_SIDE), resampling)
    return np.asarray(image)
