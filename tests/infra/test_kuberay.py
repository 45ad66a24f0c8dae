"""The manifests for Kubernetes are valid by the schemas of their kinds, confined, and call workflows rightly."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.ray_constants import OBJECT_STORE_MINIMUM_MEMORY_BYTES

from pipeline.command_line import WrongCall
from pipeline.segment_config import SegmentConfig
from pipeline.sweep import DRIVER_CPUS, SweepConfig, search_space
from pipeline.train_config import TrainConfig
from pipeline.train_resources import needed_cpus
from tests.infra.manifests import KUBERAY, Manifest, containers, documents, faults, rendered, strings
from tests.workflow_calls import REPOSITORY, calls_in, parsed

OVERLAYS = sorted(path.parent for path in KUBERAY.glob("overlays/*/kustomization.yaml"))
FOLDERS = [KUBERAY / "base", *OVERLAYS]
SOURCES = sorted(path for path in KUBERAY.rglob("*.yaml") if path.name != "kustomization.yaml")
ours = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


def of_kind(folder: Path, *kinds: str) -> list[Manifest]:
    return [manifest for manifest in rendered(folder) if manifest["kind"] in kinds]


@ours
def test_each_manifest_is_valid_by_the_schema_of_its_kind(folder: Path) -> None:
    found = {(each["kind"], each["metadata"]["name"]): list(faults(each)) for each in rendered(folder)}
    assert not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("RayCluster", ("spec", "headGroupSpec", "template", "spec", "container"), []),
        ("RayJob", ("spec", "backoffLimit"), "three"),
        ("CronJob", ("spec", "concurrencyPolicies"), "Forbid"),
    ],
)
def test_a_wrong_field_or_value_is_a_fault(kind: str, place: tuple[str, ...], value: Any) -> None:
    manifest = copy.deepcopy(of_kind(KUBERAY / "base", kind)[0])
    *above, last = place
    inner = manifest
    for key in above:
        inner = inner[key]
    inner[last] = value
    assert any(last in fault for fault in faults(manifest))


@ours
def test_each_command_is_one_that_its_workflow_accepts(folder: Path) -> None:
    calls = {call for manifest in rendered(folder) for text in strings(manifest) for call in calls_in(text)}
    assert {re.search(r"workflows/(\w+)", call).group(1) for call in calls} == {"train", "sweep", "segment"}  # pyright: ignore[reportOptionalMemberAccess]
    assert all(parsed(call) for call in calls)
    with pytest.raises(WrongCall, match="imagse"):
        parsed(next(iter(calls)) + " --imagse x")


@ours
def test_a_job_fits_the_largest_cluster_that_it_may_make(folder: Path) -> None:
    for job in of_kind(folder, "RayJob"):
        (config,) = [parsed(call) for call in calls_in(job["spec"]["entrypoint"])]
        groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        cpus, gpus = _capacity(groups, "cpu"), _capacity(groups, "nvidia.com/gpu")
        if isinstance(config, SegmentConfig):
            assert cpus >= config.workers * config.cpus_per_worker + 1
            assert gpus >= config.workers * config.gpus_per_worker * config.use_gpu
        elif isinstance(config, TrainConfig):
            assert cpus >= config.resources.workers * (config.resources.cpus_per_worker + 1)
            assert gpus >= config.resources.workers * config.resources.use_gpu
        elif isinstance(config, SweepConfig):
            space = search_space(config)
            trial = space.config(config.dataset, config.run, space.default()).resources
            assert config.concurrent_trials, "the cluster would grow for one trial only"
            assert cpus >= config.concurrent_trials * (needed_cpus(trial) + DRIVER_CPUS)
            assert gpus >= config.concurrent_trials * trial.workers * trial.gpus_per_worker * trial.use_gpu


def _capacity(groups: list[Manifest], resource: str) -> float:
    return sum(
        group["maxReplicas"] * float(container["resources"]["limits"].get(resource, 0))
        for group in groups
        for container in containers(group)
    )


@ours
def test_a_ray_job_is_a_template_that_costs_nothing_until_it_is_started(folder: Path) -> None:
    jobs = of_kind(folder, "RayJob")
    assert {job["metadata"]["name"] for job in jobs} == {"train", "sweep", "segment"}
    for job in jobs:
        assert job["spec"]["suspend"]
        assert job["spec"]["shutdownAfterJobFinishes"]  # the operator refuses to suspend without it
        assert job["spec"]["activeDeadlineSeconds"] > 0
        assert "clusterSelector" not in job["spec"]


@ours
def test_ray_is_the_pinned_one_and_images_have_versions(folder: Path) -> None:
    (ray,) = re.findall(r'"ray\[[\w,]+\]==([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text("utf-8"))
    version = re.search(r'__version__ = "(.+)"', (REPOSITORY / "rssnet/__init__.py").read_text("utf-8"))
    assert version
    (cluster,) = of_kind(folder, "RayCluster")
    assert cluster["spec"]["rayVersion"] == ray
    assert all(spec == cluster["spec"] for spec in _cluster_specs(folder)), "a RayJob's cluster is another one"
    images = {container["image"] for manifest in rendered(folder) for container in containers(manifest)}
    assert images
    (moto,) = re.findall(r"^moto==(.*)$", (REPOSITORY / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    for image in images - {f"motoserver/moto:{moto}"}:
        assert re.fullmatch(rf"(\S+/)?rssnet:{re.escape(version.group(1))}-(cpu|cuda)", image)


def _cluster_specs(folder: Path) -> Iterator[Manifest]:
    for manifest in rendered(folder):
        if manifest["kind"] == "RayCluster":
            yield manifest["spec"]
        elif manifest["kind"] == "RayJob":
            yield manifest["spec"]["rayClusterSpec"]
        elif manifest["kind"] == "RayCronJob":
            yield manifest["spec"]["jobTemplate"]["rayClusterSpec"]


@ours
def test_every_pod_is_confined(folder: Path) -> None:
    """As the namespace's level `restricted` asks for, and without more than a part of a node."""
    for manifest in rendered(folder):
        for template in _pod_specs(manifest):
            assert template["securityContext"]["runAsNonRoot"]
            assert template["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(template)
            for container in template["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                resources = container["resources"]
                assert resources["requests"] == resources["limits"]
                assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["limits"])
            assert not [volume for volume in template.get("volumes", ()) if "hostPath" in volume]


def _pod_specs(value: Any) -> Iterator[Manifest]:
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            yield value
        for each in value.values():
            yield from _pod_specs(each)
    elif isinstance(value, list):
        for each in value:
            yield from _pod_specs(each)


@ours
def test_clusters_ask_for_a_token_scale_to_nothing_and_have_shared_memory_and_room_to_spill(folder: Path) -> None:
    specs = list(_cluster_specs(folder))
    assert specs
    for spec in specs:
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["enableInTreeAutoscaling"]
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert {group["minReplicas"] for group in spec["workerGroupSpecs"]} == {0}
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
            assert volumes["shm"]["medium"] == "Memory"
            assert set(volumes) == {"shm", "spill"}
            (container,) = pod["containers"]
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts == {"shm": "/dev/shm", "spill": "/tmp/ray"}
            limits = container["resources"]["limits"]
            assert _gibibytes(volumes["shm"]["sizeLimit"]) <= _gibibytes(limits["memory"]) / 2
            assert _gibibytes(volumes["spill"]["sizeLimit"]) < _gibibytes(limits["ephemeral-storage"])
            # Else Ray would keep objects on the disk; the rest is for what PyTorch shares between processes.
            objects = int(group["rayStartParams"]["object-store-memory"]) / 2**30
            assert OBJECT_STORE_MINIMUM_MEMORY_BYTES / 2**30 < objects <= 0.8 * _gibibytes(volumes["shm"]["sizeLimit"])


def _gibibytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([MG]i)", quantity).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return int(number) / {"Mi": 1024, "Gi": 1}[unit]


@ours
def test_every_selector_finds_something(folder: Path) -> None:
    """A misspelt label in a budget or policy would protect nothing, and say nothing."""
    (cluster,) = of_kind(folder, "RayCluster")
    labels = {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/node-type": "head"}  # as KubeRay sets them
    (budget,) = of_kind(folder, "PodDisruptionBudget")
    assert budget["spec"]["selector"]["matchLabels"] == labels
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(folder, "NetworkPolicy")}
    assert policies["closed"]["podSelector"] == {}
    assert set(policies["closed"]["policyTypes"]) == {"Ingress", "Egress"}
    assert not {"ingress", "egress"} & set(policies["closed"])


@ours
def test_nothing_is_open_to_the_world(folder: Path) -> None:
    assert not of_kind(folder, "Ingress", "Gateway", "HTTPRoute")
    for service in of_kind(folder, "Service"):
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
    for spec in _cluster_specs(folder):
        assert not spec["headGroupSpec"].get("enableIngress")
        assert spec["headGroupSpec"].get("serviceType", "ClusterIP") == "ClusterIP"
    for policy in of_kind(folder, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            assert rule.get("from"), f"{policy['metadata']['name']} lets everybody in"


@pytest.mark.parametrize("path", sorted(KUBERAY.rglob("kustomization.yaml")), ids=lambda path: path.parent.name)
def test_what_a_kustomization_names_is_there(path: Path) -> None:
    """Without kubectl, too: every file, and every target of a patch."""
    (kustomization,) = documents(path)
    named = [*kustomization.get("resources", ()), *kustomization.get("components", ())]
    named += [patch["path"] for patch in kustomization.get("patches", ()) if "path" in patch]
    named += [file for made in kustomization.get("configMapGenerator", ()) for file in made.get("files", ())]
    for name in named:
        place = path.parent / name
        assert place.is_file() or (place / "kustomization.yaml").is_file(), f"{path} names {name}"
    there = {(each["kind"], each["metadata"]["name"]) for file in SOURCES for each in documents(file) if "kind" in each}
    kinds = {kind for kind, _ in there}
    for patch in kustomization.get("patches", ()):
        target = patch["target"]
        assert target["kind"] in kinds
        assert "name" not in target or (target["kind"], target["name"]) in there


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_each_source_is_used(path: Path) -> None:
    kustomization = yaml.safe_load((path.parent / "kustomization.yaml").read_text("utf-8"))
    used = [*kustomization.get("resources", ()), *(patch.get("path") for patch in kustomization.get("patches", ()))]
    assert path.name in used
