"""The report's curves as SVG that stands inside an HTML page and takes its colours, so light and dark, from it."""

import io
import re
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# matplotlib wants colours, the page has CSS variables: each stands for one until `svg` puts the variables in.
INK, MUTED, GRID, ACCENT, BEST = "#000001", "#000002", "#000003", "#000004", "#000005"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
    BEST: "var(--best)",
}

WIDTH_INCHES, HEIGHT_INCHES = 5.6, 3.1
TRIAL_LABELS = 12  # more would touch each other


def loss_chart(iterations: Sequence[int], losses: Sequence[float], rates: Sequence[float]) -> str:
    """Training loss, with its running mean where there are enough points, above the learning rate."""
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    window = len(losses) // 12
    if window < 2:
        above.plot(iterations, losses, color=ACCENT, linewidth=2, marker="o", markersize=3)
    else:
        above.plot(iterations, losses, color=ACCENT, linewidth=1, alpha=0.35)
        mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        middle = window // 2
        above.plot(iterations[middle : middle + len(mean)], mean, color=ACCENT, linewidth=2)
    above.set_ylim(bottom=min(0.0, *losses))
    above.set_ylabel("loss")
    below.fill_between(iterations, rates, color=MUTED, alpha=0.25, linewidth=0)
    below.plot(iterations, rates, color=MUTED, linewidth=1.2)
    below.set_ylim(bottom=0)
    below.set_ylabel("lr")
    below.set_yticks([max(rates)], [f"{max(rates):.0e}"])
    below.set_xlabel("iteration")
    return svg(figure, [above, below], "Training loss and learning rate over iterations")


def miou_chart(iterations: Sequence[int], mious: Sequence[float]) -> str:
    """Validation mIoU as training goes on; the last value is written beside its point."""
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    axes = figure.subplots()
    axes.plot(iterations, mious, color=ACCENT, linewidth=2, marker="o", markersize=4.5)
    axes.annotate(
        f"{mious[-1]:.3f}", (iterations[-1], mious[-1]), (0, 8), textcoords="offset points", ha="center", color=INK
    )
    axes.set_ylim(0, max(mious) * 1.2 or 1)
    axes.margins(x=0.07)
    axes.set_ylabel("mIoU")
    axes.set_xlabel("iteration")
    return svg(figure, [axes], "Validation mIoU over iterations")


def trials_chart(names: Sequence[str], mious: Sequence[float], best: int) -> str:
    """mIoU of each trial of a sweep as a stem; `best` is the index of the one to bring out."""
    figure = Figure(figsize=(2 * WIDTH_INCHES, 2.2), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(names))
    colours = [BEST if index == best else ACCENT for index in positions]
    axes.vlines(positions, 0, mious, color=colours, linewidth=2)
    axes.scatter(positions, mious, s=48, color=colours, zorder=3)
    for position, miou in zip(positions, mious, strict=True):
        if len(names) <= TRIAL_LABELS or position == best:
            axes.annotate(f"{miou:.3f}", (position, miou), (0, 8), textcoords="offset points", ha="center", color=INK)
    axes.set_ylim(0, max(mious) * 1.25 or 1)
    axes.set_xlim(-0.6, len(names) - 0.4)
    if len(names) <= TRIAL_LABELS:
        axes.set_xticks(positions, names)
    axes.set_ylabel("mIoU")
    return svg(figure, [axes], "Validation mIoU of each trial")


def svg(figure: Figure, all_axes: Sequence[Axes], label: str, ordinal: bool = False) -> str:
    """A figure in the page's own colours.

    Args:
        figure, all_axes: what is drawn.
        label: says what it shows to whoever cannot see it.
        ordinal: whether the vertical axis has names, not numbers.
    """
    for axes in all_axes:
        axes.spines[:].set_visible(False)
        axes.grid(axis="y", color=GRID, linewidth=1)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelcolor=MUTED, labelsize=11)
        axes.xaxis.label.set(color=MUTED, size=11)
        axes.yaxis.label.set(color=MUTED, size=11)
        if len(axes.get_yticks()) > 2 and not ordinal:
            axes.yaxis.set_major_locator(MaxNLocator(5))
    buffer = io.StringIO()
    # Text stays text; the salt keeps one chart's definitions from another's, and the same every time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    for pattern, replacement in (
        (r"\A.*?<svg [^>]*viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{label}">'),
        (r"<metadata>.*?</metadata>|<style.*?</style>", ""),
        (r'<g id="[^"]*"', "<g"),  # nothing refers to them, and every chart has the same ones
        (r"font-family: [^;\"]*", "font-family: inherit"),
    ):
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
