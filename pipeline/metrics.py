"""What the pipeline tells Prometheus, through Ray: names, units, and what each of them means.

Ray serves these on every node, beside its own, with `ray_` before each name and `_total` behind counters, and with the
process that has counted as a label, so sums over processes are what means something. A gauge is gone some seconds after
its process, a counter stays as long as its node; Ray sends both every few seconds and when a process ends in order, so
what a killed one counted last is lost. What a run has come to is in its `run.json`.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ray
from ray.util.metrics import Counter, Gauge

Kind = Literal["counter", "gauge"]


@dataclass(frozen=True)
class Metric:
    """One of the pipeline's metrics.

    Args:
        name: without what Ray puts around it.
        kind: a counter only grows; a gauge is what it was set to last.
        meaning: for Prometheus' help text, with the unit.
        tags: what tells its time series apart.
    """

    name: str
    kind: Kind
    meaning: str
    tags: tuple[str, ...]

    @property
    def exported(self) -> str:
        """The name in Prometheus."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"

    def add(self, amount: float, **tags: str) -> None:
        """Add to a counter; nothing happens outside Ray, or for nothing."""
        if amount and ray.is_initialized():
            _counter(self.name, self.meaning, self.tags).inc(amount, self._checked(tags))

    def set(self, value: float, **tags: str) -> None:
        """Set a gauge; nothing happens outside Ray."""
        if ray.is_initialized():
            _gauge(self.name, self.meaning, self.tags).set(value, self._checked(tags))

    def _checked(self, tags: dict[str, str]) -> dict[str, str]:
        if set(tags) != set(self.tags):
            raise ValueError(f"{self.name} has the tags {', '.join(self.tags)}, not {', '.join(tags)}")
        return tags


RUNNING = Metric("rssnet_running", "gauge", "1 while a stage is at work, 0 when it has ended", ("stage",))
DONE = Metric("rssnet_done", "counter", "Units that stages have finished, again too", ("stage", "unit"))
PROGRESS = Metric("rssnet_progress", "gauge", "Share of a stage that is finished, 0 to 1", ("stage",))
RUNS = Metric("rssnet_runs", "counter", "Runs that have ended, by outcome: done or failed", ("workflow", "outcome"))
IMAGES = Metric("rssnet_images", "counter", "Images of ended runs: ok, rejected or failed", ("workflow", "result"))
SCORE = Metric("rssnet_score", "gauge", "Scores of a model, 0 to 1, such as miou", ("workflow", "score"))
STEP_SECONDS = Metric("rssnet_step_seconds", "gauge", "Seconds from one training step to the next, lately", ("run",))
DATA_WAIT = Metric("rssnet_data_wait_share", "gauge", "Share of a step, 0 to 1, that training waits for data", ("run",))

ALL = (RUNNING, DONE, PROGRESS, RUNS, IMAGES, SCORE, STEP_SECONDS, DATA_WAIT)

# What a run's counts say of images, by workflow.
_RESULTS = {
    "ingest": {"out": "ok", "rejected": "rejected"},
    "evaluate": {"images": "ok"},
    "segment": {"ok": "ok", "failed": "failed"},
}


def run_ended(workflow: str, outcome: str, counts: Mapping[str, int], results: Mapping[str, object]) -> None:
    """Export what a run record says at its end; nothing happens outside Ray."""
    RUNS.add(1, workflow=workflow, outcome=outcome)
    for name, result in _RESULTS.get(workflow, {}).items():
        IMAGES.add(counts.get(name, 0), workflow=workflow, result=result)
    for name in ("miou", "macc", "aacc"):
        value = results.get(name)
        if isinstance(value, float):
            SCORE.set(value, workflow=workflow, score=name)


@functools.cache
def _counter(name: str, meaning: str, tags: tuple[str, ...]) -> Counter:
    return Counter(name, meaning, tags)


@functools.cache
def _gauge(name: str, meaning: str, tags: tuple[str, ...]) -> Gauge:
    return Gauge(name, meaning, tags)
