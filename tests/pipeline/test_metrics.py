"""What Prometheus reads on a node of Ray while the pipeline works, and after it has ended."""

import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from pipeline import metrics
from pipeline.progress import Progress
from pipeline.run_record import record_run

PATIENCE_SECONDS = 60.0  # Ray sends metrics every ten


@dataclass(frozen=True)
class _Config:
    images: str = "s3://photos"


def scraped() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The pipeline's samples on this node, by name and the pipeline's own labels, summed over processes."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    tags = {tag for metric in metrics.ALL for tag in metric.tags}
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset((name, value) for name, value in sample.labels.items() if name in tags)
            found[key] = found.get(key, 0) + sample.value
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_prometheus_sees_how_far_a_stage_is_and_what_a_run_has_come_to(tmp_path: Path) -> None:
    with (
        record_run(str(tmp_path), "segment", _Config(), {}, []) as record,
        Progress("metrics", 9, "images") as progress,
    ):
        progress.reporter.advance(4)
        resumed = progress.reporter.part("resumed")
        resumed.update(100)  # which an earlier run had done
        resumed.update(103)
        record.counts, record.results = {"ok": 5, "failed": 2, "listed": 70}, {"miou": 0.25, "model_id": "x"}
    expected = {
        _sample(metrics.DONE, stage="metrics", unit="images"): 7,
        _sample(metrics.PROGRESS, stage="metrics"): 1,
        _sample(metrics.RUNNING, stage="metrics"): 0,
        _sample(metrics.RUNS, workflow="segment", outcome="done"): 1,
        _sample(metrics.IMAGES, workflow="segment", result="ok"): 5,
        _sample(metrics.IMAGES, workflow="segment", result="failed"): 2,
        _sample(metrics.SCORE, workflow="segment", score="miou"): 0.25,
    }
    until = time.monotonic() + PATIENCE_SECONDS
    found = scraped()
    while not set(expected) <= set(found) and time.monotonic() < until:
        time.sleep(1)
        found = scraped()
    counted_before = {metrics.RUNS.exported, metrics.IMAGES.exported}  # other tests of this session segment, too
    for sample, value in expected.items():
        assert found[sample] >= value if sample[0] in counted_before else found[sample] == value


def _sample(metric: metrics.Metric, **tags: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return metric.exported, frozenset(tags.items())


def test_names_are_prometheus_own_kind_and_each_is_there_once() -> None:
    assert len({metric.name for metric in metrics.ALL}) == len(metrics.ALL)
    for metric in metrics.ALL:
        assert metric.name.startswith("rssnet_")
        assert not metric.name.endswith("_total")  # Ray puts it there


def test_a_wrong_tag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="has the tags stage, unit, not stage"):
        metrics.DONE.add(1, stage="x")


def test_outside_ray_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    metrics.DONE.add(1, stage="x", unit="images")
    metrics.run_ended("train", "failed", {}, {})
