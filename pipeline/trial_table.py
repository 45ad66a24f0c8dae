"""How a sweep goes, shown where its driver runs: a table at a terminal, a line for each change in a log."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.objectives import Objectives
from pipeline.progress import LINE_SECONDS, POLL_SECONDS, Progress, announce
from pipeline.trial_book import ENDED, TrialRecord

SHOWN = 16  # trials of the table at a terminal


class TrialTable(Progress):
    """Shows the trials of a sweep while a `with` block runs.

    Args:
        total: iterations of all trials.
        count: trials that there will be, as far as is known.
        objectives: of the sweep.
        trials: gives the records as they are now.
    """

    def __init__(
        self, total: int, count: int, objectives: Objectives, trials: Callable[[], Sequence[TrialRecord]]
    ) -> None:
        super().__init__("sweep", total=total, unit="iterations")
        self.count, self.objectives, self.trials = count, objectives, trials

    def _show_bar(self) -> None:
        with Live(console=Console(), auto_refresh=False) as live:
            while True:
                last = self._stop.wait(POLL_SECONDS)
                done, note = self._read()
                records = self.trials()
                head = Text("  " + ", ".join([self._summary(records, done), *([note] if note else [])]))
                live.update(Group(trial_table(records, self.objectives), head), refresh=True)
                if last:
                    return

    def _show_lines(self) -> None:
        told: dict[int, str] = {}
        shown, shown_at = "", 0.0
        while True:
            last = self._stop.wait(POLL_SECONDS)
            records = self.trials()
            for record in records:
                if record.state in ENDED and told.get(record.trial) != record.state:
                    told[record.trial] = record.state
                    announce(f"  sweep: {trial_line(record, self.objectives)}")
            now = time.monotonic()
            if last or now - shown_at >= LINE_SECONDS:
                summary = self._summary(records, self._read()[0])
                if summary != shown:
                    announce(f"  sweep: {summary}")
                    shown, shown_at = summary, now
            if last:
                return

    def _summary(self, records: Sequence[TrialRecord], done: float) -> str:
        return sweep_line(records, self.objectives, self.count, self.total - done, self._rate(done))


def trial_table(records: Sequence[TrialRecord], objectives: Objectives) -> Table:
    """The running trials, and of the others the best and the last ones."""
    candidates = [record.metrics for record in records]
    best = objectives.best(candidates)
    sign = 1 if objectives.modes[0] == "max" else -1
    ranked = sorted(records, key=lambda record: -sign * record.metrics.get(objectives.first, -sign * float("inf")))
    chosen = [record for record in records if record.state == "running"] + ranked
    shown = sorted(dict.fromkeys(record.trial for record in chosen[:SHOWN]))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("trial", "state", *objectives.names, "iterations", "parameters"):
        table.add_column(heading, justify="right" if heading in (*objectives.names, "iterations") else "left")
    by_number = {record.trial: record for record in records}
    for number in shown:
        record = by_number[number]
        scores = [_number(record.metrics.get(name)) for name in objectives.names]
        style = "bold" if best is not None and records[best].trial == number else None
        table.add_row(
            str(number),
            record.state,
            *scores,
            f"{record.iterations:,}",
            parameters_text(record.parameters),
            style=style,
        )
    return table


def sweep_line(
    records: Sequence[TrialRecord], objectives: Objectives, count: int, left: float, rate: float | None
) -> str:
    """A sweep in one line.

    Args:
        records: of the trials that there are.
        objectives: of the sweep.
        count: trials that there will be.
        left: iterations, if nothing is stopped early.
        rate: iterations per second, where that is known.
    """
    ended = sum(record.state in ENDED for record in records)
    running = sum(record.state == "running" for record in records)
    said = [f"{ended} of {count} trials done", f"{running} running"]
    best = objectives.best([record.metrics for record in records])
    if best is not None:
        said.append(f"trial {records[best].trial} leads with {_scores(records[best], objectives)}")
    if rate:
        said.append(f"{rate:.1f} iterations/s")
        if left > 0 and ended < count:
            said.append(f"at most {timedelta(seconds=round(left / rate))} left")
    return ", ".join(said)


def trial_line(record: TrialRecord, objectives: Objectives) -> str:
    """One trial in one line of a log."""
    text = f"trial {record.trial} {record.state.replace('_', ' ')}"
    text += f": {record.error}" if record.error else f", {_scores(record, objectives)} at {record.iterations}"
    return f"{text} ({parameters_text(record.parameters)})"


def parameters_text(parameters: dict[str, Any]) -> str:
    """Parameters by the last part of their names, as short as they can be told."""
    return ", ".join(f"{name.rpartition('.')[2]} {value_text(value)}" for name, value in parameters.items())


def value_text(value: Any) -> str:
    """A parameter's value, as short as it can be told."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _scores(record: TrialRecord, objectives: Objectives) -> str:
    return ", ".join(f"{name} {_number(record.metrics.get(name))}" for name in objectives.names)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
