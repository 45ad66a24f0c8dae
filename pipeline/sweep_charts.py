"""The pictures of a sweep's report, as SVG in the page's own colours (see `charts`)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from pipeline.charts import ACCENT, BEST, GRID, HEIGHT_INCHES, INK, MUTED, WIDTH_INCHES, svg
from pipeline.objectives import Objectives
from pipeline.search_space import Parameter
from pipeline.trial_book import TrialRecord
from pipeline.trial_table import value_text

WIDE_INCHES = 2 * WIDTH_INCHES
SLICES_IN_A_ROW = 4
LABEL_LENGTH = 26


def learning_curves(trials: Sequence[TrialRecord], objective: str, best: int) -> str:
    """The objective over iterations, a line per trial; `best` is the number of the one to bring out."""
    figure = Figure(figsize=(WIDE_INCHES, HEIGHT_INCHES), layout="constrained")
    axes = figure.subplots()
    for trial in sorted(trials, key=lambda trial: trial.trial == best):
        points = [(point["iteration"], point[objective]) for point in trial.curve if objective in point]
        if points:
            leads = trial.trial == best
            colour, alpha = (BEST, 1.0) if leads else (INK, 0.7) if trial.trial == 0 else (ACCENT, 0.4)
            axes.plot(*zip(*points, strict=True), color=colour, alpha=alpha, linewidth=2, marker="o", markersize=4)
            axes.annotate(str(trial.trial), points[-1], (5, -3), textcoords="offset points", color=INK, fontsize=8)
    axes.margins(x=0.04)
    axes.set_xlabel("iteration")
    axes.set_ylabel(objective)
    return svg(figure, [axes], "Learning curves of all trials")


def parallel_coordinates(
    trials: Sequence[TrialRecord], parameters: Mapping[str, Parameter], objectives: Objectives, best: int
) -> str:
    """Each trial with a score as a line through its parameters to the objective; a gap where one plays no part."""
    figure = Figure(figsize=(WIDE_INCHES, 4.0), layout="constrained")
    axes = figure.subplots()
    scores = [trial.metrics[objectives.first] for trial in trials]
    low, high = min(scores), max(scores)
    names = [*parameters, objectives.first]
    sign = 1 if objectives.modes[0] == "max" else -1
    for trial in sorted(trials, key=lambda trial: (trial.trial == best, sign * trial.metrics[objectives.first])):
        score = (trial.metrics[objectives.first] - low) / (high - low) if high > low else 0.5
        heights = [
            _height(parameter, trial.parameters[name]) if name in trial.parameters else math.nan
            for name, parameter in parameters.items()
        ]
        good = score if sign > 0 else 1 - score
        leads = trial.trial == best
        axes.plot(
            range(len(names)),
            [*heights, score],
            color=BEST if leads else ACCENT,
            alpha=1.0 if leads else 0.12 + 0.6 * good**2,
            linewidth=2.4 if leads else 1.4,
            marker="o",
            markersize=3,
        )
    for position, name in enumerate(names):
        axes.axvline(position, color=GRID, linewidth=1)
        bottom, top = (
            _ends(parameters[name]) if name in parameters else (value_text(float(low)), value_text(float(high)))
        )
        for text, height, place in ((bottom, -0.04, "top"), (top, 1.04, "bottom")):
            axes.text(position, height, text, ha="center", va=place, color=MUTED, fontsize=9)
    axes.set_ylim(-0.14, 1.14)
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=30, ha="right")
    axes.set_yticks([])
    return svg(figure, [axes], "Parallel coordinates of all trials with a score")


def importance_bars(shares: Mapping[str, float]) -> str:
    """How much each parameter has mattered, in percent."""
    figure = Figure(figsize=(WIDE_INCHES, 0.7 + 0.34 * len(shares)), layout="constrained")
    axes = figure.subplots()
    names = list(shares)[::-1]
    axes.barh(range(len(names)), [100 * shares[name] for name in names], color=ACCENT, height=0.62)
    axes.set_yticks(range(len(names)), [_short(name, 60) for name in names])
    for position, name in enumerate(names):
        axes.annotate(
            f"{100 * shares[name]:.0f} %",
            (100 * shares[name], position),
            (4, -3),
            textcoords="offset points",
            color=INK,
            fontsize=9,
        )
    axes.margins(x=0.1)
    return svg(figure, [axes], "Importance of each parameter", ordinal=True)


def slices(trials: Sequence[TrialRecord], parameters: Mapping[str, Parameter], objective: str, best: int) -> str:
    """The objective over each parameter alone, a point per trial."""
    rows = -(-len(parameters) // SLICES_IN_A_ROW)
    columns = min(len(parameters), SLICES_IN_A_ROW)
    figure = Figure(figsize=(WIDE_INCHES, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    drawn: list[Axes] = []
    for position, (name, parameter) in enumerate(parameters.items()):
        axes = grid[position // columns, position % columns]
        with_it = [trial for trial in trials if name in trial.parameters]
        heights = [trial.metrics[objective] for trial in with_it]
        colours = [BEST if trial.trial == best else ACCENT for trial in with_it]
        if parameter.kind == "choice":
            places = [_rank(parameter, trial.parameters[name]) for trial in with_it]
            axes.set_xlim(-0.6, len(parameter.values) - 0.4)
            labels = [_short(value_text(value), 9) for value in parameter.values]
            axes.set_xticks(range(len(parameter.values)), labels)
        else:
            places = [float(trial.parameters[name]) for trial in with_it]
            if parameter.kind == "loguniform":
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())
        axes.scatter(places, heights, s=26, color=colours, alpha=0.85)
        axes.set_xlabel(_short(name))
        if position % columns == 0:
            axes.set_ylabel(objective)
        drawn.append(axes)
    for empty in grid.flat[len(parameters) :]:
        empty.set_axis_off()
    return svg(figure, drawn, "The objective over each parameter")


def pareto_front(trials: Sequence[TrialRecord], objectives: Objectives, front: Sequence[int]) -> str:
    """Two objectives against each other; `front` has the numbers of the trials that none other beats in both."""
    figure = Figure(figsize=(WIDE_INCHES, HEIGHT_INCHES), layout="constrained")
    axes = figure.subplots()
    across, up = objectives.names[1], objectives.names[0]
    on_it = sorted((trial for trial in trials if trial.trial in front), key=lambda trial: trial.metrics[across])
    others = [trial for trial in trials if trial.trial not in front]
    axes.scatter(
        [trial.metrics[across] for trial in others], [trial.metrics[up] for trial in others], s=26, color=ACCENT
    )
    axes.plot(
        [trial.metrics[across] for trial in on_it],
        [trial.metrics[up] for trial in on_it],
        color=BEST,
        linewidth=1.4,
        marker="o",
        markersize=6,
    )
    for trial in on_it:
        axes.annotate(
            str(trial.trial), (trial.metrics[across], trial.metrics[up]), (6, 4), textcoords="offset points", color=INK
        )
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.margins(0.08)
    return svg(figure, [axes], "Pareto front of the two objectives")


def cost_bars(trials: Sequence[TrialRecord], device: str) -> str:
    """What each trial has cost, and above it what stopping it early has saved, in seconds of a GPU or a CPU."""
    figure = Figure(figsize=(WIDE_INCHES, 2.6), layout="constrained")
    axes = figure.subplots()
    numbers = [trial.trial for trial in trials]
    costs = np.array([trial.device_seconds for trial in trials])
    axes.bar(numbers, costs, color=ACCENT, width=0.7)
    axes.bar(numbers, [trial.saved for trial in trials], bottom=costs, color=MUTED, alpha=0.3, width=0.7)
    axes.set_xlabel("trial")
    axes.set_ylabel(f"{device} seconds")
    return svg(figure, [axes], "What each trial has cost, and what stopping it early has saved")


def _height(parameter: Parameter, value: Any) -> float:
    """Where on its axis a value lies, from 0 to 1."""
    if parameter.kind == "choice":
        return _rank(parameter, value) / max(1, len(parameter.values) - 1)
    low, high = (float(end) for end in parameter.values[:2])
    if parameter.kind == "loguniform":
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def _rank(parameter: Parameter, value: Any) -> int:
    told = parameter.told(value)
    return [parameter.told(item) for item in parameter.values].index(told)


def _ends(parameter: Parameter) -> tuple[str, str]:
    ends = (parameter.values[0], parameter.values[-1 if parameter.kind == "choice" else 1])
    return _short(value_text(ends[0]), 9), _short(value_text(ends[1]), 9)


def _short(text: str, length: int = LABEL_LENGTH) -> str:
    """The end of a name, which tells most about it; a dollar would begin a formula."""
    return (text if len(text) <= length else f"…{text[1 - length :]}").replace("$", r"\$")
