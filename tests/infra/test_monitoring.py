"""Alerts and the dashboard ask for metrics that there are, in expressions that Prometheus understands."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import ray
import yaml

from pipeline import metrics
from tests.infra.manifests import INFRA, KUBERAY, documents, rendered

RULES = yaml.safe_load((INFRA / "monitoring" / "rules.yaml").read_text("utf-8"))
DASHBOARD = json.loads((INFRA / "monitoring" / "dashboard.json").read_text("utf-8"))
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
# Metrics of kube-state-metrics, and the labels that are used of them.
OF_KUBERNETES = {
    "kube_job_failed": {"job_name", "condition"},
    "kube_cronjob_status_last_successful_time": {"cronjob"},
}
# Of Ray's own metrics: the labels used, beside those that every one has.
OF_RAY = {
    "ray_node_gpus_utilization": {"GpuIndex"},
    "ray_node_cpu_utilization": set(),
    "ray_node_mem_used": set(),
    "ray_node_mem_total": set(),
    "ray_object_store_memory": {"Location"},
}
EVERYWHERE = {"instance", "SessionName"}


def expressions() -> Iterator[tuple[str, str]]:
    for alert in ALERTS:
        yield alert["alert"], alert["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def labels_of(name: str) -> set[str]:
    """The labels that a metric has; the test fails for one that nobody exports."""
    for metric in metrics.ALL:
        if metric.exported == name:
            return set(metric.tags)
    assert name in OF_KUBERNETES or name in OF_RAY, f"nobody exports {name}"
    return OF_KUBERNETES.get(name) or OF_RAY[name] | EVERYWHERE


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_an_expression_is_promql_about_metrics_and_labels_that_there_are(title: str, expression: str) -> None:
    promql_parser.parse(expression)
    names = set(re.findall(r"\b(?:ray|kube)_\w+", expression))
    assert names, f"{title} is about nothing"
    known = set().union(*(labels_of(name) for name in names))
    grouped = " ".join(re.findall(r"(?:by|on) \(([\w, ]+)\)", expression))
    matched = re.findall(r"[{,]\s*(\w+)=", expression)
    assert set(re.findall(r"\w+", grouped)) | set(matched) <= known


def test_what_is_no_promql_is_noticed() -> None:
    with pytest.raises(ValueError, match="parenthesis"):
        promql_parser.parse("sum by (stage (ray_rssnet_done_total)")


def test_rays_own_metrics_are_called_what_they_are_called_here() -> None:
    """In the installed Ray: where it exports them, or in its own dashboards."""
    folder = Path(ray.__file__).parent / "dashboard" / "modules"
    files = [path for part in ("reporter", "metrics") for path in (folder / part).rglob("*.py")]
    text = "".join(path.read_text("utf-8") for path in files)
    for name in OF_RAY:
        assert f'"{name.removeprefix("ray_")}"' in text or name in text, name


def test_every_metric_of_the_pipeline_is_looked_at() -> None:
    asked = " ".join(expression for _, expression in expressions())
    assert not [metric.exported for metric in metrics.ALL if metric.exported not in asked]


def test_alerts_say_what_happened_and_what_to_do() -> None:
    assert {"RunFailed", "NoProgress", "ManyRejects", "TrainingWaitsForData", "GpuIdle"} <= {
        alert["alert"] for alert in ALERTS
    }
    for alert in ALERTS:
        assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
        assert alert["labels"]["severity"] in ("info", "warning", "critical")
        assert set(alert["annotations"]) == {"summary", "description"}
        kept = re.findall(r"\b(?:by|on) \(([\w, ]+)\)", alert["expr"])
        for label in re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]):
            assert any(label in group for group in kept), f"{alert['alert']} has no label {label}"


def test_a_failed_night_is_told_by_the_job_of_the_night_and_not_by_the_one_that_submits_it() -> None:
    """KubeRay tries a submitter that has failed again, which is no failed night yet."""
    (expression,) = (alert["expr"] for alert in ALERTS if alert["alert"] == "NightFailed")
    (pattern,) = re.findall(r'job_name=~"([^"]+)"', expression)
    assert re.fullmatch(pattern, "nightly-29380935")
    assert not re.fullmatch(pattern, "nightly-29380935-run")


def test_kubernetes_has_the_same_alerts_and_finds_the_port_of_the_metrics() -> None:
    (rule,) = documents(KUBERAY / "monitoring" / "prometheus-rule.yaml")
    assert rule["spec"] == RULES
    (monitor,) = documents(KUBERAY / "monitoring" / "pod-monitor.yaml")
    assert set(monitor["spec"]) <= {"selector", "podTargetLabels", "podMetricsEndpoints"}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (cluster,) = (each for each in rendered(KUBERAY / "base") if each["kind"] == "RayCluster")
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        assert {"containerPort": 8080, "name": endpoint["port"]} in container["ports"]


def test_the_dashboard_is_one_that_grafana_can_load() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    (source,) = DASHBOARD["templating"]["list"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": f"${{{source['name']}}}"}
        cells = _cells(panel["gridPos"])
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel["targets"]:
            labels = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            assert all(re.search(rf"by \([\w, ]*\b{label}\b", target["expr"]) for label in labels)


def _cells(place: dict[str, Any]) -> set[tuple[int, int]]:
    return {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}


def test_prometheus_asks_the_head_for_its_nodes_with_the_token() -> None:
    config = yaml.safe_load((INFRA / "monitoring" / "prometheus.yaml").read_text("utf-8"))
    (scrape,) = config["scrape_configs"]
    (found,) = scrape["http_sd_configs"]
    source = (Path(ray.__file__).parent / "dashboard/modules/reporter/reporter_head.py").read_text("utf-8")
    assert f'"{found["url"].partition(":8265")[2]}"' in source
    assert set(found["authorization"]) == {"type", "credentials_file"}
    assert all((INFRA / "monitoring" / name).is_file() for name in config["rule_files"])
