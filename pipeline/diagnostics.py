"""The separation diagnostics (`rssnet.diagnostics`) of a model on rows of a dataset: document, plot and sentence."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from pipeline.dataset import IGNORE_LABEL
from pipeline.figure_png import figure_png
from pipeline.images import decode_label, decode_photograph
from rssnet.diagnostics import LayerDiagnostics, diagnose, draw_diagnostics
from rssnet.inference import Predictor

READING = (
    "over-smoothed: tokens alike (cosine near 1), little energy in high frequencies.\n"
    "separate: much scatter between classes, little cosine between their regions."
)


def diagnosed(predictor: Predictor, rows: Iterable[Mapping[str, Any]]) -> list[LayerDiagnostics]:
    """The table of a model, layer by layer, on the middle window of each photograph, one image in memory at a time.

    The window has the size and the scale at which the predictor applies the model; of its scales, that nearest to 1. A
    photograph that is smaller is enlarged: padding would count as tokens that are all alike.

    Args:
        predictor: of the model, with any head.
        rows: of a dataset, with `image` and `label`; at least one.
    """
    scale = min(predictor.scales, key=lambda scale: abs(math.log(scale)))

    def middles() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for row in rows:
            image = torch.from_numpy(decode_photograph(row["image"]).copy()).permute(2, 0, 1)
            label = torch.from_numpy(decode_label(row["label"]).copy())
            image, label = _middle(image, label, predictor.crop_size, scale)
            yield predictor.normalize(image)[None], label[None]

    return diagnose(predictor.model, middles(), IGNORE_LABEL)


def diagnostics_document(table: Sequence[LayerDiagnostics]) -> list[dict[str, Any]]:
    """The table as JSON can hold it: a row per layer, nan as None."""
    return [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        for row in (dataclasses.asdict(measured) for measured in table)
    ]


def diagnostics_picture(table: Sequence[LayerDiagnostics], title: str) -> bytes:
    """A PNG of the table: a panel per measure, the layers from left to right."""
    figure = draw_diagnostics({title: table})
    for panel in figure.axes:
        panel.yaxis.label.set_fontsize(8)  # so that the longest keeps to its panel
        legend = panel.get_legend()
        if legend is not None:  # of the one line that the title already names
            legend.remove()
    figure.axes[-1].set_xlabel("layer")
    figure.align_ylabels()
    figure.suptitle(f"{title}\n{READING}".replace("$", r"\$"), fontsize=9)
    return figure_png(figure)


def diagnostics_text(table: Sequence[LayerDiagnostics]) -> str:
    """What the table says of over-smoothing and of the classes, in a few words."""
    layers = [row for row in table if row.layer.startswith("backbone")]
    first, last = layers[0], layers[-1]
    said = (
        f"token cosine {first.token_cosine:.3f} in {first.layer}, {last.token_cosine:.3f} in {last.layer}; "
        f"scatter between over within classes {last.class_scatter:.2f} there"
    )
    decoded = [row for row in table[len(layers) :] if not math.isnan(row.class_scatter)]
    return said + (f", {decoded[-1].class_scatter:.2f} in {decoded[-1].layer}" if decoded else "")


def _middle(
    image: torch.Tensor, label: torch.Tensor, size: tuple[int, int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The middle of an image (3, H, W) and of its label (H, W), of a given size, both scaled as far as it takes."""
    factor = max(scale, *(wanted / side for wanted, side in zip(size, label.shape, strict=True)))
    if factor != 1:
        scaled = [max(wanted, round(side * factor)) for wanted, side in zip(size, label.shape, strict=True)]
        image = functional.resize(image, scaled, interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
        label = functional.resize(label[None], scaled, interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]
    crop = list(size)
    return functional.center_crop(image, crop), functional.center_crop(label[None], crop)[0]
