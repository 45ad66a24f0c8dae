"""The report of a sweep: one HTML file with what was tried, what it has found out and what that has cost."""

import datetime
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline import storage, sweep_charts
from pipeline.importance import importances
from pipeline.objectives import METRICS, Objectives
from pipeline.page import page
from pipeline.redaction import redacted
from pipeline.retraining import Retrained
from pipeline.search_space import Parameter, SearchSpace
from pipeline.trial_book import TrialRecord
from pipeline.trial_table import value_text

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class _Chart:
    title: str
    note: str
    picture: Markup


@dataclass(frozen=True)
class _Cost:
    spent: float
    saved: float
    whole: float

    @property
    def share(self) -> float:
        """Of what all trials would have cost without stopping any."""
        return self.saved / self.whole if self.whole else 0.0


def write_sweep_report(
    run: str,
    space: SearchSpace,
    objectives: Objectives,
    trials: Sequence[TrialRecord],
    again: Retrained | None = None,
) -> str:
    """Write `report.html` below the sweep's URL, and return where it lies.

    Args:
        run: URL of the sweep.
        space, objectives: of the sweep.
        trials: by number.
        again: how the best configuration did with other seeds, if that was tried.

    Raises:
        StorageError: if the place cannot be written.
    """
    url = storage.join(run, REPORT_FILE)
    storage.write_bytes(url, render(run, space, objectives, trials, again).encode())
    return url


def render(
    run: str,
    space: SearchSpace,
    objectives: Objectives,
    trials: Sequence[TrialRecord],
    again: Retrained | None = None,
) -> str:
    """The report as HTML text, which loads nothing from anywhere."""
    position = objectives.best([trial.metrics for trial in trials])
    best = None if position is None else trials[position]
    front = [trials[position].trial for position in objectives.front([trial.metrics for trial in trials])]
    device = "GPU" if space.config("unused", "unused", {}).resources.use_gpu else "CPU"
    return page(
        "sweep_report.html.j2",
        {"number": _number, "value": value_text, "seconds": _seconds, "url": redacted},
        run=run,
        written=datetime.datetime.now(datetime.UTC),
        objectives=objectives,
        trials=trials,
        best=best,
        front=front if len(objectives.names) > 1 else [],
        states=Counter(trial.state for trial in trials),
        parameters=list(space.ranges),
        metrics=[name for name in METRICS if any(name in trial.metrics for trial in trials)],
        device=device,
        cost=_cost(trials),
        again=again,
        charts=_charts(space, objectives, trials, best, front, device),
    )


def _charts(
    space: SearchSpace,
    objectives: Objectives,
    trials: Sequence[TrialRecord],
    best: TrialRecord | None,
    front: Sequence[int],
    device: str,
) -> list[_Chart]:
    charts: list[_Chart] = []

    def add(title: str, note: str, draw: Callable[[], str]) -> None:
        # The texts are numbers, names of fields and values, which matplotlib escapes.
        charts.append(_Chart(title, note, Markup(draw())))

    scored = [trial for trial in trials if objectives.values(trial.metrics) is not None]
    first = objectives.first
    if best is not None:
        number = best.trial
        parameters = _used(space.parameters, scored)
        curves = "A line per trial; the best one is brought out, the recipe itself, trial 0, is dark."
        add("Learning curves", curves, lambda: sweep_charts.learning_curves(trials, first, number))
        if len(objectives.names) > 1:
            note = f"No trial on the line is beaten by another in both {objectives.names[0]} and {objectives.names[1]}."
            add("Pareto front", note, lambda: sweep_charts.pareto_front(scored, objectives, front))
        lines = "A line per trial through its parameters to its score. A parameter that played no part leaves a gap."
        add(
            "Parallel coordinates",
            lines,
            lambda: sweep_charts.parallel_coordinates(scored, parameters, objectives, number),
        )
        shares = importances(trials, space, objectives)
        if shares:
            note = (
                "How far each parameter sets the best quarter of the trials apart from the others (PED-ANOVA), by "
                f"{first}. It says how much a parameter matters within its range, not in which direction."
            )
            add("Importance", note, lambda: sweep_charts.importance_bars(shares))
        slices = "Each trial's score over one parameter, whatever the others were."
        add("Slices", slices, lambda: sweep_charts.slices(scored, parameters, first, number))
    if trials:
        note = f"{device} seconds that each trial has held; above, in grey, what stopping it early has saved."
        add("Cost", note, lambda: sweep_charts.cost_bars(trials, device))
    return charts


def _used(parameters: Mapping[str, Parameter], trials: Sequence[TrialRecord]) -> dict[str, Parameter]:
    """Those that played a part in any trial."""
    return {
        name: parameter for name, parameter in parameters.items() if any(name in trial.parameters for trial in trials)
    }


def _cost(trials: Sequence[TrialRecord]) -> _Cost:
    spent = math.fsum(trial.device_seconds for trial in trials)
    saved = math.fsum(trial.saved for trial in trials)
    return _Cost(spent, saved, spent + saved)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) and math.isfinite(value) else "–"


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
