"""Pictures of scores: the confusion matrix, and mIoU under corruption."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.figure_png import figure_png

NAMED_CLASSES = 60  # with more, their names would overlap
WRITTEN_CLASSES = 24  # up to so many, shares are written into the cells


def confusion_picture(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """A PNG of the share of each true class's pixels that each class was predicted for.

    Args:
        counts: (K, K) pixels, rows the truth.
        names: of the classes.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(14.0, 3.0 + 0.4 * len(names))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class's pixels")
    if len(names) <= NAMED_CLASSES:
        shown = [name.replace("$", r"\$") for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), shown, fontsize=7)
    if len(names) <= WRITTEN_CLASSES:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                colour = "white" if share < 0.6 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure_png(figure)


def corruption_picture(scores: Mapping[str, Any], clean: float) -> bytes:
    """A PNG of mIoU by corruption and severity, the clean score as a line.

    Args:
        scores: `kinds`, each with its `kind`, `miou` by severity and `mean`; `mean_miou` and `retention` over all.
        clean: mIoU without corruption.
    """
    kinds = sorted(scores["kinds"], key=lambda row: -row["mean"])
    figure = Figure(figsize=(7.5, 1.6 + 0.34 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(kinds))
    severities = len(kinds[0]["miou"])
    for index in range(severities):
        shade = 0.25 + 0.75 * index / max(1, severities - 1)
        values = [row["miou"][index] for row in kinds]
        axes.scatter(values, places, color="C0", alpha=shade, s=28, label=f"severity {index + 1}", zorder=3)
    axes.scatter([row["mean"] for row in kinds], places, color="C3", marker="|", s=160, label="mean", zorder=4)
    axes.axvline(clean, color="0.4", linestyle="--", linewidth=1, label=f"clean {clean:.3f}")
    axes.set_yticks(places, [row["kind"].replace("_", " ") for row in kinds], fontsize=8)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="x", color="0.9")
    axes.set_xlabel("mIoU")
    retention = scores["retention"]
    kept = "" if retention is None else f", {100 * retention:.0f} % of the clean score"
    axes.set_title(f"mean mIoU under corruption {scores['mean_miou']:.3f}{kept}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    return figure_png(figure)
