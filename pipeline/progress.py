"""Progress of distributed work, shown where the driver runs: a bar at a terminal, plain lines in a log."""

import collections
import logging
import sys
import threading
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from pipeline import metrics

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0

_log = logging.getLogger(__name__)


def announce(text: str) -> None:
    """One plain line for the person or the log that follows the run."""
    print(text, flush=True)


class _Board:
    """Where workers write how far they are; the driver reads it."""

    def __init__(self) -> None:
        self.done: dict[str, float] = collections.defaultdict(float)
        self.worked = 0.0  # units finished here: not what an earlier run had done, but twice what was done twice
        self.note = ""

    def advance(self, part: str, amount: float) -> None:
        self.done[part] += amount
        self.worked += amount

    def set(self, part: str, done: float, note: str) -> None:
        if part in self.done:
            self.worked += max(0.0, done - self.done[part])
        self.done[part], self.note = done, note

    def read(self) -> tuple[float, float, str]:
        return sum(self.done.values()), self.worked, self.note


class Reporter:
    """Handed to workers: says how far they are. Sending is fire and forget and costs no waiting."""

    def __init__(self, board: Any, part: str = "") -> None:
        self._board, self._part = board, part

    def part(self, name: str) -> "Reporter":
        """A reporter of one part of the work; what is shown is the sum over parts."""
        return Reporter(self._board, name)

    def advance(self, amount: float) -> None:
        """Add `amount` finished units."""
        self._board.advance.remote(self._part, amount)

    def update(self, done: float, note: str = "") -> None:
        """Set the number of finished units, with a short text such as the loss."""
        self._board.set.remote(self._part, done, note)


class Progress(AbstractContextManager["Progress"]):
    """Shows `title done/total`, the rate and the time left while a `with` block runs, and tells them to Prometheus.

    Args:
        title: what is being done.
        total: how many units there are.
        unit: plural name of a unit, e.g. `images`.
    """

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        # With the driver, for what is shown would end with any other node.
        here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._board: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
        self.reporter = Reporter(self._board)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, name=f"progress-{title}", daemon=True)
        self._exported = 0.0  # units
        self._first: tuple[float, float] | None = None  # units and time when the first ones were seen to be done

    def __enter__(self) -> "Progress":
        metrics.RUNNING.set(1, stage=self.title)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        metrics.RUNNING.set(0, stage=self.title)
        ray.kill(self._board)

    def _read(self) -> tuple[float, str]:
        done, worked, note = ray.get(self._board.read.remote(), timeout=30)
        metrics.DONE.add(worked - self._exported, stage=self.title, unit=self.unit)
        self._exported = worked
        metrics.PROGRESS.set(min(1.0, done / max(1, self.total)), stage=self.title)
        return done, note

    def _show(self) -> None:
        try:
            if sys.stdout.isatty():
                self._show_bar()
            else:
                self._show_lines()
        except (RayError, RuntimeError) as error:  # the cluster is gone: the work itself says why
            _log.debug("progress display ended: %s", error)

    def _show_bar(self) -> None:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with RichProgress(*columns, console=Console(), transient=False) as bars:
            bar = bars.add_task(self.title, total=self.total, rate="", note="")
            while True:
                last = self._stop.wait(POLL_SECONDS)
                done, note = self._read()
                rate = self._rate(done)
                said = f"{rate:.1f} {self.unit}/s" if rate else ""
                bars.update(bar, completed=min(done, self.total), rate=said, note=note)
                if last:
                    return

    def _show_lines(self) -> None:
        shown, shown_at = -1.0, 0.0
        while True:
            last = self._stop.wait(POLL_SECONDS)
            now = time.monotonic()
            if not last and now - shown_at < LINE_SECONDS:
                continue
            done, note = self._read()
            if done != shown:
                said, rate = [f"{done:g}/{self.total} {self.unit}"], self._rate(done)
                if rate:
                    said.append(f"{rate:.1f} {self.unit}/s")
                    if done < self.total:
                        said.append(f"{timedelta(seconds=round((self.total - done) / rate))} left")
                announce(f"  {self.title}: {', '.join([*said, note] if note else said)}")
                shown, shown_at = done, now
            if last:
                return

    def _rate(self, done: float) -> float | None:
        """Units per second since the work was first seen to move: what an earlier run did, or starting, is left out."""
        now = time.monotonic()
        if self._first is None and done:
            self._first = done, now
        if self._first is None or now - self._first[1] < 1 or done <= self._first[0]:
            return None
        return (done - self._first[0]) / (now - self._first[1])
