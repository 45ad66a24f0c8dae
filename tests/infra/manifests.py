"""Manifests as Kubernetes would see them: rendered by kustomize, and checked against the schemas of their kinds."""

import copy
import functools
import gzip
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

INFRA = Path(__file__).parents[2] / "infra"
KUBERAY = INFRA / "kuberay"
KUBERNETES = "1.34"
CUSTOM = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}
WITHOUT_SCHEMA = {"PodMonitor", "PrometheusRule"}  # what tests check by hand
Manifest = dict[str, Any]


def documents(path: Path) -> list[Manifest]:
    """Every YAML document of a file."""
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document is not None]


@functools.cache
def rendered(folder: Path) -> tuple[Manifest, ...]:
    """What `kubectl apply -k FOLDER` would send; the test is skipped where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl on this machine to render kustomizations with")
    command = [kubectl, "kustomize", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert made.returncode == 0, made.stderr
    return tuple(yaml.safe_load_all(made.stdout))


def kuberay_schema(kind: str) -> dict[str, Any]:
    """KubeRay's own schema of a kind, v1, strict; the test is skipped, saying so, where its CRDs are not at hand."""
    default = Path(__file__).parents[3] / "shared" / "data" / "kuberay-crds"
    file = Path(os.environ.get("KUBERAY_CRDS", default)) / f"ray.io_{CUSTOM[kind]}.yaml.gz"
    if not file.is_file():
        pytest.skip(f"no custom resource definition at {file}: set KUBERAY_CRDS to KubeRay's")
    return _v1_schema(file)


@functools.cache
def _v1_schema(file: Path) -> dict[str, Any]:
    definition = yaml.load(gzip.decompress(file.read_bytes()), yaml.CSafeLoader)
    (version,) = (each for each in definition["spec"]["versions"] if each["name"] == "v1")
    return _strict(version["schema"]["openAPIV3Schema"])


def _strict(schema: Any) -> Any:
    """The schema in which a field that it does not name is an error, as it is for `kubectl apply --validate=strict`."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    fields = isinstance(made.get("properties"), dict) and made.get("type") == "object"
    if fields and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def faults(manifest: Manifest) -> Iterator[str]:
    """What is wrong with a manifest by the schema of its kind."""
    kind = manifest["kind"]
    if kind in CUSTOM:
        for error in Draft202012Validator(kuberay_schema(kind)).iter_errors(manifest):
            yield f"{error.json_path}: {error.message}"
    elif kind not in WITHOUT_SCHEMA:
        try:
            kubernetes_validate.validate(copy.deepcopy(manifest), KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield str(error)


def strings(value: Any) -> Iterator[str]:
    """Every string in a document, and every list of strings as the command that it may be."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list):
        if value and all(isinstance(each, str) for each in value):
            yield " ".join(value)
        for each in value:
            yield from strings(each)


def containers(value: Any) -> Iterator[Manifest]:
    """Every container of every pod template in a document."""
    if isinstance(value, dict):
        for key in ("containers", "initContainers"):
            yield from value.get(key) or ()
        for each in value.values():
            yield from containers(each)
    elif isinstance(value, list):
        for each in value:
            yield from containers(each)
