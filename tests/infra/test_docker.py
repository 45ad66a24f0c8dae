"""The image and the local cluster made of it: linted, confined, pinned, and with commands that Ray accepts."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.scripts.scripts import start

from tests.infra.manifests import INFRA
from tests.workflow_calls import IN_THE_IMAGE, REPOSITORY

DOCKERFILE = INFRA / "docker" / "Dockerfile"
COMPOSE = INFRA / "compose" / "compose.yaml"
HADOLINT = Path(sys.executable).with_name("hadolint")


def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(COMPOSE.read_text("utf-8"))["services"]


def stages() -> dict[str, str]:
    """The text of each stage of the Dockerfile, by name."""
    found = re.split(r"^FROM \S+ AS (\S+)$", DOCKERFILE.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def ray_node(command: list[str]) -> dict[str, Any]:
    """What Ray makes of a `ray start` command; raises click's error for one that it refuses."""
    assert command[:2] == ["ray", "start"]
    with start.make_context("ray start", command[2:]) as context:
        return context.params


def test_the_dockerfile_has_no_fault_that_hadolint_knows(tmp_path: Path) -> None:
    def lint(file: Path) -> int:
        return subprocess.run([HADOLINT, file], check=False, timeout=60).returncode

    assert lint(DOCKERFILE) == 0
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python:latest\nRUN apt-get install wget\n")
    assert lint(wrong) != 0


def test_both_images_end_as_another_user_than_root_with_a_health_check_of_the_ray_node() -> None:
    parts = stages()
    assert {"cpu", "cuda"} <= set(parts)
    assert re.findall(r"^USER (.*)$", DOCKERFILE.read_text("utf-8"), re.MULTILINE) == ["1000:1000"]
    assert "USER" in parts["runtime"]
    assert "/api/local_raylet_healthz" in parts["runtime"]
    for name in ("cpu", "cuda"):
        assert f"FROM runtime AS {name}\n" in DOCKERFILE.read_text("utf-8")
        assert f"COPY --from=packages-{name} " in parts[name]


def test_the_image_asks_silent_hosts_as_early_as_the_test_of_a_cut_link_does() -> None:
    source = (REPOSITORY / "tests/workflows/test_several_hosts.py").read_text("utf-8")
    settings = re.findall(r"(RAY_grpc_client_keepalive_\w+)=(\d+)", stages()["runtime"])
    assert len(settings) == 2
    for name, value in settings:
        assert f'"{name}": "{value}"' in source


def test_every_install_is_held_to_the_pinned_versions() -> None:
    installs = re.findall(r"pip install [^\\\n]+", DOCKERFILE.read_text("utf-8"))
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in install for install in installs)
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-slim-\w+$", DOCKERFILE.read_text("utf-8"), re.MULTILINE)


def test_every_package_that_an_image_may_hold_is_pinned() -> None:
    constraints = (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in constraints}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    (named,) = re.findall(r"# pipeline, and where needed (.+)\nARG EXTRAS=pipeline\n", stages()["packages"])
    extras = ["pipeline", *named.split(", ")]
    needed = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    assert not [each for each in needed if canonicalize_name(Requirement(each).name) not in pinned]


def test_the_image_holds_what_manifests_call_and_nothing_that_is_not_named() -> None:
    ignored = (INFRA / "docker" / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert "*" in ignored
    assert all((REPOSITORY / name).exists() for name in kept)
    assert {"rssnet", "pipeline", "workflows", "infra/kuberay/run_rayjob.py"} <= set(kept)
    copied = " ".join(re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text("utf-8"), re.MULTILINE)).split()
    assert all(name == "." or (REPOSITORY / name).exists() or name.endswith("/") for name in copied)
    assert f"WORKDIR {IN_THE_IMAGE}" in stages()["runtime"]


def test_the_local_cluster_is_a_head_without_tasks_two_workers_and_an_s3_server() -> None:
    head, worker = services()["head"], services()["worker"]
    node = ray_node(shlex.split(head["command"]))
    assert node["head"]
    assert node["num_cpus"] == 0
    assert worker["deploy"]["replicas"] == 2
    joined = ray_node(shlex.split(worker["command"]))
    assert joined["address"] == f"head:{node['port']}"
    for service, started in ((head, node), (worker, joined)):  # else Ray would keep objects on the disk
        assert service["shm_size"] == "1gb"
        assert started["object_store_memory"] <= 0.8 * 2**30
    assert head["environment"]["AWS_ENDPOINT_URL"] == "http://s3:5000"
    (moto,) = re.findall(r"^moto==(.*)$", (REPOSITORY / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert services()["s3"]["image"] == f"motoserver/moto:{moto}"
    (script,) = services()["buckets"]["command"]
    compile(script, "buckets", "exec")


@pytest.mark.parametrize("name", services())
def test_each_service_is_confined_and_reached_from_this_machine_alone(name: str) -> None:
    service = services()[name]
    assert service["user"] == "1000:1000"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert not service.get("privileged")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    for secret in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert service["environment"][secret] == f"${{{secret}:?is not set}}"


def test_what_compose_names_is_there() -> None:
    document = yaml.safe_load(COMPOSE.read_text("utf-8"))
    for service in document["services"].values():
        assert set(service.get("depends_on", ())) <= set(document["services"])
        assert set(service["networks"]) <= set(document["networks"])
        assert set(service.get("secrets", ())) <= set(document["secrets"])
